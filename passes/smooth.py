"""Smooth: scale channels so that weights and activations round better, and fold the scales away."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from carve.arithmetic import rounded
from carve.calibration import limit_batches
from carve.config import AT_LEAST_ONE
from carve.dialect import linear_rule, stored_product
from carve.errors import UserError
from carve.grid import BLOCK, in_blocks
from carve.match import get_tensor
from carve.passbase import Context, Pass
from carve.program import Program
from carve.quantizer import Method, solve, values
from carve.sites import Block, FFNSite, Linear

_aten = torch.ops.aten
# Where a norm's weight and bias stand among its arguments.
_NORMS = {_aten.layer_norm.default: (2, 3), _aten.rms_norm.default: (2, None)}


@dataclass(frozen=True)
class SmoothConfig:
    """Settings of `Smooth`.

    ``alphas``: shares of the activations in the scale that are tried; ``tokens``: calibration
    tokens; ``forced``: take the first of ``alphas`` everywhere, as published.
    """

    RANGES: ClassVar = {"tokens": AT_LEAST_ONE, "alphas": (0, 1)}

    alphas: tuple[float, ...] = (0.0, 0.3, 0.6)
    tokens: int = 4_096
    forced: bool = False


@dataclass(frozen=True)
class SmoothMetrics:
    """By norm: the chosen alpha (-1: scaling does not pay), and its error over the plain one."""

    alpha: dict[str, float]
    gain: dict[str, float]


@dataclass(frozen=True)
class _Group:
    """A norm and all that reads it: linears, a routed FFN, gates."""

    node: fx.Node
    weight: int
    bias: int | None
    linears: list[Linear]
    site: FFNSite | None
    gates: list[Block]

    @property
    def name(self) -> str:
        readers: list[Linear | FFNSite] = [*self.linears, *([self.site] if self.site else [])]
        return f"{readers[0].name}.norm"

    def matrices(self) -> list[Tensor]:
        """Every weight ``[N, K]`` that multiplies the norm's result."""
        found = [n.weight for n in self.linears]
        r = None if self.site is None else self.site.routed
        if r is not None:
            found += [t for t in (r.shared_gate, r.shared_up) if t is not None]
            found += [w for t in (r.expert_gate, r.expert_up) if t is not None for w in t]
        return found


class Smooth(Pass[SmoothConfig]):
    """Divide a norm's channels by ``s`` and multiply the columns of all that reads it.

    ``s_j = max_e max_t |X_e,tj|^a / max_i |W_e,ij|^(1-a)`` over every matrix ``e`` that reads the
    norm, shared and routed experts, routers and gates alike (EAQuant, arXiv 2506.13329; for one
    matrix SmoothQuant, arXiv 2211.10438). The program computes the same; how it rounds is another
    matter. Each norm gets the ``a`` of least error of the rounded products, or none where that is
    the least: activations have a scale for every block of a row already, so only channels of very
    unequal weights gain. Norms whose result is read by anything else stay as they are.
    """

    name = "smooth"

    def requires(self, program: Program, context: Context) -> None:
        """Needs shares between 0 and 1."""
        if not self.config.alphas or not all(0 <= a <= 1 for a in self.config.alphas):
            raise UserError("config", f"smooth.alphas {self.config.alphas} are not within [0, 1]")

    def call(self, program: Program, context: Context) -> SmoothMetrics:
        """Choose and fold the scales of every norm."""
        groups = groups_of(program)
        batches = limit_batches(context.batches, self.config.tokens)
        inputs = _inputs(program, groups, batches)
        metrics = SmoothMetrics({}, {})
        for group in context.progress(groups, self.name):
            x = inputs[group.node]
            plain = _error(group, x, torch.ones(x.shape[1]), context.bits)
            trials = []
            for a in self.config.alphas:
                s = scales(group.matrices(), x, a)
                trials.append((_error(group, x, s, context.bits) / max(plain, 1e-30), a, s))
            gain, alpha, s = trials[0] if self.config.forced else min(trials, key=lambda t: t[0])
            if gain < 1.0 or self.config.forced:
                fold(program, group, s)
            else:
                gain, alpha = 1.0, -1.0
            metrics.alpha[group.name], metrics.gain[group.name] = alpha, gain
        return metrics


def scales(matrices: list[Tensor], x: Tensor, alpha: float) -> Tensor:
    """``s`` ``[K]`` with geometric mean 1, at most 100 times away from it."""
    size = x.abs().amax(0).clamp_min(1e-5) ** alpha
    weight = torch.stack([w.float().abs().amax(0).clamp_min(1e-5) for w in matrices])
    s = (size / weight ** (1 - alpha)).amax(0).log()
    return (s - s.mean()).clamp(-4.6, 4.6).exp()


