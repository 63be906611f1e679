"""Parity: an emitted model beside the program, on prompts whose routings differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from carve.dialect import linear_rule, select
from carve.emit import pack
from carve.errors import CarveError
from carve.program import FFNSite, Program


@dataclass(frozen=True)
class ParityMetrics:
    """Relative error of the results by token (root mean square over the row's own).

    A rounding tie that falls the other way in one of two correct programs can flip a route, so the
    typical token is bounded tightly and the share of tokens far off loosely.
    """

    median_error: float
    worst_error: float
    within: float
    top1_agreement: float
    tokens: int
    routings: int


def feeds_of(
    program: Program, inputs: Sequence[Tensor], names: Sequence[str]
) -> dict[str, np.ndarray]:
    """Feeds for onnxruntime; a decoder's attention mask is added where the model wants it."""
    feeds = {n: t.numpy() for n, t in zip(program.inputs, inputs, strict=True) if n in names}
    if program.kind == "decoder" and "attention_mask" in names:
        batch, length = inputs[0].shape
        feeds["attention_mask"] = np.ones((batch, length + inputs[2].shape[2]), np.int64)
    return feeds


def run_onnx(
    path: Path, program: Program, prompts: Sequence[tuple[Tensor, ...]]
) -> list[list[Any]]:
    """All results of the model for each prompt."""
    import onnxruntime as ort  # type: ignore[import-untyped]

    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    return [session.run(None, feeds_of(program, p, names)) for p in prompts]


def routings(program: Program, inputs: Sequence[Tensor]) -> list[bytes]:
    """The experts that each token chose in all sites, as comparable bytes."""
    masks: list[Tensor] = []

    def keep(site: FFNSite, x: Tensor) -> None:
        if site.routed is not None:
            flat = x.reshape(-1, x.shape[-1])
            masks.append(select(site.routed.logits(flat), site.routed.top_k))

    program.run(*inputs, observe=keep)
    if not masks:
        return []
    every = torch.cat(masks, 1).numpy()
    return [row.tobytes() for row in every]


def check_parity(
    program: Program, path: Path, prompts: Sequence[tuple[Tensor, ...]], bits: int
) -> ParityMetrics:
    """Compare the emitted model with the program in the target's arithmetic.

    Args:
        program: what was emitted.
        path: the ONNX model.
        prompts: program inputs; their routings have to differ from one another and from the
            example input's, else the check would not see a baked routing.
        bits: width that was emitted; the program runs in the kernels' own arithmetic at it.

    Raises:
        CarveError: the results differ, or the prompts do not exercise the router.
    """
    got = run_onnx(path, program, prompts)
    errors, agree = [], []
    with linear_rule(lambda x, w: pack.emulate(x, w, bits)):
        chosen = {r for p in prompts for r in routings(program, p)}
        example = set(routings(program, program.example))
        for inputs, result in zip(prompts, got, strict=True):
            want = program.run(*inputs)[0]
            have = torch.from_numpy(result[0])
            if want.shape != have.shape:
                raise CarveError("parity", f"{path.name} gives {have.shape}, torch {want.shape}")
            want, have = want.reshape(-1, want.shape[-1]), have.reshape(-1, have.shape[-1])
            errors.append((have - want).norm(dim=1) / want.norm(dim=1).clamp_min(1e-20))
            agree.append(have.argmax(1) == want.argmax(1))
    error = torch.cat(errors)
    metrics = ParityMetrics(
        float(error.median()),
        float(error.max()),
        float((error < 0.1).float().mean()),
        float(torch.cat(agree).float().mean()),
        len(error),
        len(chosen),
    )
    if chosen and (len(chosen) < 2 or chosen <= example):
        raise CarveError(
            "parity", "the parity prompts all take the example's routing", "give other text"
        )
    # Quantized activations turn a rounding tie into a step, so the bound follows the width.
    bound = 1e-4 if bits >= 16 else 2e-2
    # A NaN fails both comparisons.
    if not (metrics.median_error <= bound and metrics.within >= 0.9):
        raise CarveError(
            "parity",
            f"{path.name} and torch differ: relative error {metrics.median_error:.2e} (median), "
            f"{metrics.worst_error:.2e} (worst), {metrics.within:.1%} of tokens within 10 %",
            "this is a defect of carve; please report the architecture",
        )
    return metrics
