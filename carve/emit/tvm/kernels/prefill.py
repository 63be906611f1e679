"""A routed FFN on many tokens: each expert on the tokens that chose it, a tile of rows at a time.

Tokens are listed by expert; an expert's are cut into tiles of some rows, which are laid out as the
products read them. Work is divided among the threads by panels of weights, so that every thread
gets a share of every expert.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tvm import tirx  # type: ignore[import-not-found,unused-ignore]
from tvm.tirx.script import builder as T  # type: ignore[import-not-found,unused-ignore]

from carve.emit.tvm.kernels.hidden import put_hidden
from carve.emit.tvm.kernels.layout import VECTORS
from carve.emit.tvm.kernels.parts import Call, Part
from carve.emit.tvm.kernels.product import Rows, product
from carve.emit.tvm.kernels.rounding import arrange, blank, make_rows
from carve.emit.tvm.kernels.schedule import by_height
from carve.emit.tvm.kernels.selection import append, chosen
from carve.emit.tvm.kernels.spec import Format
from carve.emit.tvm.kernels.vector import (
    Buffer,
    Expr,
    bind,
    ceil_div,
    local,
    opaque,
    scratch,
    splat,
    store,
)

TileBody = Callable[[Expr, Expr, int, Expr], None]
"""Called with a panel of weights, a tile, its height and how many of its rows are tokens."""
_ZERO, _ONE = tirx.const(0, "int32"), tirx.const(1, "int32")


@dataclass(frozen=True)
class Groups:
    """Tiles of the tokens of each expert.

    ``first`` ``[E + 1]``: an expert's first tile; ``sizes`` ``[E]``: its tokens; ``tokens``
    ``[tiles * height]``: a tile's, -1 where there is none. None of them for the shared expert,
    whose tiles are the tokens in order.
    """

    height: int
    experts: int
    tiles: Expr
    room: Expr
    first: Buffer | None = None
    sizes: Buffer | None = None
    tokens: Buffer | None = None

    def token(self, slot: Expr, n: Expr) -> Expr:
        """The token of a slot, or -1."""
        if self.tokens is None:
            return tirx.Select(slot < n, slot, tirx.const(-1, "int32"))
        return self.tokens[slot]


def prefill(c: Call, n: Expr) -> None:
    """``y = FFN(x)`` for ``n`` rows."""
    if c.shared is None:
        _start(c, n)
    for part in c.parts:
        group = _everyone(c, n) if part is c.shared else _by_expert(c, n)
        x = _arranged(c, part.inward.form, part.inward.columns, group, n, c.x, None)
        hidden = scratch(group.room * (c.schedule.tile * part.inward.padded))
        _inward(c, part, group, n, x, hidden)
        h = _arranged(c, part.down.form, part.down.columns, group, n, hidden, part.inward.padded)
        _down(c, part, group, n, h)


def _everyone(c: Call, n: Expr) -> Groups:
    tiles = opaque(ceil_div(n, c.schedule.tile))
    return Groups(c.schedule.tile, 1, tiles, tiles)


def _by_expert(c: Call, n: Expr) -> Groups:
    """List the tokens of every expert."""
    assert c.scores is not None
    spec, height = c.spec, c.schedule.tile
    room = bind(ceil_div(n * spec.top_k, height) + spec.num_experts)
    first, sizes = scratch(spec.num_experts + 1, "int32"), scratch(spec.num_experts, "int32")
    tokens, takes = scratch(room * height, "int32"), scratch(n * spec.num_experts, "int32")
    with T.parallel(0, n) as i, T.serial(0, spec.num_experts) as e:
        taken = chosen(spec, c.scores, i, e)
        T.buffer_store(takes, tirx.Select(taken, _ONE, _ZERO), [i * spec.num_experts + e])
    tile = local(1, "int32")
    T.buffer_store(tile, _ZERO, [0])
    with T.serial(0, spec.num_experts) as e:
        start = bind(tile[0] * height)
        count = local(1, "int32")
        T.buffer_store(first, tile[0], [e])
        T.buffer_store(count, _ZERO, [0])
        with (
            T.serial(0, n) as i,
            T.If(takes[i * spec.num_experts + e] > _ZERO),
            T.Then(),
        ):
            append(tokens, start, count, i)
        T.buffer_store(sizes, count[0], [e])
        used = bind(ceil_div(count[0], height))
        with T.serial(0, used * height - count[0]) as i:
            T.buffer_store(tokens, tirx.const(-1, "int32"), [start + count[0] + i])
        T.buffer_store(tile, tile[0] + used, [0])
    tiles = bind(tile[0])
    T.buffer_store(first, tiles, [spec.num_experts])
    return Groups(height, spec.num_experts, tiles, room, first, sizes, tokens)


def _arranged(
    c: Call,
    form: Format,
    columns: int,
    group: Groups,
    n: Expr,
    source: Buffer,
    stride: int | None,
) -> Rows:
    """Rows of ``source`` in tiles: those of the tokens, or (``stride``) those of the slots."""
    rows = make_rows(form, columns, group.height, group.room)
    with T.parallel(0, group.tiles) as t, T.serial(0, group.height) as i:
        slot = bind(t * group.height + i)
        token = bind(group.token(slot, n))
        with T.If(token >= _ZERO):
            with T.Then():
                at = token * columns if stride is None else slot * stride
                arrange(c.cpu, rows, t, i, source, at)
            with T.Else():
                blank(rows, t, i)
    return rows


def _tiles(c: Call, group: Groups, n: Expr, panels: int, panel: Expr, body: TileBody) -> None:
    """Every tile of every expert beside one of the expert's panels."""

    def of(expert: Expr, begin: Expr, end: Expr, size: Expr) -> None:
        with T.serial(0, end - begin) as j:
            tile = bind(begin + j)
            left = opaque(size - j * group.height)
            at = bind(expert * panels + panel)
            by_height(c.schedule, left, lambda h: body(at, tile, h, left))

    if group.first is None or group.sizes is None:
        of(_ZERO, _ZERO, group.tiles, n)
        return
    with T.serial(0, group.experts) as e:
        of(e, bind(group.first[e]), bind(group.first[e + 1]), bind(group.sizes[e]))


