"""What a pass is, and what runs it: contracts before and after, a verifier in between."""

from __future__ import annotations

import logging
import resource
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import torch
from carve_runtime.heap import trim_heap

from carve.budget import Request, Split, Widths
from carve.calibration import Batch, SiteInputs
from carve.codec import settled
from carve.errors import CarveError
from carve.ffn import RoutedFFN
from carve.program import Program
from carve.sites import FFN, FFNSite, Linear
from carve.storable import storable

log = logging.getLogger(__name__)
ConfigT = TypeVar("ConfigT")
Progress = Callable[[Sequence[Any], str], Iterator[Any]]


class Judge(Protocol):
    """Gives a program's loss, see `Context`."""

    def __call__(
        self, program: Program, replace: Mapping[str, FFN] | None = None, labels: float = 0.0, /
    ) -> float:
        """The loss of ``program``, with ``replace`` and ``labels`` as in `Evaluator.loss`."""


def silent(items: Sequence[Any], label: str) -> Iterator[Any]:
    """A `Progress` that shows nothing."""
    return iter(items)


class Partial:
    """What a running pass has finished so far; this one keeps nothing beyond the run.

    A pass that takes long gives it each finished part, a layer for example, and gets the part back
    when a killed conversion is resumed. Settings, text and code are the same then.
    """

    def once(self, key: str, make: Callable[..., Any], *given: Any) -> Any:
        """What ``make`` makes of ``given``, or made before the run was killed.

        Use what this returns and not what ``make`` made: tensors may lie elsewhere in memory.
        """
        return settled(make(*given))

    def get(self, key: str) -> Any:
        """What was put last under ``key``; None if nothing was."""
        return None

    def put(self, key: str, value: Any) -> None:
        """Keep a value, in place of the former one."""


@dataclass
class Context:
    """What passes share besides the program.

    ``inputs`` are what the dense program's FFNs see on the calibration text; ``request`` is what
    the user asks of the widths and ``splits`` are the widths by site, None where a site stays
    dense; ``skips`` are the shares of tokens that gates are to skip, by block; ``seed`` feeds every
    random choice; ``judge`` gives the loss of a program (with FFNs replaced, where they are given
    by site name) against the dense one, end to end (KL, or 1 - cosine), on calibration text that is
    not in ``batches``; ``stream`` are all batches, where an end-to-end pass may see more than
    layer-wise work does; ``partial`` keeps what a long pass needs to go on after a crash;
    ``widths`` are the bits of weights by unit, ``bits`` those of units that are not in it, and
    ``limits`` what mixed widths have to keep, by resource (`carve.passes.ChooseWidths`); ``dense``
    is the program as it was before the first pass, where one needs it (`Pass.needs_dense`);
    ``given`` is how many tokens of ``batches``, the first, were not told by the model, None for
    all.
    """

    batches: Sequence[Batch]
    inputs: SiteInputs
    request: Request
    splits: dict[str, Split | None]
    seed: int = 0
    progress: Progress = silent
    judge: Judge | None = None
    stream: Sequence[Batch] = ()
    partial: Partial = field(default_factory=Partial)
    skips: dict[str, float] = field(default_factory=dict)
    bits: int = 16
    widths: dict[str, Widths] = field(default_factory=dict)
    limits: dict[str, float] = field(default_factory=dict)
    dense: Program | None = None
    given: int | None = None

    def split(self, site: FFNSite) -> Split:
        """The widths of a site that is carved.

        Raises:
            ContractError: the site is to stay dense, or nothing is planned for it.
        """
        found = self.splits.get(site.name)
        if found is None:
            raise ContractError("contract", f"no widths are planned for {site.name}")
        return found

    def widths_of(self, unit: Linear | FFNSite) -> Widths:
        """The bits of a linear or of a carved site."""
        routed = unit.routed if isinstance(unit, FFNSite) else None
        plain = Widths(self.bits, (self.bits,) * (routed.num_experts if routed else 0))
        return self.widths.get(unit.name, plain)

    def experts(self, site: FFNSite) -> float:
        """Experts a token to aim at on calibration text.

        A little under the plan, for held-out text takes a little more and the budget is a promise.

        Raises:
            ContractError: see `split`.
        """
        return 0.97 * self.split(site).top_k

    def generator(self, salt: str) -> torch.Generator:
        """A random generator that depends on the seed and on ``salt`` alone."""
        value = sum(ord(c) * 257**i for i, c in enumerate(salt)) + self.seed
        return torch.Generator().manual_seed(value % (1 << 62))


