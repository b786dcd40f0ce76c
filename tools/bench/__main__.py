"""`python -m tools.bench`: time and memory compared with diffusers (docs/speed.md)."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from wuerstchen_core.cli.main import Parser
from wuerstchen_core.cli.main import run as run_command
from wuerstchen_core.cli.progress import Bar
from wuerstchen_core.common.atomic import replace_file

if TYPE_CHECKING:
    from .report import Report
    from .run import BenchConfig

DEFAULTS = {"stages": "all", "sizes": "512,1024,1536,2048", "dtypes": "bf16,fp32", "repeat": 3}
QUICK = {
    "stages": "all", "sizes": "512", "dtypes": "fast", "depth": 8, "repeat": 1, "memory": False, "seconds": 90,
}  # fmt: skip
GPU = {
    "stages": "all,text-to-picture", "sizes": "1024", "dtypes": "bf16,fp16,int8", "repeat": 2, "compile": (False, True),
    "seconds": 360, "page": Path("bench-gpu.md"),
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = _parser()
    parser.set_defaults(**(GPU if "--gpu" in arguments else QUICK if "--quick" in arguments else DEFAULTS))
    return run_command(parser, arguments)


def _parser() -> argparse.ArgumentParser:
    text = "Measure time and memory of full-size networks with random weights, compared with diffusers."
    parser = Parser(prog="python -m tools.bench", description=text)
    install_hint = "`pip install -r requirements-bench.txt`, or measure ours alone with --no-peer"
    memory_hint = "choose smaller --sizes, a smaller --batch or --depth, or --dtypes bf16"
    parser.set_defaults(run=_run, install_hint=install_hint, memory_hint=memory_hint)
    option = parser.add_argument
    text = "prior, decoder, vqgan, text-to-picture, train (default: all, which is the first three)"
    option("--stages", type=names, metavar="NAME,...", help=text)
    option("--sizes", type=numbers, metavar="PIXELS,...", help=f"picture sides (default: {DEFAULTS['sizes']})")
    text = f"bf16, fp32, fp16, int8, or fast: where the device is fast (default: {DEFAULTS['dtypes']})"
    option("--dtypes", type=names, metavar="NAME,...", help=text)
    option("--depth", type=int, metavar="N", help="N blocks of Stage C, in proportion of Stage B (default: 32)")
    option("--batch", type=numbers, default="1", metavar="N,...", help="pictures per batch (default: 1)")
    option("--repeat", type=int, metavar="N", help=f"timed rounds (default: {DEFAULTS['repeat']})")
    option("--threads", type=int, default=0, metavar="N", help="CPU threads (default: torch's choice)")
    option("--device", default="auto", help="auto, cpu, cuda, ... (default: auto)")
    text = "steps of our pictures in Stages C and B, or fast (default: 30+12)"
    option("--steps", type=picture_steps, default="30+12", metavar="C+B", help=text)
    option("--compile", action="store_const", const=(True,), default=(False,), help="use torch.compile on both sides")
    option("--no-peer", dest="peer", action="store_false", help="measure only ours")
    option("--no-memory", dest="memory", action="store_false", help="skip memory")
    option("--comfyui", type=Path, metavar="FOLDER", help="measure ComfyUI's samplers and Stable Cascade instead")
    option("--seconds", type=float, metavar="N", help="start no case after N seconds, and say what was left out")
    option("--quick", action="store_true", help="a quarter of the blocks at 512 pixels in the fast dtypes")
    text = "all stages on a GPU in bf16, fp16 and int8, compiled and not, within eight minutes, as a page to send back"
    option("--gpu", action="store_true", help=text)
    option("--page", type=Path, metavar="FILE", help="also write a page of Markdown with all numbers, after each row")
    option("--json", type=Path, metavar="FILE", help="also write all numbers to a file, after each row")
    return parser


def _run(options: argparse.Namespace) -> None:
    from . import comfyui
    from .run import run

    config = _config(options)
    _save(options.json, json.dumps({"rows": []}))  # fails now rather than after the work

    with Bar() as bar:

        def progress(text: str, done: int, total: int) -> None:
            bar.show("bench ", done, total, text)

        if options.comfyui is not None:
            rows = comfyui.measure(options.comfyui, config, progress)
            text = comfyui.table(rows)
            _save(options.json, json.dumps({"rows": rows}, indent=1))
        else:

            def save(report: Report) -> None:
                _save(options.json, json.dumps(report.as_dict(), indent=1))
                _save(options.page, report.page())

            report = run(config, progress, save)
            save(report)
            text = report.text()
            if options.page is not None:
                text += f"\n\n{options.page} is the page with all numbers"
    sys.stdout.write(f"{text.rstrip()}\n")


def _config(options: argparse.Namespace) -> BenchConfig:
    """Returns the configuration that the options select. Raises ValueError for an invalid value."""
    from wuerstchen_core.common.devices import pick_device

    from .cases import BENCHMARKS, fast_dtypes, stage_names
    from .run import BenchConfig
    from .train_step import shallower
    from .weights import ModelSizes

    values = {field.name: getattr(options, field.name) for field in fields(BenchConfig) if field.name in options}
    device = pick_device(options.device)
    if options.gpu and options.device == "auto" and device.type == "cpu":
        raise ValueError("--gpu finds no GPU that this torch can use: install torch for it, or add --device cpu")
    values["stages"], values["device"] = stage_names(options.stages), str(device)
    if options.dtypes == ["fast"]:
        values["dtypes"] = fast_dtypes(device)
    training = [BENCHMARKS[name].trains for name in values["stages"]]
    if options.repeat < 1:
        raise ValueError(f"--repeat {options.repeat} is too small: use at least 1")
    if any(options.compile) and any(training):
        raise ValueError("--compile does not apply to training: remove it, or the training stages")
    if options.depth is not None:
        networks = ModelSizes()
        if not 1 <= options.depth <= networks.prior.depth:
            raise ValueError(f"--depth {options.depth} is out of range: use 1 to {networks.prior.depth}")
        values["networks"] = shallower(networks, options.depth)
    config = BenchConfig(**values)
    config.cases()
    return config


def _save(path: Path | None, text: str) -> None:
    if path is not None:
        replace_file(path, lambda draft: draft.write_text(text, encoding="utf-8"))


def names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def picture_steps(text: str) -> tuple[int, int]:
    from wuerstchen_core.diffusion.schedule import SCHEDULES

    fast = SCHEDULES["fast"]
    prior, decoder = (fast.steps, fast.decoder_steps) if text == "fast" else map(int, text.split("+"))
    return prior, decoder


if __name__ == "__main__":
    sys.exit(main())
