"""baseline: measurements kept over time in a plain folder, which can live in git.

One file an entry, `STORE/NAME/<time>-<digest>.json`: the record without its raw samples, what a comparison
needs of every process, and the SHA-256 of all that. Nothing is ever changed in place, so that two branches
that both add an entry merge without a conflict.

A stored number is no partner for a verdict: against a stored median, a shared machine's own drift calls 29 %
of the changes that are none a regression of 5 %. `diff` therefore shows ratios with their bounds, which know
nothing of that drift, and leaves the verdict to the gate, which runs both sides side by side.
"""

import contextlib
import errno
import re
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from edgesft.core import artifact, catalog, console
from edgesft.core.artifact import Artifact
from edgesft.core.errors import ArtifactError, UsageError, nearest
from edgesft.stages.baselines import stored
from edgesft.stages.baselines.stored import SCHEMA, UNITS, Entry
from edgesft.stages.gating.verdict import Inconclusive, NotComparable, Regression

STORE = Path("baselines")
LOCK = ".lock"
IGNORED = f"{LOCK}\n.*.tmp\n"
WAIT = 30.0  # seconds that a writer waits for another one
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
LEVEL = 0.95
CONDITIONS = ("prompt_tokens", "decode_tokens", "threads", "batch", "shapes")


# ---- the folder


def _checked_name(name: str) -> str:
    if NAME.fullmatch(name) is None:
        raise UsageError(
            f"`{name}` cannot name a baseline, expected up to 64 letters, digits, `.`, `_` and `-`,"
            " the first a letter or a digit"
        )
    return name


def names(store: Path) -> list[str]:
    """The series in a store. Raises ArtifactError if there is no store."""
    if not store.is_dir():
        raise ArtifactError(
            f"`{store}` is not a folder of baselines", f"edgesft baseline add NAME DIR --store {store}"
        )
    return sorted(p.name for p in store.iterdir() if p.is_dir() and NAME.fullmatch(p.name))


def _series(store: Path, name: str) -> list[Entry]:
    """Every entry of a series, the oldest first, broken ones included. Raises UsageError, ArtifactError."""
    _checked_name(name)
    known = names(store)
    if name not in known:
        raise UsageError(f"`{store}` has no baseline `{name}`", nearest(name, known))
    return _read_series(store, name)


def _read_series(store: Path, name: str) -> list[Entry]:
    folder = store / name
    if folder.is_symlink():  # a store may come out of a foreign repository
        raise ArtifactError(f"`{folder}` is a link, expected a folder")
    return [stored.read(file, name) for file in sorted(folder.glob("[!.]*"))]


@contextlib.contextmanager
def _writing(store: Path) -> Iterator[None]:
    """Hold the store's lock. Raises ArtifactError if another process keeps it, or nothing can be written."""
    try:
        store.mkdir(parents=True, exist_ok=True)
        if not (store / ".gitignore").exists():
            artifact.write_bytes(store / ".gitignore", IGNORED.encode())
        with FileLock(store / LOCK, timeout=WAIT):
            for left in store.glob("*/.*.tmp"):  # of a writer that was killed: nobody writes now
                left.unlink(missing_ok=True)
            yield
    except Timeout:
        raise ArtifactError(
            f"`{store}` has been locked by another process for {WAIT:.0f} s", "wait for it and try again"
        ) from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise ArtifactError(
                f"no room left to write `{store}`", "free some disk and run it again"
            ) from None
        raise ArtifactError(f"`{store}` cannot be written: {error.strerror or error}") from None


# ---- commands


