"""Measuring a finished artifact in its own engine: quality and speed beside the dense model."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from carve.artifact import REPORT, Artifact
from carve.errors import UserError
from carve.files import cache_folder, looking_into

if TYPE_CHECKING:
    import carve_runtime

_REST = 0.2  # seconds; an idle thread pool spins for a while and would slow the other model
Progress = Callable[[Sequence[Any], str], Iterator[Any]]


def source_of(artifact: Artifact, override: str | None) -> Path:
    """The dense checkpoint an artifact was made from, unchanged since.

    Raises:
        UserError: it is not there, or its content is another.
    """
    from carve.checkpoint import Checkpoint

    source = artifact.manifest["source"]
    path = Path(override or str(source.get("path")))
    if not path.is_dir():
        raise UserError(
            "not-found", f"the dense checkpoint {path} is not there", "name it with --dense"
        )
    known = source.get("sha256")
    if known and Checkpoint.open(path).sha256() != known:
        raise UserError("changed", f"{path} is not the checkpoint this artifact was made from")
    return path


def evaluate_artifact(
    path: Path,
    texts: Sequence[str],
    dense: str | None,
    tokens: int,
    progress: Progress,
    engine: str | None = None,
) -> dict[str, Any]:
    """Perplexity, KL and top-1 agreement (encoders: cosine) of an artifact on held-out text.

    ``texts`` are files, taken as one text; without any it is the bundled text. The artifact runs in
    ``engine`` as it is shipped, the dense checkpoint in torch unquantized, so the loss is that of
    carving and quantization together.

    Raises:
        UserError: no such artifact or checkpoint, or an unreadable text.
    """
    import carve_runtime
    import torch

    from carve.calibration import load_tokenizer, read_text, text_batches
    from carve.capture import capture_checkpoint
    from carve.evaluate import Evaluator, as_dict
    from carve.parity import feeds_of

    artifact = Artifact.open(path)
    text = "\n\n\n".join(read_text(t, "evaluation.txt") for t in texts or (None,))
    model = carve_runtime.load(path, engine=engine)
    source = source_of(artifact, dense)
    program = capture_checkpoint(source)
    length = min(512, model.max_length or 512)
    batches = text_batches(program, load_tokenizer(source), text, length, tokens)
    evaluator = Evaluator(program, list(progress(batches, "dense model")))
    names = set(program.inputs) | {"attention_mask"}

    def forward(inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        feeds = feeds_of(program, inputs, [n for n in model.input_names if n in names])
        return torch.from_numpy(model.run(feeds)[0])

    result: dict[str, Any] = as_dict(evaluator.compare(forward))
    with looking_into(path / REPORT):
        result["realised"] = {
            "ffn_active": artifact.report["ffn_active"],
            "budget": artifact.report["budget"]["realised"],
            "skip": artifact.report["skip"]["realised"],
        }
    return result


def dense_artifact(
    artifact: Artifact, override: str | None, progress: Progress, target: str = "onnx-cpu"
) -> Path:
    """A dense artifact at the same width: given, cached, or made from the source.

    Made ones are kept under ``$XDG_CACHE_HOME/carve`` by the source's hash, width and target.
    """
    from carve.checkpoint import Checkpoint
    from carve.config import ConvertConfig
    from carve.pipeline import convert
    from carve.version import __version__

    if override and (Path(override) / "manifest.json").is_file():
        return Path(override)
    source = source_of(artifact, override)
    bits = artifact.bits
    # What is known was compared with the source; it is part of a path here.
    known = artifact.manifest["source"].get("sha256") or Checkpoint.open(source).sha256()
    key = str(known)[:16]
    root = cache_folder()
    root.mkdir(parents=True, exist_ok=True)
    kind = "" if target == "onnx-cpu" else "-" + target.replace(":", "-")
    path = root / f"dense-{key}-{bits}{kind}-{__version__}"
    if not (path / "manifest.json").is_file():
        # How fast a weight is read does not depend on its value, so nothing is fitted.
        plain = {"quantize": {"method": "rtn"}}
        config = ConvertConfig(
            budget=1.0, bits=bits, effort="none", tokens=1, passes=plain, targets=(target,)
        )
        convert(source, path, config, progress=progress)
    return path


def bench_artifact(
    path: Path,
    *,
    dense: str | None = None,
    engine: str | None = None,
    threads: int | None = None,
    repeats: int = 5,
    tokens: int = 24,
    context: int = 50,
    prefill: int = 256,
    progress: Progress,
) -> dict[str, Any]:
    """Time decode and prefill of an artifact and of its dense original in turn.

    Both run in this process through ``carve_runtime``. One uncounted pair warms up; the ratio is
    the median over pairs, so a change of the machine's speed falls on both sides.

    Raises:
        UserError: not a decoder, or the context is longer than the model's.
    """
    import carve_runtime

    artifact = Artifact.open(path)
    if artifact.manifest["kind"] != "decoder":
        raise UserError("kind", "bench times decoders", "for an encoder use carve eval")
    limit = int(artifact.manifest["model"]["max_length"])
    if context + tokens > limit or prefill > limit:
        raise UserError(
            "context", f"the model's context is {limit} tokens", "give a smaller --context"
        )
    count = threads or len(os.sched_getaffinity(0))
    routed = carve_runtime.load(path, engine=engine, threads=count)
    original = dense_artifact(artifact, dense, progress, routed.target)
    models = {
        "dense": carve_runtime.load(original, engine=engine, threads=count),
        "routed": routed,
    }
    figures: dict[str, dict[str, list[float]]] = {
        k: {"dense": [], "routed": []} for k in ("decode", "prefill")
    }
    for i in progress(range(repeats + 1), "pairs"):
        order = ("dense", "routed") if i % 2 else ("routed", "dense")
        for kind in order:
            speed = decode_speed(models[kind], tokens, context)
            if i:
                figures["decode"][kind].append(speed)
            time.sleep(_REST)
        for kind in order:
            speed = prefill_speed(models[kind], prefill)
            if i:
                figures["prefill"][kind].append(speed)
            time.sleep(_REST)
    result: dict[str, Any] = {
        "bits": artifact.bits,
        "threads": count,
        "repeats": repeats,
        "context": context,
        "prefill_tokens": prefill,
    }
    for key, both in figures.items():
        pairs = [r / d for d, r in zip(both["dense"], both["routed"], strict=True)]
        result[key] = {
            "dense": statistics.median(both["dense"]),
            "routed": statistics.median(both["routed"]),
            "ratio": statistics.median(pairs),
        }
    return result


def _prompt(model: carve_runtime.Model, length: int) -> list[int]:
    """Token ids spread over the vocabulary, so that routings differ."""
    size = model.manifest.model.vocab_size
    return [(7919 * i + 13) % size for i in range(length)]


def decode_speed(model: carve_runtime.Model, tokens: int, context: int) -> float:
    """Tokens a second of single steps after ``context`` tokens; the prefill is not counted."""
    session = model.start()
    session.step(_prompt(model, max(1, context)))
    ids = _prompt(model, tokens)
    began = time.perf_counter()
    for i in ids:
        session.step([i])
    return tokens / (time.perf_counter() - began)


def prefill_speed(model: carve_runtime.Model, length: int) -> float:
    """Tokens a second of one step of ``length`` tokens on an empty cache."""
    session = model.start()
    began = time.perf_counter()
    session.step(_prompt(model, length))
    return length / (time.perf_counter() - began)
