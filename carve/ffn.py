"""Weights of one FFN, dense or routed, with what they compute."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from carve import dialect
from carve.grid import Grid
from carve.storable import storable

_NOTES = ("mean_top_k", "grids")
_ROUTING = ("router", "router_bias", "router_gate", "top_k", "dynamic")


@storable
@dataclass(frozen=True)
class RoutedFFN:
    """Weights of one routed FFN, in the argument order of `carve.dialect.routed_ffn`."""

    shared_gate: Tensor | None
    shared_gate_bias: Tensor | None
    shared_up: Tensor | None
    shared_up_bias: Tensor | None
    shared_down: Tensor | None
    output_bias: Tensor | None
    expert_gate: Tensor | None
    expert_gate_bias: Tensor | None
    expert_up: Tensor
    expert_up_bias: Tensor | None
    expert_down: Tensor
    expert_bias: Tensor | None
    router: Tensor
    router_bias: Tensor | None
    router_gate: Tensor | None
    activation: str
    top_k: int
    dynamic: bool = False
    mean_top_k: float | None = None
    """Experts a token on calibration text, where ``dynamic`` leaves it to the token."""
    grids: Mapping[str, Grid | tuple[Grid, ...]] = field(default_factory=dict)
    """By argument name, what the weights were rounded to; of experts, a grid each."""

    @property
    def num_experts(self) -> int:
        """Number of routed experts ``E``."""
        return self.expert_up.shape[0]

    @property
    def expert_size(self) -> int:
        """Neurons in one routed expert, ``m``."""
        return self.expert_up.shape[1]

    @property
    def shared_size(self) -> int:
        """Neurons in the shared expert, ``s``."""
        return 0 if self.shared_up is None else self.shared_up.shape[0]

    @property
    def active_size(self) -> float:
        """Neurons that one token passes through, ``s + k * m`` (``dynamic``: on average)."""
        k = self.top_k if self.mean_top_k is None else self.mean_top_k
        return self.shared_size + k * self.expert_size

    @property
    def intermediate_size(self) -> int:
        """Neurons in all, as in the dense FFN."""
        return self.shared_size + self.num_experts * self.expert_size

    @property
    def expert_macs(self) -> int:
        """Multiply-accumulates of one routed expert on one token."""
        return self._neuron_macs * self.expert_size

    @property
    def _neuron_macs(self) -> int:
        return (2 if self.expert_gate is None else 3) * self.expert_up.shape[-1]

    @property
    def macs(self) -> int:
        """Multiply-accumulates a token, the router counted."""
        return round(self._neuron_macs * self.active_size) + self.router_macs

    @property
    def router_macs(self) -> int:
        """Multiply-accumulates a token of the router alone."""
        return self.router.numel() * (1 if self.router_gate is None else 2)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are present, by argument name."""
        items = {f.name: getattr(self, f.name) for f in fields(self)}
        return {k: v for k, v in items.items() if isinstance(v, Tensor)}

    def arguments(self) -> dict[str, Any]:
        """The arguments of `carve.dialect.routed_ffn` after its input, in order."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _NOTES}

    def on_grids(self) -> Iterator[tuple[str, Tensor, Grid]]:
        """Every matrix that is on a grid ``[N, K]``, by argument name; an expert's is one."""
        for name, grids in self.grids.items():
            weight = getattr(self, name)
            if isinstance(grids, Grid):
                yield name, weight, grids
            else:
                yield from ((name, w, g) for w, g in zip(weight, grids, strict=True))

    def regridded(self, change: Callable[[Tensor, Grid], tuple[Tensor, Grid]]) -> RoutedFFN:
        """The same FFN with what ``change`` makes of each matrix and its grid."""
        found: dict[str, list[tuple[Tensor, Grid]]] = {name: [] for name in self.grids}
        for name, weight, grid in self.on_grids():
            found[name].append(change(weight, grid))
        weights: dict[str, Any] = {}
        grids: dict[str, Grid | tuple[Grid, ...]] = {}
        for name, each in found.items():
            if isinstance(self.grids[name], Grid):
                ((weights[name], grids[name]),) = each
            else:
                weights[name] = torch.stack([w for w, _ in each])
                grids[name] = tuple(g for _, g in each)
        return replace(self, grids=grids, **weights)

    def with_top_k(self, top_k: int) -> RoutedFFN:
        """The same weights with another, fixed number of experts a token."""
        return replace(self, top_k=top_k, dynamic=False, mean_top_k=None)

    def __call__(self, x: Tensor) -> Tensor:
        """Run the specification on ``x`` ``[..., d]``."""
        return dialect.routed_ffn(x, *self.arguments().values())

    def chosen(self, x: Tensor) -> Tensor:
        """Boolean mask ``[..., E]`` of the experts that ``x`` ``[..., d]`` takes."""
        return dialect.select(self.logits(x), self.top_k, self.dynamic)

    def weighted(self, x: Tensor, weights: Tensor) -> Tensor:
        """What ``x`` ``[..., d]`` gives with experts weighed ``weights`` ``[T, E]``, 0 for none."""
        given = {k: v for k, v in self.arguments().items() if k not in _ROUTING}
        flat = x.reshape(-1, x.shape[-1])
        arguments = (*given.values(), weights)
        y = dialect.chosen_ffn(flat, weights > 0, *arguments)
        return y.reshape(x.shape)

    def merged(self) -> DenseFFN:
        """All neurons as one dense FFN, the shared expert's first: what every expert on gives."""

        def rows(shared: Tensor | None, expert: Tensor | None) -> Tensor | None:
            if expert is None:
                return None
            flat = expert.flatten(0, 1)
            return flat if shared is None else torch.cat((shared, flat))

        down = self.expert_down.transpose(0, 1).flatten(1)
        bias = self.output_bias
        if self.expert_bias is not None:
            total = self.expert_bias.sum(0)
            bias = total if bias is None else bias + total
        return DenseFFN(
            rows(self.shared_gate, self.expert_gate),
            rows(self.shared_gate_bias, self.expert_gate_bias),
            rows(self.shared_up, self.expert_up),  # type: ignore[arg-type]
            rows(self.shared_up_bias, self.expert_up_bias),
            down if self.shared_down is None else torch.cat((self.shared_down, down), 1),
            bias,
            self.activation,
        )

    def logits(self, x: Tensor) -> Tensor:
        """Router scores ``[..., E]`` for ``x`` ``[..., d]``."""
        return dialect.router_logits(
            x, self.router, self.router_bias, self.router_gate, self.activation
        )