@storable
@dataclass
class PassResult:
    """One pass's record for the report."""

    name: str
    seconds: float
    peak_rss_mb: float
    metrics: dict[str, Any] = field(default_factory=dict)
    quality: dict[str, float] | None = None
    state: dict[str, Any] | None = None


class ContractError(CarveError):
    """A pass was run where it cannot run, or did not give what it promises."""


class Pass(ABC, Generic[ConfigT]):
    """A rewrite of the program.

    ``requires`` and ``ensures`` raise `ContractError`; ``call`` changes the program and gives its
    metrics as a dataclass. Passes never import one another and leave what later ones need in
    ``program.notes``.
    """

    name: ClassVar[str]
    needs_dense: ClassVar[bool] = False
    """Whether it needs the program as it was before the first pass; see `Context`."""

    def __init__(self, config: ConfigT) -> None:
        self.config = config

    def foresee(self, program: Program, context: Context) -> None:
        """Check on the dense program, before the first pass runs, what would fail later."""

    def requires(self, program: Program, context: Context) -> None:
        """Check that the pass can run."""

    @abstractmethod
    def call(self, program: Program, context: Context) -> Any:
        """Rewrite the program; returns the metrics, a dataclass."""

    def ensures(self, program: Program, context: Context) -> None:
        """Check what the pass guarantees."""


