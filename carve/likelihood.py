"""How likely an artifact finds a text, as lm-evaluation-harness asks; without it and without torch.

The conventions are those of its Hugging Face models, so that figures of an artifact can stand
beside those of its dense original.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from carve.errors import CarveError, UserError

if TYPE_CHECKING:
    import carve_runtime

_STEP_BYTES = 64 << 20
_SETTINGS = ("do_sample", "temperature", "top_k", "top_p", "seed", "until", "max_gen_toks")


class Scorer:
    """Scores and generates with a loaded decoder.

    Args:
        model: the artifact, see `carve_runtime.load`.
        add_bos_token: encode with the tokenizer's special tokens or without them; None leaves it to
            the tokenizer, but for texts that begin with one.

    Raises:
        UserError: it is no decoder, or has no tokenizer.
    """

    def __init__(self, model: carve_runtime.Model, add_bos_token: bool | None = None) -> None:
        if model.manifest.kind != "decoder" or model.tokenizer is None:
            raise UserError("kind", "scoring needs a decoder with a tokenizer")
        self.model, self.add_bos_token = model, add_bos_token
        self.tokenizer = model.tokenizer
        info = model.manifest.model
        self.max_length = info.max_length
        self.eos = next(iter(info.eos_token_ids), None)
        prefix = info.bos_token_id if info.bos_token_id is not None else self.eos
        if prefix is None:
            raise UserError("tokenizer", "the model has neither a first nor an end token")
        self.prefix: int = prefix

    def encode(self, text: str, special: bool | None = None) -> list[int]:
        """Token ids of a text; ``special``: with the tokenizer's special tokens."""
        chosen = self.add_bos_token if special is None else special
        first = self.tokenizer.id_to_token(self.prefix)
        if chosen is None or (special is None and first and text.startswith(first)):
            chosen = not (first and text.startswith(first))
        return list(self.tokenizer.encode(text, add_special_tokens=chosen).ids)

    def score(self, context: Sequence[int], continuation: Sequence[int]) -> tuple[float, bool]:
        """``sum_i log p(continuation_i | what is before it)``, and whether each is the likeliest.

        What does not fit the model's context is cut off at the start of ``context``, which has to
        hold a token at least.

        Raises:
            UserError: the continuation alone does not fit.
            CarveError: ``non-finite`` when the model's logits are.
        """
        if not context or len(continuation) > self.max_length:
            raise UserError(
                "context",
                f"{len(continuation)} tokens are to be scored after {len(context)}; the model's "
                f"context is {self.max_length}",
            )
        ids = [*context, *continuation][-self.max_length - 1 :]
        first = len(ids) - len(continuation)
        step = max(16, _STEP_BYTES // (4 * self.model.manifest.model.vocab_size))
        session = self.model.start()
        total, greedy = 0.0, True
        for at in range(0, len(ids) - 1, step):
            logits = session.step(ids[at : min(at + step, len(ids) - 1)])
            skip = max(0, first - 1 - at)  # row r is what is thought of ids[at + r + 1]
            rows = logits[skip:].astype(np.float64)
            wanted = np.array(ids[at + skip + 1 : at + len(logits) + 1], np.int64)
            if not len(rows):
                continue
            rows -= rows.max(1, keepdims=True)
            given = rows[np.arange(len(wanted)), wanted]
            total += float((given - np.log(np.exp(rows).sum(1))).sum())
            greedy &= bool((rows.argmax(1) == wanted).all())
        if not np.isfinite(total):
            raise CarveError("non-finite", "the model's logits are not finite")
        return total, greedy

    def generate(self, prompt: str, settings: Mapping[str, Any]) -> str:
        """Continue a prompt until one of ``settings["until"]``; greedy unless ``do_sample``.

        Raises:
            UserError: an unknown setting, or no room for what is to be generated.
        """
        for key in settings:
            if key not in _SETTINGS:
                raise UserError("config", f"generation has no setting {key!r}")
        tokens = int(settings["max_gen_toks"])
        if not 0 < tokens < self.max_length:
            raise UserError(
                "context", f"{tokens} new tokens leave no room in a context of {self.max_length}"
            )
        sampled = {k: settings[k] for k in ("top_k", "top_p", "seed") if k in settings}
        warm = float(settings.get("temperature", 1.0))
        found = self.model.generate(
            self.encode(prompt)[-(self.max_length - tokens) :],
            max_new_tokens=tokens,
            stop=[s for s in settings.get("until", ()) if s],
            **({"temperature": warm, **sampled} if settings.get("do_sample") else {}),
        )
        return found.text
