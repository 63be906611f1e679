"""What a conversion of a checkpoint starts from: its program, and its texts in batches."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from carve.calibration import Batch, load_tokenizer, read_text, text_batches
from carve.capture import capture_transformers, load_for_capture
from carve.checkpoint import Checkpoint
from carve.config import ConvertConfig
from carve.errors import UserError
from carve.lineup import Tokens, default_tokens
from carve.program import Program


@dataclass(frozen=True)
class Prepared:
    """A captured checkpoint with the tokens it is to have, to calibrate on and ``held`` out.

    ``tracing``: seconds that `carve.capture.capture_transformers` took.
    """

    checkpoint: Checkpoint
    program: Program
    asked: Tokens
    batches: list[Batch]
    held: list[Batch]
    tracing: float


def prepare(
    path: Path, config: ConvertConfig, clock: Callable[[], float] = time.perf_counter
) -> Prepared:
    """Capture a checkpoint and tokenize what it is calibrated and judged on.

    Raises:
        UserError: it cannot be read or captured, takes no text, or a text is too short.
    """
    checkpoint = Checkpoint.open(path)
    texts = [
        read_text(config.calibration, "calibration.txt"),
        read_text(config.evaluation, "evaluation.txt"),
    ]
    tokenizer = load_tokenizer(path)
    model = load_for_capture(checkpoint)
    began = clock()
    program = capture_transformers(model)
    tracing = clock() - began
    if program.inputs[0] != "input_ids":
        raise UserError(
            "text",
            f"{checkpoint.architecture} takes no text to calibrate on",
            "convert it from Python: carve.convert(module, example=..., calibration=...)",
        )
    _check_vocabulary(program, tokenizer.get_vocab_size())
    length = min(config.length, program.max_length)
    count = default_tokens(config, checkpoint.num_parameters)
    batches, held = (
        text_batches(program, tokenizer, text, length, tokens)
        for text, tokens in zip(texts, (count.calibration, count.final), strict=True)
    )
    return Prepared(checkpoint, program, count, batches, held, tracing)


def _check_vocabulary(program: Program, size: int) -> None:
    vocabulary = program.config.get("vocab_size")
    if isinstance(vocabulary, int) and size > vocabulary:
        raise UserError(
            "tokenizer",
            f"the tokenizer has {size} entries, the model {vocabulary}",
            "use the tokenizer that belongs to the model",
        )