def _inward(c: Call, part: Part, group: Groups, n: Expr, x: Rows, hidden: Buffer) -> None:
    per = part.inward.padded // part.inward.panels
    with T.parallel(0, part.inward.panels) as p:

        def tile(at: Expr, tile: Expr, height: int, left: Expr) -> None:
            (sums,) = product(c.cpu, part.inward_weights, [at], x, tile, height, c.schedule)
            for i in range(height):
                put_hidden(
                    c.cpu,
                    part.inward,
                    c.spec.activation,
                    sums[i * VECTORS :][:VECTORS],
                    part.inward_bias,
                    at * (VECTORS * c.cpu.lanes),
                    hidden,
                    (tile * group.height + i) * part.inward.padded + p * per,
                )

        _tiles(c, group, n, part.inward.panels, p, tile)


def _down(c: Call, part: Part, group: Groups, n: Expr, h: Rows) -> None:
    shared = part is c.shared
    bias = c.output_bias if shared else part.down_bias
    with T.parallel(0, part.down.panels) as p:

        def tile(at: Expr, tile: Expr, height: int, left: Expr) -> None:
            (sums,) = product(c.cpu, part.down_weights, [at], h, tile, height, c.schedule)
            for i in range(height):
                with T.If(left > tirx.const(i, "int32")), T.Then():
                    token = bind(group.token(tile * group.height + i, n))
                    start = 0 if shared else (at - p) * (VECTORS * c.cpu.lanes)
                    two = sums[i * VECTORS :][:VECTORS]
                    c.y.put(token, p, two, bias, start, add=not shared)

        _tiles(c, group, n, part.down.panels, p, tile)


def _start(c: Call, n: Expr) -> None:
    """The result before any expert: the bias, or zero."""
    lanes = c.cpu.lanes
    zeros = [local(lanes) for _ in range(VECTORS)]
    for z in zeros:
        store(z, 0, splat(0.0, lanes), lanes)
    with T.serial(0, n) as i, T.serial(0, c.parts[0].down.panels) as p:
        c.y.put(i, p, zeros, c.output_bias)
