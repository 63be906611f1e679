"""Artifacts that TVM compiled: the same interface, and nothing unchecked is loaded."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import carve_runtime
import numpy as np
import pytest
from carve_runtime import ArtifactError, Model, RequestError
from carve_runtime.tensors import map_tensors
from tiny_artifacts import MAX_LENGTH, VOCAB, plain_ids, read_manifest, seal, write_manifest
from tiny_tvm import tensors, write_compiled, write_index, write_tensors


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_compiled(tmp_path_factory.mktemp("compiled") / "a")


@pytest.fixture(scope="module")
def model(compiled: Path) -> Model:
    return carve_runtime.load(compiled, engine="tvm", threads=1)


@pytest.fixture
def copy(compiled: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(compiled, tmp_path / "copy"))


def want(ids: list[int]) -> np.ndarray:
    t = tensors()
    return np.cumsum(t["table"][ids], 0) @ t["head"]


def test_logits_and_steps(model: Model) -> None:
    ids = np.random.default_rng(2).integers(0, VOCAB, MAX_LENGTH).tolist()
    np.testing.assert_allclose(model.logits(ids), want(ids), rtol=1e-3, atol=1e-2)
    session = model.start()
    at = 0
    for size in (1, 3, 1, 250, 1, 1, 300, 1, 42):
        got = session.step(ids[at : at + size])
        at += size
        np.testing.assert_allclose(got, want(ids[:at])[-size:], rtol=1e-3, atol=1e-2)
        assert session.length == at
    assert at == MAX_LENGTH
    with pytest.raises(RequestError) as caught:
        session.step([5])
    assert caught.value.code == "context-length"


def test_the_cache_is_written_in_place(model: Model) -> None:
    session = model.start()
    first = session.step([5, 6])
    kept, buffers = first.copy(), list(session._tensors)
    for token in range(20):
        session.step([token])
    assert all(a is b for a, b in zip(buffers, session._tensors, strict=True))
    written = np.from_dlpack(buffers[0])
    assert np.any(written[:, :, 21]) and not np.any(written[:, :, 22:])
    session.step([7] * 300)
    assert session._tensors[0].shape[2] == 512
    np.testing.assert_array_equal(first, kept)


def test_the_last_rows_alone(model: Model) -> None:
    got = model.start().step([3, 4, 5, 6], rows=2)
    np.testing.assert_allclose(got, want([3, 4, 5, 6])[2:], rtol=1e-4, atol=1e-4)


def test_generation(model: Model) -> None:
    prompt = plain_ids("the cat sat")
    ids = list(prompt)
    for _ in range(20):
        ids.append(int(want(ids)[-1].argmax()))
    done = model.generate("the cat sat", max_new_tokens=20)
    assert list(done.token_ids) == ids[len(prompt) :] or done.prompt_tokens == len(prompt) + 1
    done = model.generate(prompt, max_new_tokens=20)
    assert list(done.token_ids) == ids[len(prompt) :]
    assert done.finish_reason == "length"
    assert model.target == "tvm:host"


def test_as_many_threads_as_asked() -> None:
    from carve_runtime import tvm_library

    cores = len(os.sched_getaffinity(0))

    def used(count: int) -> int:
        tvm_library.use_threads(count)
        return int(tvm_library.runtime().get_global_func("runtime.NumThreads")())

    def one_after_another() -> list[int]:
        return [used(1), used(cores), used(1), used(cores)]

    with ThreadPoolExecutor(1) as pool:  # every thread has a pool of its own
        assert pool.submit(one_after_another).result() == [1, cores, 1, cores]


def test_threads_take_turns(model: Model) -> None:
    prompts = [plain_ids("the cat sat on the mat"[n:]) for n in range(4)]

    def work(prompt: list[int]) -> tuple[int, ...]:
        return model.generate(prompt, max_new_tokens=12, temperature=0.8, seed=3).token_ids

    alone = [work(prompt) for prompt in prompts]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(work, prompts)) == alone


def test_run_takes_batches_and_a_cache(model: Model) -> None:
    ids = np.array([[3, 4, 5], [6, 7, 8]])
    empty = {
        f"past_key_values.0.{p}": np.zeros((2, 1, 0, 16), np.float32) for p in ("key", "value")
    }
    logits, key, value = model.run(
        {"input_ids": ids, "position_ids": np.arange(3)[None].repeat(2, 0), **empty}
    )
    for row, sequence in zip(logits, ids, strict=True):
        np.testing.assert_allclose(row, want(sequence.tolist()), rtol=1e-4, atol=1e-4)
    past = {"past_key_values.0.key": key, "past_key_values.0.value": value}
    more = model.run({"input_ids": ids[:, :1], "position_ids": np.array([[3], [3]]), **past})
    np.testing.assert_allclose(more[0][0, 0], want([3, 4, 5, 3])[-1], rtol=1e-4, atol=1e-4)
    assert more[1].shape == (2, 1, 4, 16)
    with pytest.raises(RequestError):
        model.run({"input_ids": ids})


def test_neither_torch_nor_onnxruntime_nor_the_compiler(compiled: Path) -> None:
    code = (
        "import sys, carve_runtime\n"
        f"m = carve_runtime.load({str(compiled)!r}, engine='tvm')\n"
        "assert len(m.generate([5, 6], max_new_tokens=3).token_ids) == 3\n"
        "print([n for n in ('torch', 'onnxruntime', 'tvm', 'onnx') if n in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, check=True, text=True, timeout=120
    )
    assert done.stdout.strip() == "[]"


def test_which_engine(compiled: Path, artifacts: dict[str, Path]) -> None:
    with pytest.raises(ArtifactError, match="usable targets: tvm:host") as caught:
        carve_runtime.load(compiled)
    assert caught.value.code == "target"
    with pytest.raises(ArtifactError) as caught:
        carve_runtime.load(artifacts["shared"], engine="tvm")
    assert caught.value.code == "target"
    with pytest.raises(RequestError, match="neither"):
        carve_runtime.load(compiled, engine="tensorrt")


def test_a_changed_library_is_never_loaded(copy: Path) -> None:
    library = copy / "tvm/host/model.so"
    library.write_bytes(library.read_bytes() + b"\0")
    for verify in (True, False):
        with pytest.raises(ArtifactError) as caught:
            carve_runtime.load(copy, engine="tvm", verify=verify)
        assert caught.value.code == "hash-mismatch"


def test_a_library_that_is_none(copy: Path) -> None:
    (copy / "tvm/host/model.so").write_bytes(b"no library")
    seal(copy)
    with pytest.raises(ArtifactError, match="TVM cannot load") as caught:
        carve_runtime.load(copy, engine="tvm")
    assert caught.value.code == "model"


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"schema": 2}, "schema"),
        ({"library": "../../../evil.so"}, "plain relative path"),
        ({"library": "other.so"}, "not listed"),
        ({"library": 3}, "must be a name"),
        ({"tensors": "/etc/passwd"}, "plain relative path"),
        ({"flags": ["avx1024"]}, "no avx1024"),
        ({"machine": "riscv64"}, "no riscv64"),
        ({"functions": []}, "object"),
        ({"functions": {"decode": ["table", "head"]}}, "no function 'prefill'"),
        ({"functions": {"decode": ["lost"], "prefill": []}}, "lost"),
        ({"inputs": [{"name": "input_ids", "dtype": "object", "shape": []}]}, "types"),
        ({"inputs": [{"name": "x", "dtype": "tensor(int64)", "shape": [-1]}]}, "shape"),
        ({"inputs": [{"name": "x", "dtype": ["tensor(int64)"], "shape": []}]}, "types"),
        ({"outputs": []}, "logits"),
    ],
)
def test_an_unsound_index(copy: Path, changes: dict[str, Any], match: str) -> None:
    write_index(copy, **changes)
    seal(copy)
    with pytest.raises(ArtifactError, match=match):
        carve_runtime.load(copy, engine="tvm").start()


def test_an_index_that_is_no_json(copy: Path) -> None:
    for text in ("{", "[" * 100_000, "[]"):
        (copy / "tvm/host/index.json").write_text(text)
        seal(copy)
        with pytest.raises(ArtifactError) as caught:
            carve_runtime.load(copy, engine="tvm")
        assert caught.value.code == "model"


def test_files_beside_the_library(copy: Path) -> None:
    (copy / "tvm/host/libextra.so").write_bytes(b"")
    with pytest.raises(ArtifactError) as caught:
        carve_runtime.load(copy, engine="tvm")
    assert caught.value.code == "unlisted-file"


def test_tensors_that_vectors_cannot_be_loaded_from(copy: Path) -> None:
    write_tensors(copy / "tvm/host/model.safetensors", tensors(), shift=4)
    seal(copy)
    with pytest.raises(ArtifactError, match="cannot read it"):
        carve_runtime.load(copy, engine="tvm")


def test_mapped_tensors_are_views(compiled: Path) -> None:
    found = map_tensors(compiled / "tvm/host/model.safetensors")
    for name, array in tensors().items():
        np.testing.assert_array_equal(found[name], array)
        base: Any = found[name]
        while isinstance(base, np.ndarray) and not isinstance(base.base, type(None)):
            if isinstance(base, np.memmap):
                break
            base = base.base
        assert isinstance(base, np.memmap)


def _header(path: Path, value: Any, length: int | None = None) -> None:
    text = value if isinstance(value, bytes) else json.dumps(value).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text)


@pytest.mark.parametrize(
    ("header", "length"),
    [
        ({}, 2**63),
        ({}, 1_000),
        (b"{", None),
        ([], None),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, None),
        ({"a": {"dtype": "F64", "shape": [], "data_offsets": [0, 0]}}, None),
        ({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 0]}}, None),
        ({"a": {"dtype": "U8", "shape": [-1], "data_offsets": [1, 0]}}, None),
        ({"a": {"dtype": "U8", "shape": [0], "data_offsets": [-8, -8]}}, None),
        ({"a": {"dtype": "U8", "shape": [0], "data_offsets": [0]}}, None),
        ({"a": {"dtype": "U8", "shape": [2**40, 2**40, 0], "data_offsets": [0, True]}}, None),
        ({"a": 3}, None),
        ({"a": {"dtype": ["U8"], "shape": [0], "data_offsets": [0, 0]}}, None),
    ],
)
def test_unsound_tensors(tmp_path: Path, header: Any, length: int | None) -> None:
    path = tmp_path / "t.safetensors"
    _header(path, header, length)
    with pytest.raises(ArtifactError) as caught:
        map_tensors(path)
    assert caught.value.code == "model"


def test_short_tensors(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    path.write_bytes(b"1234")
    with pytest.raises(ArtifactError):
        map_tensors(path)


def test_the_manifest_decides_what_is_a_target(copy: Path) -> None:
    manifest = read_manifest(copy)
    manifest["targets"]["tvm:other"] = {"model": "tvm/host/nowhere.json", "bits": 16}
    write_manifest(copy, manifest)
    with pytest.raises(ArtifactError) as caught:
        carve_runtime.load(copy, target="tvm:other")
    assert caught.value.code == "bad-manifest"
