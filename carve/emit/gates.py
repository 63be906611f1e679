"""Skip gates as ``If``: a block that no token runs through costs nothing, else its rows do.

Around each gated block the graph becomes::

    score = x g                                    # [B, S, 1]
    y, present = If(any(score > bar))
        then: rows = those with score > bar        # one token: all of them, nothing is copied
              y = bridge(x), at rows: block(x[rows])
        else: y = bridge(x)

so decoding a skipped token runs the bridge alone, and a prompt's work follows the share of its
tokens that run. Where routed experts are apart from the graph (`carve.emit.split`), which cuts it,
an FFN with experts cannot stand in a branch: it runs on the rows alone, be they none. Keys and
values are computed outside; attention writes them to the cache in both branches, in the second by
an operator with as few heads as it takes. All weights stay in the outer graph, and each of the
block's is read by one node, for kernels keep a packed copy a node.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from carve.emit.builder import Builder, Place
from carve.emit.graph import given, replace
from carve.errors import CarveError
from carve.program import Program
from carve.sites import Block, FFNSite, Gate

SHIFT, SCORES, BARS = "gate_shift", "gate_scores", "gate_bars"
"""Names of the input that moves all thresholds (default zero), and of two outputs ``[B, S, G]``: a
token runs through a block where its score is above its bar."""
ROWS_DOMAIN = "carve.rows"
_ALWAYS = 1e30
Branch = list[ir.Node]


@dataclass
class Rows:
    """The tokens of one gated block that run, while its branch is being built.

    ``x`` ``[R, d]`` are their inputs, ``hit`` ``[B S]`` says which they are. Rows are taken by
    ``Compress``; putting them back is a branch of its own, left out where only one token is there,
    for decoding would feel it.
    """

    b: Builder
    scope: str
    node: ir.Node
    full: ir.Value

    @property
    def x(self) -> ir.Value:
        """The running tokens' inputs, ``[R, d]``."""
        return self.node.outputs[0]

    @property
    def hit(self) -> ir.Value:
        """``[B S]`` bool."""
        return self.node.outputs[1]

    def take(self, at: ir.Node, value: ir.Value, width: int) -> Any:
        """Rows ``[R, w]`` of ``value`` ``[B, S, w]``."""
        return self.b.op(at, "Take", [value, self.hit], domain=ROWS_DOMAIN, width=width)

    def tie(self, at: ir.Node, value: ir.Value) -> Any:
        """``value`` as it is, computed inside the gate from here on."""
        return self.b.op(at, "Tie", [value, self.hit], domain=ROWS_DOMAIN)

    def spread(self, at: ir.Node, value: ir.Value, width: int) -> Any:
        """``[B, S, w]`` with the rows ``value`` ``[R, w]``, zero elsewhere."""
        inputs: list[ir.Value | None] = [value, self.hit, self.full]
        return self.b.op(at, "Spread", inputs, domain=ROWS_DOMAIN, width=width)


