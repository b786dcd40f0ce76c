"""Measures how much accuracy each dtype costs: `python -m tools.demo.precision [--every N]`.

Writes the tables of docs/precision.md: the error of every network on the golden data and in the shipped models, the
accuracy of the images that these generate, and how close the activations come to fp16's limit, also at the released
sizes (with random weights).
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
from wuerstchen_core.checkpoints.dequant import dequantize
from wuerstchen_core.checkpoints.quant import FP8, quantize
from wuerstchen_core.common.devices import companion_dtype
from wuerstchen_core.inference.pipeline import WuerstchenPipeline

from .. import DOCS, markdown_table
from .evaluate import evaluate
from .network_calls import NetworkCall, golden_calls, golden_image_encoders, released_size, shipped_calls
from .remake import replace_between, update_page

logger = logging.getLogger(__name__)

PAGE = DOCS / "precision.md"
MARKS = "<!-- precision: written by tools.demo.precision -->", "<!-- end of precision -->"
FP16_MAX = torch.finfo(torch.float16).max

# Dtypes of storage and of computation, by column of the table.
KINDS = {
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp16": (torch.float16, torch.float16),
    "fp8 weights, bf16 math": (FP8, torch.bfloat16),
    "fp8 weights, fp32 math": (FP8, torch.float32),
    "int8": (torch.float32, torch.int8),
}
# The model, the dtype of its file, and that of the computation, by row of the table.
GENERATED = {
    "fp32": ("demo", "fp32", "fp32"),
    "bf16, as shipped": ("demo", "bf16", "bf16"),
    "fp16": ("demo", "fp16", "fp16"),
    "fp8 in Stages B and C and the text encoder": ("demo", "fp8,vqgan=keep,image_encoder=keep", "fp32"),
    "fp8 everywhere": ("demo", "fp8", "fp32"),
    "int8": ("demo", "keep", "int8"),
    "int8 from an int8 file": ("demo", "int8", "int8"),
    "v1, fp8, as shipped": ("demo-v1", "keep", "fp32"),
    "v1, bf16": ("demo-v1", "bf16", "bf16"),
    "v1, fp16": ("demo-v1", "fp16", "fp16"),
    "v1, int8": ("demo-v1", "keep", "int8"),
}
SHIPPED = {"shipped": "demo", "shipped v1": "demo-v1"}


@torch.inference_mode()
def relative_error(call: NetworkCall, stored: torch.dtype, computed: torch.dtype) -> float:
    """Returns |y - y32| / |y32| of a network's output y in percent; NaN if y is not finite."""
    exact = _run(call, dequantize(call.part.state_dict), torch.float32)
    tensors = {key: x for name, y in call.part.state_dict.items() for key, x in _rounded(name, y, stored).items()}
    output = _run(call, dequantize(tensors), computed).float()
    return float(100 * (output - exact).norm() / exact.norm()) if output.isfinite().all() else float("nan")


