"""From a model to an artifact: the whole conversion, read from top to bottom."""

from __future__ import annotations

import logging
import shutil
import time
import tomllib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from carve import artifact as art
from carve.artifact import Artifact
from carve.config import ConvertConfig, build, parse_size
from carve.engine_form import FOREIGN
from carve.errors import CarveError, UserError
from carve.recipe import resolved
from carve.state_folder import Course, discard, state_folder
from carve.version import __version__

if TYPE_CHECKING:
    from torch import Tensor, nn

    from carve.calibration import Batch
    from carve.passbase import Pass, PassResult, Progress
    from carve.program import Program
    from carve.state import PassStates
    from carve.targets import Emission

log = logging.getLogger(__name__)
_WEIGHTS_ONLY = ("choose_widths", "smooth", "quantize")
LAYER_TOKENS = 98_304
"""Most calibration tokens that layer-wise work sees."""


def build_passes(config: ConvertConfig) -> list[Pass[Any]]:
    """The pipeline as one list."""
    from carve import passes as p

    def make(cls: type[Any], settings: type[Any], **more: Any) -> Any:
        return cls(build(settings, cls.name, {**more, **config.passes.get(cls.name, {})}))

    plain = config.form.plain
    router = (
        make(p.RouteRidge, p.RouteRidgeConfig, **({"dynamic": False} if plain else {}))
        if config.router == "ridge"
        else make(p.RouteAnalytical, p.RouteAnalyticalConfig)
    )
    placed = config.skip and config.skip != "auto"
    listed: list[Pass[Any]] = [
        *([make(p.PlaceGates, p.PlaceGatesConfig)] if placed else []),
        make(p.Profile, p.ProfileConfig),
        make(p.Allocate, p.AllocateConfig, skip=config.skip == "auto"),
        make(p.Carve, p.CarveConfig),
        router,
    ]
    if config.exact and not plain:
        listed.append(make(p.Compensate, p.CompensateConfig))
    if not config.exact:
        listed.append(make(p.Refit, p.RefitConfig))
    if config.effort in ("layer", "full") and not config.exact:
        listed.append(make(p.Distill, p.DistillConfig))
    if config.skip:
        listed.append(make(p.SkipGates, p.GateConfig))
    if config.effort == "full" and not config.exact:
        listed.append(make(p.Finetune, p.FinetuneConfig))
    if config.mixed:
        listed.append(make(p.ChooseWidths, p.ChooseWidthsConfig))
    published = config.passes.get("quantize", {}).get("method") == "eaquant"
    if config.nominal_bits < 16 and (published or "smooth" in config.passes):
        as_published = {"alphas": (0.6,), "forced": True} if published else {}
        listed.append(make(p.Smooth, p.SmoothConfig, **as_published))
    if config.nominal_bits < 16:
        listed.append(make(p.Quantize, p.QuantizeConfig))
    if config.devices is not None or "place" in config.passes:
        given = {} if config.devices is None else {"devices": config.devices}
        listed.append(make(p.Place, p.PlaceConfig, **given))
    return listed


def passes_of(config: ConvertConfig) -> list[Pass[Any]]:
    """The passes that a conversion runs: without carving, only the weights are rounded."""
    passes = build_passes(config)
    return [p for p in passes if p.name in _WEIGHTS_ONLY or not config.is_dense]


@dataclass(frozen=True)
class Tokens:
    """How many tokens each part of a conversion takes."""

    calibration: int
    final: int
    after_pass: int
    judge: int


def default_tokens(config: ConvertConfig, parameters: int) -> Tokens:
    """Small models get what the bundled text holds; a large one what minutes of passes allow.

    ``calibration`` is bounded so that walking over the sites, two forward passes and a bit, stays
    near two minutes on a small machine, and by 100K tokens.
    """
    scale = 2e13 / (2 * parameters)
    # Closed forms have what they need from fewer tokens than training does.
    by_effort = {"none": 40_000, "layer": LAYER_TOKENS, "full": 1_000_000}
    most = by_effort["none" if config.exact else config.effort]
    calibration = config.tokens or int(min(most, max(8_192, scale)))
    final = config.eval_tokens or int(min(24_000, max(1_024, scale / 8)))
    return Tokens(
        calibration,
        final,
        min(final, int(max(512, scale / 32))),
        int(min(4_096, max(512, scale / 64))),
    )


