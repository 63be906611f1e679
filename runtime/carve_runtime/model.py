"""Load an artifact and use it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from tokenizers import Tokenizer

from carve_runtime.decoder import Session, check_decoder, check_ids
from carve_runtime.engine import Engine, Runner
from carve_runtime.errors import ArtifactError, CarveRuntimeError, RequestError, out_of_memory
from carve_runtime.gates import GateStats
from carve_runtime.manifest import (
    Kind,
    Manifest,
    check_files,
    check_model_folder,
    check_unchanged,
    read_manifest,
    resolve_inside,
)
from carve_runtime.residency import ExpertStats
from carve_runtime.sampling import Sampler
from carve_runtime.sizes import parse_bytes
from carve_runtime.text import Detokenizer, StopFilter, load_tokenizer, tokenizing
from carve_runtime.tvm_engine import TvmEngine, TvmSession, runs_here
from carve_runtime.tvm_index import read_tvm_index

SPLIT, TVM = "onnx-split", "tvm:"
USABLE = ("onnx-cpu", SPLIT, "onnx-cuda")
TOKENIZER_NAME = "tokenizer.json"
# The graph gives logits for every token of a prompt, of which generation needs the last row:
# a long prompt is fed in parts whose logits stay below this.
_PREFILL_LOGITS_BYTES = 128 * 1024 * 1024
_PREFILL_LEAST = 64


@dataclass(frozen=True, slots=True)
class Generation:
    """What a decoder generated.

    Attributes:
        text: the new text, without the prompt, the stop token or the stop string.
        token_ids: the new tokens, without the stop token; those of a stop string are included.
        prompt_tokens: how many tokens the prompt had.
        first_token_s: seconds from the prompt's first step until the first token was chosen.
        gate_stats: what the skip gates skipped, None unless it was asked for.
        tokens_per_s: decoding steps a second after the first token; 0 when there were none.
            The time that the consumer of a stream takes is not counted.
        finish_reason: ``stop`` after a stop token or stop string; ``length`` after
            ``max_new_tokens`` or when the context is full.
    """

    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    first_token_s: float
    tokens_per_s: float
    finish_reason: Literal["stop", "length"]
    gate_stats: GateStats | None = None


def load(
    path: str | os.PathLike[str],
    *,
    target: str | None = None,
    engine: str | None = None,
    threads: int | None = None,
    verify: bool = True,
    memory: int | str | None = None,
    shards: int | str | os.PathLike[str] | None = None,
    policy: str = "lfu",
    prefetch: bool = True,
) -> Model:
    """Check an artifact directory and load one of its targets.

    Args:
        path: the directory that carve wrote.
        target: which of the manifest's targets to load; by default ``onnx-split`` where ``memory``
            or ``shards`` is given, else ``onnx-cpu`` where there is one.
        engine: ``onnx`` or ``tvm``: which engine's target to load where ``target`` is not given; of
            several for TVM the first that this processor can run.
        threads: threads of one operator; None lets onnxruntime take every core.
        verify: compare every file's SHA-256 with the manifest. Without it the paths are still
            checked, but the content is trusted; not so a compiled library's, which is code.
        memory: most bytes for the model's weights as they lie in memory, for example ``300MB``:
            experts that do not fit are read when they are needed. With ``shards`` it is for all
            processes together; each gets a share by what it holds.
        shards: run the experts in so many processes, this one included: as the artifact's
            ``placement.json`` has it where that is for so many devices, else in equal parts. Or
            the path of a placement. Where an expert has several copies, a step takes the one on the
            device with the least to do.
        policy: which expert goes when another needs its room: ``lfu`` or ``lru``.
        prefetch: read the experts that a layer will probably take before it is reached.

    Raises:
        ArtifactError: when the directory is missing, damaged or unsafe, see its codes.
        RequestError: ``argument`` when ``threads`` is below 1 or the arguments do not go together,
            ``memory`` when the budget is below the least that works.
        CarveRuntimeError: ``shard`` when a process cannot load its experts, ``memory`` when there
            is too little.
    """
    if threads is not None and threads < 1:
        raise RequestError("argument", f"threads must be >= 1: {threads}")
    manifest = read_manifest(path)
    root = Path(path).resolve()
    budget = None if memory is None else parse_bytes(memory, "memory")
    split = budget is not None or shards is not None
    name = target or _default_target(root, manifest, split, engine)
    if name not in manifest.targets or not _usable(name):
        usable = sorted(filter(_usable, manifest.targets))
        raise ArtifactError(
            "target",
            f"{root} has no target {name!r} that this runtime can run",
            f"usable targets: {', '.join(usable) or 'none'}"
            + ("; memory and shards need onnx-split (carve convert --target)" if split else ""),
        )
    if split and name != SPLIT:
        raise RequestError("argument", f"memory and shards need the target {SPLIT}, not {name}")
    seen = check_files(root, manifest, verify=verify)
    graph = check_model_folder(root, manifest, manifest.targets[name])
    tokenizer, pad = None, 0
    if TOKENIZER_NAME in manifest.files:
        truncate = manifest.model.max_length if manifest.kind == "encoder" else 0
        tokenizer, pad = load_tokenizer(resolve_inside(root, TOKENIZER_NAME), truncate)
    runner: Runner
    try:
        if name.startswith(TVM):
            runner = _load_tvm(root, manifest, manifest.targets[name].model, threads)
        elif name == SPLIT:
            from carve_runtime.load_split import load_split

            runner = load_split(
                root,
                manifest,
                manifest.targets[name].model,
                threads=threads,
                memory=budget,
                shards=shards,
                policy=policy,
                prefetch=prefetch,
            )
        else:
            runner = Engine(graph, name, threads)
    except MemoryError as error:
        raise out_of_memory("the model", error) from error
    try:
        if manifest.kind == "decoder":
            check_decoder(runner, manifest.model, masked=not name.startswith(TVM))
        check_unchanged(root, seen)
    except BaseException:
        runner.close()
        raise
    return Model(manifest, runner, tokenizer, pad, name)


def _usable(target: str) -> bool:
    return target in USABLE or target.startswith(TVM)


def _load_tvm(root: Path, manifest: Manifest, model: str, threads: int | None) -> TvmEngine:
    index = read_tvm_index(root, manifest.files, model)
    # A library is code: its content is compared whatever the caller said of the others.
    listed = [p.relative_to(root).as_posix() for p in index.codes]
    check_files(root, replace(manifest, files={n: manifest.files[n] for n in listed}), verify=True)
    return TvmEngine(index, threads)


def _default_target(root: Path, manifest: Manifest, split: bool, engine: str | None) -> str:
    """The split form where it is asked for, else the first of the engine's that is there."""
    if engine not in (None, "onnx", "tvm"):
        raise RequestError("argument", f"engine {engine!r:.40} is neither 'onnx' nor 'tvm'")
    if engine == "tvm":
        compiled = [t for t in manifest.targets if t.startswith(TVM)]
        for name in compiled:
            if runs_here(read_tvm_index(root, manifest.files, manifest.targets[name].model)):
                return name
        return compiled[0] if compiled else TVM
    there = [t for t in USABLE if t in manifest.targets]
    return SPLIT if split or not there else there[0]


