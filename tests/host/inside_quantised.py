"""Run by ComfyUI's Python, `inside_quantised.py COMFYUI PRIOR FOLDER OUTPUT`: quantises a prior in every format that
this ComfyUI has, reads it with ComfyUI's own layers and with our loader, and the files of `convert` in FOLDER likewise.
For test_host_quantised.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tools.comfyui.in_host import load_pack, seeded, write_results

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
WRITTEN = {"fp8": "fp8", "int8": "int8 convrot"}  # dtypes of `convert`, and the formats that they are
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
    for dtype in WRITTEN:
        tensors |= read_written(plain, dtype, Path(folder) / dtype)
    return tensors, facts


def read_written(plain: dict[str, Tensor], dtype: str, folder: Path) -> dict[str, Tensor]:
    """Returns weights of files that `convert` wrote as ComfyUI's layers hold them, and what those compute."""
    from comfy import ops
    from comfy.quant_ops import QuantizedTensor
    from pack.nodes.host.models import load_model
    from pack.wuerstchen_core.checkpoints import read_part
    from pack.wuerstchen_core.models.prior import Prior

    part, layers = read_part(folder / "prior.safetensors", "prior"), ops.mixed_precision_ops({}, torch.float32)
    network = Prior(part.params, operations=layers)
    network.load_state_dict(load_file(folder / "prior.safetensors"))
    loaded = load_model(part).model.diffusion_model.state_dict()
    out: dict[str, Tensor] = {}
    for layer in LAYERS:
        own, weight = network.get_submodule(layer), loaded[f"{layer}.weight"]
        assert isinstance(own.weight, QuantizedTensor)
        x = seeded(5, weight.shape[1])
        out |= {f"{layer} comfyui": own.weight.dequantize(), f"{layer} ours": weight.float()}
        out |= {f"{layer} computed by comfyui": own(x), f"{layer} computed": x @ weight.float().T + own.bias}
        _, layout, settings, _ = FORMATS[WRITTEN[dtype]]
        theirs = QuantizedTensor.from_float(plain[f"{layer}.weight"], layout, **settings)
        out |= {f"{layer} numbers": own.weight._qdata.float(), f"{layer} numbers of comfyui": theirs._qdata.float()}
        out |= {f"{layer} scale": own.weight._params.scale, f"{layer} scale of comfyui": theirs._params.scale}
    file, ids = folder / "text_encoder.safetensors", torch.tensor([[3, 0, 63]])
    entries = {key.removeprefix("token_embedding."): x for key, x in load_file(file).items() if "token_emb" in key}
    table = layers.Embedding(*entries["weight"].shape, dtype=torch.float32)
    table.load_state_dict(entries)
    restored = read_part(file, "prior_text_encoder").state_dict["token_embedding.weight"]
    out |= {"embedding comfyui": table(ids), "embedding ours": restored[ids].float()}
    return {f"{dtype} file {name}": x.detach() for name, x in out.items()}


if __name__ == "__main__":
    write_results(main)
