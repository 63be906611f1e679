"""What ``carve plan`` foresees beside what the conversion then takes: time, memory and disk.

Usage::

    python tools/plan_check.py                       # requests of tiny, reference and MiniLM
    python tools/plan_check.py --only reference      # those whose name holds the word
    python tools/plan_check.py MODEL -- --budget 0.6 --bits 8

Each request is planned and converted in a process of its own, with one thread, and times are of the
processor, so that other work on the machine weighs little. ``ratio`` is measured over predicted; a
plan is right where it lies between 0.7 and 1.3. Steps are shown with ``--steps``. Exits with 1 if
time in all, memory or disk of a request is not right.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from carve.report import table

ROOT = Path(__file__).resolve().parents[1]
SHORT = ["--set", "convert.tokens=4000", "--set", "convert.eval_tokens=1000"]
EXACT = ["--set", "convert.exact=true"]
REQUESTS: list[tuple[str, str, list[str]]] = [
    ("tiny none", "tiny", ["--effort", "none"]),
    ("tiny short", "tiny", SHORT),
    ("tiny split", "tiny", [*SHORT, "--target", "onnx-cpu,onnx-split"]),
    ("tiny tvm", "tiny", [*SHORT, "--effort", "none", "--target", "tvm:x86_64"]),
    ("reference none 16", "reference", ["--effort", "none", "--bits", "16"]),
    ("reference none 8", "reference", ["--effort", "none", "--bits", "8"]),
    ("reference none 4", "reference", ["--effort", "none"]),
    ("reference exact", "reference", [*EXACT, "--bits", "16"]),
    ("reference short", "reference", SHORT),
    ("reference split", "reference", [*SHORT, "--effort", "none", "--target", "onnx-split"]),
    ("reference skip", "reference", [*SHORT, "--effort", "none", "--skip", "0.1"]),
    ("reference mixed", "reference", [*SHORT, "--effort", "none", "--bits", "3"]),
    ("reference hf", "reference", [*SHORT, "--effort", "none", "--target", "hf"]),
    ("reference layer", "reference", []),
    ("minilm none", "minilm", ["--effort", "none"]),
    ("minilm short", "minilm", SHORT),
]


def cpu() -> float:
    """Processor seconds of this process and of those it waited for."""
    used = (resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(u.ru_utime + u.ru_stime for u in used)


def folder_size(path: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file())


def run_plan(model: str, output: str, arguments: Sequence[str]) -> dict[str, Any]:
    """The plan, by the processor's clock."""
    from carve import plan
    from carve.arguments import parser
    from carve.cli import _config_of

    config = _config_of(parser().parse_args(["plan", model, *arguments]))
    return plan.foresee(Path(model), config, Path(output), clock=cpu)


