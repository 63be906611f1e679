"""The graph as ONNX with placeholders where a lowering has a choice, and without large weights."""

from __future__ import annotations

import hashlib
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import onnx_ir as ir
import torch
from onnx.defs import OpSchema
from onnxscript import values
from torch import Tensor, fx, nn

from carve.errors import CarveError
from carve.match import get_tensor
from carve.program import Program

OPSET = 23
DOMAIN = "carve"
_LINEAR_OP = torch.ops.aten.linear.default
_EMBEDDING_OP = torch.ops.aten.embedding.default


def _schema(name: str, inputs: list[str], outputs: int, attributes: dict[str, Any]) -> values.Op:
    """A placeholder operator; inputs that end in ``?`` may be left out."""
    option = OpSchema.FormalParameterOption
    schema = OpSchema(
        name,
        DOMAIN,
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
    return values.Op(values.Opset(DOMAIN, 1), name, schema)


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

_GATED = _schema("Gated", ["y", "x"], 1, {"block": OpSchema.AttrType.INT})

_LIB = torch.library.Library("carve_emit", "DEF")
_LIB.define("site(Tensor x, int site) -> Tensor")
_LIB.impl("site", lambda x, site: torch.empty_like(x), "CompositeExplicitAutograd")
torch.library.register_fake("carve_emit::site")(lambda x, site: torch.empty_like(x))
_SITE_OP = torch.ops.carve_emit.site.default
_LIB.define("gate(Tensor y, Tensor x, int block) -> Tensor")
_LIB.impl("gate", lambda y, x, block: torch.empty_like(y), "CompositeExplicitAutograd")
torch.library.register_fake("carve_emit::gate")(lambda y, x, block: torch.empty_like(y))
_GATE_OP = torch.ops.carve_emit.gate.default


def _translate_linear(x: Any, weight: Any, bias: Any = None) -> Any:
    return _LINEAR(x, weight) if bias is None else _LINEAR(x, weight, bias)


def _translate_attention(
    q: Any, k: Any, v: Any, pk: Any, pv: Any, scale: float, window: int, softcap: float
) -> Any:
    return _ATTENTION(q, k, v, pk, pv, scale=scale, window=window, softcap=softcap)


def _translate_site(x: Any, site: int) -> Any:
    return _SITE(x, site=site)


def _translate_gate(y: Any, x: Any, block: int) -> Any:
    return _GATED(y, x, block=block)


def _stand_in(program: Program) -> tuple[fx.GraphModule, dict[str, Tensor]]:
    """The program's graph with placeholders for routed FFNs, gates and large weights.

    A weight that only linears and embedding look-ups read becomes an fp32 stand-in without memory,
    filled with a number of its own so that nothing downstream takes two of them for the same.
    Every other tensor keeps its values, for constants may be folded.
    """
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    by_output = {s.output: i for i, s in enumerate(program.sites) if s.routed is not None}
    by_gate = {b.gate_node: i for i, b in enumerate(program.blocks) if b.gate_node is not None}
    for n in program.module.graph.nodes:
        if n in by_output:
            env[n] = graph.call_function(_SITE_OP, (env[n.args[0]], by_output[n]))
            env[n].meta = dict(n.meta)
        elif n in by_gate:
            env[n] = graph.call_function(_GATE_OP, (env[n.args[0]], env[n.args[1]], by_gate[n]))
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
        users = [
            u
            for m in graph.find_nodes(op="get_attr")
            if str(m.target) in (original, n.target)
            for u in m.users
        ]
        plain = value.ndim == 2 and all(
            (u.target is _LINEAR_OP and u.args[0] is not n and len(u.args) > 1)
            or u.target is _EMBEDDING_OP
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
def quiet() -> Iterator[None]:
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


_KEPT: dict[str, ir.Model] = {}  # the one used last is the last
_MOST_KEPT = 8


def _key(module: fx.GraphModule, program: Program) -> str:
    """What a translation depends on: the graph, the tensors that keep their values, the inputs."""
    found = hashlib.sha256()
    for each in (module.graph, program.dynamic, program.inputs, program.outputs):
        found.update(str(each).encode())
    inputs = {str(i): t for i, t in enumerate(program.example)}
    kept = dict(module.named_buffers())
    for name, tensor in {**inputs, **kept, **dict(module.named_parameters())}.items():
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
    for tensor in kept.values():
        found.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def skeleton(program: Program) -> tuple[ir.Model, dict[str, Tensor]]:
    """Translate to ONNX with placeholder nodes; give back the weights by initializer name.

    Targets of one conversion, and the same model at other budgets and widths, have one translation:
    the last few are kept, without large weights, and copies given.
    """
    module, weights = _stand_in(program)
    key = _key(module, program)
    model = _KEPT.pop(key, None)
    if model is None:
        model = _translated(module, program)
    _KEPT[key] = model
    for old in list(_KEPT)[:-_MOST_KEPT]:
        _KEPT.pop(old, None)
    return model.clone(), weights


def _translated(module: fx.GraphModule, program: Program) -> ir.Model:
    """The graph as `torch.onnx` gives it."""
    try:
        with quiet(), torch.no_grad():
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
                    _GATE_OP: _translate_gate,
                },
                input_names=program.inputs,
                output_names=program.outputs,
                optimize=True,
                verbose=False,
            )
    except Exception as e:
        raise CarveError(
            "emit", f"torch.onnx could not translate the program: {str(e)[:400]}"
        ) from e
    if result is None:
        raise CarveError("emit", "torch.onnx gave no program")
    return result.model
