"""What each dtype costs, measured: `python -m wuerstchen_core.demo.recipe.precision [--every N]`.

Writes the README's tables: the error of every network on the golden data and in the shipped model, what that model
still paints, and how far the numbers inside stay from fp16's end, also at the released sizes (with random weights).
"""

from __future__ import annotations

import argparse
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...checkpoints import Part, build_part, demo_path, read_part
from ...checkpoints.convert import convert
from ...checkpoints.files import read_weight_file
from ...checkpoints.formats import to_ours
from ...checkpoints.precision import FP8, planned, widened
from ...checkpoints.sizes import READERS
from ...models.decoder import Decoder, DecoderParams
from ...models.image_encoder import semantic_view
from ...models.prior import Prior, PriorParams, latents_from_features
from ...models.text_encoder import tokenize
from ...models.token_decoder import TokenDecoder, TokenDecoderParams
from ...pipeline import WuerstchenPipeline
from ..artwork import draw_all
from ..vocabulary import caption
from .evaluate import evaluate, held_out_scenes
from .remake import ROOT, with_table

logger = logging.getLogger(__name__)

README = ROOT / "README.md"
GOLDEN = ROOT / "tests" / "golden"
MARKS = "<!-- precision: remade by wuerstchen_core.demo.recipe.precision -->", "<!-- end of precision -->"
FP16_LESS = 4  # times fewer pictures, since processors without fp16 take that much longer, and more
FP16_END = torch.finfo(torch.float16).max

# How weights are stored and in what is computed, by the table's word for it.
KINDS = {
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp16": (torch.float16, torch.float16),
    "fp8, computed in bf16": (FP8, torch.bfloat16),
    "fp8, computed in fp32": (FP8, torch.float32),
}
# What is painted with: the table's words, the file's dtype, and that of the computation.
PAINTED = {
    "fp32": ("fp32", "fp32"),
    "bf16": ("bf16", "bf16"),
    "fp16": ("fp16", "fp16"),
    "fp8 in Stage B, Stage C and text": ("fp8,vqgan=keep,image_encoder=keep", "fp32"),
    "fp8 everywhere": ("fp8", "fp32"),
}


@dataclass(frozen=True)
class Case:
    """A network and what it is called with, in fp32."""

    name: str
    part: Part
    inputs: tuple[Tensor, ...]
    call: Callable[..., Tensor] = lambda network, *inputs: network(*inputs)  # noqa: E731
    kept: tuple[int, ...] = ()  # the inputs that stay in fp32


def golden_cases() -> Iterator[Case]:
    """The networks of the golden data, whose weights are random and each of weight."""
    names = {
        "prior": ("prior_small", ("x_24", "r_24", "c_24")),
        "decoder": ("diffnext_small", ("x", "r_tmix", "effnet", "clip")),
        "token_decoder": ("paella_small", ("x", "r_tmix", "effnet", "byt5")),
        "vqgan": ("vqmodel_small", ("z",)),
    }
    heads: dict[str, Any] = {"prior": 4, "decoder": (-1, 4, 6), "token_decoder": (-1, 4, 6)}
    for name, (file, inputs) in names.items():
        tensors = read_weight_file(GOLDEN / f"{file}.safetensors").states[""]
        _, state = to_ours(
            {key.removeprefix("weights/"): x for key, x in tensors.items() if key.startswith("weights/")}
        )
        params = READERS[name](state, **({"nhead": heads[name]} if name in heads else {}))
        given = tuple(tensors[f"in/{key}"] for key in inputs)
        call = _decode if name == "vqgan" else Case.call
        yield Case(name, Part(name, params, state), given, call, kept=(1, 2) if "decoder" in name else (1,))


def _decode(network: Any, latents: Tensor) -> Tensor:
    return network.decode(latents)


def _read(network: Any, ids: Tensor, mask: Tensor) -> Tensor:
    return network(ids, mask)


