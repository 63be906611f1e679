"""Quality on held-out text: perplexity, KL and top-1 agreement, or cosine for encoders."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from carve.calibration import Batch, limit_batches
from carve.program import Program
from carve.sites import FFN

Forward = Callable[[tuple[Tensor, ...]], Tensor]


@dataclass(frozen=True)
class LanguageQuality:
    """A language model beside its dense original.

    ``perplexity`` is ``exp`` of the mean next-token cross-entropy in nats; ``kl`` the mean of
    ``KL(dense || routed)`` over tokens, in nats; ``top1_agreement`` the share of tokens where the
    two predict the same token.
    """

    perplexity: float
    dense_perplexity: float
    kl: float
    top1_agreement: float
    tokens: int

    @property
    def loss(self) -> float:
        """Increase of log-perplexity over dense, in nats."""
        return math.log(self.perplexity / self.dense_perplexity)

    @property
    def distance(self) -> float:
        """From the dense one: ``kl``."""
        return self.kl


@dataclass(frozen=True)
class EmbeddingQuality:
    """An encoder beside its dense original: cosine of mean-pooled embeddings."""

    cosine_mean: float
    cosine_p5: float
    tokens: int

    @property
    def loss(self) -> float:
        """``1 - cosine_mean``."""
        return 1.0 - self.cosine_mean

    @property
    def distance(self) -> float:
        """From the dense one: the loss itself."""
        return self.loss


Quality = LanguageQuality | EmbeddingQuality


class Evaluator:
    """Held-out batches with the dense program's results, so that each comparison runs one model.

    Args:
        dense: the program before any pass.
        batches: held-out inputs.
        keep_bytes: results of the dense program are kept up to this size, in the order of the
            batches, and the batches beyond it are dropped.
    """

    def __init__(self, dense: Program, batches: Sequence[Batch], keep_bytes: int = 1 << 30) -> None:
        self.kind = dense.kind
        self.batches: list[Batch] = []
        self.reference: list[Tensor] = []
        kept = 0
        for batch in batches:
            out = dense.run(*batch.inputs)[0]
            kept += out.numel() * 2
            if self.reference and kept > keep_bytes:
                break
            self.batches.append(batch)
            self.reference.append(out.half() if self.kind == "decoder" else out)

    def limited(self, tokens: int) -> Evaluator:
        """The same comparison on the first batches, about ``tokens`` tokens."""
        small = object.__new__(Evaluator)
        small.kind = self.kind
        small.batches = limit_batches(self.batches, tokens)
        small.reference = [
            kept[: len(batch.inputs[0])]
            for batch, kept in zip(small.batches, self.reference, strict=False)
        ]
        return small

    def loss(
        self,
        program: Program,
        replace: Mapping[str, FFN] | None = None,
        labels: float = 0.0,
    ) -> float:
        """KL to the dense program, or 1 - mean cosine for encoders.

        Of a decoder the increase of log-perplexity over the dense one counts with the weight
        ``labels``, and the KL with the rest.
        """
        quality = self(program, replace)
        return (1.0 - labels) * quality.distance + labels * quality.loss

    def __call__(self, program: Program, replace: Mapping[str, FFN] | None = None) -> Quality:
        """Quality of ``program`` in torch, with ``replace`` as in `Program.run`."""
        return self.compare(lambda inputs: program.run(*inputs, replace=replace)[0])

    def compare(self, forward: Forward) -> Quality:
        """Quality of anything that maps a batch's inputs to logits or hidden states."""
        if self.kind == "decoder":
            return self._language(forward)
        return self._embedding(forward)

    def _language(self, forward: Forward) -> LanguageQuality:
        loss = dense_loss = kl = same = 0.0
        count = 0
        for batch, kept in zip(self.batches, self.reference, strict=True):
            target = batch.inputs[0][:, 1:].reshape(-1)
            new = forward(batch.inputs)[:, :-1].flatten(0, 1).float()
            old = kept[:, :-1].flatten(0, 1)
            for rows in torch.split(torch.arange(len(target)), 1024):
                p, q = old[rows].float().log_softmax(-1), new[rows].log_softmax(-1)
                loss += F.nll_loss(q, target[rows], reduction="sum").item()
                dense_loss += F.nll_loss(p, target[rows], reduction="sum").item()
                kl += (p.exp() * (p - q)).sum().item()
                same += (p.argmax(-1) == q.argmax(-1)).sum().item()
            count += len(target)
        return LanguageQuality(
            float(torch.tensor(loss / count).exp()),
            float(torch.tensor(dense_loss / count).exp()),
            kl / count,
            same / count,
            count,
        )

    def _embedding(self, forward: Forward) -> EmbeddingQuality:
        cosines, count = [], 0
        for batch, old in zip(self.batches, self.reference, strict=True):
            new = forward(batch.inputs)
            cosines.append(
                F.cosine_similarity(pool(new, batch.mask), pool(old, batch.mask), dim=-1)
            )
            count += int(batch.mask.sum()) if batch.mask is not None else new.shape[0]
        values = torch.cat(cosines).double()
        return EmbeddingQuality(float(values.mean()), float(values.quantile(0.05)), count)


def pool(states: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over the counted tokens of ``[B, S, d]``; ``[B, ...]`` results are flattened."""
    if mask is None or states.ndim != 3:
        return states.flatten(1)
    weight = mask[..., None].to(states.dtype)
    return (states * weight).sum(1) / weight.sum(1)


def as_dict(quality: Quality) -> dict[str, float]:
    """The figures by name, for JSON."""
    return asdict(quality)
