"""What passes that train the whole program share: its loss against the dense one, and the loop."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from carve import training_state
from carve.calibration import Batch
from carve.passbase import Context
from carve.program import Kind
from carve.tuning import cosine


def divergence(kind: Kind, want: Tensor, have: Tensor, batch: Batch) -> Tensor:
    """How far a program's first result is from the dense one's, a scalar with a gradient.

    ``E_t KL(p(. | x_<t) || q(. | x_<t))`` in nats for a decoder, with ``p`` of the logits ``want``
    and ``q`` of ``have`` ``[B, S, V]``; else ``|have - want|^2 / |want|^2`` over tokens that count.
    Source: Hinton et al. (arXiv 1503.02531), temperature 1.
    """
    want, have = want.float(), have.float()
    if kind == "decoder":
        p, q = want.flatten(0, 1).log_softmax(-1), have.flatten(0, 1).log_softmax(-1)
        return F.kl_div(q, p, log_target=True, reduction="batchmean")
    if batch.mask is not None and want.ndim == 3:
        want, have = want[batch.mask], have[batch.mask]
    return (have - want).square().sum() / want.square().sum()


def in_parts(batches: Sequence[Batch], tokens: int) -> list[Batch]:
    """The batches in parts of whole rows, each of about ``tokens`` tokens at the most."""
    found = []
    for batch in batches:
        count = len(batch.inputs[0])
        size = max(1, tokens * count // max(1, batch.tokens))
        found += [batch.rows(i, min(count, i + size)) for i in range(0, count, size)]
    return found


def in_order(batches: Sequence[Batch], tokens: int, generator: torch.Generator) -> list[Batch]:
    """Batches in a new order each time round, as many as ``tokens`` tokens allow."""
    sizes = [b.tokens for b in batches]

    def each() -> Iterator[Batch]:
        left = tokens
        while True:
            for i in torch.randperm(len(sizes), generator=generator).tolist():
                if left < sizes[i]:
                    return
                left -= sizes[i]
                yield batches[i]

    return list(each())


def train(
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    batches: Sequence[Batch],
    loss: Callable[[Batch], Tensor],
    context: Context,
    label: str,
    *,
    save_seconds: float,
    after_step: Callable[[], object] = lambda: None,
) -> list[float]:
    """A step on each of ``batches``, with a cosine and a bound on the gradient.

    Groups of the optimizers have their step size as ``base``. The state is kept in
    ``context.partial`` every ``save_seconds``, and training goes on from the one that is there.

    Returns:
        The losses, also of steps done before the run was killed.
    """
    losses: list[float] = []
    first = training_state.load(context.partial, model, optimizers, losses)
    trained = [p for o in optimizers for group in o.param_groups for p in group["params"]]
    warmup = max(1, min(20, len(batches) // 8))
    saved = time.monotonic()
    for step in context.progress(range(first, len(batches)), label):
        value = loss(batches[step])
        model.zero_grad(set_to_none=True)
        value.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["base"] * cosine(step, len(batches), warmup)
            optimizer.step()
        after_step()
        losses.append(value.item())
        if time.monotonic() - saved > save_seconds:
            training_state.save(context.partial, model, optimizers, step + 1, losses)
            saved = time.monotonic()
    return losses


def quarters(losses: Sequence[float]) -> list[float]:
    """Mean loss over quarters of the steps."""
    size = max(1, len(losses) // 4)
    parts = [losses[i : i + size] for i in range(0, len(losses), size)][:4]
    return [sum(p) / len(p) for p in parts]
