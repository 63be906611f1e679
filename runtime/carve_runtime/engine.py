"""The only module that talks to onnxruntime."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from carve_runtime.errors import ArtifactError, CarveRuntimeError, RequestError

# Official builds of onnxruntime from 1.29 report on the models that they load, and leave a device
# identifier in the home directory. Running a local model should do neither unasked; only this
# variable, read as onnxruntime initializes, stops all of it. A value that is set already stays.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

PROVIDERS: Mapping[str, Sequence[str]] = {
    "onnx-cpu": ("CPUExecutionProvider",),
    "onnx-cuda": ("CUDAExecutionProvider",),
}
_FLOAT32, _FLOAT16 = "tensor(float)", "tensor(float16)"


def ort() -> Any:
    """onnxruntime, imported where it is used: artifacts of TVM run without it."""
    import onnxruntime  # type: ignore[import-untyped]

    return onnxruntime


@dataclass(frozen=True, slots=True)
class Port:
    """An input or output of the graph; a dynamic dimension is None."""

    name: str
    dtype: str
    shape: tuple[int | None, ...]

    @property
    def is_half(self) -> bool:
        """Whether this is float16."""
        return self.dtype == _FLOAT16

    @property
    def is_real(self) -> bool:
        """Whether this is float32 or float16."""
        return self.dtype in (_FLOAT32, _FLOAT16)

    def is_float32(self, *shape: int | None) -> bool:
        """Whether this is float32 and has ``shape``, of which None leaves a dimension open."""
        return self.dtype == _FLOAT32 and self.fits(*shape)

    def fits(self, *shape: int | None) -> bool:
        """Whether this has ``shape``, of which None leaves a dimension open."""
        return len(self.shape) == len(shape) and all(
            want in (None, dim) for dim, want in zip(self.shape, shape, strict=True)
        )

    def takes(self, shape: tuple[int, ...]) -> bool:
        """Whether an array of ``shape`` can be fed, where a dynamic dimension takes any."""
        return len(self.shape) == len(shape) and all(
            dim in (None, given) for dim, given in zip(self.shape, shape, strict=True)
        )


def _ports(args: Sequence[Any]) -> dict[str, Port]:
    return {
        arg.name: Port(
            arg.name,
            arg.type,
            tuple(dim if isinstance(dim, int) else None for dim in arg.shape),
        )
        for arg in args
    }


class Runner(Protocol):
    """What `carve_runtime.Model` runs, in whatever engine."""

    inputs: dict[str, Port]
    outputs: dict[str, Port]
    optional: dict[str, Port]

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        """See `Engine.run`."""
        ...

    def close(self) -> None:
        """Let go of what does not end by itself."""
        ...


class OnnxRunner(Runner, Protocol):
    """onnxruntime, in one session or in many."""

    def run_values(self, outputs: Sequence[str], feeds: Mapping[str, Any]) -> list[Any]:
        """See `Engine.run_values`."""
        ...

    def binding(self) -> Any:
        """See `Engine.binding`."""
        ...

    def run_bound(self, binding: Any, *, shrink: bool) -> None:
        """See `Engine.run_bound`."""
        ...

    def place(self, array: NDArray[Any]) -> Any:
        """See `Engine.place`."""
        ...


class Engine:
    """An onnxruntime session; safe to share between threads.

    Args:
        path: the ONNX file; onnxruntime maps its external data into memory.
        target: a key of `PROVIDERS`.
        threads: threads of one operator; None lets onnxruntime take every core.

    Raises:
        ArtifactError: ``model`` when onnxruntime refuses the file, ``target`` when it cannot
            compute where the target does.
    """

    def __init__(self, path: Path, target: str, threads: int | None) -> None:
        options = ort().SessionOptions()
        options.log_severity_level = 3
        if threads is not None:
            options.intra_op_num_threads = threads
        # A memory pattern is kept for every set of input shapes, and each step has a new one.
        options.enable_mem_pattern = False
        # Prepacked weights live as long as the session: outside the arena, which rounds up to
        # powers of two, they take what they need (446 MB became 158 for 128 MB of weights).
        options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
        self._device = "cuda" if "CUDAExecutionProvider" in PROVIDERS[target] else "cpu"
        self._session = _session(str(path), options, target, str(path))
        self.inputs = _ports(self._session.get_inputs())
        self.outputs = _ports(self._session.get_outputs())
        # Inputs with a value of their own, which need not be fed.
        self.optional = _ports(self._session.get_overridable_initializers())
        # A long prefill leaves activations in the arena that later steps never fill again.
        self._shrink = ort().RunOptions()
        self._shrink.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        """Run with numpy inputs; returns every output in the graph's order.

        Raises:
            RequestError: ``inputs`` when the names are not the graph's, or onnxruntime refuses
                the values.
        """
        check_feeds(self, feeds)
        try:
            return list(self._session.run(None, dict(feeds)))
        except Exception as error:  # its exceptions have no common base
            raise RequestError("inputs", f"onnxruntime refused the inputs: {error}") from error

    def run_values(self, outputs: Sequence[str], feeds: Mapping[str, Any]) -> list[Any]:
        """Run with OrtValues in and out, so that no output is copied.

        Raises:
            CarveRuntimeError: ``run`` when onnxruntime fails.
        """
        try:
            return list(self._session.run_with_ort_values(list(outputs), dict(feeds)))
        except Exception as error:
            raise _failed(error) from error

    def binding(self) -> Any:
        """A new IOBinding of this session."""
        return self._session.io_binding()

    def place(self, array: NDArray[Any]) -> Any:
        """An OrtValue where the model computes: over the array's memory, or a copy on the GPU."""
        if self._device == "cpu":
            return value(array)
        return ort().OrtValue.ortvalue_from_numpy(array, self._device, 0)

    def close(self) -> None:
        """Nothing to do: memory goes with the session."""

    def run_bound(self, binding: Any, *, shrink: bool) -> None:
        """Run a binding; ``shrink`` then gives the arena's free memory back.

        Raises:
            CarveRuntimeError: ``run`` when onnxruntime fails.
        """
        try:
            self._session.run_with_iobinding(binding, self._shrink if shrink else None)
        except Exception as error:
            raise _failed(error) from error


