"""What the command line understands."""

from __future__ import annotations

import argparse
from pathlib import Path

from carve.version import __version__


def parser() -> argparse.ArgumentParser:
    """All commands with their arguments."""
    p = argparse.ArgumentParser(
        prog="carve", description="Compile a dense transformer into a routed one."
    )
    p.add_argument("--version", action="version", version=f"carve {__version__}")
    commands = p.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, text: str) -> argparse.ArgumentParser:
        c = commands.add_parser(name, help=text, description=text)
        c.add_argument("--json", action="store_true", help="one JSON object on standard output")
        c.add_argument("-v", "--verbose", action="store_true", help="more of what happens")
        return c

    c = command("convert", "turn a dense checkpoint into a routed artifact")
    c.add_argument(
        "model", help="Hugging Face directory (config.json, safetensors, tokenizer.json)"
    )
    c.add_argument("-o", "--output", help="the artifact's folder (default: MODEL's name + -carved)")
    _request(c)
    c.add_argument(
        "--dump-recipe",
        action="store_true",
        help="print the recipe with every setting of every pass, and convert nothing",
    )
    c.add_argument(
        "--resume", action="store_true", help="go on where a run with the same output stopped"
    )
    c.add_argument(
        "--from", dest="start", metavar="PASS", help="start again at a pass, from the state before"
    )
    c.add_argument("--until", metavar="PASS", help="stop after a pass and keep the state")
    c.add_argument(
        "--keep-state", action="store_true", help="keep the state of all passes when finished"
    )

    c = command("run", "generate text with an artifact")
    c.add_argument("artifact")
    c.add_argument("--prompt", help="the prompt (default: standard input)")
    c.add_argument("--max-tokens", type=int, default=128)
    c.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    c.add_argument("--top-k", type=int, default=0)
    c.add_argument("--top-p", type=float, default=1.0)
    c.add_argument("--seed", type=int)
    c.add_argument("--threads", type=int)
    c.add_argument(
        "--gates",
        choices=("token", "sequence", "off"),
        default="token",
        help="who decides what is skipped: every token (default), the prompt, or nobody",
    )
    _engine(c)
    c.add_argument(
        "--memory",
        help="most bytes of weights in memory, of all shards together, for example 300MB "
        "(needs onnx-split)",
    )
    c.add_argument(
        "--shards",
        type=lambda text: int(text) if text.isdigit() else text,
        help="run the experts in so many processes, or as a placement file says (needs onnx-split)",
    )
    c.add_argument(
        "--policy",
        choices=("lfu", "lru"),
        default="lfu",
        help="with --memory, what goes: experts chosen least of late (default) or least recently",
    )
    c.add_argument("--no-prefetch", action="store_true", help="read experts only when reached")
    c.add_argument(
        "--stats",
        action="store_true",
        help="what the skip gates really skipped, and what experts were found in memory",
    )

    c = command("eval", "quality of an artifact beside its dense original, in its own engine")
    c.add_argument("artifact")
    c.add_argument(
        "--text",
        action="append",
        metavar="FILE",
        help="held-out text, UTF-8; may be given several times (default: the bundled text)",
    )
    c.add_argument("--dense", help="the dense checkpoint, where it has moved")
    _engine(c)
    c.add_argument("--tokens", type=int, default=16_000)

    c = command("bench", "decode and prefill beside the dense model: same engine, same width")
    c.add_argument("artifact")
    c.add_argument("--dense", help="a dense artifact or checkpoint (default: made from the source)")
    c.add_argument("--threads", type=int)
    _engine(c)
    c.add_argument("--repeats", type=int, default=5, help="interleaved pairs")
    c.add_argument("--tokens", type=int, default=24, help="tokens decoded in each")
    c.add_argument(
        "--context", type=int, default=50, help="tokens in the cache when decoding starts"
    )
    c.add_argument("--prefill", type=int, default=256)
    c.add_argument(
        "--no-record", action="store_true", help="leave the result out of the artifact's report"
    )

    c = command("bundle", "a folder that runs on a device: one target, and what runs it there")
    c.add_argument("artifact")
    c.add_argument("--target", required=True, help="one of the artifact's, or onnx for onnx-cpu")
    c.add_argument("-o", "--output", help="the folder (default: the artifact's name + -bundle)")
    c.add_argument(
        "--wheels",
        type=Path,
        help="a folder with TVM's wheels for the device (default: what is installed, or pip's)",
    )

    c = command("plan", "what a conversion will take, before anything long starts")
    c.add_argument("path", help="a checkpoint, or an artifact that was converted with --devices")
    c.add_argument("-o", "--output", help="where the artifact would go (default: as for convert)")
    _request(c)

    c = command("report", "what each pass of a conversion did")
    c.add_argument("artifact", help="an artifact, or a report.json")
    c.add_argument(
        "--html",
        nargs="?",
        const="",
        metavar="FILE",
        help="write it as one offline page (default: report.html in the artifact; diff.html here)",
    )
    c.add_argument("--diff", metavar="OTHER", help="beside another one: what differs from OTHER")

    c = command("list", "the passes or the targets")
    c.add_argument("what", choices=("passes", "targets"))
    return p


def _request(c: argparse.ArgumentParser) -> None:
    """What is asked of a conversion."""
    c.add_argument("--budget", type=float, help="share of the blocks' multiply-accumulates, (0, 1]")
    c.add_argument("--ffn-active", type=float, help="pin the active share of the FFNs instead")
    c.add_argument(
        "--effort",
        help="training allowed: none (closed forms), layer (minutes, default) or full (hours)",
    )
    c.add_argument(
        "--skip",
        type=_skip,
        help="share of tokens that pass round a gated block, or auto to let the allocation choose "
        "(default: 0, no gates)",
    )
    c.add_argument(
        "--bits",
        type=_bits,
        help="16 (unquantized), 8 or 4 (default); auto or an average such as 3 for mixed widths",
    )
    c.add_argument("--size", help="most bytes of the model's files, for example 40MB")
    c.add_argument("--reads", help="most bytes of weights that a token reads, for example 20MB")
    c.add_argument("--devices", help="place the experts on these: a TOML file, or a preset's name")
    c.add_argument(
        "--target",
        help="what to emit, separated by commas, see carve list targets (default: onnx-cpu)",
    )
    c.add_argument("--calibration", help="a text file instead of the bundled text")
    c.add_argument("--recipe", type=Path, help="settings from a TOML file")
    c.add_argument(
        "--set", action="append", default=[], metavar="SECTION.KEY=VALUE", dest="settings"
    )
    c.add_argument("--seed", type=int)


def _skip(text: str) -> float | str:
    """A share, or ``auto``; its range is checked with all other settings."""
    return text if text == "auto" else float(text)


def _bits(text: str) -> int | float | str:
    """A width, an average, or ``auto``; its range is checked with all other settings."""
    return text if text == "auto" else int(text) if text.isdigit() else float(text)


def _engine(c: argparse.ArgumentParser) -> None:
    c.add_argument(
        "--engine",
        choices=("onnx", "tvm"),
        help="which of the artifact's targets (default: onnx)",
    )
