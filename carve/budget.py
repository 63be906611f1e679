"""The budget: what ``--budget`` asks, the widths that answer it, and what is realised.

Multiply-accumulates are counted for one token in the blocks: attention projections and FFNs with
their routers; embeddings, attention scores and the language-model head are not counted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from carve.engine_form import ANY, EngineForm
from carve.errors import UserError
from carve.program import Program
from carve.sites import Block, FFNSite
from carve.storable import storable

BLOCK = (
    32  # block-wise kernels quantize 32 weights of a row together, so widths are multiples of it
)


MANY = 8
"""Experts a token where the FFN is wide enough that they are finer than four; see `splits_of`."""
COARSE = 0.15
"""What experts twice as wide cost, in shares of the active neurons; see `choose_split`."""
BRIDGE_RANK = 32
"""Width of a gate's low-rank bridge, see `carve.gates`."""
SKIP_TRUST = 0.88
"""Share of the asked skip rate that a budget counts on: other text may skip a point or two less,
and the tokens that skip are those that would have taken fewer experts."""


@storable
@dataclass(frozen=True)
class Split:
    """Widths of one routed FFN: ``shared_size + num_experts * expert_size`` neurons in all."""

    shared_size: int
    expert_size: int
    num_experts: int
    top_k: int

    @property
    def active_size(self) -> int:
        """Neurons that one token passes through."""
        return self.shared_size + self.top_k * self.expert_size


@storable
@dataclass(frozen=True)
class Widths:
    """Bits of a unit's weights: of a linear or shared expert, and of each routed expert."""

    shared: int
    experts: tuple[int, ...] = ()


def matrices(site: FFNSite) -> int:
    """Weight matrices of an FFN: 3 when gated, else 2."""
    return 2 if site.dense.gate is None else 3


def macs_of(site: FFNSite, split: Split) -> int:
    """Multiply-accumulates a token of a site with these widths and a linear router."""
    d = site.dense.up.shape[1]
    return matrices(site) * d * split.active_size + d * split.num_experts


