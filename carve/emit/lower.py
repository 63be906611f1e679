"""Lowering: every placeholder of a skeleton by what onnxruntime runs best at the chosen width."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes import common as onnx_passes
from torch import Tensor

from carve.emit import pack
from carve.emit.builder import CONTRIB, Builder, lazy_float
from carve.emit.skeleton import DOMAIN
from carve.errors import CarveError
from carve.program import Program, RoutedFFN


def _hidden(
    b: Builder,
    at: ir.Node,
    x: Any,
    name: str,
    gate: Tensor | None,
    gate_bias: Tensor | None,
    up: Tensor,
    up_bias: Tensor | None,
    activation: str,
) -> Any:
    h = b.linear(at, x, f"{name}.up", up, up_bias)
    if gate is None:
        return b.activate(at, h, activation)
    g = b.activate(at, b.linear(at, x, f"{name}.gate", gate, gate_bias), activation)
    return b.op(at, "Mul", [g, h])


def _router(b: Builder, at: ir.Node, flat: Any, name: str, r: RoutedFFN) -> Any:
    """Router scores ``[n, E]`` of ``flat`` ``[n, d]``, always fp32."""

    def product(weight: Tensor, suffix: str, bias: Tensor | None = None) -> Any:
        inputs = [flat, b.float_tensor(f"{name}.{suffix}", weight)]
        if bias is not None:
            inputs.append(b.float_tensor(f"{name}.{suffix}_bias", bias))
        return b.op(at, "Gemm", inputs, transB=1)

    scores = product(r.router, "router", r.router_bias)
    if r.router_gate is not None:
        gate = b.activate(at, product(r.router_gate, "router_gate"), r.activation)
        scores = b.op(at, "Mul", [gate, scores])
    return scores


def _shared(b: Builder, at: ir.Node, x: Any, name: str, r: RoutedFFN) -> Any:
    """The shared expert with the output bias, or None when there is neither."""
    if r.shared_up is None or r.shared_down is None:
        return (
            None if r.output_bias is None else b.float_tensor(f"{name}.output_bias", r.output_bias)
        )
    h = _hidden(
        b,
        at,
        x,
        f"{name}.shared",
        r.shared_gate,
        r.shared_gate_bias,
        r.shared_up,
        r.shared_up_bias,
        r.activation,
    )
    return b.linear(at, h, f"{name}.shared.down", r.shared_down, r.output_bias)


def _fused_experts(b: Builder, at: ir.Node, x: Any, scores: Any, name: str, r: RoutedFFN) -> Any:
    """The routed experts as one ``QMoE`` node; ``x`` is ``[..., d]``, every weight exactly 1."""
    e, m, d = r.expert_up.shape
    gated = r.expert_gate is not None
    attributes: dict[str, Any] = {"activation_type": "swiglu" if gated else r.activation}
    if gated:
        attributes |= {"swiglu_fusion": 1, "activation_alpha": 1.0, "activation_beta": 0.0}

    def first() -> Tensor:
        return r.expert_up if r.expert_gate is None else pack.interleave(r.expert_gate, r.expert_up)

    first_bias = None
    if r.expert_up_bias is not None:
        bias = r.expert_up_bias
        if r.expert_gate_bias is not None:
            bias = torch.stack((r.expert_gate_bias, bias), -1).flatten(1)
        first_bias = b.float_tensor(f"{name}.fc1_bias", bias)
    second_bias = None
    if r.expert_bias is not None:
        second_bias = b.float_tensor(f"{name}.fc2_bias", r.expert_bias)
    w1, s1 = b.quantized(f"{name}.fc1", first, (e, 2 * m if gated else m, d), blocked=False)
    w2, s2 = b.quantized(f"{name}.fc2", lambda: r.expert_down, (e, d, m), blocked=False)
    inputs = [
        x,
        scores,
        w1,
        s1,
        first_bias,
        w2,
        s2,
        second_bias,
        *[None] * 6,
        b.ones_like(at, scores, e),
    ]
    return b.op(
        at,
        "QMoE",
        inputs,
        domain=CONTRIB,
        k=r.top_k,
        normalize_routing_weights=0,
        expert_weight_bits=b.bits,
        block_size=pack.BLOCK,
        accuracy_level=4,
        **attributes,
    )


def _grouped_experts(
    b: Builder, at: ir.Node, x: Any, scores: Any, y: Any, name: str, r: RoutedFFN
) -> Any:
    """Each expert on the rows that chose it, added to ``y`` ``[n, d]``.

    Products of zero rows cost next to nothing, so the work follows the active share for any
    number of tokens, any activation and any width.
    """
    _, index = b.op(
        at, "TopK", [scores, b.const(f"carve_k{r.top_k}", np.array([r.top_k]))], outputs=2
    )
    zero, last = b.const("carve_i0", np.array(0)), b.const("carve_i1", np.array([1]))
    for e in range(r.num_experts):
        hit = b.op(at, "Equal", [index, b.const(f"carve_i{e}_", np.array(e))])
        rows = b.op(at, "Gather", [b.op(at, "NonZero", [hit]), zero], axis=0)
        path = f"{name}.expert{e}"

        def own(t: Tensor | None, e: int = e) -> Tensor | None:
            return None if t is None else t[e]

        h = _hidden(
            b,
            at,
            b.op(at, "Gather", [x, rows], axis=0),
            path,
            own(r.expert_gate),
            own(r.expert_gate_bias),
            r.expert_up[e],
            own(r.expert_up_bias),
            r.activation,
        )
        out = b.linear(at, h, f"{path}.down", r.expert_down[e], own(r.expert_bias))
        y = b.op(at, "ScatterND", [y, b.op(at, "Unsqueeze", [rows, last]), out], reduction="add")
    return y


def _fusable(r: RoutedFFN, bits: int) -> bool:
    """Whether ``QMoE`` runs this FFN: its width, its activation and the kernels' block size."""
    widths = (*r.expert_up.shape[1:], r.expert_down.shape[1])
    known = (
        r.activation == "silu" if r.expert_gate is not None else r.activation in ("silu", "relu")
    )
    return bits < 16 and known and all(w % pack.BLOCK == 0 for w in widths)


