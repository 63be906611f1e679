"""One typed configuration for the command line, recipes and Python.

This module imports neither torch nor the passes' code: sections of passes are plain tables here
and become the passes' own dataclasses when the pipeline is built.
"""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from carve.engine_form import FOREIGN, FORMS, EngineForm, check_request, form_of
from carve.errors import UserError
from carve.files import parse_toml, read_toml
from carve.typed import fits

PASS_NAMES = (
    "place_gates",
    "profile",
    "allocate",
    "carve",
    "route_analytical",
    "route_ridge",
    "compensate",
    "refit",
    "distill",
    "gate",
    "finetune",
    "choose_widths",
    "smooth",
    "quantize",
    "tune_grids",
    "place",
)
EFFORTS = ("none", "layer", "full")
TARGETS = tuple(FORMS)


@dataclass(frozen=True)
class ConvertConfig:
    """Settings of a conversion.

    Attributes:
        budget: at most this share of the dense blocks' multiply-accumulates, in (0, 1]; 1 keeps
            the model dense.
        ffn_active: pin the active share of the FFNs instead.
        bits: 16 (unquantized), 8 or 4 for every weight; ``auto``, or an average from 2 to 8 such as
            3, for widths of 2, 4 and 8 bits where they matter least.
        size: most bytes of the model's files, for example ``40MB``; widths are chosen to fit.
        reads: most bytes of weights that a token reads on average, which is what decoding takes its
            time for; widths are chosen to fit.
        targets: what to emit: ``onnx-cpu``, one file; ``onnx-cuda``, one in half precision for GPUs
            (4, 8 or 16 bits; onnxruntime-gpu runs it); ``onnx-split``, experts one by one, which
            fits devices smaller than the model, or several of them; ``tvm:`` and a processor or a
            GPU, for example ``tvm:x86_64`` or ``tvm:cuda``, a library that TVM's runtime alone
            loads; ``hf``, a ``glm4_moe`` checkpoint for transformers, vLLM and SGLang;
            ``hf-granite``, a ``granitemoeshared`` one for llama.cpp. The last two hold less, so the
            passes fit a plainer form, and their weights are not quantized: the engines do that.
        effort: ``none`` (closed forms only), ``layer`` (layer-wise distillation on at most 100K
            tokens of text, then minutes of training end to end where the model is small enough) or
            ``full`` (up to five million tokens end to end, of ``calibration`` text if it is given;
            then its own tokens teach with the dense model's predictions).
        skip: share of tokens that pass round a gated block, in [0, 1), where as many blocks are
            gated as save what the deep half would; 0 has no gates, ``auto`` lets the allocation
            choose between narrower FFNs and gates, blocks and rates.
        devices: a TOML file of devices, or a preset's name: experts are placed on them.
        exact: keep the dense weights as they are: widths, routers and compensation only, so that
            every expert on is the dense model; ``effort`` has no say then. Targets that hold no
            biases go without compensation.
        router: ``ridge`` or ``analytical``.
        shared_share: wanted share of the active neurons that the shared expert holds.
        num_experts: fix the number of routed experts.
        top_k: fix the experts a token.
        calibration: a text file instead of the bundled text.
        evaluation: a held-out text file instead of the bundled text.
        tokens: calibration tokens; by default from the model's size.
        eval_tokens: held-out tokens for the final figures; by default from the model's size.
        length: tokens a row of calibration and held-out text.
        seed: feeds every random choice.
        passes: settings by pass, for example ``{"route_ridge": {"power": 1.0}}``.
    """

    budget: float | None = None
    ffn_active: float | None = None
    bits: int | float | str = 4
    size: int | str | None = None
    reads: int | str | None = None
    targets: tuple[str, ...] = TARGETS[:1]
    effort: str = "layer"
    skip: float | str = 0.0
    devices: str | None = None
    exact: bool = False
    router: str = "ridge"
    shared_share: float = 0.7
    num_experts: int | None = None
    top_k: int | None = None
    calibration: str | None = None
    evaluation: str | None = None
    tokens: int | None = None
    eval_tokens: int | None = None
    length: int = 512
    seed: int = 0
    passes: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check(self)

    @property
    def mixed(self) -> bool:
        """Whether widths are chosen weight by weight."""
        return self.bits not in (4, 8, 16, 32) or self.size is not None or self.reads is not None

    @property
    def nominal_bits(self) -> int:
        """The width of weights that nothing else is said of; engines quantize checkpoints."""
        if all(t in FOREIGN for t in self.targets):
            return 16
        if not self.mixed or self.bits in (4, 8):
            return int(self.bits)
        return 4

    @property
    def average_bits(self) -> float:
        """Bits a weight: what is asked where widths are chosen, else `nominal_bits`."""
        asked = self.mixed and isinstance(self.bits, int | float) and self.size is None
        return float(self.bits) if asked else float(self.nominal_bits)

    @property
    def form(self) -> EngineForm:
        """What the targets hold."""
        return form_of(self.targets)

    @property
    def is_dense(self) -> bool:
        """Whether nothing is carved."""
        return (self.ffn_active if self.ffn_active is not None else self.budget) == 1.0


