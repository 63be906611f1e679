"""A tiny carved model with real text, for tests of passes that train it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from carve.budget import Request, Split
from carve.calibration import DATA, SiteInputs, hold_back, load_tokenizer, text_batches
from carve.capture import capture_checkpoint
from carve.evaluate import Evaluator
from carve.passbase import Context, Pass, PassManager
from carve.passes import Carve, CarveConfig, Profile, ProfileConfig, RouteRidge, RouteRidgeConfig
from carve.program import Program

SPLIT = Split(shared_size=64, expert_size=32, num_experts=6, top_k=2)


class Routed:
    """A carved and routed tiny program with its context."""

    def __init__(self, folder: Path) -> None:
        self.dense = capture_checkpoint(folder)
        text = (DATA / "calibration.txt").read_text(encoding="utf-8")[:60_000]
        batches = text_batches(self.dense, load_tokenizer(folder), text, 64, 6000)
        self.batches, judged = hold_back(batches, 512)
        self.judge = Evaluator(self.dense, judged)
        self.inputs = SiteInputs.collect(self.dense, self.batches)
        self.program = self.dense.copy()
        self.run(self.program, Profile(ProfileConfig()), Carve(CarveConfig(tokens=512)))
        self.run(self.program, RouteRidge(RouteRidgeConfig()))

    def context(self, **more: Any) -> Context:
        splits: dict[str, Split | None] = {s.name: SPLIT for s in self.program.sites}
        return Context(
            self.batches, self.inputs, Request(0.0), splits, judge=self.judge.loss, **more
        )

    def run(self, program: Program, *passes: Pass[Any], **more: Any) -> list[Any]:
        return PassManager(passes)(program, self.context(**more))

    def copy(self) -> Program:
        return self.program.copy()


class Steps:
    """A progress that counts the steps of training, and may kill the run before one of them."""

    def __init__(self, kill_at: int = -1) -> None:
        self.kill_at, self.done = kill_at, 0

    def __call__(self, items: Sequence[Any], label: str) -> Iterator[Any]:
        for i, item in enumerate(items):
            if label in ("finetune", "tune_grids"):
                if i == self.kill_at:
                    raise KeyboardInterrupt
                self.done += 1
            yield item
