"""Conversions that are stopped, by the user or by the machine, and go on."""

from __future__ import annotations

import json
import os
import resource
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from carve import cli
from carve.artifact import Artifact

SMALL = [
    "--budget", "0.7", "--effort", "none", "--target", "hf",
    "--set", "convert.tokens=1000",
    "--set", "convert.eval_tokens=300",
    "--set", "convert.length=64",
    "--set", "carve.tokens=256",
]  # fmt: skip
Captured = pytest.CaptureFixture[str]


def convert(model: Path, output: Path, capsys: Captured, *more: str) -> tuple[int, dict[str, Any]]:
    """Exit code and answer."""
    capsys.readouterr()
    code = cli.main(["convert", str(model), "-o", str(output), "--json", *SMALL, *more])
    return code, json.loads(capsys.readouterr().out)


@pytest.fixture(scope="module")
def digest(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of an undisturbed conversion."""
    out = tmp_path_factory.mktemp("whole") / "artifact"
    assert cli.main(["convert", str(checkpoint), "-o", str(out), "--json", *SMALL]) == 0
    artifact = Artifact.open(out)
    assert artifact.digest() == artifact.manifest["digest"]
    return artifact.digest()


def resumes(checkpoint: Path, out: Path, digest: str, capsys: Captured, caplog: Any) -> None:
    """Go on, and come to the undisturbed artifact with nothing left beside it."""
    assert [p.name for p in out.parent.iterdir()] == [f".{out.name}.state"]
    code, answer = convert(checkpoint, out, capsys, "--resume")
    assert code == 0
    assert answer["digest"] == Artifact.open(out).digest() == digest
    assert "going on after" in caplog.text
    assert [p.name for p in out.parent.iterdir()] == [out.name]


def test_until_then_resume(
    checkpoint: Path, digest: str, tmp_path: Path, capsys: Captured, caplog: Any
) -> None:
    out = tmp_path / "artifact"
    code, answer = convert(checkpoint, out, capsys, "--until", "carve")
    assert code == 0
    assert answer["stopped_after"] == "carve"
    assert answer["state_bytes"] > 100_000
    assert [p["name"] for p in answer["passes"]] == ["profile", "allocate", "carve"]
    code, answer = convert(checkpoint, out, capsys, "--from", "refit", "--budget", "0.8")
    assert code == 2
    assert answer["error"]["code"] == "state"
    assert "route_ridge" in answer["error"]["message"]
    resumes(checkpoint, out, digest, capsys, caplog)


def at(label: str, act: Callable[[], None]) -> Any:
    """A progress that acts when a pass starts."""

    def progress(items: Sequence[Any], name: str) -> Iterator[Any]:
        if name == label:
            act()
        return iter(items)

    return progress


@pytest.mark.parametrize("what", ["disk", "memory"])
def test_machine_that_gives_no_more(
    what: str,
    checkpoint: Path,
    digest: str,
    tmp_path: Path,
    capsys: Captured,
    caplog: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A file that may not grow, and memory that may not."""
    limit = resource.RLIMIT_FSIZE if what == "disk" else resource.RLIMIT_AS
    soft, hard = resource.getrlimit(limit)

    taken: list[torch.Tensor] = []

    def shrink() -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        room = 10_000 if what == "disk" else pages * resource.getpagesize()
        resource.setrlimit(limit, (room, hard))
        with suppress(RuntimeError):  # what is free within the process is no way round
            while what == "memory":
                taken.append(torch.empty(100_000, dtype=torch.uint8))

    out = tmp_path / "artifact"
    monkeypatch.setattr(cli, "_progress", at("refit", shrink))
    try:
        code, answer = convert(checkpoint, out, capsys)
    finally:
        taken.clear()
        resource.setrlimit(limit, (soft, hard))
        monkeypatch.undo()
    error = answer["error"]
    assert (code, error["code"]) == ((2, "disk-full") if what == "disk" else (1, "memory")), error
    assert "--resume" in error["hint"]
    resumes(checkpoint, out, digest, capsys, caplog)


def test_output_that_cannot_be_written(checkpoint: Path, tmp_path: Path, capsys: Captured) -> None:
    parent = tmp_path / "closed"
    parent.mkdir(mode=0o555)
    user = os.geteuid()
    if user == 0:  # root may write anywhere
        for folder in (*checkpoint.parents, checkpoint, parent, *parent.parents):
            if Path(tempfile.gettempdir()).resolve() in folder.resolve().parents:
                folder.chmod(folder.stat().st_mode | 0o555)
        os.seteuid(65534)
    try:
        code, answer = convert(checkpoint, parent / "artifact", capsys)
    finally:
        os.seteuid(user)
    assert code == 2
    assert answer["error"]["code"] == "output"
    assert "cannot be written" in answer["error"]["message"]
    assert not any(parent.iterdir())
