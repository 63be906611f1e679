"""What processes of a sharded model say to each other.

Frames over a child's standard input and output: a length, then bytes, of which the first says what
they are. Numbers are little-endian. Nothing is pickled.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

_LENGTH = struct.Struct("<Q")
_HEAD = struct.Struct("<cIII")  # kind, layer, rows, experts
_MOST_FRAME = 1 << 34
RUN, EXPECT, STATS = b"r", b"e", b"s"
"""Of a parent: run experts; read some ahead, which is not answered; say what was counted."""
FAILED, DONE = b"!", b"."
"""Of a child."""
Part = Sequence[tuple[int, NDArray[np.intp]]]
"""Experts and the rows that take them."""


def send(stream: IO[bytes], *parts: bytes | memoryview) -> None:
    """Write a frame of ``parts``."""
    stream.write(_LENGTH.pack(sum(len(p) for p in parts)))
    for part in parts:
        stream.write(part)
    stream.flush()


def receive(stream: IO[bytes]) -> bytes:
    """A frame; empty at the end of the stream."""
    head = stream.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        return b""
    (length,) = _LENGTH.unpack(head)
    data = stream.read(length) if length <= _MOST_FRAME else b""
    return data if len(data) == length else b""


def as_bytes(array: NDArray[Any]) -> memoryview:
    """An array's content, copied only where it is not contiguous."""
    return memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8))  # type: ignore[arg-type]


def pack_run(layer: int, x: NDArray[np.float32], part: Part) -> list[bytes | memoryview]:
    """A frame for ``part`` on rows of ``x`` ``[n, d]``: the rows that are taken, each once."""
    taken = np.unique(np.concatenate([rows for _, rows in part]))
    mask = np.zeros((len(part), len(taken)), np.uint8)
    for row, (_, rows) in zip(mask, part, strict=True):
        row[np.searchsorted(taken, rows)] = 1
    experts = np.array([e for e, _ in part], "<u4")
    head = _HEAD.pack(RUN, layer, len(taken), len(part))
    return [head, as_bytes(experts), as_bytes(mask), as_bytes(x[taken])]


def pack_expect(layer: int, experts: Sequence[int]) -> list[bytes | memoryview]:
    """A frame that names experts of a layer that comes next."""
    return [_HEAD.pack(EXPECT, layer, 0, len(experts)), as_bytes(np.array(experts, "<u4"))]


def unpack_experts(data: bytes) -> tuple[int, list[int]]:
    """The layer and the experts of a frame."""
    _, layer, _, count = _HEAD.unpack_from(data)
    return layer, np.frombuffer(data, "<u4", count, _HEAD.size).tolist()


def unpack_rows(data: bytes, width: int) -> tuple[NDArray[np.float32], list[NDArray[np.intp]]]:
    """Rows ``[n, width]`` of a frame of `pack_run`, and for each expert those that take it."""
    _, _, rows, count = _HEAD.unpack_from(data)
    at = _HEAD.size + 4 * count
    mask = np.frombuffer(data, np.uint8, count * rows, at).reshape(count, rows)
    x = np.frombuffer(data[at + count * rows :], "<f4").reshape(rows, width)
    return x, [np.flatnonzero(m) for m in mask]
