"""What an engine that carve did not write requires of the carved form.

Foreign engines run published architectures, and those hold less than carve's own operator: one
width for all layers, a fixed number of experts, linear routers, no compensation. The passes fit
what the asked targets can hold, so that nothing is lost when the checkpoint is written.

Imports neither torch nor passes, so that a request is refused before anything long starts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from carve.errors import CarveError, UserError

if TYPE_CHECKING:
    from carve.config import ConvertConfig
    from carve.program import Program

HF, GRANITE = "hf", "hf-granite"
FOREIGN = (HF, GRANITE)
SOURCES = ("llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True)
class EngineForm:
    """Restrictions on a carved program; without any, whatever the passes find best.

    ``plain``: every carved FFN has the same widths and takes the same, fixed number of experts,
    each with weight 1; linear routers; no bias beside the router's, no gates. ``whole_shared``: the
    shared expert is as wide as a whole number of routed ones, at least one. ``all_carved``: no FFN
    stays dense; else the first ones may. ``unbiased_router``: scores are ``x W`` alone.
    ``no_qk_norm``: queries and keys are not normalised. ``multiple``: of which the widths of routed
    experts, and of what comes into them, are.
    """

    plain: bool = False
    whole_shared: bool = False
    all_carved: bool = False
    unbiased_router: bool = False
    no_qk_norm: bool = False
    multiple: int = 1


ANY = EngineForm()
FORMS = {
    "onnx-cpu": ANY,
    # Its kernel for experts of 4 and 8 bits takes weights in tiles of 64.
    "onnx-cuda": EngineForm(multiple=64),
    "onnx-split": ANY,
    HF: EngineForm(plain=True, whole_shared=True),
    GRANITE: EngineForm(plain=True, all_carved=True, unbiased_router=True, no_qk_norm=True),
}


def form_of(targets: Sequence[str]) -> EngineForm:
    """The restrictions of all targets together."""
    forms = [FORMS.get(t, ANY) for t in targets]
    return EngineForm(
        any(f.plain for f in forms),
        any(f.whole_shared for f in forms),
        any(f.all_carved for f in forms),
        any(f.unbiased_router for f in forms),
        any(f.no_qk_norm for f in forms),
        math.lcm(*(f.multiple for f in forms)),
    )


def check_request(c: ConvertConfig) -> None:
    """Refuse settings that the asked engines have no form of.

    Raises:
        UserError: naming the target and the setting.
    """
    named = [t for t in c.targets if FORMS.get(t, ANY).plain]
    if not named:
        return
    dynamic = c.passes.get("route_ridge", {}).get("dynamic", False)
    only = len(named) == len(c.targets)
    for wrong, what in (
        (c.is_dense, "a model without routed FFNs"),
        (bool(c.skip), "skip gates"),
        (c.router != "ridge", f"{c.router} routers"),
        (dynamic, "a number of experts that depends on the token (route_ridge.dynamic)"),
        ("compensate" in c.passes, "mean compensation"),
        (only and (c.mixed or c.bits == 8), "carve's quantization; its engine quantizes"),
    ):
        if wrong:
            raise UserError(
                "target", f"{named[0]} has no form of {what}", "leave one of the two out"
            )


def check_source(program: Program, targets: Sequence[str]) -> None:
    """Refuse a dense model that the asked engines could not run even uncarved.

    Raises:
        UserError: naming the target and what the model has.
    """
    for target in targets:
        form = FORMS.get(target, ANY)
        for site in program.sites:
            width = site.dense.up.shape[1]
            if width % form.multiple:
                raise UserError(
                    "target",
                    f"{target} runs experts whose input is a multiple of {form.multiple} wide, and "
                    f"that of {site.name} is {width}",
                    "choose another target",
                )
        if form.plain:
            for wrong, what in _faults(program, form):
                if wrong:
                    raise UserError(
                        "target", f"{target} has no form of {what}", "choose another target"
                    )


def _faults(program: Program, form: EngineForm) -> list[tuple[bool, str]]:
    c = program.config
    kind = c.get("model_type")
    window = c.get("sliding_window") if c.get("use_sliding_window", True) else None
    names = {n for n, _ in program.module.named_parameters(remove_duplicate=False)}
    biased = {n.rsplit(".", 2)[-2] for n in names if n.endswith(".bias")}
    strange = sorted(biased - {"q_proj", "k_proj", "v_proj"})
    kinds = sorted({s.dense.activation for s in program.sites})
    sizes = {s.dense.up.shape for s in program.sites}
    return [
        (kind not in SOURCES, f"{kind or 'this architecture'} (known: {', '.join(SOURCES)})"),
        (kinds != ["silu"], f"FFNs with {', '.join(kinds)}"),
        (any(s.dense.gate is None for s in program.sites), "FFNs without a gate projection"),
        (len(sizes) > 1, "FFNs of different widths"),
        (len(program.sites) != c.get("num_hidden_layers"), "layers without an FFN"),
        (0 < (window or 0) < program.max_length, f"a sliding window ({window} tokens)"),
        (bool(strange), f"a bias of {', '.join(strange)}"),
        (form.no_qk_norm and any(".q_norm." in n for n in names), "normalised queries and keys"),
    ]


def check_program(program: Program, target: str) -> None:
    """Check that a carved program has the form that ``target`` holds.

    Raises:
        CarveError: naming the site and what does not fit; a defect of a pass.
    """
    form = FORMS[target]
    found = None
    dense = [s.routed is None for s in program.sites]
    for site in program.sites:
        r = site.routed
        if r is None:
            continue
        found = found or (r.shared_size, r.expert_size, r.num_experts, r.top_k)
        biases = (r.output_bias, r.expert_bias, r.shared_up_bias, r.expert_up_bias)
        for wrong, what in (
            ((r.shared_size, r.expert_size, r.num_experts, r.top_k) != found, "widths of its own"),
            (r.dynamic, "a number of experts that depends on the token"),
            (r.router_gate is not None, "a router that is not linear"),
            (form.unbiased_router and r.router_bias is not None, "a router with a bias"),
            (any(b is not None for b in biases), "a bias"),
            (form.whole_shared and (r.shared_size % r.expert_size or not r.shared_size), "a shared"
             " expert that is no whole number of routed ones"),
        ):  # fmt: skip
            if wrong:
                raise CarveError("target", f"{target} cannot hold {site.name}: it has {what}")
    if found is None or program.gated:
        raise CarveError("target", f"{target} holds routed FFNs without gates only")
    if dense != sorted(dense, reverse=True) or (form.all_carved and any(dense)):
        raise CarveError("target", f"{target} holds dense FFNs as the first layers only, if at all")
