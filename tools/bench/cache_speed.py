"""What a cache saves: CPU seconds of a batch's preparation and of a whole step, with and without it, on one thread.

`PYTHONPATH=. python tools/bench/cache_speed.py FOLDER` takes about ten minutes and 8 GB of memory, and prints rows of
seconds: of a batch without a cache and with it, of a step without and with it, and what the cache took. The batches of
rows ...-512 are prepared by networks of the released sizes with random weights for a tiny one: their steps say nothing.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from helpers.tiny_stages import TABLES
from PIL import Image

from wuerstchen_core.checkpoints import save_bundle
from wuerstchen_core.models.image_encoder import ImageEncoder, ImageEncoderParams
from wuerstchen_core.models.text_encoder import CLIP_BIGG, TextEncoder
from wuerstchen_core.models.vqgan import VQGAN, VQGANParams
from wuerstchen_core.training.data.build_cache import make_cache
from wuerstchen_core.training.data.demo import DemoDataset
from wuerstchen_core.training.rng import StepRandom
from wuerstchen_core.training.run import run
from wuerstchen_core.training.stages.decoder import DecoderStage
from wuerstchen_core.training.stages.prior import PriorStage

from ..demo import build

WIDTHS = {"prior": "c_cond", "decoder": "clip_embd"}
# What is prepared does not depend on the network that it is for, but on the width of its text.
PRIOR, DECODER = (TABLES[name].replace(f"{key} = 64", f"{key} = 1280") for name, key in WIDTHS.items())
TRAIN = "[train]\nlr = 1e-4\nlog_every = 1000\nsave_every = 1000\nsheet_every = 1000\n"


def pictures(folder: Path, side: int, count: int) -> Path:
    """The demo's first pictures, at a size, with captions."""
    folder.mkdir(exist_ok=True)
    shown = DemoDataset({"things": 16})
    captions = shown.captions(torch.arange(count), StepRandom(0, 0, count))
    for i, caption in enumerate(captions):
        image = Image.fromarray(shown.pixels[i].permute(1, 2, 0).numpy()).resize((side, side), Image.Resampling.LANCZOS)
        image.save(folder / f"{i:04d}.jpg", quality=92)
        (folder / f"{i:04d}.txt").write_text(caption, encoding="utf-8")
    return folder


def released(folder: Path) -> dict[str, str]:
    """Networks of the released sizes, by what `[inputs]` calls them."""
    torch.manual_seed(0)
    made: dict[str, tuple[str, Any]] = {
        "vqgan": ("vqgan", lambda: VQGAN(VQGANParams())),
        "encoder": ("image_encoder", lambda: ImageEncoder(ImageEncoderParams())),
        "text": ("prior_text_encoder", lambda: TextEncoder(CLIP_BIGG)),
    }
    for name, (part, make) in made.items():
        if not (path := folder / f"{name}.safetensors").exists():
            save_bundle(path, {part: make().bfloat16()}, {})
    return {name: str(folder / f"{name}.safetensors") for name in made}


@contextmanager
def watched(kind: Any) -> Iterator[list[tuple[float, float]]]:
    """When the preparations of batches begin and end, in CPU seconds."""
    seen: list[tuple[float, float]] = []
    batch = kind.batch

    def timed(self: Any, step: int, rng: StepRandom) -> Any:
        begin = time.process_time()
        made = batch(self, step, rng)
        seen.append((begin, time.process_time()))
        return made

    kind.batch = timed
    try:
        yield seen
    finally:
        kind.batch = batch


def measure(kind: Any, config: Path, told: list[str]) -> tuple[float, float]:
    """CPU seconds of a batch, and of a whole step; medians without the first."""
    AcceleratorState._reset_state(reset_partial_state=True)  # which keeps the precision of the run before
    with watched(kind) as seen:
        run(kind.name, config, told)
    prepared = [end - begin for begin, end in seen[1:]]
    steps = [after[0] - before[0] for before, after in zip(seen[1:], seen[2:], strict=False)]
    return statistics.median(prepared), statistics.median(steps)


def case(folder: Path, name: str, kind: Any, tables: str, inputs: Mapping[str, str], data: str, told: list[str]) -> str:
    """A row of the table."""
    place, config = folder / name, folder / f"{name}.toml"
    given = "\n".join(f"{key} = {json.dumps(value)}" for key, value in inputs.items())
    own = f"run = {json.dumps(str(place))}\n"
    config.write_text(f"{own}[inputs]\n{given}\n[data]\n{data}\nworkers = 0\n{tables}", encoding="utf-8")
    before = time.process_time()
    what = ["features", "text"] if kind is PriorStage else ["latents", "features", "text"]
    make_cache(config, [f"cache.output='{place / 'cache'}'", f"cache.what={what}"])
    making = time.process_time() - before
    without = measure(kind, config, [*told, f"run='{place / 'without'}'"])
    with_it = measure(kind, config, [*told, f"run='{place / 'with'}'", f"data.source='{place / 'cache'}'"])
    shards = sum(path.stat().st_size for path in (place / "cache").glob("*.tar"))
    numbers = [f"{old:.3f} s | {new:.3f} s" for old, new in zip(without, with_it, strict=True)]
    return f"| {name} | {' | '.join(numbers)} | {making:.1f} s, {shards / 1e6:.2f} MB |\n"


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    large, small = pictures(folder / "large", 768, 16), pictures(folder / "small", 128, 128)
    inputs, demo = released(folder), dict.fromkeys(("encoder", "text", "vqgan"), "demo")
    of_512 = f"source = {json.dumps(str(large))}\nsize = 512"
    of_128 = f"source = {json.dumps(str(small))}\nsize = 128"
    for kind, tables in ((PriorStage, PRIOR), (DecoderStage, DECODER)):
        told = ["train.steps=4", "train.batch=4"]
        sys.stdout.write(case(folder, f"{kind.name}-512", kind, tables + TRAIN, inputs, of_512, told))
        recipe = (build.RECIPE / f"{kind.name}.toml").read_text("utf-8")
        tables = recipe[recipe.index("[model]") :]
        told = ["train.steps=16", *(f"train.{name}_every=1000" for name in ("log", "save", "sheet"))]
        sys.stdout.write(case(folder, f"{kind.name}-demo", kind, tables, demo, of_128, told))
        sys.stdout.flush()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