def add(
    store: Path, name: str, source: str | Path, label: str | None = None, *, restart: bool = False
) -> dict[str, Any]:
    """Keep the measurement in the folder `source`, of kind `profile` or `verdict` (of which: head).

    label: a commit, say. restart: accept another device or workload than that of the series so far; the
    trend begins anew there. Returns the entry's summary, with `added` false if it was there already.
    Raises NotComparable, naming the field, if it does not belong to the series, UsageError for the name,
    ArtifactError for a source that is missing or altered, or that measured nothing.
    """
    _checked_name(name)
    content = {"name": name, "label": label, **stored.content(_source(source))}
    with _writing(store):
        there = _read_series(store, name) if (store / name).is_dir() else []
        same = next((e for e in there if e.content.get("digest") == content["digest"]), None)
        if same is not None:
            return {**summary(same), "added": False}
        if there and not restart:
            _belongs(there[-1], content, name)
        (store / name).mkdir(exist_ok=True)
        now = datetime.now(UTC)
        digest8 = content["digest"].removeprefix("sha256:")[:8]
        file = store / name / f"{now:%Y-%m-%dT%H%M%S.%f}Z-{digest8}.json"
        stored.write(file, {**content, "added_at": now.isoformat().replace("+00:00", "Z")})
    return {**summary(stored.read(file, name)), "added": True}


def _belongs(newest: Entry, content: Mapping[str, Any], name: str) -> None:
    """Raise NotComparable unless `content` continues the series of which `newest` is the last entry."""
    _whole(newest, name)
    why = _difference(content, newest.content)
    if why:
        raise NotComparable(
            f"it does not continue the baseline `{name}`: {why}",
            _refusal(name, why),
            "use another name, or `--restart` to begin the series anew from here",
        )


def entries(store: Path, name: str | None = None) -> list[dict[str, Any]]:
    """A summary of every entry of one series or of all, oldest first; `broken` says why one cannot be used.

    Raises ArtifactError if there is no store, UsageError if there is no such series.
    """
    return [summary(e) for n in ([name] if name else names(store)) for e in _series(store, n)]


def show(store: Path, name: str, *, check: bool = False, metric: str | None = None) -> dict[str, Any]:
    """A series: its entries and its trend.

    check: raise NotComparable if an entry is broken. metric: of `stored.UNITS`; None: the series' own.
    """
    series = _series(store, name)
    if check:
        for each in series:
            _whole(each, name)
    _say_broken(series)
    trend = _trend(name, series, metric)
    return {"schema": SCHEMA, "name": name, "entries": [summary(e) for e in series], "trend": trend}


def trend_record(store: Path, name: str, metric: str | None = None) -> dict[str, Any]:
    """The trend of a series as reports plot it.

    `{schema, name, metric, unit, points: [{name, label, added_at, value, low, high}], changes: [{index,
    label, percent, before, after, ratio}], drift, noise, left_out}`. low, high: the range over processes.
    drift: per cent over the whole series where a line explains it better than steps. left_out: entries
    that are broken, or older than the last change of device or workload.
    """
    series = _series(store, name)
    _say_broken(series)
    return _trend(name, series, metric)


def diff(
    store: Path,
    name: str,
    source: str | Path,
    *,
    against: str | None = None,
    metric: str | None = None,
    fail_over: float | None = None,
) -> dict[str, Any]:
    """Compare the measurement in the folder `source` with an entry of a series.

    against: label or file name of the entry; None: the newest. metric: the one that `fail_over` is about;
    None: the time per token, the latency where there is none, and for a gate's verdict what it gated.
    fail_over: per cent for `judge`.
    Raises NotComparable for an entry that is broken or of a newer schema, another device, another workload.
    """
    series = _series(store, name)
    base = _chosen(series, name, against)
    _say_broken(series)
    now = stored.content(_source(source))
    why = _difference(now, base.content)
    if why:
        raise NotComparable(f"it cannot be compared with the baseline `{name}`: {why}", _refusal(name, why))
    ours, theirs = now["metrics"], base.content["metrics"]
    shared = [m for m in UNITS if m in ours and m in theirs]
    chosen = metric or now["primary"]
    if chosen not in shared:
        raise NotComparable(
            f"`{chosen}` is not measured on both sides", _refusal(name, chosen), nearest(chosen, shared)
        )
    about = {k: now["record"].get(k) for k in ("quantize", "pattern", "density")}
    was = {k: base.content["record"].get(k) for k in about}
    return {
        "schema": SCHEMA,
        "name": name,
        "baseline": summary(base),
        "now": {"ref": str(source), "kind": now["kind"], "digest": now["digest"]},
        "metric": chosen,
        "fail_over": fail_over,
        "level": LEVEL,
        "rows": [_row(m, theirs[m], ours[m]) for m in shared],
        "notes": [f"{k} is `{about[k]}` now and `{was[k]}` there" for k in about if about[k] != was[k]],
    }