def convert(
    model: str | Path | nn.Module,
    output: str | Path,
    config: ConvertConfig | None = None,
    *,
    example: tuple[Tensor, ...] | None = None,
    calibration: Sequence[Batch] | None = None,
    held_out: Sequence[Batch] | None = None,
    progress: Progress | None = None,
    course: Course | None = None,
    **settings: Any,
) -> Artifact:
    """Turn a dense model into a routed artifact.

    Args:
        model: a Hugging Face directory, or any ``nn.Module`` with ``example`` inputs.
        output: the artifact's folder; an artifact there is replaced.
        config: all settings, or give them as keywords (``budget=0.6, bits=4``).
        example: example inputs for an ``nn.Module``.
        calibration: batches for an ``nn.Module`` (a directory uses text).
        held_out: held-out batches for an ``nn.Module``.
        progress: shows the work; silent by default.
        course: whether to go on from a stored state; from the beginning by default.
        settings: fields of `ConvertConfig`.

    Raises:
        UserError: the request cannot be served.
        CarveError: a pass or an emitter failed. Nothing is left under the output's name; what was
            done is kept beside it for ``Course(resume=True)``.
    """
    if course is not None and course.until is not None:
        raise UserError("config", "there is no artifact yet at --until", "use carve.advance")
    done = advance(
        model,
        output,
        config,
        example=example,
        calibration=calibration,
        held_out=held_out,
        progress=progress,
        course=course,
        **settings,
    )
    assert isinstance(done, Artifact)
    return done


@dataclass(frozen=True)
class Stopped:
    """A conversion that stopped where its course ends, with its state in ``folder``."""

    after: str
    folder: Path
    passes: list[PassResult]


def advance(
    model: str | Path | nn.Module,
    output: str | Path,
    config: ConvertConfig | None = None,
    *,
    example: tuple[Tensor, ...] | None = None,
    calibration: Sequence[Batch] | None = None,
    held_out: Sequence[Batch] | None = None,
    progress: Progress | None = None,
    course: Course | None = None,
    **settings: Any,
) -> Artifact | Stopped:
    """As `convert`, for a course that may stop before there is an artifact."""
    config = config or ConvertConfig(**settings)
    course = course or Course()
    out = Path(output)
    passes = passes_of(config)
    course.check([p.name for p in passes])
    art.check_output(out)
    from carve.random_state import seeded

    with art.explained(out), state_folder(out, course) as folder, seeded(config.seed):
        job = _Job(out, config, passes, progress, course, folder)
        if isinstance(model, (str, Path)):
            return _convert_checkpoint(Path(model), job)
        if example is None or calibration is None:
            raise UserError("module", "an nn.Module needs example inputs and calibration batches")
        from carve.capture import capture_module

        program = capture_module(model, example)
        source = {"path": type(model).__name__, "sha256": None}
        return _Conversion(program, job, source).run(calibration, held_out or calibration, None)


@dataclass(frozen=True)
class _Job:
    """What is asked of a conversion; ``folder`` is where its state goes."""

    out: Path
    config: ConvertConfig
    passes: list[Pass[Any]]
    progress: Progress | None
    course: Course
    folder: Path


def _convert_checkpoint(path: Path, job: _Job) -> Artifact | Stopped:
    from carve.calibration import load_tokenizer, read_text, text_batches
    from carve.capture import capture_checkpoint
    from carve.checkpoint import Checkpoint

    checkpoint, config = Checkpoint.open(path), job.config
    foreign = [t for t in config.targets if t in FOREIGN]
    stored = sum(f.stat().st_size for f in checkpoint.weights)
    own = checkpoint.num_parameters * config.nominal_bits // 8
    needed = len(foreign) * stored + (own if len(foreign) < len(config.targets) else 0)
    art.check_disk(job.out, needed + (64 << 20))
    program = capture_checkpoint(checkpoint)
    if program.inputs[0] != "input_ids":
        raise UserError(
            "text",
            f"{checkpoint.architecture} takes no text to calibrate on",
            "convert it from Python: carve.convert(module, example=..., calibration=...)",
        )
    tokenizer = load_tokenizer(path)
    _check_vocabulary(program, tokenizer.get_vocab_size())
    length = min(config.length, program.max_length)
    count = default_tokens(config, checkpoint.num_parameters)
    text = read_text(config.calibration, "calibration.txt")
    batches = text_batches(program, tokenizer, text, length, count.calibration)
    text = read_text(config.evaluation, "evaluation.txt")
    held = text_batches(program, tokenizer, text, length, count.final)
    source = {"path": str(path), "sha256": checkpoint.sha256()}
    return _Conversion(program, job, source).run(batches, held, path)