class Steps:
    """Processor time by step, of functions that are wrapped; inner ones count for themselves."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._open: list[list[float]] = []

    def wrap(self, holder: Any, name: str, step: str) -> None:
        inner: Callable[..., Any] = getattr(holder, name)

        def timed(*args: Any, **more: Any) -> Any:
            with self.during(step):
                return inner(*args, **more)

        setattr(holder, name, timed)

    @contextlib.contextmanager
    def during(self, step: str) -> Any:
        began = cpu()
        self._open.append([0.0])
        try:
            yield
        finally:
            took = cpu() - began
            (within,) = self._open.pop()
            self.seconds[step] = self.seconds.get(step, 0.0) + took - within
            if self._open:
                self._open[-1][0] += took


def run_convert(model: str, output: str, arguments: Sequence[str]) -> dict[str, Any]:
    """What a conversion takes."""
    from carve import calibration, cli, evaluate, passbase, pipeline, prepare, targets
    from carve.state import PassStates, size_of

    state: list[int] = []
    discard, sweep = pipeline.discard, PassStates._sweep

    def at_last(folder: Path) -> None:
        state.append(size_of(folder))
        discard(folder)

    def at_sweep(states: PassStates) -> None:
        state.append(size_of(states.folder))  # what was written beside what goes now
        sweep(states)

    pipeline.discard, PassStates._sweep = at_last, at_sweep
    for module in (passbase, targets, pipeline):
        module.time = SimpleNamespace(monotonic=cpu)
    steps = Steps()
    steps.wrap(prepare, "prepare", "load")
    steps.wrap(calibration.SiteInputs, "collect", "calibration")
    steps.wrap(evaluate.Evaluator, "__init__", "dense model")
    steps.wrap(passbase.PassManager, "__call__", "after each pass")
    steps.wrap(pipeline._Conversion, "run", "held-out text")
    answer = io.StringIO()
    began = cpu()
    with contextlib.redirect_stdout(answer):
        code = cli.main(["convert", model, "-o", output, "--json", *arguments])
    found = json.loads(answer.getvalue())
    if code:
        raise SystemExit(f"{found}")
    seconds = steps.seconds
    for p in found["passes"]:
        seconds[p["name"]] = p["seconds"]
        around = "held-out text" if p["name"].startswith("emit ") else "after each pass"
        seconds[around] -= p["seconds"]
    return {
        "seconds": seconds,
        "total": cpu() - began,
        "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "peaks": {p["name"]: p["peak_rss_mb"] for p in found["passes"]},
        "output": folder_size(Path(output)),
        "state": max(state, default=0),
    }


def source_of(name: str, folder: Path) -> str:
    """A model that requests name, or the path itself."""
    if name == "tiny":
        sys.path.insert(0, str(ROOT / "tests"))
        from tiny_models import save_checkpoint

        return str(save_checkpoint(folder / "tiny"))
    if name == "minilm":
        sys.path.insert(0, str(ROOT / "tools"))
        from quality import minilm_folder

        return str(minilm_folder())
    return str(ROOT / "models" / name) if name == "reference" else name


def child(kind: str, model: str, output: Path, arguments: Sequence[str]) -> dict[str, Any]:
    """Run `run_plan` or `run_convert` in a process of its own."""
    argv = [sys.executable, __file__, f"--{kind}", model, "-o", str(output), "--", *arguments]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run(argv, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(argv)}\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def compare(
    name: str, source: str, arguments: Sequence[str], folder: Path, known: dict[str, Any]
) -> dict[str, Any]:
    """One request, planned and converted, unless ``known`` has what converting it took."""
    if not {"--budget", "--ffn-active", "--recipe"} & {*arguments}:
        # The tiny model cannot be carved below 0.61.
        arguments = ["--budget", "0.7", *arguments]
    output = folder / name.replace(" ", "-")
    plan = child("plan", source, output, arguments)
    key = " ".join([name, *arguments])
    real = known.get(key) or child("convert", source, output, arguments)
    known[key] = real
    steps = {s["name"]: s["seconds"] for s in plan["steps"]}
    return {
        "name": name,
        "arguments": list(arguments),
        "seconds": (plan["seconds"], real["total"]),
        "memory": (plan["peak_memory"], real["memory"]),
        "output": (plan["output"], real["output"]),
        "state": (plan["state"], real["state"]),
        "disk": (plan["disk"], real["output"] + real["state"]),
        "steps": {
            n: (steps.get(n, 0.0), real["seconds"].get(n, 0.0))
            for n in dict.fromkeys([*steps, *real["seconds"]])
        },
        "peaks": real["peaks"],  # MB after each pass
    }


def row(found: dict[str, Any]) -> list[str]:
    """Predicted, measured and their ratio, by what is foreseen."""
    cells = [found["name"]]
    for key, unit, form in (
        ("seconds", 1.0, ".1f"),
        ("memory", 1e6, ".0f"),
        ("output", 1e6, ".1f"),
        ("state", 1e6, ".1f"),
    ):
        said, was = found[key]
        ratio = f"{was / said:.2f}" if said else "-"
        cells += [format(said / unit, form), format(was / unit, form), ratio]
    return cells


def right(found: dict[str, Any]) -> bool:
    """Whether the plan lies within 30 %."""
    return all(0.7 <= found[k][1] / found[k][0] <= 1.3 for k in ("seconds", "memory", "disk"))


def main() -> int:
    argv = sys.argv[1:]
    cut = argv.index("--") if "--" in argv else len(argv)
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    p.add_argument("model", nargs="?", help="tiny, reference, minilm or a folder")
    p.add_argument("--only", default="", help="requests whose name holds this")
    p.add_argument("--steps", action="store_true", help="by step as well")
    p.add_argument("--json", type=Path, help="keep what conversions took here, and find it again")
    p.add_argument("-o", "--output", default="out", help=argparse.SUPPRESS)
    p.add_argument("--plan", action="store_true", help=argparse.SUPPRESS)
    p.add_argument("--convert", action="store_true", help=argparse.SUPPRESS)
    args = p.parse_args(argv[:cut])
    given = argv[cut + 1 :]
    if args.plan or args.convert:
        work = run_plan if args.plan else run_convert
        print(json.dumps(work(args.model, args.output, given)))
        return 0
    requests = [("given", args.model, given)] if args.model else REQUESTS
    known: dict[str, Any] = {}
    if args.json and args.json.is_file():
        known = json.loads(args.json.read_text())
    count = wrong = 0
    heads = ["s", "MB memory", "MB output", "MB state"]
    rows = [["", *(c for h in heads for c in (f"{h} foreseen", "taken", "ratio"))]]
    with tempfile.TemporaryDirectory() as folder:
        for name, model, arguments in requests:
            if args.only not in name:
                continue
            source = source_of(model, Path(folder))
            found = compare(name, source, arguments, Path(folder), known)
            count += 1
            wrong += not right(found)
            rows.append(row(found))
            sys.stderr.write("  ".join(rows[-1]) + "\n")
            if args.steps:
                lines = [["", "foreseen", "taken"]]
                lines += [[n, f"{a:.2f}", f"{b:.2f}"] for n, (a, b) in found["steps"].items()]
                sys.stderr.write(table(lines) + f"\n{found['peaks']}\n")
            if args.json:
                args.json.write_text(json.dumps(known))
    print(table(rows))
    print(f"{count} requests, {wrong} beyond 30 %")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