def judge(record: Mapping[str, Any]) -> None:
    """Nothing, unless `diff` was given a `fail_over`: Regression if even the lower bound is above it.

    Raises Inconclusive where the processes are too few for a bound.
    """
    limit = record["fail_over"]
    if limit is None:
        return
    row = next(r for r in record["rows"] if r["metric"] == record["metric"])
    text = f"{row['metric']} is {row['ratio']:.3f} times the baseline `{record['name']}`"
    if row["low"] is None:
        there, now = row["processes"]
        raise Inconclusive(
            f"{text}, with too few processes for a bound: {there} there, {now} now",
            dict(record),
            "profile both with `--processes 4` or more, or compare the artefacts themselves: edgesft gate",
        )
    if row["low"] > 1 + limit / 100:
        raise Regression(f"{text} (at least {row['low']:.3f}), allowed: {1 + limit / 100:.3f}", dict(record))


def prune(
    store: Path,
    name: str | None = None,
    *,
    keep: int = 20,
    older_than_days: float | None = None,
    dry_run: bool = False,
) -> list[str]:
    """Remove old entries of one series or of all; returns their files, relative to the store.

    The newest `keep` (at least 1) of a series stay; with `older_than_days`, younger ones do too. Broken
    entries are neither counted nor removed: a newer EdgeSFT may read them, or git may have a whole one.
    """
    if keep < 1:
        raise UsageError(f"`keep` is {keep}, expected at least 1")
    if older_than_days is not None and older_than_days < 0:
        raise UsageError(f"`older_than_days` is {older_than_days}, expected 0 or more")
    wanted = [name] if name else names(store)
    before = datetime.now(UTC) - timedelta(days=older_than_days or 0)
    removed = []
    with contextlib.nullcontext() if dry_run else _writing(store):
        for each in wanted:
            series = _series(store, each)
            _say_broken(series)
            for entry in [e for e in series if e.broken is None][:-keep]:
                if older_than_days is None or entry.added_at < before:
                    removed.append(f"{each}/{entry.file.name}")
                    if not dry_run:
                        entry.file.unlink(missing_ok=True)
    return removed


# ---- parts


def _source(source: str | Path) -> Artifact:
    return artifact.read(Path(source), "profile", "verdict", ref=str(source))


def _refusal(name: str, why: str) -> dict[str, Any]:
    return {"schema": SCHEMA, "name": name, "verdict": "not_comparable", "error": why}


def _whole(entry: Entry, name: str) -> None:
    if entry.broken is not None:
        raise NotComparable(
            f"the baseline `{entry.file}` cannot be used: {entry.broken}",
            _refusal(name, entry.broken),
            f"git checkout -- {entry.file}",
        )


def _say_broken(series: list[Entry]) -> None:
    for each in series:
        if each.broken is not None:
            console.warn(f"`{each.file}` is left out: {each.broken}")


def _chosen(series: list[Entry], name: str, against: str | None) -> Entry:
    """The entry to compare with; it is whole. Raises NotComparable, UsageError."""
    found = series
    if against is not None:
        wanted = (against, against.removesuffix(".json"))
        found = [e for e in series if e.file.stem in wanted or e.content.get("label") == against]
        if not found:
            labels = [str(e.content["label"]) for e in series if e.content.get("label")]
            raise UsageError(f"the baseline `{name}` has no entry `{against}`", nearest(against, labels))
    if not found:
        raise UsageError(f"the baseline `{name}` is empty", f"edgesft baseline add {name} DIR")
    _whole(found[-1], name)
    return found[-1]


