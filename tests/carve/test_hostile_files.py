"""Files made to do harm: every reader of carve answers with an error of its own."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from carve_runtime.errors import ArtifactError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from carve.artifact import Artifact
from carve.capture import capture_checkpoint
from carve.checkpoint import Checkpoint
from carve.cli import main
from carve.config import apply_settings, from_table, read_recipe
from carve.errors import UserError
from carve.files import read_json, read_toml
from carve.measure import source_of
from carve.placement.devices import parse_devices
from carve.placement.sizes import Sizes
from carve.placement.trace import Trace
from carve.training_state import TrainingState, load, save

sys.path.append(str(Path(__file__).parents[2] / "tools"))
import fuzz_carve
from fuzz_runtime import Target


@pytest.fixture
def damaged(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "checkpoint"))


def refused(use: Callable[[], object], code: str, what: str = "") -> None:
    with pytest.raises(UserError) as caught:
        use()
    assert caught.value.code == code, caught.value
    assert what in caught.value.message


# Checkpoints


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "extra"])
def test_pipes_and_links_in_a_checkpoint(damaged: Path, name: str) -> None:
    outside = damaged.parent / "outside"
    outside.write_bytes((damaged / name).read_bytes() if (damaged / name).exists() else b"")
    (damaged / name).unlink(missing_ok=True)
    (damaged / name).symlink_to(outside)
    refused(lambda: Checkpoint.open(damaged), "bad-file", "outside the folder")
    (damaged / name).unlink()
    os.mkfifo(damaged / name)
    refused(lambda: Checkpoint.open(damaged), "bad-file", "not a regular file")


def test_links_of_the_hugging_face_cache(damaged: Path) -> None:
    """There a snapshot is links to blobs, and nothing else outside of it is read."""
    cache = damaged.parent / "models--tiny"
    snapshot = cache / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    for file in damaged.iterdir():
        file.rename(cache / "blobs" / file.name)
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    assert Checkpoint.open(snapshot).num_parameters > 0
    (cache / "blobs" / "config.json").rename(cache / "config.json")
    (cache / "blobs" / "config.json").symlink_to("../config.json")
    refused(lambda: Checkpoint.open(snapshot), "bad-file", "outside the folder")


@pytest.mark.parametrize("name", ["a\0b", "../x", ".", "", "a/b", "\udcff", "a\\b", "x" * 256])
def test_names_of_shards(damaged: Path, name: str) -> None:
    (damaged / "model.safetensors").unlink()
    index = {"weight_map": {"lm_head.weight": name}}
    (damaged / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError):
        Checkpoint.open(damaged)


def test_two_tensors_of_one_name(damaged: Path) -> None:
    path = damaged / "model.safetensors"
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + size].rstrip()
    first = next(k for k in json.loads(header) if k != "__metadata__")
    entry = json.dumps({first: json.loads(header)[first]})[1:-1].encode()
    header = header[:-1] + b"," + entry + b"}"
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + size :])
    refused(lambda: Checkpoint.open(damaged), "bad-file", f"'{first}' twice")


@pytest.mark.parametrize(
    "values",
    [
        {"num_hidden_layers": 10**9},
        {"num_labels": 10**9},
        {"rope_theta": 10**30},
        {"x": {"y": [{"n_layer": 10**6}]}},
        {"eos_token_id": "end"},
        {"eos_token_id": [1, -1]},
        {"bos_token_id": [1]},
        {"transformers_weights": "other.safetensors"},
    ],
)
def test_configurations_refused_before_loading(damaged: Path, values: dict[str, Any]) -> None:
    path = damaged / "config.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | values))
    with pytest.raises(UserError, match=r"config\.json") as caught:
        Checkpoint.open(damaged)
    assert caught.value.code in ("config-mismatch", "bad-file")


@pytest.mark.parametrize(
    "values",
    [
        {"vocab_size": 10**12},
        {"hidden_size": 2**40},
        {"architectures": {"a": 1}},
        {"architectures": ["pipeline"]},
        {"model_type": ["llama"]},
    ],
)
def test_configurations_refused_before_memory_is_taken(
    damaged: Path, values: dict[str, Any]
) -> None:
    path = damaged / "config.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | values))
    try:
        program = capture_checkpoint(damaged)
    except UserError as error:
        assert error.code in ("config-mismatch", "architecture")
    else:  # the architecture's name is a hint only
        assert "architectures" in values
        assert program.sites


def test_end_tokens_that_are_none(damaged: Path) -> None:
    (damaged / "generation_config.json").write_text('{"eos_token_id": [1, "x"]}')
    refused(lambda: Checkpoint.open(damaged), "config-mismatch", "generation_config.json")


# TOML and JSON


@pytest.mark.parametrize(
    "text",
    ["x = " + "[" * 5000, "x = " + "9" * 5000, "a." * 5000 + "b = 1", "x = 1\n" * 50_000, "x"],
    ids=["deep", "digits", "dotted", "large", "none"],
)
def test_toml(tmp_path: Path, text: str) -> None:
    path = tmp_path / "r.toml"
    path.write_text("\n".join([text]))
    refused(lambda: read_toml(path, "recipe"), "recipe", "r.toml")
    path.unlink()
    os.mkfifo(path)
    refused(lambda: read_toml(path, "recipe"), "recipe", "regular")


@pytest.mark.parametrize(
    "text",
    [
        "convert = 5",
        "[convert]\nbudget = true",
        "[convert]\nbudget = nan",
        '[convert]\nbudget = 0.6\nexact = "no"',
        "[convert]\nbudget = 0.6\ntargets = 5",
        "[convert]\nbudget = 0.6\ntargets = [5]",
        '[convert]\nbudget = 0.6\ntargets = "onnx-cpu"',
        "[convert]\nbudget = 0.6\ncalibration = 5",
        '[convert]\nbudget = 0.6\nshared_share = "x"',
        "[convert]\nbudget = 0.6\nseed = 1979-05-27",
        "[[convert]]\nbudget = 0.6",
    ],
)
def test_recipes_of_other_types(tmp_path: Path, text: str) -> None:
    path = tmp_path / "r.toml"
    path.write_text(text)

    def use() -> None:
        table = read_recipe(path)
        apply_settings(table, ["convert.seed=3"] if "seed" not in text else [])
        from_table(table)

    with pytest.raises(UserError):
        use()


def test_recipes_that_are_sound() -> None:
    table: dict[str, Any] = {"convert": {"budget": 1, "bits": 3.5, "skip": 0}}
    apply_settings(table, ["convert.size=40000000", "convert.targets=['onnx-cpu']"])
    assert from_table(table).size == 40_000_000


def test_devices_of_other_types() -> None:
    one = {"name": "a", "preset": "laptop"}
    link = {"between": [5, ["a"]], "preset": "ethernet"}
    refused(lambda: parse_devices({"device": [one], "link": [link]}), "devices", "unknown device")
    one = {"name": "a", "preset": ["laptop"]}
    refused(lambda: parse_devices({"device": [one]}), "devices", "unknown preset")


def test_json_object(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text('{"a": NaN}')
    refused(lambda: read_json(path), "bad-file", "not finite")
    assert list(read_json(path, finite=False)) == ["a"]
    path.write_text("[1]")
    refused(lambda: read_json(path), "bad-file", "no JSON object")


# Traces, sizes, reports, states


def _npz(path: Path, **arrays: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in arrays.items():
            archive.writestr(f"{name}.npy", data)
    return path


def _npy(array: Any, shape: str | None = None) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.asarray(array), allow_pickle=True)
    data = buffer.getvalue()
    if shape is not None:
        head, old = data[:128], str(np.asarray(array).shape).encode()
        data = head.replace(old, shape.encode())[:128] + data[128:]
    return data


@pytest.mark.parametrize(
    "arrays",
    [
        {"layers": _npy(["a"]), "experts": _npy([8]), "chosen0": _npy(object())},
        {"layers": _npy("a"), "experts": _npy([8])},
        {"layers": _npy(["a"]), "experts": _npy(8), "chosen0": _npy(np.zeros((2, 1), np.uint8))},
        {"layers": _npy(["a"]), "experts": _npy([-8]), "chosen0": _npy(np.zeros((2, 1), np.uint8))},
        {"layers": _npy(["a"]), "experts": _npy([9]), "chosen0": _npy(np.zeros((2, 1), np.uint8))},
        {"layers": _npy(np.zeros(0, "<U1")), "experts": _npy(np.zeros(0, int))},
        {"layers": _npy(["a"], "(1 << 60,)"), "experts": _npy([8])},
        {"layers": b"\x93NUMPY\x01\x00\x04\x00((((", "experts": b""},
        {"layers": _npy(["a"]), "experts": _npy([8]), "chosen0": b"no array"},
        {"layers": _npy(np.zeros(1 << 25))},
    ],
    ids=[
        "pickle",
        "scalar",
        "scalar 2",
        "negative",
        "narrow",
        "none",
        "shape",
        "header",
        "bytes",
        "bomb",
    ],
)
def test_traces(tmp_path: Path, arrays: dict[str, bytes]) -> None:
    path = _npz(tmp_path / "t.npz", **arrays)
    refused(lambda: Trace.read(path), "trace")


def test_trace_whose_stream_is_broken(tmp_path: Path) -> None:
    path = tmp_path / "t.npz"
    path.write_bytes(Trace(("a",), (np.random.default_rng(0).random((500, 8)) < 0.5,)).pack())
    assert Trace.read(path).tokens == 500
    data = bytearray(path.read_bytes())
    at = data.index(b"chosen0.npy") + 60
    data[at : at + 40] = bytes(40)
    path.write_bytes(data)
    refused(lambda: Trace.read(path), "trace")


def test_sizes_that_are_no_sizes() -> None:
    trace = Trace(("a",), (np.ones((2, 2), bool),))
    sound = {"nbytes": [[1, 2]], "macs": [[1, 2]], "host_macs": [1], "host_reads": [1]}
    sound |= {"token_bytes": 1, "host_bytes": 1, "cache_bytes": 1}
    assert Sizes.parse(sound, trace).host_bytes == 1
    for key in ("token_bytes", "cache_bytes", "host_bytes"):
        for value in (-1, float("inf"), None, [1]):
            refused(lambda k=key, v=value: Sizes.parse(sound | {k: v}, trace), "placement")
    refused(lambda: Sizes.parse(sound | {"host_reads": [-1]}, trace), "placement")


def _artifact(folder: Path, report: str) -> Path:
    folder.mkdir()
    files = {"m.onnx": "0" * 64}
    (folder / "m.onnx").touch()
    manifest = {"schema": 1, "carve": "1", "kind": "module", "source": {}, "model": {}}
    manifest |= {"files": files, "targets": {"onnx-cpu": {"model": "m.onnx"}}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "report.json").write_text(report)
    return folder


@pytest.mark.parametrize("report", ["{}", '{"macs": 5}', '{"macs": {"dense": "x"}}', "[1]", "{"])
def test_reports(tmp_path: Path, report: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = _artifact(tmp_path / "a", report)
    assert main(["report", str(folder)]) == 2
    assert str(folder) in capsys.readouterr().err


def test_artifact_that_points_elsewhere(tmp_path: Path) -> None:
    folder = _artifact(tmp_path / "a", "{}")
    refused(lambda: source_of(Artifact.open(folder), None), "not-found", "dense checkpoint")
    refused(lambda: Artifact.open(folder).bits, "bad-file", "manifest.json")
    (folder / "report.json").rename(tmp_path / "report.json")
    (folder / "report.json").symlink_to(tmp_path / "report.json")
    with pytest.raises(ArtifactError, match="outside"):
        Artifact.open(folder)


@pytest.mark.parametrize(
    "how",
    [
        *("moment", "weight", "nan", "index", "optimizers", "losses", "step", "steps behind"),
        *("more steps behind", "something else"),
    ],
)
def test_states_are_taken_whole_or_not_at_all(how: str) -> None:
    model, optimizer = fuzz_carve.trainee()
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    partial = fuzz_carve.Kept()
    save(partial, model, [optimizer], 1, [0.5])
    fresh, optimizer = fuzz_carve.trainee()
    losses: list[float] = []
    assert load(partial, fresh, [optimizer], losses) == 1
    assert torch.equal(fresh.weight, model.weight)  # type: ignore[arg-type]

    state = partial.value
    assert isinstance(state, TrainingState)
    if how == "moment":
        state.moments[0][0]["exp_avg"] = torch.zeros(5)
    elif how == "weight":
        state.model["weight"] = torch.zeros(3, 3)
    elif how == "nan":
        state.model["weight"] = torch.full((2, 3), float("nan"))
    elif how == "index":
        state.moments[0][7] = state.moments[0][0]
    elif how == "optimizers":
        state.moments.append({})
    elif how == "losses":
        state.losses.append(float("inf"))
    elif how == "step":
        partial.value = replace(state, step=-1)
    elif "behind" in how:
        # Adam divides by 1 - b^t.
        state.moments[0][0]["step"] = torch.tensor(2.0 if how.startswith("more") else -1.0)
    else:
        partial.value = ["something", "else"]
    fresh, optimizer = fuzz_carve.trainee()
    before, losses = fresh.weight.clone(), []  # type: ignore[operator]
    assert load(partial, fresh, [optimizer], losses) == 0
    assert torch.equal(fresh.weight, before)  # type: ignore[arg-type]
    assert not losses
    assert not optimizer.state_dict()["state"]


# As the fuzzer does it (tools/fuzz.py), for a moment


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Target]:
    base = tmp_path_factory.mktemp("fuzz")
    fuzz_carve.plain_seeds(base / "seeds")
    made: dict[str, Target] = {}

    def get(name: str) -> Target:
        if name not in made:
            (base / name).mkdir()
            made[name] = fuzz_carve.targets(base / "seeds", base / name)[name]()
        return made[name]

    return get


@pytest.mark.parametrize("name", ["devices", "state", "checkpoint", "shards"])
@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.binary(max_size=64))
def test_damaged_files(name: str, data: bytes, fuzzed: Callable[[str], Target]) -> None:
    fuzzed(name)(data)
