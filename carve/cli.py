"""The command line. Nothing heavy is imported before it is needed."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from carve.arguments import parser
from carve.errors import CarveError, UserError

if TYPE_CHECKING:
    from carve.config import ConvertConfig
    from carve.pipeline import Stopped

# onnxruntime reports usage by default; a compiler of other people's models does not.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
log = logging.getLogger("carve")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    args = parser().parse_args(argv)
    logging.basicConfig(
        level=logging.DEBUG if args.verbose else logging.WARNING,
        format="%(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    for name in ("torch", "onnx_ir", "onnxscript", "matplotlib"):
        logging.getLogger(name).setLevel(logging.WARNING)
    if not args.verbose:  # what becomes of stored states is said in any case
        for name in ("carve.state", "carve.state_folder"):
            logging.getLogger(name).setLevel(logging.INFO)
    try:
        result = _COMMANDS[args.command](args)
    except Exception as e:
        failure = _as_error(e)
        if failure is None:
            raise
        if args.json:
            _out(
                json.dumps(
                    {
                        "error": {
                            "code": failure.code,
                            "message": failure.message,
                            "hint": failure.hint,
                        }
                    }
                )
            )
        hint = f"\n  {failure.hint}" if failure.hint else ""
        sys.stderr.write(f"carve {args.command}: {failure.message}{hint}\n")
        return failure.exit_code
    except KeyboardInterrupt:
        sys.stderr.write("carve: interrupted\n")
        return 130
    if args.json:
        _out(json.dumps(result))
    return 0


def _as_error(e: Exception) -> CarveError | None:
    """The error a user sees; None for what is a defect and deserves its traceback."""
    if isinstance(e, CarveError):
        return e
    if type(e).__module__.startswith("carve_runtime"):
        failure = CarveError(
            getattr(e, "code", "runtime"), getattr(e, "message", str(e)), getattr(e, "hint", "")
        )
        if type(e).__name__ in ("ArtifactError", "RequestError"):
            failure.exit_code = 2
        return failure
    if isinstance(e, MemoryError):
        return CarveError("memory", "out of memory", "close other programs or use a larger machine")
    return None


def _out(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _progress(items: Sequence[Any], label: str) -> Iterator[Any]:
    """A bar on a terminal, a line otherwise, always on standard error."""
    if not sys.stderr.isatty():
        sys.stderr.write(f"{label} ({len(items)})\n")
        yield from items
        return
    from tqdm import tqdm  # type: ignore[import-untyped]

    yield from tqdm(items, desc=label, leave=False, file=sys.stderr)


def _config_of(args: argparse.Namespace) -> ConvertConfig:
    """The settings that recipe and arguments come to."""
    from carve.config import apply_settings, from_table, read_recipe

    table = read_recipe(args.recipe) if args.recipe else {}
    apply_settings(table, args.settings)
    general = table.setdefault("convert", {})
    given = {
        "budget": args.budget,
        "ffn_active": args.ffn_active,
        "effort": args.effort,
        "skip": args.skip,
        "bits": args.bits,
        "size": args.size,
        "reads": args.reads,
        "targets": args.target.split(",") if args.target else None,
        "calibration": args.calibration,
        "devices": args.devices,
        "seed": args.seed,
    }
    general.update({k: v for k, v in given.items() if v is not None})
    return from_table(table)


def _convert(args: argparse.Namespace) -> dict[str, Any]:
    config = _config_of(args)
    if args.dump_recipe:
        return _dump(config, as_json=args.json)
    model = Path(args.model)
    output = Path(args.output or f"{model.name}-carved")
    from carve.pipeline import Stopped, advance
    from carve.state_folder import Course

    course = Course(args.resume, args.start, args.until, args.keep_state)
    artifact = advance(model, output, config, progress=_progress, course=course)
    if isinstance(artifact, Stopped):
        return _stopped(artifact, as_json=args.json)
    r = artifact.report
    result = {
        "artifact": str(output),
        "digest": artifact.manifest["digest"],
        **{
            k: r[k] for k in ("budget", "ffn_active", "seconds", "peak_rss_mb", "quality", "passes")
        },
    }
    if not args.json:
        from carve.report import render

        _out(render(r))
        _out(f"\n{output}")
    return result


def _dump(config: ConvertConfig, *, as_json: bool) -> dict[str, Any]:
    """The resolved recipe."""
    import tomllib

    from carve.lineup import passes_of
    from carve.recipe import resolved

    text = resolved(config, passes_of(config))
    if not as_json:
        _out(text.rstrip("\n"))
    return tomllib.loads(text)


def _stopped(stopped: Stopped, *, as_json: bool) -> dict[str, Any]:
    """What is said of a conversion that stopped where it was asked to."""
    from dataclasses import asdict

    from carve.state import size_of

    size = size_of(stopped.folder)
    if not as_json:
        from carve.report import pass_table

        _out(pass_table([asdict(p) for p in stopped.passes]))
        _out(
            f"\nstopped after {stopped.after}; --resume goes on from {stopped.folder} "
            f"({size / 1e6:.1f} MB)"
        )
    return {
        "stopped_after": stopped.after,
        "state": str(stopped.folder),
        "state_bytes": size,
        "passes": [asdict(p) for p in stopped.passes],
    }


def _run(args: argparse.Namespace) -> dict[str, Any]:
    import carve_runtime

    prompt = args.prompt if args.prompt is not None else sys.stdin.read()
    with carve_runtime.load(
        args.artifact,
        engine=args.engine,
        threads=args.threads,
        memory=args.memory,
        shards=args.shards,
        policy=args.policy,
        prefetch=not args.no_prefetch,
    ) as model:
        stream = model.stream(
            prompt,
            max_new_tokens=args.max_tokens,
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            seed=args.seed,
            gates=args.gates,
            stats=args.stats,
        )
        while True:
            try:
                piece = next(stream)
            except StopIteration as end:
                done = end.value
                break
            if not args.json:
                sys.stdout.write(piece)
                sys.stdout.flush()
        experts = model.expert_stats if args.stats else None
    if not args.json:
        _out("")
        sys.stderr.write(
            f"{len(done.token_ids)} tokens, first after {done.first_token_s:.2f} s, "
            f"{done.tokens_per_s:.1f} tokens/s\n"
        )
    stats = done.gate_stats
    if not args.json and (stats is not None or experts is not None):
        from carve.report import figures, gate_table

        if stats is not None and (stats.as_dict()["blocks"] or experts is None):
            sys.stderr.write(gate_table(stats.as_dict()) + "\n")
        if experts is not None:
            sys.stderr.write(figures(experts.as_dict()) + "\n")
    return {
        **({} if stats is None else {"gates": stats.as_dict()}),
        **({} if experts is None else {"experts": experts.as_dict()}),
        "text": done.text,
        "tokens": len(done.token_ids),
        "tokens_per_s": done.tokens_per_s,
        "first_token_s": done.first_token_s,
    }


def _eval(args: argparse.Namespace) -> dict[str, Any]:
    from carve.measure import evaluate_artifact

    result = evaluate_artifact(
        Path(args.artifact), args.text or (), args.dense, args.tokens, _progress, args.engine
    )
    if not args.json:
        from carve.report import figures

        _out(figures(result))
    return result


def _bench(args: argparse.Namespace) -> dict[str, Any]:
    from carve.measure import bench_artifact

    result = bench_artifact(
        Path(args.artifact),
        dense=args.dense,
        engine=args.engine,
        threads=args.threads,
        repeats=args.repeats,
        tokens=args.tokens,
        context=args.context,
        prefill=args.prefill,
        progress=_progress,
    )
    if not args.no_record:
        from carve.report.command import record_speed

        sys.stderr.write(record_speed(args.artifact, result))
    if not args.json:
        from carve.report import bench_table

        _out(bench_table(result))
    return result


def _plan(args: argparse.Namespace) -> dict[str, Any]:
    from carve.artifact import MANIFEST
    from carve.config import apply_settings, build
    from carve.passes.place import PlaceConfig
    from carve.plan import foresee, place_again
    from carve.report.plan import plan_text

    path = Path(args.path)
    if (path / MANIFEST).is_file():
        table: dict[str, Any] = {}
        apply_settings(table, args.settings)
        if args.devices is None or any(section != "place" for section in table):
            raise UserError(
                "config",
                f"{path} is converted: --devices D.toml and settings of place can place it anew",
            )
        settings = build(PlaceConfig, "place", {"seconds": 5.0, **table.get("place", {})})
        result = place_again(path, args.devices, settings)
    else:
        if args.budget is None and args.ffn_active is None and args.recipe is None:
            args.budget = 0.6
        output = Path(args.output or f"{path.name}-carved")
        result = foresee(path, _config_of(args), output)
    if not args.json:
        _out(plan_text(result))
    return result


def _report(args: argparse.Namespace) -> dict[str, Any]:
    from carve.report.command import compare, show

    if args.diff is not None:
        result, text = compare(args.diff, args.artifact, args.html)
    else:
        result, text = show(args.artifact, args.html)
    if not args.json:
        _out(text)
    return result


def _bundle(args: argparse.Namespace) -> dict[str, Any]:
    from carve.bundle import bundle

    source = Path(args.artifact)
    output = Path(args.output or f"{source.resolve().name}-bundle")
    made = bundle(source, args.target, output, args.wheels)
    if made.reason:
        what = "ids in, ids out" if made.runner else "no native runner"
        sys.stderr.write(f"{what}: {made.reason}\n")
    if not args.json:
        from carve.report import figures

        _out(figures(made.as_dict()))
    return made.as_dict()


def _list(args: argparse.Namespace) -> dict[str, Any]:
    from carve.config import PASS_NAMES, target_names

    if args.what == "targets":
        if not args.json:
            _out("\n".join(target_names()))
        return {"targets": list(target_names())}
    from carve.settings import of_pass

    found = {name: of_pass(name) for name in PASS_NAMES}
    if not args.json:
        for name, (what, settings) in found.items():
            _out(f"{name}: {what}")
            for s in settings:
                _out(f"    {s.name} = {json.dumps(s.default)}: {s.about}")
    return {
        "passes": list(PASS_NAMES),
        "settings": {
            name: {s.name: {"default": s.default, "about": s.about} for s in settings}
            for name, (_, settings) in found.items()
        },
    }


_COMMANDS = {
    "convert": _convert,
    "run": _run,
    "eval": _eval,
    "bench": _bench,
    "bundle": _bundle,
    "plan": _plan,
    "report": _report,
    "list": _list,
}

if __name__ == "__main__":
    sys.exit(main())
