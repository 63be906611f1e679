"""The shares and the choice of ``tools/mix_text.py``."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
import mix_text


def folder_of(path: Path) -> Path:
    for name in "ab":
        (path / f"{name}.txt").write_text(name * 10 * mix_text.PIECE, "utf-8")
    return path


def test_shares_are_kept_and_the_seed_decides(tmp_path: Path) -> None:
    folder, out = folder_of(tmp_path), tmp_path / "out"
    found = []
    for seed in "001":
        given = [str(folder), "-o", str(out), "--shares", "b=3,a=1", "--seed", seed]
        assert mix_text.main([*given, "--characters", str(8 * mix_text.PIECE)]) == 0
        found.append(out.read_text("utf-8"))
    assert found[0] == found[1] != found[2]
    pieces = found[0].split("\n\n\n")
    assert sorted(p[0] for p in pieces) == ["a"] * 2 + ["b"] * 6
    assert {len(p) for p in pieces} == {mix_text.PIECE}


@pytest.mark.parametrize(
    "more, words",
    [
        (["--shares", "a=1,b=1", "--characters", "1000000"], "are wanted"),
        (["--shares", "c=1"], "c.txt"),
        (["--shares", "a=0"], "invalid"),
        (["--shares", "a"], "invalid"),
    ],
)
def test_what_cannot_be_mixed_is_said(
    more: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    with pytest.raises(SystemExit):
        mix_text.main([str(folder_of(tmp_path)), "-o", str(out), *more])
    assert words in capsys.readouterr().err
    assert not out.exists()


def test_bundled_shares_are_whole() -> None:
    assert sum(mix_text.BUNDLED.values()) == pytest.approx(1.0)
