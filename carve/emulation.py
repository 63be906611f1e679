"""Every quantized node of an emitted model beside the arithmetic that weights were fitted to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
import torch.nn.functional as F
from torch import Tensor

from carve.arithmetic import expert_kernel, product
from carve.emit.pack import unpack
from carve.errors import CarveError
from carve.grid import Grid

BOUND = 1e-5
"""Relative error of a token's result that the order of summation in fp32 explains."""
_TIE = 127 * 2**-22
"""How far fp32 leaves an activation over its scale, at most 127, from the edge that it lies on."""
_CPU = "CPUExecutionProvider"
_QUANTIZED = ("MatMulNBits", "QMoE")
_SCORES, _ROUTES = 1, 14
"""Inputs of a `QMoE`: ``router_probs`` and ``router_weights``."""
_FIRST, _SECOND = (2, 3, 4), (5, 6, 7)
"""Inputs of a `QMoE`: levels, scales and bias of ``fc1`` and of ``fc2``."""
Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class EmulationMetrics:
    """Relative error by token of each node on its own inputs.

    ``median``: the worst node's median over tokens; ``worst``: the largest of all; ``within``:
    share of tokens below `BOUND`. An activation that lies on the edge between two int8 levels falls
    on either side: inputs of a `MatMulNBits` are taken as the kernel took them, which its result
    shows; a hidden activation of an expert moves that token's result by a part of a level.
    """

    nodes: int
    median: float
    worst: float
    within: float


def check_nodes(path: Path, feeds: Arrays) -> EmulationMetrics:
    """Run the model with the inputs and result of every quantized node as results of its own.

    Nodes inside the branches of a gate cannot give results, and those of an expert that no token
    takes give none; they run alone on random inputs.

    Args:
        path: the emitted model; a copy of its graph is written beside it for the time of the run.
        feeds: inputs of the model.

    Raises:
        CarveError: a node's median error is not below `BOUND`, or more than a tenth of all tokens
            are beyond it.
    """
    errors: list[Tensor] = []
    names: list[str] = []
    for node, values in _observed(path, feeds):
        names.append(str(node.name))
        errors.append(_error(node, values))
    if not errors:
        return EmulationMetrics(0, 0.0, 0.0, 1.0)
    medians = torch.stack([e.median() for e in errors])
    every = torch.cat(errors)
    metrics = EmulationMetrics(
        len(errors),
        float(medians.max()),
        float(every.max()),
        float((every < BOUND).float().mean()),
    )
    # A NaN fails both comparisons.
    if not (metrics.median < BOUND and metrics.within >= 0.9):
        raise CarveError(
            "emulation",
            f"{names[int(medians.argmax())]} differs from the arithmetic that weights were fitted "
            f"to by {metrics.median:.2e} (median), {metrics.within:.1%} of tokens within {BOUND}",
            "this is a defect of carve, or another version of onnxruntime; please report it",
        )
    return metrics


def cuda_session(path: Path) -> Any:
    """An onnxruntime session on the first GPU where onnxruntime has one, else on the CPU."""
    import onnxruntime as ort  # type: ignore[import-untyped]

    found = ort.get_available_providers()
    return _session(path, [p for p in ("CUDAExecutionProvider", _CPU) if p in found])


def cpu_session(path: Path | bytes) -> Any:
    """An onnxruntime session on the CPU, for a file or a serialized model."""
    return _session(path, [_CPU])


def _session(path: Path | bytes, providers: list[str]) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    source = str(path) if isinstance(path, Path) else path
    return ort.InferenceSession(source, options, providers=providers)


def _moving(node: ir.Node) -> list[ir.Value]:
    """The inputs of a node that are no weights."""
    return [v for v in node.inputs if v is not None and v.const_value is None]


