"""Read an artifact's manifest and check the directory against it.

The directory may come from anywhere, so nothing in the manifest is trusted: its size, its
types, its paths and its hashes are all checked before onnxruntime opens a file.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from carve_runtime.errors import ArtifactError
from carve_runtime.files import FileError, Identity, identity, open_regular, read_json

SCHEMA = 1
MANIFEST_NAME = "manifest.json"
_MAX_INT = 2**31 - 1
# What a decoder's buffers are made of: their product has to stay a size that numpy can name.
_MOST = {
    "vocab_size": 1 << 24,
    "num_layers": 1 << 12,
    "num_key_value_heads": 1 << 16,
    "head_dim": 1 << 16,
}
_SHA256 = re.compile(r"[0-9a-f]{64}")
_CARVE_AGAIN = "compile the model again with carve, or fetch the directory again"

Kind = Literal["decoder", "encoder", "module"]
Pooling = Literal["mean", "cls"]


@dataclass(frozen=True, slots=True)
class GateInfo:
    """A block that tokens may pass round, and the share of tokens it was calibrated to skip."""

    name: str
    skip: float


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What the runtime must know of the model; a count that does not apply is 0."""

    vocab_size: int
    max_length: int
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    num_layers: int
    num_key_value_heads: int
    head_dim: int
    shared_cache: bool
    pooling: Pooling | None
    normalize: bool
    gates: tuple[GateInfo, ...] = ()


@dataclass(frozen=True, slots=True)
class Target:
    """One compiled form of the model: its ONNX file and whatever else the compiler noted."""

    model: str
    bits: int | None
    extra: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Manifest:
    """The typed content of ``manifest.json``; ``files`` maps relative paths to SHA-256 hex."""

    schema: int
    carve: str
    kind: Kind
    source: Mapping[str, Any]
    files: Mapping[str, str]
    targets: Mapping[str, Target]
    model: ModelInfo


def _bad(message: str) -> ArtifactError:
    return ArtifactError("bad-manifest", f"{MANIFEST_NAME}: {message}", _CARVE_AGAIN)


