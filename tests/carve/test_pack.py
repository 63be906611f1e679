"""Block-wise weights: bounds of the rounding, the byte layout, and onnxruntime's own arithmetic."""

from __future__ import annotations

from pathlib import Path

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

from carve.emit import pack

BITS = (2, 4, 8)
# Far from where fp32 loses digits, with exact zeros.
WEIGHTS = st.floats(-100, 100, width=32).map(lambda v: v if abs(v) > 1e-6 else 0.0)


@st.composite
def matrices(draw: st.DrawFn) -> Tensor:
    rows, columns = draw(st.integers(1, 3)), draw(st.integers(1, 80))
    return torch.from_numpy(draw(arrays(np.float32, (rows, columns), elements=WEIGHTS)))


def padded(weight: Tensor) -> Tensor:
    return torch.nn.functional.pad(weight, (0, -weight.shape[-1] % pack.BLOCK))


@pytest.mark.parametrize("bits", BITS)
@settings(max_examples=60, deadline=None)
@given(weight=matrices())
def test_error_is_at_most_half_a_step(bits: int, weight: Tensor) -> None:
    levels, scale = pack.quantize(weight, bits)
    blocks = padded(weight).unflatten(-1, (-1, pack.BLOCK))
    assert levels.shape == padded(weight).shape
    assert levels.dtype == torch.uint8
    assert int(levels.max()) < 1 << bits
    assert scale.shape == blocks.shape[:-1]
    got = pack.dequantize(levels, scale, bits).unflatten(-1, (-1, pack.BLOCK))
    step = scale.abs()[..., None]
    # There is no level for what is beyond the highest: that weight may be a whole step off.
    top = (1 << (bits - 1)) - 0.5
    clipped = blocks * scale.sign()[..., None] > top * step
    allowed = torch.where(clipped, step, step / 2)
    assert bool(((got - blocks).abs() <= allowed * (1 + 1e-4)).all())


@pytest.mark.parametrize("bits", BITS)
@settings(max_examples=60, deadline=None)
@given(weight=matrices())
def test_extreme_of_every_block_is_exact(bits: int, weight: Tensor) -> None:
    got = pack.dequantize(*pack.quantize(weight, bits), bits).unflatten(-1, (-1, pack.BLOCK))
    blocks = padded(weight).unflatten(-1, (-1, pack.BLOCK))
    largest = blocks.abs().amax(-1, keepdim=True)
    at = blocks.abs() == largest
    assert bool(((got == blocks) & at).any(-1).all())


@pytest.mark.parametrize("bits", BITS)
def test_padding_and_zero_blocks_stay_zero(bits: int) -> None:
    weight = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    weight[1] = 0
    levels, scale = pack.quantize(weight, bits)
    assert levels.shape == (3, 64)
    got = pack.dequantize(levels, scale, bits)
    assert not got[:, 40:].any()
    assert not got[1].any()
    assert bool(torch.isfinite(got).all())


def test_leading_axes_are_independent() -> None:
    weight = torch.randn(4, 3, 64, generator=torch.Generator().manual_seed(0))
    levels, scale = pack.quantize(weight, 4)
    for e in range(4):
        one, s = pack.quantize(weight[e], 4)
        assert torch.equal(levels[e], one)
        assert torch.equal(scale[e], s)


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


def matmul(weight: Tensor, bits: int, path: Path) -> ort.InferenceSession:
    """A model of one ``MatMulNBits``."""
    n, k = weight.shape
    levels, scale = pack.quantize(weight, bits)
    blocks = pack.pack(levels, bits).reshape(n, k // pack.BLOCK, pack.BLOCK * bits // 8)
    node = helper.make_node(
        "MatMulNBits",
        ["x", "w", "s"],
        ["y"],
        domain="com.microsoft",
        K=k,
        N=n,
        bits=bits,
        block_size=pack.BLOCK,
        accuracy_level=4,
    )
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", k])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", n])],
        [numpy_helper.from_array(blocks, "w"), numpy_helper.from_array(scale.numpy(), "s")],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), str(path))
    return ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows", [1, 3, 17])
@pytest.mark.parametrize("n, k", [(48, 64), (7, 160)])
def test_emulation_is_onnxruntimes_arithmetic(
    bits: int, rows: int, n: int, k: int, tmp_path: Path
) -> None:
    g = torch.Generator().manual_seed(bits + rows)
    weight, x = torch.randn(n, k, generator=g), torch.randn(rows, k, generator=g)
    x[0, :32] = 0
    got = torch.from_numpy(matmul(weight, bits, tmp_path / "m.onnx").run(None, {"x": x.numpy()})[0])
    want = pack.emulate(x, weight, bits)
    assert float((got - want).abs().max() / want.abs().max()) < 1e-5
    # The rounding is really there: the fp32 product is far from it.
    exact = x @ weight.T
    assert float((got - exact).abs().max() / exact.abs().max()) > 1e-3


def test_emulation_leaves_wide_and_ragged_products_alone() -> None:
    x, weight = torch.randn(3, 64), torch.randn(5, 64)
    assert torch.equal(pack.emulate(x, weight, 16), torch.nn.functional.linear(x, weight))
    x, weight = torch.randn(3, 40), torch.randn(5, 40)
    assert torch.equal(pack.emulate(x, weight, 4), torch.nn.functional.linear(x, weight))