def groups_of(program: Program) -> list[_Group]:
    """The norms that are read by products with weights and gates alone."""
    readers: dict[fx.Node, list[Any]] = {}
    every: list[Linear | FFNSite] = [*program.linears, *program.carved]
    for unit in every:
        readers.setdefault(unit.input, []).append(unit)
    groups = []
    for node, units in readers.items():
        place = _scale_of(program, node)
        if place is None:
            continue
        gates = [b for b in program.gated if b.input is node]
        known = {u.output for u in units} | {b.gate_node for b in gates}
        linears = [u for u in units if isinstance(u, Linear)]
        site = next((u for u in units if isinstance(u, FFNSite)), None)
        group = _Group(node, *place, linears, site, gates)
        whole = in_blocks(*(w.shape[-1] for w in group.matrices()))
        if whole and set(node.users) <= known:
            groups.append(group)
    return groups


def _scale_of(program: Program, node: fx.Node) -> tuple[int, int | None] | None:
    """Where the norm's weight and bias stand among the node's arguments."""
    if node.target in _NORMS:
        weight, bias = _NORMS[node.target]
        if len(node.args) <= weight or get_tensor(program.module, node.args[weight]) is None:
            return None
        has_bias = bias is not None and len(node.args) > bias and node.args[bias] is not None
        return weight, bias if has_bias else None
    if node.target is _aten.mul.Tensor:
        for i, a in enumerate(node.args):
            tensor = get_tensor(program.module, a)
            if tensor is not None and tensor.ndim == 1 and len(tensor) > 1:
                return i, None
    return None


def _inputs(program: Program, groups: list[_Group], batches: Any) -> dict[fx.Node, Tensor]:
    """What each norm gives on the calibration text, counted tokens ``[T, K]`` fp32."""
    first = {g.linears[0].weight.data_ptr(): g.node for g in groups if g.linears}
    of_site = {g.site.name: g.node for g in groups if g.site is not None}
    parts: dict[fx.Node, list[Tensor]] = {g.node: [] for g in groups}
    for batch in batches:

        def rule(x: Tensor, w: Tensor, batch: Any = batch) -> Tensor:
            node = first.get(w.data_ptr())
            if node is not None:
                parts[node].append(batch.counted(x).float())
            return stored_product(x, w)

        def observe(site: FFNSite, x: Tensor, batch: Any = batch) -> None:
            node = of_site.get(site.name)
            if node is not None:
                parts[node].append(batch.counted(x).float())

        with linear_rule(rule):
            program.run(*batch.inputs, observe=observe)
    return {node: torch.cat(p) for node, p in parts.items()}


def _error(group: _Group, x: Tensor, s: Tensor, bits: int) -> float:
    """Squared error of the products with both sides rounded, over all matrices of the group."""
    seen = rounded(x / s)
    gram = seen.T @ seen
    total = 0.0
    method = Method(gptq=False, sweeps=1)
    for w in group.matrices():
        scaled = (w.float() * s)[None]
        widths = torch.full((w.shape[1] // BLOCK,), bits)
        new = values(*solve(scaled, gram[None], widths, method))[0]
        total += float((seen @ new.T - x @ w.float().T).square().sum())
    return total


def fold(program: Program, group: _Group, s: Tensor) -> None:
    """Divide the norm by ``s`` and multiply the columns of its readers; the function stays."""

    def scaled(owner: object, names: Sequence[str]) -> dict[str, Any]:
        given = {n: getattr(owner, n) for n in names}
        return {n: (t.float() * s).to(t.dtype) for n, t in given.items() if t is not None}

    for i in (group.weight, group.bias):
        if i is not None:
            value = get_tensor(program.module, group.node.args[i])
            assert value is not None
            label = "weight" if i == group.weight else "bias"
            program.set_argument(group.node, i, f"{group.name}.{label}", value.float() / s)
    for unit in group.linears:
        new = (unit.weight.float() * s).to(unit.weight.dtype)
        program.set_linear(unit, new, unit.bias, None)
    site = group.site
    if site is not None and site.routed is not None:
        r = site.routed
        names = ("shared_gate", "shared_up", "expert_gate", "expert_up", "router", "router_gate")
        program.set_routed(site, replace(r, **scaled(r, names)))
        site.tuned = True
    for block in group.gates:
        gate = block.gate
        assert gate is not None
        program.set_gate(
            block, replace(gate, **scaled(gate, ("weight", "bridge_in", "bridge_gate")))
        )
