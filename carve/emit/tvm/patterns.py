"""What the captured graph spells out and one kernel computes: norms, rotary embeddings, heads.

Everything here only reads the graph. What is not recognised is translated operator by operator.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from carve.match import get_tensor

aten = torch.ops.aten
Node = Any
"""An FX node: by its declared type each argument may be any of twenty kinds."""
_SLICE = aten.slice.Tensor
_SAME = {aten.type_as.default, aten.to.dtype, aten.to.dtype_layout, aten.contiguous.default}


@dataclass(frozen=True)
class RMSNorm:
    """``x / sqrt(mean(x^2) + epsilon) * weight`` over the last axis."""

    x: Node
    weight: Node
    epsilon: float


@dataclass(frozen=True)
class Rotary:
    """The first ``width`` of each head's values turned by angles given as cosines and sines.

    ``x`` ``[B, H, S, D]``; ``cos`` and ``sin`` ``[B, S, width]``; halves are ``width / 2`` apart.
    """

    x: Node
    cos: Node
    sin: Node
    width: int


def _is(node: Any, target: Any, count: int = 0) -> bool:
    return isinstance(node, fx.Node) and node.target is target and len(node.args) >= count


def _shape(node: Any) -> tuple[Any, ...]:
    """Shape of a node's value, empty where it is no tensor."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def _ndim(node: Any) -> int:
    return len(_shape(node))


def constants(graph: fx.Graph, module: fx.GraphModule) -> dict[Node, Tensor]:
    """The values of nodes that depend on stored tensors alone, the stored ones included."""
    known: dict[Node, Tensor] = {}
    for n in graph.nodes:
        if n.op == "get_attr":
            value = get_tensor(module, n)
            if value is not None:
                known[n] = value.detach()
        elif n.op == "call_function" and isinstance(n.target, torch._ops.OpOverload):
            inputs = n.all_input_nodes
            if all(i in known for i in inputs) and isinstance(n.meta.get("val"), Tensor):
                args, kwargs = fx.node.map_arg((n.args, n.kwargs), known.__getitem__)
                with torch.no_grad():
                    value = n.target(*args, **kwargs)
                known[n] = value.contiguous()
    return known


def _two_ways(node: Node) -> Iterable[tuple[Any, Any]]:
    a, b = node.args[:2]
    return (a, b), (b, a)


def rms_norm(node: Node, known: dict[Node, Tensor]) -> RMSNorm | None:
    """The norm whose result is ``node``."""
    if not _is(node, aten.mul.Tensor, 2):
        return None
    for weight, inner in _two_ways(node):
        if not isinstance(weight, fx.Node) or weight not in known or known[weight].ndim != 1:
            continue
        if not _is(inner, aten.mul.Tensor, 2):
            continue
        for x, root in _two_ways(inner):
            if not _is(root, aten.rsqrt.default) or not _is(root.args[0], aten.add.Tensor, 2):
                continue
            mean, epsilon = root.args[0].args
            if not _is(mean, aten.mean.dim, 3) or not isinstance(epsilon, float):
                continue
            square, axes, keep = mean.args
            if (
                list(axes) == [-1]
                and keep
                and _is(square, aten.pow.Tensor_Scalar, 2)
                and square.args == (x, 2)
                and isinstance(x, fx.Node)
            ):
                return RMSNorm(x, weight, epsilon)
    return None


def _last_axis(node: Node, axis: Any) -> bool:
    return axis in (-1, _ndim(node) - 1)


def _is_slice(node: Any) -> bool:
    """Whether a node takes every value of a range along one axis."""
    return _is(node, _SLICE, 4) and node.args[4:] in ((), (1,))


def _piece(node: Any, x: Node, start: int, stop: int | None) -> bool:
    """Whether ``node`` is ``x[..., start:stop]``; None stops at the end."""
    if not _is_slice(node) or node.args[0] is not x or not _last_axis(x, node.args[1]):
        return False
    width = _shape(x)[-1]
    end = min(int(node.args[3]), int(width)) if isinstance(node.args[3], int) else -1
    return node.args[2] == start and end == (width if stop is None else stop)


def _table(node: Any) -> Node | None:
    """``[B, S, width]`` behind ``[B, 1, S, width]``."""
    if _is(node, aten.unsqueeze.default, 2) and node.args[1] == 1 and _ndim(node.args[0]) == 3:
        return node.args[0]
    return None


