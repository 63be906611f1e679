"""The ONNX back end: a program to a model that stock onnxruntime runs.

``torch.onnx`` translates the graph with dialect operators and linears left as placeholder nodes of
the ``carve`` domain and weights left out; `lower` then replaces each placeholder with what
onnxruntime runs best at the chosen width. Weights are made when the file is written, one tensor
at a time, so memory stays near one copy of the checkpoint.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx.defs import OpSchema
from onnx_ir.passes import common as onnx_passes
from onnxscript import values
from torch import Tensor, fx, nn

from carve.emit import pack
from carve.errors import CarveError, UserError
from carve.match import get_tensor
from carve.program import Program, RoutedFFN

log = logging.getLogger(__name__)
OPSET = 23
_CONTRIB = "com.microsoft"
_LINEAR_OP = torch.ops.aten.linear.default
_EMBEDDING_OP = torch.ops.aten.embedding.default


def _schema(name: str, inputs: list[str], outputs: int, attributes: dict[str, Any]) -> values.Op:
    """A placeholder operator; inputs that end in ``?`` may be left out."""
    option = OpSchema.FormalParameterOption
    schema = OpSchema(
        name,
        "carve",
        1,
        inputs=[
            OpSchema.FormalParameter(
                n.rstrip("?"), "T", param_option=option.Optional if n[-1] == "?" else option.Single
            )
            for n in inputs
        ],
        outputs=[OpSchema.FormalParameter(f"y{i}", "T") for i in range(outputs)],
        type_constraints=[("T", ["tensor(float)"], "")],
        attributes=[OpSchema.Attribute(k, v, "", required=True) for k, v in attributes.items()],
    )
    return values.Op(values.Opset("carve", 1), name, schema)


_LINEAR = _schema("Linear", ["x", "weight", "bias?"], 1, {})
_SITE = _schema("RoutedFFN", ["x"], 1, {"site": OpSchema.AttrType.INT})
_ATTENTION = _schema(
    "Attention",
    ["query", "key", "value", "past_key", "past_value"],
    3,
    {
        "scale": OpSchema.AttrType.FLOAT,
        "window": OpSchema.AttrType.INT,
        "softcap": OpSchema.AttrType.FLOAT,
    },
)

_LIB = torch.library.Library("carve_emit", "DEF")
_LIB.define("site(Tensor x, int site) -> Tensor")
_LIB.impl("site", lambda x, site: torch.empty_like(x), "CompositeExplicitAutograd")
torch.library.register_fake("carve_emit::site")(lambda x, site: torch.empty_like(x))
_SITE_OP = torch.ops.carve_emit.site.default


def _translate_linear(x: Any, weight: Any, bias: Any = None) -> Any:
    return _LINEAR(x, weight) if bias is None else _LINEAR(x, weight, bias)


def _translate_attention(q: Any, k: Any, v: Any, pk: Any, pv: Any, scale: float, window: int, softcap: float) -> Any:
    return _ATTENTION(q, k, v, pk, pv, scale=scale, window=window, softcap=softcap)


def _translate_site(x: Any, site: int) -> Any:
    return _SITE(x, site=site)


def _stand_in(program: Program) -> tuple[fx.GraphModule, dict[str, Tensor]]:
    """The program's graph with placeholders for routed FFNs and for large weights.

    A weight that only linears and embedding look-ups read becomes an fp32 stand-in without memory,
    filled with a number of its own so that nothing downstream takes two of them for the same.
    Every other tensor keeps its values, for constants may be folded.
    """
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    by_output = {s.output: i for i, s in enumerate(program.sites) if s.routed is not None}
    for n in program.module.graph.nodes:
        if n in by_output:
            env[n] = graph.call_function(_SITE_OP, (env[n.args[0]], by_output[n]))
            env[n].meta = dict(n.meta)
        else:
            env[n] = graph.node_copy(n, env.__getitem__)
    graph.eliminate_dead_code()
    weights: dict[str, Tensor] = {}
    root = nn.Module()
    for n in list(graph.find_nodes(op="get_attr")):
        value = get_tensor(program.module, n)
        if value is None:
            raise CarveError("emit", f"{n.target}: an attribute that is no tensor")
        original, n.target = str(n.target), str(n.target).replace(".", "/")
        if hasattr(root, n.target):
            continue
        users = [u for m in graph.find_nodes(op="get_attr") if str(m.target) in (original, n.target) for u in m.users]
        plain = value.ndim == 2 and all(
            (u.target is _LINEAR_OP and u.args[0] is not n and len(u.args) > 1) or u.target is _EMBEDDING_OP
            for u in users
        )
        if not plain:
            dtype = torch.float32 if value.dtype.is_floating_point else value.dtype
            root.register_buffer(n.target, value.detach().to(dtype))
            continue
        filler = torch.full((), 1e-3 * (len(weights) + 1)).expand(value.shape)
        weights[n.target] = value.detach()
        root.register_parameter(n.target, nn.Parameter(filler, requires_grad=False))
    return fx.GraphModule(root, graph), weights


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporters' own logs and warnings are about steps that a user cannot act on."""
    loggers = [logging.getLogger(n) for n in ("torch.onnx", "onnx_ir", "onnxscript")]
    levels = [x.level for x in loggers]
    for x in loggers:
        x.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for x, level in zip(loggers, levels, strict=True):
            x.setLevel(level)