@dataclass(frozen=True)
class DenseFFN:
    """Weights of one dense FFN site: ``down(hidden(x)) + down_bias``.

    Shapes: ``gate``/``up`` ``[m, d]``, ``down`` ``[d_out, m]``, biases ``[m]`` and ``[d_out]``.
    """

    gate: Tensor | None
    gate_bias: Tensor | None
    up: Tensor
    up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None
    activation: str

    @property
    def intermediate_size(self) -> int:
        """Number of neurons ``m``."""
        return self.up.shape[0]

    @property
    def macs(self) -> int:
        """Multiply-accumulates a token."""
        return self.up.numel() * (1 if self.gate is None else 2) + self.down.numel()

    def hidden(self, x: Tensor) -> Tensor:
        """Hidden activations ``[..., m]`` for ``x`` ``[..., d]``."""
        return dialect.hidden(x, self.gate, self.gate_bias, self.up, self.up_bias, self.activation)

    def __call__(self, x: Tensor) -> Tensor:
        """Run the FFN on ``x`` ``[..., d]``."""
        return dialect.linear(self.hidden(x), self.down, self.down_bias)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are present, by field name."""
        items = {f.name: getattr(self, f.name) for f in fields(self)}
        return {k: v for k, v in items.items() if isinstance(v, Tensor)}
