"""Artifacts that the runtime's tests share."""

from __future__ import annotations

import shutil
from pathlib import Path

import carve_runtime
import pytest
from tiny_artifacts import SCRIPT, decoder, encoder, module, write, write_scripted


@pytest.fixture(scope="session")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("artifacts")
    return {
        "growing": write(base / "growing", "decoder", decoder(False), eos_token_ids=[]),
        "shared": write(
            base / "shared", "decoder", decoder(True), eos_token_ids=[], shared_cache=True
        ),
        "scripted": write_scripted(base / "scripted", SCRIPT),
        "encoder": write(
            base / "encoder", "encoder", encoder(), pooling="mean", normalize=True, max_length=8
        ),
        "module": write(base / "module", "module", module()),
    }


@pytest.fixture(scope="session")
def loaded(artifacts: dict[str, Path]) -> dict[str, carve_runtime.Model]:
    return {name: carve_runtime.load(path, threads=1) for name, path in artifacts.items()}


@pytest.fixture
def copy(artifacts: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the module artifact to damage."""
    return Path(shutil.copytree(artifacts["module"], tmp_path / "copy"))