def check_feeds(engine: Runner, feeds: Mapping[str, Any]) -> None:
    """Compare the names of feeds with the model's inputs.

    Raises:
        RequestError: ``inputs`` when they differ.
    """
    if feeds.keys() != engine.inputs.keys():
        raise RequestError(
            "inputs", f"the model takes {sorted(engine.inputs)}, not {sorted(feeds)}"
        )


class ExpertSession:
    """One expert: a small graph with the tensors of one of many.

    onnxruntime copies what it rearranges for its kernels and then lets go of the given array; what
    it leaves as it is, it reads from the array, which it keeps.

    Args:
        graph: the serialized graph, which names its tensors as external data.
        folder: where external data that is not given would lie.
        tensors: the graph's tensors by name.

    Raises:
        ArtifactError: ``model`` when onnxruntime refuses them.
    """

    def __init__(self, graph: bytes, folder: Path, tensors: Mapping[str, NDArray[Any]]) -> None:
        options = ort().SessionOptions()
        options.log_severity_level = 3
        # Experts run side by side in threads of the caller; a pool for each would be hundreds.
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.enable_mem_pattern = options.enable_cpu_mem_arena = False
        options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(folder)
        )
        self._session = _session(graph, options, "onnx-cpu", "an expert", tensors)

    def run(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """The expert's result ``[n, d]`` for rows ``x`` ``[n, d]``.

        Raises:
            CarveRuntimeError: ``run`` when onnxruntime fails.
        """
        try:
            y: NDArray[np.float32] = self._session.run(["y"], {"x": x})[0]
        except Exception as error:
            raise _failed(error) from error
        if y.shape != x.shape or y.dtype != x.dtype:
            raise _failed(ValueError(f"an expert gives {y.dtype} {y.shape}, not {x.shape}"))
        return y


def _session(
    model: str | bytes,
    options: Any,
    target: str,
    what: str,
    tensors: Mapping[str, NDArray[Any]] | None = None,
) -> Any:
    """An onnxruntime session of a path or a serialized graph, with external ``tensors``.

    Raises:
        ArtifactError: ``model`` when onnxruntime refuses it, ``target`` when it has no such device.
    """
    engine = ort()
    missing = [p for p in PROVIDERS[target] if p not in engine.get_available_providers()]
    if missing:
        raise ArtifactError(
            "target",
            f"onnxruntime {engine.__version__} here has no {missing[0]}",
            "install onnxruntime-gpu in place of onnxruntime, or load another target",
        )
    try:
        if tensors is not None:
            options.add_external_initializers(list(tensors), [value(a) for a in tensors.values()])
        return engine.InferenceSession(model, options, providers=list(PROVIDERS[target]))
    except Exception as error:  # its exceptions have no common base
        raise ArtifactError(
            "model",
            f"onnxruntime {engine.__version__} cannot load {what}: {error}",
            "upgrade onnxruntime, or compile the model again with carve",
        ) from error


def _failed(error: Exception) -> CarveRuntimeError:
    return CarveRuntimeError(
        "run",
        f"onnxruntime failed in the model: {error}",
        "check that the artifact is whole, or compile it again with carve",
    )


def value(array: NDArray[Any]) -> Any:
    """An OrtValue over the memory of a C-contiguous array, which it keeps alive."""
    return ort().OrtValue.ortvalue_from_numpy(array)