def _lower_routed(b: Builder, node: ir.Node, name: str, r: RoutedFFN) -> None:
    d = r.expert_up.shape[-1]
    x = node.inputs[0]
    flat = b.op(node, "Reshape", [x, b.const(f"carve_rows{d}", np.array([-1, d]))])
    scores = _router(b, node, flat, name, r)
    if _fusable(r, b.bits):
        y = _fused_experts(b, node, x, scores, name, r)
        shared = _shared(b, node, x, name, r)
        _replace(node, [y if shared is None else b.op(node, "Add", [shared, y])])
        return
    shared = _shared(b, node, flat, name, r)
    if shared is None or r.shared_up is None:
        blank = b.const("carve_zero", np.array(0.0, np.float32)) if shared is None else shared
        shared = b.op(node, "Expand", [blank, b.op(node, "Shape", [flat])])
    y = _grouped_experts(b, node, flat, scores, shared, name, r)
    _replace(node, [b.op(node, "Reshape", [y, b.op(node, "Shape", [x])])])


def _replace(node: ir.Node, new: list[Any]) -> None:
    """Put ``new`` in place of the node's results, graph outputs too, and drop the node."""
    graph = node.graph
    if not isinstance(graph, ir.Graph):
        raise CarveError("emit", f"{node.name} stands in no graph")
    for old, value in zip(node.outputs, new, strict=True):
        value.shape, value.type = old.shape, old.type
        if old.is_graph_output():
            value.name, old.name = old.name, f"{old.name}_replaced"
        ir.convenience.replace_all_uses_with(old, value, replace_graph_outputs=True)
    graph.remove(node, safe=True)


def _given(value: ir.Value | None) -> ir.Value:
    """An input that has to be there."""
    if value is None:
        raise CarveError("emit", "a placeholder lacks an input")
    return value


def _produced(value: ir.Value | None, kind: str) -> ir.Node | None:
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == kind else None


def _is_head_swap(node: ir.Node | None) -> bool:
    return node is not None and list(node.attributes["perm"].as_ints()) == [0, 2, 1, 3]


def _flat_heads(b: Builder, at: ir.Node, value: ir.Value, heads: int, width: int) -> Any:
    """``[B, H, S, D]`` as ``[B, S, H * D]``, without a transpose where the graph made one from it.

    The usual chain ``Reshape, Transpose[, RotaryEmbedding]`` on a linear's ``[B, S, H * D]`` is
    undone by rotating that tensor as it is.
    """
    rotary = _produced(value, "RotaryEmbedding")
    transposed = rotary.inputs[0] if rotary is not None else value
    swap = _produced(transposed, "Transpose")
    split = (
        _produced(swap.inputs[0], "Reshape") if swap is not None and _is_head_swap(swap) else None
    )
    if split is not None and _produced(split.inputs[0], "RMSNormalization") is None:
        flat = split.inputs[0]
        if rotary is None:
            return flat
        keep = {k: a.value for k, a in rotary.attributes.items()}
        return b.op(
            at, "RotaryEmbedding", [flat, *rotary.inputs[1:]], **{**keep, "num_heads": heads}
        )
    if swap is not None and _is_head_swap(swap) and rotary is None:
        source: Any = swap.inputs[0]
    else:
        source = b.op(at, "Transpose", [value], perm=[0, 2, 1, 3])
    shape = b.const(f"carve_flat{heads * width}", np.array([0, 0, heads * width]))
    return b.op(at, "Reshape", [source, shape])


