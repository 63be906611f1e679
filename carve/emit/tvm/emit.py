"""Write what a program compiles to: a library, its tensors and an index of both."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("TVM_FFI_DISABLE_TORCH_C_DLPACK", "1")

import tvm
from carve_runtime.gates import BARS, SCORES, SHIFT
from tvm import relax
from tvm.relax.backend.cpu_generic import pipeline as cpu_generic
from tvm.relax.backend.cuda import pipeline as cuda_generic

from carve.artifact import write_json
from carve.emit.tvm.cpu import Cpu
from carve.emit.tvm.cuda.device import Gpu, compile_source
from carve.emit.tvm.functions import translate
from carve.emit.tvm.kernels import PIPELINE
from carve.emit.tvm.names import compiler
from carve.emit.tvm.params import Parameters
from carve.errors import CarveError, UserError
from carve.program import Program

log = logging.getLogger(__name__)
INDEX, LIBRARY, TENSORS = "index.json", "model.so", "model.safetensors"
SOURCE, CODE = "kernels.cu", "kernels.fatbin"
SCHEMA = 1
_TYPES = {
    "torch.float32": "tensor(float)",
    "torch.int64": "tensor(int64)",
    "torch.bool": "tensor(bool)",
}


@dataclass(frozen=True)
class TvmEmitted:
    """What `emit_tvm` wrote."""

    path: Path
    bits: int
    kernels: int


def emit_tvm(program: Program, folder: Path, bits: int, target: str, cpu: Cpu | Gpu) -> TvmEmitted:
    """Compile a program into ``folder``.

    Args:
        program: dense or routed.
        folder: an empty folder.
        bits: as for `carve.emit.onnx.emit`.
        target: its name, for the index.
        cpu: what to compile for.

    Raises:
        UserError: an unknown width, or no C compiler for the target.
        CarveError: an operator has no translation, or TVM fails.
    """
    if bits not in (4, 8, 16, 32):
        raise UserError("bits", f"--bits {bits} is not one of 16, 8, 4", "try --bits 4")
    linker = compiler(cpu.machine)
    mod, params = translate(program, bits, cpu)
    library = _compile(mod, cpu, gated=bool(program.gated))
    library.export_library(str(folder / LIBRARY), fcompile=_linked_by(linker))
    params.write(folder / TENSORS)
    index = _index(program, params, target, cpu)
    if isinstance(cpu, Gpu):
        index["device"] = _kernels(library, folder, cpu)
    write_json(folder / INDEX, index)
    return TvmEmitted(folder / INDEX, bits, len(mod.functions))


def _plans(p: Any) -> bool:
    """Whether a pass shares memory between values: what it takes for free may be in a branch."""
    return bool(p.info.name == "StaticPlanBlockMemory")


def _kernels(library: Any, folder: Path, gpu: Gpu) -> dict[str, Any]:
    """Compile the library's GPU kernels, which it holds as source; the index's record of them."""
    source = next(s for s in map(_source, _modules(library.mod)) if s is not None)
    (folder / SOURCE).write_text(source, encoding="utf-8")
    (folder / CODE).write_bytes(compile_source(source, gpu.arch))
    return {"kind": "cuda", "capability": list(gpu.capability), "code": CODE}


def _modules(module: Any) -> Iterator[Any]:
    yield module
    for m in module.imports:
        yield from _modules(m)


def _source(module: Any) -> str | None:
    return str(module.inspect_source()) if module.kind == "cuda" else None


def _compile(mod: tvm.IRModule, cpu: Cpu | Gpu, *, gated: bool) -> Any:
    target, generic = cpu.target(), cuda_generic if isinstance(cpu, Gpu) else cpu_generic
    legalize = generic.legalize_passes(target)
    if isinstance(cpu, Gpu):
        # Once it is scheduled for threads, a reshape is no longer known as what moves nothing.
        legalize.insert(1, relax.transform.RewriteDataflowReshape())
    passes = [
        relax.transform.ConvertToDataflow(1),
        relax.transform.DeadCodeElimination(),
        *legalize,
        *generic.dataflow_lower_passes(target),
        *(p for p in generic.finalize_passes(target) if not gated or not _plans(p)),
    ]
    try:
        with target:
            return tvm.compile(
                mod,
                target=target,
                relax_pipeline=tvm.transform.Sequential(passes),
                tir_pipeline=PIPELINE,
            )
    except Exception as e:  # its exceptions have no common base
        raise CarveError("emit", f"TVM could not compile the program: {str(e)[-400:]}") from e


def _linked_by(linker: str) -> Any:
    from tvm.support import cc

    return cc.cross_compiler(linker)


def _index(program: Program, params: Parameters, target: str, cpu: Cpu | Gpu) -> dict[str, Any]:
    def port(name: str, dtype: str, shape: list[int | None]) -> dict[str, Any]:
        return {"name": name, "dtype": dtype, "shape": shape}

    inputs = [
        port(
            name,
            _TYPES[str(t.dtype)],
            [None if i in axes else int(n) for i, n in enumerate(t.shape)],
        )
        for name, t, axes in zip(program.inputs, program.example, program.dynamic, strict=True)
    ]
    results: Any = program.module.graph.output_node().args[0]
    outputs = []
    for name, node in zip(program.outputs, results, strict=True):
        value = node.meta["val"]
        shape = [n if type(n) is int else None for n in value.shape]
        outputs.append(port(name, _TYPES[str(value.dtype)], shape))
    if program.gated:
        count = len(program.gated)
        inputs.append(port(SHIFT, "tensor(float)", [count]))
        outputs += [port(n, "tensor(float)", [None, None, count]) for n in (SCORES, BARS)]
    return {
        "schema": SCHEMA,
        "target": target,
        "cpu": cpu.name,
        "machine": cpu.machine,
        "flags": sorted(cpu.flags),
        "library": LIBRARY,
        "tensors": TENSORS,
        "functions": {f: list(names) for f, names in params.taken.items()},
        "inputs": inputs,
        "outputs": outputs,
    }