class Model:
    """A loaded artifact; threads may share it.

    Attributes:
        manifest: what the artifact says of itself.
        target: which of its targets is loaded.
        tokenizer: its tokenizer, or None. It neither pads nor, for decoders, truncates.
        max_length: the longest context in tokens; 0 when the model has no such limit.
    """

    def __init__(
        self,
        manifest: Manifest,
        engine: Runner,
        tokenizer: Tokenizer | None,
        pad: int,
        target: str = "onnx-cpu",
    ) -> None:
        self.manifest = manifest
        self.target = target
        self.tokenizer = tokenizer
        self.max_length = manifest.model.max_length
        self._engine = engine
        self._pad = pad

    @property
    def expert_stats(self) -> ExpertStats | None:
        """What a split model found in memory, read and predicted; None for any other."""
        experts = getattr(self._engine, "experts", None)
        return None if experts is None else experts.stats

    def close(self) -> None:
        """End the processes and threads that a split model has; it cannot be used afterwards."""
        self._engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _require(self, kind: Kind, what: str) -> None:
        if self.manifest.kind != kind:
            raise RequestError(
                "kind",
                f"{what} needs the artifact of a {kind}, and this is a {self.manifest.kind}",
                {"decoder": "use generate", "encoder": "use embed", "module": "use run"}[
                    self.manifest.kind
                ],
            )

    @property
    def input_names(self) -> tuple[str, ...]:
        """The graph's inputs, in its order."""
        return tuple(self._engine.inputs)

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        """Run the ONNX graph as it is, for an artifact of any kind.

        Args:
            feeds: an array for every input of the graph.

        Returns:
            Every output, in the graph's order.

        Raises:
            RequestError: ``inputs`` when names, shapes or dtypes are not the graph's.
        """
        return self._engine.run(feeds)

    # Decoders

    def start(self, *, gates: str = "token", stats: bool = False) -> Session:
        """Start a sequence with an empty cache of its own.

        Args:
            gates: ``token``, ``sequence`` or ``off``, see `carve_runtime.gates.Gates`.
            stats: keep what the gates skip.

        Raises:
            RequestError: ``kind`` when this is not a decoder, ``argument`` for unknown ``gates``.
        """
        self._require("decoder", "start")
        engine: Any = self._engine
        kind = TvmSession if isinstance(engine, TvmEngine) else Session
        return kind(engine, self.manifest.model, gates=gates, stats=stats)

    def logits(self, ids: Sequence[int] | NDArray[np.integer]) -> NDArray[np.float32]:
        """Logits float32 [S, V] after each of the token ids [S], in one pass.

        Raises:
            RequestError: as `Session.step`, and ``kind`` when this is not a decoder.
        """
        return self.start().step(ids)

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = None,
        stop: Sequence[str] = (),
        on_token: Callable[[int], object] | None = None,
        gates: str = "token",
        stats: bool = False,
    ) -> Generation:
        """Continue a prompt.

        Args:
            prompt: text, encoded with the tokenizer's own special tokens, or token ids.
            max_new_tokens: at most so many new tokens; fewer when the context is full.
            temperature: 0 is greedy; see `Sampler` for this, ``top_k`` and ``top_p``.
            top_k: sample from so many tokens; 0 does not restrict.
            top_p: sample from this much probability; 1 does not restrict.
            seed: makes sampling reproducible.
            stop: texts that end the generation, and are not part of it.
            on_token: called with every new token id.
            gates: ``token``, ``sequence`` or ``off``, see `carve_runtime.gates.Gates`.
            stats: give ``gate_stats`` with the result.

        Raises:
            RequestError: ``kind`` when this is not a decoder, ``context-length``,
                ``empty-prompt``, ``token-id``, ``no-tokenizer``, or ``argument``.
        """
        stream = self.stream(
            prompt,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            stop=stop,
            on_token=on_token,
            gates=gates,
            stats=stats,
        )
        while True:
            try:
                next(stream)
            except StopIteration as done:
                generation: Generation = done.value
                return generation

    def stream(
        self,
        prompt: str | Sequence[int],
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = None,
        stop: Sequence[str] = (),
        on_token: Callable[[int], object] | None = None,
        gates: str = "token",
        stats: bool = False,
    ) -> Generator[str, None, Generation]:
        """Continue a prompt and yield the text in pieces as soon as they are certain.

        A character whose UTF-8 spans tokens comes whole, and no part of a stop string comes.
        The arguments and errors are those of `generate`; errors in the request are raised
        here, before the first piece is asked for.

        Returns:
            An iterator of non-empty strings; as a generator it returns the `Generation`.
        """
        self._require("decoder", "generate")
        sampler = Sampler(temperature, top_k, top_p, seed)
        stops = StopFilter(stop)
        if max_new_tokens < 1:
            raise RequestError("argument", f"max_new_tokens must be >= 1: {max_new_tokens}")
        if stop and self.tokenizer is None:
            raise RequestError("no-tokenizer", "stop strings need a tokenizer")
        ids = self._prompt_ids(prompt)
        session = self.start(gates=gates, stats=stats)
        return self._generate(ids, max_new_tokens, sampler, stops, on_token, session, stats)

    def _prompt_ids(self, prompt: str | Sequence[int]) -> NDArray[np.int64]:
        info = self.manifest.model
        ids = self._encode(prompt) if isinstance(prompt, str) else prompt
        if len(ids) == 0:
            if info.bos_token_id is None:
                raise RequestError("empty-prompt", "the prompt has no tokens")
            ids = [info.bos_token_id]
        if len(ids) > info.max_length:
            raise RequestError(
                "context-length",
                f"the prompt has {len(ids)} tokens, the model's context is {info.max_length}",
                "shorten the prompt",
            )
        return check_ids(ids, info.vocab_size)

    def _encode(self, text: str) -> list[int]:
        if self.tokenizer is None:
            raise RequestError("no-tokenizer", f"the artifact has no {TOKENIZER_NAME}")
        with tokenizing("the tokenizer cannot encode the prompt"):
            return list(self.tokenizer.encode(text).ids)

    def _generate(
        self,
        ids: NDArray[np.int64],
        max_new_tokens: int,
        sampler: Sampler,
        stops: StopFilter,
        on_token: Callable[[int], object] | None,
        session: Session,
        stats: bool,
    ) -> Generator[str, None, Generation]:
        info = self.manifest.model
        detokenizer = Detokenizer(self.tokenizer)
        tokens: list[int] = []
        text: list[str] = []
        finish: Literal["stop", "length"] = "length"
        steps, decode_s = 0, 0.0

        began = time.perf_counter()
        part = max(_PREFILL_LEAST, _PREFILL_LOGITS_BYTES // (4 * info.vocab_size))
        for at in range(0, ids.size, part):
            logits = session.step(ids[at : at + part], rows=1)[-1]
        token = sampler(logits)
        first_token_s = time.perf_counter() - began

        while True:
            if token in info.eos_token_ids:
                finish = "stop"
                break
            tokens.append(token)
            if on_token is not None:
                on_token(token)
            if piece := stops.feed(detokenizer.feed(token)):
                text.append(piece)
                yield piece
            if stops.stopped:
                finish = "stop"
                break
            if len(tokens) >= max_new_tokens or session.length >= info.max_length:
                break
            began = time.perf_counter()
            token = sampler(session.step([token])[-1])
            decode_s += time.perf_counter() - began
            steps += 1

        rest = stops.feed(detokenizer.flush())
        if stops.stopped:
            finish = "stop"
        if rest := rest + stops.flush():
            text.append(rest)
            yield rest
        return Generation(
            text="".join(text),
            token_ids=tuple(tokens),
            prompt_tokens=int(ids.size),
            first_token_s=first_token_s,
            tokens_per_s=steps / decode_s if steps else 0.0,
            finish_reason=finish,
            gate_stats=session.gate_stats if stats else None,
        )

    # Encoders

    def hidden(
        self, ids: ArrayLike, attention_mask: ArrayLike | None = None
    ) -> NDArray[np.float32]:
        """An encoder's hidden states.

        Args:
            ids: token ids [B, S].
            attention_mask: 1 for tokens and 0 for padding, [B, S]; None when nothing is padded.

        Returns:
            Float32 [B, S, d].

        Raises:
            RequestError: ``kind`` when this is not an encoder, ``inputs`` when it takes no
                token ids or the shapes are wrong.
        """
        self._require("encoder", "hidden")
        tokens = np.asarray(ids, np.int64)
        mask = np.ones_like(tokens) if attention_mask is None else attention_mask
        feeds = {"input_ids": tokens, "attention_mask": np.asarray(mask, np.int64)}
        outputs = self.run({name: a for name, a in feeds.items() if name in self._engine.inputs})
        return np.asarray(outputs[0], np.float32)

    def embed(self, texts: Sequence[str], *, batch_size: int = 32) -> NDArray[np.float32]:
        """Embed texts as the manifest says: mean or first token, normalised or not.

        Args:
            texts: the texts; each is truncated to the model's maximum.
            batch_size: texts a run; those of like length run together, to pad little.

        Returns:
            Float32 [n, d], in the order of ``texts``.

        Raises:
            RequestError: ``kind`` when this is not an encoder, ``no-tokenizer``,
                    ``no-pooling`` when the artifact does not say how to pool, ``empty-prompt``
                when a text has no tokens, or ``argument``.
            CarveRuntimeError: ``non-finite`` when an embedding is NaN or infinite.
        """
        self._require("encoder", "embed")
        info = self.manifest.model
        if self.tokenizer is None:
            raise RequestError("no-tokenizer", f"the artifact has no {TOKENIZER_NAME}", "use run")
        if info.pooling is None:
            raise RequestError("no-pooling", "the artifact has no pooling", "use hidden")
        if isinstance(texts, str) or batch_size < 1:
            raise RequestError("argument", "embed takes a sequence of texts and batch_size >= 1")
        if not texts:
            width = next(iter(self._engine.outputs.values())).shape[-1]
            return np.zeros((0, width or 0), np.float32)
        with tokenizing("the tokenizer cannot encode the texts"):
            encoded = [encoding.ids for encoding in self.tokenizer.encode_batch(list(texts))]
        if not all(encoded):
            raise RequestError("empty-prompt", f"text {encoded.index([])} has no tokens")
        order = sorted(range(len(encoded)), key=lambda index: len(encoded[index]))
        batches = [order[at : at + batch_size] for at in range(0, len(order), batch_size)]
        pooled = [self._embed_batch([encoded[index] for index in batch]) for batch in batches]
        result = np.empty((len(encoded), pooled[0].shape[1]), np.float32)
        result[order] = np.concatenate(pooled)
        return result

    def _embed_batch(self, encoded: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        shape = len(encoded), max(map(len, encoded))
        ids, mask = np.full(shape, self._pad, np.int64), np.zeros(shape, np.int64)
        for row, tokens in enumerate(encoded):
            ids[row, : len(tokens)] = tokens
            mask[row, : len(tokens)] = 1
        hidden = self.hidden(ids, mask)
        if self.manifest.model.pooling == "cls":
            pooled = hidden[:, 0]
        else:
            # where, not a product: padding may hold anything, NaN included.
            total = hidden.sum(axis=1, where=mask[:, :, None] == 1)
            pooled = total / mask.sum(axis=1, keepdims=True).astype(np.float32)
        if self.manifest.model.normalize:
            norm = np.linalg.norm(pooled, axis=1, keepdims=True)
            pooled = pooled / np.maximum(norm, 1e-12)
        if not np.isfinite(pooled).all():
            raise CarveRuntimeError("non-finite", "the model's embeddings are not finite")
        return np.asarray(pooled, np.float32)
