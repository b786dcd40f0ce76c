"""`bench`: how fast and how small, beside diffusers."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wuerstchen_core.cli.main import Parser
from wuerstchen_core.cli.main import run as run_command
from wuerstchen_core.cli.progress import Bar

if TYPE_CHECKING:
    from .run import Plan
    from .weights import Sizes

STEPS = "30+12"
DEFAULTS: dict[str, Any] = {"stages": "all", "sizes": "512,1024,1536,2048", "dtypes": "bf16,fp32", "repeat": 3}
QUICK: dict[str, Any] = {"stages": "prior,decoder,vqgan-decode", "sizes": "512,1024", "dtypes": "bf16", "repeat": 1}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the bench; returns the exit code."""
    return run_command(_parser(), arguments)


def _parser() -> argparse.ArgumentParser:
    text = "Measure time and memory of full-size networks with random weights, beside diffusers."
    parser = Parser(prog="python -m tools.bench", description=text)
    smaller = "choose smaller --sizes or a smaller --batch, or --dtypes bf16"
    parser.set_defaults(run=_run, requirements="requirements-bench.txt", smaller=smaller)
    option = parser.add_argument
    option("--stages", metavar="NAME,...", help="prior, decoder, train-prior, ... (default: all that paint)")
    option("--sizes", metavar="PIXELS,...", help=f"sides of square pictures (default: {DEFAULTS['sizes']})")
    option("--dtypes", metavar="NAME,...", help=f"of bf16, fp32 and fp16 (default: {DEFAULTS['dtypes']})")
    text = "blocks of Stage C that train-prior trains, and as many of Stage B (default: all, 32)"
    option("--depth", type=int, metavar="N", help=text)
    option("--batch", default="1", metavar="N,...", help="pictures at a time (default: 1)")
    option("--repeat", type=int, metavar="N", help=f"rounds that count (default: {DEFAULTS['repeat']})")
    option("--threads", type=int, default=0, metavar="N", help="of the processor (default: torch's choice)")
    option("--device", default="auto", help="auto, cpu, cuda, ... (default: auto)")
    option("--steps", default=STEPS, metavar="C+B", help=f"of our pictures, or fast (default: {STEPS}, as the peer's)")
    option("--full", action="store_true", help="paint pictures with all their steps, which takes long")
    option("--compile", action="store_true", help="let torch compile both sides' networks")
    option("--accuracy", action="store_true", help="say how far both sides are from fp32")
    option("--no-peer", dest="peer", action="store_false", help="measure ours alone")
    option("--no-memory", dest="memory", action="store_false", help="leave out memory and loading")
    text = "measure the core's steps under this ComfyUI's sampling instead, beside its Stable Cascade"
    option("--comfyui", type=Path, metavar="FOLDER", help=text)
    option("--quick", action="store_true", help="three networks in bf16 at 512 and 1024 pixels, within two minutes")
    option("--json", type=Path, metavar="FILE", help="write all numbers to a file, as they come")
    option("--plot", type=Path, metavar="FILE.png", help="draw the ratios")
    return parser


def _run(options: argparse.Namespace) -> None:
    from . import host
    from .run import run

    _check_together(options)
    plan = _plan(options)
    for path in (options.json, options.plot):
        if path is not None and not path.absolute().parent.is_dir():
            raise ValueError(f"the folder {path.parent} does not exist: create it, or name another file")
    if options.plot is not None:
        from . import plot

        plot.check(options.plot, plan.peer)
    bar = Bar()

    def tell(words: str, done: int, total: int) -> None:
        bar.show("bench ", done, total, words)

    try:
        if options.comfyui is not None:
            rows = host.measure(options.comfyui, plan, tell)
        else:
            report = run(plan, tell, lambda report: _keep(report.as_dict(), options.json))
    finally:
        bar.clear()
    if options.comfyui is not None:
        _keep({"rows": rows}, options.json)
        sys.stdout.write(f"{host.table(rows)}\n")
        return
    _keep(report.as_dict(), options.json)
    sys.stdout.write(f"{report.text()}\n")
    if options.plot is not None:
        plot.plot(report, options.plot)


def _check_together(options: argparse.Namespace) -> None:
    """Raise ValueError for options of which one would be ignored."""
    if options.quick and options.compile:
        raise ValueError("--quick leaves no time for --compile: give --stages, --sizes and --dtypes instead of --quick")
    ignored = [f"--{name}" for name in ("full", "compile", "accuracy", "plot") if getattr(options, name)]
    ignored += [] if options.steps == STEPS else ["--steps"]
    ignored += [] if options.peer else ["--no-peer"]
    if options.comfyui is not None and ignored:
        raise ValueError(f"--comfyui measures single steps beside Stable Cascade's: leave out {', '.join(ignored)}")


def _plan(options: argparse.Namespace) -> Plan:
    """What the options ask for. ValueError where that can't be measured."""
    from wuerstchen_core.common.devices import pick_device
    from wuerstchen_core.diffusion.schedule import SCHEDULES

    from .cases import STAGES, check, stage_names
    from .run import Plan

    chosen = {**DEFAULTS, **(QUICK if options.quick else {})}
    chosen |= {name: value for name, value in vars(options).items() if name in chosen and value is not None}
    stages, dtypes = stage_names(_names(chosen["stages"])), _names(chosen["dtypes"])
    sizes, batches = _numbers("--sizes", chosen["sizes"]), _numbers("--batch", options.batch)
    told = {name: getattr(options, name) for name in ("full", "peer", "memory", "accuracy", "compile", "quick")}
    if options.compile and any(STAGES[name].learns for name in stages):
        raise ValueError("--compile is for what paints: leave it out where training steps are measured")
    fast = SCHEDULES["fast"]
    steps = [fast.steps, fast.decoder_steps] if options.steps == "fast" else _numbers("--steps", options.steps, "+")
    check(stages, sizes, batches, dtypes, chosen["repeat"], steps)
    if options.depth is not None:
        told["networks"] = _shallow(options.depth, stages)
    return Plan(
        stages,
        sizes,
        batches,
        dtypes,
        chosen["repeat"],
        str(pick_device(options.device)),
        options.threads,
        (steps[0], steps[1]),
        **told,
    )


def _shallow(depth: int, stages: Sequence[str]) -> Sizes:
    """Networks of so many blocks. ValueError where others than training steps are measured, or for no block."""
    from .cases import STAGES
    from .weights import Sizes

    sizes = Sizes()
    if not all(STAGES[name].learns for name in stages):
        raise ValueError("--depth is for training steps: give it with --stages train, or one of its stages")
    if not 1 <= depth <= sizes.prior.depth:
        raise ValueError(f"--depth {depth} is no number of blocks: give 1 to {sizes.prior.depth}")
    from .train_step import shallower

    return shallower(sizes, depth)


def _keep(report: dict[str, Any], path: Path | None) -> None:
    """Write the numbers so far, whole or not at all."""
    if path is None:
        return
    draft = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        draft.write_text(json.dumps(report, indent=1), encoding="utf-8")
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def _names(text: str, between: str = ",") -> list[str]:
    return [name.strip() for name in text.split(between) if name.strip()]


def _numbers(option: str, text: str, between: str = ",") -> list[int]:
    words = _names(text, between)
    if not words or not all(word.isdecimal() for word in words):
        raise ValueError(f"{option} {text!r} is no list of numbers: give some such as {between.join(('512', '1024'))}")
    return [int(word) for word in words]


if __name__ == "__main__":
    sys.exit(main())
