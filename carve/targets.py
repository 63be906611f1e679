"""Emit what a conversion asks for, check it beside the program, and say how it went."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from carve.calibration import Batch
    from carve.program import Program

log = logging.getLogger(__name__)
ONNX, SPLIT = "onnx-cpu", "onnx-split"


def check_targets(names: Sequence[str]) -> None:
    """Refuse before the long work what could not be emitted after it.

    Raises:
        UserError: TVM or a compiler is not there.
    """
    from carve.emit.tvm.names import PREFIX, check_ready

    for name in names:
        if name.startswith(PREFIX):
            check_ready(name)


def check_translation(program: Program, names: Sequence[str], bits: int) -> None:
    """Translate the dense program, so that what has no translation is refused by name.

    Raises:
        CarveError: an operator has no translation to TVM.
    """
    from carve.emit.tvm.names import PREFIX, processor

    for name in [n for n in names if n.startswith(PREFIX)][:1]:
        from carve.emit.tvm.functions import translate

        translate(program, bits, processor(name))


@dataclass(frozen=True)
class Emission:
    """A target's ``folder``, the ``model`` as the manifest names it, and the report's record."""

    folder: str
    model: str
    bits: int
    shared_cache: bool
    record: dict[str, Any]


def emit_targets(
    program: Program,
    names: Sequence[str],
    stage: Path,
    bits: int,
    calibration: Sequence[Batch],
    held: Sequence[Batch],
) -> dict[str, Emission]:
    """Write every target below ``stage``.

    Args:
        program: what to emit.
        names: of `carve.config.TARGETS`.
        stage: the artifact's folder.
        bits: width of weights that nothing else is said of.
        calibration: what experts' heat and predictors are taken from.
        held: prompts for parity, and text to measure locality on.

    Raises:
        UserError: a target cannot hold the program.
        CarveError: an operator has no translation, or a target differs from the program.
    """
    from carve.passbase import peak_rss_mb

    prompts = [_head(program, b) for b in (held[0], held[len(held) // 2])]
    found = {}
    for name in dict.fromkeys(names):
        began = time.monotonic()
        if name == ONNX:
            folder, model, shared, metrics = _onnx(program, stage, bits, prompts)
        elif name.startswith("tvm:"):
            folder, model, shared, metrics = _tvm(program, stage, bits, prompts, name)
        else:
            folder, model, shared, metrics = _split(
                program, stage, bits, prompts, calibration, held
            )
        record = {
            "name": f"emit {name}",
            "seconds": round(time.monotonic() - began, 2),
            "peak_rss_mb": round(peak_rss_mb(), 1),
            "metrics": metrics,
            "quality": None,
        }
        found[name] = Emission(folder, f"{folder}/{model}", bits, shared, record)
    return found


def _onnx(
    program: Program, stage: Path, bits: int, prompts: Sequence[tuple[Tensor, ...]]
) -> tuple[str, str, bool, dict[str, Any]]:
    from carve.emit.onnx import emit
    from carve.emulation import check_nodes
    from carve.parity import check_parity, feeds_of

    (stage / "onnx").mkdir()
    emitted = emit(program, stage / "onnx" / "model.onnx", bits)
    parity = check_parity(program, emitted.path, prompts, bits)
    nodes = check_nodes(
        emitted.path, feeds_of(program, prompts[0], [*program.inputs, "attention_mask"])
    )
    metrics = {"parity": asdict(parity), "emulation": asdict(nodes)}
    return "onnx", emitted.path.name, emitted.shared_cache, metrics


def _tvm(
    program: Program, stage: Path, bits: int, prompts: Sequence[tuple[Tensor, ...]], name: str
) -> tuple[str, str, bool, dict[str, Any]]:
    from carve.emit.tvm.cpu import HOST, Cpu
    from carve.emit.tvm.emit import emit_tvm
    from carve.emit.tvm.names import folder_of, processor
    from carve.parity import check_parity, run_tvm

    cpu, folder = processor(name), folder_of(name)
    (stage / folder).mkdir(parents=True)
    emitted = emit_tvm(program, stage / folder, bits, name, cpu)
    metrics: dict[str, Any] = {"cpu": cpu.name, "parity": None}
    if cpu.runs_on(Cpu.named(HOST)):
        metrics["parity"] = asdict(check_parity(program, emitted.path, prompts, bits, run_tvm))
    else:
        log.warning("%s does not run on this machine: its results are not compared", name)
    return folder, emitted.path.name, True, metrics


def _split(
    program: Program,
    stage: Path,
    bits: int,
    prompts: Sequence[tuple[Tensor, ...]],
    calibration: Sequence[Batch],
    held: Sequence[Batch],
) -> tuple[str, str, bool, dict[str, Any]]:
    from carve import offload
    from carve.emit.split import emit_split
    from carve.parity import check_parity, run_split

    (stage / "split").mkdir()
    seen = offload.watch(program, calibration)
    predictors = offload.fit_predictors(program, seen)
    emitted = emit_split(program, stage / "split", bits, offload.hotness(seen), predictors)
    parity = check_parity(program, emitted.path, prompts, bits, run_split)
    measured = offload.measure_locality(
        program, offload.watch(program, held), predictors, emitted.sizes
    )
    metrics = {"parity": asdict(parity), "locality": asdict(measured)}
    return "split", emitted.path.name, emitted.shared_cache, metrics


def _head(program: Program, batch: Batch, rows: int = 2, tokens: int = 24) -> tuple[Tensor, ...]:
    """A small prompt from a held-out batch."""
    if program.kind == "decoder":
        ids, position = (t[:rows, :tokens].contiguous() for t in batch.inputs[:2])
        return (ids, position, *program.empty_cache(len(ids)))
    return tuple(t[:rows] for t in batch.inputs)