def skeleton(program: Program) -> tuple[ir.Model, dict[str, Tensor]]:
    """Translate to ONNX with placeholder nodes; give back the weights by initializer name."""
    module, weights = _stand_in(program)
    try:
        with _quiet(), torch.no_grad():
            exported = torch.export.export(
                module, program.example, dynamic_shapes=program.dynamic, strict=False
            )
            result = torch.onnx.export(
                exported,
                dynamo=True,
                opset_version=OPSET,
                custom_translation_table={
                    _LINEAR_OP: _translate_linear,
                    torch.ops.carve.attention.default: _translate_attention,
                    _SITE_OP: _translate_site,
                },
                input_names=program.inputs,
                output_names=program.outputs,
                optimize=True,
                verbose=False,
            )
    except Exception as e:
        raise CarveError("emit", f"torch.onnx could not translate the program: {str(e)[:400]}") from e
    if result is None:
        raise CarveError("emit", "torch.onnx gave no program")
    return result.model, weights


@dataclass
class Emitted:
    """What `emit` wrote and what a runtime has to know about it."""

    path: Path
    bits: int
    shared_cache: bool


class _Builder:
    """Appends nodes before a node of the graph and keeps new initializers."""

    def __init__(self, model: ir.Model, bits: int) -> None:
        self.graph, self.bits = model.graph, bits
        self.count = 0

    def op(
        self,
        before: ir.Node,
        kind: str,
        inputs: list[ir.Value | None],
        *,
        outputs: int = 1,
        domain: str = "",
        **attributes: Any,
    ) -> Any:
        """One node inserted before ``before``; its value, or its values when there are several."""
        self.count += 1
        node = ir.Node(
            domain,
            kind,
            inputs,
            ir.convenience.convert_attributes(attributes),
            num_outputs=outputs,
            name=f"carve_{kind}_{self.count}",
        )
        for i, v in enumerate(node.outputs):
            v.name = f"carve_{kind}_{self.count}_{i}"
        before.prepend(node)
        return node.outputs[0] if outputs == 1 else node.outputs

    def tensor(self, name: str, make: Callable[[], np.ndarray], shape: tuple[int, ...], dtype: ir.DataType) -> ir.Value:
        """An initializer whose content is made when it is written."""
        if name in self.graph.initializers:
            return self.graph.initializers[name]
        lazy = ir.LazyTensor(
            lambda: ir.Tensor(np.ascontiguousarray(make()), name=name),
            dtype=dtype,
            shape=ir.Shape(shape),
            name=name,
        )
        value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype), const_value=lazy)
        self.graph.register_initializer(value)
        return value

    def const(self, name: str, array: np.ndarray) -> ir.Value:
        """A small initializer."""
        dtype = ir.DataType.from_numpy(array.dtype)
        return self.tensor(name, lambda: array, array.shape, dtype)

    def float_tensor(self, name: str, value: Tensor) -> ir.Value:
        """An fp32 initializer with the content of ``value``."""
        return self.tensor(
            name, lambda: value.float().contiguous().numpy(), tuple(value.shape), ir.DataType.FLOAT
        )

    def quantized(self, name: str, make: Callable[[], Tensor], shape: tuple[int, ...], *, blocked: bool) -> tuple[ir.Value, ir.Value]:
        """Levels and scales of a weight ``[..., N, K]``; ``blocked`` adds an axis for the blocks."""
        *rows, k = shape
        blocks, width = k // pack.BLOCK, pack.BLOCK * self.bits // 8
        store: dict[int, np.ndarray] = {}

        def part(which: int) -> np.ndarray:
            # Both tensors come from one quantization; each is taken once, then forgotten.
            if which not in store:
                levels, scale = pack.quantize(make(), self.bits)
                packed = pack.pack(levels, self.bits)
                store[0] = packed.reshape(*rows, blocks, width) if blocked else packed
                store[1] = scale.numpy()
            return store.pop(which)

        last = (blocks, width) if blocked else (blocks * width,)
        levels = self.tensor(f"{name}.q{self.bits}", lambda: part(0), (*rows, *last), ir.DataType.UINT8)
        scales = self.tensor(f"{name}.scales", lambda: part(1), (*rows, blocks), ir.DataType.FLOAT)
        return levels, scales

    def linear(self, before: ir.Node, x: ir.Value, name: str, weight: Tensor, bias: Tensor | None) -> Any:
        """``x @ weight.T + bias`` at the model's width."""
        n, k = weight.shape
        if self.bits < 16 and k % pack.BLOCK == 0:
            b, s = self.quantized(name, lambda: weight, (n, k), blocked=True)
            y = self.op(
                before,
                "MatMulNBits",
                [x, b, s],
                domain=_CONTRIB,
                K=k,
                N=n,
                bits=self.bits,
                block_size=pack.BLOCK,
                accuracy_level=4,
            )
        else:
            w = self.tensor(
                f"{name}.t", lambda: weight.float().t().contiguous().numpy(), (k, n), ir.DataType.FLOAT
            )
            y = self.op(before, "MatMul", [x, w])
        if bias is not None:
            y = self.op(before, "Add", [y, self.float_tensor(f"{name}.bias", bias)])
        return y

    def activate(self, before: ir.Node, x: Any, name: str) -> Any:
        """An activation by its name in the dialect.

        Raises:
            CarveError: ONNX has no short form of it here.
        """
        plain = {
            "gelu": ("Gelu", "", {}),
            "gelu_tanh": ("Gelu", "", {"approximate": "tanh"}),
            "relu": ("Relu", "", {}),
            "elu": ("Elu", "", {}),
            "leaky_relu": ("LeakyRelu", "", {}),
            "mish": ("Mish", "", {}),
            "softplus": ("Softplus", "", {}),
            "hardswish": ("HardSwish", "", {}),
            "sigmoid": ("Sigmoid", "", {}),
            "tanh": ("Tanh", "", {}),
            "silu": ("QuickGelu", _CONTRIB, {"alpha": 1.0}),
            "quick_gelu": ("QuickGelu", _CONTRIB, {"alpha": 1.702}),
        }
        if name == "identity":
            return x
        if name == "relu2":
            y = self.op(before, "Relu", [x])
            return self.op(before, "Mul", [y, y])
        if name == "relu6":
            low = self.const("carve_zero", np.float32(0.0).reshape(()))
            high = self.const("carve_six", np.float32(6.0).reshape(()))
            return self.op(before, "Clip", [x, low, high])
        if name not in plain:
            raise CarveError("emit", f"activation {name} has no ONNX form")
        kind, domain, attributes = plain[name]
        return self.op(before, kind, [x], domain=domain, **attributes)