class GateLowering:
    """Opens every gated block before its operators are lowered, and closes it after.

    Args:
        b: appends nodes and keeps weights.
        program: what is emitted.
        placeholders: the ``Gated`` nodes.
        apart: routed FFNs stand in no branch.
    """

    def __init__(
        self, b: Builder, program: Program, placeholders: Sequence[ir.Node], *, apart: bool
    ) -> None:
        self.b, self.graph, self.apart = b, b.graph, apart
        blocks = program.blocks
        self.head_width = int(program.example[2].shape[3]) if placeholders else 0
        by_block = {n.attributes["block"].as_int(): n for n in placeholders}
        self.gates = [(i, blocks[i], node) for i, node in sorted(by_block.items())]
        self.rows: dict[int, Rows] = {}
        self.conditions: dict[int, Any] = {}
        if self.gates:
            self._scores(self.gates[0][2])

    def _scores(self, at: ir.Node) -> None:
        """Scores of all gates against their thresholds, the condition of each, and the output."""
        b = self.b
        position = next(v for v in self.graph.inputs if v.name == "position_ids")
        gates = [_gate(block) for _, block, _ in self.gates]
        always = np.array([g.always for g in gates], np.int64)
        shift = b.const(SHIFT, np.zeros(len(gates), np.float32))
        self.graph.inputs.append(shift)
        bias = np.array([-float(g.bias) for g in gates], np.float32)
        bar = b.op(at, "Sub", [b.const("carve_gate_bars", bias), shift])
        last = b.const("carve_last_axis", np.array([-1]))
        place = b.op(at, "Unsqueeze", [position, last])
        first = b.op(at, "Less", [place, b.const("carve_always", always)])
        run = b.const("carve_always_run", np.array(-_ALWAYS, np.float32))
        bars = b.op(at, "Where", [first, run, bar])
        one = b.const("carve_one", np.array(1))
        self.single = b.op(at, "Equal", [b.op(at, "Size", [position]), one])
        count = len(gates)
        parts = [bars]
        if count > 1:
            parts = b.op(at, "Split", [bars], outputs=count, axis=-1, num_outputs=count)
        found = []
        for (i, block, node), gate, part in zip(self.gates, gates, parts, strict=True):
            x = given(node.inputs[1])
            weight = b.float_tensor(f"{block.name}.gate_scores", gate.weight[:, None])
            score = b.op(at, "MatMul", [x, weight])
            hit = b.op(at, "Greater", [score, part])
            self.conditions[i] = b.op(at, "ReduceMax", [hit], keepdims=0)
            # The conditions are inputs so that they count as used until the `If`s stand.
            kept = [x, hit, self.conditions[i], self.single]
            made = b.op(at, "Rows", kept, outputs=2, domain=ROWS_DOMAIN, width=len(gate.weight))
            rows = made[0].producer()
            self.rows[i] = Rows(b, f"gate{i}", rows, x)
            found.append(score)
        scores = found[0] if count == 1 else b.op(at, "Concat", found, axis=-1)
        for name, value in ((SCORES, scores), (BARS, bars)):
            out = b.op(at, "Identity", [value])
            out.name, out.type = name, ir.TensorType(ir.DataType.FLOAT)
            out.shape = ir.Shape(["batch", "sequence", count])
            self.graph.outputs.append(out)

    def open_ffns(self) -> None:
        """Let every gated FFN read the running rows only."""
        for i, block, node in self.gates:
            if not isinstance(block, FFNSite):
                continue
            y, x = given(node.inputs[0]), given(node.inputs[1])
            for inner in _between([x], [y]):
                for place, value in enumerate(inner.inputs):
                    if value is x:
                        inner.replace_input_with(place, self.rows[i].x)

    def attention(self) -> dict[ir.Node, tuple[Rows, int, ir.Node]]:
        """By gated attention placeholder: running rows, the block's index, its output product."""
        found: dict[ir.Node, tuple[Rows, int, ir.Node]] = {}
        for i, block, node in self.gates:
            if isinstance(block, FFNSite):
                continue
            output = _producer(node.inputs[0])
            source = _producer(output.inputs[0])
            while source.op_type in ("Reshape", "Transpose"):
                source = _producer(source.inputs[0])
            if source.op_type != "Attention":
                raise CarveError("emit", f"{block.name}: a gate round no attention")
            found[source] = self.rows[i], i, output
        return found

    def close(self, attention: dict[int, ir.Node]) -> None:
        """Move every gated block into its ``If``; ``attention`` are operators by block index."""
        for i, block, node in self.gates:
            if self.apart and isinstance(block, FFNSite) and block.routed is not None:
                self._join(i, block, node)
            else:
                self._close(i, block, node, attention.get(i))

    def _join(self, i: int, block: FFNSite, node: ir.Node) -> None:
        """Leave an FFN on its rows outside of any branch: nothing is computed where none runs."""
        rows = self.rows[i].node
        taken, hit = self._expand(rows, rows)
        self.graph.remove(rows)
        alone = self.b.op(node, "And", [self.single, self.conditions[i]])
        y, x = given(node.inputs[0]), given(node.inputs[1])
        for value in (v for n in _between([taken], [y]) for v in n.outputs):
            value.shape = None  # that of all tokens, as it was exported
        replace(node, [self._put_back(node, y, hit, x, block, _gate(block), alone)])

    def _close(self, i: int, block: Block, node: ir.Node, attention: ir.Node | None) -> None:
        b, gate = self.b, _gate(block)
        y, x = given(node.inputs[0]), given(node.inputs[1])
        rows = self.rows[i]
        results = [] if attention is None else list(attention.outputs[1:3])
        inner = _between(list(rows.node.outputs), [y, *results])
        other: Branch = []
        skipped = [self._bridge(other, x, block, gate)]
        if attention is not None:
            skipped += self._cache_only(other, attention, x)
        condition = [self.conditions[i]]
        made = b.op(node, "If", condition, outputs=1 + len(results))
        values = list(made) if results else [made]
        for old, new in zip(results, values[1:], strict=True):
            _take_over(old, new)
        replace(node, [values[0]])
        self.graph.remove([rows.node, *inner])
        then: Branch = []
        hit = self._expand(then, rows.node)[1]
        for n in inner:
            if n.domain == ROWS_DOMAIN:
                self._expand(then, n)
            else:
                then.append(n)
        y = self._put_back(then, y, hit, x, block, gate, self.single)
        owner = _producer(values[0])
        owner.attributes["then_branch"] = ir.AttrGraph(
            "then_branch", _subgraph(then, [y, *results], f"{rows.scope}_run")
        )
        owner.attributes["else_branch"] = ir.AttrGraph(
            "else_branch", _subgraph(other, skipped, f"{rows.scope}_skip")
        )

    def _expand(self, branch: Place, n: ir.Node) -> list[Any]:
        """The operators that a placeholder on rows stands for; its values."""
        b = self.b
        first = given(n.inputs[0])
        if n.op_type == "Tie":
            values = [first]
        elif n.op_type == "Rows":
            flat = b.const("carve_flat", np.array([-1]))
            hit = b.op(branch, "Reshape", [given(n.inputs[1]), flat])
            values = [self._take(branch, first, hit, n), hit]
        elif n.op_type == "Take":
            values = [self._take(branch, first, given(n.inputs[1]), n)]
        else:
            hit, full, width = (
                given(n.inputs[1]),
                given(n.inputs[2]),
                n.attributes["width"].as_int(),
            )
            some: Branch = []
            shape = self._shape(some, full, width)
            blank = b.op(some, "ConstantOfShape", [shape])
            taken = self._scatter(some, blank, hit, first, shape, width)
            name = n.name or "rows"
            values = [self._unless(self.single, branch, name, first, taken, some, width)]
        for old, new in zip(n.outputs, values, strict=True):
            ir.convenience.replace_all_uses_with(old, new)
        for place in range(len(n.inputs)):
            n.replace_input_with(place, None)
        return values

    def _take(self, branch: Place, value: ir.Value, hit: ir.Value, n: ir.Node) -> Any:
        flat = self._flat(branch, value, n.attributes["width"].as_int())
        return self.b.op(branch, "Compress", [flat, hit], axis=0)

    def _unless(
        self,
        single: Any,
        branch: Place,
        name: str,
        rows: Any,
        taken: Any,
        some: Branch,
        width: int,
    ) -> Any:
        """``taken`` of the branch ``some``, or ``rows`` as they are where one token runs alone."""
        alone: Branch = []
        one = self.b.const(f"carve_single{width}", np.array([1, 1, width]))
        whole = self.b.op(alone, "Reshape", [rows, one])
        return self.b.op(
            branch,
            "If",
            [single],
            then_branch=_subgraph(alone, [whole], f"{name}_one"),
            else_branch=_subgraph(some, [taken], f"{name}_some"),
        )

    def _put_back(
        self,
        branch: Place,
        y: ir.Value,
        hit: ir.Value,
        x: ir.Value,
        block: Block,
        gate: Gate,
        single: Any,
    ) -> Any:
        """``[B, S, d_out]``: the rows ``y`` ``[R, d_out]`` where tokens ran, else the bridge."""
        width = int(block.output.meta["val"].shape[-1])
        some: Branch = []
        shape = self._shape(some, x, width)
        base = self._bridge(some, x, block, gate)
        taken = self._scatter(some, base, hit, y, shape, width)
        return self._unless(single, branch, f"{block.name}.rows", y, taken, some, width)

    def _scatter(
        self, branch: Branch, base: Any, hit: Any, rows: Any, shape: Any, width: int
    ) -> Any:
        b = self.b
        at = b.op(branch, "Transpose", [b.op(branch, "NonZero", [hit])], perm=[1, 0])
        put = b.op(branch, "ScatterND", [self._flat(branch, base, width), at, rows])
        return b.op(branch, "Reshape", [put, shape])

    def _flat(self, branch: Place, value: Any, width: int) -> Any:
        """``[B, S, w]`` as ``[B S, w]``."""
        flat = self.b.const(f"carve_flat{width}x", np.array([-1, width]))
        return self.b.op(branch, "Reshape", [value, flat])

    def _shape(self, branch: Branch, x: ir.Value, width: int) -> Any:
        """``[B, S, width]`` as int64."""
        two = self.b.op(branch, "Shape", [x], start=0, end=2)
        return self.b.op(
            branch, "Concat", [two, self.b.const(f"carve_w{width}", np.array([width]))], axis=0
        )

    def _bridge(self, branch: Branch, x: ir.Value, block: Block, gate: Gate) -> Any:
        """What skipped tokens get, ``[B, S, d_out]``; see `carve.dialect.bridge`."""
        b, name = self.b, f"{block.name}.bridge"
        width = int(block.output.meta["val"].shape[-1])
        if gate.bridge_in is None or gate.bridge_out is None:
            shape = self._shape(branch, x, width)
            if gate.bridge_bias is None:
                return b.op(branch, "ConstantOfShape", [shape])
            return b.op(branch, "Expand", [b.float_tensor(f"{name}.bias", gate.bridge_bias), shape])
        h = b.linear(branch, x, f"{name}.in", gate.bridge_in, None)
        if gate.bridge_gate is not None:
            g = b.linear(branch, x, f"{name}.gate", gate.bridge_gate, None)
            h = b.op(branch, "Mul", [b.activate(branch, g, "silu"), h])
        return b.linear(branch, h, f"{name}.out", gate.bridge_out, gate.bridge_bias)

    def _cache_only(self, branch: Branch, attention: ir.Node, x: ir.Value) -> list[Any]:
        """The new keys and values in the cache, by an operator with one query head for each."""
        heads = attention.attributes["kv_num_heads"].as_int()
        width = heads * self.head_width
        blank = self.b.op(branch, "ConstantOfShape", [self._shape(branch, x, width)])
        kept = {k: a.value for k, a in attention.attributes.items()}
        # Scores of one key a query: the result is not read.
        kept |= {"num_heads": heads, "local_window_size": 1}
        _, key, value = self.b.op(
            branch,
            attention.op_type,
            [blank, *attention.inputs[1:]],
            outputs=3,
            domain=attention.domain,
            **kept,
        )
        return [key, value]


