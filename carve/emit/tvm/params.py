"""The stored tensors of a compiled model, made one at a time as the file is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor
from tvm import relax

_ALIGN = 64
_NAMES = {
    "float32": "F32",
    "int64": "I64",
    "int32": "I32",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}


@dataclass(frozen=True)
class _Stored:
    make: Callable[[], np.ndarray]
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize


class Parameters:
    """Stored tensors by name, and which of them each function takes in which order."""

    def __init__(self) -> None:
        self.stored: dict[str, _Stored] = {}
        self.taken: dict[str, dict[str, relax.Var]] = {}
        self._function = ""

    def begin(self, function: str) -> None:
        """Tensors that are asked for from now on are parameters of ``function``."""
        self._function = function
        self.taken[function] = {}

    @property
    def variables(self) -> list[relax.Var]:
        """The parameters of the running function in order."""
        return list(self.taken[self._function].values())

    def add(
        self, name: str, make: Callable[[], np.ndarray], shape: tuple[int, ...], dtype: str
    ) -> relax.Var:
        """A tensor whose content is made when it is written."""
        self.stored.setdefault(name, _Stored(make, tuple(int(n) for n in shape), dtype))
        mine = self.taken[self._function]
        if name not in mine:
            mine[name] = relax.Var(f"w{len(mine)}", relax.TensorType(list(shape), dtype))
        return mine[name]

    def tensor(self, name: str, value: Tensor) -> relax.Var:
        """A tensor as it is, fp32 where it is of any floating type."""
        if value.dtype.is_floating_point:
            dtype = "float32"
        else:
            dtype = str(value.dtype).removeprefix("torch.")

        def make() -> np.ndarray:
            plain = value.float() if dtype == "float32" else value
            array: np.ndarray = plain.contiguous().numpy()
            return array

        return self.add(name, make, tuple(value.shape), dtype)

    def write(self, path: Path) -> None:
        """Write a safetensors file whose tensors start at multiples of 64 bytes.

        Kernels load whole vectors from what is mapped into memory. Gaps are not allowed in the
        format, so what fills up is a tensor too.
        """
        header: dict[str, object] = {}
        at = 0
        for i, (name, s) in enumerate(self.stored.items()):
            header[name] = _entry(_NAMES[s.dtype], s.shape, at, at + s.nbytes)
            at += s.nbytes
            gap = -at % _ALIGN
            if gap:
                header[f"_.{i}"] = _entry("U8", (gap,), at, at + gap)
                at += gap
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % _ALIGN)
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name, s in self.stored.items():
                array = np.asarray(s.make(), order="C")
                if array.shape != s.shape or array.dtype != np.dtype(s.dtype):
                    raise ValueError(f"{name}: {array.dtype} {array.shape}, not {s}")
                file.write(array.tobytes())
                file.write(bytes(-s.nbytes % _ALIGN))


def _entry(dtype: str, shape: tuple[int, ...], start: int, end: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
