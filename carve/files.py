"""Read files of others: regular ones of bounded size, strict JSON and TOML, and one clear error."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from carve.errors import UserError

_MAX_JSON = 64 << 20
# A dotted key takes time with the square of its parts, and has to stand on one line.
_MAX_TOML, _MAX_LINE = 1 << 18, 2000


def cache_folder() -> Path:
    """Where what can be made again is kept: ``$XDG_CACHE_HOME/carve``, or ``~/.cache/carve``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "carve"


def read_json(path: Path, *, finite: bool = True) -> dict[str, Any]:
    """Read a JSON object of bounded size, see `carve_runtime.files.parse_json`.

    Raises:
        UserError: not there, too large, not JSON, or not an object.
    """
    from carve_runtime.files import FileError, parse_json, read_bytes

    try:
        value = parse_json(read_bytes(path, _MAX_JSON), finite=finite)
    except FileNotFoundError:
        raise UserError("not-found", f"{path} is missing") from None
    except (OSError, FileError) as e:
        raise UserError("bad-file", f"{path} cannot be read as JSON: {e}") from e
    if not isinstance(value, dict):
        raise UserError("bad-file", f"{path} holds no JSON object")
    return value


def read_toml(path: Path, code: str, hint: str = "") -> dict[str, Any]:
    """Read a TOML file of bounded size.

    Raises:
        UserError: with ``code``, when it cannot be read as TOML.
    """
    from carve_runtime.files import FileError, read_bytes

    try:
        return parse_toml(read_bytes(path, _MAX_TOML).decode("utf-8"))
    except (OSError, FileError, ValueError) as e:
        raise UserError(code, f"{path} cannot be read as TOML: {e}", hint) from e


def parse_toml(text: str) -> dict[str, Any]:
    """The table of a TOML text.

    Raises:
        ValueError: it is none, or made to take long.
    """
    if max(map(len, text.split("\n"))) > _MAX_LINE:
        raise ValueError(f"a line has more than {_MAX_LINE} characters")
    try:
        return tomllib.loads(text)
    except RecursionError as e:
        raise ValueError("it nests too deep") from e


@contextmanager
def looking_into(path: Path) -> Iterator[None]:
    """Say that a file is not what it should be, where its content is used as it stands.

    Raises:
        UserError: something is missing in it, or of another type.
    """
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as e:
        raise UserError(
            "bad-file",
            f"{path} does not hold what carve writes there: {type(e).__name__}: {str(e)[:200]}",
            "make the artifact again with this version of carve",
        ) from e
