"""Integer products: sums of four products of a weight's level with an int8 activation.

Weights lie in groups of four along the row, so that a vector holds one group of every row; the four
activations come as one int32. Every form is exact.
"""

from __future__ import annotations

from tvm import tirx  # type: ignore[import-not-found,unused-ignore]

from carve.emit.tvm.cpu import Cpu
from carve.emit.tvm.kernels.spec import Format
from carve.emit.tvm.kernels.vector import Expr, bind, bits_of, llvm, of, splat


def has_offset(cpu: Cpu, form: Format) -> bool:
    """Whether levels are stored as they are, so that ``zero`` has to be taken off the sums."""
    return form.bits < 8 or not cpu.signed_levels


def unpacked(packed: Expr, bits: int, lanes: int) -> list[Expr]:
    """The levels of ``bits`` that bytes hold, those in the lowest bits first."""
    if bits == 8:
        return [packed]
    mask, found = splat(2**bits - 1, 4 * lanes, "uint8"), []
    for start in range(0, 8, bits):
        part = packed
        if start:
            part = tirx.shift_right(part, splat(start, 4 * lanes, "uint8"))
        found.append(tirx.bitwise_and(part, mask) if start + bits < 8 else part)
    return found


def dot(cpu: Cpu, acc: Expr, w: Expr, a: Expr, form: Format) -> Expr:
    """``acc[i] + sum over j < 4 of w[4 i + j] a[j]``.

    Args:
        cpu: whose instructions to use.
        acc: int32, ``cpu.lanes`` of them.
        w: uint8, four a lane: levels, or signed numbers where `has_offset` says no.
        a: int32, four int8.
        form: of the weights.
    """
    n = cpu.lanes
    four = bits_of(splat(a, n), of("int8", 4 * n))
    match cpu.dot:
        case "vnni":
            name = {16: "512", 8: "256"}[n]
            return llvm(of("int32", n), f"llvm.x86.avx512.vpdpbusd.{name}", acc, w, four)
        case "maddubs":
            return acc + _maddubs(w, four, form, n)
        case "sdot":
            signed = bits_of(w, of("int8", 4 * n))
            return llvm(of("int32", n), "llvm.aarch64.neon.sdot", acc, signed, four)
        case "smull":
            return acc + _smull(bits_of(w, of("int8", 4 * n)), four)
    return acc + _portable(bits_of(w, of("int32", n)), a, n)


def _maddubs(w: Expr, a: Expr, form: Format, n: int) -> Expr:
    """Unsigned times signed bytes; pairs stay below 2^15 (128 * 127 * 2)."""
    pairs, fours = {
        8: ("llvm.x86.avx2.pmadd.ub.sw", "llvm.x86.avx2.pmadd.wd"),
        16: ("llvm.x86.avx512.pmaddubs.w.512", "llvm.x86.avx512.pmaddw.d.512"),
    }[n]
    if form.bits == 8:
        w = bind(bits_of(w, of("int8", 4 * n)))
        # |w| times a with w's sign: -128 becomes 128, which an unsigned byte holds.
        a = _signed_as(bind(a), w, 4 * n)
        w = llvm(of("int8", 4 * n), "llvm.abs", w, tirx.const(False, "bool"))
    products = llvm(of("int16", 2 * n), pairs, w, a)
    return llvm(of("int32", n), fours, products, splat(1, 2 * n, "int16"))


def _signed_as(a: Expr, w: Expr, n: int) -> Expr:
    """``a`` where ``w`` is positive, ``-a`` where it is negative; where it is 0, anything."""
    if n == 32:
        return llvm(of("int8", n), "llvm.x86.avx2.psign.b", a, w)
    zero = splat(0, n, "int8")
    return tirx.Select(w < zero, zero - a, a)


def _smull(w: Expr, a: Expr) -> Expr:
    """Widening products of the two halves, then sums of neighbours."""

    def pairs(half: type) -> Expr:
        parts = [half(of("int8", 8), v) for v in (w, a)]
        product = llvm(of("int16", 8), "llvm.aarch64.neon.smull", *parts)
        return llvm(of("int32", 4), "llvm.aarch64.neon.saddlp", product)

    low, high = pairs(tirx.vectorlow), pairs(tirx.vectorhigh)
    return llvm(of("int32", 4), "llvm.aarch64.neon.addp", low, high)


def _portable(w: Expr, a: Expr, n: int) -> Expr:
    """Bytes widened by shifts, in plain arithmetic."""
    total = None
    for j in range(4):
        by = tirx.const(24 - 8 * j, "int32")
        weight = tirx.shift_left(w, splat(by, n)) if j < 3 else w
        weight = tirx.shift_right(weight, splat(24, n, "int32"))
        value = tirx.shift_right(tirx.shift_left(a, by), tirx.const(24, "int32"))
        part = weight * splat(value, n)
        total = part if total is None else total + part
    return total
