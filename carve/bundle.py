"""One folder that runs on a device: a target of an artifact, and what runs it there."""

from __future__ import annotations

import importlib.metadata
import shutil
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import carve_runtime
from carve_runtime.manifest import check_files, read_manifest, resolve_inside

from carve import artifact as art
from carve.checkpoint import TOKENIZER_FILES
from carve.emit.tvm.names import FFI, PREFIX
from carve.errors import UserError
from carve.files import read_json
from carve.native import RUNNER, build, copy_libraries, system_libraries, tvm_files
from carve.native_tokenizer import NAME, compact_or_reason
from carve.version import __version__

if TYPE_CHECKING:
    from carve_runtime.manifest import Manifest

REQUIREMENTS, README = "requirements.txt", "README.md"
_PYTHON = "python"
_ONNX = ("onnx-cpu", "onnx-split")
_BESIDE = {"onnx-cpu": ("genai_config.json",), "onnx-split": ("placement.json",)}
"""What a target uses outside its folder, but for the tokenizer."""


@dataclass(frozen=True)
class Bundle:
    """What `bundle` wrote.

    Attributes:
        path: the folder.
        target: as the artifact's manifest names it.
        runner: the native runner, empty where there is none.
        reason: why the runner takes ids alone, or why there is none; empty where it does all.
        needs: what the native side needs of the device.
        model_bytes: weights, index and tokenizer.
        program_bytes: the runner, the compiled model and the libraries.
    """

    path: str
    target: str
    runner: str
    reason: str
    needs: str
    model_bytes: int
    program_bytes: int

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def bundle(source: Path, target: str, output: Path, wheels: Path | None = None) -> Bundle:
    """Write a folder that is an artifact with one target, and that brings what runs it.

    Args:
        source: an artifact.
        target: one of its targets; ``onnx`` is ``onnx-cpu``, and ``tvm:`` may be left out.
        output: the folder; only an artifact of carve's is replaced.
        wheels: where the wheels of TVM's runtime are, see `carve.native.tvm_files`.

    Raises:
        UserError: there is no such target, or no compiler or runtime for it.
        ArtifactError: the artifact is damaged.
        CarveError: the runner does not compile, or the folder cannot be written.
    """
    manifest = read_manifest(source)
    name = _target(manifest, target)
    art.check_output(output)
    if output.resolve() == source.resolve():
        raise UserError("output", f"{output} is the artifact itself", "choose another -o")
    root = source.resolve()
    files = _files_of(manifest, name)
    kept = replace(manifest, files={f: manifest.files[f] for f in files})
    with art.explained(output), art.staged(output) as stage:
        for f in files:
            (stage / f).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(resolve_inside(root, f), stage / f)
        check_files(stage, kept, verify=True)  # the copies: nobody else writes to them
        package = Path(carve_runtime.__file__).parent
        left = shutil.ignore_patterns("__pycache__")
        shutil.copytree(package, stage / _PYTHON / package.name, ignore=left)
        native = _native(stage, manifest, name, wheels) if name.startswith(PREFIX) else _NONE
        inside = sum((stage / f).stat().st_size for f in files if stage / f not in native.programs)
        result = Bundle(
            path=str(output),
            target=name,
            runner=native.runner,
            reason=native.reason,
            needs=_needs(native),
            model_bytes=inside,
            program_bytes=sum(p.stat().st_size for p in native.programs),
        )
        (stage / REQUIREMENTS).write_text(_requirements(name), encoding="utf-8")
        (stage / README).write_text(_readme(result), encoding="utf-8")
        raw = read_json(root / art.MANIFEST)
        said = {k: raw[k] for k in ("schema", "carve", "kind", "source", "model")}
        said |= {"targets": {name: raw["targets"][name]}, "files": art.hashes(stage)}
        art.write_json(stage / art.MANIFEST, said)
        art.sync(stage)
    return result


@dataclass(frozen=True)
class _Native:
    """The native side: see `Bundle`; ``processor`` is its architecture and what it has to have."""

    runner: str
    reason: str
    programs: tuple[Path, ...]
    processor: str


