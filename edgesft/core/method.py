"""`Method`, the base of every method, and `@method`, which makes a class one."""

import dataclasses
from typing import ClassVar, TypeVar, dataclass_transform

C = TypeVar("C", bound="Method")


class Method:
    """A frozen dataclass whose fields are its hyper-parameters and whose functions are pure.

    `needs` names the calibration signals that it reads (see `core.signals`); only those are gathered.
    """

    needs: ClassVar[frozenset[str]] = frozenset()


@dataclass_transform(frozen_default=True, kw_only_default=True)
def method(cls: type[C]) -> type[C]:
    """Make `cls` a frozen, keyword-only dataclass, so that a misspelt field is an error in the editor too."""
    return dataclasses.dataclass(frozen=True, kw_only=True)(cls)
