"""carve's command line as tests call it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from carve import cli

QUICK = [
    "--set", "convert.tokens=2000",
    "--set", "convert.eval_tokens=500",
    "--set", "convert.length=64",
    "--set", "carve.tokens=512",
    "--set", "distill.steps=60",
]  # fmt: skip
Captured = pytest.CaptureFixture[str]


def call(*argv: str) -> int:
    return cli.main([str(a) for a in argv])


def convert(model: Path, output: Path, *more: str) -> int:
    return call("convert", str(model), "-o", str(output), "--json", *QUICK, *more)


def result(capsys: Captured) -> dict[str, Any]:
    """The only line of standard output, as JSON."""
    text = capsys.readouterr().out
    assert text.count("\n") == 1
    found = json.loads(text)
    assert isinstance(found, dict)
    return found


def folder_size(folder: Path) -> int:
    """Bytes of all files below it."""
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def refused(model: Path, output: Path, capsys: Captured, *more: str, exit_code: int = 2) -> str:
    """Convert, and expect an error that leaves a state at the most; its message and hint."""
    capsys.readouterr()
    there = sorted(output.parent.iterdir())
    argv = more if "--budget" in more or "--ffn-active" in more else ("--budget", "0.7", *more)
    assert convert(model, output, *argv) == exit_code
    state = output.parent / f".{output.name}.state"
    assert sorted({*output.parent.iterdir()} - {state}) == there
    out, err = capsys.readouterr()
    assert out.count("\n") == 1
    error = json.loads(out)["error"]
    assert set(error) == {"code", "message", "hint"}
    assert error["code"]
    assert error["message"] in err
    assert "Traceback" not in err
    return f"{error['code']}: {error['message']} {error['hint']}"


def change_config(folder: Path, **values: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))
