"""Find FFNs in a captured graph, and account for every other product with weights.

An FFN is ``linear(f(linear(x)))`` or ``linear(f(linear(x), linear(x)))`` with ``f`` elementwise.
The graph is searched from each linear backwards through elementwise operators, so no architecture
needs a line of its own. Which activation ``f`` is, is found by evaluating it. Products with
weights inside the blocks that are neither FFN nor attention are refused by name.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from carve.dialect import ACTIVATIONS
from carve.errors import UserError
from carve.ffn import DenseFFN
from carve.sites import AttentionSite, FFNSite

aten = torch.ops.aten
LINEAR = aten.linear.default
_TRANSPARENT = {
    aten.view.default,
    aten.reshape.default,
    aten.clone.default,
    aten.to.dtype,
    aten._to_copy.default,
}
_SPLIT = {aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default}
_ATTENTION = {aten.scaled_dot_product_attention.default, torch.ops.carve.attention.default}
_PRODUCTS = {aten.mm.default, aten.bmm.default, aten.matmul.default, aten.addmm.default,
             aten.baddbmm.default, aten.einsum.default}  # fmt: skip


@dataclass
class _Leaf:
    """One input of an FFN's elementwise part: a linear, or a slice of a fused one."""

    node: fx.Node
    linear: fx.Node
    start: int
    stop: int


def get_tensor(module: fx.GraphModule, node: Any) -> Tensor | None:
    """The parameter or buffer behind a ``get_attr`` node."""
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    value: Any = module
    for part in str(node.target).split("."):
        value = getattr(value, part)
    return value if isinstance(value, Tensor) else None


