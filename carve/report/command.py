"""What ``carve report`` does, and what ``carve bench`` leaves for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from carve.errors import CarveError
from carve.report.diff import diff, diff_html, render_diff
from carve.report.fields import reading
from carve.report.files import read_source, record, write_page, write_text
from carve.report.text import render


def show(path: str, page: str | None) -> tuple[dict[str, Any], str]:
    """A report and its text, or where its page was written if ``page`` is not None.

    ``page`` is a file's name, or empty for where it belongs.

    Raises:
        UserError: there is no report, or it cannot be read.
        CarveError: the page cannot be written.
    """
    source = read_source(path)
    if page is not None:
        return source.report, str(write_page(source, page))
    with reading(str(source.path)):
        return source.report, render(source.report)


def compare(old: str, new: str, page: str | None) -> tuple[dict[str, Any], str]:
    """As `show` for what differs from ``old`` to ``new``."""
    found = diff(read_source(old), read_source(new))
    if page is None:
        return found, render_diff(found)
    return found, str(write_text(Path(page or "diff.html"), diff_html(found)))


def record_speed(path: str, measured: dict[str, Any]) -> str:
    """Put a speed into an artifact's report; what to tell the user where that cannot be done."""
    try:
        record(Path(path), "speed", measured)
    except CarveError as e:
        return f"the result is not in the report of {path}: {e.message}\n"
    return ""