def _gate(block: Block) -> Gate:
    if block.gate is None:
        raise CarveError("emit", f"{block.name}: a gate's placeholder without a gate")
    return block.gate


def _producer(value: ir.Value | None) -> ir.Node:
    node = given(value).producer()
    if node is None:
        raise CarveError("emit", "a gated block's result is an input of the graph")
    return node


def _between(sources: Sequence[ir.Value], targets: Sequence[ir.Value]) -> list[ir.Node]:
    """The nodes that ``targets`` need and that need one of ``sources``."""
    ends = {n for t in targets if (n := t.producer()) is not None}
    after: dict[ir.Node, None] = {}
    stack = [u.node for v in sources for u in v.uses()]
    while stack:
        n = stack.pop()
        if n not in after:
            after[n] = None
            if n not in ends:
                stack += [u.node for v in n.outputs for u in v.uses()]
    found: dict[ir.Node, None] = {}
    stack = [n for n in ends if n in after]
    while stack:
        n = stack.pop()
        if n not in found:
            found[n] = None
            stack += [p for v in n.inputs if v is not None and (p := v.producer()) in after]
    return list(found)


def _subgraph(nodes: Branch, outputs: list[Any], name: str) -> ir.Graph:
    """A branch; its results get a type, which readers of the file look for."""
    for value in outputs:
        if value.type is None:
            value.type = ir.TensorType(ir.DataType.FLOAT)
    return ir.Graph([], outputs, nodes=nodes, name=name)


def _take_over(old: ir.Value, new: ir.Value) -> None:
    """Let ``new`` be read, and be the graph's result, where ``old`` was."""
    new.shape, new.type = old.shape, old.type
    if old.is_graph_output():
        new.name, old.name = old.name, f"{old.name}_run"
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
