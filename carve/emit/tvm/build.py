"""From a program to a library and its weights."""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relax, tirx

from carve.emit.tvm.params import Parameters
from carve.emit.tvm.translate import Reading, Translator
from carve.program import Program


def translate(program: Program) -> tuple[tvm.IRModule, Parameters]:
    """The program's functions and the tensors that they take.

    A decoder has ``decode`` for one token and ``prefill`` for several, both over one sequence:
    ``(input_ids, position_ids, [keep,] *caches, *tensors) -> (logits, *caches)``. Others have
    ``main``.
    """
    reading, params, bb = Reading(program), Parameters(), relax.BlockBuilder()
    if program.kind == "decoder":
        _decoder(reading, params, bb, "decode", 1)
        _decoder(reading, params, bb, "prefill", tirx.Var("length", "int64"))
    else:
        _main(reading, params, bb)
    return bb.get(), params


def _inputs(program: Program) -> list[Any]:
    return list(program.module.graph.find_nodes(op="placeholder"))


def _decoder(
    reading: Reading, params: Parameters, bb: relax.BlockBuilder, name: str, length: Any
) -> None:
    program = reading.program
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
    given = [ids, position, *caches]
    rows: list[relax.Var] = []
    t = Translator(reading, params, bb)
    t._pieces = {}
    t.position = position
    if length != 1 and reading.head is not None:
        t.keep = tirx.Var("keep", "int64")
        rows = [relax.Var("rows", relax.ShapeType([t.keep]))]
    for node, value in zip(nodes, given, strict=True):
        t.env[node] = value
    # The tensors are known when the body is: the function is opened with the inputs alone.
    with bb.function(name, [ids, position, *rows, *caches]):
        _sizes(t, reading)
        t.run(reading.needed)
        kept = [c for pair in t.present.values() for c in pair]
        out = bb.emit(relax.Tuple([t.env[reading.results[0]], *kept]))
        bb.emit_func_output(out)
    _append_parameters(bb, name, params.variables)


def _main(reading: Reading, params: Parameters, bb: relax.BlockBuilder) -> None:
    program = reading.program
    params.begin("main")
    nodes = _inputs(program)
    symbols: dict[str, tirx.Var] = {}
    given = []
    for i, (node, example, axes) in enumerate(
        zip(nodes, program.example, program.dynamic, strict=True)
    ):
        sizes = [
            _symbol(symbols, example, a, axes, node) if a in axes else int(n)
            for a, n in enumerate(example.shape)
        ]
        dtype = str(example.dtype).removeprefix("torch.")
        given.append(relax.Var(f"input{i}", relax.TensorType(sizes, dtype)))
    t = Translator(reading, params, bb)
    t._pieces = {}
    for node, value in zip(nodes, given, strict=True):
        t.env[node] = value
    with bb.function("main", given):
        _sizes(t, reading)
        t.run(reading.needed)
        out = bb.emit(relax.Tuple([t.env[n] for n in reading.results]))
        bb.emit_func_output(out)
    _append_parameters(bb, "main", params.variables)


def _symbol(symbols: dict[str, tirx.Var], example: Any, axis: int, axes: Any, node: Any) -> tirx.Var:
    name = f"n{axis}"
    return symbols.setdefault(name, tirx.Var(name, "int64"))


def _sizes(t: Translator, reading: Reading) -> None:
    pass


def _append_parameters(bb: relax.BlockBuilder, name: str, variables: list[relax.Var]) -> None:
    mod = bb.get()
    gv = mod.get_global_var(name)
    f = mod[name]
    new = relax.Function(
        [*f.params, *variables], f.body, f.ret_ty, f.is_pure, f.attrs
    )
    bb.update_func(gv, new)
