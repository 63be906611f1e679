"""Decode and prefill of a routed artifact, its dense original and llama.cpp, interleaved.

Usage::

    python tools/make_random.py big --tokenizer models/reference
    carve convert big --budget 0.6 --bits 4 -o big4
    python tools/speed.py big4 --gguf Q4_0 --checkpoint big

All engines run in this process in turn, so that a change of the machine's speed falls on each; the
figures are medians, the ratios medians over rounds. ``--long`` adds decoding after 1,000 tokens.
llama.cpp needs ``llama-cpp-python`` and is left out without ``--gguf``.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import carve_runtime

from carve.artifact import Artifact
from carve.measure import decode_speed, dense_artifact, prefill_speed
from carve.passbase import silent
from carve.report import table


def main() -> None:
    """Run the rounds and print the table."""
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    a.add_argument("artifact", type=Path)
    a.add_argument("--dense", help="dense artifact (default: made from the source, and cached)")
    a.add_argument("--gguf", help="llama.cpp type, for example Q4_0 or Q8_0")
    a.add_argument("--checkpoint", type=Path, help="Hugging Face directory for llama.cpp")
    a.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    a.add_argument("--rounds", type=int, default=5)
    a.add_argument("--tokens", type=int, default=24)
    a.add_argument("--long", action="store_true", help="also decode after 1,000 tokens")
    args = a.parse_args()
    artifact = Artifact.open(args.artifact)
    dense = dense_artifact(artifact, args.dense, silent)
    models = {
        "dense, onnxruntime": carve_runtime.load(dense, threads=args.threads),
        "routed, onnxruntime": carve_runtime.load(args.artifact, threads=args.threads),
    }
    contexts = [50, 1000] if args.long else [50]
    tests: dict[str, dict[str, Callable[[], float]]] = {f"decode after {c}": {} for c in contexts}
    tests["prefill of 256"] = {}
    for name, model in models.items():
        for c in contexts:
            tests[f"decode after {c}"][name] = lambda m=model, c=c: decode_speed(m, args.tokens, c)
        tests["prefill of 256"][name] = lambda m=model: prefill_speed(m, 256)
    if args.gguf:
        sys.path.insert(0, str(Path(__file__).resolve().parent))
        from bench_llama_cpp import LlamaCpp, write_gguf

        folder = Path(tempfile.mkdtemp())
        checkpoint = args.checkpoint or Path(artifact.manifest["source"]["path"])
        file = write_gguf(checkpoint, folder / "model.gguf", args.gguf)
        peer = LlamaCpp(file, args.threads)
        name = f"dense, llama.cpp {args.gguf}"
        for c in contexts:
            tests[f"decode after {c}"][name] = lambda c=c: peer.decode(args.tokens, c)
        tests["prefill of 256"][name] = lambda: 256 / peer.prefill(256)
    found: dict[tuple[str, str], list[float]] = {}
    for i in range(args.rounds + 1):
        for test, engines in tests.items():
            names = list(engines) if i % 2 else list(engines)[::-1]
            for name in names:
                speed = engines[name]()
                time.sleep(0.3)  # idle pools spin for a while after a run
                if i:
                    found.setdefault((test, name), []).append(speed)
    rows = [["test", "engine", "tokens/s", "over dense, onnxruntime"]]
    for (test, name), speeds in found.items():
        base = found[(test, "dense, onnxruntime")]
        ratio = statistics.median(s / b for s, b in zip(speeds, base, strict=True))
        rows.append([test, name, f"{statistics.median(speeds):.2f}", f"{ratio:.3f}"])
    print(table(rows))
    if args.long:
        for name in models:
            short, long = (statistics.median(found[(f"decode after {c}", name)]) for c in contexts)
            print(f"{name}: a token takes {short / long:.3f} times as long after 1,000 as after 50")


if __name__ == "__main__":
    main()
