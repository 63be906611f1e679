"""The process of a shard: ``python -m carve_runtime.shard_process``, started by `shards`.

It ends when its input does, however the first process ended.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import IO

from carve_runtime.experts import ExpertFile, LocalExperts
from carve_runtime.frames import (
    DONE,
    EXPECT,
    FAILED,
    STATS,
    as_bytes,
    receive,
    send,
    unpack_experts,
    unpack_rows,
)
from carve_runtime.heap import give_back_freed
from carve_runtime.index import read_index
from carve_runtime.manifest import read_manifest


def _serve(source: IO[bytes], sink: IO[bytes]) -> None:
    """Load what the first frame names, then answer until the input ends."""
    request = json.loads(receive(source))
    if request["budget"] is not None:
        give_back_freed()
    root = Path(request["artifact"])
    index = read_index(root, read_manifest(root).files, request["model"])
    experts = LocalExperts(
        ExpertFile(index, {int(form): cost for form, cost in request["costs"].items()}),
        [(int(i), int(e)) for i, e in request["keys"]],
        budget=request["budget"],
        policy=request["policy"],
        prefetch=request["prefetch"],
    )
    send(sink, DONE)
    while data := receive(source):
        if data[:1] == STATS:
            send(sink, DONE, json.dumps(asdict(experts.stats)).encode())
            continue
        layer, numbers = unpack_experts(data)
        if data[:1] == EXPECT:
            experts.fetch(layer, numbers)
            continue
        x, rows = unpack_rows(data, index.layers[layer].width)
        found = experts.each(layer, x, list(zip(numbers, rows, strict=True)))
        send(sink, DONE, *(as_bytes(out) for _, out in found))
    experts.close()


def main() -> int:
    """The entry."""
    import signal

    # A terminal sends its interrupt to all; the first process ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    source, sink = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever else is printed must not be taken for an answer
    try:
        _serve(source, sink)
    except BrokenPipeError:
        return 1
    except Exception as error:
        try:
            send(sink, FAILED, str(error).encode())
        except OSError:
            return 1
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
