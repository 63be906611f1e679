"""Routed experts outside the graph: one weights file, and one small graph for each shape.

``experts.bin`` holds every expert on pages of its own, the hottest first, so that what is resident
most of the time is read in one go. Experts of one form share a graph that names their tensors
without holding them; the runtime lends it each expert's bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from carve.arithmetic import Precision
from carve.emit.builder import Builder
from carve.emit.routed import expert_grids, one_expert, qmoe
from carve.ffn import RoutedFFN
from carve.grid import Grid

PAGE = 4096
FILE = "experts.bin"
_ALIGN = 64


@dataclass(frozen=True)
class _Stored:
    """A tensor of an expert: where it lies in the expert's range, and what makes its content."""

    name: str
    offset: int
    content: ir.TensorProtocol

    def entry(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "offset": self.offset,
            "shape": [int(n) for n in self.content.shape.numpy()],
            "dtype": self.content.dtype.numpy().name,
        }


@dataclass(frozen=True)
class _Expert:
    """One expert's graph without its tensors, and the tensors."""

    graph: bytes
    bits: int
    size: int
    tensors: tuple[_Stored, ...]


def _up(n: int, unit: int) -> int:
    return -(-n // unit) * unit


def _graph(r: RoutedFFN, e: int, grids: dict[str, list[Grid]] | None, p: Precision) -> ir.Model:
    """``y = FFN_e(x)`` for rows ``x`` ``[n, d]``, computed as the whole model's nodes would."""
    real, shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(["n", int(r.expert_up.shape[-1])])
    x = ir.Value(name="x", shape=shape, type=real)
    graph = ir.Graph([x], [], nodes=[], opset_imports={"": 21, "com.microsoft": 1}, name="expert")
    model = ir.Model(graph, ir_version=10, producer_name="carve")
    b, at = Builder(model, p), []  # type: tuple[Builder, list[ir.Node]]
    if grids is None:
        y = one_expert(b, at, x, "expert", r, e)
    else:
        one = b.const("carve_one", np.ones(1, np.int64))
        rows = b.op(at, "Concat", [b.op(at, "Shape", [x], end=1), one], axis=0)
        on = b.op(at, "ConstantOfShape", [rows], value=ir.Tensor(np.ones(1, np.float32)))
        y = qmoe(b, at, x, on, on, "expert", r, [e], grids)
    graph.extend(at)
    y.name, y.shape = "y", ir.Shape(["n", int(r.expert_down.shape[1])])
    y.type = real
    graph.outputs.append(y)
    return model


def _expert(r: RoutedFFN, e: int, grids: dict[str, list[Grid]] | None, p: Precision) -> _Expert:
    model = _graph(r, e, grids, p)
    tensors, at = [], 0
    for name, value in model.graph.initializers.items():
        content = value.const_value
        if content is None or name.startswith("carve_"):
            continue
        tensors.append(_Stored(name, at, content))
        value.const_value = ir.ExternalTensor(
            FILE,
            at,
            content.nbytes,
            content.dtype,
            shape=ir.Shape(tuple(content.shape.numpy())),
            name=name,
        )
        at += _up(content.nbytes, _ALIGN)
    data = ir.serde.serialize_model(model).SerializeToString(deterministic=True)
    grid = p.of(r.expert_up[e])
    return _Expert(data, 32 if grid is None else grid.bits, _up(at, PAGE), tuple(tensors))


def write_experts(
    folder: Path,
    layers: Sequence[RoutedFFN],
    precision: Precision,
    hotness: Sequence[Sequence[float]],
) -> dict[str, Any]:
    """Write ``experts.bin`` and the graphs; returns the index's entries on them.

    Args:
        folder: where to write.
        layers: the routed FFNs in the order of the graph.
        precision: the grids of their weights.
        hotness: by layer and expert, the share of calibration tokens that chose it.
    """
    # Once a layer: round-to-nearest grids are not stored.
    grids = [expert_grids(precision, r) for r in layers]
    order = sorted(
        ((i, e) for i, r in enumerate(layers) for e in range(r.num_experts)),
        key=lambda key: (-hotness[key[0]][key[1]], key),
    )
    forms: dict[bytes, int] = {}
    described: list[dict[str, Any]] = []
    entries = []
    offset = 0
    with (folder / FILE).open("wb") as file:
        for i, e in order:
            one = _expert(layers[i], e, grids[i], precision)
            if one.graph not in forms:
                forms[one.graph] = len(forms)
                name = f"expert{forms[one.graph]}.onnx"
                (folder / name).write_bytes(one.graph)
                described.append(
                    {
                        "model": name,
                        "bits": one.bits,
                        "size": one.size,
                        "tensors": [t.entry() for t in one.tensors],
                    }
                )
            for t in one.tensors:
                file.seek(offset + t.offset)
                file.write(np.ascontiguousarray(t.content.numpy()).tobytes())
            entries.append(
                {
                    "layer": i,
                    "expert": e,
                    "form": forms[one.graph],
                    "offset": offset,
                    "hotness": round(float(hotness[i][e]), 6),
                }
            )
            offset += one.size
        file.truncate(offset)
    return {"data": FILE, "page": PAGE, "forms": described, "experts": entries}
