"""How TIR is lowered where some functions are kernels of carve's own.

TVM's default passes bound what every access may touch, in time that grows with the square of a
kernel's size: half a minute for a routed FFN. The kernels have nothing that those passes look for,
and take the short list of passes, two seconds; other functions take the default one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tvm import IRModule, transform  # type: ignore[import-not-found,unused-ignore]
from tvm.script.ir_builder import IRBuilder  # type: ignore[import-not-found,unused-ignore]
from tvm.tirx.compilation_pipeline import (  # type: ignore[import-not-found,unused-ignore]
    get_tir_pipeline,
    register_tir_pipeline,
)
from tvm.tirx.script import builder as T  # type: ignore[import-not-found,unused-ignore]

PIPELINE = "carve"
"""For ``tvm.compile(..., tir_pipeline=PIPELINE)``."""
MARK = "carve.kernel"
"""Attribute of a PrimFunc that takes the short list."""


@contextmanager
def function(name: str) -> Iterator[Callable[[], Any]]:
    """A kernel under construction; what it yields gives it once the block has ended."""
    ib = IRBuilder()
    with ib, T.prim_func():
        T.func_name(name)
        T.func_attr({"tirx.noalias": True, MARK: True})
        yield ib.get


def _pipeline() -> tuple[Any, Callable[[], Any], Callable[[], Any]]:
    whole, host, device = get_tir_pipeline("s_tir")
    short, _, _ = get_tir_pipeline("tirx")

    @transform.module_pass(opt_level=0, name="carve.lower")  # type: ignore[untyped-decorator,unused-ignore]
    def lower(mod: Any, _context: Any) -> Any:
        own = {g: f for g, f in mod.functions.items() if f.attrs and MARK in f.attrs}
        others = {g: f for g, f in mod.functions.items() if g not in own}
        lowered = IRModule(others, attrs=mod.attrs)
        if others:
            lowered = whole(lowered)
        if own:
            lowered.update(short(IRModule(own, attrs=mod.attrs)))
        return lowered

    return lower, host, device


register_tir_pipeline(PIPELINE, _pipeline)
