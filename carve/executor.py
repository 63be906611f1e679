"""Running a program's graph with pauses at its sites."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from carve import dialect
from carve.sites import AtSite, Block, FFNSite, Linear

if TYPE_CHECKING:
    from carve.program import Program


@dataclass(frozen=True)
class Pauses:
    """Where `Executor.steps` waits.

    ``before``: sites and linears whose result the caller computes; ``after``: blocks whose result
    the caller may replace. With ``gates`` off, every token runs through every block.
    """

    before: Sequence[FFNSite | Linear] = ()
    after: Sequence[Block] = ()
    gates: bool = True


class Executor(fx.Interpreter):
    """Runs a program with mixed-precision linears, hooks at every site and pauses."""

    def __init__(
        self,
        program: Program,
        pauses: Pauses,
        observe: Callable[[FFNSite, Tensor], None] | None,
    ) -> None:
        # Values are let go by this class's own schedule.
        super().__init__(program.module, garbage_collect_values=False)
        self.observe, self.gates = observe, pauses.gates
        self.sites: dict[fx.Node, list[FFNSite]] = {}
        for s in program.sites:
            self.sites.setdefault(s.input, []).append(s)
        self.before = {s.output: s for s in pauses.before}
        self.after = {b.result: b for b in pauses.after}

    def steps(
        self, inputs: Sequence[Tensor], only_first: bool
    ) -> Generator[AtSite, Tensor, tuple[Tensor, ...]]:
        """See `carve.program.Program.steps`."""
        graph: fx.Graph = self.module.graph  # type: ignore[assignment]
        results: Any = graph.output_node().args[0]
        wanted = tuple(results) if isinstance(results, (tuple, list)) else (results,)
        order, last_use = self._schedule(graph, wanted[:1] if only_first else wanted)
        given = iter(inputs)
        for n in graph.find_nodes(op="placeholder"):
            self.env[n] = next(given)
        for n in order:
            block = self.after.get(n)
            if n in self.before:
                site = self.before[n]
                self.env[n] = yield self._at(site, None)
                # The caller may have rewritten the site: its result has another name then.
                self.env[site.output] = self.env[n]
            elif n.op != "placeholder" and (block is None or n is block.output):
                self.env[n] = self.run_node(n)
            if block is not None:
                self.env[n] = yield self._at(block, self.env[block.output])
            if self.observe is not None:
                for site in self.sites.get(n, ()):
                    self.observe(site, self.env[n])
            for done in last_use[n]:
                self.env.pop(done, None)
                if done in self.before:
                    self.env.pop(self.before[done].output, None)
        return tuple(self.env[n] if isinstance(n, fx.Node) else n for n in wanted if n in self.env)

    def _at(self, block: Block | Linear, y: Tensor | None) -> AtSite:
        residual = None if block.residual is None else self.env[block.residual]
        return AtSite(block, self.env[block.input], residual, y)

    def _schedule(
        self, graph: fx.Graph, wanted: Sequence[Any]
    ) -> tuple[list[fx.Node], dict[fx.Node, list[fx.Node]]]:
        """The nodes that ``wanted`` needs, in order, and which values each uses for the last time.

        Both are of the graph with the paused sites' FFNs left out, so nothing of them is computed.
        """
        last_use: dict[fx.Node, list[fx.Node]] = {}
        seen = {n for n in wanted if isinstance(n, fx.Node)}
        needed = set(seen)
        order: list[fx.Node] = []
        for n in reversed(graph.nodes):
            if n not in needed and n.op != "placeholder":
                continue
            order.append(n)
            used = self._uses(n)
            needed.update(used)
            last_use[n] = [u for u in dict.fromkeys(used) if u not in seen]
            if n not in seen:  # an input that nothing reads
                last_use[n].append(n)
            seen.update(used)
        return order[::-1], last_use

    def _uses(self, n: fx.Node) -> list[fx.Node]:
        """The values that stand when ``n`` is computed or waited for."""
        used: list[fx.Node] = [] if n in self.before else list(n.all_input_nodes)
        for block in (self.before.get(n), self.after.get(n)):
            if block is not None:
                used.append(block.input)
                if block.residual is not None:
                    used.append(block.residual)
        return used

    def run_node(self, n: fx.Node) -> Any:
        """One node: products in their weight's precision, embeddings in fp32, gates if wanted."""
        if n.target is torch.ops.aten.linear.default:
            args, _ = self.fetch_args_kwargs_from_env(n)
            return dialect.linear(*args)
        if n.target is torch.ops.carve.attention.default:
            # The operator's gradient computes it once more, which a program in one piece needs not.
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            return dialect.attention(*args, **kwargs)
        if n.target is torch.ops.carve.gated.default and not self.gates:
            return self.env[n.args[0]]  # type: ignore[index]
        result: Any = super().run_node(n)
        if n.target is torch.ops.aten.embedding.default:
            result = result.float()
        return result