@torch.inference_mode()
def shipped_cases() -> Iterator[Case]:
    """The shipped model's networks on held-out pictures and their captions, half noised."""
    parts = {name: read_part(demo_path(), name) for name in ("prior", "decoder", "vqgan", "image_encoder")}
    tower = read_part(demo_path(), "prior_text_encoder")
    pipe = WuerstchenPipeline.load("demo", device="cpu", dtype="fp32")
    assert pipe.image_encoder is not None and pipe.vqgan is not None and pipe.prior is not None
    scenes = held_out_scenes()[::16]
    images = torch.from_numpy(draw_all(scenes)).permute(0, 3, 1, 2).float() / 255
    captions = [caption(scene) for scene in scenes]
    text, _ = pipe.encode_text(captions)
    features = pipe.image_encoder(semantic_view(images))
    codes = pipe.vqgan.encode(images)
    draw = torch.Generator().manual_seed(0)
    time = torch.full((len(scenes),), 0.5)

    def noised(x: Tensor) -> Tensor:
        return (x + torch.randn(x.shape, generator=draw)) * 0.5**0.5

    latents = noised(latents_from_features(features, pipe.prior.params))
    yield Case("prior", parts["prior"], (latents, time, text), kept=(1,))
    inputs = (noised(codes / pipe.vqgan.params.scale_factor), time, features, text)
    yield Case("decoder", parts["decoder"], inputs, kept=(1, 2))
    yield Case("vqgan", parts["vqgan"], (codes,), _decode)
    yield Case("image_encoder", parts["image_encoder"], (semantic_view(images),))
    yield Case("text_encoder", replace(tower, name="text_encoder"), tokenize(captions), _read, kept=(0, 1))


@torch.inference_mode()
def relative_error(case: Case, stored: torch.dtype, computed: torch.dtype) -> float:
    """|y - y32| / |y32| of a network's result y, in percent; NaN where it is not finite."""
    exact = _run(case, widened(case.part.state_dict), torch.float32)
    tensors = {key: x for name, y in case.part.state_dict.items() for key, x in _rounded(name, y, stored).items()}
    found = _run(case, widened(tensors), computed).float()
    return float(100 * (found - exact).norm() / exact.norm()) if found.isfinite().all() else float("nan")


