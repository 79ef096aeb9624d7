"""What tuning methods share: the tuned model, directions, trajectories, ranks, offloading."""
