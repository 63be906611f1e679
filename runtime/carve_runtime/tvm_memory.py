"""Where a compiled model's tensors lie: in this process's memory, or in a GPU's."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from carve_runtime import tvm_library as tvm
from carve_runtime.errors import ArtifactError
from carve_runtime.tvm_index import Gpu

_CPU, _CUDA = 1, 2
_CUDART = "libcudart.so.13"
_COMPILE = "tvm_callback_cuda_compile"
"""What TVM asks for machine code as it loads kernels that are stored as source."""
_LOCK = threading.Lock()


class Memory(Protocol):
    """One device's memory."""

    devices: tuple[tuple[int, int], ...]
    """Kinds and numbers as the library is told; the host is the last."""

    def tensor(self, array: NDArray[Any]) -> Any:
        """A tensor of an aligned, C-contiguous array's content."""
        ...

    def array_of(self, value: Any) -> NDArray[Any]:
        """The content of a tensor."""
        ...

    def write(self, value: Any, array: NDArray[Any]) -> None:
        """Bring what was written to the array that `tensor` made ``value`` of."""
        ...


class HostMemory:
    """This process's: tensors and arrays share it."""

    devices: tuple[tuple[int, int], ...] = ((_CPU, 0),)

    def tensor(self, array: NDArray[Any]) -> Any:
        """See `Memory.tensor`; nothing is copied."""
        return tvm.tensor(array)

    def array_of(self, value: Any) -> NDArray[Any]:
        """See `Memory.array_of`; nothing is copied."""
        return tvm.array_of(value)

    def write(self, value: Any, array: NDArray[Any]) -> None:
        """Nothing to do."""


class CudaMemory:
    """The first GPU's.

    Args:
        capability: the least compute capability that will do.

    Raises:
        ArtifactError: ``target`` where there is no GPU, or it is older than the code.
    """

    devices: tuple[tuple[int, int], ...] = ((_CUDA, 0), (_CPU, 0))

    def __init__(self, capability: tuple[int, int]) -> None:
        _load()
        ffi = tvm.runtime()
        self._device = ffi.device("cuda", 0)
        attribute = ffi.get_global_func("runtime.GetDeviceAttr")
        exists, version = (attribute(_CUDA, 0, kind) for kind in (0, 4))
        if not exists:
            raise _no_gpu("none is there")
        have = tuple(int(v) for v in str(version).split("."))
        if have < capability:
            need = ".".join(map(str, capability))
            raise _no_gpu(f"its compute capability is {version}, less than {need}")
        self._empty = ffi.get_global_func("runtime.TVMTensorAllocWithScope")
        self._from = ffi.get_global_func("runtime.TVMTensorCopyFromBytes")
        self._to = ffi.get_global_func("runtime.TVMTensorCopyToBytes")

    def tensor(self, array: NDArray[Any]) -> Any:
        """See `Memory.tensor`."""
        ffi = tvm.runtime()
        made = self._empty(ffi.Shape(array.shape), ffi.dtype(array.dtype.name), self._device, None)
        self.write(made, array)
        return made

    def array_of(self, value: Any) -> NDArray[Any]:
        """See `Memory.array_of`."""
        array = tvm.aligned(tuple(value.shape), np.dtype(str(value.dtype)))
        if array.size:
            self._to(value, ctypes.c_void_p(array.ctypes.data), array.nbytes)
        return array

    def write(self, value: Any, array: NDArray[Any]) -> None:
        """See `Memory.write`."""
        if array.size:
            self._from(value, ctypes.c_void_p(array.ctypes.data), array.nbytes)


def has_gpu(capability: tuple[int, int]) -> bool:
    """Whether this machine has a GPU of a compute capability or a newer one, and TVM can use it."""
    try:
        CudaMemory(capability)
    except ArtifactError:
        return False
    return True


def memory_of(gpu: Gpu | None) -> Memory:
    """The memory of what a model was compiled for.

    Raises:
        ArtifactError: ``target`` where there is no such device.
    """
    if gpu is None:
        return HostMemory()
    return CudaMemory(gpu.capability)


@contextmanager
def compiled(gpu: Gpu | None) -> Iterator[None]:
    """Kernels of a library that is loaded inside take the code that was compiled beforehand."""
    if gpu is None:
        yield
        return
    ffi = tvm.runtime()
    code = gpu.code.read_bytes()
    with _LOCK:
        before = ffi.get_global_func(_COMPILE, allow_missing=True)
        ffi.register_global_func(_COMPILE, lambda _source: code, override=True)
        try:
            yield
        finally:
            # TVM's compiler registers its own as it is imported, and only once.
            if before is None:
                ffi.remove_global_func(_COMPILE)
            else:
                ffi.register_global_func(_COMPILE, before, override=True)


def _no_gpu(why: str) -> ArtifactError:
    return ArtifactError(
        "target", f"no GPU can run this model: {why}", "load another target of the artifact"
    )


def _load() -> None:
    """Load TVM's runtime for CUDA."""
    ffi = tvm.runtime()
    with _LOCK:
        if ffi.get_global_func("device_api.cuda", allow_missing=True) is None:
            try:
                _load_cudart()
                ctypes.CDLL(
                    str(tvm.folder() / "lib" / "libtvm_runtime_cuda.so"), ctypes.RTLD_GLOBAL
                )
            except (ImportError, OSError) as error:
                raise _no_gpu(f"CUDA's libraries cannot be loaded: {error}") from error


def _load_cudart() -> None:
    """CUDA's runtime, from the system or from the packages that bring it."""
    for path in [_CUDART, *map(str, _installed())]:
        try:
            ctypes.CDLL(path, ctypes.RTLD_GLOBAL)
        except OSError as error:
            last = error
        else:
            return
    raise last


def _installed() -> Iterator[Path]:
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if name in os.environ:
            yield Path(os.environ[name], "lib64", _CUDART)
    found = importlib.util.find_spec("nvidia")
    for folder in (found.submodule_search_locations or ()) if found else ():
        yield from sorted(Path(folder).glob(f"*/lib/{_CUDART}"))
