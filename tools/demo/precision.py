"""What each dtype costs, measured: `python -m tools.demo.precision [--every N]`.

Writes the README's tables: the error of every network on the golden data and in the shipped models, what these
still paint, and how far the numbers inside stay from fp16's end, also at the released sizes (with random weights).
"""

from __future__ import annotations

import argparse
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from wuerstchen_core.checkpoints import build_part, demo_path
from wuerstchen_core.checkpoints.convert import convert
from wuerstchen_core.checkpoints.quant import FP8, dequantize, quantize
from wuerstchen_core.inference.pipeline import WuerstchenPipeline

from .evaluate import evaluate
from .precision_cases import Case, golden_cases, golden_image_encoders, released_size, shipped_cases
from .remake import ROOT, with_table

logger = logging.getLogger(__name__)

README = ROOT / "README.md"
MARKS = "<!-- precision: remade by tools.demo.precision -->", "<!-- end of precision -->"
FP16_END = torch.finfo(torch.float16).max

# How weights are stored and in what is computed, by the table's word for it.
KINDS = {
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp16": (torch.float16, torch.float16),
    "fp8, computed in bf16": (FP8, torch.bfloat16),
    "fp8, computed in fp32": (FP8, torch.float32),
}
# What is painted with, by the table's word for it: the model, its file's dtype, and that of the computation.
PAINTED = {
    "fp32": ("demo", "fp32", "fp32"),
    "bf16, as it ships": ("demo", "bf16", "bf16"),
    "fp16": ("demo", "fp16", "fp16"),
    "fp8 in Stage B, Stage C and text": ("demo", "fp8,vqgan=keep,image_encoder=keep", "fp32"),
    "fp8 everywhere": ("demo", "fp8", "fp32"),
    "v1, fp8, as it ships": ("demo-v1", "keep", "fp32"),
    "v1, bf16": ("demo-v1", "bf16", "bf16"),
    "v1, fp16": ("demo-v1", "fp16", "fp16"),
}
SHIPPED = {"shipped": "demo", "shipped v1": "demo-v1"}


@torch.inference_mode()
def relative_error(case: Case, stored: torch.dtype, computed: torch.dtype) -> float:
    """|y - y32| / |y32| of a network's result y, in percent; NaN where it is not finite."""
    exact = _run(case, dequantize(case.part.state_dict), torch.float32)
    tensors = {key: x for name, y in case.part.state_dict.items() for key, x in _rounded(name, y, stored).items()}
    found = _run(case, dequantize(tensors), computed).float()
    return float(100 * (found - exact).norm() / exact.norm()) if found.isfinite().all() else float("nan")


def _rounded(key: str, x: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    wide = x.float() if x.is_floating_point() else x
    return {name: tensor.load() for name, tensor in quantize(key, wide, dtype).items()}


def _run(case: Case, state: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    network = build_part(replace(case.part, state_dict=dict(state)), dtype=dtype)
    inputs = [x if i in case.kept or not x.is_floating_point() else x.to(dtype) for i, x in enumerate(case.inputs)]
    return case.call(network, *inputs)


class Largest(TorchDispatchMode):
    """The largest absolute value of all that is computed in fp16 in inference mode meanwhile; NaN if anything is NaN.

    Hooks would miss it: the networks take their layers apart. In fp16 on a CPU products are seen before their GELU,
    though attention's scores are not (torch holds them in fp32). What is computed in fp32 and cast does not count.
    """

    def __init__(self) -> None:
        super().__init__()
        self.value = torch.zeros(())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        if not (func.is_view or "empty" in func.name()):  # nothing was computed: casts (views to torch), raw memory
            for x in tree_leaves(results):
                if isinstance(x, Tensor) and x.dtype == torch.float16 and x.numel() and not x.is_meta:
                    made = x.masked_fill(x == -FP16_END, 0)  # which stands for no attention, in the text tower's mask
                    self.value = torch.maximum(self.value, made.abs().max().float())
        return results


def _shipped() -> Iterator[tuple[str, Case]]:
    return ((source, case) for source, model in SHIPPED.items() for case in shipped_cases(model))


def _name(case: Case, source: str) -> str:
    return f"{case.name.replace('_', ' ')}, {source}"


def errors_table() -> str:
    """The error of each network in each dtype."""
    lines = [f"| Error of | {' | '.join(KINDS)} |", f"|---|{'---|' * len(KINDS)}"]
    golden = chain(golden_cases(), golden_image_encoders())
    for source, case in chain((("golden", case) for case in golden), _shipped()):
        found = (relative_error(case, stored, computed) for stored, computed in KINDS.values())
        cells = (_name(case, source), *(f"{error:.2g} %" for error in found))
        lines.append(f"| {' | '.join(cells)} |")
        logger.info(lines[-1])
    return "\n".join(lines)


def painted_table(every: int) -> str:
    """What the shipped models paint in each dtype, as their judge sees it; of v1, all of its few held-out pairs."""
    lines = ["| The shipped model in | right thing | right background | after compression |", "|---|---|---|---|"]
    for words, (model, stored, computed) in PAINTED.items():
        with tempfile.TemporaryDirectory() as folder:
            [file] = convert([demo_path(model)], Path(folder) / "model.safetensors", dtype=stored)
            pipe = WuerstchenPipeline.load(file, device="cpu", dtype=computed)
            found = evaluate(pipe, seeds=1, every=every if model == "demo" else 1)
        shares = (f"{found[key]['percent']} % of {found[key]['count']}" for key in ("thing", "background"))
        lines.append(f"| {words} | {' | '.join(shares)} | {found['psnr']['mean']} dB |")
        logger.info(lines[-1])
    return "\n".join(lines)


def width_table() -> str:
    """How near the numbers inside come to fp16's end."""
    lines = ["| The largest number inside | | fp16 ends at 65504 | error in fp16 |", "|---|---|---|---|"]

    def add(name: str, measure: Callable[[], float]) -> None:
        with Largest() as inside:
            error = measure()
        largest = float(inside.value)
        lines.append(f"| {name} | {largest:.0f} | {FP16_END / largest:.0f} times as much | {error:.2g} % |")
        logger.info(lines[-1])

    for source, case in _shipped():
        add(_name(case, source), partial(relative_error, case, torch.float16, torch.float16))
    for kind in ("prior", "decoder", "token_decoder"):
        add(f"{kind.replace('_', ' ')}, released size, random", partial(_half_error, *released_size(kind)))
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
    parser = argparse.ArgumentParser(prog="python -m tools.demo.precision", description=__doc__)
    parser.add_argument("--every", type=int, default=1, help="paint only every N-th held-out (thing, background) pair")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with_table(README.read_text(encoding="utf-8"), "", MARKS)  # before the work
    tables = "\n\n".join((errors_table(), painted_table(options.every), width_table()))
    README.write_text(with_table(README.read_text(encoding="utf-8"), tables, MARKS), encoding="utf-8")


if __name__ == "__main__":
    main()
