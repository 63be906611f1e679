"""What decides the result of a pass: input, settings, code and libraries.

A stored state is used only where all of it is as it was. The parts are kept by name, not as one
hash, so that a refusal can say which of them differs.
"""

from __future__ import annotations

import hashlib
import inspect
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from carve.config import ConvertConfig

if TYPE_CHECKING:
    from carve.calibration import Batch
    from carve.passbase import Pass
    from carve.program import Program

LIBRARIES = (
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "numpy",
    "scipy",
    "onnxruntime",
    "highspy",
    "pulp",
)
"""Those whose arithmetic, or whose reading of the input, is in the result."""
LATE = ("bits", "size", "reads", "devices")
"""Settings that only the passes after carving hear, see `of_pass`."""
_LATE_PASSES = ("choose_widths", "smooth", "quantize", "tune_grids", "place")
# Not in any state: what is emitted, the order of passes (each is there by itself), settings of
# passes, and what only chooses defaults that are there as they came out.
_ELSEWHERE = (*LATE, "targets", "passes", "effort", "router", "tokens", "eval_tokens")
_ELSEWHERE_TEXT = ("calibration", "evaluation", "length")
Parts = dict[str, Any]


def of_input(
    program: Program,
    config: ConvertConfig,
    checkpoint: str | None,
    batches: Sequence[Batch],
    held: Sequence[Batch],
    counts: Mapping[str, int],
) -> Parts:
    """What every pass depends on.

    Args:
        program: the captured program.
        config: the settings.
        checkpoint: hash of the checkpoint's files; None hashes the program's weights instead.
        batches: calibration inputs; their hash covers the text, the tokenizer and the length.
        held: held-out inputs, on which quality after each pass is measured.
        counts: tokens that each part takes.
    """
    elsewhere = (*_ELSEWHERE, *_ELSEWHERE_TEXT)
    settings = {k: v for k, v in asdict(config).items() if k not in elsewhere}
    settings["targets, by what they hold,"] = asdict(config.form)
    return {
        "the model": checkpoint or _of_weights(program),
        "the calibration text or the tokenizer": _of_batches(batches),
        "the held-out text or the tokenizer": _of_batches(held),
        "the number of tokens": dict(counts),
        "the setting": settings,
        "the code of carve": of_code(),
        "the version of": {
            "python": platform.python_version(),
            **{name: _version(name) for name in LIBRARIES},
        },
        "the processor": _processor(),
        "the number of threads": torch.get_num_threads(),
    }


def of_pass(p: Pass[Any], config: ConvertConfig) -> Parts:
    """What a pass adds: its settings and its code; late settings where it hears them."""
    parts: Parts = {
        "the pass": p.name,
        "the setting": {f"{p.name}.{k}": _plain(v) for k, v in asdict(p.config).items()},
        "the code of": {p.name: _of_source(type(p))},
    }
    if p.name in _LATE_PASSES:
        parts["the setting"] |= {k: getattr(config, k) for k in (*LATE, "nominal_bits")}
        devices = config.devices
        if devices is not None and Path(devices).is_file():
            parts["the file"] = {devices: _sha256(Path(devices))}
    return parts


def difference(now: Parts, then: Any) -> str | None:
    """What is not as it was, in words; None where all is."""
    if not isinstance(then, dict):
        return "it is malformed"
    for key, value in now.items():
        former = then.get(key)
        if value == former:
            continue
        if isinstance(value, dict) and isinstance(former, dict):
            name = next(k for k in {**value, **former} if value.get(k) != former.get(k))
            was, has = (str(d.get(name)) for d in (former, value))
            short = max(len(was), len(has)) <= 40
            return f"{key} {name} differs" + (f" ({has}, was {was})" if short else "")
        return f"{key} differs"
    return None


@cache
def of_code() -> str:
    """Hash of carve's own source files, those of passes left out: each pass has its own."""
    root = Path(__file__).parent
    passes = root / "passes"
    files = [f for f in sorted(root.rglob("*.py")) if passes not in f.parents]
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def _of_source(cls: type) -> str:
    try:
        return _sha256(Path(inspect.getfile(cls)))
    except (OSError, TypeError):  # made in an interpreter: nothing to read
        return f"{cls.__module__}.{cls.__qualname__}"


def _plain(value: Any) -> Any:
    """As JSON gives it back."""
    return list(value) if isinstance(value, tuple) else value


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"


def _update(digest: Any, tensors: Iterable[torch.Tensor]) -> None:
    for t in tensors:
        digest.update(f"{t.dtype} {tuple(t.shape)}".encode())
        digest.update(t.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())


def _of_batches(batches: Sequence[Batch]) -> str:
    digest = hashlib.sha256()
    for b in batches:
        _update(digest, (*b.inputs, *(() if b.mask is None else (b.mask,))))
    return digest.hexdigest()


def _of_weights(program: Program) -> str:
    digest = hashlib.sha256(str(program.module.code).encode())
    for name, p in program.module.state_dict().items():
        digest.update(name.encode())
        _update(digest, (p,))
    return digest.hexdigest()


def _processor() -> str:
    """What kernels are chosen by."""
    bf16 = " bf16" if torch.cpu._is_avx512_bf16_supported() else ""
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}{bf16}"
