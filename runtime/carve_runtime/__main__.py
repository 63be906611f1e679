"""Generate text from the shell: ``python -m carve_runtime DIR --prompt "..."``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from carve_runtime.errors import CarveRuntimeError, RequestError
from carve_runtime.model import load


def main(argv: Sequence[str] | None = None) -> int:
    """Stream a generation to standard output; returns the exit status.

    1 means that the artifact failed, 2 that it cannot serve the request.
    """
    parser = argparse.ArgumentParser(prog="carve_runtime", description=__doc__)
    parser.add_argument("path", metavar="DIR", help="the directory that carve wrote")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    parser.add_argument("--top-k", type=int, default=0, help="0 does not restrict (default)")
    parser.add_argument("--top-p", type=float, default=1.0, help="1 does not restrict (default)")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--stop", action="append", default=[], help="may be given repeatedly")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--engine", choices=("onnx", "tvm"), help="default: onnx")
    parser.add_argument("--no-verify", action="store_true", help="trust the files' content")
    parser.add_argument("--memory", help="most bytes of weights in memory, for example 300MB")
    parser.add_argument("--shards", type=int, help="run the experts in so many processes")
    args = parser.parse_args(argv)
    try:
        with load(
            args.path,
            engine=args.engine,
            threads=args.threads,
            verify=not args.no_verify,
            memory=args.memory,
            shards=args.shards,
        ) as model:
            for piece in model.stream(
                args.prompt,
                max_new_tokens=args.max_new_tokens,
                temperature=args.temperature,
                top_k=args.top_k,
                top_p=args.top_p,
                seed=args.seed,
                stop=args.stop,
            ):
                sys.stdout.write(piece)
                sys.stdout.flush()
    except CarveRuntimeError as error:
        sys.stderr.write(f"carve_runtime: {error.code}: {error}\n")
        return 2 if isinstance(error, RequestError) else 1
    except KeyboardInterrupt:
        return 130
    sys.stdout.write("\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
