"""Recipes: what is written can be read, everything is explained, and the bundled ones are whole."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from carve import cli, passes
from carve.config import PASS_NAMES, ConvertConfig, apply_settings, from_table, read_recipe
from carve.errors import UserError
from carve.lineup import passes_of
from carve.passbase import Pass
from carve.recipe import resolved
from carve.settings import general, of_pass

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "recipes").glob("[!d]*.toml"))


def settings_of(config: ConvertConfig) -> dict[str, Any]:
    return {p.name: asdict(p.config) for p in passes_of(config)}


@pytest.mark.parametrize(
    "config",
    [
        ConvertConfig(budget=0.6),
        ConvertConfig(ffn_active=0.5, bits="auto", size="4MB", effort="full", skip="auto"),
        ConvertConfig(budget=0.7, exact=True, router="analytical", bits=16, seed=3),
        ConvertConfig(budget=0.7, skip=0.25, passes={"quantize": {"method": "eaquant"}}),
        ConvertConfig(budget=0.7, targets=("hf", "onnx-cpu"), devices="laptop"),
        ConvertConfig(budget=1.0),
    ],
    ids=lambda c: f"{c.budget}-{c.bits}-{c.effort}-{c.skip}",
)
def test_a_written_recipe_is_the_same_conversion(config: ConvertConfig) -> None:
    text = resolved(config, passes_of(config))
    table = tomllib.loads(text)
    again = from_table(table)
    assert settings_of(again) == settings_of(config)
    for s in general():
        assert getattr(again, s.name) == getattr(config, s.name)
    assert resolved(again, passes_of(again)) == text
    assert [s for s in table if s != "convert"] == [p.name for p in passes_of(config)]
    keys = [n for n in text.splitlines() if n and not n.startswith(("#", "["))]
    unset = [n for n in text.splitlines() if n.endswith(" is not set")]
    assert len(keys) + len(unset) == len(general()) + sum(map(len, settings_of(config).values()))
    assert max(map(len, text.splitlines())) <= 100


def test_labels_teach_only_where_text_is_given_for_long_training() -> None:
    def weights(**more: Any) -> list[float]:
        settings = settings_of(ConvertConfig(budget=0.7, **more))
        return [settings[name]["labels"] for name in ("finetune", "tune_grids")]

    own = {"calibration": "own.txt"}
    assert weights(effort="full", **own) == [0.5, 0.5]
    assert weights(effort="full") == weights(effort="layer", **own) == [0.0, 0.0]
    less = {"finetune": {"labels": 0.1}}
    assert weights(effort="full", passes=less, **own) == [0.1, 0.5]


@pytest.mark.parametrize("name", PASS_NAMES)
def test_settings_read_from_source_are_those_of_the_pass(name: str) -> None:
    (cls,) = [
        c
        for c in vars(passes).values()
        if isinstance(c, type) and issubclass(c, Pass) and c.name == name
    ]
    (config,) = cls.__orig_bases__[0].__args__  # type: ignore[attr-defined]
    what, settings = of_pass(name)
    assert len(what) > 20
    assert {s.name: s.default for s in settings} == asdict(config())
    for s in settings:
        assert len(s.about) > 5, f"{name}.{s.name} is not explained"


def test_general_settings_are_explained() -> None:
    assert {s.name for s in general()} == set(asdict(ConvertConfig(budget=0.6))) - {"passes"}
    assert all(len(s.about) > 10 for s in general())


def test_list_answers_without_torch() -> None:
    code = (
        "import sys; from carve.cli import main; main(['list', 'passes', '--json']);"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    answer = json.loads(done.stdout)
    assert answer["passes"] == list(PASS_NAMES)
    rate = answer["settings"]["distill"]["rate"]
    assert rate["default"] == 0.03
    assert "step size" in rate["about"]


def test_dump_recipe_converts_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    argv = ["convert", "nowhere", "--budget", "0.5", "--set", "refit.strengths=[0.5]"]
    assert cli.main([*argv, "--dump-recipe"]) == 0
    table = tomllib.loads(capsys.readouterr().out)
    assert table["convert"]["budget"] == 0.5
    assert table["refit"] == {"strengths": [0.5], "judge": True}
    assert cli.main([*argv, "--dump-recipe", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == table
    assert cli.main([*argv, "--dump-recipe", "--set", "refit.strenths=[1.0]"]) == 2
    assert "'strengths'" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "setting, word",
    [
        ('shared_share="wide"', "float"),
        ("seed=1.5", "int"),
        ('targets="onnx-cpu"', "list of str"),
        ("exact=1", "bool"),
        ("effort=4", "str"),
        ("length=true", "int"),
    ],
)
def test_values_of_another_type(setting: str, word: str) -> None:
    table = {"convert": {"budget": 0.6}}
    apply_settings(table, [f"convert.{setting}"])
    with pytest.raises(UserError, match=f"has to be of type {word}"):
        from_table(table)


@pytest.mark.parametrize(
    "setting, words",
    [
        ("finetune.labels=1.5", r"finetune.labels = 1.5 is outside \[0, 1\]"),
        ("finetune.redrawn=2", r"outside \[0, 1\]"),
        ("finetune.batch=0", r"outside \[1, "),
        ("tune_grids.labels=-0.1", r"outside \[0, 1\]"),
        ("refit.strengths=[0.1,-0.1]", r"refit.strengths = -0.1 is outside \[0, infinity\)"),
        ("distill.strengths=[]", r"distill.strengths is an empty list"),
        ("distill.batch=0", r"outside \[1, "),
        ("route_ridge.held_out=0", r"outside \[0.001, 1\]"),
        ("allocate.step=0", r"outside \[0.001, 1\]"),
        ("allocate.probe=1.5", r"outside \[0.01, 1\]"),
        ("profile.activation_fraction=2", r"outside \[0, 1\]"),
        ("distill.steps=-1", r"outside \[0, infinity\)"),
    ],
)
def test_values_out_of_range(setting: str, words: str) -> None:
    table: dict[str, Any] = {"convert": {"budget": 0.6, "effort": "full"}}
    apply_settings(table, [setting])
    with pytest.raises(UserError, match=words):
        passes_of(from_table(table))


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_bundled_recipes(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    config = from_table(read_recipe(path))
    assert config.budget == 0.6
    assert passes_of(config)
    text = path.read_text(encoding="utf-8")
    assert text.count("#") >= text.count(" = ")  # commented


def test_there_are_three() -> None:
    assert [p.stem for p in RECIPES] == ["edge-cpu", "several-devices", "single-gpu"]


@pytest.mark.parametrize(
    "config, rest, tokens",
    [
        (ConvertConfig(budget=0.6), True, 131_072),
        (ConvertConfig(budget=0.6, bits=3), True, 393_216),
        (ConvertConfig(budget=0.6, effort="none"), False, None),
        (ConvertConfig(budget=0.6, bits=8), False, None),
    ],
    ids=["4 bits", "3 bits", "untrained", "8 bits"],
)
def test_where_weights_lay_is_kept_for_training_alone(
    config: ConvertConfig, rest: bool, tokens: int | None
) -> None:
    found = settings_of(config)
    assert found["quantize"]["rest"] == rest
    assert found.get("tune_grids", {}).get("tokens") == tokens
