"""Damage valid files as a stream of choices says, so that what is damaged is mostly still sound."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from copy import deepcopy
from typing import Any, TypeVar

T = TypeVar("T")
BAIT = "bait"
"""A file beside the folder that a reader is given, which it must not read."""

_DEEP: Any = []
for _ in range(50):
    _DEEP = [_DEEP]
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 255, 2**31 - 1, 2**31, 2**63, -(2**63) - 1, 10**39, 10**60),
    *(0.5, -0.0, 1.0, 1e-320, 1e308, float("nan"), float("inf"), -float("inf")),
    *("", "a", "a\0b", "\ud800", "x" * 3000, "..", ".", "/", "C:x", "a\\b", "%s", "{0}"),
    *(f"../{BAIT}", f"../../{BAIT}", f"x/../../{BAIT}", "/etc/passwd", "/dev/zero", "link"),
    *([], {}, [[]], [None], {"": None}, _DEEP, {"a": _DEEP}),
)
_TOKENS = (
    *(b"NaN", b"Infinity", b"1e999", b"-", b"00", b"9" * 5000, b"[" * 100_000, b'{"a":' * 3000),
    *(b"\xff", b"\xef\xbb\xbf", b"\0", b'"', b"\\ud800", b"}", b"]", b",", b"=", b"\r", b"'''"),
)


class Choices:
    """Whole numbers from bytes; when they are used up, all are 0."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def below(self, n: int) -> int:
        """A number below ``n``."""
        size = max(1, ((n - 1).bit_length() + 7) // 8)
        part = self._data[self._at : self._at + size]
        self._at += size
        return int.from_bytes(part, "little") % n

    def pick(self, items: Sequence[T]) -> T:
        """One of ``items``."""
        return items[self.below(len(items))]

    def rest(self, most: int) -> bytes:
        """Some bytes."""
        part = self._data[self._at : self._at + most]
        self._at += len(part)
        return part


def _spots(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container below ``value`` with each of its keys."""
    waiting = [value]
    while waiting:
        held = waiting.pop()
        keys = list(held) if isinstance(held, dict) else range(len(held))
        for key in keys:
            yield held, key
            if isinstance(held[key], dict | list):
                waiting.append(held[key])


def damaged(seed: Any, c: Choices) -> Any:
    """``seed``, what JSON or TOML may hold, with one to four changes."""
    whole = {"": deepcopy(seed)}
    for _ in range(1 + c.below(4)):
        spots = list(_spots(whole))
        held, key = c.pick(spots)
        how = c.below(8)
        if how < 4:
            held[key] = deepcopy(c.pick(VALUES))
        elif how == 4:
            other, at = c.pick(spots)
            if key in held or isinstance(held, list):
                held[key] = deepcopy(other[at])
        elif how == 5 and isinstance(held, dict) and len(held) > 1:
            del held[key]
        elif how == 5 and isinstance(held, list):
            held.insert(c.below(len(held) + 1), deepcopy(held[key]))
        elif how == 6 and type(held[key]) in (int, float):
            held[key] += c.pick((-1, 1, 64, 4096, -4096, 1 << 16, 1 << 40))
        elif isinstance(held, dict):
            held[c.pick(("a", "", "schema", "model", "__metadata__"))] = held[key]
    return whole.get("")


def json_bytes(seed: Any, c: Choices) -> bytes:
    """A damaged JSON text: its content, its text, or both."""
    text = bytearray(json.dumps(damaged(seed, c) if c.below(5) else seed), "utf-8")
    return _scribbled(text, c) if c.below(3) == 0 else bytes(text)


def toml_bytes(seed: dict[str, Any], c: Choices) -> bytes:
    """A damaged TOML text of sections, single or in lists."""
    held = damaged(seed, c)
    lines = []
    for name, section in held.items() if isinstance(held, dict) else ():
        tables = section if isinstance(section, list) else [section]
        head = f"[[{name}]]" if isinstance(section, list) else f"[{name}]"
        for table in tables:
            if isinstance(table, dict):
                lines += [head, *(f"{k} = {json.dumps(v)}" for k, v in table.items())]
            else:
                lines.insert(0, f"{name} = {json.dumps(table)}")
    text = bytearray("\n".join(lines), "utf-8", "surrogatepass")
    return _scribbled(text, c) if c.below(3) == 0 else bytes(text)


def raw_bytes(seed: bytes, c: Choices) -> bytes:
    """Damaged bytes."""
    return _scribbled(bytearray(seed), c)


def _scribbled(data: bytearray, c: Choices) -> bytes:
    for _ in range(1 + c.below(4)):
        at = c.below(len(data) + 1)
        how = c.below(8)
        if how == 0:
            del data[at:]
        elif how == 1:
            del data[at : at + 1 + c.below(16)]
        elif how == 2:
            data[at:at] = c.pick(_TOKENS)
        elif how == 3:
            data[at:at] = data[at : at + 1 + c.below(64)]
        elif how == 4:
            number = c.pick((0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1, len(data), 1 << 40))
            data[at : at + 8] = number.to_bytes(8, "little")
        elif how == 5:
            new = c.rest(4)
            data[at : at + len(new)] = new
        elif at < len(data):
            data[at] ^= 1 << c.below(8)
    return bytes(data)
