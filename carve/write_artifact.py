"""An artifact's own files: records, recipe, tokenizer, facts for a runtime, report and manifest."""

from __future__ import annotations

import shutil
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from carve import artifact as art
from carve.config import ConvertConfig, parse_size
from carve.engine_form import FOREIGN
from carve.errors import CarveError
from carve.recipe import resolved
from carve.version import __version__

if TYPE_CHECKING:
    from carve.passbase import Pass, PassResult
    from carve.program import Program
    from carve.targets import Emission


def report_of(
    program: Program,
    config: ConvertConfig,
    results: Sequence[PassResult],
    emitted: Mapping[str, Emission],
    quality: dict[str, Any] | None,
    shares: Mapping[str, float],
    skips: Mapping[str, float],
    seconds: float,
) -> dict[str, Any]:
    """What ``report.json`` says of a conversion."""
    from carve.passbase import peak_rss_mb

    return {
        "budget": {"asked": config.budget, "realised": shares["budget"]},
        "ffn_active": shares["ffn_active"],
        "skip": {"asked": config.skip, "realised": shares["skip"], "blocks": skips},
        "macs": {
            "dense": program.dense_macs,
            "attention": program.attention_macs,
            "routed": program.macs,
        },
        "quality": quality,
        "bits": config.nominal_bits if not config.mixed else _asked_bits(config),
        "size": config.size,
        "reads": config.reads,
        "effort": config.effort,
        "seconds": round(seconds, 1),
        "peak_rss_mb": round(peak_rss_mb(), 1),
        "passes": [*(asdict(r) for r in results), *(e.record for e in emitted.values())],
    }


def write_artifact(
    stage: Path,
    program: Program,
    config: ConvertConfig,
    passes: Sequence[Pass[Any]],
    emitted: Mapping[str, Emission],
    report: dict[str, Any],
    source: Mapping[str, Any],
    folder: Path | None,
) -> None:
    """Write all but the targets' own files below ``stage``.

    Args:
        stage: the artifact's folder, which holds the targets.
        program: the program that was emitted.
        config: the settings.
        passes: what ran.
        emitted: the targets.
        report: what `report_of` gives; the targets' size and the recipe are added to it.
        source: the dense model as the manifest names it.
        folder: the checkpoint, where the tokenizer is.

    Raises:
        CarveError: the targets came out larger than asked.
    """
    from carve.checkpoint import TOKENIZER_FILES
    from carve.emit.genai import genai_config
    from carve.report.files import report_files
    from carve.targets import ONNX

    (stage / "passes").mkdir()
    for i, record in enumerate(report["passes"]):
        name = record["name"].replace(" ", "-").replace(":", "-")
        art.write_json(stage / "passes" / f"{i:02d}-{name}.json", record)
    recipe = resolved(config, passes)
    (stage / "recipe.toml").write_text(recipe, encoding="utf-8")
    homes = [stage, *(stage / e.folder for e in emitted.values() if e.shared_cache is None)]
    for name in TOKENIZER_FILES if folder is not None else ():
        if (folder / name).is_file():  # type: ignore[operator]
            for home in homes:
                shutil.copyfile(folder / name, home / name)  # type: ignore[operator]
    shared_cache = all(e.shared_cache is not False for e in emitted.values())
    facts = model_facts(program, shared_cache, folder)
    if program.kind == "decoder" and shared_cache and ONNX in emitted:
        art.write_json(stage / "genai_config.json", genai_config(program, facts))
    _write_placement(stage, program.notes)
    sizes = {n: _size(stage / e.folder) for n, e in emitted.items()}
    own = {n: s for n, s in sizes.items() if n not in FOREIGN}
    report["bytes"] = next(iter((own or sizes).values()))
    for name, size in own.items():
        if config.size is not None and size > parse_size(config.size, "--size"):
            raise CarveError(
                "size",
                f"the files of {name} came to {size} bytes, more than --size {config.size}",
                "this is a defect of carve's estimate; ask for a little less and report it",
            )
    manifest = {
        "schema": art.SCHEMA,
        "carve": __version__,
        "kind": program.kind,
        "source": source,
        "model": facts,
        "targets": {n: {"model": e.model, "bits": e.bits} for n, e in emitted.items()},
    }
    report["recipe"] = tomllib.loads(recipe)
    placed = program.notes.get("placement")
    pages = report_files(report, manifest, None if placed is None else placed.as_dict())
    for name, text in pages.items():
        (stage / name).write_text(text, encoding="utf-8")
    manifest["files"] = art.hashes(stage)
    manifest["digest"] = art.digest(stage, manifest)
    art.write_json(stage / art.MANIFEST, manifest)


def _write_placement(stage: Path, notes: dict[str, Any]) -> None:
    """The placement, and what it takes to place the artifact's experts anew."""
    from carve.plan import SIZES, TRACE

    if "placement" not in notes:
        return
    art.write_json(stage / "placement.json", notes["placement"].as_dict())
    (stage / TRACE).parent.mkdir(exist_ok=True)
    (stage / TRACE).write_bytes(notes["trace"].pack())
    art.write_json(stage / SIZES, asdict(notes["sizes"]))


def _asked_bits(config: ConvertConfig) -> float | str:
    """An average, or ``auto`` where only sizes decide."""
    if isinstance(config.bits, str) or (config.bits == 4 and (config.size or config.reads)):
        return "auto"
    return float(config.bits)


def _size(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def model_facts(program: Program, shared_cache: bool, folder: Path | None) -> dict[str, Any]:
    """What a runtime has to know about the model."""
    from carve.files import read_json

    c = program.config
    facts: dict[str, Any] = {
        "vocab_size": c.get("vocab_size"),
        "max_length": program.max_length,
        "bos_token_id": c.get("bos_token_id"),
        "eos_token_ids": _ids(c.get("eos_token_id")),
        "pooling": None,
        "normalize": False,
    }
    if folder is not None and (folder / "generation_config.json").is_file():
        facts["eos_token_ids"] = (
            _ids(read_json(folder / "generation_config.json").get("eos_token_id"))
            or facts["eos_token_ids"]
        )
    if program.kind == "decoder":
        key = program.example[2]
        facts |= {
            "num_layers": (len(program.inputs) - 2) // 2,
            "num_key_value_heads": key.shape[1],
            "head_dim": key.shape[3],
            "shared_cache": shared_cache,
            "gates": [{"name": b.name, "skip": b.gate.skip} for b in program.gated if b.gate],
        }
    elif folder is not None:
        pooling = folder / "1_Pooling" / "config.json"
        cls = pooling.is_file() and bool(read_json(pooling).get("pooling_mode_cls_token"))
        facts["pooling"] = "cls" if cls else "mean"
        facts["normalize"] = (folder / "modules.json").is_file() and b"Normalize" in (
            folder / "modules.json"
        ).read_bytes()
    return facts


def _ids(value: Any) -> list[int]:
    if value is None:
        return []
    return [int(v) for v in value] if isinstance(value, list) else [int(value)]