def _lower_attention(
    b: Builder, node: ir.Node, lengths: tuple[Any, Any], heads: int, kv: int, width: int
) -> None:
    """The dialect's attention as ``GroupQueryAttention``: past and present may share a buffer."""
    q, k, v, past_key, past_value = (_given(i) for i in node.inputs)
    window = node.attributes["window"].as_int()
    inputs = [
        _flat_heads(b, node, q, heads, width),
        _flat_heads(b, node, k, kv, width),
        _flat_heads(b, node, v, kv, width),
        past_key,
        past_value,
        *lengths,
    ]
    out, key, value = b.op(
        node,
        "GroupQueryAttention",
        inputs,
        outputs=3,
        domain=CONTRIB,
        num_heads=heads,
        kv_num_heads=kv,
        scale=node.attributes["scale"].as_float(),
        softcap=node.attributes["softcap"].as_float(),
        local_window_size=window if window > 0 else -1,
    )
    # The usual consumer is Transpose then Reshape back to [B, S, H * D]: that is what `out` is.
    for use in list(node.outputs[0].uses()):
        swap = use.node
        if swap.op_type == "Transpose" and _is_head_swap(swap):
            reshapes = [u.node for u in swap.outputs[0].uses()]
            if all(
                r.op_type == "Reshape" and r.outputs[0].shape and len(r.outputs[0].shape) == 3
                for r in reshapes
            ):
                for r in reshapes:
                    _replace_uses(r.outputs[0], out)
    four = b.op(
        node, "Reshape", [out, b.const(f"carve_heads{heads}", np.array([0, 0, heads, width]))]
    )
    four = b.op(node, "Transpose", [four], perm=[0, 2, 1, 3])
    _replace(node, [four, key, value])


def _replace_uses(old: ir.Value, new: ir.Value) -> None:
    new.shape, new.type = old.shape, old.type
    ir.convenience.replace_all_uses_with(old, new)


def _attention_lengths(b: Builder, model: ir.Model, at: ir.Node) -> tuple[Any, Any]:
    """``seqlens_k`` and ``total_sequence_length`` from a new input ``attention_mask``."""
    mask = ir.Value(
        name="attention_mask",
        shape=ir.Shape(["batch", "total"]),
        type=ir.TensorType(ir.DataType.INT64),
    )
    model.graph.inputs.insert(1, mask)
    axis, one = b.const("carve_axis1", np.array([1])), b.const("carve_one", np.array(1))
    total = b.op(at, "ReduceSum", [mask, axis], keepdims=0)
    last = b.op(at, "Cast", [b.op(at, "Sub", [total, one])], to=ir.DataType.INT32)
    size = b.op(at, "Gather", [b.op(at, "Shape", [mask]), one], axis=0)
    return last, b.op(at, "Cast", [size], to=ir.DataType.INT32)


def lower(model: ir.Model, weights: dict[str, Tensor], program: Program, bits: int) -> None:
    """Replace every placeholder by operators of onnxruntime, in place."""
    graph = model.graph
    b = Builder(model, bits)
    nodes = [n for n in graph if n.domain == DOMAIN]
    lengths: tuple[Any, Any] | None = None
    for node in nodes:
        if node.op_type == "Linear":
            name = str(_given(node.inputs[1]).name)
            bias = _value_of(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] else None
            weight = weights[name] if name in weights else _value_of(node.inputs[1])
            short = name.removesuffix("/weight").removeprefix("model/").replace("/", ".")
            _replace(node, [b.linear(node, _given(node.inputs[0]), short, weight, bias)])
        elif node.op_type == "RoutedFFN":
            site = program.sites[node.attributes["site"].as_int()]
            if site.routed is None:
                raise CarveError(
                    "emit", f"{site.name}: a routed placeholder without routed weights"
                )
            _lower_routed(b, node, site.name, site.routed)
        elif node.op_type == "Attention":
            if lengths is None:
                lengths = _attention_lengths(b, model, graph[0])
            kv, width = program.example[2].shape[1], program.example[2].shape[3]
            heads = int(_given(node.inputs[0]).shape[1])  # type: ignore[index, arg-type]
            _lower_attention(b, node, lengths, heads, kv, width)
        else:
            raise CarveError("emit", f"no lowering for {node.op_type}")
    onnx_passes.CommonSubexpressionEliminationPass()(model)
    onnx_passes.RemoveUnusedNodesPass()(model)
    for name, value in graph.initializers.items():
        if name in weights:
            value.const_value = lazy_float(name, weights[name])
    model.opset_imports[CONTRIB] = 1
    model.opset_imports.pop(DOMAIN, None)
    model.producer_name = "carve"


def _value_of(value: ir.Value | None) -> Tensor:
    if value is None or value.const_value is None:
        raise CarveError("emit", "a linear with a weight that is not stored")
    return torch.from_numpy(np.array(value.const_value.numpy()))
