"""Plan: what a conversion will take and whether it fits, and where experts would go."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from carve.artifact import Artifact, disk_free
from carve.config import ConvertConfig, build
from carve.errors import UserError
from carve.estimate import room_of, seconds_of
from carve.passes.place import PlaceConfig
from carve.placement.devices import Devices, read_devices
from carve.placement.place import place
from carve.placement.problem import scores
from carve.placement.sizes import Sizes, planned_sizes
from carve.placement.trace import Trace

TRACE, SIZES = "placement/trace.npz", "placement/sizes.json"


def place_again(path: Path, devices: str, settings: PlaceConfig) -> dict[str, Any]:
    """Place the experts of an artifact that was converted with devices, by the trace it holds.

    Raises:
        UserError: nothing fits, and which constraint says so.
    """
    sizes, trace = of_artifact(path)
    return {"feasible": True, **_placed(read_devices(devices), sizes, trace, settings)}


def _placed(
    described: Devices, sizes: Sizes, trace: Trace, settings: PlaceConfig
) -> dict[str, Any]:
    problem = sizes.problem(described, trace, context=settings.context, batch=settings.batch)
    placed = place(problem, settings)
    homes = placed.homes
    link = {n: float(t) for n, t in zip(described.names, problem.trip, strict=True)}
    return {
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


def foresee(
    path: Path,
    config: ConvertConfig,
    output: Path,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Any]:
    """What converting a checkpoint will take on this machine, before anything long starts.

    Args:
        path: a Hugging Face directory.
        config: the settings.
        output: where the artifact would go.
        clock: what seconds are measured by.

    Returns:
        ``feasible`` and ``reasons`` why not; ``parameters``, ``budget``; ``steps`` with what each
        does and its ``seconds``; ``seconds`` in all; ``peak_memory``, ``output`` and ``state``
        (``disk``: both) in bytes beside ``memory_free`` and ``disk_free``. With devices also where
        experts would go, taken to be equally busy, for nothing is calibrated.

    Raises:
        UserError: the request cannot be served, or nothing fits on the devices.
    """
    import torch

    from carve.engine_form import check_source
    from carve.lineup import passes_of
    from carve.prepare import prepare
    from carve.rates import Rates
    from carve.room import lacking, memory_free, resident, scene_of
    from carve.settings import of_pass
    from carve.targets import check_targets, check_translation, load_engines

    check_targets(config.targets)
    passes = passes_of(config)
    described = None if config.devices is None else read_devices(config.devices)
    began = clock()
    given = prepare(path, config, clock)
    load_engines(config.targets)
    loading = clock() - began
    program = given.program
    check_source(program, config.targets)
    check_translation(program, config.targets, config.nominal_bits)
    scene = scene_of(program, config, given.asked, given.batches, given.held, path)
    own = resident()  # before rates are measured
    names = [p.name for p in passes]
    rates = Rates.measure(scene, given.batches, names, given.tracing, clock)
    seconds = {"load": loading, **seconds_of(scene, config, passes, rates)}
    room = room_of(scene, config, passes, own, seconds)
    what = {p.name: of_pass(p.name)[0] for p in passes}
    reasons = lacking(room, output)
    placed: dict[str, Any] = {}
    if described is not None:
        chosen = {"seconds": 5.0, **config.passes.get("place", {}), "devices": config.devices}
        settings = build(PlaceConfig, "place", chosen)
        sizes, trace = planned_sizes(program, scene.splits, config.nominal_bits)
        placed = _placed(described, sizes, trace, settings)
    return {
        "feasible": not reasons,
        "reasons": reasons,
        "parameters": program.num_parameters,
        "macs": program.dense_macs,
        "budget": config.budget,
        "ffn_active": config.ffn_active,
        "tokens": asdict(scene.tokens),
        "steps": [{"name": n, "does": what.get(n, ""), "seconds": s} for n, s in seconds.items()],
        "passes": [p.name for p in passes],
        "seconds": sum(seconds.values()),
        "threads": torch.get_num_threads(),
        "peak_memory": room.memory,
        "memory_free": memory_free(),
        "output": room.output,
        "state": room.state,
        "disk": room.disk,
        "disk_free": float(disk_free(output)),
        **placed,
    }
