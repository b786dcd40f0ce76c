"""Run by ComfyUI's Python, `inside_quantised.py COMFYUI PRIOR FOLDER OUTPUT`: quantises a prior in every format that
this ComfyUI has, reads it with ComfyUI's own layers and with our loader. For test_host_quantised.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tools.comfyui.in_host import load_pack, write_results

FORMATS: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {  # format, layout, its settings, its JSON
    "fp8": ("float8_e4m3fn", "TensorCoreFP8E4M3Layout", {"scale": "recalculate"}, {}),
    "fp8_e5m2": ("float8_e5m2", "TensorCoreFP8E5M2Layout", {"scale": "recalculate"}, {}),
    "int8": ("int8_tensorwise", "TensorWiseINT8Layout", {"per_channel": True}, {}),
    "int8 one scale": ("int8_tensorwise", "TensorWiseINT8Layout", {}, {}),
    "int8 convrot": (
        "int8_tensorwise",
        "TensorWiseINT8Layout",
        {"per_channel": True, "convrot": True, "convrot_groupsize": 64},
        {"convrot": True, "convrot_groupsize": 64},
    ),
    "w4a4": ("convrot_w4a4", "TensorCoreConvRotW4A4Layout", {"convrot_groupsize": 64}, {"convrot_groupsize": 64}),
}
LAYERS = ("blocks.2.attention.to_q", "blocks.2.attention.to_out.0", "cond_mapper.2")


def main(prior: str, folder: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    from comfy import ops

    load_pack()
    from pack.nodes.host.models import load_model
    from pack.wuerstchen_core.checkpoints import read_part

    plain, tensors, facts = load_file(prior), {}, {"formats": [], "refused": {}}
    try:
        from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor
    except ImportError:  # older than quantised files
        return tensors, facts
    for name, (form, layout, settings, config) in FORMATS.items():
        if form not in QUANT_ALGOS:
            continue
        state = dict(plain)
        for layer in LAYERS:
            weight = QuantizedTensor.from_float(plain[f"{layer}.weight"], layout, **settings)
            state |= weight.state_dict(f"{layer}.weight")
            text = json.dumps({"format": form, **config}).encode()
            state[f"{layer}.comfy_quant"] = torch.tensor(list(text), dtype=torch.uint8)
        file = Path(folder) / f"{name}.safetensors"
        save_file({key: x.contiguous() for key, x in state.items()}, file)
        try:
            loaded = load_model(read_part(file, "prior")).model.diffusion_model.state_dict()
        except ValueError as error:
            facts["refused"][name] = str(error)
            continue
        facts["formats"].append(name)
        for layer in LAYERS:
            rows, columns = plain[f"{layer}.weight"].shape
            own = ops.mixed_precision_ops({}, torch.float32).Linear(columns, rows, device="cpu", dtype=torch.float32)
            own.load_state_dict({key.removeprefix(f"{layer}."): x for key, x in state.items() if key.startswith(layer)})
            tensors[f"{name} {layer} comfyui"] = own.weight.dequantize()
            tensors[f"{name} {layer} ours"] = loaded[f"{layer}.weight"]
    return tensors, facts


if __name__ == "__main__":
    write_results(main)
