"""More text from little: rows gone on with by the model itself, redrawn in part, or cut anew.

Calibration text that a model makes stands in for its training data (Williams et al., arXiv
2410.17170). An encoder makes none; its rows are cut elsewhere, so that tokens stand in others'
company.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice

import torch
from torch import Tensor

from carve.calibration import BATCH_ROWS, Batch, decoder_batches, hold_back, padded_batches
from carve.program import Program

ENOUGH = 24_576
"""Tokens from which on closed forms take text as it is."""
WORK = 4e12
"""Multiply-accumulates at the most of a run over what is told for training: minutes, and memory."""
KEPT = 8
"""Most tokens that a row keeps."""
_NEARLY = 0.75
"""Share of what is wanted from which on the rest is not worth the trouble."""
ROWS = 32
"""Rows that are told side by side."""
REDRAWN = 0.5
"""Share of the tokens that are drawn anew where text comes again."""


def tokens_in(batches: Sequence[Batch]) -> int:
    """Tokens that count in ``batches``."""
    return sum(b.tokens for b in batches)


def missing(program: Program, batches: Sequence[Batch], asked: int, trained: int = 0) -> int:
    """Tokens to tell: up to what was asked for, and no more than `ENOUGH`; or what training lacks.

    ``trained``: tokens to train on, as far as `WORK` goes; nothing where it does not go half way.
    For an encoder no more than there are.
    """
    have = tokens_in(batches)
    cut = program.kind == "encoder" and all(map(_is_padded, batches))

    def lacks(wanted: int) -> int:
        if not cut:
            return lacking(program, have, wanted)
        return min(have, wanted - have) if have < _NEARLY * wanted else 0

    allowed, longer = int(WORK / program.num_parameters), lacks(trained)
    longer = min(longer, allowed) if 2 * allowed >= longer else 0
    return max(lacks(min(asked, ENOUGH)), longer)


def lacking(program: Program, have: int, wanted: int) -> int:
    """Tokens to tell, of decoders alone; none where three quarters are there."""
    return 0 if program.kind != "decoder" or have >= _NEARLY * wanted else wanted - have


def judged_on(batches: Sequence[Batch], asked: int) -> int:
    """Tokens to judge on where text is short: a quarter of it at the most."""
    return max(1, min(asked, tokens_in(batches) // 4))


def stretched(
    program: Program,
    batches: Sequence[Batch],
    tokens: int,
    judge: int,
    generator: torch.Generator,
    progress: Callable[[Sequence[Tensor]], Iterator[Tensor]] = iter,
    once: Callable[[str, Callable[[], Tensor]], Tensor] = lambda _, make: make(),
) -> tuple[list[Batch], int]:
    """``batches`` with about ``tokens`` more, told again; and tokens to judge on.

    Of a row the first tokens are kept, one to `KEPT`, the same number in `ROWS` rows, and every
    later one is drawn from the model's distribution (keeping up to half of a row tells less that is
    new, and loses a sixth more). Judged is a quarter of the given text at the most, which stands
    first (`carve.calibration.hold_back`) and is not told again.

    Args:
        program: a decoder, which gives logits ``[B, S, V]`` and its cache; or an encoder, whose
            rows are cut anew (`recut`).
        batches: of token ids ``[B, S]`` int64, then positions and an empty cache, or the mask.
        tokens: to add, see `missing`.
        judge: tokens to judge on, were there enough text.
        generator: for every draw.
        progress: shows the groups of rows.
        once: keeps what is told, as `carve.passbase.Partial.once` does.
    """
    judge = judged_on(batches, judge)
    rest, judged = hold_back(batches, judge)
    kept = tokens_in(rest) + tokens_in(judged) > tokens_in(batches)
    first = [] if kept else judged  # among the rest, where there are few rows
    return [*first, *rest, *more(program, rest, tokens, generator, progress, once)], judge


def more(
    program: Program,
    batches: Sequence[Batch],
    tokens: int,
    generator: torch.Generator,
    progress: Callable[[Sequence[Tensor]], Iterator[Tensor]] = iter,
    once: Callable[[str, Callable[[], Tensor]], Tensor] = lambda _, make: make(),
) -> list[Batch]:
    """About ``tokens`` tokens more than ``batches`` have; arguments as those of `stretched`."""
    if not tokens:
        return []
    if program.kind == "encoder":
        return recut(batches, tokens, generator)
    told = once("told", lambda: told_again(program, batches, tokens, generator, progress))
    return [replace(b, told=True) for b in decoder_batches(program, told, BATCH_ROWS)]


def redrawn(
    program: Program,
    plan: Sequence[Batch],
    share: float,
    generator: torch.Generator,
    progress: Callable[[Sequence[Batch]], Iterator[Batch]] = iter,
    once: Callable[[str, Callable[[], list[Tensor]]], list[Tensor]] = lambda _, make: make(),
) -> list[Batch]:
    """``plan`` with a ``share`` of its batches in other words; none that is there the first time.

    In them a token is, with probability `REDRAWN`, one drawn from ``p(. | x_<t)`` of the text as it
    was given. Other tokens each time, though one position's draw stays the same. Source: scheduled
    sampling (Bengio et al., arXiv 1506.03099), which so mixes what a model says with its text; all
    of it is drawn in one run, where telling takes one a token.

    Args:
        program: a decoder, which gives logits ``[B, S, V]``.
        plan: batches in the order they are trained on, token ids ``[B, S]`` int64 first.
        share: of ``plan``, 0 to 1.
        generator: for every draw.
        progress: shows the batches that are drawn from.
        once: keeps what is drawn, as `carve.passbase.Partial.once` does.
    """
    first = {id(batch): i for i, batch in reversed([*enumerate(plan)])}
    again = [i for i, batch in enumerate(plan) if first[id(batch)] != i]
    order = torch.randperm(len(again), generator=generator).tolist()
    chosen = [again[i] for i in order[: round(share * len(plan))]]
    if not chosen:
        return [*plan]
    sources = [plan[i] for i in sorted({first[id(plan[i])] for i in chosen})]
    # Its own generator: masks are the same where what was drawn comes from a run that was killed.
    draws = torch.Generator().manual_seed(int(torch.randint(1 << 62, (), generator=generator)))
    drawn = once("drawn", lambda: [_drawn(program, b, draws) for b in progress(sources)])
    words = {id(b): ids for b, ids in zip(sources, drawn, strict=True)}
    found = [*plan]
    for i in chosen:
        ids, *others = plan[i].inputs
        mask = torch.rand(ids.shape, generator=generator) < REDRAWN
        mixed = torch.where(mask, words[id(plan[i])], ids)
        found[i] = replace(plan[i], inputs=(mixed, *others), told=True)
    return found


@torch.no_grad()
def _drawn(program: Program, batch: Batch, generator: torch.Generator) -> Tensor:
    """Tokens int64 ``[B, S]``: the first as given, later ones drawn by the given text before."""
    ids = batch.inputs[0]
    logits = program.run(*batch.inputs)[0]
    odds = logits[:, :-1].float().softmax(-1).flatten(0, 1)
    new = torch.multinomial(odds, 1, generator=generator).view(len(ids), -1)
    return torch.cat([ids[:, :1], new], 1)


def _is_padded(batch: Batch) -> bool:
    """Whether a batch is of token ids and the mask of those that count, and of nothing else."""
    mask = batch.mask
    return mask is not None and len(batch.inputs) == 2 and bool((batch.inputs[1] == mask).all())


def recut(batches: Sequence[Batch], tokens: int, generator: torch.Generator) -> list[Batch]:
    """About ``tokens`` tokens of an encoder's text, their rows cut elsewhere.

    The rows of ``batches`` ``[B, S]`` one after another in a new order, cut into rows of the same
    lengths in another one; a token that most rows begin with or end with stays at their ends. No
    more than there are.
    """
    rows: list[list[int]] = []
    for batch in batches:
        assert batch.mask is not None
        rows += [ids[on].tolist() for ids, on in zip(batch.inputs[0], batch.mask, strict=True)]
    first, last = (_usual([r[at] for r in rows]) for at in (0, -1))
    bodies = [r[r[:1] == first : len(r) - (r[-1:] == last)] for r in rows]
    # A text that was cut at the length of a row has no end, and gets one here.
    most = max(map(len, rows)) - len(first) - len(last)
    order, again = (torch.randperm(len(rows), generator=generator).tolist() for _ in range(2))
    every = iter([token for i in order for token in bodies[i]])
    found: list[list[int]] = []
    for i in again:
        if tokens <= 0:
            break
        found.append([*first, *islice(every, min(len(bodies[i]), most)), *last])
        tokens -= len(found[-1])
    return padded_batches(found, max(len(b.inputs[0]) for b in batches))


def _usual(tokens: Sequence[int]) -> list[int]:
    """The token that more than half of them are, if there is one."""
    token, count = Counter(tokens).most_common(1)[0]
    return [token] if 2 * count > len(tokens) else []


def told_again(
    program: Program,
    batches: Sequence[Batch],
    tokens: int,
    generator: torch.Generator,
    progress: Callable[[Sequence[Tensor]], Iterator[Tensor]] = iter,
) -> Tensor:
    """About ``tokens`` tokens int64 ``[R, S]``: the rows of ``batches`` as `stretched` tells them.

    Rows are told over and over, each time in other words.
    """
    given = torch.cat([b.inputs[0] for b in batches])
    count = -(-tokens // given.shape[1])
    groups = torch.split(given.repeat(-(-count // len(given)), 1)[:count], ROWS)
    return torch.cat([_told(program, rows, generator) for rows in progress(groups)])


@torch.no_grad()
def _told(program: Program, rows: Tensor, generator: torch.Generator) -> Tensor:
    """Rows ``[R, S]`` told again."""
    count, length = rows.shape
    start = int(torch.randint(1, min(KEPT, length) + 1, (1,), generator=generator))
    positions = torch.arange(length).expand(count, length)
    said = [rows[:, :start]]
    cache: Sequence[Tensor] = program.empty_cache(count)
    for end in range(start, length):
        last = said[-1]
        at = positions[:, end - last.shape[1] : end]
        logits, *cache = program.run(last, at, *cache)
        odds = logits[:, -1].float().softmax(-1)
        said.append(torch.multinomial(odds, 1, generator=generator))
    return torch.cat(said, 1)