def _hidden(
    b: _Builder,
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


def _router(b: _Builder, at: ir.Node, x: Any, name: str, r: RoutedFFN) -> Any:
    """Router scores, always fp32."""

    def product(weight: Tensor, suffix: str) -> Any:
        w = b.tensor(
            f"{name}.{suffix}",
            lambda: weight.float().t().contiguous().numpy(),
            (weight.shape[1], weight.shape[0]),
            ir.DataType.FLOAT,
        )
        return b.op(at, "MatMul", [x, w])

    scores = product(r.router, "router")
    if r.router_bias is not None:
        scores = b.op(at, "Add", [scores, b.float_tensor(f"{name}.router_bias", r.router_bias)])
    if r.router_gate is not None:
        gate = b.activate(at, product(r.router_gate, "router_gate"), r.activation)
        scores = b.op(at, "Mul", [gate, scores])
    return scores


def _shared(b: _Builder, at: ir.Node, x: Any, name: str, r: RoutedFFN) -> Any:
    """The shared expert with the output bias, or None when there is neither."""
    if r.shared_up is None or r.shared_down is None:
        return None if r.output_bias is None else b.float_tensor(f"{name}.output_bias", r.output_bias)
    h = _hidden(b, at, x, f"{name}.shared", r.shared_gate, r.shared_gate_bias, r.shared_up, r.shared_up_bias, r.activation)
    return b.linear(at, h, f"{name}.shared.down", r.shared_down, r.output_bias)


def _fused_experts(b: _Builder, at: ir.Node, x: Any, scores: Any, name: str, r: RoutedFFN) -> Any:
    """The routed experts as one ``QMoE`` node; ``x`` is ``[n, d]``, every weight exactly 1."""
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
    one = ir.Tensor(np.ones(1, np.float32))
    ones = b.op(at, "ConstantOfShape", [b.op(at, "Shape", [scores])], value=one)
    inputs = [x, scores, w1, s1, first_bias, w2, s2, second_bias, *[None] * 6, ones]
    return b.op(
        at,
        "QMoE",
        inputs,
        domain=_CONTRIB,
        k=r.top_k,
        normalize_routing_weights=0,
        expert_weight_bits=b.bits,
        block_size=pack.BLOCK,
        accuracy_level=4,
        **attributes,
    )


def _grouped_experts(b: _Builder, at: ir.Node, x: Any, scores: Any, y: Any, name: str, r: RoutedFFN) -> Any:
    """Each expert on the rows that chose it, added to ``y`` ``[n, d]``.

    Products of zero rows cost next to nothing, so the work follows the active share for any
    number of tokens, any activation and any width.
    """
    _, index = b.op(at, "TopK", [scores, b.const(f"carve_k{r.top_k}", np.array([r.top_k]))], outputs=2)
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
    known = r.activation == "silu" if r.expert_gate is not None else r.activation in ("silu", "relu")
    return bits < 16 and known and all(w % pack.BLOCK == 0 for w in widths)


def _lower_routed(b: _Builder, node: ir.Node, name: str, r: RoutedFFN) -> None:
    d = r.expert_up.shape[-1]
    x = node.inputs[0]
    flat = b.op(node, "Reshape", [x, b.const(f"carve_rows{d}", np.array([-1, d]))])
    shared = _shared(b, node, flat, name, r)
    scores = _router(b, node, flat, name, r)
    if _fusable(r, b.bits):
        y = _fused_experts(b, node, flat, scores, name, r)
        y = y if shared is None else b.op(node, "Add", [shared, y])
    else:
        if shared is None or r.shared_up is None:
            blank = b.const("carve_zero", np.float32(0.0)) if shared is None else shared
            shared = b.op(node, "Expand", [blank, b.op(node, "Shape", [flat])])
        y = _grouped_experts(b, node, flat, scores, shared, name, r)
    _replace(node, [b.op(node, "Reshape", [y, b.op(node, "Shape", [x])])])


def _replace(node: ir.Node, new: list[Any]) -> None:
    """Put ``new`` in place of the node's results, graph outputs too, and drop the node."""
    graph = node.graph
    if not isinstance(graph, ir.Graph):
        raise CarveError("emit", f"{node.name} stands in no graph")
    for old, value in zip(node.outputs, new, strict=True):
        value.shape, value.dtype = old.shape, old.dtype
        if old.is_graph_output():
            value.name, old.name = old.name, f"{old.name}_replaced"
        ir.convenience.replace_all_uses_with(old, value, replace_graph_outputs=True)
    graph.remove(node, safe=True)


def _produced(value: ir.Value | None, kind: str) -> ir.Node | None:
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == kind else None


def _is_head_swap(node: ir.Node | None) -> bool:
    return node is not None and list(node.attributes["perm"].as_ints()) == [0, 2, 1, 3]


def _flat_heads(b: _Builder, at: ir.Node, value: ir.Value, heads: int, width: int) -> Any:
    """``[B, H, S, D]`` as ``[B, S, H * D]``, without a transpose where the graph made one from it.

    The usual chain ``Reshape, Transpose[, RotaryEmbedding]`` on a linear's ``[B, S, H * D]`` is
    undone by rotating that tensor as it is.
    """
    rotary = _produced(value, "RotaryEmbedding")
    transposed = rotary.inputs[0] if rotary is not None else value
    swap = _produced(transposed, "Transpose")
    split = _produced(swap.inputs[0], "Reshape") if swap is not None and _is_head_swap(swap) else None
    if split is not None and _produced(split.inputs[0], "RMSNormalization") is None:
        flat = split.inputs[0]
        if rotary is None:
            return flat
        keep = {k: a.value for k, a in rotary.attributes.items()}
        return b.op(at, "RotaryEmbedding", [flat, *rotary.inputs[1:]], **{**keep, "num_heads": heads})
    if swap is not None and _is_head_swap(swap) and rotary is None:
        source: Any = swap.inputs[0]
    else:
        source = b.op(at, "Transpose", [value], perm=[0, 2, 1, 3])
    shape = b.const(f"carve_flat{heads * width}", np.array([0, 0, heads * width]))
    return b.op(at, "Reshape", [source, shape])


def _lower_attention(b: _Builder, node: ir.Node, lengths: tuple[Any, Any], heads: int, kv: int, width: int) -> None:
    """The dialect's attention as ``GroupQueryAttention``: past and present may share a buffer."""
    q, k, v, past_key, past_value = node.inputs
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
        domain=_CONTRIB,
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
            if all(r.op_type == "Reshape" and r.outputs[0].shape and len(r.outputs[0].shape) == 3 for r in reshapes):
                for r in reshapes:
                    _replace_uses(r.outputs[0], out)
    four = b.op(node, "Reshape", [out, b.const(f"carve_heads{heads}", np.array([0, 0, heads, width]))])
    four = b.op(node, "Transpose", [four], perm=[0, 2, 1, 3])
    _replace(node, [four, key, value])


def _replace_uses(old: ir.Value, new: ir.Value) -> None:
    new.shape, new.dtype = old.shape, old.dtype
    ir.convenience.replace_all_uses_with(old, new)


def _attention_lengths(b: _Builder, model: ir.Model, at: ir.Node) -> tuple[Any, Any]:
    """``seqlens_k`` and ``total_sequence_length`` from a new input ``attention_mask`` ``[B, P + S]``."""
    mask = ir.Value(
        name="attention_mask", shape=ir.Shape(["batch", "total"]), type=ir.TensorType(ir.DataType.INT64)
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
    b = _Builder(model, bits)
    nodes = [n for n in graph if n.domain == "carve"]
    lengths: tuple[Any, Any] | None = None
    for node in nodes:
        if node.op_type == "Linear":
            name = str(node.inputs[1].name)
            bias = _value_of(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] else None
            weight = weights[name] if name in weights else _value_of(node.inputs[1])
            short = name.removesuffix("/weight").removeprefix("model/").replace("/", ".")
            _replace(node, [b.linear(node, node.inputs[0], short, weight, bias)])
        elif node.op_type == "RoutedFFN":
            site = program.sites[node.attributes["site"].as_int()]
            if site.routed is None:
                raise CarveError("emit", f"{site.name}: a routed placeholder without routed weights")
            _lower_routed(b, node, site.name, site.routed)
        elif node.op_type == "Attention":
            if lengths is None:
                lengths = _attention_lengths(b, model, graph[0])
            kv, width = program.example[2].shape[1], program.example[2].shape[3]
            heads = int(node.inputs[0].shape[1])
            _lower_attention(b, node, lengths, heads, kv, width)
        else:
            raise CarveError("emit", f"no lowering for {node.op_type}")
    onnx_passes.CommonSubexpressionEliminationPass()(model)
    onnx_passes.RemoveUnusedNodesPass()(model)
    for name, value in graph.initializers.items():
        if name in weights:
            real = weights[name]
            value.const_value = ir.LazyTensor(
                lambda real=real, name=name: ir.Tensor(real.float().numpy(), name=name),
                dtype=ir.DataType.FLOAT,
                shape=ir.Shape(tuple(real.shape)),
                name=name,
            )
    model.opset_imports[_CONTRIB] = 1
    model.opset_imports.pop("carve", None)
    model.producer_name = "carve"


def _value_of(value: ir.Value | None) -> Tensor:
    if value is None or value.const_value is None:
        raise CarveError("emit", "a linear with a weight that is not stored")
    return torch.from_numpy(np.array(value.const_value.numpy()))


def emit(program: Program, path: Path, bits: int) -> Emitted:
    """Write ``path`` (and ``path`` + ``.data``) for onnxruntime.

    Args:
        program: dense or routed.
        path: the model file; its folder has to exist.
        bits: 4 or 8 for block-wise weights, 16 or more for fp32.

    Raises:
        UserError: an unknown width.
        CarveError: an operator has no translation.
    """
    if bits not in (4, 8, 16, 32):
        raise UserError("bits", f"--bits {bits} is not one of 16, 8, 4", "try --bits 4")
    with _quiet():
        model, weights = skeleton(program)
        lower(model, weights, program, bits)
        model.graph.name = "carve"
        onnx_passes.TopologicalSortPass()(model)
        model.ir_version = min(model.ir_version or 10, 11)
        ir.save(model, str(path), external_data=path.name + ".data", size_threshold_bytes=256)
    proto = onnx.load(str(path), load_external_data=False)
    shared = any(n.op_type == "GroupQueryAttention" for n in proto.graph.node)
    return Emitted(path, bits, shared)
