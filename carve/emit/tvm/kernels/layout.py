"""The arrays that a kernel takes beside its activations: names, order, sizes.

Packing (`carve.emit.tvm.weights`) and kernels follow the same list, and neither needs the other.
Every array is one-dimensional; a matrix's rows are padded with zeros to whole panels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from carve.emit.tvm.cpu import Cpu
from carve.emit.tvm.kernels.spec import Format, LinearSpec, RoutedSpec
from carve.errors import CarveError

VECTORS = 2
"""Vectors of output columns in a panel."""
_INDEX_LIMIT = 2**31


@dataclass(frozen=True)
class Panels:
    """``count`` matrices ``[rows, columns]`` in panels, perhaps with a bias for every row.

    ``paired``: a panel is a vector of gates and the vector of the same neurons' ups, else two
    vectors of rows; ``rows`` counts neurons.
    """

    name: str
    form: Format
    count: int
    rows: int
    columns: int
    lanes: int
    paired: bool = False
    bias: str = ""

    def __post_init__(self) -> None:
        if max(a.size for a in self.arrays()) >= _INDEX_LIMIT:
            raise CarveError("kernel", f"{self.name}: more than 2^31 elements")

    @property
    def panels(self) -> int:
        """Panels of one matrix."""
        return -(-self.rows // (self.lanes if self.paired else VECTORS * self.lanes))

    @property
    def padded(self) -> int:
        """Neurons in whole panels, of one matrix."""
        return self.panels * self.lanes * (1 if self.paired else VECTORS)

    def arrays(self) -> Iterator[Array]:
        """Weight, scales where there are levels, bias where there is one."""
        width = self.count * self.panels * VECTORS * self.lanes
        form, size = self.form, width * self.columns
        if form.quantized:
            yield Array(self.name, size * form.bits // 8, "uint8")
            yield Array(f"{self.name}_scale", size // form.block, "float32")
        else:
            yield Array(self.name, size, "float32")
        if self.bias:
            yield Array(self.bias, width, "float32")


@dataclass(frozen=True)
class Array:
    """A one-dimensional argument."""

    name: str
    size: int
    dtype: str

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return self.size * (1 if self.dtype == "uint8" else 4)


def linear_layout(spec: LinearSpec, cpu: Cpu) -> Panels:
    """The weight of a dense product."""
    bias = "bias" if spec.bias else ""
    return Panels(
        "weight", spec.format, 1, spec.out_features, spec.in_features, cpu.lanes, bias=bias
    )


def routed_layout(spec: RoutedSpec, cpu: Cpu) -> dict[str, Panels]:
    """The weights of a routed FFN: ``shared_in``, ``shared_down``, ``expert_in``, ``expert_down``.

    Those of a part that is not there are left out. A bias of the result without a shared expert
    is not among them, see `output_bias`.
    """
    found = []
    d, out, n = spec.hidden_size, spec.out, cpu.lanes
    if spec.shared_size:
        s, bias = spec.shared_size, "shared_in_bias" if spec.shared_in_bias else ""
        found.append(Panels("shared_in", spec.shared_in, 1, s, d, n, spec.gated, bias))
        found.append(Panels("shared_down", spec.shared_down, 1, out, s, n))
    if spec.num_experts:
        e, m = spec.num_experts, spec.expert_size
        bias = "expert_in_bias" if spec.expert_in_bias else ""
        found.append(Panels("expert_in", spec.expert_in, e, m, d, n, spec.gated, bias))
        bias = "expert_bias" if spec.expert_bias else ""
        found.append(Panels("expert_down", spec.expert_down, e, out, m, n, bias=bias))
    return {p.name: p for p in found}


def output_bias(spec: RoutedSpec, cpu: Cpu) -> Array | None:
    """The bias of the result, the last of the packed arrays."""
    if not spec.output_bias:
        return None
    width = VECTORS * cpu.lanes
    return Array("output_bias", -(-spec.out // width) * width, "float32")


def routed_arrays(spec: RoutedSpec, cpu: Cpu) -> list[Array]:
    """All packed arrays of a routed FFN, in the order of the kernel's arguments."""
    last = output_bias(spec, cpu)
    arrays = [a for p in routed_layout(spec, cpu).values() for a in p.arrays()]
    return arrays if last is None else [*arrays, last]
