"""An artifact as a model of lm-evaluation-harness: ``pip install 'carve[harness]'``.

    python -m carve.harness run --model carve --model_args path=out --tasks hellaswag

The command line is the harness's own, with ``carve`` among its models. ``model_args``: ``path``,
as in `carve_runtime.load` ``threads`` and ``memory``, and as in the harness's Hugging Face models
``add_bos_token`` and ``max_gen_toks``.
"""

from __future__ import annotations

from typing import Any

import carve_runtime
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm  # type: ignore[import-untyped]

from carve.errors import UserError
from carve.likelihood import Scorer

_UNCHOSEN = "cuda:0"
"""The harness's own default of ``--device``."""


@register_model("carve")
class CarveLM(TemplateLM):  # type: ignore[misc]
    """See the module; requests run one after the other.

    Args:
        path: the artifact's folder.
        threads: see `carve_runtime.load`.
        memory: see `carve_runtime.load`.
        add_bos_token: see `carve.likelihood.Scorer`.
        max_gen_toks: generated where a task does not say.
        batch_size: 1; the runtime takes one sequence at a time.
        device: ``cpu``, or what the harness says where nothing was chosen.

    Raises:
        UserError: an argument that the runtime cannot follow.
    """

    def __init__(
        self,
        path: str,
        threads: int | None = None,
        memory: str | None = None,
        add_bos_token: bool | None = None,
        max_gen_toks: int = 256,
        batch_size: int | str | None = None,
        device: str | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        known = {"max_batch_size": None}
        for key, value in unknown.items():
            if key not in known or value != known[key]:
                raise UserError("config", f"carve's model has no argument {key!r}")
        if str(batch_size or 1) not in ("1", "auto") or device not in (None, "cpu", _UNCHOSEN):
            raise UserError("config", "carve runs sequences one by one, on the CPU")
        model = carve_runtime.load(path, threads=threads, memory=memory)
        self._scorer = Scorer(model, add_bos_token)
        self._max_gen_toks = max_gen_toks
        self._path = path

    @property
    def eot_token_id(self) -> int:
        """The end token, or what stands for it."""
        eos = self._scorer.eos
        return self._scorer.prefix if eos is None else eos

    @property
    def prefix_token_id(self) -> int:
        """What a text without context is scored after."""
        return self._scorer.prefix

    @property
    def max_length(self) -> int:
        """The model's context."""
        return self._scorer.max_length

    @property
    def max_gen_toks(self) -> int:
        """Generated where a task does not say."""
        return self._max_gen_toks

    @property
    def tokenizer_name(self) -> str:
        """Names the tokenizer in the harness's cache of requests."""
        return str(self._path).replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """See `carve.likelihood.Scorer.encode`."""
        return self._scorer.encode(string, add_special_tokens)

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        results = []
        for texts, context, continuation in tqdm(requests, disable=disable_tqdm):
            result = self._scorer.score(context, continuation)
            self.cache_hook.add_partial("loglikelihood", texts, result)
            results.append(result)
        return results

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """The sum over a text's windows, each as long as the model's context."""
        results = []
        for request in tqdm(requests, disable=disable_tqdm):
            (text,) = request.args
            windows = get_rolling_token_windows(
                self.tok_encode(text), self.prefix_token_id, self.max_length, context_len=1
            )
            pairs = map(make_disjoint_window, windows)
            total = sum(self._scorer.score(a, b)[0] for a, b in pairs)
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
            results.append(total)
        return results

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """See `carve.likelihood.Scorer.generate`."""
        results = []
        for request in tqdm(requests, disable=disable_tqdm):
            prompt, given = request.args
            text = self._scorer.generate(prompt, normalize_gen_kwargs(given, self.max_gen_toks))
            self.cache_hook.add_partial("generate_until", request.args, text)
            results.append(text)
        return results


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
