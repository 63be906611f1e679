"""The split back end: a trunk in segments and experts one by one, for small or several devices.

Segment ``l`` holds what runs between the experts of layer ``l - 1`` and those of layer ``l``:
attention, norms, router and shared expert. It gives ``x.l`` ``[n, d]``, the rows of the FFN's
input, and ``routes.l`` ``[n, E]``, 1 for the experts that a row takes; the next segment takes their
sum ``y.l``. Rows are those of the tokens that a skip gate lets through, if any. Where the experts
run, and in which process, the graphs do not know.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as onnx_passes

from carve.arithmetic import Precision
from carve.artifact import write_json
from carve.emit.builder import Builder
from carve.emit.experts import write_experts
from carve.emit.graph import given, replace
from carve.emit.lower import lower
from carve.emit.routed import positive, router_scores, shared_expert
from carve.emit.segments import cut, give_types, write_segments
from carve.emit.skeleton import DOMAIN, quiet, skeleton
from carve.errors import UserError
from carve.ffn import RoutedFFN
from carve.program import Program

INDEX = "index.json"
SCHEMA = 1
_MARKER = "Experts"


@dataclass(frozen=True)
class Predictor:
    """Scores of a layer's experts from the stream before its attention, see `carve.offload`.

    ``weight`` ``[E, d]`` and ``bias`` ``[E]`` fp32.
    """

    weight: np.ndarray
    bias: np.ndarray


@dataclass(frozen=True)
class SplitEmitted:
    """What `emit_split` wrote; ``sizes`` are an expert's bytes, by carved site and expert."""

    path: Path
    bits: int
    shared_cache: bool
    sizes: list[list[int]]


def check_split(program: Program) -> None:
    """Refuse what has no split form.

    Raises:
        UserError: nothing is carved.
    """
    if not program.carved:
        raise UserError(
            "target", "onnx-split needs routed FFNs, and none is carved", "lower the budget"
        )


def emit_split(
    program: Program,
    folder: Path,
    bits: int,
    hotness: Sequence[Sequence[float]],
    predictors: Mapping[int, Predictor],
) -> SplitEmitted:
    """Write the trunk's segments, ``experts.bin``, the experts' graphs and ``index.json``.

    Args:
        program: routed.
        folder: an empty folder.
        bits: as for `carve.emit.onnx.emit`.
        hotness: by carved site and expert, the share of tokens that chose it.
        predictors: by the number of the carved site; those that the graph has no stream for are
            left out.

    Raises:
        UserError: as `check_split`.
        CarveError: an operator has no translation, or the graph cannot be cut.
    """
    check_split(program)
    precision = Precision(program, bits)
    with quiet():
        model, weights = skeleton(program)
        lower(model, weights, program, precision, _leave_experts_out)
        model.opset_imports[DOMAIN] = 1
        onnx_passes.TopologicalSortPass()(model)
        model.ir_version = min(model.ir_version or 10, 11)
        give_types(model.graph)
        markers = [n for n in model.graph if n.domain == DOMAIN and n.op_type == _MARKER]
        model.opset_imports.pop(DOMAIN)
        order = [m.attributes["site"].as_string() for m in markers]
        by_name = {s.name: (i, s.routed) for i, s in enumerate(program.carved)}
        for k, m in enumerate(markers):
            for value, name in ((m.inputs[0], "x"), (m.inputs[1], "routes"), (m.outputs[0], "y")):
                given(value).name = f"{name}.{k}"
            r = by_name[order[k]][1]
            assert r is not None
            # Said, for onnxruntime does not follow the widths through its own operators.
            given(m.inputs[0]).shape = ir.Shape([None, int(r.expert_up.shape[-1])])
            given(m.inputs[1]).shape = ir.Shape([None, r.num_experts])
        streams = [_stream(m) for m in markers]
        segments = cut(model.graph, markers)
        names = write_segments(model, segments, folder)
    routed: list[RoutedFFN] = [by_name[n][1] for n in order]  # type: ignore[misc]
    number = [by_name[n][0] for n in order]
    layers = []
    blob = bytearray()
    for k, (name, r) in enumerate(zip(order, routed, strict=True)):
        entry: dict[str, Any] = {
            "name": name,
            "experts": r.num_experts,
            "top_k": r.top_k,
            "dynamic": r.dynamic,
            "width": int(r.expert_up.shape[-1]),
        }
        found = predictors.get(number[k])
        stream = streams[k - 1] if k else None
        if found is not None and stream is not None:
            entry["predictor"] = {"stream": stream, "offset": len(blob)}
            blob += found.weight.astype("<f4").tobytes() + found.bias.astype("<f4").tobytes()
        layers.append(entry)
    (folder / "predictors.bin").write_bytes(bytes(blob))
    heat = [hotness[i] for i in number]
    index = {
        "schema": SCHEMA,
        "segments": names,
        "outputs": [str(v.name) for v in model.graph.outputs],
        "layers": layers,
        "predictors": "predictors.bin",
        **write_experts(folder, routed, precision, heat),
    }
    write_json(folder / INDEX, index)
    shared = any(n.op_type == "GroupQueryAttention" for s in segments for n in s.nodes)
    sizes = [[0] * s.routed.num_experts for s in program.carved if s.routed is not None]
    for e in index["experts"]:
        sizes[number[e["layer"]]][e["expert"]] = index["forms"][e["form"]]["size"]
    return SplitEmitted(folder / INDEX, bits, shared, sizes)


