"""The ONNX back end: a program to a model that stock onnxruntime runs.

``torch.onnx`` translates the graph with dialect operators and linears left as placeholder nodes and
weights left out (`carve.emit.skeleton`); `carve.emit.lower` replaces each placeholder. Weights are
made when the file is written, one at a time, so memory stays near one copy of the checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes import common as onnx_passes

from carve.arithmetic import Precision
from carve.emit.half import to_half
from carve.emit.lower import lower
from carve.emit.skeleton import quiet, skeleton
from carve.errors import UserError
from carve.program import Program


@dataclass
class Emitted:
    """What `emit` wrote and what a runtime has to know about it."""

    path: Path
    bits: int
    shared_cache: bool


def emit(program: Program, path: Path, bits: int, *, half: bool = False) -> Emitted:
    """Write ``path`` (and ``path`` + ``.data``) for onnxruntime.

    Args:
        program: dense or routed.
        path: the model file; its folder has to exist.
        bits: 4 or 8 for block-wise weights, 16 or more for fp32, where no pass has quantized the
            program; else its own grids are emitted.
        half: fp16 between the nodes, as CUDA wants it, see `carve.emit.half`.

    Raises:
        UserError: an unknown width.
        CarveError: an operator has no translation.
    """
    if bits not in (4, 8, 16, 32):
        raise UserError("bits", f"--bits {bits} is not one of 16, 8, 4", "try --bits 4")
    with quiet():
        model, weights = skeleton(program)
        lower(model, weights, program, Precision(program, bits), router_weights=not half)
        model.graph.name = "carve"
        if half:
            to_half(model)
        onnx_passes.TopologicalSortPass()(model)
        model.ir_version = min(model.ir_version or 10, 11)
        ir.save(model, str(path), external_data=path.name + ".data", size_threshold_bytes=256)
    shared = any(n.op_type == "GroupQueryAttention" for n in model.graph.all_nodes())
    return Emitted(path, bits, shared)