def _check(c: ConvertConfig) -> None:
    asked = c.ffn_active if c.ffn_active is not None else c.budget
    name = "--ffn-active" if c.ffn_active is not None else "--budget"
    if c.ffn_active is not None and c.budget is not None:
        raise UserError("config", "give either --budget or --ffn-active, not both")
    if asked is None:
        raise UserError("budget", "no budget is given", "try --budget 0.6")
    if not isinstance(asked, int | float) or not 0.0 < asked <= 1.0:
        raise UserError("budget", f"{name} {asked} is outside (0, 1]", "try --budget 0.6")
    _check_bits(c)
    if c.devices is not None and c.is_dense:
        raise UserError("config", "nothing is carved, so there is nothing to place on --devices")
    if "place" in c.passes and c.devices is None and "devices" not in c.passes["place"]:
        raise UserError("config", "[place] needs devices", "give --devices D.toml")
    for t in c.targets:
        if t not in target_names():
            raise UserError("target", f"unknown target {t!r}{nearest(t, target_names())}")
    if "onnx-split" in c.targets and c.is_dense:
        raise UserError("target", "onnx-split needs routed FFNs", "lower the budget")
    if "onnx-cuda" in c.targets and c.mixed:
        raise UserError(
            "bits", "experts on CUDA take 4 or 8 bits, all of them the same", "give --bits 4 or 8"
        )
    check_request(c)
    if not c.targets:
        raise UserError("target", "no target is given", f"known: {', '.join(TARGETS)}")
    if c.effort not in EFFORTS:
        raise UserError("config", f"unknown effort {c.effort!r}{nearest(str(c.effort), EFFORTS)}")
    if c.router == "analytical" and c.effort != "none" and not c.exact:
        raise UserError(
            "config",
            "the analytical router cannot be trained with",
            "choose --effort none, or router = 'ridge'",
        )
    if c.router not in ("ridge", "analytical"):
        raise UserError("config", f"router {c.router!r} is neither 'ridge' nor 'analytical'")
    if c.skip != "auto" and (
        isinstance(c.skip, bool) or not isinstance(c.skip, int | float) or not 0.0 <= c.skip < 1.0
    ):
        raise UserError(
            "config", f"skip {c.skip!r} is neither 'auto' nor in [0, 1)", "try --skip 0.25"
        )
    for low, value, label in (
        (8, c.length, "length"),
        (1, c.tokens, "tokens"),
        (1, c.eval_tokens, "eval_tokens"),
        (2, c.num_experts, "num_experts"),
        (1, c.top_k, "top_k"),
    ):
        if value is not None and (not isinstance(value, int) or value < low):
            raise UserError("config", f"{label} has to be a whole number of at least {low}")
    if not 0.0 <= c.shared_share <= 1.0:
        raise UserError("config", f"shared_share {c.shared_share} is outside [0, 1]")
    for p in c.passes:
        if p not in PASS_NAMES:
            raise UserError("config", f"unknown pass {p!r}{nearest(p, PASS_NAMES)}")


def target_names() -> tuple[str, ...]:
    """Every target that there is a back end for."""
    from carve.emit.tvm.names import target_names as tvm

    return (*TARGETS, *tvm())


def _check_bits(c: ConvertConfig) -> None:
    number = isinstance(c.bits, int | float) and not isinstance(c.bits, bool)
    if c.bits != "auto" and not (number and (c.bits in (16, 32) or 2 <= float(c.bits) <= 8)):
        raise UserError(
            "bits",
            f"--bits {c.bits} is not 16, 8, 4, 'auto' or an average from 2 to 8",
            "try --bits 4",
        )
    for name, size in (("size", c.size), ("reads", c.reads)):
        if size is not None:
            parse_size(size, f"--{name}")
            if number and c.bits >= 16:  # type: ignore[operator]
                raise UserError(
                    "bits", f"--{name} needs fewer than {c.bits} bits", "leave --bits out"
                )


def parse_size(text: str | int, name: str) -> int:
    """Bytes of ``40MB``, ``1.5 GB``, ``300KiB`` or a plain number.

    Raises:
        UserError: another form, or not positive.
    """
    from carve_runtime.errors import RequestError
    from carve_runtime.sizes import parse_bytes

    try:
        return parse_bytes(text, name)
    except RequestError as e:
        raise UserError("config", e.message, e.hint) from e


