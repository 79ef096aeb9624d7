"""The store of calibrations: one JSON file each, found again by device, metric, workload and artefact class.

A file carries the SHA-256 of its own content, so that damage is seen. Files are named by that content and
written whole: two writers at once leave two files, and the newer one is found.
"""

import json
import math
import os
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from filelock import FileLock

from edgesft.core import artifact, console
from edgesft.core.errors import ArtifactError

SCHEMA = 1
FILE = "calibration.json"
DAYS = 30.0  # after which a machine counts as another one
AHEAD = timedelta(days=1)  # a calibration from further in the future shows that a clock was wrong
CLASS = ("kind", "quantize", "pattern")  # what must agree of an artefact: its noise is that of its kernels
REQUIRED = (
    *("armed", "why", "metric", "estimator", "clock", "margin_percent", "tolerance_percent", "alpha", "beta"),
    *("max_pairs", "margin_met_percent", "workload", "fingerprint", "artifact", "made_at", "expires_at"),
)
REDO = "edgesft calibrate ARTEFACT"


def folder() -> Path:
    """`$EDGESFT_CALIBRATIONS`, else `calibrations` in the platform's folder for data of this user."""
    named = os.environ.get("EDGESFT_CALIBRATIONS")
    if named:
        return Path(named)
    from platformdirs import user_data_dir

    return Path(user_data_dir("edgesft")) / "calibrations"


def seal(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record as a file keeps it: JSON values, its schema, and `content`, the hash of all the rest."""
    plain = json.loads(json.dumps({**record, "schema": SCHEMA}, default=str))
    plain.pop("content", None)
    return {**plain, "content": artifact.digest_json(plain)}


def dates(now: datetime, days: float = DAYS) -> dict[str, str]:
    """`made_at` and `expires_at` of a calibration that ends at `now` and holds for `days`. ISO 8601, UTC."""
    made = now.astimezone(UTC).replace(microsecond=0)
    return {"made_at": made.isoformat(), "expires_at": (made + timedelta(days=days)).isoformat()}


def save(record: Mapping[str, Any]) -> Path:
    """Keep a record in the store; its file. Raises ArtifactError where the folder cannot be written."""
    sealed = seal(record)
    home = folder()
    name = _prefix(sealed["fingerprint"]["id"], sealed["metric"]) + _short(sealed["content"]) + ".json"
    try:
        home.mkdir(parents=True, exist_ok=True)
        with FileLock(home / ".lock"):  # the same record twice at once would share a temporary file
            artifact.write_json(home / name, sealed)
    except OSError as error:
        raise ArtifactError(
            f"the folder of calibrations `{home}` cannot be written: {error.strerror}",
            "set EDGESFT_CALIBRATIONS to a folder with room",
        ) from None
    return home / name


def _short(digest: str) -> str:
    return digest.removeprefix("sha256:")[:16]


def _prefix(fingerprint_id: str, metric: str) -> str:
    return f"{artifact.safe_name(_short(fingerprint_id))}-{artifact.safe_name(metric)}-"


def read(path: Path) -> dict[str, Any]:
    """A record from its file, or from a folder with a `calibration.json`.

    Raises ArtifactError when it is missing, damaged, incomplete or of a newer schema.
    """
    file = path / FILE if path.is_dir() else path
    record = artifact.read_json(file)
    if record is None:
        raise ArtifactError(f"`{file}` does not exist, expected a calibration", f"{REDO} -o {path}")
    schema = record.get("schema")
    if isinstance(schema, int) and schema > SCHEMA:
        raise ArtifactError(
            f"`{file}` has schema {schema}, this EdgeSFT knows up to {SCHEMA}",
            "pip install --upgrade edgesft",
        )
    if schema != SCHEMA or "content" not in record:
        raise ArtifactError(f"`{file}` is not a calibration of EdgeSFT", REDO)
    if seal(record)["content"] != record["content"]:
        raise ArtifactError(f"`{file}` is damaged: its content is not the one that its SHA-256 is of", REDO)
    missing = [name for name in REQUIRED if name not in record]
    if missing or not isinstance(record["fingerprint"], dict):
        raise ArtifactError(f"`{file}` is incomplete: it has no `{(missing or ['fingerprint'])[0]}`", REDO)
    return record


def find(
    fingerprint_id: str, metric: str, workload: Mapping[str, Any], about: Mapping[str, Any]
) -> dict[str, Any] | None:
    """The newest record of this device (its fingerprint's id), metric, workload and artefact class.

    about: `devices.client.about` of the artefact. Records that have not expired come first, then those of
    this very artefact, then the newest; armed or not. Damaged files are named and passed over.
    """
    now = datetime.now(UTC)
    fitting = []
    for file in sorted(folder().glob(_prefix(fingerprint_id, metric) + "*.json")):
        try:
            record = read(file)
        except ArtifactError as error:
            console.warn(f"{error.message}; it is passed over")
            continue
        if fits(record, fingerprint_id, metric, workload, about):
            fitting.append(record)

    def merit(record: Mapping[str, Any]) -> tuple[bool, bool, str]:
        same = record["artifact"].get("digest") == about.get("digest")
        return not expired(record, now), same, record["made_at"]

    return max(fitting, key=merit, default=None)


def fits(
    record: Mapping[str, Any],
    fingerprint_id: str,
    metric: str,
    workload: Mapping[str, Any],
    about: Mapping[str, Any],
) -> bool:
    """Whether a record speaks for this device, metric, workload and class of artefact."""
    return (
        record["fingerprint"].get("id") == fingerprint_id
        and record["metric"] == metric
        and _shape(record["workload"]) == _shape(workload)
        and all(record["artifact"].get(name) == about.get(name) for name in CLASS)
    )


def _shape(workload: Mapping[str, Any]) -> dict[str, Any]:
    """What of a workload decides its time: the seed does not, and what is not asked for is not there."""
    return {k: v for k, v in workload.items() if k != "seed" and v not in (None, 0, [], {})}


def expired(record: Mapping[str, Any], now: datetime | None = None) -> bool:
    """Whether its time is over, or its dates cannot be true. now: with a time zone; None is this moment."""
    moment = now or datetime.now(UTC)
    try:
        made = datetime.fromisoformat(record["made_at"])
        return moment >= datetime.fromisoformat(record["expires_at"]) or moment < made - AHEAD
    except (ValueError, TypeError, KeyError):
        return True


def refusal(record: Mapping[str, Any], margin_percent: float, max_pairs: int) -> str | None:
    """Why a gate of this margin, deciding within `max_pairs`, may not rely on the record; None if it may."""
    met = record["margin_met_percent"]
    if met is None:
        return f"this machine is too noisy for any margin up to 50 %: {record['why']}"
    if met > margin_percent and not math.isclose(met, margin_percent):
        return f"a margin of {margin_percent:g} % is not kept here, one of {met:g} % would be"
    if max_pairs < record["max_pairs"]:
        return f"it was made for gates of up to {record['max_pairs']} pairs, this one has {max_pairs}"
    return None
