"""Proof of `carve bundle`: the same tokens and logits as torch and onnxruntime, Arm included.

Usage::

    python tools/bundle_check.py models/reference --work scratch --bits 16    # beside torch as well
    python tools/bundle_check.py out                                          # of an artifact

A checkpoint is converted here, so that the program that was emitted can be asked too; an artifact
(``--target onnx-cpu,tvm:x86_64,tvm:aarch64``) is compared with onnxruntime alone. Each target for
TVM is bundled, and its native runner generates greedily, one for another machine under qemu-user:
Debian's ``qemu-user-static`` and ``g++-aarch64-linux-gnu`` give emulator, compiler and root. Then
the prompt with what was generated goes through runner, onnxruntime and torch: ``same tokens``
counts the leading tokens that another engine would have chosen too, ``difference`` is the largest
one of all logits. The time to the first token is that from the start of the process until the first
bytes come out, the median over prompts.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import carve_runtime
import numpy as np
from carve_runtime import processor
from carve_runtime.tvm_index import read_tvm_index

import carve.targets
from carve.artifact import MANIFEST
from carve.bundle import Bundle, bundle
from carve.config import ConvertConfig
from carve.emit.tvm.names import PREFIX
from carve.pipeline import advance
from carve.report import table

TARGETS = ("onnx-cpu", "tvm:x86_64", "tvm:aarch64")
TEXT = Path(carve.__file__).parent / "data/evaluation.txt"


@contextmanager
def emitted_programs() -> Iterator[list[Any]]:
    """The programs that conversions emit meanwhile."""
    kept: list[Any] = []
    emit = carve.targets.emit_targets

    def keep(program: Any, *rest: Any) -> Any:
        kept.append(program.copy())
        return emit(program, *rest)

    carve.targets.emit_targets = keep
    try:
        yield kept
    finally:
        carve.targets.emit_targets = emit


def converted(model: Path, output: Path, args: argparse.Namespace) -> Any:
    """Convert a checkpoint; returns the program that was emitted."""
    config = ConvertConfig(
        budget=args.budget,
        effort="none",
        bits=args.bits,
        tokens=args.calibration,
        eval_tokens=args.calibration,
        targets=TARGETS,
    )
    with emitted_programs() as kept:
        advance(model, output, config)
    return kept[-1]


def torch_logits(program: Any, ids: Sequence[int]) -> np.ndarray:
    """Of the program in torch, in the arithmetic that the kernels have."""
    import torch

    from carve.arithmetic import as_emitted

    row = torch.tensor([ids])
    places = torch.arange(len(ids))[None]
    with as_emitted(program):
        logits: np.ndarray = program.run(row, places, *program.empty_cache(1))[0][0].numpy()
    return logits


def command(made: Bundle, args: argparse.Namespace) -> list[str]:
    """How the runner is started here."""
    folder = Path(made.path).resolve()
    files = [p.relative_to(folder).as_posix() for p in folder.rglob("*")]
    model = carve_runtime.read_manifest(folder).targets[made.target].model
    machine = read_tvm_index(folder, files, model).machine
    own = [str(folder / made.runner), "--threads", str(args.threads)]
    if machine == processor.machine():
        return own
    root = args.root or f"/usr/{machine}-linux-gnu"
    return [args.qemu or f"qemu-{machine}-static", "-L", root, *own]


def generated(start: list[str], prompt: str, tokens: int) -> tuple[list[int], float, float]:
    """The new tokens, seconds until the first, and tokens a second after it."""
    began = time.perf_counter()
    whole = [*start, "--prompt", prompt, "--ids-out", "--max-tokens", str(tokens)]
    with subprocess.Popen(whole, stdout=subprocess.PIPE, env={}) as process:
        assert process.stdout is not None
        first = os.read(process.stdout.fileno(), 1)
        until = time.perf_counter() - began
        rest = process.stdout.read()
        took = time.perf_counter() - began - until
    if process.returncode:
        raise SystemExit(f"{start} ended with {process.returncode}")
    ids = [int(n) for n in (first + rest).split()]
    return ids, until, (len(ids) - 1) / took


def runner_logits(start: list[str], ids: Sequence[int], vocabulary: int) -> np.ndarray:
    """Of the runner for a whole sequence."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "logits"
        given = ["--ids", " ".join(map(str, ids)), "--logits", str(path)]
        subprocess.run([*start, *given], check=True, env={})
        return np.fromfile(path, np.float32).reshape(-1, vocabulary)


