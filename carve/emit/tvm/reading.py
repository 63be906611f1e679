"""What is known of a program's graph before it is translated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from carve.arithmetic import Precision
from carve.emit.tvm import patterns
from carve.emit.tvm.patterns import Node
from carve.program import Program
from carve.sites import AttentionSite, Block

ATTENTION = torch.ops.carve.attention.default
ROUTED = torch.ops.carve.routed_ffn.default
GATED = torch.ops.carve.gated.default
LAYER_NORM = torch.ops.aten.layer_norm.default


@dataclass(frozen=True)
class Projections:
    """Queries, keys and values of an attention that are linears of one input, turned alike."""

    x: Node
    linears: tuple[Node, Node, Node]
    rotary: patterns.Rotary


class Reading:
    """Patterns, constants and gated regions of a program.

    ``needed`` are the nodes that are computed, in order, with what fused kernels swallow left out.
    """

    def __init__(self, program: Program, precision: Precision) -> None:
        graph = program.module.graph
        self.program = program
        self.constants = patterns.constants(graph, program.module)
        self.norms: dict[Node, patterns.RMSNorm] = {}
        self.rotaries: dict[Node, patterns.Rotary] = {}
        for n in graph.nodes:
            norm, turned = patterns.rms_norm(n, self.constants), patterns.rotary(n)
            if norm is not None:
                self.norms[n] = norm
            elif turned is not None:
                self.rotaries[n] = turned
        self.sites = {s.output: s for s in program.sites if s.routed is not None}
        self.blocks = {b.gate_node: b for b in program.gated}
        results: Any = graph.output_node().args[0]
        self.results: list[Node] = list(results)
        self.head = patterns.head_product(self.results[0]) if program.kind == "decoder" else None
        self.projections: dict[Node, Projections] = {}
        gated = {b.attention for b in program.gated if isinstance(b, AttentionSite)}
        for n in graph.find_nodes(op="call_function", target=ATTENTION):
            found = None if n in gated else self._projections(n, precision)
            if found is not None:
                self.projections[n] = found
        self.needed = self._needed(graph)
        self.regions = {g: self._region(b) for g, b in self.blocks.items() if g is not None}
        """By gate, the nodes that its block runs only for the tokens that it lets through."""
        inside = {n for region in self.regions.values() for n in region}
        self.needed = [n for n in self.needed if n not in inside]
        self.sums = self._sums()
        """By addition, the norm of its sum, where one kernel gives both."""

    def uses(self, n: Node) -> list[Node]:
        """The nodes whose values ``n`` is computed from."""
        if n in self.constants:
            return []
        if n in self.norms:
            return [self.norms[n].x]
        if n in self.rotaries:
            r = self.rotaries[n]
            return [r.x, r.cos, r.sin]
        if n in self.projections:
            p = self.projections[n]
            return [p.x, p.rotary.cos, p.rotary.sin, *n.args[3:5]]
        if n.target is ROUTED:
            return [n.args[0]]
        if n.target is GATED:
            return list(n.args[:3])
        return [i for i in n.all_input_nodes if i not in self.constants]

    def _projections(self, n: Node, precision: Precision) -> Projections | None:
        q, k = (self.rotaries.get(a) for a in n.args[:2])
        if q is None or k is None or (q.cos, q.sin, q.width) != (k.cos, k.sin, k.width):
            return None
        found = [patterns.projection(h) for h in (q.x, k.x, n.args[2])]
        linears = tuple(f for f in found if f is not None)
        if len(linears) < 3 or len({f.args[0] for f in linears}) > 1:
            return None
        weights = [self.constants.get(f.args[1]) for f in linears]
        biases = {len(f.args) > 2 and f.args[2] is not None for f in linears}
        stored = [w for w in weights if w is not None]
        grids = [precision.of(w) for w in stored]
        alike = len({None if g is None else (g.bits, g.block) for g in grids}) == 1
        if len(stored) < 3 or len(biases) > 1 or not alike:
            return None
        return Projections(linears[0].args[0], (linears[0], linears[1], linears[2]), q)

    def _sums(self) -> dict[Node, Node]:
        computed = set(self.needed)
        found: dict[Node, Node] = {}
        for n in self.needed:
            if n in self.norms:
                x = self.norms[n].x
            elif n.target is LAYER_NORM:
                x = n.args[0]
            else:
                continue
            if x in computed and patterns.is_sum(x):
                found.setdefault(x, n)
        return found

    def uses_inside(self, n: Node, block: Block) -> list[Node]:
        """As `uses`, but a gated attention's keys and values are outside of its gate."""
        inside = isinstance(block, AttentionSite) and n is block.attention
        return [n.args[0]] if inside else self.uses(n)

    def _region(self, block: Block) -> list[Node]:
        found: set[Node] = set()
        stack = [block.output]
        while stack:
            n = stack.pop()
            if n not in found and n is not block.input:
                found.add(n)
                stack += self.uses_inside(n, block)
        region: dict[Node, None] = {}
        for n in self.needed:
            if n in found and any(
                u is block.input or u in region for u in self.uses_inside(n, block)
            ):
                region[n] = None
        return list(region)

    def _needed(self, graph: fx.Graph) -> list[Node]:
        wanted = set(self.results)
        for n in reversed(graph.nodes):
            if n in wanted:
                wanted.update(self.uses(n))
        return [n for n in graph.nodes if n in wanted and n.op == "call_function"]