def _difference(now: Mapping[str, Any], there: Mapping[str, Any]) -> str | None:
    """The first field in which two measurements were made under other conditions, in words."""
    host = catalog.runtime("devices.host")
    for line in host.differences(now["fingerprint"], there["fingerprint"]):
        return str(line)
    for field in ("kind", "estimator"):
        if now.get(field) != there.get(field):
            return f"`{field}` is `{there.get(field)}` there and `{now.get(field)}` here"
    ours, theirs = now["workload"], there["workload"]
    for field in CONDITIONS:
        if ours.get(field) != theirs.get(field):
            return f"`{field}` is `{theirs.get(field)}` there and `{ours.get(field)}` here"
    return None


def _row(metric: str, base: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """One line of the comparison. verdict: `higher`, `lower`, `same`, `not shown`, `no bound`."""
    from edgesft.core.statistics import trend

    ratio, low, high = now["value"] / base["value"], None, None
    if base.get("exact") and now.get("exact"):
        low = high = ratio
    elif base["processes"] and now["processes"]:
        ratio, low, high = trend.level_ratio(base["processes"], now["processes"], LEVEL)
    if low is None or high is None:
        verdict = "no bound"
    elif low == high == 1:
        verdict = "same"
    else:
        verdict = "higher" if low > 1 else "lower" if high < 1 else "not shown"
    return {
        "metric": metric,
        "unit": UNITS[metric],
        "baseline": base["value"],
        "now": now["value"],
        "ratio": ratio,
        "low": low,
        "high": high,
        "processes": [len(base["processes"]), len(now["processes"])],
        "verdict": verdict,
    }


def _trend(name: str, series: list[Entry], metric: str | None) -> dict[str, Any]:
    from edgesft.core.statistics import trend

    whole = [e for e in series if e.broken is None]
    last: Mapping[str, Any] = whole[-1].content if whole else {"primary": "tpot", "metrics": {}}
    chosen: str = metric or last["primary"]
    if whole and chosen not in last["metrics"]:
        raise UsageError(f"the baseline `{name}` has no metric `{chosen}`", nearest(chosen, last["metrics"]))
    run: list[Entry] = []
    for each in reversed(whole):  # back to the last change of device or workload
        if _difference(last, each.content) is not None or chosen not in each.content["metrics"]:
            break
        run.insert(0, each)
    values = [e.content["metrics"][chosen] for e in run]
    found = trend.analyse([v["value"] for v in values])
    points = [
        {
            "name": e.content["label"] or e.content["added_at"],
            "label": e.content["label"],
            "added_at": e.content["added_at"],
            **{k: v[k] for k in ("value", "low", "high")},
        }
        for e, v in zip(run, values, strict=True)
    ]
    return {
        "schema": SCHEMA,
        "name": name,
        "metric": chosen,
        "unit": UNITS[chosen],
        "points": points,
        "changes": [
            {
                "index": index,
                "label": points[index]["name"],
                "percent": 100 * (after / before - 1),
                "before": before,
                "after": after,
                "ratio": after / before,
            }
            for index, before, after in found.changes
        ],
        "drift": found.drift,
        "noise": found.noise,
        "left_out": len(series) - len(run),
    }


def summary(entry: Entry) -> dict[str, Any]:
    """An entry in a few fields; those that a broken one does not tell are None."""
    content = entry.content
    primary = content.get("primary")
    measured = content.get("metrics", {}).get(primary, {})
    return {
        "name": entry.name,
        "file": entry.file.name,
        "added_at": content.get("added_at"),
        "label": content.get("label"),
        "kind": content.get("kind"),
        "digest": content.get("digest"),
        "metric": primary,
        "value": measured.get("value"),
        "unit": UNITS.get(str(primary)),
        "broken": entry.broken,
    }