def agreement(logits: np.ndarray, ids: Sequence[int], new: int) -> int:
    """How many of the last ``new`` ids are the most likely ones, until one is not."""
    chosen = logits[len(ids) - new - 1 : -1].argmax(1)
    same = chosen == np.asarray(ids[len(ids) - new :])
    return int(new if same.all() else same.argmin())


def prompts(count: int) -> list[str]:
    """Beginnings of paragraphs of the held-out text."""
    parts = [p.replace("\n", " ") for p in TEXT.read_text(encoding="utf-8").split("\n\n")]
    long = [" ".join(p.split()[:12]) for p in parts if len(p.split()) >= 12]
    return long[:: max(1, len(long) // count)][:count]


def check(
    model: carve_runtime.Model, program: Any, made: Bundle, args: argparse.Namespace
) -> list[list[str]]:
    """The rows of one bundle."""
    start = command(made, args)
    firsts, speeds = [], []
    same: dict[str, list[int]] = {}
    gaps: dict[str, list[float]] = {}
    total = 0
    for prompt in prompts(args.prompts):
        new, first, speed = generated(start, prompt, args.tokens)
        ids = [*model.tokenizer.encode(prompt).ids, *new]
        total += len(new)
        firsts.append(first)
        speeds.append(speed)
        have = runner_logits(start, ids, model.manifest.model.vocab_size)
        others = {"onnxruntime": model.logits(ids)}
        if program is not None:
            others["torch"] = torch_logits(program, ids)
        for name, want in others.items():
            same.setdefault(name, []).append(agreement(want, ids, len(new)))
            gaps.setdefault(name, []).append(float(np.abs(have - want).max()))
    rows = [
        ["program, MB", f"{made.program_bytes / 1e6:.2f}"],
        ["weights, index and tokenizer, MB", f"{made.model_bytes / 1e6:.2f}"],
        ["first token after, s", f"{statistics.median(firsts):.2f}"],
        ["tokens/s after it", f"{statistics.median(speeds):.1f}"],
    ]
    for name in same:
        rows.append([f"same tokens as {name}", f"{sum(same[name])} of {total} {same[name]}"])
        rows.append([f"largest difference of a logit, {name}", f"{max(gaps[name]):.1e}"])
    how = "under " + start[0] if start[0].startswith("qemu") else "here"
    return [["figure", f"{made.target}, {how}"], *rows]


def main() -> None:
    """Bundle, run, compare, and print the table."""
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    a.add_argument("path", type=Path, help="a checkpoint, or an artifact")
    a.add_argument("--work", type=Path, help="where artifact and bundles go (default: temporary)")
    a.add_argument("--budget", type=float, default=0.6)
    a.add_argument("--bits", type=int, default=16)
    a.add_argument("--calibration", type=int, default=6000, help="tokens of the conversion")
    a.add_argument("--prompts", type=int, default=3)
    a.add_argument("--tokens", type=int, default=128)
    a.add_argument("--threads", type=int, default=1)
    a.add_argument("--wheels", type=Path, help="TVM's wheels for the other machine")
    a.add_argument("--root", help="the other machine's root, for qemu (default: Debian's)")
    a.add_argument("--qemu", help="the emulator (default: qemu-MACHINE-static)")
    args = a.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        work = args.work or Path(scratch)
        work.mkdir(exist_ok=True)
        program, source = None, args.path
        if not (source / MANIFEST).is_file():
            source = work / "artifact"
            program = converted(args.path, source, args)
        model = carve_runtime.load(source, target="onnx-cpu", threads=args.threads)
        columns, needs = [], []
        for name in model.manifest.targets:
            if name.startswith(PREFIX):
                folder = work / name.replace(":", "-")
                made = bundle(source, name, folder, None if name == _own() else args.wheels)
                columns.append(check(model, program, made, args))
                needs.append(f"{name} needs {made.needs}")
    print(table([[rows[0][0], *(row[1] for row in rows)] for rows in zip(*columns, strict=True)]))
    print("\n".join(needs))


def _own() -> str:
    return f"{PREFIX}{processor.machine()}"


if __name__ == "__main__":
    main()
