"""Attention with a cache as ``GroupQueryAttention``, with its projections and rotary embedding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from torch import Tensor

from carve.emit.builder import CONTRIB, Builder
from carve.emit.gates import Rows
from carve.emit.graph import given, produced, replace, replace_uses, value_of

_MAX_TABLE_BYTES = 16 << 20


@dataclass
class Lengths:
    """``seqlens_k`` int32 ``[B]`` and ``total_sequence_length`` int32 of the running step."""

    last: Any
    total: Any


@dataclass(frozen=True)
class Heads:
    """Query heads, key/value heads, and their width."""

    query: int
    key_value: int
    width: int


@dataclass
class _Inputs:
    """Query, key and value, all in the first where they are one product, not yet rotated."""

    query: Any
    key: Any
    value: Any
    rotation: tuple[Any, Any]


def _is_head_swap(node: ir.Node | None) -> bool:
    return node is not None and list(node.attributes["perm"].as_ints()) == [0, 2, 1, 3]


def _flat_heads(b: Builder, at: ir.Node, value: ir.Value, heads: int, width: int) -> Any:
    """``[B, H, S, D]`` as ``[B, S, H * D]``, without a transpose where the graph made one from it.

    The usual chain ``Reshape, Transpose[, RotaryEmbedding]`` on a linear's ``[B, S, H * D]`` is
    undone by rotating that tensor as it is.
    """
    rotary = produced(value, "RotaryEmbedding")
    transposed = rotary.inputs[0] if rotary is not None else value
    swap = produced(transposed, "Transpose")
    split = (
        produced(swap.inputs[0], "Reshape") if swap is not None and _is_head_swap(swap) else None
    )
    if split is not None and produced(split.inputs[0], "RMSNormalization") is None:
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


def _projection(value: ir.Value) -> tuple[ir.Node, ir.Node | None] | None:
    """The linear placeholder behind ``[B, H, S, D]`` heads, and its rotary embedding if any."""
    rotary = produced(value, "RotaryEmbedding")
    swap = produced(rotary.inputs[0] if rotary is not None else value, "Transpose")
    split = (
        produced(swap.inputs[0], "Reshape") if swap is not None and _is_head_swap(swap) else None
    )
    linear = produced(split.inputs[0], "Linear") if split is not None else None
    return None if linear is None else (linear, rotary)


def linear_weights(linear: ir.Node, weights: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a linear placeholder."""
    name = str(given(linear.inputs[1]).name)
    weight = weights[name] if name in weights else value_of(linear.inputs[1])
    has_bias = len(linear.inputs) > 2 and linear.inputs[2] is not None
    return weight, value_of(linear.inputs[2]) if has_bias else None


class RotaryTables:
    """Cosine and sine by position, ``[max_length, D / 2]``, computed from the graph itself."""

    def __init__(self, b: Builder, max_length: int, head_dim: int) -> None:
        self.b, self.max_length, self.half = b, max_length, head_dim // 2
        self.made: dict[tuple[str, str], tuple[Any, Any] | None] = {}

    def of(self, rotary: ir.Node) -> tuple[Any, Any] | None:
        """Tables for a rotary embedding without positions of its own; None where too large."""
        cos, sin = given(rotary.inputs[1]), given(rotary.inputs[2])
        key = (str(cos.name), str(sin.name))
        if key not in self.made:
            self.made[key] = self._make(cos, sin)
        return self.made[key]

    def _make(self, cos: ir.Value, sin: ir.Value) -> tuple[Any, Any] | None:
        if 8 * self.half * self.max_length > _MAX_TABLE_BYTES:
            return None
        tables = self._run(cos, sin)
        if tables is None or any(t.shape != (self.max_length, self.half) for t in tables):
            return None
        index = len(self.made)
        return (
            self.b.const(f"carve_cos{index}", tables[0]),
            self.b.const(f"carve_sin{index}", tables[1]),
        )

    def _run(self, cos: ir.Value, sin: ir.Value) -> list[np.ndarray] | None:
        """Evaluate the tables for all positions; None where more than positions decide them."""
        nodes: list[ir.Node] = []
        constants: dict[str, np.ndarray] = {}
        inputs: set[str] = set()

        def visit(value: ir.Value | None) -> None:
            if value is None:
                return
            node = value.producer()
            if node is not None:
                if node not in nodes:
                    for i in node.inputs:
                        visit(i)
                    nodes.append(node)
            elif value.const_value is not None:
                constants[str(value.name)] = value.const_value.numpy()
            else:
                inputs.add(str(value.name))

        visit(cos)
        visit(sin)
        if inputs != {"position_ids"}:
            return None
        import onnxruntime as ort  # type: ignore[import-untyped]

        graph = onnx.helper.make_graph(
            [ir.serde.serialize_node(n) for n in nodes],
            "rotary",
            [onnx.helper.make_tensor_value_info("position_ids", onnx.TensorProto.INT64, [1, None])],
            [
                onnx.helper.make_tensor_value_info(str(v.name), onnx.TensorProto.FLOAT, None)
                for v in (cos, sin)
            ],
            [onnx.numpy_helper.from_array(v, k) for k, v in constants.items()],
        )
        opsets = [onnx.helper.make_opsetid(k, v) for k, v in self.b.graph.opset_imports.items()]
        model = onnx.helper.make_model(
            graph, opset_imports=[o for o in opsets if o.domain in ("", CONTRIB)], ir_version=10
        )
        session = ort.InferenceSession(
            model.SerializeToString(), providers=["CPUExecutionProvider"]
        )
        position = np.arange(self.max_length, dtype=np.int64)[None]
        return [t[0] for t in session.run(None, {"position_ids": position})]


