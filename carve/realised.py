"""What held-out tokens really use of a program: experts and gates counted token by token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from carve.calibration import Batch
from carve.executor import Pauses
from carve.program import Program
from carve.routing_stats import RouterStats
from carve.sites import AtSite, Block, FFNSite


class Use:
    """Sums over tokens; ``block`` results are shares or counts a token."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.macs = {b.name: 0.0 for b in program.blocks}
        self.neurons = {s.name: 0.0 for s in program.sites}
        self.runs = {b.name: 0.0 for b in program.blocks}
        self.late = dict(self.runs)
        self.seen = dict(self.runs)
        self.routers = RouterStats(program)
        self.by_position: dict[str, list[Tensor]] = {b.name: [] for b in program.gated}

    def add(self, batch: Batch) -> None:
        """Run a batch and count."""
        p = self.program
        pauses = Pauses(after=p.blocks)
        with torch.no_grad():
            p.answered(
                *batch.inputs,
                pauses=pauses,
                answer=lambda at: self._count(at, batch),
                only_first=True,
            )

    def _count(self, at: AtSite, batch: Batch) -> Tensor:
        block, y = at.block, at.y
        assert y is not None
        x = batch.counted(at.x)  # padding takes experts of its own
        running = torch.ones(len(x), dtype=torch.bool)
        if block.gate is not None:
            position = batch.inputs[self.program.inputs.index("position_ids")]
            place = batch.counted(position[..., None]).squeeze(1)
            late = place >= block.gate.always
            running = block.gate.running(x, place)
            self.late[block.name] += int(late.sum())
            self.macs[block.name] += block.gate.macs * len(x)
            self.by_position[block.name].append(torch.stack((place, (~running).long())))
            y = block.gate(y, at.x, position)
        self.seen[block.name] += len(x)
        self.runs[block.name] += int(running.sum())
        self.macs[block.name] += self._cost(block, x[running])
        return y

    def _cost(self, block: Block, x: Tensor) -> float:
        if not isinstance(block, FFNSite):
            return float(block.skippable_macs * len(x))
        each = block.dense.macs // block.dense.intermediate_size
        r = block.routed
        if r is None:
            neurons, router = float(block.dense.intermediate_size * len(x)), 0
        else:
            chosen = float(self.routers.add(block, x).sum()) if len(x) else 0.0
            neurons = r.shared_size * len(x) + chosen * r.expert_size
            router = r.router_macs * len(x)
        self.neurons[block.name] += neurons
        return neurons * each + router

    def share(self) -> dict[str, float]:
        """The budget as these tokens really used it.

        ``budget``: of the blocks' multiply-accumulates; ``ffn_active``: of the FFNs', routers and
        gates counted; ``neurons``: of the FFNs' neurons; ``skip``: share of the gated blocks'
        tokens that skipped, of those that may.
        """
        program = self.program
        per_token = {n: m / max(1.0, self.seen[n]) for n, m in self.macs.items()}
        ffn = sum(per_token[s.name] for s in program.sites)
        attention = program.attention_macs + sum(
            per_token[a.name] - a.query_macs for a in program.attention
        )
        neurons = sum(self.neurons[s.name] / max(1.0, self.seen[s.name]) for s in program.sites)
        gated = self.skips()
        return {
            "budget": (attention + ffn) / program.dense_macs,
            "ffn_active": ffn / sum(s.dense.macs for s in program.sites),
            "neurons": neurons / sum(s.dense.intermediate_size for s in program.sites),
            "skip": sum(gated.values()) / max(1, len(gated)),
        }

    def skips(self) -> dict[str, float]:
        """By gated block, the share of tokens that skipped, of those that may."""
        return {
            b.name: (self.seen[b.name] - self.runs[b.name]) / max(1.0, self.late[b.name])
            for b in self.program.gated
        }

    def of(self, site: FFNSite) -> dict[str, Any]:
        """What tokens use of one FFN, for JSON.

        ``macs`` a token, ``active`` share of its neurons; of a routed one, its widths and what
        `RouterStats.of` gives.
        """
        seen = max(1.0, self.seen[site.name])
        found: dict[str, Any] = {
            "macs": self.macs[site.name] / seen,
            "active": self.neurons[site.name] / seen / site.dense.intermediate_size,
        }
        if (r := site.routed) is not None:
            widths = ("shared_size", "expert_size", "num_experts")
            found |= {name: getattr(r, name) for name in widths}
            found |= self.routers.of(site.name)
        return found

    def positions(self, spans: int = 32) -> dict[str, Any]:
        """What gates skip by position: ``width`` of a span in tokens, and shares by ``blocks``.

        A span that no token of the text reached is None.
        """
        gated = {n: torch.cat(parts, 1) for n, parts in self.by_position.items() if parts}
        if not gated:
            return {}
        length = max(int(p[0].max()) for p in gated.values()) + 1
        width = -(-length // spans)
        count = -(-length // width)
        blocks = {}
        for name, (place, skipped) in gated.items():
            seen = torch.bincount(place // width, minlength=count)
            total = torch.bincount(place // width, skipped.double(), minlength=count)
            blocks[name] = [float(t / n) if n else None for t, n in zip(total, seen, strict=True)]
        return {"width": width, "blocks": blocks}


def realised(program: Program, batches: Sequence[Batch]) -> Use:
    """What the tokens of ``batches`` use."""
    use = Use(program)
    for batch in batches:
        use.add(batch)
    return use
