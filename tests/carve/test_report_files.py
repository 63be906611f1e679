"""Reports on disk: amended artifacts, pages of their own, and two conversions side by side."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import report_samples as samples
from report_samples import LAYERS, Page, holds

from carve import artifact as art
from carve import cli
from carve.errors import CarveError, UserError
from carve.report.diff import diff, diff_html, render_diff
from carve.report.files import read_source, record, report_files, write_page

Captured = pytest.CaptureFixture[str]


def save(folder: Path, report: dict[str, Any]) -> Path:
    """An artifact with a report and a file of weights."""
    folder.mkdir()
    (folder / "onnx").mkdir()
    (folder / "onnx" / "model.onnx").write_bytes(b"weights")
    art.write_json(folder / "placement.json", samples.placement())
    for name, text in report_files(report, samples.manifest(), samples.placement()).items():
        (folder / name).write_text(text, encoding="utf-8")
    art.write_json(folder / "manifest.json", {**samples.manifest(), "files": art.hashes(folder)})
    return folder


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    report = samples.report()
    del report["speed"]
    return save(tmp_path / "artifact", report)


def true(folder: Path) -> bool:
    """Whether the manifest says what is there."""
    manifest = json.loads((folder / "manifest.json").read_text())
    return bool(manifest["files"] == art.hashes(folder))


def test_a_speed_is_added_and_the_manifest_stays_true(artifact: Path) -> None:
    assert "145.6" not in (artifact / "report.html").read_text()
    weights = (artifact / "onnx" / "model.onnx").stat()
    record(artifact, "speed", samples.report()["speed"])
    assert true(artifact)
    report = json.loads((artifact / "report.json").read_text())
    assert report["speed"] == samples.report()["speed"]
    text = (artifact / "report.html").read_text()
    assert "145.6" in text
    assert all(holds(report, *figure) for figure in Page(text).figures)
    after = (artifact / "onnx" / "model.onnx").stat()
    assert (after.st_ino, after.st_mtime_ns) == (weights.st_ino, weights.st_mtime_ns)
    assert [p.name for p in artifact.parent.iterdir()] == ["artifact"]


def test_what_held_the_old_artifact_keeps_it(artifact: Path) -> None:
    other = artifact.parent / "linked.json"
    os.link(artifact / "report.json", other)
    before = other.read_text()
    record(artifact, "speed", samples.report()["speed"])
    assert other.read_text() == before != (artifact / "report.json").read_text()


def test_a_failure_leaves_the_artifact_as_it_was(
    artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = art.hashes(artifact)

    def fail(root: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(art, "sync", fail)
    with pytest.raises(CarveError, match="full"):
        record(artifact, "speed", {})
    assert art.hashes(artifact) == before
    assert true(artifact)
    assert [p.name for p in artifact.parent.iterdir()] == ["artifact"]


def test_a_page_that_is_there_is_left_alone(artifact: Path) -> None:
    when = artifact.stat().st_ino
    assert write_page(read_source(artifact), "") == artifact / "report.html"
    assert artifact.stat().st_ino == when
    (artifact / "report.html").write_text("another")
    write_page(read_source(artifact), "")
    assert true(artifact)
    assert (artifact / "report.html").read_text() != "another"


def test_pages_from_the_command_line(artifact: Path, tmp_path: Path, capsys: Captured) -> None:
    page = tmp_path / "page.html"
    assert cli.main(["report", str(artifact), "--html", str(page)]) == 0
    assert capsys.readouterr().out == f"{page}\n"
    assert page.read_text() == (artifact / "report.html").read_text()
    alone = tmp_path / "alone.json"
    alone.write_text((artifact / "report.json").read_text())
    assert cli.main(["report", str(alone), "--html"]) == 0
    assert "Placement" in (tmp_path / "alone.html").read_text()
    capsys.readouterr()
    assert cli.main(["report", str(alone), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(alone.read_text())
    for bad in (tmp_path, tmp_path / "nowhere" / "page.html", alone, artifact / "manifest.json"):
        assert cli.main(["report", str(artifact), "--html", str(bad), "--json"]) == 2
        assert json.loads(capsys.readouterr().out)["error"]["code"] == "output"
    assert true(artifact)


def test_torch_is_not_needed(artifact: Path) -> None:
    code = (
        "import sys; from carve.cli import main\n"
        f"assert main(['report', {str(artifact)!r}, '--html', {str(artifact) + '.html'!r}]) == 0\n"
        f"assert main(['report', {str(artifact)!r}, '--diff', {str(artifact)!r}]) == 0\n"
        "assert not {'torch', 'onnxruntime', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, capture_output=True)


@pytest.fixture
def pair(artifact: Path, tmp_path: Path) -> tuple[Path, Path]:
    """An artifact and one with another setting, a pass more and a better layer."""
    other = samples.report()
    other["recipe"]["convert"]["bits"] = 8
    other["quality"]["kl"] = 0.0178
    other["layers"][LAYERS[0]]["loss"] = 0.0056
    more = copy.deepcopy(other["passes"][2])
    more["name"] = "refit"
    other["passes"].insert(3, more)
    return artifact, save(tmp_path / "other", other)


def test_diff(pair: tuple[Path, Path]) -> None:
    found = diff(*map(read_source, pair))
    assert found["settings"] == [{"key": "convert.bits", "a": "auto", "b": 8}]
    assert found["figures"]["KL"] == {
        "a": 0.1178, "b": 0.0178, "change": pytest.approx(-0.1)
    }  # fmt: skip
    assert found["figures"]["decode, tokens/s"] == {"a": None, "b": 145.6, "change": None}
    names = [p["name"] for p in found["passes"]]
    assert names.index("route_ridge") + 1 == names.index("refit") == names.index("gate") - 1
    assert found["passes"][names.index("refit")]["time"]["a"] is None
    assert found["layers"][0]["loss"]["change"] == pytest.approx(-0.04)
    assert found["layers"][1]["loss"]["change"] == 0


def test_diff_as_text_and_as_a_page(pair: tuple[Path, Path]) -> None:
    found = diff(*map(read_source, pair))
    text = render_diff(found)
    assert "convert.bits  auto  8" in text
    assert "-0.10000" in text
    page = Page(diff_html(found))
    assert len(page.figures) > 60
    for way, shown in page.figures:
        assert holds(found, way, shown), (way, shown)
    assert "-0.10000" in [shown for _, shown in page.figures]
    assert any("//" in value for _, value in page.attributes) is False


def test_diff_on_the_command_line(
    pair: tuple[Path, Path], tmp_path: Path, capsys: Captured
) -> None:
    a, b = map(str, pair)
    assert cli.main(["report", "--diff", a, b, "--json"]) == 0
    first = json.loads(capsys.readouterr().out)
    assert (first["a"], first["b"]) == (a, b)
    assert cli.main(["report", b, "--diff", a, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == first
    page = tmp_path / "diff.html"
    assert cli.main(["report", "--diff", a, b, "--html", str(page)]) == 0
    assert capsys.readouterr().out == f"{page}\n"
    assert "side by side" in page.read_text()


def test_diff_of_what_is_no_report(artifact: Path, tmp_path: Path, capsys: Captured) -> None:
    odd = tmp_path / "odd.json"
    for content in ("{}", '{"passes": 3}', '{"passes": [{"seconds": "x"}]}', '{"passes": [[]]}'):
        odd.write_text(content)
        assert cli.main(["report", "--diff", str(odd), str(artifact), "--json"]) == 2
        assert json.loads(capsys.readouterr().out)["error"]["code"] == "report"
    recipe = artifact / "recipe.toml"
    recipe.write_text("not toml [")
    report = samples.report()
    del report["recipe"]
    (artifact / "report.json").write_text(json.dumps(report))
    with pytest.raises(UserError, match=r"recipe\.toml"):
        diff(read_source(artifact), read_source(artifact))
    recipe.unlink()
    found = diff(read_source(artifact), read_source(artifact))
    assert found["settings"] is None
    assert "not known" in render_diff(found)


def test_hostile_names_in_a_diff(artifact: Path, tmp_path: Path) -> None:
    evil = "<img src=x onerror=alert(1)>\x1b]0;"
    report = samples.report()
    report["recipe"]["convert"][evil] = evil
    report["layers"][evil] = report["layers"].pop(LAYERS[0])
    report["passes"][0]["name"] = evil
    found = diff(read_source(artifact), read_source(save(tmp_path / "evil", report)))
    page = diff_html(found)
    assert "img" not in Page(page).tags
    assert "\x1b" not in page
    assert "\x1b" not in render_diff(found)
