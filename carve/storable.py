"""Which classes may be read back from a stored state; kept apart so that it costs no import."""

from __future__ import annotations

from dataclasses import is_dataclass
from typing import TypeVar

T = TypeVar("T")
CLASSES: dict[str, type] = {}


def storable(cls: type[T]) -> type[T]:
    """Let dataclasses of this class be stored between passes and read back, see `carve.codec`.

    A note that a pass leaves in ``program.notes`` has to be made of tensors, arrays, numbers, text,
    lists, tuples, dictionaries and such dataclasses.

    Raises:
        TypeError: it is no dataclass, or another class has its name.
    """
    if not is_dataclass(cls):
        raise TypeError(f"{cls.__name__} is no dataclass")
    known = CLASSES.setdefault(cls.__name__, cls)
    if known is not cls and known.__module__ != cls.__module__:
        raise TypeError(f"{cls.__name__} of {known.__module__} is storable already")
    CLASSES[cls.__name__] = cls
    return cls
