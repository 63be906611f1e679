"""Quality of skip gates beside what else leaves blocks out, at equal multiply-accumulates.

Usage::

    python tools/gates.py models/reference --layers 1,2 --seeds 0

For each number of whole layers that ShortGPT (arXiv 2403.03853) would delete, every method is
brought to the same budget:

- ShortGPT: the layers of lowest block influence ``1 - cos(h_in, h_out)`` are deleted;
- attention drop (arXiv 2406.15786): attention of lowest influence is deleted, as far as it goes;
- gates: carve's, on the blocks and at the rates that the allocation chooses, FFNs dense;
- random mask: the same gates and bridges, but the scores know nothing, at the same rates;
- carve: the FFNs carved, closed forms only; carve + gates: the allocation chooses among both.

``loss`` is the increase of log-perplexity on held-out text. The blocks of deleted layers count as
nothing, keys and values of skipped tokens count in full.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from quality import Bench

from carve import passes as p
from carve.budget import make_request, plan_widths
from carve.capture import capture_checkpoint
from carve.executor import Pauses
from carve.passbase import Context, Pass, PassManager
from carve.program import Program
from carve.realised import realised
from carve.report import table
from carve.sites import AtSite, Block, Gate


def shut(program: Program, block: Block) -> None:
    """Delete a block: nothing of it is added to the stream."""
    width = int(block.input.meta["val"].shape[-1])
    never = Gate(torch.zeros(width), torch.full((1,), -1.0), None, None, None, None, always=0)
    program.set_gate(block, never)


def influence(program: Program, bench: Bench) -> dict[str, float]:
    """By block, and by layer under the FFN's name plus ``+``: mean ``1 - cos(h_in, h_out)``."""
    found: dict[str, list[float]] = {}

    def take(at: AtSite, before: torch.Tensor | None) -> torch.Tensor:
        assert at.residual is not None
        assert at.y is not None
        out = at.residual + at.y

        def note(name: str, h: torch.Tensor) -> None:
            cosine = torch.nn.functional.cosine_similarity(h, out, dim=-1)
            found.setdefault(name, []).append(1.0 - float(cosine.mean()))

        note(at.site.name, at.residual)
        if before is not None:
            note(at.site.name + "+", before)
        return at.residual

    attention = {a.name for a in program.attention}
    for batch in bench.batches[:4]:
        steps = program.steps(*batch.inputs, pauses=Pauses(after=program.blocks), only_first=True)
        with torch.no_grad():
            try:
                at, layer = next(steps), None
                while True:
                    h = take(at, None if at.site.name in attention else layer)
                    layer = h if at.site.name in attention else layer
                    assert at.y is not None
                    at = steps.send(at.y)
            except StopIteration:
                pass
    return {name: statistics.mean(values) for name, values in found.items()}


class Rows:
    """One seed's rows: method, budget, figures."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.found: list[tuple[str, float, dict[str, Any]]] = []

    def add(self, name: str, budget: float, program: Program) -> None:
        figures = self.bench.figures(program)
        self.found.append((name, budget, figures))
        sys.stderr.write(f"{name}: budget {budget:.3f}, loss {figures['loss']:.4f}\n")

    def context(self, program: Program, budget: float) -> Context:
        b = self.bench
        request = make_request(program, budget, None, 0.7)
        widths = plan_widths(program, request)
        return Context(b.batches, b.inputs, request, widths, b.seed, judge=b.judge.loss)

    def deleted(self, layers: int) -> float:
        """ShortGPT and attention drop; gives the budget."""
        program = capture_checkpoint(self.bench.folder)
        score = influence(program, self.bench)
        sites = list(zip(program.attention, program.sites, strict=True))
        order = sorted(sites, key=lambda pair: score[pair[1].name + "+"])
        budget = 1.0 - layers / len(sites)
        for pair in order[:layers]:
            for block in pair:
                shut(program, block)
        self.add(f"ShortGPT, {layers} of {len(sites)} layers", budget, program)
        program = capture_checkpoint(self.bench.folder)
        each = program.attention_macs / len(program.attention)
        count = min(len(sites), math.ceil((1.0 - budget) * program.dense_macs / each))
        worst = sorted(program.attention, key=lambda a: score[a.name])[:count]
        for block in worst:
            shut(program, block)
        reached = 1.0 - count * each / program.dense_macs
        self.add(f"attention drop, {count} of {len(sites)}", reached, program)
        return budget

    def gated(self, budget: float) -> None:
        """carve's gates alone, and the same with scores that know nothing."""
        program = capture_checkpoint(self.bench.folder)
        context = self.context(program, budget)
        config = p.AllocateConfig(skip=True, narrow=False)
        PassManager(
            [p.Profile(p.ProfileConfig()), p.Allocate(config), p.SkipGates(p.GateConfig())]
        )(program, context)
        share = realised(program, self.bench.held[:4]).share()
        name = f"{len(program.gated)} gates, {share['skip']:.0%} skipped"
        self.add(name, share["budget"], program)
        for i, block in enumerate(program.gated):
            assert block.gate is not None
            generator = torch.Generator().manual_seed(i)
            noise = torch.randn(block.gate.weight.shape, generator=generator)
            program.set_gate(block, replace(block.gate, weight=noise))
        p.SkipGates(p.GateConfig()).calibrate(program, context)
        share = realised(program, self.bench.held[:4]).share()
        self.add("random mask, same rates", share["budget"], program)

    def carved(self, budget: float) -> None:
        """The FFNs carved by closed forms, without and with gates to choose."""
        for skip in (False, True):
            self._carved(budget, skip)

    def _carved(self, budget: float, skip: bool) -> None:
        program = capture_checkpoint(self.bench.folder)
        passes: list[Pass[Any]] = [
            p.Profile(p.ProfileConfig()),
            p.Allocate(p.AllocateConfig(skip=skip)),
            p.Carve(p.CarveConfig()),
            p.RouteRidge(p.RouteRidgeConfig()),
            p.Refit(p.RefitConfig()),
        ]
        context = self.context(program, budget)
        PassManager(passes)(program, context)
        if skip:
            PassManager([p.SkipGates(p.GateConfig())])(program, context)
        share = realised(program, self.bench.held[:4]).share()
        names = f", {len(program.gated)} gates" if skip else ""
        self.add("carve" + names, share["budget"], program)


def main() -> None:
    """Run every method at every budget and seed, then print the table."""
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    a.add_argument("model", type=Path)
    a.add_argument("--layers", default="1,2", help="layers that ShortGPT deletes")
    a.add_argument("--budgets", default="0.6,0.5", help="further budgets for carving with gates")
    a.add_argument("--seeds", default="0")
    a.add_argument("--tokens", type=int, default=65_536)
    a.add_argument("--eval-tokens", type=int, default=24_000)
    args = a.parse_args()
    rows = [["seed, method", "budget", "loss", "kl", "perplexity"]]
    for seed in map(int, args.seeds.split(",")):
        r = Rows(Bench(args.model, seed, args.tokens, args.eval_tokens))
        for count in map(int, args.layers.split(",")):
            budget = r.deleted(count)
            r.gated(budget)
            r.carved(budget)
        for budget in map(float, filter(None, args.budgets.split(","))):
            r.carved(budget)
        for name, budget, f in sorted(r.found, key=lambda row: -row[1]):
            figures = [f"{f['loss']:.4f}", f"{f['kl']:.4f}", f"{f['perplexity']:.2f}"]
            rows.append([f"{seed} {name}", f"{budget:.3f}", *figures])
    print(table(rows))


if __name__ == "__main__":
    main()
