"""The shared hyper-parameter types: one word, one meaning, one range, one description.

Validation happens at the border only (recipe, command line, manifest) through `validate`; inside, the
values are trusted.
"""

import re
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError

from edgesft.core.errors import UsageError, nearest

T = TypeVar("T")


def _pattern(value: str) -> str:
    parse_pattern(value)
    return value


def parse_pattern(pattern: str) -> tuple[int, int]:
    """(N, M) of a sparsity pattern `N:M`: N kept of every M consecutive inputs. Raises ValueError."""
    match = re.fullmatch(r"(\d+):(\d+)", pattern)
    if match is None:
        raise ValueError(f"`{pattern}` is not of the form N:M")
    n, m = int(match[1]), int(match[2])
    if not 1 <= n < m <= 64:
        raise ValueError(f"`{pattern}` needs 1 <= N < M <= 64")
    return n, m


Density = Annotated[float, Field(gt=0, le=1, description="fraction of each tensor that is kept or trained")]
Pattern = Annotated[
    str, AfterValidator(_pattern), Field(description="N:M, N kept of every M consecutive inputs")
]
Steps = Annotated[int, Field(ge=1, le=100_000_000, description="number of optimiser steps")]
Seed = Annotated[int, Field(ge=0, lt=2**63, description="seed of everything that is drawn at random")]
LearningRate = Annotated[float, Field(gt=0, le=10, description="learning rate")]
BatchSize = Annotated[int, Field(ge=1, le=65_536, description="examples a step")]
Length = Annotated[int, Field(ge=1, le=1_048_576, description="tokens an example at most")]
Count = Annotated[int, Field(ge=1, le=100_000_000)]
Rank = Annotated[int, Field(ge=1, le=8192, description="rank of the low-rank factors")]


def validate(kind: type[T], values: Mapping[str, Any], where: str) -> T:
    """An instance of the dataclass `kind` from untrusted `values`.

    where: what the values are of, in messages: `select:small-magnitude`, `tune`.
    Raises UsageError with the field, the value and the nearest known name.
    """
    adapter: TypeAdapter[T] = _adapter(kind)
    fields = getattr(kind, "__dataclass_fields__", {})
    unknown = [k for k in values if k not in fields]
    if unknown:
        raise UsageError(f"`{where}` has no parameter `{unknown[0]}`", nearest(unknown[0], fields))
    try:
        return adapter.validate_python(dict(values))
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(p) for p in first["loc"])
        got = first.get("input")
        raise UsageError(f"`{where}.{name}`: {first['msg']}, got `{got}`") from None


def _adapter(kind: type[T]) -> TypeAdapter[T]:
    try:
        return TypeAdapter(kind, config=ConfigDict(arbitrary_types_allowed=True))
    except Exception:  # pydantic refuses a config for types that carry their own
        return TypeAdapter(kind)


def schema(kind: type[Any]) -> dict[str, dict[str, Any]]:
    """JSON-schema properties of a dataclass: field -> type, range, default, description."""
    properties: dict[str, dict[str, Any]] = _adapter(kind).json_schema().get("properties", {})
    for about in properties.values():
        for option in about.get("anyOf", []):  # `X | None`: the meaning stands at X
            if "description" in option:
                about.setdefault("description", option["description"])
    return properties