def _rounded(key: str, x: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    wide = x.float() if x.is_floating_point() else x
    return {name: tensor.make() for name, tensor in planned(key, wide, dtype).items()}


def _run(case: Case, state: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    network = build_part(replace(case.part, state_dict=dict(state)), dtype=dtype)
    inputs = [x if i in case.kept or not x.is_floating_point() else x.to(dtype) for i, x in enumerate(case.inputs)]
    return case.call(network, *inputs)


@torch.inference_mode()
def largest_inside(network: nn.Module, call: Callable[[], Any]) -> tuple[float, str]:
    """The largest number that any module gives while `call` runs, and the module's name."""
    seen: dict[str, float] = {}

    def watch(name: str, module: nn.Module, inputs: Any, out: Any) -> None:
        for x in out if isinstance(out, tuple) else (out,):
            if isinstance(x, Tensor) and x.is_floating_point():
                seen[name] = max(seen.get(name, 0.0), float(x.abs().max()))

    hooks = [module.register_forward_hook(partial(watch, name)) for name, module in network.named_modules() if name]
    try:
        call()
    finally:
        for hook in hooks:
            hook.remove()
    name = max(seen, key=lambda key: seen[key])
    return seen[name], name


def released_size(kind: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A network as large as the released one, its weights drawn as the original draws them, and inputs for 128x128.

    What starts from zero is drawn at 0.02 and the GRNs' gains are 1, so that every layer counts.
    """
    torch.manual_seed(0)
    network: Any = {
        "prior": lambda: Prior(PriorParams()),
        "decoder": lambda: Decoder(DecoderParams()),
        "token_decoder": lambda: TokenDecoder(TokenDecoderParams()),
    }[kind]()
    network.init_weights()
    with torch.no_grad():
        for name, x in network.named_parameters():
            if name.endswith("gamma"):
                x.fill_(1.0)
            elif not x.any():
                x.normal_(std=0.02)
    features, time = 3 * torch.randn(1, 16, 3, 3), torch.tensor([0.5])
    inputs = {
        "prior": (torch.randn(1, 16, 3, 3), time, torch.randn(1, 77, 1280)),
        "decoder": (torch.randn(1, 4, 32, 32), time, features, torch.randn(1, 77, 1024)),
        "token_decoder": (torch.randint(8192, (1, 32, 32)), time, features, torch.randn(1, 77, 1024)),
    }[kind]
    return network.eval().requires_grad_(False), inputs


def errors_table() -> str:
    """The error of each network in each dtype."""
    rows: dict[str, dict[str, str]] = {}
    for source, cases in (("golden", golden_cases()), ("shipped", shipped_cases())):
        for case in cases:
            for kind, (stored, computed) in KINDS.items():
                found = f"{relative_error(case, stored, computed):.2g} %"
                rows.setdefault(f"{case.name.replace('_', ' ')}, {source}", {})[kind] = found
    lines = [f"| Error of | {' | '.join(KINDS)} |", f"|---|{'---|' * len(KINDS)}"]
    return "\n".join(lines + [f"| {name} | {' | '.join(row.values())} |" for name, row in rows.items()])


def painted_table(every: int) -> str:
    """What the shipped model paints in each dtype, as its judge sees it."""
    lines = ["| The shipped model in | right thing | right background | after compression |", "|---|---|---|---|"]
    for words, (stored, computed) in PAINTED.items():
        with tempfile.TemporaryDirectory() as folder:
            [file] = convert([demo_path()], Path(folder) / "model.safetensors", dtype=stored)
            pipe = WuerstchenPipeline.load(file, device="cpu", dtype=computed)
            found = evaluate(pipe, seeds=1, every=every * (FP16_LESS if computed == "fp16" else 1))
        shares = (f"{found[key]['percent']} % of {found[key]['count']}" for key in ("thing", "background"))
        lines.append(f"| {words} | {' | '.join(shares)} | {found['psnr']['mean']} dB |")
        logger.info(lines[-1])
    return "\n".join(lines)


def width_table() -> str:
    """How near the numbers inside come to fp16's end."""
    lines = ["| The largest number inside | | fp16 ends at 65504 | error in fp16 |", "|---|---|---|---|"]

    def add(name: str, largest: tuple[float, str], error: str) -> None:
        lines.append(f"| {name} | {largest[0]:.0f} | {FP16_END / largest[0]:.0f} times as much | {error} |")
        logger.info("%s (in %s)", lines[-1], largest[1])

    for case in shipped_cases():
        if case.name in ("prior", "decoder"):
            network = build_part(case.part, dtype=torch.float32)
            largest = largest_inside(network, partial(case.call, network, *case.inputs))
            add(f"{case.name}, shipped", largest, f"{relative_error(case, torch.float16, torch.float16):.2g} %")
    for kind in ("prior", "decoder", "token_decoder"):
        network, inputs = released_size(kind)
        largest = largest_inside(network, partial(network, *inputs))
        add(f"{kind.replace('_', ' ')}, released size, random", largest, f"{_half_error(network, inputs):.2g} %")
    return "\n".join(lines)


@torch.inference_mode()
def _half_error(network: nn.Module, inputs: Sequence[Tensor]) -> float:
    """The relative error in percent of a network's last layer in fp16, in which the network is left.

    Not of its result: priors and decoders divide by what that layer gives, which with random weights may be near zero.
    """
    seen: list[Tensor] = []
    hook = list(network.children())[-1].register_forward_hook(lambda module, given, out: seen.append(out.float()))
    network(*inputs)
    kept = (inputs[0].half() if inputs[0].is_floating_point() else inputs[0], *inputs[1:-1], inputs[-1].half())
    network.half()(*kept)
    hook.remove()
    exact, found = seen
    return float(100 * (found - exact).norm() / exact.norm())


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and write the tables into the README."""
    parser = argparse.ArgumentParser(prog="python -m wuerstchen_core.demo.recipe.precision", description=__doc__)
    parser.add_argument("--every", type=int, default=1, help="paint only every N-th held-out (thing, background) pair")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with_table(README.read_text(encoding="utf-8"), "", MARKS)  # before the work
    tables = "\n\n".join((errors_table(), painted_table(options.every), width_table()))
    README.write_text(with_table(README.read_text(encoding="utf-8"), tables, MARKS), encoding="utf-8")


if __name__ == "__main__":
    main()