_NONE = _Native("", "onnxruntime runs it", (), "")


def _target(manifest: Manifest, asked: str) -> str:
    """The target's name in the manifest."""
    named = {"onnx": "onnx-cpu"}.get(asked, asked)
    for name in (named, PREFIX + named):
        if name in manifest.targets and (name in _ONNX or name.startswith(PREFIX)):
            return name
    there = [t for t in manifest.targets if t in _ONNX or t.startswith(PREFIX)]
    raise UserError(
        "target",
        f"the artifact has no target {asked!r:.60} that can be bundled",
        f"it has {', '.join(there) or 'none'}; others are made with carve convert --target",
    )


def _files_of(manifest: Manifest, name: str) -> list[str]:
    """The artifact's files that a target uses."""
    folder = manifest.targets[name].model.rpartition("/")[0]
    if not folder:
        raise UserError("target", f"{name} has no folder of its own", "convert the model again")
    beside = (*TOKENIZER_FILES, *_BESIDE.get(name, ()))
    return [f for f in manifest.files if f.startswith(f"{folder}/") or f in beside]


def _native(stage: Path, manifest: Manifest, name: str, wheels: Path | None) -> _Native:
    """Add TVM's runtime, and for a decoder the runner with its form of the tokenizer."""
    from carve_runtime.tvm_index import read_tvm_index

    index = read_tvm_index(stage, manifest.files, manifest.targets[name].model)
    if index.gpu is not None:
        raise UserError(
            "target",
            f"{name} runs on a GPU, and the native runner on processors",
            "bundle a processor's target, or onnx",
        )
    needs = " ".join([index.machine, *index.flags])
    with tempfile.TemporaryDirectory(prefix="carve-bundle-") as scratch:
        tvm = tvm_files(index.machine, wheels, Path(scratch))
        if manifest.kind != "decoder":
            copy_libraries(tvm, stage / "lib")
            return _Native(
                "", f"it generates, and this is no decoder but {manifest.kind}", (), needs
            )
        build(index.machine, tvm, stage)
    reason = "the artifact has no tokenizer"
    if (stage / "tokenizer.json").is_file():
        data, reason = compact_or_reason(stage / "tokenizer.json")
        if data is not None:
            (stage / NAME).write_bytes(data)
    programs = (stage / RUNNER, index.library, *sorted((stage / "lib").iterdir()))
    return _Native(RUNNER, reason, programs, needs)


def _requirements(name: str) -> str:
    """What the Python side needs, at the versions that are installed here."""
    packages = ["numpy", "tokenizers", *(["onnxruntime"] if name in _ONNX else [])]
    lines = [f"{p}=={importlib.metadata.version(p)}" for p in packages]
    if name.startswith(PREFIX):
        lines.append(f"apache-tvm-ffi=={FFI}")
    return "\n".join(lines) + "\n"


def _needs(native: _Native) -> str:
    if not native.programs:
        return ""
    libraries = system_libraries(native.programs)
    return ", ".join([f"Linux on {native.processor}", *(f"{n} {v}" for n, v in libraries.items())])


def _readme(made: Bundle) -> str:
    engine = "tvm" if made.target.startswith(PREFIX) else "onnx"
    prompt = '--prompt "Once upon a time"'
    run = f"PYTHONPATH={_PYTHON} python3 -m carve_runtime . --engine {engine} {prompt}"
    python = f"Python 3.11 or newer: `pip install -r {REQUIREMENTS}`, then `{run}`.\n"
    hashes = f"`{art.MANIFEST}` has the SHA-256 of every file.\n"
    if not made.runner:
        return f"{made.target}, made by carve {__version__}.\n{python}{hashes}"
    how = f"./{RUNNER} {prompt}" if not made.reason else f"./{RUNNER} --ids 1,2,3"
    return f"{made.needs} and nothing else: `{how}` (`--help` lists more).\n{python}{hashes}"
