"""Models for NVIDIA GPUs: kernels compiled without one, and run on threads that take turns."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cuda_on_host
import numpy as np
import pytest
import tiny_models as tiny
import torch
from carve_runtime.errors import ArtifactError
from carve_runtime.tvm_engine import TvmEngine
from carve_runtime.tvm_index import read_tvm_index

from carve.arithmetic import Precision
from carve.dialect import linear_rule
from carve.emit.tvm import emit
from carve.emit.tvm.cuda import device
from carve.emit.tvm.names import check_ready, processor
from carve.errors import CarveError, UserError

Get = Callable[[str], tiny.Captured]
GPU = processor("tvm:cuda-sm_90")
_RUN = """
import ctypes, pathlib, sys
import numpy as np
folder = pathlib.Path(sys.argv[1])
for name in ("libcudart.so.13", "libcuda.so.1"):
    ctypes.CDLL(str(folder / name), ctypes.RTLD_GLOBAL)
from carve_runtime.tvm_engine import TvmEngine
from carve_runtime.tvm_index import read_tvm_index
model = folder / "model"
engine = TvmEngine(read_tvm_index(model, {p.name for p in model.iterdir()}, "index.json"), 1)
for given in sorted(folder.glob("feeds*.npz")):
    with np.load(given) as kept:
        feeds = {k: kept[k] for k in kept.files}
    found = engine.run(feeds)
    np.savez(given.with_name(given.name.replace("feeds", "found")), *found)
"""


def test_a_gated_decoder(captured: Get, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bits, program = 4, captured("gemma2").program
    tiny.gate(tiny.route(program, dynamic=True, num_experts=5, top_k=3), "low_rank", "identity")
    monkeypatch.setattr(
        emit, "compile_source", lambda s, _: cuda_on_host.compile_kernels(s, tmp_path)
    )
    cuda_on_host.build_libraries(tmp_path)
    (tmp_path / "model").mkdir()
    emit.emit_tvm(program, tmp_path / "model", bits, "tvm:cuda-sm_90", GPU)
    wants = []
    for i, length in enumerate((1, 11)):
        inputs = tiny.decoder_inputs(program, tiny.token_ids(1, length, seed=i))
        feeds = {n: t.numpy() for n, t in zip(program.inputs, inputs, strict=True)}
        np.savez(tmp_path / f"feeds{i}.npz", **feeds)
        with linear_rule(Precision(program, bits).rule(int8=False)):
            wants.append(program.run(*inputs))
    subprocess.run([sys.executable, "-c", _RUN, str(tmp_path)], check=True)
    for i, want in enumerate(wants):
        with np.load(tmp_path / f"found{i}.npz") as kept:
            got = [torch.from_numpy(kept[k]) for k in kept.files]
        for a, b in zip(got, want, strict=False):
            assert tiny.relative(a, b) < 1e-5


def test_nvcc_compiles_for_the_architecture_and_later_ones(tmp_path: Path) -> None:
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc")
    check_ready("tvm:cuda")
    source = 'extern "C" __global__ void f(float* x) { x[threadIdx.x] += 1; }'
    code = device.compile_source(source, "sm_80")
    assert code[:4] == b"\x50\xed\x55\xba"  # a fat binary
    with pytest.raises(CarveError, match="nvcc could not compile"):
        device.compile_source("no source", "sm_80")


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert GPU.capability == (9, 0)
    with pytest.raises(UserError, match="no GPU architecture"):
        processor("tvm:cuda-sm_1")
    if not GPU.runs_here():
        folder = tmp_path
        for name in ("model.so", "kernels.fatbin", "t.safetensors"):
            (folder / name).write_bytes(b"")
        entry: dict[str, Any] = {"kind": "cuda", "capability": [9, 0], "code": "kernels.fatbin"}
        index = {
            "schema": 1,
            "target": "tvm:cuda-sm_90",
            "machine": GPU.triple.partition("-")[0],
            "flags": [],
            "library": "model.so",
            "tensors": "t.safetensors",
            "functions": {},
            "inputs": [],
            "outputs": [],
            "device": entry,
        }

        def read() -> Any:
            (folder / "index.json").write_text(json.dumps(index))
            return read_tvm_index(
                folder.resolve(), {p.name for p in folder.iterdir()}, "index.json"
            )

        with pytest.raises(ArtifactError, match="no GPU can run this model"):
            TvmEngine(read(), 1)
        for key, value in (("kind", "rocm"), ("capability", [9]), ("code", "../x")):
            index["device"] = entry | {key: value}
            with pytest.raises(ArtifactError):
                read()
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match="nvcc"):
        device.nvcc()
