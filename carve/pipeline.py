"""From a model to an artifact: the whole conversion, read from top to bottom."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from carve import artifact as art
from carve.artifact import Artifact
from carve.config import ConvertConfig
from carve.errors import UserError
from carve.lineup import (
    LAYER_TOKENS,
    WEIGHTS_ONLY,
    Tokens,
    default_tokens,
    limits_of,
    passes_of,
    request_of,
)
from carve.state_folder import Course, discard, state_folder
from carve.targets import check_targets
from carve.write_artifact import report_of, write_artifact

if TYPE_CHECKING:
    from torch import Tensor, nn

    from carve.calibration import Batch
    from carve.fingerprint import Parts
    from carve.passbase import Pass, PassResult, Progress
    from carve.program import Program
    from carve.state import PassStates

log = logging.getLogger(__name__)


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
    check_targets(config.targets)
    from carve.random_state import seeded

    with art.explained(out), state_folder(out, course) as folder, seeded(config.seed):
        job = _Job(out, config, passes, progress, course, folder)
        if isinstance(model, (str, Path)):
            if (example, calibration, held_out) != (None, None, None):
                raise UserError(
                    "config",
                    "example inputs and batches are for an nn.Module",
                    "name a text file in config=ConvertConfig(calibration=...)",
                )
            return _convert_checkpoint(Path(model), job)
        if example is None or calibration is None:
            raise UserError("module", "an nn.Module needs example inputs and calibration batches")
        from carve.capture import capture_module

        program = capture_module(model, example)
        source = {"path": type(model).__name__, "sha256": None}
        count = default_tokens(config, program.num_parameters)
        conversion = _Conversion(program, job, source)
        return conversion.run(calibration, held_out or calibration, None, count)


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
    from carve.prepare import prepare

    given = prepare(path, job.config)
    source = {"path": str(path), "sha256": given.checkpoint.sha256()}
    conversion = _Conversion(given.program, job, source)
    return conversion.run(given.batches, given.held, path, given.asked)


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
        self,
        batches: Sequence[Batch],
        held: Sequence[Batch],
        folder: Path | None,
        count: Tokens,
    ) -> Artifact | Stopped:
        """Carve, emit, check, and put the artifact in place; or stop where the course ends."""
        from carve import fingerprint
        from carve.arithmetic import as_emitted
        from carve.diagnosis import Diagnosis, costs
        from carve.engine_form import check_source
        from carve.estimate import room_of
        from carve.evaluate import Evaluator, as_dict
        from carve.passbase import PassManager
        from carve.realised import realised
        from carve.retell import tokens_in
        from carve.room import check_room, resident, scene_of
        from carve.state import size_of
        from carve.targets import check_translation, emit_targets

        program = self.program
        check_source(program, self.config.targets)
        check_translation(program, self.config.targets, self.config.nominal_bits)
        scene = scene_of(program, self.config, count, batches, held, folder)
        expected = room_of(scene, self.config, self.passes, resident())
        check_room(expected, self.out, size_of(self.job.folder))
        batches, count = self._enough_text(batches, held, count)
        results: list[PassResult] = []
        quality: dict[str, Any] | None = None
        found: dict[str, Any] = {"dense": costs(program), "layers": {}, "positions": {}}
        found["calibration"] = {"tokens": tokens_in(batches), "told_again": count.told}
        if self.passes:
            context = self._context(batches, count)
            evaluator = Evaluator(program, list(self.progress(held, "dense model")))
            small = evaluator.limited(count.after_pass)

            def measure(p: Program) -> dict[str, float]:
                with as_emitted(p):
                    return as_dict(small(p))

            parts = [fingerprint.of_pass(p, self.config) for p in self.passes]
            states = self._states("", parts, batches, held, count)
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
            seconds = time.monotonic() - self.began
            report = report_of(
                program, self.config, results, emitted, quality, shares, skips, seconds
            )
            report |= found
            write_artifact(
                stage, program, self.config, self.passes, emitted, report, self.source, folder
            )
            art.sync(stage)
        if not self.job.course.keep:
            discard(self.job.folder)
        return Artifact.open(self.out)

    def _enough_text(
        self, batches: Sequence[Batch], held: Sequence[Batch], count: Tokens
    ) -> tuple[Sequence[Batch], Tokens]:
        """Calibration text, gone on with by the model where it is short; tokens to judge on."""
        import torch

        from carve.retell import missing, stretched, tokens_in

        lacking = 0
        if self.passes:
            lacking = missing(self.program, batches, count.calibration, count.distinct)
        if not lacking:
            return batches, count
        found, judge = stretched(
            self.program,
            batches,
            lacking,
            count.judge,
            torch.Generator().manual_seed(self.config.seed),
            lambda items: self.progress(items, "text told again"),
            self._states("text", [{"the pass": "text"}], batches, held, count).partial(0).once,
        )
        return found, replace(count, judge=judge, told=tokens_in(found) - tokens_in(batches))

    def _keep(self, following: Pass[Any], program: Program) -> None:
        """Remember the program as it is before its weights are rounded, where a target needs it."""
        if self.unrounded is None and self._rounds(following.name):
            self.unrounded = program.copy()

    def _states(
        self,
        folder: str,
        passes: Sequence[Parts],
        batches: Sequence[Batch],
        held: Sequence[Batch],
        count: Tokens,
    ) -> PassStates:
        """States in a folder within the conversion's, by the fingerprints of ``passes``."""
        from carve import fingerprint
        from carve.state import PassStates

        return PassStates(
            self.job.folder / folder,
            fingerprint.of_input(
                self.program, self.config, self.source["sha256"], batches, held, asdict(count)
            ),
            passes,
            self.job.course,
            next((p["the pass"] for p in passes if self._rounds(p["the pass"])), None),
        )

    def _rounds(self, name: str) -> bool:
        """Whether a target wants the program before this pass: its engine quantizes by itself."""
        return self.config.form.plain and name in WEIGHTS_ONLY

    def _context(self, batches: Sequence[Batch], count: Tokens) -> Any:
        from carve.budget import plan_widths
        from carve.calibration import SiteInputs, hold_back, limit_batches
        from carve.evaluate import Evaluator
        from carve.passbase import Context
        from carve.retell import tokens_in

        c = self.config
        request, skips = request_of(self.program, c)
        stream, held_back = hold_back(batches, count.judge)
        layerwise = limit_batches(stream, LAYER_TOKENS)
        inputs = SiteInputs.collect(
            self.program, layerwise, lambda items: self.progress(items, "calibration")
        )
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
            limits=limits_of(c),
            given=tokens_in(stream) - count.told,
        )
