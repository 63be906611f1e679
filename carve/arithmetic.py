"""The arithmetic of onnxruntime's CPU kernels, so that weights are fitted to what will run.

Block-wise products round the activations as well as the weights. Everything here gives what the
kernels give up to the order of summation in fp32 (and up to ties of rounding that it decides).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from carve.dialect import LinearRule, linear_rule
from carve.ffn import RoutedFFN
from carve.grid import BLOCK, Grid, in_blocks
from carve.program import Program

Kernel = Literal["int8", "lookup", "float"]
"""How a product is computed: with int8 activations, by look-up tables, or in fp32."""
_LOOKUP_ROWS = 128
_SIGNS = torch.tensor([[1.0 if g >> i & 1 else -1.0 for i in range(4)] for g in range(1, 16, 2)])


def rounded(x: Tensor, block: int = BLOCK) -> Tensor:
    """Activations ``[..., K]`` as int8 kernels see them: ``s round(x / s)``, ``s = max|x| / 127``.

    One scale for each row and block.
    """
    blocks = x.unflatten(-1, (-1, block))
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    safe = torch.where(scale == 0, torch.ones_like(scale), scale)
    result: Tensor = ((blocks / safe).round_() * scale).flatten(-2)
    return result


def lookup_product(x: Tensor, levels: Tensor, grid: Grid) -> Tensor:
    """``x @ w.T`` as the 2-bit kernel computes it: tables of sums of four activations.

    A weight is ``(b_0 / 2 + b_1 - 1/2) s`` with signs ``b`` in ``{-1, 1}``, so a product is sums of
    four activations with signs, of which there are 16 (8 and their opposites). Each sum is rounded
    to int8; the scale is the largest sum of magnitudes in a group of 32 activations (64 where
    blocks are multiples of 64) over 127. Source: T-MAC (arXiv 2407.00088).

    Shapes: ``x`` ``[..., K]`` fp32, ``levels`` ``[N, K]``.
    """
    rows, k = levels.shape
    group = 64 if grid.block % 64 == 0 else 32
    fours = x.unflatten(-1, (-1, 4))
    scale = fours.abs().sum(-1).unflatten(-1, (-1, group // 4)).amax(-1) / 127
    scale = scale.repeat_interleave(group // 4, -1)[..., None]
    inverse = torch.where(scale > 0, 1 / scale, torch.zeros_like(scale))
    table = ((fours @ _SIGNS.T) * inverse).round_() * scale
    picks = x.new_zeros(rows, k // 4, 8)
    quads = levels.unflatten(-1, (-1, 4)).long()
    place = torch.tensor([1, 2, 4, 8])
    for bit, share in ((0, 0.5), (1, 1.0)):
        index = ((quads >> bit & 1) * place).sum(-1, keepdim=True)
        odd = index % 2 == 1
        signed = torch.where(odd, share, -share)
        picks.scatter_add_(2, torch.where(odd, index, 15 - index) // 2, signed.to(x.dtype))
    picks *= grid.scale.repeat_interleave(grid.block // 4, 1)[..., None]
    half = x.unflatten(-1, (-1, grid.block)).sum(-1) @ grid.scale.T
    result: Tensor = F.linear(table.flatten(-2), picks.flatten(-2)) - half / 2
    return result


def product(x: Tensor, weight: Tensor, grid: Grid, kernel: Kernel = "int8") -> Tensor:
    """``x @ weight.T`` with ``weight`` ``[N, K]`` on ``grid``, as ``kernel`` computes it."""
    if kernel == "lookup":
        return lookup_product(x, grid.levels(weight), grid)
    w = grid.round(weight)
    return F.linear(rounded(x, grid.block) if kernel == "int8" else x, w)


def fused(routed: RoutedFFN, block: int = BLOCK) -> bool:
    """Whether one ``QMoE`` node runs the experts: its activations, and widths in whole blocks."""
    widths = (*routed.expert_up.shape[1:], routed.expert_down.shape[1])
    known = (
        routed.activation == "silu"
        if routed.expert_gate is not None
        else routed.activation in ("silu", "relu")
    )
    return known and in_blocks(*widths, block=block)


def expert_kernel(bits: int, rows: int, *, is_fused: bool, block: int = BLOCK) -> Kernel:
    """What runs an expert's product with ``rows`` output columns.

    ``QMoE`` computes 2-bit weights by look-up where the rows are a multiple of 128, else in fp32.
    """
    if bits != 2 or not is_fused:
        return "int8"
    return "lookup" if rows % _LOOKUP_ROWS == 0 and block % 32 == 0 else "float"


class Precision:
    """Which grid every weight of a program is on.

    Weights that a pass put on a grid are known by where they lie in memory; for others it is the
    grid of round-to-nearest at ``bits`` (where a pass has been at work, 8: what it left alone is
    small), and None at 16 bits or where rows are no whole blocks.
    """

    def __init__(self, program: Program, bits: int, block: int = BLOCK) -> None:
        self.bits = bits if next(grids_of(program), None) is None else 8
        self.block = block
        self._known: dict[int, tuple[Grid, Kernel]] = {}
        # What is known by its address has to stay there.
        self._kept: list[Tensor] = []
        for weight, grid in _stored(program):
            self._know(weight, grid, "int8")
        for site in program.carved:
            if site.routed is not None:
                self._know_routed(site.routed)

    def _know(self, weight: Tensor, grid: Grid, kernel: Kernel) -> None:
        self._known[weight.data_ptr()] = (grid, kernel)
        self._kept.append(weight)

    def _know_routed(self, r: RoutedFFN) -> None:
        in_one = fused(r, self.block)
        for name, weight, grid in r.on_grids():
            if name.startswith("shared"):
                self._know(weight, grid, "int8")
                continue
            # Gate and up are one product there.
            paired = name != "expert_down" and r.expert_gate is not None
            rows = len(weight) * (2 if paired else 1)
            kernel = expert_kernel(grid.bits, rows, is_fused=in_one, block=grid.block)
            self._know(weight, grid, kernel)

    def known(self, weight: Tensor) -> Grid | None:
        """The grid that a pass put a weight on, if any did."""
        found = self._known.get(weight.data_ptr())
        return None if found is None else found[0]

    def of(self, weight: Tensor) -> Grid | None:
        """The grid of a weight ``[N, K]``, None where it stays fp32."""
        known = self.known(weight)
        if known is not None:
            return known
        if self.bits >= 16 or not in_blocks(weight.shape[-1], block=self.block):
            return None
        return Grid.nearest(weight, self.bits, self.block)

    def nbytes(self, weight: Tensor) -> int:
        """Bytes of a weight as it is emitted: levels and scales, or fp32."""
        grid = self.of(weight) if weight.ndim == 2 else None
        return 4 * weight.numel() if grid is None else grid.bytes

    def experts(self, routed: RoutedFFN) -> list[int]:
        """Bytes of each routed expert's weights."""
        stacks = [t for k, t in routed.tensors().items() if k.startswith("expert_") and t.ndim >= 2]
        return [sum(self.nbytes(t[e]) for t in stacks) for e in range(routed.num_experts)]

    def shared(self, routed: RoutedFFN) -> int:
        """Bytes of the shared expert's weights."""
        return sum(self.nbytes(t) for k, t in routed.tensors().items() if k.startswith("shared"))

    def rest(self, program: Program) -> int:
        """Bytes of everything but the routed experts; weights that are shared count once."""
        moved = {
            t.data_ptr()
            for s in program.carved
            if s.routed is not None
            for k, t in s.routed.tensors().items()
            if k.startswith("expert_") and t.ndim >= 2
        }
        rest = {p.data_ptr(): p for p in program.module.parameters() if p.data_ptr() not in moved}
        return sum(self.nbytes(p) for p in rest.values())

    def total(self, program: Program) -> int:
        """Bytes of the whole program's weights."""
        layers = [s.routed for s in program.carved if s.routed is not None]
        return self.rest(program) + sum(sum(self.experts(r)) for r in layers)

    def rule(
        self,
        disturb: Callable[[Tensor], Tensor] = lambda x: x,
        *,
        int8: bool = True,
        lookup: bool = True,
    ) -> LinearRule:
        """Products as the kernels compute them; ``disturb`` is applied to the activations.

        Without ``int8`` kernels do not round the activations, which is so on CUDA; without
        ``lookup`` those of 2 bits round them as all others do, which is so in TVM.
        """

        def apply(x: Tensor, weight: Tensor) -> Tensor:
            found = self._known.get(weight.data_ptr())
            grid, kernel = found or (self.of(weight), "int8")
            x = disturb(x.float())
            if grid is None:
                return F.linear(x, weight.float())
            if not int8:
                return product(x, weight, grid, "float")
            return product(x, weight, grid, kernel if lookup else "int8")

        return apply


@contextmanager
def as_emitted(program: Program) -> Iterator[None]:
    """Run the program in the target's arithmetic, where a pass has quantized it."""
    if next(grids_of(program), None) is None:
        yield
        return
    with linear_rule(Precision(program, 8).rule()):
        yield


def _stored(program: Program) -> Iterator[tuple[Tensor, Grid]]:
    """Weights on grids that stand in the graph itself."""
    for linear in program.linears:
        if linear.grid is not None:
            yield linear.weight, linear.grid
    for lookup in program.lookups:
        if lookup.grid is not None:
            yield lookup.weight, lookup.grid


def grids_of(program: Program) -> Iterator[Grid]:
    """Every grid of a program."""
    for _, grid in _stored(program):
        yield grid
    for site in program.carved:
        if site.routed is not None:
            yield from (grid for _, _, grid in site.routed.on_grids())
