"""Targets by name: ``tvm:`` and a processor. Imports neither TVM nor torch."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil

from carve.emit.tvm.cpu import HOST, Cpu
from carve.emit.tvm.cpu import names as processors
from carve.emit.tvm.cuda.device import Gpu, nvcc
from carve.emit.tvm.cuda.device import names as gpus
from carve.errors import UserError

PREFIX = "tvm:"
TVM, FFI = "0.27.0.post1", "0.1.14.post0"
"""With other versions of tvm_ffi this TVM's tuner ends the process."""
PACKAGES = (("apache-tvm", "tvm", TVM), ("apache-tvm-ffi", "tvm_ffi", FFI))
"""Distribution, module and version of each."""
_LEVELS = {"x86_64-v2": "x86_64", "x86_64-v3": "x86_64-avx2", "x86_64-v4": "x86_64-avx512"}


def target_names() -> list[str]:
    """What can follow ``--target``, but for onnxruntime's."""
    return [f"{PREFIX}{n}" for n in dict.fromkeys([*processors(), *_LEVELS, *gpus()])]


def processor(target: str) -> Cpu | Gpu:
    """What a target's name stands for; ``tvm:x86_64`` is this machine's own where it is an x86.

    Raises:
        UserError: no such processor or GPU.
    """
    from carve_runtime.processor import machine

    name = target.removeprefix(PREFIX)
    if name.startswith("cuda"):
        return Gpu.named(name)
    if name == "x86_64" and machine() == name:
        name = HOST
    try:
        return Cpu.named(_LEVELS.get(name, name))
    except UserError as e:
        raise UserError(
            "target", f"unknown target {target!r}", f"known: {', '.join(target_names())}"
        ) from e


def folder_of(target: str) -> str:
    """Where in an artifact a target's files lie."""
    return f"tvm/{target.removeprefix(PREFIX)}"


def compiler(machine: str, program: str = "gcc") -> str:
    """The compiler that makes programs and links libraries for a machine.

    Args:
        machine: an architecture, see `carve_runtime.processor.machine`.
        program: which of Debian's cross compilers, ``gcc`` or ``g++``; the machine's own does both.

    Raises:
        UserError: there is none.
    """
    from carve_runtime import processor

    if machine == processor.machine():
        found = os.environ.get("CXX") or next(filter(shutil.which, ("g++", "clang++")), None)
        hint = "install g++"
    else:
        found = shutil.which(f"{machine}-linux-gnu-{program}")
        hint = f"on Debian: apt-get install {program}-{machine.replace('_', '-')}-linux-gnu"
    if found is None:
        raise UserError("target", f"no C compiler makes programs for {machine}", hint)
    return found


def check_ready(target: str) -> None:
    """Refuse a target that this machine cannot compile for.

    Raises:
        UserError: an unknown processor, no compiler, or no TVM.
    """
    found = processor(target)
    compiler(found.machine)
    if isinstance(found, Gpu):
        nvcc()
    for package, name, version in PACKAGES:
        if importlib.util.find_spec(name) is None:
            raise UserError("target", f"{target} needs {package}", "pip install 'carve[tvm]'")
        have = importlib.metadata.version(package)
        if have != version:
            raise UserError(
                "target",
                f"{target} needs {package} {version}, and {have} is installed",
                "pip install 'carve[tvm]'",
            )