def _turned(node: Any) -> Rotary | None:
    """``x cos + [-x_2, x_1] sin`` over the whole of ``x``."""
    if not _is(node, aten.add.Tensor, 2) or _ndim(node) != 4:
        return None
    for straight, crossed in _two_ways(node):
        if not _is(straight, aten.mul.Tensor, 2) or not _is(crossed, aten.mul.Tensor, 2):
            continue
        x, cos = straight.args
        halves, sin = crossed.args
        if not isinstance(x, fx.Node) or not _is(halves, aten.cat.default, 2):
            continue
        width = int(_shape(x)[-1])
        parts, axis = halves.args
        if len(parts) != 2 or not _last_axis(halves, axis) or width % 2:
            continue
        second, first = parts
        tables = _table(cos), _table(sin)
        if (
            _is(second, aten.neg.default)
            and _piece(second.args[0], x, width // 2, None)
            and _piece(first, x, 0, width // 2)
            and tables[0] is not None
            and tables[1] is not None
            and _shape(tables[0])[-1] == width
        ):
            return Rotary(x, tables[0], tables[1], width)
    return None


def rotary(node: Node) -> Rotary | None:
    """The rotary embedding whose result is ``node``, over all or the first part of a head."""
    if not _is(node, aten.cat.default, 2):
        return _turned(node)
    parts, axis = node.args
    if len(parts) != 2 or not _last_axis(node, axis):
        return None
    turned = _turned(parts[0])
    if turned is None:
        return None
    if _piece(parts[1], turned.x, turned.width, None):
        return turned  # all of it: the rest is empty
    whole = turned.x.args[0] if _is_slice(turned.x) else None
    if (
        isinstance(whole, fx.Node)
        and _piece(turned.x, whole, 0, turned.width)
        and _piece(parts[1], whole, turned.width, None)
    ):
        return Rotary(whole, turned.cos, turned.sin, turned.width)
    return None


def is_head_swap(node: Node) -> bool:
    """Whether ``node`` swaps the axes 1 and 2 of four."""
    return (
        _is(node, aten.transpose.int, 3)
        and _ndim(node) == 4
        and {int(a) % 4 for a in node.args[1:3]} == {1, 2}
    )


def projection(heads: Node) -> Node | None:
    """The linear whose result ``[B, S, H D]`` stands as heads ``[B, H, S, D]``."""
    split = heads.args[0] if is_head_swap(heads) else None
    viewed = _is(split, aten.view.default, 2) or _is(split, aten.reshape.default, 2)
    linear = split.args[0] if split is not None and viewed else None
    return linear if _is(linear, aten.linear.default, 2) and _ndim(linear) == 3 else None


def is_sum(node: Node) -> bool:
    """Whether a node adds two streams ``[B, S, d]``, neither broadcast."""
    if not _is(node, aten.add.Tensor, 2) or node.kwargs:
        return False
    shapes = [_shape(a) for a in node.args]
    return len(shapes[0]) == 3 and shapes[0] == shapes[1] and shapes[0] == _shape(node)


def passes_through(node: Node) -> bool:
    """Whether a node gives its first argument as it is, on one device and in one dtype."""
    if node.target is aten.to.device:
        return _dtype(node) == _dtype(node.args[0])
    if node.target in _SAME:
        return _dtype(node) == _dtype(node.args[0])
    if _is_slice(node):
        full = isinstance(node.args[3], int) and node.args[3] >= (1 << 62)
        return node.args[2] == 0 and full
    return False


def _dtype(node: Any) -> torch.dtype | None:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value.dtype if isinstance(value, Tensor) else None


def head_product(output: Node) -> Node | None:
    """The linear behind a decoder's logits, where each row of them depends on its own row alone."""
    node = output
    while isinstance(node, fx.Node) and node.target is not aten.linear.default:
        pointwise = isinstance(node.target, torch._ops.OpOverload) and (
            torch.Tag.pointwise in node.target.tags or passes_through(node)
        )
        inputs = [i for i in node.all_input_nodes if _ndim(i) > 1]
        if not pointwise or len(inputs) != 1:
            return None
        node = inputs[0]
    return node if isinstance(node, fx.Node) and _ndim(node) == 3 else None
