from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import carve_runtime
import onnx
import pytest
from carve_runtime import ArtifactError
from carve_runtime.files import MAX_JSON
from tiny_artifacts import read_manifest, write_manifest


def refused(folder: Path, code: str, **options: Any) -> ArtifactError:
    with pytest.raises(ArtifactError) as caught:
        carve_runtime.load(folder, **options)
    assert caught.value.code == code, caught.value
    assert caught.value.hint
    return caught.value


def test_reads_a_sound_manifest(artifacts: dict[str, Path]) -> None:
    manifest = carve_runtime.read_manifest(artifacts["shared"])
    assert manifest.kind == "decoder"
    assert manifest.model.shared_cache
    assert manifest.targets["onnx-cpu"].bits == 16
    assert set(manifest.files) == {"onnx/model.onnx", "onnx/model.onnx.data", "tokenizer.json"}


@pytest.mark.parametrize(
    "path",
    [
        "../secret",
        "onnx/../../secret",
        "/etc/passwd",
        "C:/secret",
        "..\\secret",
        "onnx//model.onnx",
        "./onnx/model.onnx",
        "onnx/",
        "",
        "a\x00b",
    ],
)
@pytest.mark.parametrize("verify", [True, False])
def test_unsafe_paths(copy: Path, path: str, verify: bool) -> None:
    (copy.parent / "secret").write_text("x")
    sound = read_manifest(copy)
    digest = hashlib.sha256(b"x").hexdigest()
    write_manifest(copy, sound | {"files": sound["files"] | {path: digest}})
    refused(copy, "unsafe-path", verify=verify)
    write_manifest(copy, sound | {"targets": {"onnx-cpu": {"model": path}}})
    refused(copy, "unsafe-path", verify=verify)


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("name", ["onnx", "onnx/model.onnx.data", "manifest.json"])
def test_links_that_lead_outside(copy: Path, name: str, verify: bool) -> None:
    outside = copy.parent / "outside"
    (copy / name).rename(outside)
    (copy / name).symlink_to(outside)
    refused(copy, "unsafe-path", verify=verify)


def test_links_that_stay_inside(copy: Path) -> None:
    """Found where they lead, and hashed there."""
    sound = read_manifest(copy)
    digest = sound["files"]["onnx/model.onnx.data"]
    write_manifest(copy, sound | {"files": sound["files"] | {"onnx/blob": digest}})
    (copy / "onnx/model.onnx.data").rename(copy / "onnx/blob")
    (copy / "onnx/model.onnx.data").symlink_to("blob")
    carve_runtime.load(copy)
    (copy / "onnx/blob").write_bytes(b"x")
    refused(copy, "hash-mismatch")


def test_link_loop_and_folder_as_file(copy: Path) -> None:
    sound = read_manifest(copy)
    (copy / "loop").symlink_to("loop")
    for name in ("loop", "onnx", "\ud800"):
        write_manifest(copy, sound | {"files": sound["files"] | {name: "0" * 64}})
        refused(copy, "not-found")


def test_hash_mismatch(copy: Path) -> None:
    data = copy / "onnx/model.onnx.data"
    data.write_bytes(data.read_bytes()[:-1] + b"\x01")
    assert "model.onnx.data" in refused(copy, "hash-mismatch").message
    carve_runtime.load(copy, verify=False)


def test_schemas(copy: Path) -> None:
    sound = read_manifest(copy)
    write_manifest(copy, sound | {"schema": 2, "kind": "unheard of"})
    error = refused(copy, "schema")
    assert "schema 2" in error.message and "schema 1" in error.message
    assert "upgrade" in error.hint
    write_manifest(copy, sound | {"schema": 0})
    refused(copy, "schema")
    write_manifest(copy, sound | {"schema": True})
    refused(copy, "bad-manifest")


def test_missing_files(copy: Path, tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "not-found")
    refused(tmp_path, "not-found")
    (copy / "onnx/model.onnx.data").unlink()
    refused(copy, "not-found", verify=False)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[1]", b"null", b"\xff\xfe", b"[" * 200_000, b"{}", b'{"schema": 1}', b"9" * 9999],
)
def test_not_a_manifest(copy: Path, content: bytes) -> None:
    (copy / "manifest.json").write_bytes(content)
    refused(copy, "bad-manifest")


