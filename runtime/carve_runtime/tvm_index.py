"""The index of a model that TVM compiled: its library, its tensors and what its functions take."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from carve_runtime.engine import Port
from carve_runtime.errors import ArtifactError
from carve_runtime.files import read_json
from carve_runtime.manifest import check_relative_path, resolve_inside

SCHEMA = 1
DTYPES = {
    "tensor(float)": np.dtype(np.float32),
    "tensor(int64)": np.dtype(np.int64),
    "tensor(bool)": np.dtype(np.bool_),
}
"""As onnxruntime names the types of inputs and outputs."""
_MOST = 100_000


@dataclass(frozen=True, slots=True)
class Gpu:
    """Machine code for NVIDIA GPUs of a compute capability and newer."""

    capability: tuple[int, int]
    code: Path


@dataclass(frozen=True, slots=True)
class TvmIndex:
    """The typed content of ``index.json``.

    ``functions``: by name, the tensors that a function takes after its inputs; ``flags``: what the
    processor has to be able to do, as Linux names it; ``gpu``: None where it does
    all itself.
    """

    target: str
    machine: str
    flags: tuple[str, ...]
    library: Path
    tensors: Path
    functions: Mapping[str, tuple[str, ...]]
    inputs: Mapping[str, Port]
    outputs: Mapping[str, Port]
    gpu: Gpu | None = None

    @property
    def codes(self) -> tuple[Path, ...]:
        """The files that are run."""
        return (self.library,) if self.gpu is None else (self.library, self.gpu.code)


def _bad(what: str) -> ArtifactError:
    return ArtifactError(
        "model", f"the compiled model's index: {what}", "compile the model again with carve"
    )


def _strings(raw: Any, what: str) -> tuple[str, ...]:
    if not isinstance(raw, list) or len(raw) > _MOST:
        raise _bad(f"{what} must be a list")
    if not all(isinstance(v, str) and len(v) <= 300 for v in raw):
        raise _bad(f"{what} must hold names")
    return tuple(raw)


def _ports(raw: Any, what: str) -> dict[str, Port]:
    if not isinstance(raw, list) or len(raw) > _MOST:
        raise _bad(f"{what} must be a list")
    found = {}
    for item in raw:
        entry: dict[str, Any] = item if isinstance(item, dict) else {}
        name, dtype, shape = (entry.get(k) for k in ("name", "dtype", "shape"))
        if not isinstance(name, str) or str(dtype) not in DTYPES or not isinstance(shape, list):
            raise _bad(f"{what} must have names, known types and shapes")
        if len(shape) > 8 or not all(
            d is None or (type(d) is int and 0 <= d < 2**31) for d in shape
        ):
            raise _bad(f"{name!r:.60} has an unsound shape")
        found[name] = Port(name, str(dtype), tuple(shape))
    return found


def read_tvm_index(root: Path, files: Collection[str], path: str) -> TvmIndex:
    """Read and check an index; the files that it names have to be listed in the manifest.

    Args:
        root: the artifact directory, already resolved.
        files: the paths that the manifest lists.
        path: of the index, relative to ``root``.

    Raises:
        ArtifactError: ``model``, ``not-found`` or ``unsafe-path``.
    """
    raw = read_json(resolve_inside(root, path), _bad)
    if not isinstance(raw, dict) or raw.get("schema") != SCHEMA:
        raise _bad(f"its schema is not {SCHEMA}")
    folder = path.rpartition("/")[0]

    def inside(key: str, raw: Mapping[str, Any] = raw) -> Path:
        name = raw.get(key)
        if not isinstance(name, str):
            raise _bad(f"{key!r} must be a name")
        whole = check_relative_path(f"{folder}/{name}" if folder else name)
        if whole not in files:
            raise _bad(f"{whole!r:.200} is not listed in the manifest")
        return resolve_inside(root, whole)

    functions = raw.get("functions")
    if not isinstance(functions, dict):
        raise _bad("'functions' must be an object")
    gpu = None
    if "device" in raw:
        device = raw["device"]
        if not isinstance(device, dict) or device.get("kind") != "cuda":
            raise _bad("'device' is of no known kind")
        least = device.get("capability")
        if not isinstance(least, list) or len(least) != 2 or any(type(v) is not int for v in least):
            raise _bad("'capability' must be two numbers")
        gpu = Gpu((least[0], least[1]), inside("code", device))
    target, machine = raw.get("target"), raw.get("machine")
    if not isinstance(target, str) or not isinstance(machine, str):
        raise _bad("'target' and 'machine' must be names")
    return TvmIndex(
        target=target,
        machine=machine,
        flags=_strings(raw.get("flags"), "'flags'"),
        library=inside("library"),
        tensors=inside("tensors"),
        functions={str(k): _strings(v, f"the tensors of {k!r:.40}") for k, v in functions.items()},
        inputs=_ports(raw.get("inputs"), "'inputs'"),
        outputs=_ports(raw.get("outputs"), "'outputs'"),
        gpu=gpu,
    )