def _check_vocabulary(program: Program, size: int) -> None:
    vocabulary = program.config.get("vocab_size")
    if isinstance(vocabulary, int) and size > vocabulary:
        raise UserError(
            "tokenizer",
            f"the tokenizer has {size} entries, the model {vocabulary}",
            "use the tokenizer that belongs to the model",
        )


class _Conversion:
    """State of one conversion while it runs."""

    def __init__(self, program: Program, job: _Job, source: dict[str, Any]) -> None:
        from carve.passbase import silent

        self.program, self.job, self.source = program, job, source
        self.out, self.config, self.passes = job.out, job.config, job.passes
        self.progress = job.progress or silent
        self.began = time.monotonic()
        # What targets get whose engines quantize by themselves.
        self.unrounded: Program | None = None

    def run(
        self, batches: Sequence[Batch], held: Sequence[Batch], folder: Path | None
    ) -> Artifact | Stopped:
        """Carve, emit, check, and put the artifact in place; or stop where the course ends."""
        from carve.arithmetic import as_emitted
        from carve.diagnosis import Diagnosis, costs
        from carve.engine_form import check_source
        from carve.evaluate import Evaluator, as_dict
        from carve.passbase import PassManager
        from carve.realised import realised
        from carve.targets import emit_targets

        program = self.program
        check_source(program, self.config.targets)
        parameters = sum(p.numel() for p in program.module.parameters())
        count = default_tokens(self.config, parameters)
        results: list[PassResult] = []
        quality: dict[str, Any] | None = None
        found: dict[str, Any] = {"dense": costs(program), "layers": {}, "positions": {}}
        if self.passes:
            context = self._context(batches, count.judge)
            evaluator = Evaluator(program, list(self.progress(held, "dense model")))
            small = evaluator.limited(count.after_pass)

            def measure(p: Program) -> dict[str, float]:
                with as_emitted(p):
                    return as_dict(small(p))

            states = self._states(batches, held, count)
            diagnosis = Diagnosis(program, small)
            manager = PassManager(
                self.passes,
                measure=measure,
                before=self._keep,
                diagnose=diagnosis.state,
                keeper=states,
            )
            results = manager(program, context, self.job.course.until)
            self.unrounded = self.unrounded or states.earlier
            self.began -= states.resumed_seconds
            if self.job.course.until is not None:
                return Stopped(results[-1].name, self.job.folder, results)
            with as_emitted(program):
                quality = as_dict(evaluator(program))
                use = realised(program, held[:4])
            found |= {"layers": diagnosis.layers(program, use), "positions": use.positions()}
            shares, skips = use.share(), use.skips()
        else:
            shares = {"budget": 1.0, "ffn_active": 1.0, "skip": 0.0}
            skips = {}
        with art.staged(self.out) as stage:
            emitted = emit_targets(
                program,
                self.config.targets,
                stage,
                self.config.nominal_bits,
                batches,
                held,
                self.unrounded,
            )
            report = {**self._report(results, emitted, quality, shares, skips), **found}
            self._write(stage, emitted, report, folder)
            art.sync(stage)
        if not self.job.course.keep:
            discard(self.job.folder)
        return Artifact.open(self.out)

    def _keep(self, following: Pass[Any], program: Program) -> None:
        """Remember the program as it is before its weights are rounded, where a target needs it."""
        if self.unrounded is None and self._rounds(following):
            self.unrounded = program.copy()

    def _states(self, batches: Sequence[Batch], held: Sequence[Batch], count: Tokens) -> PassStates:
        from carve import fingerprint
        from carve.state import PassStates

        return PassStates(
            self.job.folder,
            fingerprint.of_input(
                self.program, self.config, self.source["sha256"], batches, held, asdict(count)
            ),
            [fingerprint.of_pass(p, self.config) for p in self.passes],
            self.job.course,
            next((p.name for p in self.passes if self._rounds(p)), None),
        )

    def _rounds(self, following: Pass[Any]) -> bool:
        """Whether a target wants the program before this pass: its engine quantizes by itself."""
        return self.config.form.plain and following.name in _WEIGHTS_ONLY

    def _context(self, batches: Sequence[Batch], judged: int) -> Any:
        from carve.budget import make_request, plan_skips, plan_widths
        from carve.calibration import SiteInputs, hold_back, limit_batches
        from carve.evaluate import Evaluator
        from carve.passbase import Context

        c = self.config
        request = make_request(
            self.program, c.budget, c.ffn_active, c.shared_share, c.num_experts, c.top_k, c.form
        )
        stream, held_back = hold_back(batches, judged)
        layerwise = limit_batches(stream, LAYER_TOKENS)
        inputs = SiteInputs.collect(
            self.program, layerwise, lambda items: self.progress(items, "calibration")
        )
        skips = plan_skips(self.program, 0.0 if c.skip == "auto" else float(c.skip))
        return Context(
            layerwise,
            inputs,
            request,
            plan_widths(self.program, request, skips),
            c.seed,
            self.progress,
            Evaluator(self.program, held_back).loss,
            stream,
            skips=skips,
            bits=c.nominal_bits,
            limits=_limits(c),
        )

    def _report(
        self,
        results: list[PassResult],
        emitted: dict[str, Emission],
        quality: dict[str, Any] | None,
        shares: dict[str, float],
        skips: dict[str, float],
    ) -> dict[str, Any]:
        from carve.passbase import peak_rss_mb

        p = self.program
        return {
            "budget": {"asked": self.config.budget, "realised": shares["budget"]},
            "ffn_active": shares["ffn_active"],
            "skip": {"asked": self.config.skip, "realised": shares["skip"], "blocks": skips},
            "macs": {"dense": p.dense_macs, "attention": p.attention_macs, "routed": p.macs},
            "quality": quality,
            "bits": self.config.nominal_bits if not self.config.mixed else _asked_bits(self.config),
            "size": self.config.size,
            "reads": self.config.reads,
            "effort": self.config.effort,
            "seconds": round(time.monotonic() - self.began, 1),
            "peak_rss_mb": round(peak_rss_mb(), 1),
            "passes": [*(asdict(r) for r in results), *(e.record for e in emitted.values())],
        }

    def _write(
        self,
        stage: Path,
        emitted: dict[str, Emission],
        report: dict[str, Any],
        folder: Path | None,
    ) -> None:
        from carve.checkpoint import TOKENIZER_FILES
        from carve.emit.genai import genai_config
        from carve.report.files import report_files
        from carve.targets import ONNX

        (stage / "passes").mkdir()
        for i, record in enumerate(report["passes"]):
            name = record["name"].replace(" ", "-")
            art.write_json(stage / "passes" / f"{i:02d}-{name}.json", record)
        recipe = resolved(self.config, self.passes)
        (stage / "recipe.toml").write_text(recipe, encoding="utf-8")
        homes = [stage, *(stage / e.folder for e in emitted.values() if e.shared_cache is None)]
        for name in TOKENIZER_FILES if folder is not None else ():
            if (folder / name).is_file():  # type: ignore[operator]
                for home in homes:
                    shutil.copyfile(folder / name, home / name)  # type: ignore[operator]
        shared_cache = all(e.shared_cache is not False for e in emitted.values())
        facts = model_facts(self.program, shared_cache, folder)
        if self.program.kind == "decoder" and shared_cache and ONNX in emitted:
            art.write_json(stage / "genai_config.json", genai_config(self.program, facts))
        _write_placement(stage, self.program.notes)
        sizes = {n: _size(stage / e.folder) for n, e in emitted.items()}
        own = {n: s for n, s in sizes.items() if n not in FOREIGN}
        report["bytes"] = next(iter((own or sizes).values()))
        for name, size in own.items():
            if self.config.size is not None and size > parse_size(self.config.size, "--size"):
                raise CarveError(
                    "size",
                    f"the files of {name} came to {size} bytes, more than --size "
                    f"{self.config.size}",
                    "this is a defect of carve's estimate; ask for a little less and report it",
                )
        manifest = {
            "schema": art.SCHEMA,
            "carve": __version__,
            "kind": self.program.kind,
            "source": self.source,
            "model": facts,
            "targets": {n: {"model": e.model, "bits": e.bits} for n, e in emitted.items()},
        }
        report["recipe"] = tomllib.loads(recipe)
        placed = self.program.notes.get("placement")
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


def _limits(config: ConvertConfig) -> dict[str, float]:
    """What mixed widths have to keep, see `carve.passes.ChooseWidths`."""
    from carve.passes.choose_widths import BITS, BYTES, READS

    if not config.mixed:
        return {}
    limits = {
        name: float(parse_size(text, name))
        for name, text in ((BYTES, config.size), (READS, config.reads))
        if text is not None
    }
    # Without any limit, auto is as large as 4 bits throughout.
    average = 4.0 if config.bits == "auto" and not limits else config.bits
    if isinstance(average, int | float) and not (limits and config.bits == 4):
        limits[BITS] = float(average)
    return limits


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
