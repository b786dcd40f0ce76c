"""`generate`: paint pictures of a prompt."""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .output import check_output, output_path, save_picture
from .progress import Progress

# Options that are the pipeline's, by the same names.
SAMPLING = (
    *("width", "height", "schedule", "prior_steps", "prior_guidance", "decoder_steps", "decoder_guidance"),
    *("decoder_guidance_end", "temperature", "token_mode"),
)


def add(commands: Any) -> None:
    """Add the command to a parser's commands."""
    parser = commands.add_parser("generate", help="paint a picture of a prompt")
    smaller = "choose a smaller --width and --height, --dtype bf16, or --device cpu"
    parser.set_defaults(run=_run, requirements="requirements.txt", smaller=smaller)
    option = parser.add_argument
    option("prompt", metavar="PROMPT", help='what to paint, such as "a red apple on a blue background"')
    option("--output", type=Path, help="file or folder to write to (default: a name made of the prompt)")
    option("--model", default="demo", help="bundle file or diffusers folder (default: the small model that ships)")
    option("--negative", default="", metavar="PROMPT", help="what to stay away from")
    option("--seed", type=int, default=0, help="same seed, same picture (default: 0)")
    option("--count", type=int, default=1, help="number of pictures, with the seeds SEED, SEED + 1, ... (default: 1)")
    option("--width", type=int, help="in pixels, a multiple of 64 up to 2048 (default: the model's own)")
    option("--height", type=int)
    option("--device", default="auto", help="auto, cpu, cuda, cuda:1, xpu or mps (default: auto)")
    option("--dtype", default="auto", choices=("auto", "fp32", "bf16", "fp16"))
    option("--schedule", choices=("original", "diffusers", "linear"), help="of Stage C (default: the model's own)")
    option("--prior-steps", type=int, metavar="N", help="steps of Stage C, linear unless --schedule says otherwise")
    option("--prior-guidance", type=float, metavar="SCALE", help="how closely Stage C follows the prompt; 1: none")
    option("--decoder-steps", type=int, metavar="N", help="steps of Stage B")
    option("--decoder-guidance", type=float, metavar="SCALE", help="guidance of Stage B; 1: none")
    option("--decoder-guidance-end", type=float, metavar="SCALE", help="what it reaches at the last step")
    option("--temperature", type=float, nargs=2, metavar=("FIRST", "LAST"), help="of v1's tokens, at either step")
    option("--token-mode", choices=("multinomial", "argmax", "quantised"), help="how v1's Stage B chooses a token")
    option("--json", action="store_true", help="print files, seeds and seconds as JSON")


def _run(options: argparse.Namespace) -> None:
    chosen = {name: getattr(options, name) for name in SAMPLING}
    if chosen["temperature"] is not None:
        chosen["temperature"] = tuple(chosen["temperature"])
    check_output(options.output)
    started = time.perf_counter()
    from ..pipeline import WuerstchenPipeline
    from ..sampling import check_count

    check_count(options.count, options.seed)
    pipeline = WuerstchenPipeline.load(options.model, device=options.device, dtype=options.dtype)
    report: dict[str, Any] = {"prompt": options.prompt, "device": str(pipeline.device), "images": []}
    report["load_seconds"] = round(time.perf_counter() - started, 3)
    for i in range(options.count):
        path = output_path(options.output, options.prompt, i if options.count > 1 else None)
        seed = options.seed + i
        progress = Progress(f"picture {i + 1} of {options.count}: " if options.count > 1 else "")
        try:
            [image] = pipeline.generate(
                options.prompt, negative=options.negative, seed=seed, callback=progress, **chosen
            )
        finally:
            progress.clear()
        made = {"prompt": options.prompt, "negative": options.negative, "seed": seed, "model": Path(options.model).name}
        save_picture(image, path, made | asdict(pipeline.sampling.changed(**chosen)))
        report["images"].append({"path": str(path), "seed": seed, "seconds": progress.seconds})
        if not options.json:
            sys.stdout.write(f"{path}\n")
    if options.json:
        sys.stdout.write(json.dumps(report, ensure_ascii=False) + "\n")
