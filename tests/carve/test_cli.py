"""The command line answers at once: nothing heavy is imported before it is needed."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "onnx", "onnxruntime", "onnx_ir", "scipy", "numpy")


def carve(*argv: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "carve", *argv]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def imported_by(code: str) -> list[str]:
    """Heavy modules that a fresh interpreter has loaded after ``code``."""
    probe = f"import json, sys\n{code}\nsys.stderr.write(json.dumps(sorted(sys.modules)))"
    command = [sys.executable, "-c", probe]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    return [m for m in json.loads(done.stderr.splitlines()[-1]) if m in HEAVY]


def run_main(*argv: str) -> str:
    return (
        "from carve.cli import main\n"
        f"try:\n    main({list(argv)!r})\nexcept SystemExit as e:\n    assert e.code == 0, e.code"
    )


@pytest.mark.parametrize(
    "code",
    [
        "import carve",
        run_main("--help"),
        run_main("--version"),
        run_main("convert", "--help"),
        run_main("list", "passes"),
    ],
    ids=["import", "help", "version", "convert help", "list"],
)
def test_nothing_heavy_is_imported(code: str) -> None:
    assert imported_by(code) == []


def test_the_probe_sees_what_is_imported() -> None:
    assert imported_by("import numpy") == ["numpy"]


def test_help_names_every_command() -> None:
    done = carve("--help")
    assert done.returncode == 0
    for command in ("convert", "run", "eval", "bench", "bundle", "report", "list"):
        assert command in done.stdout


def test_version() -> None:
    from carve import __version__

    assert carve("--version").stdout == f"carve {__version__}\n"


@pytest.mark.parametrize("argv", [("convrt",), (), ("convert",), ("list", "models")])
def test_what_argparse_refuses(argv: tuple[str, ...]) -> None:
    done = carve(*argv)
    assert done.returncode == 2
    assert "usage: carve" in done.stderr
    assert done.stdout == ""


def test_error_in_a_process_of_its_own() -> None:
    done = carve("convert", "/nowhere/model", "--budget", "0.7", "-o", "/tmp/never", "--json")
    assert done.returncode == 2
    assert json.loads(done.stdout)["error"]["code"] == "not-found"
    assert done.stderr.startswith("carve convert: /nowhere/model: no such directory\n")