def test_huge_manifest(copy: Path) -> None:
    with (copy / "manifest.json").open("r+b") as file:
        file.seek(MAX_JSON)
        file.write(b" ")
    assert "larger" in refused(copy, "bad-manifest").message


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "other"},
        {"carve": 1},
        {"source": None},
        {"files": []},
        {"files": {"onnx/model.onnx": "00"}},
        {"files": {"manifest.json": "0" * 64}},
        {"targets": {"onnx-cpu": "onnx/model.onnx"}},
        {"targets": {"onnx-cpu": {"model": "not/listed.onnx"}}},
        {"targets": {"onnx-cpu": {"model": "onnx/model.onnx", "bits": "4"}}},
        {"model": []},
        {"model": {"vocab_size": -1}},
        {"model": {"max_length": 2**40}},
        {"model": {"eos_token_ids": 1}},
        {"model": {"pooling": "max"}},
        {"model": {"shared_cache": 1}},
        {"model": {"gates": {}}},
        {"model": {"gates": ["mlp"]}},
        {"model": {"gates": [{"name": 1, "skip": 0.5}]}},
        {"model": {"gates": [{"name": "mlp", "skip": 1.5}]}},
        {"model": {"gates": [{"name": "mlp", "skip": float("nan")}]}},
        {"kind": "decoder", "model": {}},
    ],
)
def test_wrong_types(copy: Path, change: dict[str, Any]) -> None:
    write_manifest(copy, read_manifest(copy) | change)
    refused(copy, "bad-manifest")


def test_targets(copy: Path) -> None:
    assert "onnx-cpu" in refused(copy, "target", target="onnx-cuda").hint
    sound = read_manifest(copy)
    write_manifest(copy, sound | {"targets": {"other": sound["targets"]["onnx-cpu"]}})
    refused(copy, "target")
    refused(copy, "target", target="other")


def test_unlisted_external_data(copy: Path) -> None:
    sound = read_manifest(copy)
    del sound["files"]["onnx/model.onnx.data"]
    write_manifest(copy, sound)
    assert "model.onnx.data" in refused(copy, "unlisted-file").message


@pytest.mark.parametrize("how", ["file", "link", "folder link"])
def test_unlisted_files_beside_the_model(copy: Path, how: str) -> None:
    if how == "file":
        (copy / "onnx/deep").mkdir()
        (copy / "onnx/deep/more.data").write_text("x")
    else:
        (copy / "onnx/more").symlink_to("/etc/passwd" if how == "link" else "/etc")
    refused(copy, "unlisted-file")


def _rewrite_model(folder: Path, model: onnx.ModelProto | None) -> None:
    path = folder / "onnx/model.onnx"
    path.write_bytes(b"not onnx" if model is None else model.SerializeToString())
    manifest = read_manifest(folder)
    manifest["files"]["onnx/model.onnx"] = hashlib.sha256(path.read_bytes()).hexdigest()
    write_manifest(folder, manifest)


def test_onnxruntime_refusals(copy: Path) -> None:
    """A model whose external data leads outside its folder, and one that is not ONNX."""
    model = onnx.load(copy / "onnx/model.onnx", load_external_data=False)
    (entry,) = (e for e in model.graph.initializer[0].external_data if e.key == "location")
    outside = copy / "outside.data"
    outside.write_bytes((copy / "onnx/model.onnx.data").read_bytes())
    for location in ("../outside.data", str(outside.resolve())):
        entry.value = location
        _rewrite_model(copy, model)
        refused(copy, "model")
    _rewrite_model(copy, None)
    refused(copy, "model")


@pytest.mark.parametrize(
    "change",
    [{"num_layers": 3}, {"head_dim": 4}, {"num_key_value_heads": 7}, {"vocab_size": 9}],
)
def test_graph_does_not_match(
    artifacts: dict[str, Path], tmp_path: Path, change: dict[str, Any]
) -> None:
    folder = Path(shutil.copytree(artifacts["shared"], tmp_path / "copy"))
    manifest = read_manifest(folder)
    manifest["model"] |= change
    write_manifest(folder, manifest)
    refused(folder, "model")


def test_bad_tokenizer(copy: Path) -> None:
    (copy / "tokenizer.json").write_text("{}")
    manifest = read_manifest(copy)
    manifest["files"]["tokenizer.json"] = hashlib.sha256(b"{}").hexdigest()
    write_manifest(copy, manifest)
    refused(copy, "tokenizer")


def test_import_is_light() -> None:
    code = (
        "import sys, json, carve_runtime, carve_runtime.__main__;"
        "print(json.dumps([m for m in ('torch', 'transformers', 'onnx', 'carve', 'scipy')"
        " if m in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert json.loads(done.stdout) == []


def test_onnxruntime_reports_nothing(artifacts: dict[str, Path], tmp_path: Path) -> None:
    # CI itself switches the reports off, so it must not be what passes this test.
    env = {k: v for k, v in os.environ.items() if k not in ("CI", "ORT_DISABLE_TELEMETRY")}
    env |= {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    code = f"import carve_runtime; carve_runtime.load({str(artifacts['module'])!r})"
    subprocess.run([sys.executable, "-c", code], env=env, check=True)
    assert not list(tmp_path.rglob("*"))


def test_gates_that_the_graph_has_not(artifacts: dict[str, Path], tmp_path: Path) -> None:
    copy = Path(shutil.copytree(artifacts["shared"], tmp_path / "copy"))
    sound = read_manifest(copy)
    gates = {"gates": [{"name": "mlp", "skip": 0.5}]}
    write_manifest(copy, sound | {"model": sound["model"] | gates})
    assert "gate_shift" in refused(copy, "model").message