def _stored(module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node is a weight of two or more axes."""
    value = get_tensor(module, node)
    return value is not None and value.ndim > 1


def _width(node: Any) -> int:
    value = node.meta.get("val")
    return int(value.shape[-1]) if isinstance(value, Tensor) and value.ndim else -1


def _weight(module: fx.GraphModule, node: fx.Node) -> Tensor:
    value = get_tensor(module, node.args[1])
    if value is None:
        raise UserError("capture", f"{node.name}: a linear whose weight is computed, not stored")
    return value.detach()


def _bias(module: fx.GraphModule, node: fx.Node) -> Tensor | None:
    value = get_tensor(module, node.args[2]) if len(node.args) > 2 else None
    return None if value is None else value.detach()


def normalize_products(module: fx.GraphModule) -> None:
    """Rewrite ``addmm`` with a stored ``[in, out]`` weight (Conv1D) as ``linear``."""
    graph = module.graph
    for n in list(graph.find_nodes(op="call_function", target=aten.addmm.default)):
        weight = get_tensor(module, n.args[2])
        if weight is None or weight.ndim != 2 or n.kwargs:
            continue
        owner, _, leaf = str(n.args[2].target).rpartition(".")
        module.get_submodule(owner).register_parameter(
            f"{leaf}_t", nn.Parameter(weight.detach().t().contiguous(), requires_grad=False)
        )
        with graph.inserting_before(n):
            transposed = graph.get_attr(f"{owner}.{leaf}_t")
            linear = graph.call_function(LINEAR, (n.args[1], transposed, n.args[0]))
        linear.meta = dict(n.meta)
        n.replace_all_uses_with(linear)
        graph.erase_node(n)
    graph.eliminate_dead_code()
    for name, _ in [*module.named_parameters(remove_duplicate=False)]:
        if name.endswith("_t") and not any(x.target == name[:-2] for x in graph.nodes):
            owner, _, leaf = name[:-2].rpartition(".")
            delattr(module.get_submodule(owner), leaf)
    module.recompile()


def _elementwise(n: fx.Node) -> bool:
    if n.op != "call_function":
        return False
    if n.target in _TRANSPARENT:
        return isinstance(n.args[0], fx.Node) and _width(n) == _width(n.args[0])
    if n.target is aten.hardswish.default:  # elementwise, though torch does not tag it
        return True
    return isinstance(n.target, torch._ops.OpOverload) and torch.Tag.pointwise in n.target.tags


def _as_leaf(module: fx.GraphModule, n: fx.Node) -> _Leaf | None:
    """Read ``n`` as a linear, or as one half of a fused linear."""
    if n.target is LINEAR:
        return _Leaf(n, n, 0, _weight(module, n).shape[0])
    if n.target is getattr:
        return None
    if n.op == "call_function" and getattr(n.target, "__name__", "") == "getitem":
        split: Any = n.args[0]
        index: Any = n.args[1]
        if not isinstance(split, fx.Node) or split.target not in _SPLIT:
            return None
        source, axis = split.args[0], split.args[2] if len(split.args) > 2 else 0
        values = split.meta.get("val")
        if not isinstance(source, fx.Node) or source.target is not LINEAR or values is None:
            return None
        if axis not in (-1, values[0].ndim - 1):
            return None
        sizes = [int(v.shape[-1]) for v in values]
        return _Leaf(n, source, sum(sizes[:index]), sum(sizes[: index + 1]))
    return None


def _gather(module: fx.GraphModule, down: fx.Node) -> tuple[list[_Leaf], list[fx.Node]] | None:
    """Walk back from ``down`` through elementwise nodes to its linears; None if it meets others."""
    leaves: list[_Leaf] = []
    body: list[fx.Node] = []
    seen: set[fx.Node] = set()
    stack = [down.args[0]]
    while stack:
        n = stack.pop()
        if not isinstance(n, fx.Node) or n in seen:
            continue
        seen.add(n)
        leaf = _as_leaf(module, n)
        if leaf is not None:
            leaves.append(leaf)
        elif n.op == "get_attr":
            value = get_tensor(module, n)
            if value is None or value.numel() != 1:
                return None
            body.append(n)
        elif _elementwise(n):
            body.append(n)
            stack.extend(n.args[:1] if n.target in _TRANSPARENT else n.all_input_nodes)
        else:
            return None
    return leaves, body


def _evaluate(
    module: fx.GraphModule, body: list[fx.Node], values: dict[fx.Node, Tensor], result: Any
) -> Tensor:
    """Value of ``result`` computed by the elementwise nodes ``body`` from ``values``."""
    inside = set(body)
    for n in module.graph.nodes:
        if n not in inside:
            continue
        if n.op == "get_attr":
            values[n] = get_tensor(module, n)  # type: ignore[assignment]
        elif n.target in _TRANSPARENT:
            values[n] = values[n.args[0]]
        else:
            args, kwargs = fx.node.map_arg((n.args, n.kwargs), values.__getitem__)
            values[n] = n.target(*args, **kwargs)
    return values[result]


def _activation(
    module: fx.GraphModule, down: fx.Node, leaves: list[_Leaf], body: list[fx.Node]
) -> tuple[str, list[_Leaf]] | None:
    """Name of the activation and the leaves in the order (gate, up), or (up,)."""
    # Far points tell a clamped activation from a plain one.
    far = torch.tensor([-1000.0, -90.0, -25.0, -9.0, 9.0, 25.0, 90.0, 1000.0])
    grid = torch.cat((torch.linspace(-6.0, 6.0, 97), far, far.flip(0)))
    other = torch.cat((torch.linspace(3.0, -2.0, 97), 0.7 * far.flip(0), 1.3 * far))
    try:
        probes = {leaf.node: v for leaf, v in zip(leaves, (grid, other), strict=False)}
        got = _evaluate(module, body, dict(probes), down.args[0])
    except (KeyError, RuntimeError, TypeError):
        return None
    if got.shape != grid.shape:
        return None

    def same(expected: Tensor) -> bool:
        return torch.allclose(got, expected, rtol=1e-5, atol=2e-5)

    for name, act in ACTIVATIONS.items():
        if len(leaves) == 1:
            if name != "identity" and same(act(grid)):
                return name, leaves
        elif same(act(grid) * other):
            return name, leaves
        elif same(act(other) * grid):
            return name, leaves[::-1]
    return None


def module_path(node: fx.Node) -> str:
    """Module path behind a linear, from its weight's name, without the capture wrapper."""
    name = str(node.args[1].target) if isinstance(node.args[1], fx.Node) else node.name
    return name.removeprefix("model.").rpartition(".")[0]


def _common(paths: list[str]) -> str:
    parts = [p.split(".") for p in paths]
    shared = []
    for pieces in zip(*parts, strict=False):
        if len(set(pieces)) > 1:
            break
        shared.append(pieces[0])
    return ".".join(shared) or "ffn"


def _in_block(path: str) -> bool:
    return re.search(r"(^|\.)\d+(\.|$)", path) is not None


def find_ffn_sites(module: fx.GraphModule) -> list[FFNSite]:
    """All FFN sites in graph order.

    Raises:
        UserError: an FFN-shaped part has an activation that is not known, or a block holds a
            product with weights that is neither an FFN nor attention; the message names them.
    """
    normalize_products(module)
    sites: list[FFNSite] = []
    unknown: list[str] = []
    for down in module.graph.find_nodes(op="call_function", target=LINEAR):
        found = _gather(module, down)
        if found is None:
            continue
        leaves, body = found
        operators = [n for n in body if n.op == "call_function" and n.target not in _TRANSPARENT]
        x: Any = leaves[0].linear.args[0] if leaves else None
        w = _weight(module, down)
        if (
            not operators
            or not 1 <= len(leaves) <= 2
            or any(leaf.linear.args[0] is not x for leaf in leaves)
            or w.shape[0] != _width(x)
            or any(leaf.stop - leaf.start != w.shape[1] for leaf in leaves)
        ):
            continue
        path = _common([module_path(leaf.linear) for leaf in leaves] + [module_path(down)])
        known = _activation(module, down, leaves, body)
        if known is None:
            unknown.append(path)
            continue
        name, ordered = known

        def part(leaf: _Leaf) -> tuple[Tensor, Tensor | None]:
            bias = _bias(module, leaf.linear)
            rows = slice(leaf.start, leaf.stop)
            return _weight(module, leaf.linear)[rows], None if bias is None else bias[rows]

        up, up_bias = part(ordered[-1])
        gate, gate_bias = part(ordered[0]) if len(ordered) == 2 else (None, None)
        dense = DenseFFN(gate, gate_bias, up, up_bias, w, _bias(module, down), name)
        sites.append(FFNSite(path, x, down, dense))
    if unknown:
        raise UserError(
            "activation",
            f"the activation of {', '.join(unknown)} is not one carve knows",
            "known: " + ", ".join(ACTIVATIONS),
        )
    names = [s.name for s in sites]
    for i, s in enumerate(sites):
        if names.count(s.name) > 1:
            s.name = f"{s.name}.ffn{names[:i].count(s.name)}"
    return sites


def _ffn_linears(sites: list[FFNSite]) -> set[fx.Node]:
    """The linears that belong to FFN sites."""
    nodes: set[fx.Node] = set()
    for s in sites:
        nodes.add(s.output)
        stack = [s.output.args[0]]
        while stack:
            n = stack.pop()
            if isinstance(n, fx.Node) and n is not s.input and n not in nodes:
                nodes.add(n)
                stack.extend(n.all_input_nodes)
    return nodes


def _reach(start: fx.Node, forward: bool) -> set[fx.Node]:
    """Linears reached from ``start`` without crossing another linear."""
    found: set[fx.Node] = set()
    seen: set[fx.Node] = set()
    stack = list(start.users) if forward else list(start.all_input_nodes)
    while stack:
        n = stack.pop()
        if n in seen:
            continue
        seen.add(n)
        if n.target is LINEAR:
            found.add(n)
        else:
            stack.extend(n.users if forward else n.all_input_nodes)
    return found


def attention_linears(module: fx.GraphModule, sites: list[FFNSite]) -> list[fx.Node]:
    """Linears that make queries, keys and values or that project attention's output."""
    starts = [
        n
        for n in module.graph.nodes
        if n.target in _ATTENTION
        or (n.target in _PRODUCTS and not any(_stored(module, a) for a in n.all_input_nodes))
    ]
    ffn = _ffn_linears(sites)
    found: set[fx.Node] = set()
    for n in starts:
        found |= _reach(n, forward=False) | _reach(n, forward=True)
    return [n for n in module.graph.nodes if n in found - ffn and _in_block(module_path(n))]


def projection_macs(
    module: fx.GraphModule, sites: list[FFNSite]
) -> tuple[int, list[AttentionSite]]:
    """Multiply-accumulates of the attention projections for one token, and what gates may skip.

    Raises:
        UserError: a block holds products with weights that belong to no FFN and no attention.
    """
    attention = attention_linears(module, sites)
    accounted = set(attention) | _ffn_linears(sites)
    strange = []
    for n in module.graph.nodes:
        if n.op != "call_function" or n in accounted:
            continue
        if n.target is LINEAR:
            paths = [module_path(n)]
        elif n.target in _PRODUCTS or "grouped_mm" in str(n.target):
            stored = [a for a in n.all_input_nodes if _stored(module, a)]
            paths = [str(a.target).removeprefix("model.") for a in stored]
        else:
            continue
        strange += [p for p in paths if _in_block(p)]
    if strange:
        raise UserError(
            "architecture",
            "not understood in this model's blocks: " + ", ".join(sorted(set(strange))[:8]),
            "carve takes dense FFNs and attention, no mixture of experts and no state-space blocks",
        )
    macs = sum(math.prod(_weight(module, n).shape) for n in attention)
    return macs, find_attention_sites(module, set(attention))


def find_attention_sites(module: fx.GraphModule, blocks: set[fx.Node]) -> list[AttentionSite]:
    """Attention with a cache whose query and output are linears of their own, in graph order.

    Where queries come out of one linear with keys, or the result of attention reaches more than one
    linear, there is nothing a gate could leave out, and no site. ``blocks`` are the linears of
    attention inside the blocks (see `attention_linears`).
    """
    sites: list[AttentionSite] = []
    for n in module.graph.find_nodes(op="call_function", target=torch.ops.carve.attention.default):
        query, key, value = (_linears_behind(a) for a in n.args[:3])
        outputs = _reach(n, forward=True)
        if len(query) != 1 or len(outputs) != 1 or query & (key | value):
            continue
        (q,), (o,) = query, outputs
        if not {q, o} <= blocks:
            continue
        macs = math.prod(_weight(module, q).shape) + math.prod(_weight(module, o).shape)
        path = _common([module_path(q), module_path(o)])
        x: Any = q.args[0]
        sites.append(AttentionSite(path, x, o, n, macs))
    return sites


def _linears_behind(value: Any) -> set[fx.Node]:
    """The linears that make a query, key or value."""
    if not isinstance(value, fx.Node):
        return set()
    return {value} if value.target is LINEAR else _reach(value, forward=False)
