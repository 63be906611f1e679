"""Emit what a conversion asks for, check it beside the program, and say how it went."""

from __future__ import annotations

import importlib
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from carve.engine_form import FOREIGN

if TYPE_CHECKING:
    from torch import Tensor

    from carve.calibration import Batch
    from carve.program import Program

log = logging.getLogger(__name__)
ONNX, CUDA, SPLIT = "onnx-cpu", "onnx-cuda", "onnx-split"


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


def load_engines(names: Sequence[str]) -> None:
    """Import what emitting these targets takes; it is most of the time that a small model needs."""
    from carve.emit.tvm.names import PREFIX

    modules = {"carve.parity"}
    for name in names:
        if name in FOREIGN:
            modules |= {"carve.emit.hf", "carve.hf_parity"}
        elif name.startswith(PREFIX):
            modules |= {"carve.emit.tvm.emit", "carve_runtime.tvm_engine"}
        else:
            modules |= {"carve.emit.split", "carve.emulation", "onnxscript", "onnxruntime"}
    for name in sorted(modules):
        importlib.import_module(name)


@dataclass(frozen=True)
class Emission:
    """A target's ``folder``, the ``model`` as the manifest names it, and the report's record.

    ``shared_cache`` is None where the target is not run by carve's runtime.
    """

    folder: str
    model: str
    bits: int
    shared_cache: bool | None
    record: dict[str, Any]


def emit_targets(
    program: Program,
    names: Sequence[str],
    stage: Path,
    bits: int,
    calibration: Sequence[Batch],
    held: Sequence[Batch],
    unrounded: Program | None = None,
) -> dict[str, Emission]:
    """Write every target below ``stage``.

    Args:
        program: what to emit.
        names: of `carve.config.TARGETS`.
        stage: the artifact's folder.
        bits: width of weights that nothing else is said of.
        calibration: what experts' heat and predictors are taken from.
        held: prompts for parity, and text to measure locality on.
        unrounded: the program before quantization, for targets that are written without.

    Raises:
        UserError: a target cannot hold the program.
        CarveError: an operator has no translation, or a target differs from the program.
    """
    from carve.calibration import head_of
    from carve.emit.tvm.names import PREFIX
    from carve.passbase import peak_rss_mb

    prompts = [head_of(program, b) for b in (held[0], held[len(held) // 2])]
    found = {}
    for name in dict.fromkeys(names):
        began = time.monotonic()
        width = bits
        if name in FOREIGN:
            folder, model, shared, metrics = _checkpoint(
                unrounded or program, name, stage, prompts, program.notes
            )
            width = 32 if "float32" in metrics["dtype"] else 16
        elif name == ONNX:
            folder, model, shared, metrics = _onnx(program, stage, bits, prompts)
        elif name.startswith(PREFIX):
            folder, model, shared, metrics = _tvm(program, stage, bits, prompts, name)
        elif name == CUDA:
            folder, model, shared, metrics = _cuda(program, stage, bits, prompts)
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
        found[name] = Emission(folder, f"{folder}/{model}", width, shared, record)
    return found


def _checkpoint(
    program: Program,
    target: str,
    stage: Path,
    prompts: Sequence[tuple[Tensor, ...]],
    notes: Mapping[str, Any],
) -> tuple[str, str, None, dict[str, Any]]:
    from carve.emit.handover import hand_over, write_handover
    from carve.emit.hf import emit_checkpoint, routed_in_order, stored_dtype
    from carve.hf_parity import check_checkpoint

    (stage / target).mkdir()
    handed = None
    if "placement" in notes:
        handed = hand_over(notes["placement"], notes["trace"].loads())
        (stage / target / "handover").mkdir()
    routed = routed_in_order(program, handed.orders if handed else None)
    if handed:
        experts = next(iter(routed.values())).num_experts
        write_handover(handed, stage / target / "handover", len(program.sites), experts)
    emit_checkpoint(program, stage / target, target, routed)
    parity = check_checkpoint(program, stage / target, target, routed, prompts)
    metrics = {
        "parity": asdict(parity),
        "dtype": str(stored_dtype(program)),
        "placement_baked": handed.baked if handed else None,
    }
    return target, "config.json", None, metrics


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
    from carve import parity
    from carve.emit.tvm.cuda.device import Gpu
    from carve.emit.tvm.emit import emit_tvm
    from carve.emit.tvm.names import folder_of, processor

    device, folder = processor(name), folder_of(name)
    (stage / folder).mkdir(parents=True)
    emitted = emit_tvm(program, stage / folder, bits, name, device)
    metrics: dict[str, Any] = {"cpu": device.name, "parity": None}
    if device.runs_here():
        engine = parity.TVM_CUDA if isinstance(device, Gpu) else parity.TVM
        found = parity.check_parity(program, emitted.path, prompts, bits, engine)
        metrics["parity"] = asdict(found)
    else:
        metrics["state"] = "compiled, not run"
        log.warning("%s is compiled, not run: nothing here can run it", name)
    return folder, emitted.path.name, True, metrics


def _cuda(
    program: Program, stage: Path, bits: int, prompts: Sequence[tuple[Tensor, ...]]
) -> tuple[str, str, bool, dict[str, Any]]:
    from carve import parity
    from carve.emit.onnx import emit

    (stage / "cuda").mkdir()
    emitted = emit(program, stage / "cuda" / "model.onnx", bits, half=True)
    found = parity.check_parity(program, emitted.path, prompts, bits, parity.CUDA)
    return "cuda", emitted.path.name, emitted.shared_cache, {"parity": asdict(found)}


def _split(
    program: Program,
    stage: Path,
    bits: int,
    prompts: Sequence[tuple[Tensor, ...]],
    calibration: Sequence[Batch],
    held: Sequence[Batch],
) -> tuple[str, str, bool, dict[str, Any]]:
    from carve import offload, parity
    from carve.emit.split import emit_split

    (stage / "split").mkdir()
    seen = offload.watch(program, calibration)
    predictors = offload.fit_predictors(program, seen)
    emitted = emit_split(program, stage / "split", bits, offload.hotness(seen), predictors)
    found = parity.check_parity(program, emitted.path, prompts, bits, parity.SPLIT)
    measured = offload.measure_locality(
        program, offload.watch(program, held), predictors, emitted.sizes
    )
    metrics = {"parity": asdict(found), "locality": asdict(measured)}
    return "split", emitted.path.name, emitted.shared_cache, metrics
