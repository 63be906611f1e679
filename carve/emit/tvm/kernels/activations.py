"""Activations on vectors: no call leaves the kernel, errors are a few units of fp32's last place.

Sources: the exponential by reduction to ``[-ln 2 / 2, ln 2 / 2]`` and its Taylor polynomial of
degree 7; erf by Abramowitz and Stegun 7.1.26 (absolute error 1.5e-7).
"""

from __future__ import annotations

import math
from collections.abc import Callable

from tvm import tirx  # type: ignore[import-not-found,unused-ignore]

from carve.emit.tvm.kernels.vector import Expr, bind, bits_of, of, splat
from carve.errors import CarveError

_LN2_HIGH = 0.693359375
_LN2_LOW = math.log(2) - _LN2_HIGH
_ERF = (0.254829592, -0.284496736, 1.421413741, -1.453152027, 1.061405429)
_ERF_P = 0.3275911


def exp(x: Expr, n: int) -> Expr:
    """``e^x``, with ``x`` clipped to where the result is a normal number."""
    x = bind(tirx.max(tirx.min(x, splat(88.0, n)), splat(-87.0, n)))
    k = bind(tirx.nearbyint(x * splat(math.log2(math.e), n)))
    r = bind((x - k * splat(_LN2_HIGH, n)) - k * splat(_LN2_LOW, n))
    p = splat(1 / math.factorial(7), n)
    for i in range(6, -1, -1):
        p = p * r + splat(1 / math.factorial(i), n)
    whole = k.astype(of("int32", n)) + splat(127, n, "int32")
    return p * bits_of(tirx.shift_left(whole, splat(23, n, "int32")), of("float32", n))


def _positive(x: Expr, n: int) -> Expr:
    return tirx.max(x, splat(0.0, n))


def _sigmoid(x: Expr, n: int) -> Expr:
    one = splat(1.0, n)
    return one / (one + exp(-x, n))


def _tanh(x: Expr, n: int) -> Expr:
    one = splat(1.0, n)
    e = bind(exp(x * splat(2.0, n), n))
    return one - splat(2.0, n) / (e + one)


def _erf(x: Expr, n: int) -> Expr:
    one = splat(1.0, n)
    size = bind(tirx.abs(x))
    t = bind(one / (one + splat(_ERF_P, n) * size))
    p = splat(0.0, n)
    for a in reversed(_ERF):
        p = (p + splat(a, n)) * t
    y = bind(one - p * exp(-size * size, n))
    return tirx.Select(x < splat(0.0, n), -y, y)


def _log1p_exp(x: Expr, n: int) -> Expr:
    """``log(1 + e^x)``: ``max(x, 0) + 2 artanh(u / (2 + u))``, ``u = e^-|x|``."""
    u = bind(exp(-tirx.abs(x), n))
    z = bind(u / (u + splat(2.0, n)))
    square = bind(z * z)
    p = splat(0.0, n)
    for i in range(13, 0, -2):
        p = p * square + splat(2.0 / i, n)
    return _positive(x, n) + p * z


def _mish(x: Expr, n: int) -> Expr:
    # tanh(log(1 + e)) = w / (w + 2) with w = e (e + 2); beyond 20 it is 1 in fp32.
    e = bind(exp(tirx.min(x, splat(20.0, n)), n))
    w = bind(e * (e + splat(2.0, n)))
    return x * (w / (w + splat(2.0, n)))


def _gelu(x: Expr, n: int) -> Expr:
    half = x * splat(0.5, n)
    return half * (splat(1.0, n) + _erf(x * splat(math.sqrt(0.5), n), n))


def _gelu_tanh(x: Expr, n: int) -> Expr:
    inner = (x + splat(0.044715, n) * x * x * x) * splat(math.sqrt(2 / math.pi), n)
    return x * splat(0.5, n) * (splat(1.0, n) + _tanh(inner, n))


def _clipped(x: Expr, n: int, high: float) -> Expr:
    return tirx.min(_positive(x, n), splat(high, n))


_TABLE: dict[str, Callable[[Expr, int], Expr]] = {
    "silu": lambda x, n: x * _sigmoid(x, n),
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "quick_gelu": lambda x, n: x * _sigmoid(x * splat(1.702, n), n),
    "relu": _positive,
    "relu2": lambda x, n: _positive(x, n) * _positive(x, n),
    "relu6": lambda x, n: _clipped(x, n, 6.0),
    "elu": lambda x, n: tirx.Select(x > splat(0.0, n), x, exp(x, n) - splat(1.0, n)),
    "leaky_relu": lambda x, n: tirx.max(x, x * splat(0.01, n)),
    "mish": _mish,
    "softplus": _log1p_exp,
    "hardswish": lambda x, n: x * _clipped(x + splat(3.0, n), n, 6.0) * splat(1 / 6, n),
    "sigmoid": _sigmoid,
    "tanh": _tanh,
    "identity": lambda x, n: x,
}


def activate(name: str, x: Expr, lanes: int) -> Expr:
    """A function of `carve.dialect.ACTIVATIONS` on a vector."""
    function = _TABLE.get(name)
    if function is None:
        raise CarveError("kernel", f"no TVM kernel knows the activation {name!r}")
    return function(bind(x), lanes)
