"""Sites: the parts of a program that passes may rewrite."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, fx

from carve import dialect
from carve.ffn import DenseFFN, RoutedFFN
from carve.grid import Grid
from carve.storable import storable

FFN = Callable[[Tensor], Tensor]
_aten = torch.ops.aten
_TRANSPARENT = {_aten.view.default, _aten.reshape.default, _aten.clone.default}


def added_to(node: fx.Node) -> fx.Node | None:
    """The stream that a result is added to, where nothing but a view stands between."""
    while len(node.users) == 1:
        user = next(iter(node.users))
        if user.target is _aten.add.Tensor:
            others = [a for a in user.args if a is not node]
            return others[0] if len(others) == 1 and isinstance(others[0], fx.Node) else None
        if user.target not in _TRANSPARENT:
            return None
        node = user
    return None


@storable
@dataclass(frozen=True)
class Gate:
    """Weights of a skip gate and its bridge, in the argument order of `carve.dialect.gated`."""

    weight: Tensor
    bias: Tensor
    bridge_in: Tensor | None
    bridge_gate: Tensor | None
    bridge_out: Tensor | None
    bridge_bias: Tensor | None
    always: int = 2
    skip: float = 0.0
    """Share of tokens skipped on calibration text, those that always run not counted."""

    @property
    def macs(self) -> int:
        """Multiply-accumulates a token of gate and bridge; every token pays them."""
        parts = (self.weight, self.bridge_in, self.bridge_gate, self.bridge_out)
        return sum(t.numel() for t in parts if t is not None)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are present, by argument name."""
        items = {f.name: getattr(self, f.name) for f in fields(self)}
        return {k: v for k, v in items.items() if isinstance(v, Tensor)}

    def arguments(self) -> dict[str, Any]:
        """The arguments of `carve.dialect.gated` after ``y``, ``x`` and ``position``, in order."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "skip"}

    def scores(self, x: Tensor) -> Tensor:
        """``[...]`` scores of ``x`` ``[..., d]``; a token runs where its score is positive."""
        return dialect.gate_scores(x, self.weight, self.bias)

    def running(self, x: Tensor, position: Tensor) -> Tensor:
        """Which tokens run, bool ``[...]``."""
        return (self.scores(x) > 0) | (position < self.always)

    def bridge(self, x: Tensor) -> Tensor:
        """What a skipped token gets in place of the block's result, ``[..., d_out]``."""
        a = self.arguments()
        return dialect.bridge(x, *(a[f"bridge_{n}"] for n in ("in", "gate", "out", "bias")))

    def __call__(self, y: Tensor, x: Tensor, position: Tensor) -> Tensor:
        """Run the specification."""
        return dialect.gated(y, x, position, *self.arguments().values())


@dataclass
class Block(ABC):
    """A residual branch that a gate may skip: an FFN, or attention without keys and values.

    ``name`` is the module path, ``input`` and ``output`` the FX nodes of its input (after the norm)
    and its result. ``gate`` and ``gate_node`` are set once it is gated.
    """

    name: str
    input: fx.Node
    output: fx.Node
    gate: Gate | None = field(default=None, kw_only=True)
    gate_node: fx.Node | None = field(default=None, kw_only=True)

    @property
    def result(self) -> fx.Node:
        """The node that the rest of the graph reads."""
        return self.gate_node or self.output

    @property
    def residual(self) -> fx.Node | None:
        """The stream that the result is added to, where nothing but a view stands between."""
        return added_to(self.result)

    @property
    def gateable(self) -> bool:
        """Whether input and result are ``[B, S, d]``: a gate has to know each token's position."""
        values = [n.meta.get("val") for n in (self.input, self.output)]
        return all(isinstance(v, Tensor) and v.ndim == 3 for v in values)

    @property
    @abstractmethod
    def skippable_macs(self) -> int:
        """Multiply-accumulates a token that a gate may save, as the block stands."""

    @property
    def gated_macs(self) -> int:
        """What of them is used with the gate as it is, the gate's own counted."""
        if self.gate is None:
            return self.skippable_macs
        return round(self.skippable_macs * (1.0 - self.gate.skip)) + self.gate.macs


@dataclass
class FFNSite(Block):
    """An FFN that passes may rewrite.

    ``routed`` is set once the site is carved; ``tuned`` once its weights are no longer the dense
    FFN's.
    """

    dense: DenseFFN
    routed: RoutedFFN | None = None
    tuned: bool = False

    @property
    def macs(self) -> int:
        """Multiply-accumulates a token as the site stands, a gate left out."""
        return (self.routed or self.dense).macs

    @property
    def skippable_macs(self) -> int:
        """The whole FFN's."""
        return self.macs


@dataclass
class AttentionSite(Block):
    """Attention with a cache, whose queries, scores and output a gate may skip.

    Keys and values stand outside: later tokens attend to skipped ones too. ``attention`` is the
    node of the dialect's operator, ``query_macs`` counts the query and output projections.
    """

    attention: fx.Node
    query_macs: int

    @property
    def skippable_macs(self) -> int:
        """The query's and the output's projections; scores are not counted in budgets."""
        return self.query_macs


@dataclass(frozen=True)
class Linear:
    """A product with a weight that stands in the graph itself: ``y = x W' + b``.

    ``name`` is the module path; ``grid`` what its weight ``[N, K]`` was rounded to.
    """

    name: str
    output: fx.Node
    weight: Tensor
    bias: Tensor | None
    grid: Grid | None = None

    @property
    def input(self) -> fx.Node:
        """The node of its input."""
        node = self.output.args[0]
        assert isinstance(node, fx.Node)
        return node

    @property
    def residual(self) -> fx.Node | None:
        """The stream that its result is added to, see `added_to`."""
        return added_to(self.output)


@dataclass(frozen=True)
class Lookup:
    """An embedding: rows of a table ``[V, d]``. ``grid`` is what the table was rounded to."""

    name: str
    output: fx.Node
    weight: Tensor
    grid: Grid | None = None


@dataclass(frozen=True)
class AtSite:
    """A program that waits at a site or a linear.

    ``x``: the block's input; ``residual``: the stream its result is added to; ``y``: its result
    before any gate, None where the program waits for it to be sent in.
    """

    site: Block | Linear
    x: Tensor
    residual: Tensor | None
    y: Tensor | None = None

    @property
    def block(self) -> Block:
        """The site, where only blocks were asked for."""
        assert isinstance(self.site, Block)
        return self.site
