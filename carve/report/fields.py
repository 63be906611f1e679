"""Reading a report that may come from anywhere: nothing about its content is taken for granted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from carve.errors import UserError

Key = str | int
_KINDS = {dict: "an object", list: "a list", str: "a text", bool: "true or false"}
_LARGEST = 1e100
_AGAIN = "is this a report that carve wrote?"


def _kind(value: Any) -> str:
    return _KINDS.get(type(value), "a number" if isinstance(value, int | float) else "nothing")


@dataclass(frozen=True)
class Field:
    """A value in a JSON file and the way to it; what is missing is a field of None.

    Every reader raises `UserError` with the way to a value that is of another type.
    """

    value: Any
    path: tuple[Key, ...] = ()
    source: str = "report.json"

    def _refuse(self, wanted: str) -> UserError:
        where = "".join(f"[{k}]" if isinstance(k, int) else f".{k}" for k in self.path).lstrip(".")
        return UserError(
            "report",
            f"{self.source}: {where[:200] or 'the whole'} has to be {wanted}, "
            f"not {_kind(self.value)}",
            _AGAIN,
        )

    def __getitem__(self, key: Key) -> Field:
        """A member of an object or a list."""
        if isinstance(key, int):
            values = self._list()
            return self._at(key, values[key] if key < len(values) else None)
        return self._at(key, self._object().get(key))

    def __bool__(self) -> bool:
        return self.value is not None

    def _at(self, key: Key, value: Any) -> Field:
        return Field(value, (*self.path, key), self.source)

    def _object(self) -> dict[str, Any]:
        if self.value is None:
            return {}
        if not isinstance(self.value, dict):
            raise self._refuse("an object")
        return self.value

    def _list(self) -> list[Any]:
        if self.value is None:
            return []
        if not isinstance(self.value, list):
            raise self._refuse("a list")
        return self.value

    def items(self) -> list[tuple[str, Field]]:
        """Members of an object, none where it is missing."""
        return [(str(k), self._at(k, v)) for k, v in self._object().items()]

    def each(self) -> list[Field]:
        """Members of a list, none where it is missing."""
        return [self._at(i, v) for i, v in enumerate(self._list())]

    def number(self) -> float | None:
        """A finite number; None where it is missing, NaN or beyond all reason."""
        if self.value is None:
            return None
        if isinstance(self.value, bool) or not isinstance(self.value, int | float):
            raise self._refuse("a number")
        return float(self.value) if abs(self.value) < _LARGEST else None  # NaN is not, either

    def text(self, default: str = "") -> str:
        """A text."""
        if self.value is None:
            return default
        if not isinstance(self.value, str):
            raise self._refuse("a text")
        return self.value

    def needed(self) -> Field:
        """Itself.

        Raises:
            UserError: it is missing.
        """
        if self.value is None:
            raise self._refuse("there")
        return self


@contextmanager
def reading(source: str) -> Iterator[None]:
    """Turn what goes wrong in a report of another shape into an error that says so.

    Raises:
        UserError: instead of the errors of indexing and arithmetic.
    """
    try:
        yield
    except KeyError as e:
        raise UserError("report", f"{source}: {str(e.args[0])[:200]} is missing", _AGAIN) from e
    except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError) as e:
        raise UserError("report", f"{source} cannot be read: {str(e)[:200]}", _AGAIN) from e