def _rounded(key: str, x: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    wide = x.float() if x.is_floating_point() else x
    return {name: tensor.load() for name, tensor in quantize(key, wide, dtype).items()}


def _run(call: NetworkCall, state: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    network = build_part(replace(call.part, state_dict=dict(state)), dtype=dtype)
    if dtype == torch.int8:
        dtype = companion_dtype(torch.device("cpu"))
    inputs = [
        x if i in call.fp32_inputs or not x.is_floating_point() else x.to(dtype) for i, x in enumerate(call.inputs)
    ]
    return call.forward(network, *inputs)


class LargestFp16(TorchDispatchMode):
    """Records the largest absolute fp16 result in inference mode; NaN if any result is NaN.

    Hooks would miss values inside fused layers. On a CPU, products in fp16 are seen before their GELU; attention scores
    are not, since torch keeps them in fp32. Results that are cast from fp32 do not count.
    """

    def __init__(self) -> None:
        super().__init__()
        self.value = torch.zeros(())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        if not (func.is_view or "empty" in func.name()):  # casts (views to torch) and raw memory compute nothing
            for x in tree_leaves(results):
                if isinstance(x, Tensor) and x.dtype == torch.float16 and x.numel() and not x.is_meta:
                    unmasked = x.masked_fill(x == -FP16_MAX, 0)  # the text encoder's attention mask
                    self.value = torch.maximum(self.value, unmasked.abs().max().float())
        return results


def _shipped() -> Iterator[tuple[str, NetworkCall]]:
    return ((source, call) for source, model in SHIPPED.items() for call in shipped_calls(model))


def _name(call: NetworkCall, source: str) -> str:
    return f"{call.name.replace('_', ' ').replace('vqgan', 'VQGAN')}, {source}"


def errors_table() -> str:
    """Returns the error of each network in each dtype."""
    rows = []
    golden = chain(golden_calls(), golden_image_encoders())
    for source, call in chain((("golden", call) for call in golden), _shipped()):
        errors = (relative_error(call, stored, computed) for stored, computed in KINDS.values())
        rows.append((_name(call, source), *(f"{error:.2g} %" for error in errors)))
        logger.info("%s", rows[-1])
    return markdown_table(("Relative error", *KINDS), rows)


def accuracy_table(every: int) -> str:
    """Returns the accuracy of the shipped models in each dtype; of v1 on all of its few held-out pairs."""
    rows = []
    for name, (model, stored, computed) in GENERATED.items():
        with tempfile.TemporaryDirectory() as folder:
            [file] = convert([demo_path(model)], Path(folder) / "model.safetensors", dtype=stored)
            pipe = WuerstchenPipeline.load(file, device="cpu", dtype=computed)
            numbers = evaluate(pipe, seeds=1, every=every if model == "demo" else 1)
        rates = (f"{numbers[key]['percent']} % of {numbers[key]['count']}" for key in ("thing", "background"))
        rows.append((name, *rates, f"{numbers['psnr']['mean']} dB"))
        logger.info("%s", rows[-1])
    return markdown_table(("Shipped model", "right thing", "right background", "PSNR after compression"), rows)


def range_table() -> str:
    """Returns how close the activations come to fp16's limit."""
    rows = []

    def add(name: str, measure: Callable[[], float]) -> None:
        with LargestFp16() as recorded:
            error = measure()
        largest = float(recorded.value)
        rows.append((name, f"{largest:.0f}", f"{FP16_MAX / largest:.0f}x", f"{error:.2g} %"))
        logger.info("%s", rows[-1])

    for source, call in _shipped():
        add(_name(call, source), partial(relative_error, call, torch.float16, torch.float16))
    for kind in ("prior", "decoder", "token_decoder"):
        add(f"{kind.replace('_', ' ')}, released size, random weights", partial(_half_error, *released_size(kind)))
    return markdown_table(("Network in fp16", "largest value", "factor to overflow", "error"), rows)


@torch.inference_mode()
def _half_error(network: nn.Module, inputs: Sequence[Tensor]) -> float:
    """Returns the relative error in percent of a network's last layer in fp16; leaves the network in fp16.

    Priors and decoders divide by that layer's output, which may be near zero with random weights, so their own output
    says little.
    """
    outputs: list[Tensor] = []
    hook = list(network.children())[-1].register_forward_hook(
        lambda module, inputs, output: outputs.append(output.float())
    )
    network(*inputs)
    first = inputs[0].half() if inputs[0].is_floating_point() else inputs[0]
    network.half()(first, *inputs[1:-1], inputs[-1].half())
    hook.remove()
    exact, output = outputs
    return float(100 * (output - exact).norm() / exact.norm())


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and rewrites the tables of the page."""
    parser = argparse.ArgumentParser(prog="python -m tools.demo.precision", description=__doc__)
    parser.add_argument(
        "--every", type=int, default=1, help="generate only every N-th held-out (thing, background) pair"
    )
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    replace_between(PAGE.read_text(encoding="utf-8"), MARKS, "")  # checked before the work
    tables = "\n\n".join((errors_table(), accuracy_table(options.every), range_table()))
    update_page(PAGE, MARKS, tables)


if __name__ == "__main__":
    main()
