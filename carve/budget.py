"""The budget: what ``--budget`` asks, the widths that answer it, and what is realised.

Multiply-accumulates are counted for one token in the blocks: attention projections and FFNs with
their routers; embeddings, attention scores and the language-model head are not counted.
"""

from __future__ import annotations

from dataclasses import dataclass

from carve.errors import UserError
from carve.program import Program
from carve.sites import FFNSite

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


@dataclass(frozen=True)
class Request:
    """What the user asks of the widths.

    ``limit``: multiply-accumulates a token that all FFNs together may use; ``count_routers``:
    whether routers are among them (a budget) or not (a pinned share of the neurons).
    ``shared_share``: wanted share of the active neurons in the shared expert. ``num_experts`` and
    ``top_k`` are fixed where given.
    """

    limit: float
    count_routers: bool = True
    shared_share: float = 0.55
    num_experts: int | None = None
    top_k: int | None = None


def cost_of(site: FFNSite, split: Split | None, request: Request) -> int:
    """Multiply-accumulates a token as the request counts them; None is the dense FFN."""
    if split is None:
        return site.dense.macs
    if request.count_routers:
        return macs_of(site, split)
    return matrices(site) * site.dense.up.shape[1] * split.active_size


def choose_split(site: FFNSite, macs: float, request: Request) -> Split:
    """The split of largest active width that costs at most ``macs``, near the wanted shared share.

    Args:
        site: the FFN.
        macs: what it may cost, see `cost_of`.
        request: shared share, and what is fixed.

    Raises:
        UserError: no split is that small.
    """
    options = splits_of(site, request.num_experts, request.top_k)
    fitting = [s for s in options if cost_of(site, s, request) <= macs]
    if not fitting:
        least = min((cost_of(site, s, request) for s in options), default=site.dense.macs)
        raise UserError(
            "budget",
            f"{site.name}: no split fits; the least is {least / site.dense.macs:.3f} of the FFN",
            "raise the budget",
        )

    def cost(s: Split) -> tuple[float, float]:
        unused = (macs - cost_of(site, s, request)) / site.dense.macs
        share = abs(s.shared_size / s.active_size - request.shared_share)
        # Half a percent of the FFN left unused weighs as much as a tenth of shared share.
        return (round(unused / 0.005) * 0.1 + share, -s.num_experts)

    return min(fitting, key=cost)


def least_budget(program: Program, request: Request | None = None) -> float:
    """The smallest budget that any choice of widths reaches."""
    r = request or Request(0.0)
    least = sum(
        min((macs_of(s, o) for o in splits_of(s, r.num_experts, r.top_k)), default=s.dense.macs)
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
) -> Request:
    """What a budget or a pinned share asks of this program.

    Args:
        program: the dense program.
        budget: share of the blocks' multiply-accumulates, in (0, 1].
        ffn_active: or the share of the FFNs' neurons that is active, in (0, 1].
        shared_share: see `Request`.
        num_experts: see `Request`.
        top_k: see `Request`.

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
    request = Request(limit, ffn_active is None, shared_share, num_experts, top_k)
    if ffn_active is None and asked < (least := least_budget(program, request)):
        raise UserError(
            "budget",
            f"budget {asked} cannot be reached by carving the FFNs; the least is {least:.3f}",
            f"attention alone is {program.attention_macs / program.dense_macs:.3f}",
        )
    return request


def plan_widths(program: Program, request: Request) -> dict[str, Split | None]:
    """Uniform widths for every site: the same share of each FFN.

    Raises:
        UserError: no widths are that small.
    """
    share = request.limit / sum(s.dense.macs for s in program.sites)
    splits: dict[str, Split | None] = {}
    left = 0.0
    # From the last site to the first: the early ones matter most, and get what is left over.
    for s in reversed(program.sites):
        # Widths come in steps: what one site cannot use, the one before may.
        asked = share * s.dense.macs + left
        splits[s.name] = choose_split(s, asked, request)
        left = asked - cost_of(s, splits[s.name], request)
    return splits
