"""Placements beside one another: carve's programmes and the placers without a solver.

Usage::

    python tools/placement.py                              # synthetic traces, the two sizes
    python tools/placement.py --artifact out --devices D.toml   # the trace of a conversion

A trace's one half places, the other half scores: seconds a token for a batch (throughput), seconds
of one token alone (latency), pairs of experts in adjacent layers on different devices (hops). The
synthetic traces have popular experts (Dirichlet) and a Markov chain between layers; the four
devices and their links are those of ``DEVICES``, their memory scaled to ``--memory`` times what the
experts need.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))

from placement_baselines import BASELINES

from carve.errors import CarveError
from carve.placement.devices import Devices, parse_devices, read_devices
from carve.placement.place import METHODS, PlaceSettings, place
from carve.placement.problem import Homes, Problem, scores
from carve.placement.table import SHOWN
from carve.placement.trace import Trace
from carve.plan import of_artifact
from carve.report import table

DEVICES = {
    "device": [
        {"name": "laptop", "preset": "laptop"},
        {"name": "jetson", "preset": "jetson-orin-nano"},
        {"name": "phone", "preset": "phone"},
        {"name": "pi", "preset": "raspberry-pi-5"},
    ],
    "link": [{"between": ["*", "*"], "preset": "10g-ethernet"}],
}
SIZES = {
    "32 x 64 x 4, k = 4": (32, 64, 4, ("throughput",)),
    "32 x 8 x 4, k = 2": (32, 8, 2, ("throughput", "latency", "affinity", "exflow", "moetuner")),
}


def synthetic_trace(layers: int, experts: int, top_k: int, tokens: int, seed: int) -> Trace:
    """Popular experts, and a preference for what followed the token's last experts."""
    g = np.random.default_rng(seed)
    chosen: list[np.ndarray] = []
    for i in range(layers):
        score = np.log(g.dirichlet(np.ones(experts)) + 1e-6)[None].repeat(tokens, 0)
        if i:
            follow = g.dirichlet(np.full(experts, 0.15), size=experts)
            before = chosen[-1].astype(float)
            score = 0.5 * score + np.log(before @ follow / before.sum(1, keepdims=True) + 1e-4)
        noisy = score + g.gumbel(size=score.shape)
        mask = np.zeros((tokens, experts), bool)
        np.put_along_axis(mask, np.argpartition(-noisy, top_k - 1, 1)[:, :top_k], True, 1)
        chosen.append(mask)
    return Trace(tuple(f"layers.{i}" for i in range(layers)), tuple(chosen))


def synthetic(name: str, memory: float, seed: int, batch: int) -> tuple[Problem, Problem]:
    """The half that places and the half that scores, of an int4 7B-like model."""
    layers, experts, top_k, _ = SIZES[name]
    width, hidden = 2 * 11_008 // experts, 4_096
    weights = 3.0 * hidden * width
    size = np.full(experts, weights * (0.5 + 4 / 32))
    devices = parse_devices(DEVICES)
    room = sum(d.memory for d in devices.devices)
    scale = memory * layers * size.sum() / room
    devices = Devices(
        tuple(replace(d, memory=d.memory * scale) for d in devices.devices), devices.links
    )
    trace = synthetic_trace(layers, experts, top_k, 16_384, seed)
    halves = [
        Problem(
            devices,
            half,
            [size] * layers,
            [np.full(experts, weights)] * layers,
            8.0 * hidden,
            batch=batch,
        )
        for half in trace.halves()
    ]
    return halves[0], halves[1]


def real(folder: Path, devices: Path, batch: int) -> tuple[Problem, Problem]:
    """The same of a conversion's own trace."""
    sizes, trace = of_artifact(folder)
    described = read_devices(devices)
    a, b = (sizes.problem(described, h, context=256, batch=batch) for h in trace.halves())
    return a, b


def rows_of(
    title: str, first: Problem, second: Problem, methods: tuple[str, ...], seconds: float
) -> list[list[str]]:
    """A line a placer: gap, time, fit, and the scores."""
    lines = []

    def line(name: str, homes: Homes, gap: str, took: float) -> None:
        fits = "yes" if second.fits(homes) else "NO"
        shown = [f"{s * SHOWN[o]:.2f}" for o, s in scores(second, homes).items()]
        lines.append([title, name, gap, f"{took:.1f}", fits, *shown])

    for name, baseline in BASELINES.items():
        began = time.monotonic()
        try:
            homes = baseline(first)
        except CarveError as e:
            sys.stderr.write(f"{title}, {name}: {e.message}\n")
            continue
        line(name, homes, "-", time.monotonic() - began)
    for method in methods:
        try:
            found = place(first, PlaceSettings(method, seconds))
        except CarveError as e:
            sys.stderr.write(f"{title}, {method}: {e.message}\n")
            continue
        gap = "-" if method == "moetuner" else f"{100 * found.gap:.2f} %"
        line(f"carve {method}", found.homes, gap, found.seconds)
    return lines


def main() -> None:
    """Place and score."""
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    a.add_argument("--artifact", type=Path, help="an artifact that was converted with --devices")
    a.add_argument("--devices", type=Path)
    a.add_argument("--seconds", type=float, default=30.0, help="time limit of each search")
    a.add_argument("--memory", type=float, default=1.3, help="room over need, synthetic devices")
    a.add_argument("--batch", type=int, default=64)
    a.add_argument("--seed", type=int, default=0)
    args = a.parse_args()
    head = ["problem", "placer", "gap", "seconds", "fits", "throughput us", "latency us", "hops"]
    rows = [head]
    if args.artifact:
        if not args.devices:
            a.error("--artifact needs --devices")
        first, second = real(args.artifact, args.devices, args.batch)
        rows += rows_of(args.artifact.name, first, second, METHODS, args.seconds)
    else:
        for name in SIZES:
            first, second = synthetic(name, args.memory, args.seed, args.batch)
            rows += rows_of(name, first, second, SIZES[name][3], args.seconds)
    print(table(rows))


if __name__ == "__main__":
    main()
