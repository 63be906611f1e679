"""An artifact's GPU target beside a reference made elsewhere: logits, greedy tokens, tokens/s.

Usage::

    carve convert models/reference --budget 0.6 --target onnx-cpu,tvm:cuda-sm_90 -o out
    python tools/tvm_cuda_check.py out --write reference.npz      # no GPU needed
    python tools/tvm_cuda_check.py out --reference reference.npz  # where there is one

The reference is what another target of the artifact (``--engine-target``, onnx-cpu) computes for a
text of its own greedy tokens. The GPU gets the same tokens, as one prompt and one by one, so that
one different choice does not end the comparison. Activations are rounded to int8 on processors and
not on the GPU: below 16 bits logits differ by that.

Needed on the machine with the GPU: carve-runtime's folder on PYTHONPATH, numpy, apache-tvm and
apache-tvm-ffi. Exits with 1 where the median error of a token's logits is above ``--bound``.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import carve_runtime
import numpy as np
from numpy.typing import NDArray

_PROMPT = 16


def _greedy(model: carve_runtime.Model, prompt: list[int], count: int) -> list[int]:
    """A prompt and ``count`` tokens after it, each the likeliest."""
    session, ids = model.start(), list(prompt)
    logits = session.step(prompt, rows=1)
    for _ in range(count):
        ids.append(int(logits[-1].argmax()))
        logits = session.step(ids[-1:])
    return ids


def _errors(got: NDArray[np.float32], want: NDArray[np.float32]) -> NDArray[np.float32]:
    """Root mean square of each row's difference over the row's own."""
    found: NDArray[np.float32] = np.linalg.norm(got - want, axis=1) / np.linalg.norm(want, axis=1)
    return found


def write(model: carve_runtime.Model, path: Path, count: int) -> None:
    """Keep a text and the logits of its tokens."""
    size = model.manifest.model.vocab_size
    prompt = [(7919 * i + 13) % size for i in range(_PROMPT)]
    ids = _greedy(model, prompt, count)
    np.savez(path, ids=np.array(ids), logits=model.start().step(ids), target=model.target)
    print(f"{path}: {len(ids)} tokens of {model.target}")


def compare(model: carve_runtime.Model, path: Path, bound: float) -> bool:
    """Print how the model differs from a reference; whether it is within ``bound``."""
    with np.load(path, allow_pickle=False) as kept:
        ids, want, target = kept["ids"].tolist(), kept["logits"], str(kept["target"])
    one = model.start()
    rows = {
        "one prompt": model.start().step(ids),
        "token by token": np.concatenate([one.step([i]) for i in ids]),
    }
    sound = True
    for name, got in rows.items():
        errors = _errors(got, want)
        same = float((got.argmax(1) == want.argmax(1)).mean())
        sound &= bool(np.median(errors) <= bound)  # false for a NaN
        print(
            f"{name}: {len(ids)} tokens beside {target}: relative error of logits "
            f"{np.median(errors):.2e} (median), {errors.max():.2e} (worst), same first token "
            f"{same:.1%}"
        )
    between = _errors(rows["token by token"], rows["one prompt"])
    print(f"one by one beside one prompt: {between.max():.2e} (worst)")
    own = _greedy(model, ids[:_PROMPT], len(ids) - _PROMPT)
    alike = next((i for i, (a, b) in enumerate(zip(own, ids, strict=True)) if a != b), len(ids))
    print(f"greedy: {alike - _PROMPT} of {len(ids) - _PROMPT} tokens until the first other one")
    return sound


def speed(model: carve_runtime.Model, rounds: int, tokens: int, length: int) -> None:
    """Print decode and prefill speeds, medians over rounds after one that is not counted."""
    size, most = model.manifest.model.vocab_size, model.max_length
    length = min(length, most - tokens - 1)
    if length < 1:
        sys.exit(f"--tokens {tokens} leave no room for a prompt: the context is {most} tokens")
    prompt = [(7919 * i + 13) % size for i in range(length)]
    found: dict[str, list[float]] = {"decode": [], "prefill": []}
    for i in range(rounds + 1):
        session = model.start()
        began = time.perf_counter()
        session.step(prompt, rows=1)
        prefill = time.perf_counter() - began
        began = time.perf_counter()
        for t in range(tokens):
            session.step([t])
        decode = time.perf_counter() - began
        if i:
            found["prefill"].append(length / prefill)
            found["decode"].append(tokens / decode)
    for name, values in found.items():
        print(f"{name}: {statistics.median(values):.1f} tokens/s ({model.target})")


def main() -> None:
    """Write a reference, or compare with one and time."""
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    a.add_argument("artifact", type=Path)
    a.add_argument("--target", help="default: the artifact's first for CUDA")
    a.add_argument("--engine-target", default="onnx-cpu", help="what --write computes with")
    a.add_argument("--write", type=Path, metavar="FILE")
    a.add_argument("--reference", type=Path, metavar="FILE")
    a.add_argument("--bound", type=float, default=3e-2)
    a.add_argument("--tokens", type=int, default=64)
    a.add_argument("--prefill", type=int, default=256)
    a.add_argument("--rounds", type=int, default=5)
    args = a.parse_args()
    if args.write:
        write(carve_runtime.load(args.artifact, target=args.engine_target), args.write, args.tokens)
        return
    names = carve_runtime.read_manifest(args.artifact).targets
    target = args.target or next((n for n in names if n.startswith("tvm:cuda")), None)
    if target is None:
        sys.exit(f"{args.artifact} has no target for CUDA")
    model = carve_runtime.load(args.artifact, target=target)
    sound = args.reference is None or compare(model, args.reference, args.bound)
    speed(model, args.rounds, args.tokens, args.prefill)
    if not sound:
        sys.exit("the logits differ by more than the bound")


if __name__ == "__main__":
    main()
