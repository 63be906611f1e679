"""A split model: segments of the trunk in this process, experts wherever they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from carve_runtime.engine import Engine, Port, check_feeds, value
from carve_runtime.errors import ArtifactError, CarveRuntimeError, RequestError
from carve_runtime.experts import Experts
from carve_runtime.index import Layer, SplitIndex


class Trunk:
    """The segments of a split model, loaded and checked against its index.

    Raises:
        ArtifactError: ``model`` when onnxruntime refuses one, or they do not fit together.
    """

    def __init__(self, index: SplitIndex, threads: int | None) -> None:
        self.layers = index.layers
        self.segments = [Engine(path, "onnx-cpu", threads) for path in index.segments]
        last = len(self.segments) - 1
        self.made: dict[str, int] = {}
        self.inputs: dict[str, Port] = {}
        self.optional: dict[str, Port] = {}
        self.wanted = set(index.outputs)
        streams = {n for e in index.layers if e.predictor for n in e.predictor.stream}
        for k, segment in enumerate(self.segments):
            summed = {f"y.{j}" for j in range(k)}
            for name, port in segment.inputs.items():
                if name not in self.made and name not in summed:
                    self.inputs[name] = port
            self.optional |= segment.optional
            if k < last:
                self._check_ports(index.layers[k], k, segment.outputs)
            for name in segment.outputs:
                if name in self.made or name.startswith("y."):
                    raise _refuse(f"{name!r:.60} is made twice")
                self.made[name] = k
        missing = (self.wanted | streams) - self.made.keys()
        for k, layer in enumerate(index.layers):
            if layer.predictor is not None:
                early = [n for n in layer.predictor.stream if self.made.get(n, k) >= k]
                missing.update(early)
        given = self.inputs.keys() | self.optional.keys()
        if missing or given & self.made.keys() or self.inputs.keys() & self.optional.keys():
            raise _refuse(f"no segment makes {sorted(missing)[:3]}")
        self.outputs = {n: self.segments[self.made[n]].outputs[n] for n in index.outputs}

    def _check_ports(self, layer: Layer, k: int, outputs: Mapping[str, Port]) -> None:
        for name, width in ((f"x.{k}", layer.width), (f"routes.{k}", layer.experts)):
            if name not in outputs or not outputs[name].is_float32(None, width):
                raise _refuse(f"segment {k} does not give {name}")

    def handed(self, k: int) -> list[str]:
        """What segment ``k`` makes for others, not for the caller."""
        return [n for n in self.segments[k].outputs if n not in self.wanted]


def _refuse(what: str) -> ArtifactError:
    return ArtifactError("model", f"the split model's segments: {what}", "compile it again")


class SplitBinding:
    """Inputs and outputs of a run, bound to the segments that take and make them."""

    def __init__(self, trunk: Trunk) -> None:
        self._trunk = trunk
        self.parts = [s.binding() for s in trunk.segments]
        self._takers: dict[str, list[Any]] = {n: [] for n in (*trunk.inputs, *trunk.optional)}
        for part, segment in zip(self.parts, trunk.segments, strict=True):
            for name in (segment.inputs.keys() | segment.optional.keys()) & self._takers.keys():
                self._takers[name].append(part)
        # Results come in the order in which they were bound first.
        for k, part in enumerate(self.parts):
            for name in trunk.handed(k):
                part.bind_output(name, "cpu")

    def bind_cpu_input(self, name: str, array: NDArray[Any]) -> None:
        """Bind an array, which has to live until the run."""
        for part in self._takers[name]:
            part.bind_cpu_input(name, array)

    def bind_ortvalue_input(self, name: str, given: Any) -> None:
        """Bind an OrtValue."""
        for part in self._takers[name]:
            part.bind_ortvalue_input(name, given)

    def bind_ortvalue_output(self, name: str, given: Any) -> None:
        """Bind an OrtValue that a result is written to."""
        self.parts[self._trunk.made[name]].bind_ortvalue_output(name, given)

    def bind_output(self, name: str) -> None:
        """Let onnxruntime make a result."""
        self.parts[self._trunk.made[name]].bind_output(name, "cpu")


class SplitEngine:
    """Runs segments and experts in turn; as safe between threads as its experts.

    Args:
        trunk: the segments.
        experts: what runs the experts.
    """

    def __init__(self, trunk: Trunk, experts: Experts) -> None:
        self._trunk, self.experts = trunk, experts
        self.inputs, self.outputs = trunk.inputs, trunk.outputs
        self.optional = trunk.optional

    def binding(self) -> SplitBinding:
        """A new binding, used as onnxruntime's own."""
        return SplitBinding(self._trunk)

    def place(self, array: NDArray[Any]) -> Any:
        """An OrtValue over the memory of an array."""
        return value(array)

    def run_bound(self, binding: SplitBinding, *, shrink: bool) -> None:
        """Run what is bound, see `carve_runtime.engine.Engine.run_bound`.

        Raises:
            CarveRuntimeError: ``run`` when onnxruntime fails, ``shard`` when a process is gone.
        """
        made: dict[str, Any] = {}
        trunk = self._trunk
        for k, (segment, part) in enumerate(zip(trunk.segments, binding.parts, strict=True)):
            for name in segment.inputs:
                if name in made:
                    part.bind_ortvalue_input(name, made[name])
            handed = trunk.handed(k)
            for name in handed:
                part.bind_output(name, "cpu")
            segment.run_bound(part, shrink=shrink)
            made.update(zip(handed, part.get_outputs(), strict=False))
            if k < len(trunk.layers):
                x, routes = (made[f"{n}.{k}"].numpy() for n in ("x", "routes"))
                y = self.experts.run(k, x, routes)
                made[f"y.{k}"] = value(y)
                if k + 1 < len(trunk.layers) and self.experts.asks(k + 1):
                    self._expect(trunk.layers[k + 1], k + 1, made, y)

    def _expect(self, layer: Layer, k: int, made: Mapping[str, Any], y: NDArray[Any]) -> None:
        """Guess the scores of layer ``k`` from the stream ``h`` before its attention.

        ``h / rms(h) W' + b``: Read-ME (arXiv 2410.19123) and SmallThinker (arXiv 2507.20984) place
        routers there, so that experts are read while attention runs.
        """
        if layer.predictor is None:
            return
        h = y.copy()
        for name in layer.predictor.stream:
            part = made[name].numpy()
            if part.size != h.size:
                raise CarveRuntimeError("run", f"{name} is no stream: its shape is {part.shape}")
            h += part.reshape(h.shape)
        h /= np.sqrt(np.mean(np.square(h), axis=1, keepdims=True) + 1e-6)
        self.experts.expect(k, h @ layer.predictor.weight.T + layer.predictor.bias)

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        """Run with numpy inputs; returns every output in order.

        Raises:
            RequestError: ``inputs`` when they do not fit.
        """
        check_feeds(self, feeds)
        for name, port in self.inputs.items():
            if not port.takes(feeds[name].shape):
                raise RequestError(
                    "inputs", f"{name} has shape {feeds[name].shape}, not {port.shape}"
                )
        values = {n: value(np.ascontiguousarray(a)) for n, a in feeds.items()}
        return [v.numpy() for v in self.run_values(list(self.outputs), values)]

    def run_values(self, outputs: Sequence[str], feeds: Mapping[str, Any]) -> list[Any]:
        """Run with OrtValues in and out.

        Raises:
            CarveRuntimeError: as `run_bound`.
        """
        binding = self.binding()
        for name, given in feeds.items():
            binding.bind_ortvalue_input(name, given)
        for name in self.outputs:
            binding.bind_output(name)
        self.run_bound(binding, shrink=False)
        found: dict[str, Any] = {}
        for k, part in enumerate(binding.parts):
            names = self._trunk.handed(k) + [n for n in self.outputs if self._trunk.made[n] == k]
            found.update(zip(names, part.get_outputs(), strict=True))
        return [found[name] for name in outputs]

    def close(self) -> None:
        """End the experts' processes and threads."""
        self.experts.close()