def _object(parent: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = parent.get(key)
    if not isinstance(value, dict):
        raise _bad(f"{key!r} must be an object, not {type(value).__name__}")
    return value


def _string(parent: Mapping[str, Any], key: str) -> str:
    value = parent.get(key)
    if not isinstance(value, str):
        raise _bad(f"{key!r} must be a string, not {type(value).__name__}")
    return value


def _int(name: str, value: object, low: int) -> int:
    most = _MOST.get(name, _MAX_INT)
    # bool is an int in Python, but true is not a count.
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= most:
        raise _bad(f"{name!r} must be an integer from {low} to {most}, not {value!r:.40}")
    return value


def _bool(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise _bad(f"{name!r} must be true or false, not {value!r:.40}")
    return value


def check_relative_path(path: str) -> str:
    """Return ``path`` if it is a plain relative POSIX path.

    Raises:
        ArtifactError: ``unsafe-path`` for absolute paths, ``..``, ``.`` or empty components,
            backslashes, colons (drives and alternate streams) and control characters.
    """
    if (
        any(part in ("", ".", "..") for part in path.split("/"))
        or any(mark in path for mark in "\\:")
        or any(ord(char) < 32 for char in path)
    ):
        raise ArtifactError(
            "unsafe-path",
            f"{MANIFEST_NAME} lists {path!r:.200}, which is not a plain relative path",
            "do not use this directory unless you trust where it came from",
        )
    return path


def _model_info(raw: Mapping[str, Any], kind: Kind) -> ModelInfo:
    low = 1 if kind == "decoder" else 0

    def count(name: str) -> int:
        value = raw.get(name)
        return 0 if value is None and low == 0 else _int(name, value, low)

    def flag(name: str) -> bool:
        value = raw.get(name)
        return False if value is None else _bool(name, value)

    bos, eos, pooling = raw.get("bos_token_id"), raw.get("eos_token_ids"), raw.get("pooling")
    if eos is not None and not isinstance(eos, list):
        raise _bad("'eos_token_ids' must be a list")
    if pooling not in (None, "mean", "cls"):
        raise _bad(f'\'pooling\' must be "mean", "cls" or null, not {pooling!r:.40}')
    return ModelInfo(
        vocab_size=count("vocab_size"),
        max_length=count("max_length"),
        bos_token_id=None if bos is None else _int("bos_token_id", bos, 0),
        eos_token_ids=tuple(_int("eos_token_ids", token, 0) for token in eos or ()),
        num_layers=count("num_layers"),
        num_key_value_heads=count("num_key_value_heads"),
        head_dim=count("head_dim"),
        shared_cache=flag("shared_cache"),
        pooling=cast("Pooling | None", pooling),
        normalize=flag("normalize"),
        gates=_gates(raw.get("gates")),
    )


def _gates(raw: object) -> tuple[GateInfo, ...]:
    if raw is None:
        return ()
    if not isinstance(raw, list):
        raise _bad("'gates' must be a list")
    found = []
    for item in raw:
        name, skip = (item.get(k) for k in ("name", "skip")) if isinstance(item, dict) else (0, 0)
        if not isinstance(name, str) or isinstance(skip, bool):
            raise _bad("'gates' must hold objects with a name and a skip rate")
        if not isinstance(skip, int | float) or not 0.0 <= skip <= 1.0:
            raise _bad(f"'gates' has a skip rate outside [0, 1]: {skip!r:.40}")
        found.append(GateInfo(name, float(skip)))
    return tuple(found)


def _target(name: str, raw: object, files: Mapping[str, str]) -> Target:
    if not isinstance(raw, dict):
        raise _bad(f"target {name!r:.40} must be an object")
    model = check_relative_path(_string(raw, "model"))
    if model not in files:
        raise _bad(f"target {name!r:.40} uses {model!r}, which 'files' does not list")
    bits = raw.get("bits")
    extra = {key: value for key, value in raw.items() if key not in ("model", "bits")}
    return Target(model, None if bits is None else _int("bits", bits, 1), extra)


def _parse(raw: object) -> Manifest:
    if not isinstance(raw, dict):
        raise _bad(f"must be a JSON object, not {type(raw).__name__}")
    schema = _int("schema", raw.get("schema"), 0)
    if schema != SCHEMA:
        newer = schema > SCHEMA
        raise ArtifactError(
            "schema",
            f"{MANIFEST_NAME} has schema {schema}; this carve_runtime reads schema {SCHEMA}",
            "upgrade carve-runtime" if newer else "compile the model again with a newer carve",
        )
    kind = _string(raw, "kind")
    if kind not in ("decoder", "encoder", "module"):
        raise _bad(f"'kind' must be decoder, encoder or module, not {kind!r:.40}")
    files = _object(raw, "files")
    for path, digest in files.items():
        if check_relative_path(path) == MANIFEST_NAME:
            raise _bad("'files' cannot list the manifest itself")
        if not isinstance(digest, str) or not _SHA256.fullmatch(digest):
            raise _bad(f"'files' has no SHA-256 in lowercase hexadecimal for {path!r:.200}")
    return Manifest(
        schema=schema,
        carve=_string(raw, "carve"),
        kind=cast("Kind", kind),
        source=_object(raw, "source"),
        files=files,
        targets={name: _target(name, t, files) for name, t in _object(raw, "targets").items()},
        model=_model_info(_object(raw, "model"), cast("Kind", kind)),
    )


def resolve_inside(root: Path, path: str) -> Path:
    """Follow every link of ``root / path`` and return the regular file that it ends at.

    Args:
        root: the artifact directory, already resolved.
        path: a relative path that passed `check_relative_path`.

    Raises:
        ArtifactError: ``not-found`` when it is not there or not a regular file,
            ``unsafe-path`` when a symbolic link leads outside ``root``.
    """
    try:
        found = (root / path).resolve(strict=True)
    except (OSError, RuntimeError, ValueError) as error:
        # RuntimeError is a loop of links before Python 3.13; ValueError an unencodable name.
        raise ArtifactError(
            "not-found", f"{root / path} is missing or unreadable", _CARVE_AGAIN
        ) from error
    if not found.is_relative_to(root):
        raise ArtifactError(
            "unsafe-path",
            f"{root / path} is a link to {found}, outside the artifact",
            "copy the artifact with its links followed (cp -rL) if you trust it",
        )
    if not found.is_file():
        raise ArtifactError("not-found", f"{root / path} is not a regular file", _CARVE_AGAIN)
    return found


def read_manifest(path: str | os.PathLike[str]) -> Manifest:
    """Read and type-check ``path/manifest.json``; no other file is touched.

    Raises:
        ArtifactError: ``not-found``, ``unsafe-path``, ``bad-manifest`` or ``schema``.
    """
    root = Path(path)
    if not root.is_dir():
        raise ArtifactError(
            "not-found", f"{root} is not a directory", "give the directory that carve wrote"
        )
    return _parse(read_json(resolve_inside(root.resolve(), MANIFEST_NAME), _bad))


def check_files(root: Path, manifest: Manifest, *, verify: bool) -> dict[str, Identity]:
    """Check that every listed file is there, inside ``root``, and has its hash.

    Args:
        root: the artifact directory, already resolved.
        manifest: the manifest read from it.
        verify: also read every file and compare its SHA-256.

    Returns:
        The files that were seen, for `check_unchanged`.

    Raises:
        ArtifactError: ``not-found``, ``unsafe-path`` or ``hash-mismatch``.
    """
    seen = {}
    for path, expected in manifest.files.items():
        found = resolve_inside(root, path)
        try:
            with open_regular(found) as file:
                seen[path] = identity(os.fstat(file.fileno()))
                actual = hashlib.file_digest(file, "sha256").hexdigest() if verify else expected
        except (OSError, FileError) as error:
            raise ArtifactError(
                "not-found", f"{found} cannot be read: {error}", _CARVE_AGAIN
            ) from error
        if actual != expected:
            raise ArtifactError(
                "hash-mismatch",
                f"{path} has SHA-256 {actual}, but {MANIFEST_NAME} says {expected}",
                _CARVE_AGAIN,
            )
    return seen


def check_unchanged(root: Path, seen: Mapping[str, Identity]) -> None:
    """Check that the files that were loaded by name are those that `check_files` saw.

    Raises:
        ArtifactError: ``hash-mismatch`` when one is another, or was written to.
    """
    for path, before in seen.items():
        if identity(resolve_inside(root, path).stat()) != before:
            raise ArtifactError(
                "hash-mismatch", f"{path} changed while it was loaded", "load the artifact again"
            )


def _unreadable(error: OSError) -> None:
    raise ArtifactError("not-found", f"a folder cannot be read: {error}", _CARVE_AGAIN) from error


def check_model_folder(root: Path, manifest: Manifest, target: Target) -> Path:
    """Check that onnxruntime can read only listed files; return the model's resolved path.

    The ONNX file names its external data itself. onnxruntime refuses names that lead outside
    the model's folder, so when that folder has listed files only, whatever the model names is
    listed (and hashed), and the ONNX file need not be parsed here.

    Raises:
        ArtifactError: ``unlisted-file`` for a file or link in that folder that is not listed.
    """
    model = resolve_inside(root, target.model)
    listed = {*(root / path for path in manifest.files), root / MANIFEST_NAME}
    for folder, folders, files in os.walk(model.parent, onerror=_unreadable):
        links = [name for name in folders if Path(folder, name).is_symlink()]
        for entry in (Path(folder, name) for name in (*files, *links)):
            if entry not in listed:
                raise ArtifactError(
                    "unlisted-file",
                    f"{entry} is beside the model, but {MANIFEST_NAME} does not list it",
                    "remove it, or " + _CARVE_AGAIN,
                )
    return model
