"""What a kernel computes, apart from the processor it is made for."""

from __future__ import annotations

from dataclasses import dataclass

from carve.errors import CarveError

_STEP = 32
"""Blocks are multiples of this many weights."""


@dataclass(frozen=True)
class Format:
    """How a matrix is stored: fp32 (``bits`` 32), or levels of 8, 4 or 2 bits in scaled blocks.

    Levels are those of `carve.grid.Grid`; products round their activations to int8 by block, as
    `carve.arithmetic.rounded` does.
    """

    bits: int = 32
    block: int = 0

    def __post_init__(self) -> None:
        if self.bits == 32 and self.block == 0:
            return
        if self.bits not in (2, 4, 8) or self.block <= 0 or self.block % _STEP:
            raise CarveError(
                "kernel",
                f"no TVM kernel for {self.bits} bits in blocks of {self.block}",
                f"32 bits, or 2, 4 or 8 in blocks that are multiples of {_STEP}",
            )

    @property
    def quantized(self) -> bool:
        """Whether products are integer ones."""
        return self.bits < 32

    @property
    def zero(self) -> int:
        """The level that stands for 0."""
        return 1 << (self.bits - 1)


def check_width(width: int, form: Format, what: str) -> None:
    """Refuse rows that are no whole blocks."""
    if width <= 0 or (form.quantized and width % form.block):
        raise CarveError("kernel", f"{what}: rows of {width} are no whole blocks of {form.block}")


@dataclass(frozen=True)
class LinearSpec:
    """``y = x W^T + b`` with ``W`` ``[out_features, in_features]``."""

    out_features: int
    in_features: int
    format: Format = Format()
    bias: bool = False

    def __post_init__(self) -> None:
        check_width(self.in_features, self.format, "linear")


@dataclass(frozen=True)
class RoutedSpec:
    """A routed FFN, see `carve.dialect.routed_ffn`; without experts a dense FFN in one kernel.

    ``shared_size`` is ``s``, ``expert_size`` ``m``; ``gated``: whether there are gates; the
    ``*_in`` formats are those of gate and up, and ``*_in_bias`` says that they have biases.
    ``out_features`` is ``hidden_size`` unless given.
    """

    hidden_size: int
    shared_size: int
    expert_size: int = 0
    num_experts: int = 0
    top_k: int = 0
    dynamic: bool = False
    activation: str = "silu"
    gated: bool = True
    shared_in: Format = Format()
    shared_down: Format = Format()
    expert_in: Format = Format()
    expert_down: Format = Format()
    shared_in_bias: bool = False
    expert_in_bias: bool = False
    output_bias: bool = False
    expert_bias: bool = False
    out_features: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.top_k <= self.num_experts:
            raise CarveError("kernel", f"top_k {self.top_k} of {self.num_experts} experts")
        if not self.shared_size and not self.num_experts:
            raise CarveError("kernel", "an FFN without neurons")
        if self.shared_size:
            check_width(self.hidden_size, self.shared_in, "shared expert, in")
            check_width(self.shared_size, self.shared_down, "shared expert, down")
        if self.num_experts:
            check_width(self.hidden_size, self.expert_in, "experts, in")
            check_width(self.expert_size, self.expert_down, "experts, down")

    @property
    def out(self) -> int:
        """Width of the result."""
        return self.out_features or self.hidden_size
