"""docs/format.md against the code."""

import json
import re
from pathlib import Path

import numpy as np

from edgesft.kernels.nm_matmul import file, layout, patterns

PAGE = Path(__file__).parents[4] / "docs" / "format.md"


def test_the_example_of_the_page_holds():
    whole = np.zeros((16, 32), np.int8)
    whole[3, 1], whole[3, 2], whole[5, 28], whole[5, 31] = -8, 7, 1, 2
    packed = layout.pack_codes(whole, np.ones((16, 1), np.float16), "int4", 0, sparse=True)
    other = np.zeros((16, 32), np.int8)
    other[2, [1, 3, 4, 6]] = 1, 2, -3, 4
    masked = layout.pack_codes(other, np.ones((16, 1), np.float16), "int4", 0, sparse=True, pattern="4:8")
    lines = re.findall(r"^(\d+) +((?:[0-9a-f]{2} ){3}[0-9a-f]{2})", PAGE.read_text(), re.MULTILINE)
    assert len(lines) == 8
    for number, (offset, text) in enumerate(lines):
        stream = (packed if number < 6 else masked).stream
        assert stream[int(offset) : int(offset) + 4].tobytes() == bytes.fromhex(text)


def test_the_page_has_the_sizes_of_all_patterns():
    table = re.search(r"^\| \| 1:4 \|.*?\n\n", PAGE.read_text(), re.MULTILINE | re.DOTALL)[0]
    head, _, *rows = (line.strip("| ").split(" | ") for line in table.strip().split("\n"))
    seen = {name for cell in head for name in cell.split(", ")}
    assert seen == set(patterns.NAMES)
    for row in rows:
        for cell, bits in zip(head, row[1:], strict=True):
            for name in cell.split(", ") if bits != "-" else []:
                for value in row[0].split(", "):
                    assert layout.tile_bytes(name, value) == float(bits) * 64


def test_the_description_of_the_page_is_one_that_is_read():
    text = re.search(r'^\{"version": 1, "matrices".*?\}\}\}', PAGE.read_text(), re.MULTILINE | re.DOTALL)[0]
    (about,) = json.loads(text)["matrices"].values()
    packed = layout.pack_codes(
        np.zeros((576, 1536), np.int8), np.ones((576, 24), np.float16), "int4", 64, sparse=True
    )
    assert about == file.describe(packed, "F32")


def test_the_page_is_of_this_version():
    assert PAGE.read_text().startswith(f"# nm-packed, version {layout.VERSION}\n")
