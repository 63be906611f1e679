"""The functions of a compiled model, and what they take."""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relax, tirx

from carve.arithmetic import Precision
from carve.emit.tvm.cpu import Cpu
from carve.emit.tvm.cuda.device import Gpu
from carve.emit.tvm.cuda.products import GpuProducts
from carve.emit.tvm.gating import Gating
from carve.emit.tvm.params import Parameters
from carve.emit.tvm.products import Products
from carve.emit.tvm.reading import Reading
from carve.emit.tvm.translate import Translator
from carve.program import Program


def translate(program: Program, bits: int, cpu: Cpu | Gpu) -> tuple[tvm.IRModule, Parameters]:
    """The program's functions and the tensors that they take.

    A decoder has ``decode`` for one token and ``prefill`` for several, both over one sequence:
    ``(input_ids, position_ids, [keep,] [gate_shift,] *caches, *tensors) ->
    (logits, *caches, [gate_scores, gate_bars])``. Others have
    ``main``.
    """
    params, bb, precision = Parameters(), relax.BlockBuilder(), Precision(program, bits)
    reading = Reading(program, precision)
    products: Products
    if isinstance(cpu, Gpu):
        products = GpuProducts(bb, params, cpu, precision)
    else:
        products = Products(bb, params, cpu, precision)
    if program.kind == "decoder":
        _decoder(reading, products, "decode", 1)
        _decoder(reading, products, "prefill", tirx.Var("length", "int64"))
    else:
        _main(reading, products)
    return bb.get(), params


def _inputs(program: Program) -> list[Any]:
    return list(program.module.graph.find_nodes(op="placeholder"))


def _decoder(reading: Reading, products: Products, name: str, length: Any) -> None:
    program, params, bb = reading.program, products.params, products.bb
    params.begin(name)
    nodes = _inputs(program)
    ids = relax.Var("input_ids", relax.TensorType([1, length], "int64"))
    position = relax.Var("position_ids", relax.TensorType([1, length], "int64"))
    capacity = tirx.Var("capacity", "int64")
    _, heads, _, width = program.example[2].shape
    caches = [
        relax.Var(f"cache{i}", relax.TensorType([1, heads, capacity, width], "float32"))
        for i in range(len(nodes) - 2)
    ]
    shift = [relax.Var("gate_shift", relax.TensorType([len(program.gated)], "float32"))]
    shift = shift if program.gated else []
    given = [ids, position, *caches]
    rows: list[relax.Var] = []
    t = Translator(reading, params, bb, products)
    t.position = position
    if length != 1 and reading.head is not None:
        t.keep = tirx.Var("keep", "int64")
        rows = [relax.Var("rows", relax.ShapeType([t.keep]))]
    if shift:
        t.gating = Gating(t, shift[0], length)
    for node, value in zip(nodes, given, strict=True):
        t.env[node] = value
    # The tensors are known when the body is: the function is opened with the inputs alone.
    with bb.function(name, [ids, position, *rows, *shift, *caches]):
        t.run(reading.needed)
        kept = [c for pair in t.present.values() for c in pair]
        told = [] if t.gating is None else t.gating.results()
        out = bb.emit(relax.Tuple([t.env[reading.results[0]], *kept, *told]))
        bb.emit_func_output(out)
    _append_parameters(bb, name, params.variables)


def _main(reading: Reading, products: Products) -> None:
    program, params, bb = reading.program, products.params, products.bb
    params.begin("main")
    nodes = _inputs(program)
    symbols: dict[str, tirx.Var] = {}
    given = []
    for i, (example, axes) in enumerate(zip(program.example, program.dynamic, strict=True)):
        sizes = [_symbol(symbols, a) if a in axes else int(n) for a, n in enumerate(example.shape)]
        dtype = str(example.dtype).removeprefix("torch.")
        given.append(relax.Var(f"input{i}", relax.TensorType(sizes, dtype)))
    t = Translator(reading, params, bb, products)
    for node, value in zip(nodes, given, strict=True):
        t.env[node] = value
    with bb.function("main", given):
        t.run(reading.needed)
        out = bb.emit(relax.Tuple([t.env[n] for n in reading.results]))
        bb.emit_func_output(out)
    _append_parameters(bb, "main", params.variables)


def _symbol(symbols: dict[str, tirx.Var], axis: int) -> tirx.Var:
    """The size of a dynamic axis, the same in all inputs: batches and lengths are."""
    name = f"n{axis}"
    return symbols.setdefault(name, tirx.Var(name, "int64"))


def _append_parameters(bb: relax.BlockBuilder, name: str, variables: list[relax.Var]) -> None:
    mod = bb.get()
    gv = mod.get_global_var(name)
    f = mod[name]
    new = relax.Function([*f.params, *variables], f.body, f.ret_ty, f.is_pure, f.attrs)
    bb.update_func(gv, new)
