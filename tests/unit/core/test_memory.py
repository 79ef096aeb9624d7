import subprocess
import sys

import pytest

RETENTION = """
import sys
from edgesft.core import memory
def resident():
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmRSS")) / 1024
if sys.argv[1] == "tighten":
    memory.tighten()
before = resident()
for _ in range(3):
    bytearray(b"x") * (30 << 20)  # glibc now takes such sizes from its heap
pairs = [(bytearray(b"x") * (2 << 20), bytearray(b"x") * 100_000) for _ in range(20)]
keep = [small for _, small in pairs]  # between what is freed
del pairs
held = resident() - before
if sys.argv[1] == "trim":
    memory.trim()
    held = resident() - before
print(held)
"""


def held(mode):
    done = subprocess.run(
        [sys.executable, "-c", RETENTION, mode], capture_output=True, text=True, check=True, timeout=60
    )
    return float(done.stdout)  # MiB


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_freed_memory_goes_back():
    plain = held("nothing")
    if plain < 30:
        pytest.skip("this C library gives memory back by itself")
    assert held("trim") < 8
    assert held("tighten") < 8
