"""What the GPU kernels share: launches, sums over a warp, and a warp's products with stored rows.

Every kernel is written for a block of warps. A warp sums products of whole rows: each of its lanes
takes every 32nd word of a row, and the lanes' sums are joined at the end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from tvm import tirx  # type: ignore[import-not-found,unused-ignore]
from tvm.tirx.script import builder as T  # type: ignore[import-not-found,unused-ignore]

from carve.emit.tvm.kernels.layout import Array
from carve.emit.tvm.kernels.spec import Format
from carve.emit.tvm.kernels.vector import Buffer, Expr, bind, ceil_div, load, store
from carve.errors import CarveError

WARP = 32
WARPS = 4
"""Warps of a block."""
_EVERY_LANE = 0xFFFFFFFF
_INDEX_LIMIT = 2**31


def number(value: int) -> Expr:
    """An int32."""
    return tirx.const(value, "int32")


def real(value: float) -> Expr:
    """An fp32."""
    return tirx.const(value, "float32")


def divided(value: Expr, by: Expr | int) -> tuple[Expr, Expr]:
    """How often ``by`` goes into a value that is not negative, and what is left."""
    return bind(tirx.truncdiv(value, by)), bind(tirx.truncmod(value, by))


def registers(size: int, dtype: str = "float32") -> Buffer:
    """Values of one thread."""
    return T.alloc_buffer((size,), dtype, scope="local")


def shared(size: int, dtype: str = "float32") -> Buffer:
    """Values of one block."""
    return T.alloc_buffer((size,), dtype, scope="shared")


def wait() -> None:
    """Until every thread of the block is here."""
    T.evaluate(T.tvm_storage_sync("shared"))


@contextmanager
def launch(blocks: Expr, warps: int = WARPS) -> Iterator[tuple[Expr, Expr, Expr]]:
    """A kernel of ``blocks`` blocks, none where that is 0; yields block, warp and lane."""
    with (
        T.If(blocks > number(0)),
        T.Then(),
        T.launch_thread("blockIdx.x", blocks) as block,
        T.launch_thread("threadIdx.y", warps) as warp,
        T.launch_thread("threadIdx.x", WARP) as lane,
    ):
        yield block, warp, lane


def elements(total: Expr, body: Callable[[Expr], None]) -> None:
    """A kernel whose threads take one of ``total`` elements each."""
    size = WARPS * WARP
    with launch(ceil_div(total, size)) as (block, warp, lane):
        i = bind(block * size + warp * WARP + lane)
        with T.If(i < total), T.Then():
            body(i)


def warp_sums(acc: Buffer, size: int) -> None:
    """The sums of ``acc``'s values over all lanes, in every lane; the whole warp has to be here."""
    for i in range(size):
        for step in (16, 8, 4, 2, 1):
            other = tirx.call_intrin(
                "float32",
                "tirx.tvm_warp_shuffle_xor",
                tirx.const(_EVERY_LANE, "uint32"),
                acc[i],
                number(step),
                number(WARP),
                number(WARP),
            )
            T.buffer_store(acc, acc[i] + other, [i])


def zeros(acc: Buffer, size: int) -> None:
    """Set values to 0."""
    for i in range(size):
        T.buffer_store(acc, real(0.0), [i])


@dataclass(frozen=True)
class Stored:
    """``count`` matrices ``[rows, columns]`` one behind the other, as the kernels read them.

    fp32, or levels of ``form`` packed into int32 words, the first level in the lowest bits, with a
    scale for each block.
    """

    name: str
    form: Format
    rows: int
    columns: int
    count: int = 1

    def __post_init__(self) -> None:
        if max(a.size for a in self.arrays()) >= _INDEX_LIMIT:
            raise CarveError("kernel", f"{self.name}: more than 2^31 elements")

    @property
    def word(self) -> int:
        """Columns that one lane takes at once."""
        return 32 // self.form.bits if self.form.quantized else math.gcd(4, self.columns)

    def arrays(self) -> list[Array]:
        """What the kernels take."""
        size = self.count * self.rows * self.columns
        if not self.form.quantized:
            return [Array(self.name, size, "float32")]
        return [
            Array(self.name, size * self.form.bits // 32, "int32"),
            Array(f"{self.name}_scale", size // self.form.block, "float32"),
        ]

    def declare(self) -> Matrix:
        """Declare them as the next arguments."""
        found = [T.arg(a.name, T.buffer((a.size,), a.dtype)) for a in self.arrays()]
        return Matrix(self, found[0], found[1] if len(found) > 1 else None)


@dataclass(frozen=True)
class Matrix:
    """A `Stored`'s arguments."""

    stored: Stored
    values: Buffer
    scale: Buffer | None

    def weights(self, row: Expr, column: Expr, out: Buffer) -> Expr | None:
        """Put one word's weights into ``out``, without the factor that is returned."""
        s = self.stored
        if self.scale is None:
            store(out, 0, load(self.values, row * s.columns + column, s.word), s.word)
            return None
        bits, per_row = s.form.bits, s.columns // s.word
        word = bind(self.values[row * per_row + tirx.floordiv(column, s.word)])
        for j in range(s.word):
            level = tirx.bitwise_and(tirx.shift_right(word, number(bits * j)), number(2**bits - 1))
            T.buffer_store(out, (level - number(s.form.zero)).astype("float32"), [j])
        block = tirx.floordiv(column, s.form.block)
        return bind(self.scale[row * (s.columns // s.form.block) + block])


@dataclass(frozen=True)
class Row:
    """A row of inputs: ``buffer[row, first:]``, readable ``lanes`` values at a time."""

    buffer: Buffer
    row: Expr
    first: Expr
    lanes: int


def dot(
    weights: Sequence[tuple[Matrix, Expr]], inputs: Sequence[Row], acc: Buffer, lane: Expr
) -> None:
    """``acc[w * T + t]`` grows by this lane's share of the product of weight row and input.

    The matrices are of one form and width.
    """
    s = weights[0][0].stored
    span, word = s.word * WARP, s.word
    xs, ws = registers(word * len(inputs)), registers(word)
    with T.serial(0, ceil_div(s.columns, span)) as c:
        column = bind((c * WARP + lane) * word)

        def step() -> None:
            for t, x in enumerate(inputs):
                lanes = math.gcd(4, word, x.lanes)  # CUDA has no longer vectors of fp32
                for j in range(0, word, lanes):
                    store(
                        xs,
                        t * word + j,
                        load(x.buffer, [x.row, x.first + column + j], lanes),
                        lanes,
                    )
            for w, (matrix, row) in enumerate(weights):
                factor = matrix.weights(row, column, ws)
                for t in range(len(inputs)):
                    total = ws[0] * xs[t * word]
                    for j in range(1, word):
                        total = total + ws[j] * xs[t * word + j]
                    at = w * len(inputs) + t
                    T.buffer_store(
                        acc, acc[at] + (total if factor is None else total * factor), [at]
                    )

        if s.columns % span == 0:
            step()
        else:
            with T.If(column < number(s.columns)), T.Then():
                step()
