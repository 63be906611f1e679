"""Fixtures that the compiler's tests share.

torch is imported by the fixtures alone: the runtime's tests also stand under this folder, and
have to run where torch is not installed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tiny_models import Captured


@pytest.fixture(scope="session")
def captured() -> Callable[[str], Captured]:
    """Captured architectures by name; each call gives a copy that the test may rewrite."""
    from tiny_models import capture

    kept: dict[str, Captured] = {}

    def get(name: str) -> Captured:
        if name not in kept:
            kept[name] = capture(name)
        return replace(kept[name], program=kept[name].program.copy())

    return get


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama on disk; tests that damage it work on a copy."""
    from tiny_models import save_checkpoint

    return save_checkpoint(tmp_path_factory.mktemp("source") / "tiny-llama")
