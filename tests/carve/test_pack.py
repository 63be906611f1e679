"""Block-wise weights: bounds of the rounding, the byte layout, and onnxruntime's own arithmetic."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from carve.arithmetic import Kernel, expert_kernel, product, rounded
from carve.emit import pack
from carve.grid import BLOCK, Grid

BITS = (2, 4, 8)
# Far from where fp32 loses digits, with exact zeros.
WEIGHTS = st.floats(-100, 100, width=32).map(lambda v: v if abs(v) > 1e-6 else 0.0)


@st.composite
def matrices(draw: st.DrawFn) -> Tensor:
    rows, columns = draw(st.integers(1, 3)), BLOCK * draw(st.integers(1, 3))
    return torch.from_numpy(draw(arrays(np.float32, (rows, columns), elements=WEIGHTS)))


@pytest.mark.parametrize("bits", BITS)
@settings(max_examples=60, deadline=None)
@given(weight=matrices())
def test_error_is_at_most_half_a_step(bits: int, weight: Tensor) -> None:
    grid = Grid.nearest(weight, bits)
    levels = grid.levels(weight)
    blocks = weight.unflatten(-1, (-1, BLOCK))
    assert levels.shape == weight.shape
    assert levels.dtype == torch.uint8
    assert int(levels.max()) < 1 << bits
    assert grid.scale.shape == blocks.shape[:-1]
    got = grid.values(levels).unflatten(-1, (-1, BLOCK))
    step = grid.scale.abs()[..., None]
    # There is no level for what is beyond the highest: that weight may be a whole step off.
    top = (1 << (bits - 1)) - 0.5
    clipped = blocks * grid.scale.sign()[..., None] > top * step
    allowed = torch.where(clipped, step, step / 2)
    assert bool(((got - blocks).abs() <= allowed * (1 + 1e-4)).all())


@pytest.mark.parametrize("bits", BITS)
@settings(max_examples=60, deadline=None)
@given(weight=matrices())
def test_extreme_of_every_block_is_exact(bits: int, weight: Tensor) -> None:
    got = Grid.nearest(weight, bits).round(weight).unflatten(-1, (-1, BLOCK))
    blocks = weight.unflatten(-1, (-1, BLOCK))
    largest = blocks.abs().amax(-1, keepdim=True)
    at = blocks.abs() == largest
    assert bool(((got == blocks) & at).any(-1).all())


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_twice_changes_nothing(bits: int, dtype: torch.dtype) -> None:
    weight = torch.randn(6, 96, generator=torch.Generator().manual_seed(0))
    grid = Grid.nearest(weight, bits)
    once = grid.round(weight)
    assert torch.equal(grid.levels(once.to(dtype)), grid.levels(weight))
    assert torch.equal(grid.round(once.to(dtype)), once)


@pytest.mark.parametrize("bits", BITS)
def test_zero_blocks_stay_zero(bits: int) -> None:
    weight = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    weight[1] = 0
    got = Grid.nearest(weight, bits).round(weight)
    assert not got[1].any()
    assert bool(torch.isfinite(got).all())


def test_effective_size_counts_the_scales() -> None:
    grid = Grid.nearest(torch.randn(4, 64), 4)
    assert 8 * grid.bytes / (4 * 64) == 5.0
    assert 8 * Grid.nearest(torch.randn(4, 128), 4, 128).bytes / (4 * 128) == 4.25


def test_leading_axes_are_independent() -> None:
    weight = torch.randn(4, 3, 64, generator=torch.Generator().manual_seed(0))
    grid = Grid.nearest(weight, 4)
    for e in range(4):
        one = Grid.nearest(weight[e], 4)
        assert torch.equal(grid.levels(weight)[e], one.levels(weight[e]))
        assert torch.equal(grid[e].scale, one.scale)


def unpack(packed: np.ndarray, bits: int) -> np.ndarray:
    parts = [(packed >> (bits * i)) & ((1 << bits) - 1) for i in range(8 // bits)]
    return np.stack(parts, -1).reshape(*packed.shape[:-1], -1)


@pytest.mark.parametrize("bits", BITS)
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_pack_round_trip(bits: int, data: st.DataObject) -> None:
    shape = (data.draw(st.integers(1, 3)), 8 * data.draw(st.integers(1, 6)))
    values = data.draw(arrays(np.uint8, shape, elements=st.integers(0, (1 << bits) - 1)))
    packed = pack.pack(torch.from_numpy(values), bits)
    assert packed.dtype == np.uint8
    assert packed.shape == (shape[0], shape[1] * bits // 8)
    assert np.array_equal(unpack(packed, bits), values)
    assert torch.equal(pack.unpack(packed, bits), torch.from_numpy(values))


def test_pack_puts_the_first_level_lowest() -> None:
    assert pack.pack(torch.tensor([[1, 2]], dtype=torch.uint8), 4).tolist() == [[0x21]]
    four = torch.tensor([[0, 1, 2, 3]], dtype=torch.uint8)
    assert pack.pack(four, 2).tolist() == [[0b11100100]]


def test_interleave() -> None:
    gate, up = torch.zeros(2, 3, 4), torch.ones(2, 3, 4)
    both = pack.interleave(gate, up)
    assert both.shape == (2, 6, 4)
    assert both[:, ::2].eq(0).all()
    assert both[:, 1::2].eq(1).all()
    rows = pack.interleave(torch.arange(3.0)[:, None], torch.arange(10.0, 13)[:, None])
    assert rows.flatten().tolist() == [0, 10, 1, 11, 2, 12]


def run(
    node: onnx.NodeProto, weights: dict[str, np.ndarray], feeds: dict[str, np.ndarray]
) -> Tensor:
    """A model of one node with result ``y``."""
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info(k, TensorProto.FLOAT, v.shape) for k, v in feeds.items()],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(v, k) for k, v in weights.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, feeds)[0])


def relative(got: Tensor, want: Tensor) -> float:
    return float((got - want).abs().max() / want.abs().max())


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("block", [32, 128])
@pytest.mark.parametrize("rows", [1, 3, 17])
@pytest.mark.parametrize("n, k", [(48, 128), (7, 256)])
def test_products_are_onnxruntimes_arithmetic(
    bits: int, block: int, rows: int, n: int, k: int
) -> None:
    g = torch.Generator().manual_seed(bits + rows)
    weight, x = torch.randn(n, k, generator=g), torch.randn(rows, k, generator=g)
    x[0, :32] = 0
    grid = Grid.nearest(weight, bits, block)
    packed = pack.pack(grid.levels(weight), bits).reshape(n, k // block, block * bits // 8)
    node = helper.make_node(
        "MatMulNBits",
        ["x", "w", "s"],
        ["y"],
        domain="com.microsoft",
        K=k,
        N=n,
        bits=bits,
        block_size=block,
        accuracy_level=4,
    )
    got = run(node, {"w": packed, "s": grid.scale.numpy()}, {"x": x.numpy()})
    assert relative(got, product(x, weight, grid)) < 1e-5
    # The rounding of activations is really there: the product of fp32 ones is far from it.
    assert relative(got, product(x, weight, grid, "float")) > 5e-4


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("block, m", [(32, 32), (32, 64), (32, 128), (128, 128)])
@pytest.mark.parametrize("rows", [1, 9])
def test_experts_are_onnxruntimes_arithmetic(bits: int, block: int, m: int, rows: int) -> None:
    g = torch.Generator().manual_seed(m + rows)
    e, d = 4, 128
    gate, up = torch.randn(2, e, m, d, generator=g) / d**0.5
    down = torch.randn(e, d, m, generator=g) / m**0.5
    x, scores = torch.randn(rows, d, generator=g), torch.randn(rows, e, generator=g)
    scores[:, 0] = 1.0  # no token without an expert
    first, second = pack.interleave(gate, up), down
    grids = [Grid.nearest(w, bits, block) for w in (first, second)]
    node = helper.make_node(
        "QMoE",
        ["x", "r", "w1", "s1", "", "w2", "s2", *[""] * 7, "routes"],
        ["y"],
        domain="com.microsoft",
        k=e,
        normalize_routing_weights=0,
        expert_weight_bits=bits,
        block_size=block,
        accuracy_level=4,
        activation_type="swiglu",
        swiglu_fusion=1,
        activation_alpha=1.0,
        activation_beta=0.0,
    )
    weights = {}
    for i, (w, grid) in enumerate(zip((first, second), grids, strict=True), 1):
        weights[f"w{i}"] = pack.pack(grid.levels(w), bits)
        weights[f"s{i}"] = grid.scale.numpy()
    routes = (scores > 0).float()
    feeds = {"x": x.numpy(), "r": scores.numpy(), "routes": routes.numpy()}
    got = run(node, weights, feeds)

    def expert(i: int, kernels: tuple[Kernel, Kernel]) -> Tensor:
        h = product(x, first[i], grids[0][i], kernels[0])
        h = torch.nn.functional.silu(h[:, ::2]) * h[:, 1::2]
        return routes[:, i, None] * product(h, second[i], grids[1][i], kernels[1])

    kernels = tuple(expert_kernel(bits, n, is_fused=True, block=block) for n in (2 * m, d))
    assert relative(got, sum(expert(i, kernels) for i in range(e))) < 1e-5
    assert relative(got, sum(expert(i, ("float", "float")) for i in range(e))) > 5e-4


def test_rounded_activations_are_int8_levels() -> None:
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    x[2, 32:] = 0
    seen = rounded(x).unflatten(-1, (-1, 32))
    scale = x.unflatten(-1, (-1, 32)).abs().amax(-1, keepdim=True) / 127
    levels = seen / scale.clamp_min(1e-30)
    assert bool((levels - levels.round()).abs().max() < 1e-3)
    assert int(levels.abs().max().round()) == 127
    assert not seen[2, 1].any()
