"""An append-only list of JSON records that survives a kill at any moment.

One record a line. A line counts once its newline is on the disk; a torn last line is dropped at reading.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgesft.core.errors import ArtifactError


class Journal:
    """The records of `path`, old ones first; `append` adds one."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.records: list[dict[str, Any]] = []
        data = path.read_bytes() if path.exists() else b""
        whole = data[: data.rfind(b"\n") + 1]
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                self.records.append(json.loads(line))
            except ValueError as error:
                raise ArtifactError(
                    f"`{path}` is broken at line {number}: {error}",
                    "remove the output folder and start again",
                ) from None
        self._file = path.open("ab")
        self._file.truncate(len(whole))

    def append(self, record: Mapping[str, Any], *, sync: bool = True) -> None:
        """Add a record. sync: wait until the disk has it; without it a power cut may lose the last ones."""
        self.records.append(dict(record))
        self._file.write((json.dumps(record) + "\n").encode())
        self._file.flush()
        if sync:
            self.sync()

    def sync(self) -> None:
        """Wait until the disk has every record."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()
