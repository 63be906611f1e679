"""Parity of a checkpoint: unmodified transformers beside the program, on held-out prompts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from carve.dialect import linear_rule
from carve.emit.hf import stored_dtype
from carve.emit.hf_tensors import engine_choice
from carve.errors import CarveError
from carve.ffn import RoutedFFN
from carve.parity import exercised
from carve.program import Program

BOUND = 1e-2
"""Most that a logit may differ, over the larger of 1 and the logits' own root mean square."""


@dataclass(frozen=True)
class CheckpointMetrics:
    """Transformers beside the program, both in fp32 with the weights as they are stored.

    ``worst_logit`` and ``median_logit``: of the largest difference of a logit by token;
    ``top1_agreement``: share of tokens; ``same_experts``: share of tokens and layers where both
    take the same set, the program choosing in the architecture's arithmetic;
    ``same_by_own_scores``: where the program's own scores choose that set too (others tie in the
    stored precision). ``routings``: distinct ones.
    """

    worst_logit: float
    median_logit: float
    top1_agreement: float
    same_experts: float
    same_by_own_scores: float
    tokens: int
    routings: int


def check_checkpoint(
    program: Program,
    folder: Path,
    target: str,
    routed: Mapping[str, RoutedFFN],
    prompts: Sequence[tuple[Tensor, ...]],
) -> CheckpointMetrics:
    """Load a checkpoint with transformers and compare its logits with the program's.

    Args:
        program: what was emitted.
        folder: the checkpoint.
        target: ``hf`` or ``hf-granite``.
        routed: the FFNs as they were emitted.
        prompts: program inputs; their routings have to differ.

    Raises:
        CarveError: the logits differ, or transformers finds another set of weights.
    """
    routings = exercised(program, prompts)
    reference = _Reference(program, target, routed)
    model = load_checkpoint(folder)
    differences, agree, same = [], [], []
    size = 0.0
    for inputs in prompts:
        want = reference.run(inputs).flatten(0, 1)
        with torch.no_grad(), _experts(model) as experts:
            have = model(input_ids=inputs[0], use_cache=False).logits.float().flatten(0, 1)
        differences.append((have - want).abs().amax(1))
        agree.append(have.argmax(1) == want.argmax(1))
        same += [(a.gather(1, i)).all(1) for a, i in zip(reference.chosen, experts, strict=True)]
        size = max(size, float(want.square().mean().sqrt()))
    difference = torch.cat(differences)
    metrics = CheckpointMetrics(
        float(difference.max()),
        float(difference.median()),
        float(torch.cat(agree).float().mean()),
        float(torch.cat(same).float().mean()),
        reference.own / max(1, reference.seen),
        len(difference),
        routings,
    )
    bound = BOUND * max(1.0, size)
    # A route that rounding flips moves the tokens after it; a NaN fails both comparisons.
    within = float((difference <= bound).float().mean())
    if not (metrics.median_logit <= bound and within >= 0.9):
        raise CarveError(
            "parity",
            f"{folder.name} and torch differ: logits by {metrics.median_logit:.2e} (median), "
            f"{metrics.worst_logit:.2e} (worst), {within:.1%} of tokens within {bound:.2e}; "
            f"the same experts in {metrics.same_experts:.1%}",
            "this is a defect of carve; please report the architecture",
        )
    return metrics


def load_checkpoint(folder: Path) -> Any:
    """The model in fp32, as unmodified transformers loads it.

    Raises:
        CarveError: weights are missing, left over or of another shape.
    """
    import transformers

    kind: Any = transformers.AutoModelForCausalLM
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        model, info = kind.from_pretrained(
            folder,
            dtype=torch.float32,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    finally:
        transformers.logging.set_verbosity(level)
    wrong = [str(k) for v in info.values() for k in v]
    if wrong:
        raise CarveError(
            "parity", f"transformers finds other weights in {folder.name}: {', '.join(wrong[:4])}"
        )
    return model.eval()


class _Reference:
    """The program with weights as stored, choosing experts in the architecture's arithmetic.

    ``chosen``: masks ``[T, E]`` of the last run by layer; ``own`` of ``seen`` tokens and layers
    take the same experts by the program's own scores.
    """

    def __init__(self, program: Program, target: str, routed: Mapping[str, RoutedFFN]) -> None:
        self.program, self.dtype = program, stored_dtype(program)
        self.ffns = {n: self._ffn(r, target) for n, r in routed.items()}
        self.chosen: list[Tensor] = []
        self.own = self.seen = 0

    def run(self, inputs: tuple[Tensor, ...]) -> Tensor:
        """Logits ``[B, S, V]``."""
        self.chosen = []
        with linear_rule(lambda x, w: F.linear(x.float(), w.to(self.dtype).float())):
            return self.program.run(*inputs, replace=self.ffns)[0]

    def _ffn(self, r: RoutedFFN, target: str) -> Any:
        choose = engine_choice(r, target)

        def run(x: Tensor) -> Tensor:
            flat = x.reshape(-1, x.shape[-1])
            chosen = choose(flat)
            self.chosen.append(chosen)
            self.own += int((r.chosen(flat) == chosen).all(1).sum())
            self.seen += len(flat)
            return r.with_experts(x, chosen)

        return run


@contextmanager
def _experts(model: Any) -> Iterator[list[Tensor]]:
    """The indices ``[T, k]`` that every router of the model chooses, in order."""
    found: list[Tensor] = []
    routers = [m for m in model.modules() if type(m).__name__.lower().endswith("topkrouter")]
    hooks = [m.register_forward_hook(lambda m, a, out: found.append(out[2])) for m in routers]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
