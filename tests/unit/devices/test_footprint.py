"""Files leave the page cache, and say how much of them did; memory has a peak."""

import mmap
import os

from edgesft.devices import footprint


def test_files_leave_the_page_cache_where_the_system_can_tell(tmp_path):
    file = tmp_path / "weights.bin"
    file.write_bytes(os.urandom(4 << 20))
    share = footprint.evict([file])
    assert 0.0 <= share <= 1.0
    unprobed = (5 << 18) + (1 << 16)
    with file.open("rb") as opened:
        if share == 1.0:
            assert not footprint.cached(opened.fileno(), unprobed)
        opened.read()
        assert footprint.cached(opened.fileno(), unprobed)


def test_what_is_no_file_is_passed_over(tmp_path):
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    assert footprint.evict([tmp_path, tmp_path / "link"]) == 0.0
    assert footprint.evict([]) == 0.0


def test_the_peak_holds_what_was_let_go():
    before = footprint.reset_peak()
    with mmap.mmap(-1, 32 << 20) as ballast:  # from the kernel: an allocator may reuse resident pages
        ballast[:: mmap.PAGESIZE] = b"\1" * (len(ballast) // mmap.PAGESIZE)
    found = footprint.peak(before)
    assert found["before_bytes"] == before
    assert found["peak_bytes"] >= before
    assert found["peak_above_bytes"] == max(0, found["peak_bytes"] - before)
    assert found["peak_above_bytes"] >= 30 << 20