def nearest(word: object, words: tuple[str, ...] | list[str]) -> str:
    """``; did you mean 'x'?`` for the nearest of ``words``, or their list."""
    found = difflib.get_close_matches(str(word)[:100], words, 1)
    return f"; did you mean {found[0]!r}?" if found else f"; known: {', '.join(words)}"


_GENERAL = tuple(f.name for f in fields(ConvertConfig) if f.name != "passes")


def from_table(table: dict[str, Any]) -> ConvertConfig:
    """A configuration from a recipe's table: ``[convert]`` and one section a pass.

    Raises:
        UserError: an unknown section or key, with the nearest valid one, or a value out of range.
    """
    general: dict[str, Any] = {}
    kinds = get_type_hints(ConvertConfig)
    passes: dict[str, dict[str, Any]] = {}
    check_sections(table)
    for section, values in table.items():
        if section == "convert":
            for key, value in values.items():
                if key not in _GENERAL:
                    raise UserError("recipe", f"unknown key convert.{key}{nearest(key, _GENERAL)}")
                general[key] = tuple(value) if isinstance(value, list) else value
                if not fits(general[key], kinds[key]):
                    raise _of_another_type(section, key, value, kinds[key])
        elif section in PASS_NAMES:
            passes[section] = values
        else:
            known = ("convert", *PASS_NAMES)
            raise UserError("recipe", f"unknown section [{section}]{nearest(section, known)}")
    return ConvertConfig(**general, passes=passes)


def _takes(kind: Any, value: Any) -> bool:
    """Whether a setting of a type takes a value; numbers have to be finite."""
    parts = value if isinstance(value, tuple) else (value,)
    return fits(value, kind) and all(math.isfinite(v) for v in parts if isinstance(v, float))


def _of_another_type(section: str, key: str, value: Any, kind: Any) -> UserError:
    names = [getattr(a, "__name__", str(a)) for a in get_args(kind)] or [kind.__name__]
    words = " or ".join(n for n in names if n != "NoneType")
    if get_origin(kind) is tuple:
        words = f"list of {names[0]}"
    return UserError("recipe", f"{section}.{key} = {value!r:.60} has to be of type {words}")


def read_recipe(path: Path) -> dict[str, Any]:
    """The table of a TOML recipe.

    Raises:
        UserError: it cannot be read as TOML.
    """
    table = read_toml(path, "recipe")
    check_sections(table)
    return table


def check_sections(table: dict[str, Any]) -> None:
    """Check that a recipe holds sections only.

    Raises:
        UserError: a key stands outside one.
    """
    for section, values in table.items():
        if not isinstance(values, dict):
            raise UserError(
                "recipe", f"{section!r} stands outside a section", "put it under [convert]"
            )


def apply_settings(table: dict[str, Any], settings: list[str]) -> None:
    """Put ``section.key=value`` settings into a recipe's table; values are read as TOML.

    Raises:
        UserError: a setting has another form.
    """
    for setting in settings:
        path, equals, text = setting.partition("=")
        section, dot, key = path.strip().partition(".")
        if not equals or not dot:
            raise UserError("config", f"--set {setting!r} is not of the form section.key=value")
        try:
            value = parse_toml(f"x = {text}")["x"]
        except ValueError:
            value = text.strip()
        table.setdefault(section, {})[key] = value


AT_LEAST_ONE = (1, math.inf)
"""A range for the ``RANGES`` of a pass's configuration, see `build`."""


def build(cls: type[Any], section: str, values: dict[str, Any]) -> Any:
    """A pass's configuration dataclass from its table.

    Numbers are at least 0, and within the class's ``RANGES`` where a field stands there.

    Raises:
        UserError: an unknown key, with the nearest valid one, or a value of another type, out of
            range or empty.
    """
    kinds = get_type_hints(cls)
    known = [f.name for f in fields(cls)]
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    for key, value in given.items():
        if key not in known:
            raise UserError("recipe", f"unknown key {section}.{key}{nearest(key, known)}")
        if not _takes(kinds[key], value):
            raise _of_another_type(section, key, value, kinds[key])
        if value == ():
            raise UserError("recipe", f"{section}.{key} is an empty list")
        low, high = getattr(cls, "RANGES", {}).get(key, (0, math.inf))
        for v in value if isinstance(value, tuple) else (value,):
            if isinstance(v, int | float) and not low <= v <= high:
                end = f"{high}]" if high < math.inf else "infinity)"
                raise UserError("recipe", f"{section}.{key} = {v} is outside [{low}, {end}")
    return cls(**given)
