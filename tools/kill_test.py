"""Kill conversions with SIGKILL at random moments, resume each, and compare the artifacts.

Usage::

    python tools/kill_test.py MODEL --kills 50 -- --effort layer --set convert.tokens=2000

What follows ``--`` goes to ``carve convert``. Two conversions run undisturbed first, one in this
process and one in a process of its own: their digest (`carve.artifact.Artifact.digest`) is what
every other one has to come to, and the second's duration is what the moments are drawn from. Every
run is a process of its own, forked from this one, so that moments fall into the conversion and not
into imports. After every kill the output is looked at: it may not be there, or has to be a whole
artifact, every file as its manifest has it. Exits with 1 if anything differs.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import onnxruntime  # noqa: F401  (imported before forking)
import torch
import torch.onnx._internal.exporter._core
import transformers  # noqa: F401

from carve import cli, pipeline
from carve.artifact import Artifact, sha256
from carve.report import table
from carve.state_folder import state_path


def in_child(work: Callable[[], None], log: Path) -> int:
    """Run ``work`` in a forked process; gives its id."""
    child = os.fork()
    if child:
        return child
    try:
        with log.open("w") as f:
            os.dup2(f.fileno(), 1)
            os.dup2(f.fileno(), 2)
            work()
        os._exit(0)
    except BaseException as e:  # the process must not come back into the caller's code
        sys.stderr.write(f"{type(e).__name__}: {e}\n")
        sys.stderr.flush()
        os._exit(1)


def convert(model: str, output: Path, arguments: Sequence[str], stage: Path) -> None:
    """``carve convert`` that notes in ``stage`` what it is at."""

    def progress(items: Sequence[Any], label: str) -> Iterator[Any]:
        for i, item in enumerate(items):
            stage.write_text(f"{label} {i + 1}/{len(items)}")
            yield item
        stage.write_text(f"after {label}")

    cli._progress = progress
    argv = ["convert", model, "-o", str(output), "--json", *arguments]
    with contextlib.redirect_stdout(io.StringIO()) as answer:
        code = cli.main(argv)
    if code:
        raise RuntimeError(answer.getvalue())


def whole(output: Path) -> bool:
    """Whether an artifact is exactly what its manifest says."""
    manifest = json.loads((output / "manifest.json").read_text())
    files = {p.relative_to(output).as_posix() for p in output.rglob("*") if p.is_file()}
    same = all(sha256(output / n) == h for n, h in manifest["files"].items())
    return same and files == {*manifest["files"], "manifest.json"}


class Trial:
    """Conversions of one model with the same arguments, below one folder."""

    def __init__(self, model: str, arguments: Sequence[str], root: Path) -> None:
        self.model, self.arguments, self.root = model, arguments, root
        self.log, self.stage = root / "log", root / "stage"

    def start(self, output: Path, *more: str) -> int:
        self.stage.write_text("starting")
        return in_child(
            lambda: convert(self.model, output, [*self.arguments, *more], self.stage), self.log
        )

    def finish(self, child: int) -> float:
        """Wait for a run to end well; gives the seconds."""
        began = time.monotonic()
        _, status = os.waitpid(child, 0)
        if status:
            raise SystemExit(f"a conversion failed:\n{self.log.read_text()}")
        return time.monotonic() - began

    def kill_after(self, child: int, seconds: float) -> bool:
        """Kill a run; False where it ended before."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if os.waitpid(child, os.WNOHANG)[0]:
                return False
            time.sleep(0.005)
        os.kill(child, signal.SIGKILL)
        return os.WIFSIGNALED(os.waitpid(child, 0)[1])

    def once(self, output: Path, moment: float) -> tuple[list[str], bool] | None:
        """Kill at a moment, resume; a row, and whether all is well. None: it ended before."""
        if not self.kill_after(self.start(output), moment):
            return None
        at = self.stage.read_text()
        finished = output.exists()
        half = finished and not whole(output)
        states = sorted(p.stem for p in state_path(output).glob("[0-9]*.json"))
        seconds = self.finish(self.start(output, "--resume"))
        digest = Artifact.open(output).digest()
        left = [p.name for p in output.parent.iterdir() if p.name.startswith(f".{output.name}.")]
        well = digest == self.want and not half and not left and whole(output)
        last = states[-1] if states else "-"
        words = "half an artifact" if half else "whole" if finished else "nothing"
        row = [f"{moment:.1f}", at, last, words, f"{seconds:.1f}", digest[:12]]
        return [*row, "same" if well else f"DIFFERS {' '.join(left)}"], well

    def reference(self) -> float:
        """The undisturbed conversions; gives the second's seconds."""
        output = self.root / "reference"
        convert(self.model, output, self.arguments, self.stage)
        self.want = Artifact.open(output).digest()
        seconds = self.finish(self.start(output))
        if Artifact.open(output).digest() != self.want:
            raise SystemExit("two undisturbed conversions differ")
        return seconds


def main() -> int:
    argv = sys.argv[1:]
    cut = argv.index("--") if "--" in argv else len(argv)
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    p.add_argument("model")
    p.add_argument("--kills", type=int, default=50)
    p.add_argument("--seed", type=int, default=0, help="of the moments")
    args = p.parse_args(argv[:cut])
    arguments = argv[cut + 1 :]
    if "--budget" not in arguments:
        arguments = ["--budget", "0.7", *arguments]
    assert pipeline  # imported for the children
    torch.set_num_threads(1)
    draw = random.Random(args.seed)
    rows = [["", "killed after s", "at", "last state", "output then", "resumed s", "digest", ""]]
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        trial = Trial(args.model, arguments, Path(folder))
        seconds = trial.reference()
        sys.stderr.write(f"undisturbed: {seconds:.1f} s, digest {trial.want[:12]}\n")
        count = 0
        while count < args.kills:
            found = trial.once(trial.root / f"out{count}", draw.uniform(0.0, seconds))
            if found is None:
                continue
            count += 1
            wrong += not found[1]
            rows.append([str(count), *found[0]])
            sys.stderr.write("  ".join(rows[-1]) + "\n")
    print(table(rows))
    print(f"{count} kills, {wrong} that differ; undisturbed {seconds:.1f} s")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
