"""Refit: down-projections and compensation in closed form, site after site."""

from __future__ import annotations

from dataclasses import dataclass

from carve.passbase import Context, Pass, need_notes, need_routed, unless_worse
from carve.program import Program
from carve.statistics import Fit, refit_down
from carve.tuning import calibrated
from carve.walk import Lesson, walk


@dataclass(frozen=True)
class RefitConfig:
    """Settings of `Refit`.

    ``strengths``: ridge strengths tried for each site. ``judge``: keep the whole pass only where
    the program's loss against the dense one, end to end, gets lower.
    """

    strengths: tuple[float, ...] = (1e-3, 1e-2, 1e-1, 1.0)
    judge: bool = True


@dataclass(frozen=True)
class RefitMetrics:
    """By site: relative weighted error on held-out tokens before and after, and ridge strength.

    ``kept``: whether the program got better end to end.
    """

    error_before: dict[str, float]
    error_after: dict[str, float]
    strength: dict[str, float]
    kept: bool


class Refit(Pass[RefitConfig]):
    """Ridge regression of the down-projections on the routed hidden states.

    The formula is at `carve.statistics.refit_down`, what each site learns at `carve.walk`: the
    dense stream, on the inputs that the sites before leave it. Thresholds are set anew on those
    inputs. Nothing is trained by gradient.
    """

    name = "refit"

    def requires(self, program: Program, context: Context) -> None:
        """Needs carved sites with their routers."""
        need_notes(program, "carve", self.name)

    def call(self, program: Program, context: Context) -> RefitMetrics:
        """Refit every carved site."""
        before: dict[str, float] = {}
        after: dict[str, float] = {}
        strength: dict[str, float] = {}

        def rewrite() -> None:
            for lesson in walk(program, context.batches, lambda s: context.progress(s, self.name)):
                site = lesson.site
                fit = context.partial.once(site.name, self._fit, lesson, context)
                program.set_routed(site, fit.routed)
                site.tuned = True
                before[site.name], after[site.name] = fit.before, fit.after
                strength[site.name] = fit.strength
                del lesson  # or it stands beside the next one

        kept = unless_worse(program, context if self.config.judge else None, rewrite)
        return RefitMetrics(before, after, strength, kept)

    def _fit(self, lesson: Lesson, context: Context) -> Fit:
        site = lesson.site
        routed = calibrated(
            need_routed(site, self.name), lesson.x[: context.given], context.experts(site)
        )
        return refit_down(
            routed,
            lesson.x,
            lesson.target,
            lesson.weight,
            self.config.strengths,
            biases=not context.request.form.plain,
        )
