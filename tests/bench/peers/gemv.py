"""Worker: one layer in ONNX Runtime, packed by us and quantised by it, and the roof of the machine.

A line of JSON each way: {"open": {rows, columns, threads, megabytes, m}} makes sessions; {"run": name} gives
{"seconds": of one layer}; {"read": threads} gives {"bytes_per_second": ...}.
"""

import ctypes
import json
import sys
import threading
import time

from edgesft.exporters import measure
from edgesft.exporters.dialects.packed import Layer
from edgesft.kernels.nm_matmul import cpu

# name: kind, sparse, group of ours, group of MatMulNBits
KINDS = {
    "2:4 int4 g64": ("packed", True, 64, 32),
    "2:4 int4 g32": ("packed", True, 32, 32),
    "dense int4 g32": ("tiled", False, 32, 32),
    "MatMulNBits g32": ("dense", False, 32, 32),
    "MatMulNBits g128": ("dense", False, 32, 128),
}


def read(threads: int, megabytes: int = 256) -> float:
    """Bytes a second that so many threads read together, each a part of its own that no cache holds."""
    code = cpu.functions()
    size = megabytes << 20
    parts = [code.edgesft_nm_buffer(size) for _ in range(threads)]
    for part in parts:
        ctypes.memset(part, 1, size)
    speeds = []
    for _ in range(2):
        together = [threading.Thread(target=code.edgesft_nm_read, args=(part, size)) for part in parts]
        began = time.perf_counter()
        for each in together:
            each.start()
        for each in together:
            each.join()
        speeds.append(threads * size / (time.perf_counter() - began))
    for part in parts:
        code.edgesft_nm_release(part)
    return max(speeds)


def main() -> None:
    sessions: dict[str, tuple] = {}
    columns = 0
    for line in sys.stdin:
        asked = json.loads(line)
        answer: dict = {}
        if "open" in asked:
            said = asked["open"]
            columns = said["columns"]
            sessions = {}
            for name, (kind, sparse, ours, theirs) in KINDS.items():
                layer = Layer(name, said["rows"], columns, 4, ours, sparse)
                session, copies = measure.session(
                    layer, kind, theirs, said["threads"], said["megabytes"] << 20
                )
                sessions[name] = measure.caller(session, layer, copies, said.get("m", 1)), copies
            answer = {"copies": {name: copies for name, (_, copies) in sessions.items()}}
        elif "run" in asked:
            call, copies = sessions[asked["run"]]
            began = time.perf_counter()
            call()
            answer = {"seconds": (time.perf_counter() - began) / copies}
        else:
            answer = {"bytes_per_second": read(asked["read"])}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
