"""Artifacts made to do harm: every reader of the runtime answers with an error of its own."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import carve_runtime
import numpy as np
import onnx
import pytest
import tiny_artifacts as tiny
import tiny_split
from carve_runtime import ArtifactError, CarveRuntimeError
from carve_runtime.files import FileError, parse_json, read_bytes
from carve_runtime.manifest import MANIFEST_NAME
from carve_runtime.text import tokenizing
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

sys.path.append(str(Path(__file__).parents[2] / "tools"))
import fuzz_runtime
from fuzz_mutate import BAIT


def refused(folder: Path, code: str, **options: Any) -> str:
    with pytest.raises(ArtifactError) as caught:
        carve_runtime.load(folder, **options)
    assert caught.value.code == code, caught.value
    return caught.value.message


# JSON and files


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "'c' twice"),
        (b"[NaN]", "not finite"),
        (b"[-Infinity]", "not finite"),
        (b"[1e999]", "not finite"),
        (b"[" + b"9" * 41 + b"]", "41 digits"),
        (b"[" * 65 + b"]" * 65, "deeper"),
        (b'{"a":' * 900 + b"1" + b"}" * 900, "deeper"),
        (b"[" * 200_000, "not JSON"),
        (b"\xef\xbb\xbf{}", "not JSON"),
        (b'"\xff"', "not JSON"),
        (b"", "not JSON"),
    ],
)
def test_json_that_is_refused(text: bytes, what: str) -> None:
    with pytest.raises(FileError, match=what):
        parse_json(text)


def test_json_that_is_sound() -> None:
    value = {"a": [1, -2.5, None, True, "é"], "b": {"a": {}}, "c": 10**39}
    assert parse_json(json.dumps(value).encode()) == value
    assert parse_json(b"[" * 64 + b"]" * 64) is not None
    assert parse_json(b"Infinity", finite=False) == float("inf")


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    """A pipe that nobody writes to would wait for ever."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "five").write_bytes(b"12345")
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/zero")):
        with pytest.raises(FileError, match="regular"):
            read_bytes(path, 10)
    with pytest.raises(FileError, match="larger"):
        read_bytes(tmp_path / "five", 4)
    assert read_bytes(tmp_path / "five", 5) == b"12345"


@pytest.mark.parametrize("name", [MANIFEST_NAME, "onnx/model.onnx", "onnx/model.onnx.data"])
@pytest.mark.parametrize("verify", [True, False])
def test_pipes_in_an_artifact(copy: Path, name: str, verify: bool) -> None:
    (copy / name).unlink()
    os.mkfifo(copy / name)
    refused(copy, "not-found", verify=verify)


def test_manifest_with_a_key_twice(copy: Path) -> None:
    path = copy / MANIFEST_NAME
    path.write_text(path.read_text().replace("{", '{"schema": 1, ', 1))
    assert "twice" in refused(copy, "bad-manifest")


@pytest.mark.parametrize("schema", [0, 2, 10**30, 1.0, "1", None, [1]])
def test_manifest_of_another_schema(copy: Path, schema: object) -> None:
    """Neither an older reading nor a newer one is guessed at."""
    tiny.write_manifest(copy, tiny.read_manifest(copy) | {"schema": schema})
    with pytest.raises(ArtifactError) as caught:
        carve_runtime.load(copy)
    assert caught.value.code == ("schema" if schema in (0, 2) else "bad-manifest")


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("how", ["written", "replaced"])
def test_files_that_change_while_they_are_loaded(
    copy: Path, monkeypatch: pytest.MonkeyPatch, verify: bool, how: str
) -> None:
    data = copy / "onnx/model.onnx.data"
    make = carve_runtime.model.Engine

    def engine(*args: Any) -> Any:
        new = data if how == "written" else copy / "new"
        new.write_bytes(np.array([5, 7], np.float32).tobytes())
        new.replace(data)
        return make(*args)

    monkeypatch.setattr(carve_runtime.model, "Engine", engine)
    assert "changed" in refused(copy, "hash-mismatch", verify=verify)


# What does not fit


@pytest.mark.parametrize("name", ["vocab_size", "num_layers", "num_key_value_heads", "head_dim"])
def test_sizes_that_no_buffer_can_have(
    artifacts: dict[str, Path], tmp_path: Path, name: str
) -> None:
    folder = Path(shutil.copytree(artifacts["shared"], tmp_path / "copy"))
    sound = tiny.read_manifest(folder)
    tiny.write_manifest(folder, sound | {"model": sound["model"] | {name: 2**31 - 1}})
    assert name in refused(folder, "bad-manifest")


def test_cache_that_the_graph_leaves_open(artifacts: dict[str, Path], tmp_path: Path) -> None:
    """What a graph does not say, a manifest could: 65536 heads of any size."""
    folder = Path(shutil.copytree(artifacts["shared"], tmp_path / "copy"))
    path = folder / "onnx/model.onnx"
    model = onnx.load(path, load_external_data=False)
    for value in (*model.graph.input, *model.graph.output):
        if value.name.startswith(("past", "present")):
            value.type.tensor_type.shape.dim[1].dim_param = "h"
    path.write_bytes(model.SerializeToString())
    tiny.seal(folder)
    assert "must be float32 or float16 with shape" in refused(folder, "model")


