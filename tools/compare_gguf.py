"""A carved model in llama.cpp: the same greedy tokens as in transformers, and faster than dense.

Usage::

    python tools/compare_gguf.py OUT/hf-granite --dense MODEL --types Q4_0,Q8_0 --threads 1

The tokens are compared unquantized, keys and values in fp32 on both sides, on prompts from the
held-out text; where they part, the table says how close the two best logits were there. Speeds are
of the carved model beside the dense one at the same type, in turns. Needs ``gguf`` and
``llama-cpp-python``.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from bench_llama_cpp import LlamaCpp, write_gguf
from granite_gguf import write_granite

from carve.calibration import load_tokenizer, read_text
from carve.hf_parity import load_checkpoint


def prompts_of(folder: Path, count: int, length: int) -> list[list[int]]:
    """Pieces of the held-out text, evenly spread."""
    ids = load_tokenizer(folder).encode(read_text(None, "evaluation.txt")).ids
    step = (len(ids) - length) // count
    return [ids[i * step : i * step + length] for i in range(count)]


def compare_tokens(folder: Path, work: Path, args: argparse.Namespace) -> None:
    """Greedy tokens of transformers and llama.cpp, prompt by prompt."""
    model: Any = load_checkpoint(folder)
    file = write_granite(folder, work / "tokens.gguf", "F32")
    peer = LlamaCpp(file, args.threads, n_ctx=512, kv_type="F32")
    same = 0
    print("| prompt | same tokens | gap of the two best logits where they part |")
    print("|---|---|---|")
    for i, prompt in enumerate(prompts_of(folder, args.prompts, args.length)):
        have = peer.greedy(prompt, args.tokens)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + have])).logits[0].float()
        # Fed with llama.cpp's tokens, transformers agrees as long as its own choice is the same.
        want = logits[len(prompt) - 1 : -1].argmax(1).tolist()
        first = next((n for n, (a, b) in enumerate(zip(have, want, strict=True)) if a != b), None)
        same += first is None
        gap = ""
        if first is not None:
            best = logits[len(prompt) - 1 + first].topk(2).values
            gap = f"{float(best[0] - best[1]):.4f}"
        print(f"| {i} | {args.tokens if first is None else first} of {args.tokens} | {gap} |")
    print(f"\n{same} of {args.prompts} prompts with the same {args.tokens} tokens\n")
    peer.close()


def compare_speed(folder: Path, work: Path, args: argparse.Namespace) -> None:
    """Decode and prefill of both at each type, medians over interleaved pairs."""
    print("| type | threads | | dense tokens/s | carved tokens/s | ratio (median of pairs) |")
    print("|---|---|---|---|---|---|")
    for qtype in args.types.split(","):
        files = {
            "dense": write_gguf(args.dense, work / f"dense-{qtype}.gguf", qtype),
            "carved": write_granite(folder, work / f"carved-{qtype}.gguf", qtype),
        }
        models = {k: LlamaCpp(f, args.threads, n_ctx=512) for k, f in files.items()}
        found: dict[str, dict[str, list[float]]] = {
            w: {k: [] for k in models} for w in ("decode", "prefill of 256")
        }
        for round_ in range(args.repeats + 1):
            for name in (*models,) if round_ % 2 else (*models,)[::-1]:
                model = models[name]
                speeds = model.decode(args.steps, 50), 256 / model.prefill(256)
                for what, speed in zip(found, speeds, strict=True):
                    if round_:  # the first round warms up
                        found[what][name].append(speed)
        for what, each in found.items():
            ratio = statistics.median(
                c / d for c, d in zip(each["carved"], each["dense"], strict=True)
            )
            dense, carved = (statistics.median(each[k]) for k in models)
            print(
                f"| {qtype} | {args.threads} | {what} | {dense:.1f} | {carved:.1f} | {ratio:.2f} |"
            )
        for model in models.values():
            model.close()


def main() -> None:
    """Compare tokens, and speeds where the dense checkpoint is given."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("checkpoint", type=Path, help="granitemoeshared, with its tokenizer")
    p.add_argument("--dense", type=Path, help="the Llama it was carved from, to time it too")
    p.add_argument("--types", default="Q4_0")
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--prompts", type=int, default=12, help="0 compares no tokens")
    p.add_argument("--length", type=int, default=32, help="tokens of a prompt")
    p.add_argument("--tokens", type=int, default=64, help="greedy tokens compared")
    p.add_argument("--steps", type=int, default=48, help="decode steps timed")
    p.add_argument("--repeats", type=int, default=5, help="interleaved pairs")
    args = p.parse_args()
    with tempfile.TemporaryDirectory() as work:
        if args.prompts:
            compare_tokens(args.checkpoint, Path(work), args)
        if args.dense:
            compare_speed(args.checkpoint, Path(work), args)


if __name__ == "__main__":
    main()
