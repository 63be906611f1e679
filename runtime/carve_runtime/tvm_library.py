"""The only module that talks to TVM: its runtime library, without its compiler."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from carve_runtime.errors import ArtifactError

ALIGNMENT = 64
_POOLED = 2
# Where this package is the Python side of a folder that ``carve bundle`` made.
_BUNDLED = Path(__file__).resolve().parents[2] / "lib" / "libtvm_runtime.so"
_LOCK = threading.Lock()
_LOADED: list[Any] = []
_SHARE_CORES = -3  # TVM's kSpecifyThreadShareAllCore
_SPINS = "2000"  # about a millisecond on an idle core, longer than what lies between two kernels
_THREADS = threading.local()


def runtime() -> Any:
    """``tvm_ffi`` with TVM's runtime library loaded.

    Raises:
        ArtifactError: ``target`` where TVM is not installed.
    """
    with _LOCK:
        if not _LOADED:
            _LOADED.append(_load())
    return _LOADED[0]


def _load() -> Any:
    # Workers that are bound to cores wait for whatever else runs on them.
    os.environ.setdefault("TVM_BIND_THREADS", "0")
    # An idle worker yields so often before it sleeps, and the process cannot end meanwhile. Where
    # other work takes each turn that it yields, the 300,000 that TVM has take many minutes.
    os.environ.setdefault("TVM_THREAD_POOL_SPIN_COUNT", _SPINS)
    # Else tvm_ffi compiles an extension of torch as it is imported.
    os.environ.setdefault("TVM_FFI_DISABLE_TORCH_C_DLPACK", "1")
    hide = "torch" not in sys.modules
    try:
        if hide:  # it imports torch wherever that is installed, which takes seconds
            sys.modules["torch"] = None  # type: ignore[assignment]
        import tvm_ffi  # type: ignore[import-not-found, unused-ignore]
        from tvm_ffi.libinfo import load_lib_ctypes  # type: ignore[import-not-found, unused-ignore]

        if _BUNDLED.is_file():
            ctypes.CDLL(str(_BUNDLED), ctypes.RTLD_GLOBAL)
        elif "tvm" not in sys.modules:  # the compiler brings the same library
            libraries = folder() / "lib"
            load_lib_ctypes("apache-tvm", "tvm_runtime", "RTLD_GLOBAL", extra_lib_paths=[libraries])
    except (ImportError, OSError, RuntimeError) as error:
        raise ArtifactError(
            "target", f"TVM's runtime cannot be loaded: {error}", "pip install 'carve-runtime[tvm]'"
        ) from error
    finally:
        if hide:
            sys.modules.pop("torch", None)
    return tvm_ffi


def folder() -> Path:
    """Where TVM is installed; importing it would load the compiler."""
    found = importlib.util.find_spec("tvm")
    if found is None or not found.submodule_search_locations:
        raise ImportError("no module named 'tvm'")
    return Path(next(iter(found.submodule_search_locations)))


def aligned(shape: Sequence[int], dtype: Any) -> NDArray[Any]:
    """Zeros that start where kernels may load whole vectors."""
    kind = np.dtype(dtype)
    size = int(np.prod(shape, dtype=np.int64)) * kind.itemsize
    raw = np.zeros(size + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    array: NDArray[Any] = raw[start : start + size].view(kind).reshape(shape)
    return array


def is_aligned(array: NDArray[Any]) -> bool:
    """Whether kernels may load whole vectors from its start."""
    return array.ctypes.data % ALIGNMENT == 0


def tensor(array: NDArray[Any]) -> Any:
    """A tensor over the memory of a C-contiguous, aligned array, which it keeps alive."""
    return runtime().from_dlpack(array)


def array_of(value: Any) -> NDArray[Any]:
    """The memory of a tensor as an array, which keeps it alive."""
    array: NDArray[Any] = np.from_dlpack(value)
    return array


class Library:
    """A compiled library, which is code: the caller has checked its hash.

    Args:
        path: of the library.
        devices: kinds and numbers of what it runs on, the host last.

    Raises:
        ArtifactError: ``model`` when it cannot be loaded.
    """

    def __init__(self, path: Path, devices: Sequence[tuple[int, int]]) -> None:
        ffi = runtime()
        try:
            self._machine = ffi.load_module(str(path))["vm_load_executable"]()
            told = [v for kind, number in devices for v in (kind, number, _POOLED)]
            self._machine["vm_initialization"](*told)
        except Exception as error:  # its exceptions have no common base
            raise ArtifactError(
                "model",
                f"TVM cannot load {path}: {error}",
                "compile the model again with carve for this machine",
            ) from error

    def function(self, name: str) -> Any:
        """A compiled function.

        Raises:
            ArtifactError: ``model`` when there is none of that name.
        """
        try:
            return self._machine[name]
        except Exception as error:
            raise ArtifactError("model", f"the library has no function {name!r:.40}") from error


def shape(*sizes: int) -> Any:
    """A shape as functions take it."""
    return runtime().Shape(sizes)


def use_threads(count: int) -> None:
    """Let kernels that are called from this thread use so many, on any core of this process."""
    if getattr(_THREADS, "count", None) != count:
        # Where no cores are named TVM takes half of them at the most, for it assumes two threads a
        # core, and what a thread's pool may have is settled when it is made.
        cores = [str(c) for c in sorted(os.sched_getaffinity(0))]
        runtime().get_global_func("runtime.config_threadpool")(_SHARE_CORES, count, cores)
        _THREADS.count = count


def give_back() -> None:
    """Free what TVM keeps for the next time; what a tensor still holds stays.

    It keeps every size that it has seen, and each length of a prompt has sizes of its own.
    """
    runtime().get_global_func("vm.builtin.memory_manager.clear")()
