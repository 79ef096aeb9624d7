"""The parts of a `tune` run: the loop, what is trained, what is watched."""
