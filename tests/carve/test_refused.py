"""What a conversion refuses before it begins, and how it says so."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny_models as tiny
import torch
import transformers as hf
from command_line import Captured, change_config, convert, refused, result
from safetensors.torch import load_file, save_file

import carve
from carve.errors import UserError

# What is refused: the source


def test_no_such_directory(tmp_path: Path, out: Path, capsys: Captured) -> None:
    message = refused(tmp_path / "nowhere", out, capsys)
    assert "not-found" in message
    assert "nowhere" in message


def test_pickled_weights(damaged: Path, out: Path, capsys: Captured) -> None:
    weights = damaged / "model.safetensors"
    torch.save(load_file(weights), damaged / "pytorch_model.bin")
    weights.unlink()
    message = refused(damaged, out, capsys)
    assert message.startswith("pickle")
    assert "pytorch_model.bin" in message


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, -1])
def test_truncated_weights(keep: float, damaged: Path, out: Path, capsys: Captured) -> None:
    file = damaged / "model.safetensors"
    data = file.read_bytes()
    size = int(keep * len(data)) if 0 < keep < 1 else int(keep)
    file.write_bytes(data[:size])
    message = refused(damaged, out, capsys)
    assert message.startswith("bad-file")
    assert "model.safetensors" in message


@pytest.mark.parametrize(
    "values, name",
    [
        ({"num_hidden_layers": 3}, "layers.2"),
        ({"num_hidden_layers": 1}, "layers.1"),
        ({"hidden_size": 128}, "embed_tokens"),
        ({"intermediate_size": 512}, "mlp"),
        ({"architectures": ["NoSuchForCausalLM"], "model_type": "nosuch"}, "nosuch"),
    ],
    ids=lambda v: "-".join(v) if isinstance(v, dict) else "",
)
def test_config_that_disagrees(
    values: dict[str, Any], name: str, damaged: Path, out: Path, capsys: Captured
) -> None:
    change_config(damaged, **values)
    message = refused(damaged, out, capsys)
    assert message.startswith("config-mismatch")
    assert name in message


def test_config_that_is_no_json(damaged: Path, out: Path, capsys: Captured) -> None:
    (damaged / "config.json").write_text("{")
    assert "config.json" in refused(damaged, out, capsys)
    (damaged / "config.json").unlink()
    assert "config.json" in refused(damaged, out, capsys)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(
    bad: float, damaged: Path, out: Path, capsys: Captured
) -> None:
    file = damaged / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][3, 4] = bad
    save_file(tensors, file, {"format": "pt"})
    message = refused(damaged, out, capsys)
    assert message.startswith("not-finite")
    assert name in message


@pytest.mark.parametrize("where", ["../model.safetensors", "/etc/passwd", "sub/model.safetensors"])
def test_index_that_points_outside(where: str, damaged: Path, out: Path, capsys: Captured) -> None:
    (damaged / "model.safetensors").rename(damaged.parent / "model.safetensors")
    index = {"weight_map": {"lm_head.weight": where}}
    (damaged / "model.safetensors.index.json").write_text(json.dumps(index))
    message = refused(damaged, out, capsys)
    assert "outside" in message
    assert where in message


def test_index_that_is_a_link_to_the_outside(damaged: Path, out: Path, capsys: Captured) -> None:
    (damaged / "model.safetensors").rename(damaged.parent / "elsewhere.safetensors")
    (damaged / "shard.safetensors").symlink_to(damaged.parent / "elsewhere.safetensors")
    index = {"weight_map": {"lm_head.weight": "shard.safetensors"}}
    (damaged / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "outside" in refused(damaged, out, capsys)


def test_model_without_ffn(damaged: Path, out: Path, capsys: Captured) -> None:
    """State-space blocks: products that are neither FFN nor attention."""
    for file in damaged.glob("*.safetensors"):
        file.unlink()
    torch.manual_seed(0)
    config = hf.MambaConfig(
        hidden_size=32, state_size=4, num_hidden_layers=1, vocab_size=300, use_mambapy=False
    )
    hf.MambaForCausalLM(config).save_pretrained(damaged)
    message = refused(damaged, out, capsys)
    assert message.startswith(("no-ffn", "architecture", "capture"))


def test_tokenizer_missing_or_of_another_model(damaged: Path, out: Path, capsys: Captured) -> None:
    tiny.make_tokenizer(320).save(str(damaged / "tokenizer.json"))
    assert "320" in refused(damaged, out, capsys)
    (damaged / "tokenizer.json").write_text("{}")
    assert refused(damaged, out, capsys).startswith("tokenizer")
    (damaged / "tokenizer.json").unlink()
    assert "tokenizer.json is missing" in refused(damaged, out, capsys)


# What is refused: the request


@pytest.mark.parametrize("budget", ["0", "1.5", "-1", "nan"])
@pytest.mark.parametrize("option", ["--budget", "--ffn-active"])
def test_budget_outside(
    budget: str, option: str, checkpoint: Path, out: Path, capsys: Captured
) -> None:
    message = refused(checkpoint, out, capsys, option, budget)
    assert message.startswith("budget")
    assert option in message


def test_budget_out_of_reach(checkpoint: Path, out: Path, capsys: Captured) -> None:
    message = refused(checkpoint, out, capsys, "--budget", "0.3")
    assert message.startswith("budget")
    assert "the least is 0.606" in message


def test_both_budgets(checkpoint: Path, out: Path, capsys: Captured) -> None:
    assert "not both" in refused(checkpoint, out, capsys, "--budget", "0.7", "--ffn-active", "0.5")


@pytest.mark.parametrize(
    "setting, nearest",
    [
        ("convert.tokns=5", "'tokens'"),
        ("route_ridge.powr=1.0", "'power'"),
        ("rout_ridge.power=1.0", "'route_ridge'"),
        ("carve.iteration=3", "'iterations'"),
        ("convert.router=ridg", "'ridge'"),
        ("route_ridge.power=many", "float"),
        ("convert.length=short", "length"),
        ("convert.tokens=0", "tokens"),
        ("nonsense", "section.key=value"),
    ],
)
def test_settings(
    setting: str, nearest: str, checkpoint: Path, out: Path, capsys: Captured
) -> None:
    assert nearest in refused(checkpoint, out, capsys, "--set", setting)


@pytest.mark.parametrize(
    "more, word",
    [
        (("--bits", "1"), "--bits 1"),
        (("--size", "large"), "'large'"),
        (("--size", "1MB", "--bits", "16"), "fewer than 16"),
        (("--target", "onnx-gpu"), "'onnx-cpu'"),
        (("--calibration", "/nowhere/text.txt"), "/nowhere/text.txt"),
        (("--recipe", "/nowhere/recipe.toml"), "/nowhere/recipe.toml"),
    ],
)
def test_options(
    more: tuple[str, ...], word: str, checkpoint: Path, out: Path, capsys: Captured
) -> None:
    assert word in refused(checkpoint, out, capsys, *more)


def test_calibration_text(checkpoint: Path, tmp_path: Path, out: Path, capsys: Captured) -> None:
    text = tmp_path / "short.txt"
    text.write_text("Too short.\n")
    message = refused(checkpoint, out, capsys, "--calibration", str(text))
    assert message.startswith("text-short")
    assert "64" in message
    text.write_bytes(b"\xff\xfe\x00\xff" * 100)
    assert "short.txt" in refused(checkpoint, out, capsys, "--calibration", str(text))


def test_batches_beside_a_checkpoint(checkpoint: Path, out: Path) -> None:
    """They are for an ``nn.Module``; a file's name in their place would be ignored."""
    given: Any = "text.txt"
    with pytest.raises(UserError, match=r"nn\.Module"):
        carve.convert(checkpoint, out, budget=0.7, calibration=given)


def test_output_that_is_no_artifact(checkpoint: Path, out: Path, capsys: Captured) -> None:
    out.mkdir()
    (out / "letter.txt").write_text("dear")
    assert refused(checkpoint, out, capsys).startswith("output")
    assert (out / "letter.txt").read_text() == "dear"
    shutil.rmtree(out)
    out.write_text("a file")
    assert refused(checkpoint, out, capsys).startswith("output")
    assert out.read_text() == "a file"


def test_output_without_a_parent(checkpoint: Path, tmp_path: Path, capsys: Captured) -> None:
    assert convert(checkpoint, tmp_path / "a" / "b", "--budget", "0.7") == 2
    assert not (tmp_path / "a").exists()
    assert result(capsys)["error"]["code"] == "output"
