"""Workers of the benchmarks that compare with others: processes that answer lines, one at a time."""

import json
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

PEERS = Path(__file__).with_name("peers")
ROOT = Path(__file__).parents[2]
# Everyone's weights on huge pages: without, ours would win by pages alone.
HUGE = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


class Worker:
    """A process that is asked a line and answers one; what it logs goes nowhere."""

    def __init__(self, command, ready=False, **env):
        self._process = subprocess.Popen(
            [str(part) for part in command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=os.environ | HUGE | env,
        )
        if ready:
            line = self._process.stdout.readline()
            assert "ready" in line, f"{command} did not start: {line}"

    def ask(self, line):
        self._process.stdin.write(line if line.endswith("\n") else line + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, f"a worker died of `{line}`"
        return answer

    def json(self, asked):
        return json.loads(self.ask(json.dumps(asked)))

    def close(self):
        self._process.stdin.close()
        self._process.wait(60)


def peer_python():
    """The environment of the peers, None where there is none."""
    found = os.environ.get("EDGESFT_BENCH_PEERS")
    return Path(found) if found else None


def own(script, *arguments):
    """A worker of this environment."""
    return [sys.executable, PEERS / script, *arguments]


def machine():
    """What a result has to be read with."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    flags = next((line for line in lines if line.startswith("flags")), "")
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "isa": [flag for flag in ("avx2", "avx512_vnni", "avx512_bf16", "amx_int8") if flag in flags],
        "onnxruntime": metadata.version("onnxruntime"),
        "pages": "2 MB for all, where the kernel grants them",
    }


def peer_versions(python):
    code = (
        "import json; from importlib.metadata import version as v;"
        "print(json.dumps({n: v(n) for n in ('onnxruntime-genai', 'llama-cpp-python')}))"
    )
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def write(name, result):
    """The result beside the others, or where $EDGESFT_BENCH_OUT says."""
    out = Path(os.environ.get("EDGESFT_BENCH_OUT") or ROOT / "docs" / "results")
    out.mkdir(parents=True, exist_ok=True)
    (out / name).write_text(json.dumps(result, indent=1) + "\n")