def _unit(size: int) -> int:
    """What widths of an FFN of ``size`` neurons are multiples of."""
    return BLOCK if size % BLOCK == 0 and size >= 8 * BLOCK else max(1, size // 32)


def is_wide(size: int, form: EngineForm) -> bool:
    """Whether an FFN of ``size`` neurons has room for `MANY` fine experts a token."""
    return size >= 5 * MANY * math.lcm(_unit(size), form.multiple)


def splits_of(
    site: FFNSite, num_experts: int | None, top_k: int | None, form: EngineForm = ANY
) -> list[Split]:
    """Every split of a site that kernels take: all widths multiples of `BLOCK`.

    Kernels deal the chosen experts to their threads in turn, so ``top_k`` is 4, or `MANY` where the
    FFN is wide enough for finer experts (2 with fewer than 8 experts), unless it is given.
    ``form`` may ask for a shared expert of whole routed ones, which leaves few sizes: ``top_k`` is
    3 to 6 then; or for experts that are multiples of more than `BLOCK` wide: there may be as few as
    two of them then.
    """
    size = site.dense.intermediate_size
    unit = _unit(size)
    step = math.lcm(unit, form.multiple)
    few = [2, 3, 4] if step > unit else []
    wide = is_wide(size, form)
    most, every = (64, 1) if wide else (32, 2)
    experts = [num_experts] if num_experts else [*few, *range(6, most + 1, every)]
    found = []
    for e in experts:
        if top_k:
            several: Sequence[int] = (top_k,)
        elif e < 8:
            several = (min(2, e - 1),)
        elif form.whole_shared:
            several = (3, 4, 5, 6)
        else:
            several = (4, MANY) if wide and e >= 2 * MANY else (4,)
        sizes = range(step, size // e + 1, step)
        found += [Split(size - e * m, m, e, k) for m in sizes for k in several if k <= e]
    if form.whole_shared:
        return [s for s in found if s.shared_size and s.shared_size % s.expert_size == 0]
    return found


@dataclass(frozen=True)
class Request:
    """What the user asks of the widths.

    ``limit``: multiply-accumulates a token that all FFNs together may use; ``count_routers``:
    whether routers are among them (a budget) or not (a pinned share of the neurons).
    ``shared_share``: wanted share of the active neurons in the shared expert. ``num_experts`` and
    ``top_k`` are fixed where given. ``limit`` is what is left beside attention without gates.
    ``form`` is what the asked engines hold.
    """

    limit: float
    count_routers: bool = True
    shared_share: float = 0.55
    num_experts: int | None = None
    top_k: int | None = None
    form: EngineForm = ANY


def cost_of(site: FFNSite, split: Split | None, request: Request, skip: float = 0.0) -> int:
    """Multiply-accumulates a token as the request counts them; None is the dense FFN.

    ``skip`` is the share of tokens that a gate leaves out. A pinned share of neurons (routers not
    counted) is of the tokens that run.
    """
    if not request.count_routers:
        active = site.dense.intermediate_size if split is None else split.active_size
        return matrices(site) * site.dense.up.shape[1] * active
    macs = site.dense.macs if split is None else macs_of(site, split)
    return round(macs * (1.0 - SKIP_TRUST * skip)) + (gate_macs(site) if skip else 0)


def gate_macs(block: Block) -> int:
    """Multiply-accumulates a token of a gate with the widest bridge that is fitted by default."""
    width = int(block.input.meta["val"].shape[-1])
    return width + 2 * width * min(BRIDGE_RANK, width)


def skip_saving(program: Program, skips: Mapping[str, float]) -> float:
    """Multiply-accumulates a token that gates on attention save."""
    gated = [(a, skips.get(a.name, 0.0)) for a in program.attention]
    return sum(SKIP_TRUST * s * a.query_macs - gate_macs(a) for a, s in gated if s)


def plan_skips(program: Program, rate: float) -> dict[str, float]:
    """The deep half without the last layer, each block at ``rate``: where gates stand at first.

    The `carve.passes.PlaceGates` pass may move them to blocks that matter less. Early layers matter
    most in deep models and the last one writes what is read out (Men et al., arXiv 2403.03853;
    FlexiDepth, arXiv 2503.23798).

    Raises:
        UserError: the program is no decoder, or too shallow.
    """
    if not rate:
        return {}
    if program.kind != "decoder":
        raise UserError("skip", "gates need a causal decoder", "convert without --skip")

    def deep(blocks: Sequence[Block]) -> list[Block]:
        return [b for b in blocks[len(blocks) // 2 : -1] if b.gateable]

    names = {b.name for b in (*deep(program.attention), *deep(program.sites))}
    if not names:
        raise UserError(
            "skip",
            f"none of {len(program.sites)} layers can be skipped",
            "gates need at least four layers with results [batch, length, width]",
        )
    return dict.fromkeys([b.name for b in program.blocks if b.name in names], rate)


def choose_split(site: FFNSite, macs: float, request: Request, skip: float = 0.0) -> Split | None:
    """The split of largest active width that costs at most ``macs``, near the wanted shared share.

    Args:
        site: the FFN.
        macs: what it may cost, see `cost_of`.
        request: shared share, and what is fixed.
        skip: share of tokens that a gate leaves out.

    Returns:
        The widths, or None where a gate saves so much that the whole FFN costs no more.

    Raises:
        UserError: no split is that small.
    """
    if skip and cost_of(site, None, request, skip) <= macs:
        return None
    options = splits_of(site, request.num_experts, request.top_k, request.form)
    fitting = [s for s in options if cost_of(site, s, request, skip) <= macs]
    many = any(s.top_k == MANY for s in options)
    wide = many and is_wide(site.dense.intermediate_size, request.form)
    if not fitting:
        least = min((cost_of(site, s, request, skip) for s in options), default=site.dense.macs)
        raise UserError(
            "budget",
            f"{site.name}: no split fits; the least is {least / site.dense.macs:.3f} of the FFN",
            "raise the budget",
        )

    def cost(s: Split) -> tuple[float, float]:
        unused = (macs - cost_of(site, s, request, skip)) / site.dense.macs
        share = abs(s.shared_size / s.active_size - request.shared_share)
        # Half a percent of the FFN left unused weighs as much as a tenth of shared share. Experts
        # half as wide lose a sixth less (reference model, half of the FFNs, 32 and 16 neurons).
        coarse = 0.0
        if wide:
            widest = (1.0 - request.shared_share) * s.active_size / MANY
            coarse = COARSE * max(0.0, math.log2(s.expert_size / max(widest, BLOCK)))
        return (round(unused / 0.005) * 0.1 + share + coarse, -s.num_experts)

    return min(fitting, key=cost)


def least_budget(program: Program, request: Request | None = None) -> float:
    """The smallest budget that any choice of widths reaches."""
    r = request or Request(0.0)
    least = sum(
        min(
            (macs_of(s, o) for o in splits_of(s, r.num_experts, r.top_k, r.form)),
            default=s.dense.macs,
        )
        for s in program.sites
    )
    return (program.attention_macs + least) / program.dense_macs


def make_request(
    program: Program,
    budget: float | None,
    ffn_active: float | None,
    shared_share: float = 0.55,
    num_experts: int | None = None,
    top_k: int | None = None,
    form: EngineForm = ANY,
) -> Request:
    """What a budget or a pinned share asks of this program.

    Args:
        program: the dense program.
        budget: share of the blocks' multiply-accumulates, in (0, 1].
        ffn_active: or the share of the FFNs' neurons that is active, in (0, 1].
        shared_share: see `Request`.
        num_experts: see `Request`.
        top_k: see `Request`.
        form: see `Request`.

    Raises:
        UserError: outside (0, 1], or below what any widths reach; the message gives the least.
    """
    asked = ffn_active if ffn_active is not None else budget
    if asked is None or not 0.0 < asked <= 1.0:
        raise UserError(
            "budget", f"the budget is {asked}; it has to be in (0, 1]", "try --budget 0.6"
        )
    ffn = sum(s.dense.macs for s in program.sites)
    limit = (
        asked * program.dense_macs - program.attention_macs if ffn_active is None else asked * ffn
    )
    request = Request(limit, ffn_active is None, shared_share, num_experts, top_k, form)
    if ffn_active is None and asked < (least := least_budget(program, request)):
        raise UserError(
            "budget",
            f"budget {asked} cannot be reached by carving the FFNs; the least is {least:.3f}",
            f"attention alone is {program.attention_macs / program.dense_macs:.3f}",
        )
    return request


def plan_widths(
    program: Program, request: Request, skips: Mapping[str, float] | None = None
) -> dict[str, Split | None]:
    """Uniform widths for every site: the same share of each FFN.

    ``skips`` are the planned gates: what they save lets FFNs be wider, within a budget.

    Raises:
        UserError: no widths are that small.
    """
    planned = skips or {}
    if request.form.plain:
        return equal_widths(program, request)
    dense = sum(cost_of(s, None, request, planned.get(s.name, 0.0)) for s in program.sites)
    limit = request.limit + (skip_saving(program, planned) if request.count_routers else 0.0)
    share = limit / dense
    splits: dict[str, Split | None] = {}
    left = 0.0
    # From the last site to the first: the early ones matter most, and get what is left over.
    for s in reversed(program.sites):
        # Widths come in steps: what one site cannot use, the one before may.
        skip = planned.get(s.name, 0.0)
        asked = share * cost_of(s, None, request, skip) + left
        splits[s.name] = choose_split(s, asked, request, skip)
        left = asked - cost_of(s, splits[s.name], request, skip)
    return splits


def equal_widths(program: Program, request: Request, first: int = 0) -> dict[str, Split | None]:
    """The same split for every site but the ``first``, which stay dense.

    Raises:
        UserError: no widths are that small.
    """
    dense, rest = program.sites[:first], program.sites[first:]
    limit = request.limit - sum(cost_of(s, None, request) for s in dense)
    # All FFNs have one shape (`carve.engine_form.check_source`).
    split = choose_split(rest[0], limit / len(rest), request)
    return {**dict.fromkeys((s.name for s in dense), None), **{s.name: split for s in rest}}
