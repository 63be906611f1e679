"""Vectors of TIR: loads, stores, constants and what the integrated builder lacks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm import tirx  # type: ignore[import-not-found,unused-ignore]
from tvm.tirx.script import builder as T  # type: ignore[import-not-found,unused-ignore]

Expr = Any
Buffer = Any


def of(dtype: str, lanes: int) -> str:
    """Name of a vector type."""
    return dtype if lanes == 1 else f"{dtype}x{lanes}"


def load(buffer: Buffer, at: Expr | Sequence[Expr], lanes: int) -> Expr:
    """``lanes`` values in a row; the last index is that of the first."""
    *outer, last = at if isinstance(at, Sequence) else (at,)
    return tirx.BufferLoad(buffer, [*outer, tirx.Ramp(_index(last), 1, lanes)])


def store(buffer: Buffer, at: Expr | Sequence[Expr], value: Expr, lanes: int) -> None:
    """The opposite of `load`."""
    *outer, last = at if isinstance(at, Sequence) else (at,)
    T.buffer_store(buffer, value, [*outer, tirx.Ramp(_index(last), 1, lanes)])


def _index(value: Expr) -> Expr:
    return tirx.const(value, "int32") if isinstance(value, int) else value


def splat(value: Expr | float, lanes: int, dtype: str = "float32") -> Expr:
    """A scalar in every lane."""
    if isinstance(value, int | float):
        value = tirx.const(value, dtype)
    return tirx.Broadcast(value, lanes) if lanes > 1 else value


def llvm(dtype: str, name: str, *args: Expr) -> Expr:
    """A call of an LLVM intrinsic without effects."""
    return tirx.call_llvm_pure_intrin(dtype, name, *args)


def bits_of(value: Expr, dtype: str) -> Expr:
    """The same bits as another type."""
    return tirx.reinterpret(dtype, value)


def prefetch(buffer: Buffer, at: Expr) -> None:
    """Ask for the cache line of an element; beyond the buffer's end it does nothing."""
    how = [tirx.const(v, "int32") for v in (0, 3, 1)]  # read, keep, data
    T.evaluate(tirx.call_llvm_intrin("void", "llvm.prefetch", tirx.address_of(buffer[at]), *how))


def local(size: int, dtype: str = "float32") -> Buffer:
    """Values that live in registers where every index is a constant.

    Below 1 KiB memory of this scope is taken from the stack; that of ``local`` never is.
    """
    return T.alloc_buffer((size,), dtype, scope="global")


def scratch(size: Expr, dtype: str = "float32") -> Buffer:
    """Memory for the time of a call."""
    return T.alloc_buffer((size,), dtype, scope="global")


def bind(value: Expr) -> Expr:
    """``value`` computed once, under a name."""
    return T.Bind(value)


def opaque(value: Expr) -> Expr:
    """An int32 that TVM's passes reason no further about: their proofs take minutes otherwise."""
    cell = local(1, "int32")
    T.buffer_store(cell, value, [0])
    return T.Bind(cell[0])


def ceil_div(a: Expr, b: int) -> Expr:
    """``a / b`` rounded up, of numbers that are not negative."""
    if isinstance(a, int):
        return -(-a // b)
    return tirx.floordiv(a + (b - 1), b)