def test_memory_that_is_not_there(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def engine(*_: Any) -> Any:
        raise MemoryError("8 EB")

    monkeypatch.setattr(carve_runtime.model, "Engine", engine)
    with pytest.raises(CarveRuntimeError, match="8 EB") as caught:
        carve_runtime.load(copy)
    assert caught.value.code == "memory"


def _fill(folder: Path, value: float) -> None:
    data = folder / "onnx/model.onnx.data"
    data.write_bytes(np.full(data.stat().st_size // 4, value, np.float32).tobytes())
    tiny.seal(folder)


@pytest.mark.parametrize("kind", ["growing", "encoder"])
def test_weights_that_are_no_numbers(artifacts: dict[str, Path], tmp_path: Path, kind: str) -> None:
    folder = Path(shutil.copytree(artifacts[kind], tmp_path / "copy"))
    _fill(folder, float("nan"))
    model = carve_runtime.load(folder, threads=1)
    with pytest.raises(CarveRuntimeError) as caught:
        model.embed(["the cat"]) if kind == "encoder" else model.generate("the cat")
    assert caught.value.code == "non-finite"


def test_panic_of_a_library() -> None:
    """What pyo3 makes of a panic is no Exception."""
    panic = type("PanicException", (BaseException,), {})
    with pytest.raises(ArtifactError, match="cannot encode: index 5"), tokenizing("cannot encode"):
        raise panic("index 5")
    with pytest.raises(KeyboardInterrupt), tokenizing("cannot encode"):
        raise KeyboardInterrupt


def test_experts_that_are_replaced_later(tmp_path: Path) -> None:
    """A conversion into the same folder renames its files into place while a model runs."""
    folder = tiny_split.write_split(tmp_path / "split", 4)
    prompt = tiny.plain_ids("the cat sat on")
    with carve_runtime.load(folder, target="onnx-split", threads=1) as model:
        want = model.generate(prompt, max_new_tokens=60).token_ids
    with carve_runtime.load(folder, memory="1MB", threads=1) as model:
        data = folder / "split/experts.bin"
        (folder / "other").write_bytes(bytes(data.stat().st_size))
        (folder / "other").replace(data)
        assert model.generate(prompt, max_new_tokens=60).token_ids == want
        assert model.expert_stats is not None
        assert model.expert_stats.misses > 10


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (lambda i: i["segments"].__setitem__(1, i["segments"][0]), "there twice"),
        (lambda i: i["experts"][0].update(hotness=10**39), "hotness"),
        (lambda i: i.update(schema=0), "schema"),
        (lambda i: i["forms"][0]["tensors"][0].update(name="x" * 201), "no name"),
    ],
)
def test_index(tmp_path: Path, damage: Callable[[dict[str, Any]], None], what: str) -> None:
    folder = tiny_split.write_split(tmp_path / "split", 4)
    path = folder / "split/index.json"
    index = json.loads(path.read_bytes())
    damage(index)
    path.write_text(json.dumps(index))
    tiny.seal(folder)
    assert what in refused(folder, "model", target="onnx-split")


# As the fuzzer does it (tools/fuzz.py), for a moment


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], fuzz_runtime.Target]:
    base = tmp_path_factory.mktemp("fuzz")
    fuzz_runtime.seeds(base / "seeds")
    made: dict[str, fuzz_runtime.Target] = {}

    def get(name: str) -> fuzz_runtime.Target:
        if name not in made:
            (base / name).mkdir()
            made[name] = fuzz_runtime.targets(base / "seeds", base / name)[name]()
        return made[name]

    return get


@pytest.mark.parametrize("name", sorted(fuzz_runtime.targets(Path(), Path())))
@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.binary(max_size=64))
def test_damaged_files(
    name: str, data: bytes, fuzzed: Callable[[str], fuzz_runtime.Target]
) -> None:
    fuzzed(name)(data)


@pytest.mark.parametrize("trick", fuzz_runtime.TRICKS)
def test_files_that_are_something_else(
    artifacts: dict[str, Path], tmp_path: Path, trick: str
) -> None:
    box = fuzz_runtime.Sandbox(artifacts["module"], tmp_path)
    for name in ("onnx/model.onnx", "onnx/model.onnx.data", MANIFEST_NAME):
        code = "unsafe-path" if trick in ("link", "elsewhere") else "not-found"
        if trick == "empty":
            code = "bad-manifest" if name == MANIFEST_NAME else "hash-mismatch"
        box.with_trick(name, trick, lambda code=code: refused(box.root, code))
        if trick == "link":
            assert (tmp_path / BAIT).stat().st_atime == 0, "it was read all the same"
    carve_runtime.load(box.root)