def _separable(node: ir.Node, tables: RotaryTables) -> tuple[list[ir.Node], tuple[Any, Any]] | None:
    """The linears of query, key and value, and cosines and sines to rotate inside the operator.

    None where they do not come from linears of one input with one rotary embedding.
    """
    found = [_projection(given(v)) for v in node.inputs[:3]]
    if any(f is None for f in found):
        return None
    (q, q_rotary), (k, k_rotary), (v, v_rotary) = (f for f in found if f is not None)
    if q_rotary is None or k_rotary is None or v_rotary is not None:
        return None
    if not (q.inputs[0] is k.inputs[0] is v.inputs[0]):
        return None
    plain = all(
        len(r.inputs) == 3
        and list(r.inputs[1:]) == list(q_rotary.inputs[1:])
        and not (r.attributes["interleaved"].as_int() if "interleaved" in r.attributes else 0)
        and not (
            r.attributes["rotary_embedding_dim"].as_int()
            if "rotary_embedding_dim" in r.attributes
            else 0
        )
        for r in (q_rotary, k_rotary)
    )
    rotation = tables.of(q_rotary) if plain else None
    return None if rotation is None else ([q, k, v], rotation)


def _pack(
    b: Builder, node: ir.Node, weights: dict[str, Tensor], tables: RotaryTables
) -> _Inputs | None:
    """One product for query, key and value with the rotation left to the operator, if it can."""
    found = _separable(node, tables)
    if found is None:
        return None
    linears, rotation = found
    packed = _product(b, node, linears, weights, "qkv")
    return None if packed is None else _Inputs(packed, None, None, rotation)


def _product(
    b: Builder, node: ir.Node, linears: list[ir.Node], weights: dict[str, Tensor], name: str
) -> Any:
    """Linears of one input as one product; None where they differ in width or in having a bias."""
    pairs = [linear_weights(n, weights) for n in linears]
    biases = [bias for _, bias in pairs if bias is not None]
    if len(biases) not in (0, len(linears)):
        return None
    matrices = [w for w, _ in pairs]
    if not b.alike(matrices):
        return None
    path = linear_name(linears[0]).rpartition(".")[0] + f".{name}"
    bias = torch.cat(biases) if biases else None
    return b.linear(node, given(linears[0].inputs[0]), path, matrices, bias)


def _gated_inputs(
    b: Builder, node: ir.Node, weights: dict[str, Tensor], tables: RotaryTables, rows: Rows
) -> _Inputs | None:
    """Keys and values of all tokens, queries of the running ones, if they come from linears."""
    found = _separable(node, tables)
    if found is None:
        return None
    (q, k, v), rotation = found
    joint = _product(b, node, [k, v], weights, "kv")
    if joint is None:
        return None
    weight, bias = linear_weights(q, weights)
    query = b.linear(node, rows.x, linear_name(q), weight, bias)
    key, value = b.op(node, "Split", [joint], outputs=2, axis=-1, num_outputs=2)
    return _Inputs(rows.spread(node, query, len(weight)), key, value, rotation)


def linear_name(node: ir.Node, weight: int = 1) -> str:
    """Module path of a linear placeholder, from the name of its input ``weight``."""
    name = str(given(node.inputs[weight]).name)
    plain = name.removesuffix("/weight").removesuffix("/quantized").removeprefix("model/")
    return plain.replace("/", ".")


def lower_attention(
    b: Builder,
    node: ir.Node,
    lengths: Lengths,
    heads: Heads,
    weights: dict[str, Tensor],
    tables: RotaryTables,
    rows: Rows | None = None,
) -> ir.Node:
    """The dialect's attention as ``GroupQueryAttention``: past and present may share a buffer.

    With ``rows`` a gate stands before it: only these tokens' queries are computed, where queries
    come from a linear of their own input.
    """
    q, k, v, past_key, past_value = (given(i) for i in node.inputs)
    window = node.attributes["window"].as_int()
    if rows is None:
        made = _pack(b, node, weights, tables)
    else:
        made = _gated_inputs(b, node, weights, tables, rows)
    if made is not None:
        inputs: list[Any] = [made.query, made.key, made.value]
    else:
        inputs = [
            _flat_heads(b, node, q, heads.query, heads.width),
            _flat_heads(b, node, k, heads.key_value, heads.width),
            _flat_heads(b, node, v, heads.key_value, heads.width),
        ]
        if rows is not None:
            inputs[0] = rows.tie(node, inputs[0])
    inputs += [past_key, past_value, lengths.last, lengths.total]
    if made is not None:
        inputs += [*made.rotation]
    out, key, value = b.op(
        node,
        "GroupQueryAttention",
        inputs,
        outputs=3,
        domain=CONTRIB,
        num_heads=heads.query,
        kv_num_heads=heads.key_value,
        scale=node.attributes["scale"].as_float(),
        softcap=node.attributes["softcap"].as_float(),
        local_window_size=window if window > 0 else -1,
        do_rotary=int(made is not None),
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
                    replace_uses(r.outputs[0], out)
    shape = b.const(f"carve_heads{heads.query}", np.array([0, 0, heads.query, heads.width]))
    four = b.op(node, "Reshape", [out, shape])
    four = b.op(node, "Transpose", [four], perm=[0, 2, 1, 3])
    replace(node, [four, key, value])
    operator: ir.Node = key.producer()
    return operator


def attention_lengths(b: Builder, model: ir.Model, at: ir.Node) -> Lengths:
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
    return Lengths(last, b.op(at, "Cast", [size], to=ir.DataType.INT32))
