"""Plan: where experts would go, before anything long starts or after a conversion."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from carve.artifact import MANIFEST, Artifact
from carve.errors import UserError
from carve.passes.place import PlaceConfig
from carve.placement.devices import read_devices
from carve.placement.place import place
from carve.placement.problem import scores
from carve.placement.sizes import Sizes, planned_sizes
from carve.placement.trace import Trace

TRACE, SIZES = "placement/trace.npz", "placement/sizes.json"


def plan(
    path: Path, devices: str, budget: float, bits: int, settings: PlaceConfig
) -> dict[str, Any]:
    """Place the experts of a checkpoint that is to be carved, or of an artifact.

    A checkpoint's experts are taken to be equally busy, for nothing is calibrated; an artifact that
    was converted with devices holds a trace, and is placed by it.

    Raises:
        UserError: nothing fits, and which constraint says so.
    """
    described = read_devices(devices)
    sizes, trace = (
        of_artifact(path) if (path / MANIFEST).is_file() else _of_model(path, budget, bits)
    )
    problem = sizes.problem(described, trace, context=settings.context, batch=settings.batch)
    placed = place(problem, settings)
    homes = placed.homes
    link = {n: float(t) for n, t in zip(described.names, problem.trip, strict=True)}
    return {
        "feasible": True,
        "host_bytes": problem.host_bytes,
        "expert_bytes": float(sum(b.sum() for b in problem.nbytes)),
        "memory": problem.memory(homes),
        "round_trip_seconds": link,
        "scores": scores(problem, homes),
        "placement": placed.as_dict(),
    }


def of_artifact(path: Path) -> tuple[Sizes, Trace]:
    """Sizes and trace that an artifact holds.

    Raises:
        UserError: it holds none, or they cannot be trusted.
    """
    from carve_runtime.manifest import read_manifest, resolve_inside

    from carve.files import read_json

    manifest = read_manifest(path)
    if TRACE not in manifest.files or SIZES not in manifest.files:
        raise UserError(
            "placement",
            f"{path} holds no trace",
            "convert with --devices, or plan for the checkpoint",
        )
    root = Artifact.open(path).path.resolve()
    trace = Trace.read(resolve_inside(root, TRACE))
    return Sizes.parse(read_json(resolve_inside(root, SIZES)), trace), trace


def _of_model(path: Path, budget: float, bits: int) -> tuple[Sizes, Trace]:
    from carve.budget import make_request, plan_widths
    from carve.capture import capture_checkpoint
    from carve.config import ConvertConfig

    program = capture_checkpoint(path)
    config = ConvertConfig(budget=budget)
    request = make_request(program, budget, None, config.shared_share, None, None)
    return planned_sizes(program, plan_widths(program, request, {}), bits)