def peak_rss_mb() -> float:
    """Largest resident size of this process so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def need_notes(program: Program, key: str, by: str) -> Any:
    """A note that an earlier pass left.

    Raises:
        ContractError: it is not there.
    """
    if key not in program.notes:
        raise ContractError(
            "contract", f"{by} needs the note {key!r}", f"run the {key} pass before"
        )
    return program.notes[key]


def need_dense(context: Context, by: str) -> Program:
    """The program as it was before the first pass.

    Raises:
        ContractError: nobody kept it.
    """
    if context.dense is None:
        raise ContractError("contract", f"{by} needs the dense program")
    return context.dense


def need_routed(site: FFNSite, by: str) -> RoutedFFN:
    """The routed weights of a carved site.

    Raises:
        ContractError: the site is dense.
    """
    if site.routed is None:
        raise ContractError(
            "contract", f"{by} needs {site.name} carved", "run the carve pass before"
        )
    return site.routed


def unless_worse(
    program: Program, context: Context | None, rewrite: Callable[[], None], labels: float = 0.0
) -> bool:
    """Run ``rewrite`` and undo it unless the program's loss, end to end, got lower.

    A lower error of every layer is not a better model. Without a judge the rewrite is kept.

    Returns:
        Whether it was kept.
    """
    judge = None if context is None else context.judge
    if judge is None:
        rewrite()
        return True
    before = judge(program, None, labels)
    kept = [(s, s.routed, s.tuned) for s in program.carved]
    rewrite()
    if judge(program, None, labels) < before:
        return True
    for site, routed, tuned in kept:
        if routed is not None:
            program.set_routed(site, routed)
            site.tuned = tuned
    return False


class Keeper(Protocol):
    """Keeps the state after every pass, so that a run goes on where another stopped."""

    def restore(self, program: Program, context: Context) -> list[PassResult]:
        """Bring a dense program to where an earlier run left it; the records of passes done."""

    def partial(self, index: int) -> Partial:
        """Where pass ``index`` keeps what it has finished."""

    def save(self, program: Program, context: Context, done: Sequence[PassResult]) -> None:
        """Keep the state after the last pass of ``done``."""

    def failed(self, index: int, error: CarveError) -> None:
        """Forget what pass ``index`` had finished, if it cannot be trusted."""


class PassManager:
    """Runs passes in order with their contracts and the verifier.

    Args:
        passes: the pipeline.
        verify: after each pass, check the graph and that every expert on equals dense.
        measure: quality after each pass, or None.
        before: called with each pass before it runs, or None.
        diagnose: what the program costs and where it errs after each pass, or None.
        keeper: keeps states and restores them, or None.
    """

    def __init__(
        self,
        passes: Sequence[Pass[Any]],
        *,
        verify: bool = True,
        measure: Callable[[Program], dict[str, float]] | None = None,
        before: Callable[[Pass[Any], Program], None] | None = None,
        diagnose: Callable[[Program], dict[str, Any]] | None = None,
        keeper: Keeper | None = None,
    ) -> None:
        self.passes, self.verify = passes, verify
        self.measure, self.before, self.diagnose = measure, before, diagnose
        self.keeper = keeper

    def __call__(
        self, program: Program, context: Context, until: str | None = None
    ) -> list[PassResult]:
        """Run all passes, or those up to ``until``.

        Raises:
            ContractError: a contract does not hold; the message names the pass and those before.
        """
        for p in self.passes:
            p.foresee(program, context)
        if context.dense is None and any(p.needs_dense for p in self.passes):
            context.dense = program.copy()
        done = [] if self.keeper is None else self.keeper.restore(program, context)
        names = [p.name for p in self.passes]
        end = len(names) if until is None else names.index(until) + 1
        for i in range(len(done), end):
            p = self.passes[i]
            if self.before is not None:
                self.before(p, program)
            if self.keeper is not None:
                context.partial = self.keeper.partial(i)
            began = time.monotonic()
            try:
                p.requires(program, context)
                metrics = p.call(program, context)
                p.ensures(program, context)
                if self.verify:
                    verify(program, context)
            except CarveError as e:
                if self.keeper is not None:
                    self.keeper.failed(i, e)
                before = ", ".join(r.name for r in done) or "none"
                e.message = f"pass {p.name} (after: {before}): {e.message}"
                e.args = (e.message,)
                raise
            seconds = time.monotonic() - began
            trim_heap()
            record = PassResult(
                p.name,
                round(seconds, 2),
                round(peak_rss_mb(), 1),
                asdict(metrics) if is_dataclass(metrics) and not isinstance(metrics, type) else {},
            )
            if self.measure is not None:
                record.quality = self.measure(program)
            if self.diagnose is not None:
                record.state = self.diagnose(program)
            log.info("%s: %.1f s", p.name, seconds)
            done.append(record)
            if self.keeper is not None:
                self.keeper.save(program, context, done)
        return done


def verify(program: Program, context: Context, tokens: int = 64) -> None:
    """Check that the graph is well formed and that all experts on give the dense FFN.

    Raises:
        ContractError: naming the site and the relative error.
    """
    program.module.graph.lint()
    for site in program.sites:
        if site.routed is None:
            continue
        x = context.inputs.of(site, tokens)
        # Once tuned, the neurons are others; that no path loses any of them still has to hold.
        want = (site.routed.merged() if site.tuned else site.dense)(x)
        got = site.routed.with_top_k(site.routed.num_experts)(x)
        error = float((got - want).norm() / want.norm().clamp_min(1e-30))
        # bf16 weights round every partial sum, and the routed FFN has more of them.
        bound = 1e-4 if site.dense.up.dtype == torch.float32 else 3e-2
        if not error <= bound:
            raise ContractError(
                "verify",
                f"{site.name}: with every expert on the routed FFN differs from the dense one "
                f"by {error:.2e}",
            )
