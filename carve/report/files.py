"""Reading what reports are made from, and writing them."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from carve.artifact import MANIFEST, REPORT, Artifact, amend
from carve.errors import CarveError, UserError
from carve.files import read_json, read_toml
from carve.report.html import render_html
from carve.report.summary import summary

PAGE = "report.html"


@dataclass(frozen=True)
class Source:
    """A report and what stands beside it; ``folder`` is None for a report.json alone."""

    path: Path
    report: dict[str, Any]
    manifest: dict[str, Any] | None = None
    placement: dict[str, Any] | None = None
    folder: Path | None = None

    @property
    def recipe(self) -> dict[str, Any]:
        """The resolved settings: of the report, or of the artifact's recipe."""
        found = self.report.get("recipe")
        if isinstance(found, dict):
            return found
        if self.folder is None or not (self.folder / "recipe.toml").is_file():
            return {}
        return read_toml(self.folder / "recipe.toml", "bad-file")


def read_source(path: str | Path) -> Source:
    """An artifact's report, or a report.json on its own.

    Raises:
        UserError: neither is there, or it cannot be read.
    """
    found = Path(path)
    if found.is_file():
        return Source(found, read_json(found))
    a = Artifact.open(found)
    place = found / "placement.json"
    placement = read_json(place) if place.is_file() else None
    return Source(found, a.report, a.manifest, placement, found)


def report_files(
    report: dict[str, Any], manifest: dict[str, Any], placement: dict[str, Any] | None
) -> dict[str, str]:
    """``report.json`` with its summary, and ``report.html``, as texts."""
    whole = {**report, "summary": summary(report)}
    return {
        REPORT: json.dumps(whole, indent=2) + "\n",
        PAGE: render_html(whole, manifest, placement),
    }


def record(path: Path, key: str, value: Any) -> None:
    """Add a later measurement to an artifact's report; its manifest stays true.

    Raises:
        UserError: no artifact, or its report cannot be read.
        CarveError: it cannot be written.
    """
    s = read_source(path)
    if s.manifest is None:
        raise UserError("not-artifact", f"{path} is no artifact")
    amend(path, report_files({**s.report, key: value}, s.manifest, s.placement))


def write_page(source: Source, target: str) -> Path:
    """Write the page to ``target``, or where it belongs: into the artifact, or beside the file.

    Raises:
        UserError: the report cannot be read.
        CarveError: it cannot be written.
    """
    text = render_html(source.report, source.manifest, source.placement)
    if target or source.folder is None:
        return write_text(Path(target) if target else source.path.with_suffix(".html"), text)
    path = source.folder / PAGE
    listed = (source.manifest or {}).get("files")
    same = path.is_file() and path.read_bytes() == text.encode()
    if not same or not isinstance(listed, dict) or PAGE not in listed:
        amend(source.folder, {PAGE: text})
    return path


def write_text(path: Path, text: str) -> Path:
    """Write a file beside and rename it.

    Raises:
        UserError: it is a folder, or stands in none.
        CarveError: it cannot be written.
    """
    if path.is_dir() or not path.resolve().parent.is_dir():
        raise UserError("output", f"{path} cannot be written", "name a file in a folder that is")
    if path.name == MANIFEST or path.suffix == ".json":
        raise UserError("output", f"{path} is no name for a page", "name a file ending in .html")
    beside = path.with_name(f".{path.name}.part-{os.getpid()}")
    try:
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)
    except OSError as e:
        raise CarveError("write", f"{path} could not be written: {e}") from e
    finally:
        beside.unlink(missing_ok=True)
    return path
