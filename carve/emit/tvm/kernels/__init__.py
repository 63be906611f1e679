"""TIR kernels of carve's own: dense products and routed FFNs, for one token and for many."""

from carve.emit.tvm.kernels.linear import linear
from carve.emit.tvm.kernels.pipeline import PIPELINE
from carve.emit.tvm.kernels.routed import routed_ffn
from carve.emit.tvm.kernels.schedule import Schedule
from carve.emit.tvm.kernels.spec import Format, LinearSpec, RoutedSpec

__all__ = ["PIPELINE", "Format", "LinearSpec", "RoutedSpec", "Schedule", "linear", "routed_ffn"]
