"""The budget: what ``--budget`` asks, the widths that answer it, and what is realised.

Multiply-accumulates are counted for one token in the blocks: attention projections and FFNs with
their routers; embeddings, attention scores and the language-model head are not counted.
"""

from __future__ import annotations

from dataclasses import dataclass

from carve.errors import UserError
from carve.program import FFNSite, Program

BLOCK = (
    32  # block-wise kernels quantize 32 weights of a row together, so widths are multiples of it
)


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


def matrices(site: FFNSite) -> int:
    """Weight matrices of an FFN: 3 when gated, else 2."""
    return 2 if site.dense.gate is None else 3


def macs_of(site: FFNSite, split: Split) -> int:
    """Multiply-accumulates a token of a site with these widths and a linear router."""
    d = site.dense.up.shape[1]
    return matrices(site) * d * split.active_size + d * split.num_experts


def splits_of(site: FFNSite, num_experts: int | None, top_k: int | None) -> list[Split]:
    """Every split of a site that kernels take: all widths multiples of `BLOCK`.

    Kernels deal the chosen experts to their threads in turn, so ``top_k`` is 4 (2 with fewer than
    8 experts), and the number of experts even, unless they are given.
    """
    size = site.dense.intermediate_size
    unit = BLOCK if size % BLOCK == 0 and size >= 8 * BLOCK else max(1, size // 32)
    experts = [num_experts] if num_experts else list(range(6, 33, 2))
    found = []
    for e in experts:
        k = top_k or (4 if e >= 8 else min(2, e - 1))
        found += [Split(size - e * m, m, e, k) for m in range(unit, size // e + 1, unit) if k <= e]
    return found


def choose_split(
    site: FFNSite,
    macs: float,
    shared_share: float,
    num_experts: int | None = None,
    top_k: int | None = None,
) -> Split:
    """The split of largest active width within ``macs``, near the wanted shared share.

    Args:
        site: the FFN.
        macs: multiply-accumulates a token that it may use.
        shared_share: wanted share of the active neurons that the shared expert holds.
        num_experts: fix the number of experts.
        top_k: fix the experts a token.

    Raises:
        UserError: no split is that small.
    """
    options = splits_of(site, num_experts, top_k)
    fitting = [s for s in options if macs_of(site, s) <= macs]
    if not fitting:
        least = min((macs_of(site, s) for s in options), default=site.dense.macs)
        raise UserError(
            "budget",
            f"{site.name}: no split fits; the least is {least / site.dense.macs:.3f} of the FFN",
            "raise the budget",
        )

    def cost(s: Split) -> tuple[float, float]:
        unused = (macs - macs_of(site, s)) / site.dense.macs
        share = abs(s.shared_size / s.active_size - shared_share)
        # Half a percent of the FFN left unused weighs as much as a tenth of shared share.
        return (round(unused / 0.005) * 0.1 + share, -s.num_experts)

    return min(fitting, key=cost)


def least_budget(
    program: Program, num_experts: int | None = None, top_k: int | None = None
) -> float:
    """The smallest budget that any choice of widths reaches."""
    least = sum(
        min((macs_of(s, o) for o in splits_of(s, num_experts, top_k)), default=s.dense.macs)
        for s in program.sites
    )
    return (program.attention_macs + least) / program.dense_macs


def plan_widths(
    program: Program,
    budget: float | None,
    ffn_active: float | None,
    shared_share: float,
    num_experts: int | None = None,
    top_k: int | None = None,
) -> dict[str, Split]:
    """Uniform widths for every site: the same share of each FFN.

    Args:
        program: the dense program.
        budget: share of the blocks' multiply-accumulates, in (0, 1].
        ffn_active: or the share of the FFNs that is active, in (0, 1].
        shared_share: see `choose_split`.
        num_experts: see `choose_split`.
        top_k: see `choose_split`.

    Raises:
        UserError: outside (0, 1], or below what any widths reach; the message gives the least.
    """
    asked = ffn_active if ffn_active is not None else budget
    if asked is None or not 0.0 < asked <= 1.0:
        raise UserError(
            "budget", f"the budget is {asked}; it has to be in (0, 1]", "try --budget 0.6"
        )
    ffn = sum(s.dense.macs for s in program.sites)
    if ffn_active is None:
        share = (asked * program.dense_macs - program.attention_macs) / ffn
        least = least_budget(program, num_experts, top_k)
        if asked < least:
            raise UserError(
                "budget",
                f"budget {asked} cannot be reached by carving the FFNs; the least is {least:.3f}",
                f"attention alone is {program.attention_macs / program.dense_macs:.3f}",
            )
    else:
        share = asked
    splits: dict[str, Split] = {}
    left = 0.0
    # From the last site to the first: the early ones matter most, and get what is left over.
    for s in reversed(program.sites):
        # A pinned share is of the neurons; a budget counts the router too.
        router = s.dense.up.shape[1] * 32 if ffn_active is not None else 0
        asked_macs = share * s.dense.macs
        # Widths come in steps: what one site cannot use, the one before may.
        splits[s.name] = choose_split(
            s, asked_macs + router + left, shared_share, num_experts, top_k
        )
        if ffn_active is None:
            left += asked_macs - macs_of(s, splits[s.name])
    return splits
