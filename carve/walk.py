"""Walking the sites in order with the dense and the routed program side by side."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from carve_runtime.heap import trim_heap
from torch import Tensor

from carve.calibration import Batch
from carve.executor import Pauses
from carve.gates import SkipLesson
from carve.program import Program
from carve.sites import AtSite, Block, FFNSite, Gate
from carve.statistics import weights_of_size

Steps = Generator[AtSite, Tensor, tuple[Tensor, ...]]


@dataclass(frozen=True)
class Lesson:
    """What one site has to learn, fp32, counted tokens only.

    ``x`` ``[T, d]``: the inputs that the program, as rewritten so far, brings to the site.
    ``target`` ``[T, d_out]``: what the site should add there. ``weight`` ``[T]``: see
    `carve.statistics.weights_of_size`.
    """

    site: FFNSite
    x: Tensor
    target: Tensor
    weight: Tensor


def walk(
    program: Program,
    batches: Sequence[Batch],
    progress: Callable[[Sequence[FFNSite]], Any] = iter,
) -> Generator[Lesson, None, None]:
    """One `Lesson` a carved site, from the first to the last.

    Two copies of every batch are held at the same site: one of the dense program, one of the
    routed program with all rewrites so far. The target is what leads the routed stream back to the
    dense one: ``y + r - r'`` with ``y`` the dense FFN's output on the dense input and ``r``, ``r'``
    the streams that the FFN's result is added to (dense, routed). So each site also undoes what it
    can of the errors before it, as GPTQ's columns do for one another (arXiv 2210.17323). Where the
    result is not added at once (a norm after the FFN) the target is the dense FFN on ``x``.

    The caller rewrites the site before it asks for the next lesson.
    """
    sites = program.sites

    def start(gates: bool) -> tuple[list[Steps], list[AtSite]]:
        pauses = Pauses(sites, gates=gates)
        steps = [program.steps(*b.inputs, pauses=pauses, only_first=True) for b in batches]
        with torch.no_grad():
            return steps, [next(s) for s in steps]

    dense, at_dense = start(gates=False)
    routed, at_routed = start(gates=True)
    for i, site in enumerate(progress(sites)):
        with torch.no_grad():
            outputs = [site.dense(a.x) for a in at_dense]
        if site.routed is not None:
            trim_heap()
            yield _lesson(site, batches, at_dense, at_routed, outputs)
        with torch.no_grad():
            ffn = site.routed or site.dense
            answers = [ffn(a.x) for a in at_routed]
            if i + 1 < len(sites):
                at_dense = [s.send(y) for s, y in zip(dense, outputs, strict=True)]
                at_routed = [s.send(y) for s, y in zip(routed, answers, strict=True)]
        trim_heap()


def _lesson(
    site: FFNSite,
    batches: Sequence[Batch],
    at_dense: Sequence[AtSite],
    at_routed: Sequence[AtSite],
    outputs: Sequence[Tensor],
) -> Lesson:
    def gather(parts: Sequence[Tensor | None]) -> Tensor:
        flat = []
        for part, batch in zip(parts, batches, strict=True):
            assert part is not None
            flat.append(batch.counted(part))
        return torch.cat(flat)

    if site.residual is None:
        x = gather([a.x for a in at_routed])
        with torch.no_grad():
            target = torch.cat([site.dense(part) for part in torch.split(x, 4096)])
        return Lesson(site, x, target, weights_of_size(target))
    # In place: with many tokens these are most of what a conversion holds.
    target = gather(outputs)
    target += gather([a.residual for a in at_dense])
    weight = weights_of_size(target)
    target -= gather([a.residual for a in at_routed])
    return Lesson(site, gather([a.x for a in at_routed]), target, weight)


def walk_blocks(
    program: Program,
    batches: Sequence[Batch],
    blocks: Sequence[Block],
    always: int,
    progress: Callable[[Sequence[Block]], Iterator[Block]] = iter,
) -> Generator[tuple[Block, SkipLesson], Gate | None, None]:
    """One `carve.gates.SkipLesson` for each of ``blocks`` in order; takes its gate, or None.

    As in `walk`, a dense and a rewritten copy of every batch stand at the same block, so a bridge
    leads the stream back to the dense one, and a gate that is sent in is heard from there on. The
    program itself is not changed: the caller sets the gates when the walk is over, for the graph
    must not change under it. Tokens at positions below ``always`` are in no lesson.
    """
    place = program.inputs.index("position_ids")
    positions = [b.inputs[place] for b in batches]

    def start(pauses: Pauses) -> list[Steps]:
        return [program.steps(*b.inputs, pauses=pauses, only_first=True) for b in batches]

    dense = start(Pauses(program.sites, blocks, gates=False))
    other = start(Pauses(after=blocks))
    answers: list[tuple[Tensor | None, Tensor | None]] = [(None, None)] * len(batches)
    for block in progress(blocks):
        with torch.no_grad():
            pairs = [
                (
                    _to_block(d, None if a is None else a[0]),
                    _to_block(o, None if a is None else a[1]),
                )
                for d, o, a in zip(dense, other, answers, strict=True)
            ]
        gate = yield block, _skip_lesson(pairs, batches, positions, always)
        answers = []
        for (d, o), position in zip(pairs, positions, strict=True):
            assert d.y is not None
            assert o.y is not None
            with torch.no_grad():
                y = o.y if gate is None else gate(o.y, o.x, position)
            answers.append((d.y, y))


def set_gates(
    program: Program,
    batches: Sequence[Batch],
    blocks: Sequence[Block],
    always: int,
    choose: Callable[[Block, SkipLesson], Gate],
    progress: Callable[[Sequence[Block]], Iterator[Block]] = iter,
) -> None:
    """Give each block the gate that ``choose`` makes of its lesson; see `walk_blocks`."""
    chosen: dict[str, Gate] = {}
    steps = walk_blocks(program, batches, blocks, always, progress)
    try:
        block, lesson = next(steps)
        while True:
            chosen[block.name] = choose(block, lesson)
            block, lesson = steps.send(chosen[block.name])
    except StopIteration:
        pass
    for block in blocks:
        program.set_gate(block, chosen[block.name])


def _to_block(steps: Steps, answer: Tensor | None) -> AtSite:
    """Go on to the next block; FFNs on the way are the dense ones."""
    at = next(steps) if answer is None else steps.send(answer)
    while at.y is None:
        assert isinstance(at.site, FFNSite)
        at = steps.send(at.site.dense(at.x))
    return at


def _skip_lesson(
    pairs: Sequence[tuple[AtSite, AtSite]],
    batches: Sequence[Batch],
    positions: Sequence[Tensor],
    always: int,
) -> SkipLesson:
    late = [p.reshape(-1) >= always for p in positions]

    def gather(parts: Sequence[Tensor | None]) -> Tensor:
        rows = []
        for part, batch, keep in zip(parts, batches, late, strict=True):
            assert part is not None
            mask = keep if batch.mask is None else keep & batch.mask.reshape(-1)
            rows.append(part.reshape(len(mask), -1)[mask].float())
        return torch.cat(rows)

    sequences = []
    first = 0
    for position in positions:
        count, length = position.shape
        sequences.append(
            torch.arange(first, first + count)[:, None].expand(count, length)[..., None]
        )
        first += count
    sequence = gather(sequences).squeeze(1).long()
    x, y = gather([o.x for _, o in pairs]), gather([o.y for _, o in pairs])
    target = gather([d.y for d, _ in pairs])
    if pairs[0][0].residual is None:
        return SkipLesson(x, target, y, weights_of_size(target), sequence)
    stream = gather([d.residual for d, _ in pairs])
    weight = weights_of_size(stream + target)
    lead = target + stream - gather([o.residual for _, o in pairs])
    return SkipLesson(x, lead, y, weight, sequence)
