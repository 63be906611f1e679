"""Skip gates as control flow: what no token runs through is not computed.

One token: ``y = If(score > bar, block(x), bridge(x))``. Several: the rows that run are taken out,
the block sees them alone, and its results are put over what the bridge gives; kernels of no rows
do nothing. Keys and values are computed and cached for every token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tvm import relax, te, tirx
from tvm.relax import op

from carve.emit.tvm.patterns import Node
from carve.emit.tvm.products import same_size
from carve.errors import CarveError
from carve.sites import AttentionSite, Block, Gate

if TYPE_CHECKING:
    from carve.emit.tvm.translate import Translator

_ALWAYS = 1e30


class Gating:
    """The gates of one function.

    Args:
        t: translates the function.
        shift: ``[G]`` fp32, moves the thresholds.
        length: tokens of the function: 1, or a variable.
    """

    def __init__(self, t: Translator, shift: relax.Expr, length: Any) -> None:
        self.t, self.shift, self.length = t, shift, length
        self.scores: list[relax.Expr] = []
        self.bars: list[relax.Expr] = []

    def results(self) -> list[relax.Expr]:
        """Scores and bars of all gates, ``[1, S, G]``."""
        join = [self.t.emit(op.concat(v, -1)) for v in (self.scores, self.bars)]
        return join

    def node(self, n: Node, block: Block) -> None:
        """Translate a gated block at its gate."""
        t, gate = self.t, block.gate
        if gate is None:
            raise CarveError("emit", f"{block.name}: a gate's node without a gate")
        x = t.env[n.args[1]]
        score, bar = self._compare(x, block.name, gate)
        attention = block.attention if isinstance(block, AttentionSite) else None
        if attention is not None:
            t.append(attention)
        region = t.reading.regions[n]
        if isinstance(self.length, int):
            condition = t.emit(op.reshape(op.greater(score, bar), []))
            t.env[n] = self._one(n, condition, region, x, block)
        else:
            rows = self._rows(score, bar)
            t.env[n] = self._some(n, rows, region, x, block)

    def _compare(self, x: relax.Expr, name: str, gate: Gate) -> tuple[relax.Expr, relax.Expr]:
        """Scores and bars, ``[1, S, 1]``: tokens run where the one is above the other."""
        t, count = self.t, len(self.scores)
        weight = t.stored.tensor(f"{name}.gate_scores", gate.weight)
        score = t.emit(op.sum(op.multiply(x, weight), axis=-1, keepdims=True))
        own = op.strided_slice(self.shift, [0], [count], [count + 1])
        bar = op.subtract(relax.const(-float(gate.bias), "float32"), own)
        early = op.less(t.position, relax.const(gate.always, "int64"))
        bar = t.emit(op.where(early, relax.const(-_ALWAYS, "float32"), bar))
        bar = t.emit(op.expand_dims(bar, -1))
        self.scores.append(score)
        self.bars.append(bar)
        return score, bar

    def _branch(self, value: Any) -> relax.SeqExpr:
        bb = self.t.block_builder
        bb._begin_binding_block()
        with self.t.scope():
            result = value()
        return relax.SeqExpr([bb._end_block()], result)

    def _one(
        self,
        n: Node,
        condition: relax.Expr,
        region: Sequence[Node],
        x: relax.Expr,
        block: Block,
    ) -> relax.Expr:
        t = self.t

        def run() -> relax.Expr:
            self._inside(region, block, t.position)
            return t.env[n.args[0]]

        branches = self._branch(run), self._branch(lambda: self._bridge(x, block))
        return t.emit(relax.If(condition, *branches))

    def _inside(self, region: Sequence[Node], block: Block, position: Any) -> None:
        attention = block.attention if isinstance(block, AttentionSite) else None
        for inner in region:
            if inner is attention:
                self.t.attend(inner, position)
            else:
                self.t.node(inner)

    def _some(
        self,
        n: Node,
        rows: tuple[relax.Expr, relax.Expr],
        region: Sequence[Node],
        x: relax.Expr,
        block: Block,
    ) -> relax.Expr:
        t, bb = self.t, self.t.block_builder
        which, count = rows
        running = tirx.Var("running", "int64")
        bb.match_cast(t.emit(op.tensor_to_shape(count)), relax.ShapeType([running]))

        def take(value: relax.Expr) -> relax.Expr:
            def compute(v: te.Tensor, index: te.Tensor) -> te.Tensor:
                return te.compute(
                    (1, running, *v.shape[2:]), lambda b, i, *more: v(b, index[i], *more)
                )

            return bb.emit_te(compute, value, which)

        with t.scope():
            inside = set(region)
            outer = dict.fromkeys(
                u for i in region for u in t.reading.uses_inside(i, block) if u not in inside
            )
            for u in outer:
                value = t.env[u]
                if not isinstance(value.ty, relax.TensorType):
                    if same_size(value, self.length):
                        t.env[u] = running
                    continue
                sizes = list(value.ty.shape)
                by_token = [i for i, s in enumerate(sizes) if same_size(s, self.length)]
                if by_token == [1]:
                    t.env[u] = take(value)
                    t.swapped.pop(u, None)
                elif by_token:
                    raise CarveError(
                        "emit", f"{block.name}: {u.name} is not known token by token", "use no gate"
                    )
            self._inside(region, block, take(t.position))
            result = t.env[n.args[0]]
        return self._put(result, which, self._bridge(x, block))

    def _rows(self, score: relax.Expr, bar: relax.Expr) -> tuple[relax.Expr, relax.Expr]:
        """The tokens that run, in order at the front of ``[S]``, and how many they are, ``[1]``."""
        gv = self.t.products.kernel("running", "running", self.t.products.sequence.running)
        made = self.t.emit(
            op.call_tir(
                gv,
                relax.Tuple([score, bar]),
                out_ty=[
                    relax.TensorType([self.length], "int64"),
                    relax.TensorType([1], "int64"),
                ],
            )
        )
        return self.t.emit(made[0]), self.t.emit(made[1])

    def _put(self, rows: relax.Expr, which: relax.Expr, base: relax.Expr) -> relax.Expr:
        """``base`` with rows put in place."""
        width = int(rows.ty.shape[2])

        products = self.t.products
        gv = products.kernel(
            ("put", width), "put", lambda: products.sequence.put(width, products.cpu)
        )
        return self.t.emit(op.call_tir_inplace(gv, relax.Tuple([rows, which, base]), [2], base.ty))

    def _bridge(self, x: relax.Expr, block: Block) -> relax.Expr:
        """What skipped tokens get, see `carve.dialect.bridge`."""
        t, gate, name = self.t, block.gate, f"{block.name}.bridge"
        assert gate is not None
        width = int(block.output.meta["val"].shape[-1])
        if gate.bridge_in is None or gate.bridge_out is None:
            shape = [*list(x.ty.shape)[:-1], width]
            blank = op.zeros(relax.ShapeExpr(shape), "float32")
            if gate.bridge_bias is None:
                return t.emit(blank)
            return t.emit(op.add(blank, t.stored.tensor(f"{name}.bias", gate.bridge_bias)))
        h = t.products.linear(x, f"{name}.in", [gate.bridge_in], None)
        if gate.bridge_gate is not None:
            g = t.products.linear(x, f"{name}.gate", [gate.bridge_gate], None)
            h = t.emit(op.multiply(op.nn.silu(g), h))
        return t.products.linear(h, f"{name}.out", [gate.bridge_out], gate.bridge_bias)
