"""The reference in ``docs`` says what the code says."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

import reference

from carve.config import PASS_NAMES


def test_pages_are_what_the_code_says() -> None:
    assert reference.main(["--check"]) == 0, "run tools/reference.py"


def test_every_pass_and_setting_has_its_place() -> None:
    text = reference.pages()["recipes.md"]
    for name in PASS_NAMES:
        assert f"\n## [{name}]\n" in text
    assert "| `num_experts` | `unset` |" in text


def test_a_stale_page_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(reference, "FOLDER", tmp_path)
    assert reference.main(["--check"]) == 1
    assert "recipes.md" in capsys.readouterr().err
    assert reference.main([]) == 0
    assert reference.main(["--check"]) == 0
    (tmp_path / "carve.md").write_text("other", encoding="utf-8")
    assert reference.main(["--check"]) == 1