def _observed(path: Path, feeds: Arrays) -> Iterator[tuple[ir.Node, dict[str, np.ndarray]]]:
    """Every quantized node with its inputs and result by name."""
    model = ir.load(str(path))
    nodes = [n for n in model.graph.all_nodes() if n.op_type in _QUANTIZED]
    outer = [n for n in nodes if n.graph is model.graph]
    if not nodes:
        return
    wanted = {str(v.name): v for n in outer for v in (*_moving(n), *n.outputs)}
    given = {str(v.name) for v in model.graph.inputs}
    model.graph.outputs.clear()
    model.graph.outputs.extend(v for k, v in wanted.items() if k not in given)
    found = {**feeds, **(_results(model, path, feeds) if outer else {})}
    for node in nodes:
        seen = {}
        if node.graph is model.graph:
            seen = {str(v.name): found[str(v.name)] for v in (*_moving(node), *node.outputs)}
        # An expert that no token of these inputs takes has seen nothing.
        yield node, seen if seen and all(v.size for v in seen.values()) else _alone(node)


def _results(model: ir.Model, path: Path, feeds: Arrays) -> dict[str, np.ndarray]:
    """What the graph's results are; its weights stay in the file beside ``path``."""
    probe = path.with_name(f".{path.name}.probe")
    try:
        ir.save(model, str(probe))
        session = cpu_session(probe)
        asked = [o.name for o in session.get_outputs()]
        accepted = {i.name for i in session.get_inputs()}
        results = session.run(asked, {k: v for k, v in feeds.items() if k in accepted})
    finally:
        probe.unlink(missing_ok=True)
    return dict(zip(asked, results, strict=True))


def _alone(node: ir.Node) -> dict[str, np.ndarray]:
    """A node's result on random inputs, as a model of its own."""
    generator = np.random.default_rng(0)
    rows, width = 8, _columns(node)
    feeds = {str(node.inputs[0].name): generator.standard_normal((rows, width), np.float32)}  # type: ignore[union-attr]
    if node.op_type == "QMoE":
        experts = _array(node.inputs[_FIRST[0]]).shape[0]
        scores, routes = (str(node.inputs[i].name) for i in (_SCORES, _ROUTES))  # type: ignore[union-attr]
        feeds[scores] = generator.standard_normal((rows, experts), np.float32)
        feeds[routes] = (feeds[scores] > 0).astype(np.float32)
    real = ir.TensorType(ir.DataType.FLOAT)
    inputs = {k: ir.Value(name=k, shape=ir.Shape(v.shape), type=real) for k, v in feeds.items()}
    weights = {
        str(v.name): ir.Value(
            name=v.name,
            shape=ir.Shape(v.const_value.numpy().shape),
            type=ir.TensorType(v.const_value.dtype),
            const_value=ir.Tensor(v.const_value.numpy(), name=v.name),
        )
        for v in node.inputs
        if v is not None and v.const_value is not None
    }
    known = {**inputs, **weights}
    copy = ir.Node(
        node.domain,
        node.op_type,
        [None if v is None else known[str(v.name)] for v in node.inputs],
        list(node.attributes.values()),
        num_outputs=1,
    )
    result = str(node.outputs[0].name)
    copy.outputs[0].name = result
    graph = ir.Graph(
        list(inputs.values()),
        copy.outputs,
        nodes=[copy],
        initializers=list(weights.values()),
        opset_imports={"": 21, node.domain: 1},
        name="one",
    )
    model = ir.serde.serialize_model(ir.Model(graph, ir_version=10)).SerializeToString()
    return {**feeds, result: cpu_session(model).run(None, feeds)[0]}


def _columns(node: ir.Node) -> int:
    if node.op_type == "MatMulNBits":
        return node.attributes["K"].as_int()
    bits = node.attributes["expert_weight_bits"].as_int()
    return int(_array(node.inputs[_FIRST[0]]).shape[-1]) * 8 // bits


def _array(value: ir.Value | None) -> np.ndarray:
    assert value is not None
    assert value.const_value is not None
    return np.array(value.const_value.numpy())  # torch wants an array of its own


