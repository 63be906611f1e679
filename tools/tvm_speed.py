"""Decode and prefill of one artifact in onnxruntime and in TVM, interleaved.

Usage::

    carve convert models/reference --budget 0.6 --target onnx-cpu,tvm:x86_64 -o both
    python tools/tvm_speed.py both

Both engines run in this process in turn, so that a change of the speed falls on both; the figures
are medians, the ratios medians over rounds. Prefill gives the logits of every token; the row
below it gives those of the last one, which generation needs.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import carve_runtime

from carve.measure import decode_speed, prefill_speed
from carve.report import table


def last_row_speed(model: carve_runtime.Model, length: int) -> float:
    """Tokens a second of one step whose last token's logits are wanted."""
    session = model.start()
    size = model.manifest.model.vocab_size
    began = time.perf_counter()
    session.step([(7919 * i + 13) % size for i in range(length)], rows=1)
    return length / (time.perf_counter() - began)


def main() -> None:
    """Run the rounds and print the table."""
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    a.add_argument("artifact", type=Path)
    a.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    a.add_argument("--rounds", type=int, default=5)
    a.add_argument("--tokens", type=int, default=24)
    a.add_argument("--prefill", type=int, default=256)
    args = a.parse_args()
    models = {
        e: carve_runtime.load(args.artifact, engine=e, threads=args.threads)
        for e in ("onnx", "tvm")
    }
    tests: dict[str, Callable[[carve_runtime.Model], float]] = {
        "decode after 50": partial(decode_speed, tokens=args.tokens, context=50),
        f"prefill of {args.prefill}": partial(prefill_speed, length=args.prefill),
        "the same, last row": partial(last_row_speed, length=args.prefill),
    }
    found: dict[tuple[str, str], list[float]] = {}
    for i in range(args.rounds + 1):
        for test, speed in tests.items():
            for name in list(models) if i % 2 else list(models)[::-1]:
                value = speed(models[name])
                time.sleep(0.3)  # idle pools spin for a while after a run
                if i:
                    found.setdefault((test, name), []).append(value)
    rows = [["test", "onnxruntime, tokens/s", "TVM, tokens/s", "ratio"]]
    for test in tests:
        onnx, tvm = found[test, "onnx"], found[test, "tvm"]
        ratio = statistics.median(t / o for t, o in zip(tvm, onnx, strict=True))
        medians = [f"{statistics.median(v):.1f}" for v in (onnx, tvm)]
        rows.append([test, *medians, f"{ratio:.2f}"])
    print(table(rows))


if __name__ == "__main__":
    main()
