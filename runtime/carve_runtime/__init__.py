"""Run the directories that carve compiles, without torch."""

from __future__ import annotations

from carve_runtime.decoder import Session
from carve_runtime.errors import ArtifactError, CarveRuntimeError, RequestError
from carve_runtime.gates import GateStats
from carve_runtime.manifest import GateInfo, Manifest, ModelInfo, Target, read_manifest
from carve_runtime.model import Generation, Model, load
from carve_runtime.residency import ExpertStats
from carve_runtime.sampling import Sampler

__version__ = "0.1.0"

__all__ = [
    "ArtifactError",
    "CarveRuntimeError",
    "ExpertStats",
    "GateInfo",
    "GateStats",
    "Generation",
    "Manifest",
    "Model",
    "ModelInfo",
    "RequestError",
    "Sampler",
    "Session",
    "Target",
    "__version__",
    "load",
    "read_manifest",
]
