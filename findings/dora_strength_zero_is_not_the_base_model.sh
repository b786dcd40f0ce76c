#!/usr/bin/env bash
# peft 0.21.2, lycoris-lora 4.1.3: a DoRA at strength 0 does not give the weights of the base model.
#
# At strength 1 both give m * (W + BA) / |W + BA|, by rows, to the last digits. Below that they part. peft's strength
# scales BA only: at 0 there remains W with the trained norms of its rows, m * W / |W|. lycoris's multiplier scales
# only the change of the norms: at 0 there remains the whole W + BA, in this example further from W than at strength 1.
# Consequence here: a strength interpolates between W and the weights at strength 1, as in ComfyUI, and 0 changes
# nothing; a DoRA's pictures can be compared with those of these libraries at strength 1 only.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet torch==2.14.1 numpy peft==0.21.2 lycoris-lora==4.1.3

"$work/venv/bin/python" - 2> "$work/log" <<'PY' || { cat "$work/log"; exit 1; }
import logging
import sys

import torch
from lycoris import LycorisNetwork, create_lycoris
from peft import LoraConfig, get_peft_model
from peft.helpers import rescale_adapter_scale
from torch import nn

logging.getLogger("LyCORIS").setLevel(logging.WARNING)
torch.manual_seed(0)
W, A, B = torch.randn(6, 4), torch.randn(2, 4), torch.randn(6, 2)
m = torch.linalg.vector_norm(W, dim=1) * torch.linspace(0.7, 1.4, 6)
inputs = torch.eye(4)


def base():
    net = nn.Sequential(nn.Linear(4, 6, bias=False))
    net[0].weight.data.copy_(W)
    return net


def peft_weight(strength):
    net = get_peft_model(base(), LoraConfig(r=2, lora_alpha=2, target_modules=["0"], use_dora=True))
    layer = net.base_model.model[0]
    layer.lora_A["default"].weight.data.copy_(A)
    layer.lora_B["default"].weight.data.copy_(B)
    layer.lora_magnitude_vector["default"].weight.data.copy_(m)
    with rescale_adapter_scale(net, strength):
        return net(inputs).T


def lycoris_weight(strength):
    net = base()
    LycorisNetwork.apply_preset({"target_module": ["Linear"]})
    adapter = create_lycoris(net, 1.0, linear_dim=2, linear_alpha=2, algo="lora", dora_wd=True)
    adapter.apply_to()
    layer = adapter.loras[0]
    layer.lora_down.weight.data.copy_(A)
    layer.lora_up.weight.data.copy_(B)
    layer.dora_scale.data.copy_(m[:, None])
    adapter.set_multiplier(strength)
    return net(inputs).T


def near(x, y):
    return torch.allclose(x, y, atol=1e-5)


def with_norms(x):
    return m[:, None] * x / torch.linalg.vector_norm(x, dim=1, keepdim=True)


print("relative distance from the base weights")
for strength in (1.0, 0.5, 0.0):
    with torch.no_grad():
        found = {"peft": peft_weight(strength), "lycoris": lycoris_weight(strength)}
    text = ", ".join(f"{name} {((x - W).norm() / W.norm()).item():.3f}" for name, x in found.items())
    print(f"strength {strength}: {text}")
    expected = {
        1.0: (with_norms(W + B @ A), with_norms(W + B @ A)),
        0.5: (with_norms(W + 0.5 * B @ A), (W + B @ A + with_norms(W + B @ A)) / 2),
        0.0: (with_norms(W), W + B @ A),
    }[strength]
    if not (near(found["peft"], expected[0]) and near(found["lycoris"], expected[1])):
        sys.exit("behaviour has changed")
PY
