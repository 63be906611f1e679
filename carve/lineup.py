"""What a configuration comes to: its passes in order, their limits, and tokens for all of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from carve.config import ConvertConfig, build, parse_size

if TYPE_CHECKING:
    from carve.budget import Request
    from carve.passbase import Pass
    from carve.program import Program

WEIGHTS_ONLY = ("choose_widths", "smooth", "quantize", "tune_grids")
"""Passes that run where nothing is carved, too."""
_TEXT_TOKENS = 98_304
"""Tokens of text that are taken for effort ``layer``."""
LAYER_TOKENS = 2 * _TEXT_TOKENS
"""Most tokens that layer-wise work sees: the text, and as much that the model tells."""
SHORT: dict[str, Any] = {"tokens": LAYER_TOKENS, "work": 1e13, "decoders_only": True}
"""An end-to-end pass of minutes; encoders hardly gain by it."""
_LONG: dict[str, Any] = {
    "tokens": 5_000_000,
    "rounds": 5,
    "batch": 2048,
    "redrawn": 0.33,
}
"""One of hours. Text repeated up to four times is worth nearly as much as new text (Muennighoff et
al., arXiv 2305.16264); here five times were worse than three, and a third of it drawn anew better
than none; more of it keeps the program nearer to the dense one and teaches fewer labels."""
_LABELS = 0.5
"""Weight of the labels of text that is given for effort ``full``."""


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
    # Who gives text for long training wants the model good at it. The bundled text says nothing of
    # what a model is for, so there the dense model alone is the teacher.
    own = config.effort == "full" and config.calibration is not None
    labels = {"labels": _LABELS} if own else {}
    if config.effort in ("layer", "full") and not config.exact:
        length = SHORT if config.effort == "layer" else _LONG
        listed.append(make(p.Finetune, p.FinetuneConfig, **length, **labels))
    if config.mixed:
        listed.append(make(p.ChooseWidths, p.ChooseWidthsConfig))
    published = config.passes.get("quantize", {}).get("method") == "eaquant"
    if config.nominal_bits < 16 and (published or "smooth" in config.passes):
        as_published = {"alphas": (0.6,), "forced": True} if published else {}
        listed.append(make(p.Smooth, p.SmoothConfig, **as_published))
    if config.nominal_bits < 16:
        trained = config.effort != "none" and config.nominal_bits < 8 and not config.exact
        trained = trained or "tune_grids" in config.passes
        listed.append(make(p.Quantize, p.QuantizeConfig, rest=trained))
        if trained:
            tokens = p.TuneGridsConfig.tokens_at(config.average_bits)
            listed.append(make(p.TuneGrids, p.TuneGridsConfig, tokens=tokens, **labels))
    if config.devices is not None or "place" in config.passes:
        given = {} if config.devices is None else {"devices": config.devices}
        listed.append(make(p.Place, p.PlaceConfig, **given))
    return listed


def passes_of(config: ConvertConfig) -> list[Pass[Any]]:
    """The passes that a conversion runs: without carving, only the weights are rounded."""
    passes = build_passes(config)
    return [p for p in passes if p.name in WEIGHTS_ONLY or not config.is_dense]


@dataclass(frozen=True)
class Tokens:
    """How many tokens each part of a conversion takes.

    ``distinct``: to train on, where the model can tell what the text lacks (`carve.retell`), which
    keeps training from learning the text by heart; ``told``: of ``calibration``, made so.
    """

    calibration: int
    final: int
    after_pass: int
    judge: int
    distinct: int = 0
    told: int = 0


def default_tokens(config: ConvertConfig, parameters: int) -> Tokens:
    """Small models get what the bundled text holds; a large one what minutes of passes allow.

    ``calibration`` is bounded so that walking over the sites, two forward passes and a bit, stays
    near two minutes on a small machine, and by 100K tokens, or a million for effort ``full``.
    """
    scale = 2e13 / (2 * parameters)
    effort = "none" if config.exact else config.effort
    # Closed forms have what they need from fewer tokens than training does.
    most = {"none": 40_000, "layer": _TEXT_TOKENS, "full": 1_000_000}[effort]
    calibration = config.tokens or int(min(most, max(8_192, scale)))
    final = config.eval_tokens or int(min(24_000, max(1_024, scale / 8)))
    trains = effort != "none" and not config.is_dense
    return Tokens(
        calibration,
        final,
        min(final, int(max(512, scale / 32))),
        int(min(4_096, max(512, scale / 64))),
        max(calibration, min(2 * calibration, LAYER_TOKENS)) if trains else 0,
    )


def request_of(program: Program, config: ConvertConfig) -> tuple[Request, dict[str, float]]:
    """What is asked of a program's widths, and the shares of tokens that gates are to skip.

    Raises:
        UserError: no widths answer the request.
    """
    from carve.budget import make_request, plan_skips

    c = config
    request = make_request(
        program, c.budget, c.ffn_active, c.shared_share, c.num_experts, c.top_k, c.form
    )
    return request, plan_skips(program, 0.0 if c.skip == "auto" else float(c.skip))


def limits_of(config: ConvertConfig) -> dict[str, float]:
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
