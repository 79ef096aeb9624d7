"""Error rates of the gate on this machine: an artefact against itself, and against itself slowed down.

    edgesft calibrate EXPORTED
    python tests/bench/bench_gate.py EXPORTED --same 60 --slower 40 --slowdown 5 -o docs/results/gate.json

Every gate is a real one with a seed of its own, decided by the number that the calibration chose. One line a
gate goes into a file beside the result (`gate.jsonl`), and the same command goes on from there. A file STOP
beside the result ends it after the gate that runs. The result is written anew after every gate.
"""

import argparse
import json
import time
from collections import Counter
from pathlib import Path

from scipy.stats import beta

from edgesft.core.catalog import runtime
from edgesft.stages import gate as gating

VERDICTS = ("pass", "fail", "inconclusive", "not_comparable", "nothing_measured", "device_lost")
OPTIONS = ("max_pairs", "margin_percent", "prompt_tokens", "decode_tokens", "repetitions", "threads")
COUNTED = VERDICTS[:3]


def upper_bound(count: int, of: int) -> float | None:
    """One-sided 95 % upper bound of a rate (Clopper & Pearson): 0 of 60 is at most 4.9 %."""
    return None if of == 0 else 1.0 if count == of else round(float(beta.ppf(0.95, count + 1, of - count)), 4)


def one_gate(arguments: argparse.Namespace, kind: str, seed: int) -> dict:
    """Run one gate; its line."""
    began = time.monotonic()
    report = gating.gate(
        arguments.exported,
        arguments.exported,
        calibration=arguments.calibration,
        seed=seed,
        drill_slowdown=arguments.slowdown if kind == "slower" else 0.0,
        **{k: getattr(arguments, k) for k in OPTIONS if getattr(arguments, k) is not None},
    )
    first = [m for m in report["metrics"] if m["metric"] == report["metric"]]
    return {
        "kind": kind,
        "seed": seed,
        "verdict": report["verdict"],
        "error": report.get("error"),
        "faster": any(m.get("faster") for m in first),
        **{k: report[k] for k in ("metric", "ratio", "interval", "pairs", "noise", "decided_by")},
        **{k: report[k] for k in ("estimator", "clock", "calibration")},
        "discarded": len(report["discarded"]),
        "seconds": round(time.monotonic() - began, 1),
    }


def summary(lines: list[dict]) -> dict:
    """Counts, bounds, pairs and seconds of the gates of one kind."""
    counted = [line for line in lines if line["verdict"] in COUNTED]
    counts = Counter(line["verdict"] for line in lines)
    pairs = [line["pairs"] for line in counted]
    return {
        "gates": len(lines),
        "verdicts": {v: counts[v] for v in VERDICTS if counts[v] or v in COUNTED},
        "rate_at_most": {v: upper_bound(counts[v], len(counted)) for v in COUNTED},
        "significantly_faster": sum(line["faster"] for line in counted),
        "pairs_mean": round(sum(pairs) / len(pairs), 1) if pairs else None,
        "pairs": dict(sorted(Counter(pairs).items())),
        "ratios": [line["ratio"] and round(line["ratio"], 4) for line in counted],
        "seconds": round(sum(line["seconds"] for line in lines), 1),
    }


def begin(side: Path, header: dict) -> list[dict]:
    """Lines of gates that are done; the first line of a file says what it is of, and must agree."""
    if not side.exists():
        side.write_text(json.dumps(header) + "\n")
        return []
    found = []
    text = side.read_text()
    for line in text.splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            break  # cut off by a kill
    if not found or found[0] != header:
        raise SystemExit(f"{side} is of other gates, remove it or choose another -o: {found[:1]}")
    side.write_text("".join(json.dumps(line) + "\n" for line in found))
    return found[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("exported", type=Path)
    parser.add_argument("--same", type=int, default=60, help="gates of the artefact against itself")
    parser.add_argument("--slower", type=int, default=40, help="gates against itself slowed down")
    parser.add_argument("--slowdown", type=float, default=5.0, help="by how many per cent")
    parser.add_argument("--calibration", default="auto", help="auto, none, or a calibration.json")
    for name in OPTIONS:
        kind = float if name == "margin_percent" else int
        parser.add_argument("--" + name.replace("_", "-"), type=kind, default=None)
    parser.add_argument("-o", "--out", type=Path, required=True)
    arguments = parser.parse_args()

    subject = gating.resolve(arguments.exported)
    fingerprint = runtime("devices.host").fingerprint()
    header = {
        "artifact": subject.digest,
        "fingerprint": fingerprint["id"],
        "slowdown": arguments.slowdown,
        "calibration": str(arguments.calibration),
        "options": {k: getattr(arguments, k) for k in OPTIONS},
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    side, stop = arguments.out.with_suffix(".jsonl"), arguments.out.parent / "STOP"
    lines = begin(side, header)
    done = {(line["kind"], line["seed"]) for line in lines}
    # Both kinds in turn, so that what the machine does meanwhile meets both.
    wanted = [("same", i) for i in range(arguments.same)] + [("slower", i) for i in range(arguments.slower)]
    wanted.sort(
        key=lambda each: (each[1] + 0.5) / (arguments.same if each[0] == "same" else arguments.slower)
    )
    for number, (kind, index) in enumerate(wanted, 1):
        seed = 1000 * (kind == "slower") + index
        if (kind, seed) in done:
            continue
        if stop.exists():
            print(f"{stop} exists: stopped before gate {number} of {len(wanted)}")
            break
        line = one_gate(arguments, kind, seed)
        lines.append(line)
        with side.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(
            f"{number}/{len(wanted)} {kind} {line['verdict']} {line['ratio']} {line['pairs']} pairs",
            flush=True,
        )
        write(arguments, subject, fingerprint, lines)
    result = write(arguments, subject, fingerprint, lines)
    print(json.dumps({k: v for k, v in result.items() if k != "fingerprint"}, indent=2))


def write(arguments: argparse.Namespace, subject, fingerprint: dict, lines: list[dict]) -> dict:
    """The result of the gates so far, written to its file."""
    decided = {k: sorted({str(line[k]) for line in lines}) for k in ("metric", "estimator", "clock")}
    result = {
        "what": "verdicts of whole gates of one artefact against itself, and against itself slowed down",
        "same": summary([line for line in lines if line["kind"] == "same"]),
        "slower": {
            "slowdown_percent": arguments.slowdown,
            **summary([line for line in lines if line["kind"] == "slower"]),
        },
        "bar": {"same_fail": 0, "slower_fail": "38 of 40", "slower_pass": 0},
        "decided_by": decided,
        "calibrated": bool(lines) and all(line["calibration"] is not None for line in lines),
        "artifact": {"ref": arguments.exported.name, "digest": subject.digest, "bytes": subject.bytes},
        "options": {k: v for k in OPTIONS if (v := getattr(arguments, k)) is not None},
        "fingerprint": fingerprint,
    }
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    return result


if __name__ == "__main__":
    main()