def _error(node: ir.Node, values: Arrays) -> Tensor:
    """Relative error by token of a node's result."""
    have = torch.from_numpy(values[str(node.outputs[0].name)])
    have = have.reshape(-1, have.shape[-1])
    x = torch.from_numpy(values[str(node.inputs[0].name)])  # type: ignore[union-attr]
    x = x.reshape(-1, x.shape[-1])
    want = _matmul(node, x, have) if node.op_type == "MatMulNBits" else _experts(node, x, values)
    # A token of which no expert is on has nothing to be relative to.
    size = want.norm(dim=1)
    error: Tensor = (have - want).norm(dim=1) / size.clamp_min(1e-6 * float(size.max()) + 1e-30)
    return error


def _matmul(node: ir.Node, x: Tensor, have: Tensor) -> Tensor:
    bits, block = (node.attributes[k].as_int() for k in ("bits", "block_size"))
    grid = Grid(bits, torch.from_numpy(_array(node.inputs[2])), block)
    weight = grid.values(unpack(_array(node.inputs[1]), bits).flatten(1))
    want = product(x, weight, grid)
    for t, (step, missing) in enumerate(zip(_other_side(x, block), have - want, strict=True)):
        tied = step.nonzero().squeeze(1)
        if len(tied):
            moves = weight[:, tied] * step[tied]
            taken = torch.linalg.lstsq(moves, missing[:, None]).solution.round().clamp(0, 1)
            want[t] += (moves @ taken).squeeze(1)
    return want


def _other_side(x: Tensor, block: int) -> Tensor:
    """What rounding an activation to the other level adds to it; 0 where it lies on no edge.

    Embeddings on a grid of 8 bits whose largest is -128 lie on edges by the hundred where a norm's
    weights are all alike: half of the levels are halves of that norm's largest over 127.
    """
    blocks = x.unflatten(-1, (-1, block))
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    level = torch.where(scale > 0, blocks / scale, torch.zeros_like(blocks))
    tied = (level - level.floor() - 0.5).abs() < _TIE
    result: Tensor = (torch.where(level.round() > level, -scale, scale) * tied).flatten(-2)
    return result


def _experts(node: ir.Node, x: Tensor, values: Arrays) -> Tensor:
    bits, block, k = (
        node.attributes[n].as_int() for n in ("expert_weight_bits", "block_size", "k")
    )
    scores, routes = (
        torch.from_numpy(values[str(node.inputs[i].name)])  # type: ignore[union-attr]
        for i in (_SCORES, _ROUTES)
    )
    taken = torch.zeros_like(scores).scatter_(1, scores.topk(k, 1).indices, 1.0) * routes
    parts = []
    for levels, scale, bias in (_FIRST, _SECOND):
        added = node.inputs[bias]
        parts.append(
            (
                unpack(_array(node.inputs[levels]), bits),
                Grid(bits, torch.from_numpy(_array(node.inputs[scale])), block),
                None if added is None else torch.from_numpy(_array(added)),
            )
        )
    gated = node.attributes["activation_type"].as_string() == "swiglu"
    (first, first_grid, first_bias), (second, second_grid, second_bias) = parts
    y = x.new_zeros(len(x), second.shape[1])
    for e in range(len(first)):
        rows = taken[:, e].nonzero().squeeze(1)
        h = _product(x[rows], first[e], first_grid[e])
        if first_bias is not None:
            h = h + first_bias[e]
        if gated:
            h = F.silu(h[:, ::2]) * h[:, 1::2]
        else:
            h = getattr(F, node.attributes["activation_type"].as_string())(h)
        out = _product(h, second[e], second_grid[e])
        if second_bias is not None:
            out = out + second_bias[e]
        y.index_add_(0, rows, out)
    return y


def _product(x: Tensor, levels: Tensor, grid: Grid) -> Tensor:
    kernel = expert_kernel(grid.bits, len(levels), is_fused=True, block=grid.block)
    return product(x, grid.values(levels), grid, kernel)
