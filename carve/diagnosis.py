"""Where a conversion loses quality, and what it gains: by pass and by layer, by measurement."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from carve.arithmetic import Precision, as_emitted
from carve.calibration import Batch, limit_batches
from carve.dialect import linear_rule, stored_product
from carve.evaluate import Evaluator
from carve.executor import Pauses
from carve.ffn import DenseFFN
from carve.program import Program
from carve.realised import Use
from carve.sites import FFN, AtSite, AttentionSite

STREAM_TOKENS, LAYER_TOKENS = 256, 1_024
"""Held-out tokens that are run after every pass, and once a layer at the end."""


class Diagnosis:
    """A program beside its dense original; made while it is still dense.

    Args:
        program: the dense program, which passes are about to rewrite.
        evaluator: held-out batches with the dense program's results.
    """

    def __init__(self, program: Program, evaluator: Evaluator) -> None:
        self.evaluator = evaluator.limited(LAYER_TOKENS)
        self.batches = limit_batches(evaluator.batches, STREAM_TOKENS)
        self.streams = _streams(program, self.batches)

    def state(self, program: Program) -> dict[str, Any]:
        """After a pass: what the program costs, see `costs`, and its ``error`` by FFN.

        ``error``: ``sum |s' - s|^2 / sum |s|^2`` over tokens, ``s`` the dense program's stream
        behind the FFN and ``s'`` the program's (the FFN's result, where nothing is added to it).
        """
        with as_emitted(program):
            now = _streams(program, self.batches)
        error = {
            name: float((now[name] - s).square().sum() / s.square().sum().clamp_min(1e-30))
            for name, s in self.streams.items()
        }
        return {**costs(program), "error": error}

    def layers(self, program: Program, use: Use) -> dict[str, dict[str, Any]]:
        """At the end, by FFN: what tokens use of it, its routing, and its ``loss``.

        ``loss`` is what the program's loss (KL, or 1 - cosine) falls by when this FFN alone is the
        dense one again, unquantized; losses of several FFNs do not add up.
        """
        with as_emitted(program):
            whole = self.evaluator.loss(program)
            found = {}
            for site in program.sites:
                restored = self.evaluator.loss(program, {site.name: _unquantized(site.dense)})
                found[site.name] = {**use.of(site), "loss": whole - restored}
        return found


def costs(program: Program) -> dict[str, float]:
    """What a program costs as it stands.

    ``macs``: multiply-accumulates of the blocks for one token; ``bytes``: of its weights as they
    are emitted, fp32 where no pass has quantized them; ``reads``: bytes of weights that one token
    reads, experts and gated blocks by the share of tokens that use them (calibration text).
    """
    precision = Precision(program, 16)
    total = precision.total(program)
    unread = 0.0
    linears = program.linears
    multiplied = {n.weight.data_ptr() for n in linears}
    tables = {w.weight.data_ptr(): w.weight for w in program.lookups}
    unread += sum(precision.nbytes(t) for p, t in tables.items() if p not in multiplied)
    for site in program.sites:
        size = sum(precision.nbytes(t) for t in site.dense.tensors().values())
        if (r := site.routed) is not None:
            experts = precision.experts(r)
            k = r.top_k if r.mean_top_k is None else r.mean_top_k
            unread += sum(experts) * (1.0 - k / r.num_experts)
            size = round(sum(experts) * k / r.num_experts) + precision.shared(r)
        unread += size * (0.0 if site.gate is None else site.gate.skip)
    for a in program.attention:
        if a.gate is not None:
            unread += a.gate.skip * _query_bytes(a, program, precision)
    return {"macs": program.macs, "bytes": total, "reads": total - unread}


def _query_bytes(a: AttentionSite, program: Program, precision: Precision) -> float:
    """Bytes of the weights that a skipped token does not read, by their share of the products."""
    own = [n.weight for n in program.linears if n.name.startswith(f"{a.name}.")]
    weights = sum(w.numel() for w in own)
    return sum(precision.nbytes(w) for w in own) * a.query_macs / weights if weights else 0.0


def _unquantized(ffn: DenseFFN) -> FFN:
    def run(x: Tensor) -> Tensor:
        with linear_rule(stored_product):
            return ffn(x)

    return run


def _streams(program: Program, batches: list[Batch]) -> dict[str, Tensor]:
    """By FFN, the stream behind it ``[T, d]`` on the counted tokens of ``batches``."""
    found: dict[str, list[Tensor]] = {s.name: [] for s in program.sites}
    pauses = Pauses(after=program.sites)
    gated = any(s.gate is not None for s in program.sites)
    for batch in batches:
        position = batch.inputs[program.inputs.index("position_ids")] if gated else None

        def keep(at: AtSite, batch: Batch = batch, position: Tensor | None = position) -> Tensor:
            assert at.y is not None
            y = at.y
            if at.block.gate is not None and position is not None:
                y = at.block.gate(y, at.x, position)
            stream = y if at.residual is None else at.residual + y
            found[at.block.name].append(batch.counted(stream).float())
            return y

        with torch.no_grad():
            program.answered(*batch.inputs, pauses=pauses, answer=keep, only_first=True)
    return {name: torch.cat(parts) for name, parts in found.items()}
