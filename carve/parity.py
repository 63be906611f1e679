"""Parity: an emitted model beside the program, on prompts whose routings differ."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from carve.arithmetic import Precision
from carve.dialect import LinearRule, linear_rule
from carve.emulation import cpu_session, cuda_session
from carve.errors import CarveError
from carve.program import Program
from carve.sites import FFNSite

Run = Callable[[Path, Program, Sequence[tuple[Tensor, ...]]], list[list[Any]]]


@dataclass(frozen=True)
class Engine:
    """How a target computes: what its parity with the program is measured by.

    ``run`` gives the model's results; ``int8`` and ``lookup``: see `Precision.rule`; ``step``: half
    a unit in the last place of its activations, relative; ``bound`` of the median error at 16 bits.
    """

    run: Run
    int8: bool = True
    lookup: bool = True
    step: float = 3e-7
    bound: float = 1e-4

    def rule(
        self, precision: Precision, disturb: Callable[[Tensor], Tensor] = lambda x: x
    ) -> LinearRule:
        """Products in its arithmetic."""
        return precision.rule(disturb, int8=self.int8, lookup=self.lookup)


@dataclass(frozen=True)
class ParityMetrics:
    """Relative error of the results by token (root mean square over the row's own).

    A rounding tie that falls the other way in one of two correct programs can flip a route, so the
    typical token is bounded tightly and the share of tokens far off loosely. ``rounding_floor`` is
    the median error between two runs of the program itself in the target's arithmetic, one with
    its activations jittered by a few units in the last place: what no parity can be below.
    """

    median_error: float
    worst_error: float
    rounding_floor: float
    within: float
    top1_agreement: float
    tokens: int
    routings: int


def feeds_of(
    program: Program, inputs: Sequence[Tensor], names: Sequence[str]
) -> dict[str, np.ndarray]:
    """Feeds for onnxruntime; a decoder's attention mask is added where the model wants it."""
    feeds = {n: t.numpy() for n, t in zip(program.inputs, inputs, strict=True) if n in names}
    if program.kind == "decoder" and "attention_mask" in names:
        batch, length = inputs[0].shape
        feeds["attention_mask"] = np.ones((batch, length + inputs[2].shape[2]), np.int64)
    return feeds


def run_onnx(
    path: Path, program: Program, prompts: Sequence[tuple[Tensor, ...]]
) -> list[list[Any]]:
    """All results of the model for each prompt."""
    session = cpu_session(path)
    names = [i.name for i in session.get_inputs()]
    return [session.run(None, feeds_of(program, p, names)) for p in prompts]


def run_half(
    path: Path, program: Program, prompts: Sequence[tuple[Tensor, ...]]
) -> list[list[Any]]:
    """All results of a model in half precision for each prompt, on CUDA where there is any.

    onnxruntime's CPU kernels give the same up to rounding.
    """
    session = cuda_session(path)
    types = {i.name: i.type for i in session.get_inputs()}
    found = []
    for p in prompts:
        feeds = feeds_of(program, p, list(types))
        half = {n: types[n] == "tensor(float16)" for n in feeds}
        found.append(
            session.run(None, {n: v.astype(np.float16) if half[n] else v for n, v in feeds.items()})
        )
    return found


def run_split(
    path: Path, program: Program, prompts: Sequence[tuple[Tensor, ...]]
) -> list[list[Any]]:
    """All results of a split model, whose index ``path`` is, for each prompt."""
    from carve_runtime.index import read_index
    from carve_runtime.load_split import open_split

    files = {p.name for p in path.parent.iterdir()}
    index = read_index(path.parent.resolve(), files, path.name)
    engine = open_split(index)
    try:
        return [engine.run(feeds_of(program, p, list(engine.inputs))) for p in prompts]
    finally:
        engine.close()


def run_tvm(path: Path, program: Program, prompts: Sequence[tuple[Tensor, ...]]) -> list[list[Any]]:
    """All results of a model that TVM compiled, whose index ``path`` is, for each prompt."""
    from carve_runtime.tvm_engine import TvmEngine
    from carve_runtime.tvm_index import read_tvm_index

    files = {p.name for p in path.parent.iterdir()}
    engine = TvmEngine(read_tvm_index(path.parent.resolve(), files, path.name), None)
    return [engine.run(feeds_of(program, p, list(engine.inputs))) for p in prompts]


def routings(program: Program, inputs: Sequence[Tensor]) -> list[bytes]:
    """The experts that each token chose in all sites, as comparable bytes."""
    masks: list[Tensor] = []

    def keep(site: FFNSite, x: Tensor) -> None:
        if site.routed is not None:
            flat = x.reshape(-1, x.shape[-1])
            masks.append(site.routed.chosen(flat))

    program.run(*inputs, observe=keep)
    if not masks:
        return []
    every = torch.cat(masks, 1).numpy()
    return [row.tobytes() for row in every]


def exercised(program: Program, prompts: Sequence[tuple[Tensor, ...]]) -> int:
    """How many routings the prompts take, 0 where nothing is routed.

    Raises:
        CarveError: one only, or none but those of the example input.
    """
    chosen = {r for p in prompts for r in routings(program, p)}
    if chosen and (len(chosen) < 2 or chosen <= set(routings(program, program.example))):
        raise CarveError(
            "parity", "the parity prompts all take the example's routing", "give other text"
        )
    return len(chosen)


def _relative(have: Tensor, want: Tensor) -> Tensor:
    error: Tensor = (have - want).norm(dim=1) / want.norm(dim=1).clamp_min(1e-20)
    return error


def _jittered(precision: Precision, engine: Engine) -> LinearRule:
    generator = torch.Generator().manual_seed(0)

    def disturb(x: Tensor) -> Tensor:
        return x * (1 + engine.step * torch.randn(x.shape, generator=generator))

    return engine.rule(precision, disturb)


CPU = Engine(run_onnx)
SPLIT = Engine(run_split)
TVM = Engine(run_tvm, lookup=False)
TVM_CUDA = Engine(run_tvm, int8=False)
CUDA = Engine(run_half, int8=False, step=2.5e-4, bound=5e-3)


def check_parity(
    program: Program,
    path: Path,
    prompts: Sequence[tuple[Tensor, ...]],
    bits: int,
    engine: Engine = CPU,
) -> ParityMetrics:
    """Compare the emitted model with the program in the target's arithmetic.

    Args:
        program: what was emitted.
        path: the ONNX model, or the index of another form.
        prompts: program inputs; their routings have to differ from one another and from the
            example input's, else the check would not see a baked routing.
        bits: width that was emitted; the program runs in the kernels' own arithmetic at it.
        engine: `CPU`, `SPLIT`, `TVM`, `TVM_CUDA` or `CUDA`.

    Raises:
        CarveError: the results differ, or the prompts do not exercise the router.
    """
    got = engine.run(path, program, prompts)
    errors, floors, agree = [], [], []
    precision = Precision(program, bits)
    with linear_rule(engine.rule(precision)):
        chosen = exercised(program, prompts)
        wants = [program.run(*inputs)[0] for inputs in prompts]
    for inputs, result, whole in zip(prompts, got, wants, strict=True):
        have = torch.from_numpy(result[0])
        if whole.shape != have.shape:
            raise CarveError("parity", f"{path.name} gives {have.shape}, torch {whole.shape}")
        want = whole.reshape(-1, whole.shape[-1])
        have = have.reshape(want.shape)
        errors.append(_relative(have, want))
        agree.append(have.argmax(1) == want.argmax(1))
        if bits < 16:
            with linear_rule(_jittered(precision, engine)):
                again = program.run(*inputs)[0].reshape(want.shape)
            floors.append(_relative(again, want))
    error = torch.cat(errors)
    floor = torch.cat(floors) if floors else torch.zeros(1)
    metrics = ParityMetrics(
        float(error.median()),
        float(error.max()),
        float(floor.median()),
        float((error <= max(0.1, 3 * float(floor.quantile(0.9)))).float().mean()),
        float(torch.cat(agree).float().mean()),
        len(error),
        chosen,
    )
    # Quantized activations turn a rounding tie into a step, so the bound follows the width.
    bound = engine.bound if bits >= 16 else max(2e-2, 3 * metrics.rounding_floor)
    # A NaN fails both comparisons.
    if not (metrics.median_error <= bound and metrics.within >= 0.9):
        raise CarveError(
            "parity",
            f"{path.name} and torch differ: relative error {metrics.median_error:.2e} (median), "
            f"{metrics.worst_error:.2e} (worst), {metrics.within:.1%} of tokens within bounds, "
            f"rounding alone {metrics.rounding_floor:.2e}",
            "this is a defect of carve; please report the architecture",
        )
    return metrics
