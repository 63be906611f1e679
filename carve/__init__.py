"""carve: a compiler from dense transformer checkpoints to routed ones.

``carve.convert(model, output, budget=0.6)`` is the command line's ``carve convert`` from Python.
Importing this package imports neither torch nor transformers; using ``convert`` does.
"""

from __future__ import annotations

from typing import Any

from carve.version import __version__

__all__ = ["Artifact", "ConvertConfig", "Course", "__version__", "advance", "convert"]


def __getattr__(name: str) -> Any:
    if name in ("convert", "advance"):
        from carve import pipeline

        return getattr(pipeline, name)
    if name == "Course":
        from carve.state_folder import Course

        return Course
    if name == "Artifact":
        from carve.artifact import Artifact

        return Artifact
    if name == "ConvertConfig":
        from carve.config import ConvertConfig

        return ConvertConfig
    raise AttributeError(f"module 'carve' has no attribute {name!r}")