def _leave_experts_out(
    b: Builder, node: ir.Node, name: str, r: RoutedFFN, rows: ir.Value | None
) -> None:
    """The FFN with a marker where its experts were; the sum keeps the whole model's order."""
    d = r.expert_up.shape[-1]
    x = node.inputs[0]
    flat = b.op(node, "Reshape", [x, b.const(f"carve_rows{d}", np.array([-1, d]))])
    scores = router_scores(b, node, flat, name, r)
    # Exactly k even where scores are equal, as the kernels take them.
    k = b.const(f"carve_k{r.top_k}", np.array([r.top_k]))
    _, index = b.op(node, "TopK", [scores, k], outputs=2)
    none = ir.Tensor(np.zeros(1, np.float32))
    blank = b.op(node, "ConstantOfShape", [b.op(node, "Shape", [scores])], value=none)
    one = b.const("carve_f1", np.ones((1, 1), np.float32))
    ones = b.op(node, "Expand", [one, b.op(node, "Shape", [index])])
    routes = b.op(node, "ScatterElements", [blank, index, ones], axis=1)
    if r.dynamic:
        routes = b.op(node, "Mul", [routes, positive(b, node, scores)])
    # Both are results of a segment, and a result cannot be an input of the model as it is.
    flat = b.op(node, "Identity", [flat])
    y = b.op(node, _MARKER, [flat, routes], domain=DOMAIN, site=name)
    y = b.op(node, "Reshape", [y, b.op(node, "Shape", [x])])
    shared = shared_expert(b, node, x, name, r)
    replace(node, [y if shared is None else b.op(node, "Add", [shared, y])])


def _stream(marker: ir.Node) -> list[str] | None:
    """The values that, added to the experts' sum, give the stream after this FFN.

    None where the graph has another form than ``residual + (shared + experts)``.
    """
    value, parts = marker.outputs[0], list[ir.Value]()
    while True:
        users = list(value.uses())
        if not users:
            return None
        user = users[0].node
        if user.op_type == "Reshape" and len(users) == 1:
            value = user.outputs[0]
            continue
        joined = user.op_type == "SkipSimplifiedLayerNormalization"
        if not joined and user.op_type != "Add":
            break
        other = next((v for v in user.inputs[:2] if v is not value), None)
        if other is None or other.const_value is not None or len(parts) == 2:
            return None
        parts.append(other)
        if joined:
            break
        value = user.outputs[0]
        if len(list(value.uses())) != 1:
            break
    return [str(v.name) for v in parts] or None
