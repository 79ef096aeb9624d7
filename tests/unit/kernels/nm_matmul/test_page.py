"""docs/format.md against the code."""

import re
from pathlib import Path

import numpy as np

from edgesft.kernels.nm_matmul import layout

PAGE = Path(__file__).parents[4] / "docs" / "format.md"


def test_the_example_of_the_page_holds():
    whole = np.zeros((16, 32), np.int8)
    whole[3, 1], whole[3, 2], whole[5, 28], whole[5, 31] = -8, 7, 1, 2
    packed = layout.pack_codes(whole, np.ones((16, 1), np.float16), "int4", 0, sparse=True)
    lines = re.findall(r"^(\d+) +((?:[0-9a-f]{2} ){3}[0-9a-f]{2})", PAGE.read_text(), re.MULTILINE)
    assert len(lines) == 6
    for offset, text in lines:
        assert packed.stream[int(offset) : int(offset) + 4].tobytes() == bytes.fromhex(text)


def test_the_page_is_of_this_version():
    assert PAGE.read_text().startswith(f"# nm-packed, version {layout.VERSION}\n")
