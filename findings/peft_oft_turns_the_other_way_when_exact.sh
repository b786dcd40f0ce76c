#!/usr/bin/env bash
# peft 0.21.2: the exact Cayley transform of OFT is the inverse of the rotation that its default series approximates.
#
# OFTConfig.use_cayley_neumann chooses between a series (True, the default) and the exact formula. The series is that
# of (I + Q)(I - Q)^-1, but the exact formula computes (I - Q)(I + Q)^-1: the same weights turn the other way. And
# its five terms are no rotation: they are (I + Q)^2 (I + Q^2), so that a block of 2 with Q = [[0, 1], [-1, 0]], exactly
# 90 degrees, maps all inputs to zero. lycoris-lora 4.1.3 computes (I + Q)(I - Q)^-1 exactly, for a layer's outputs.
# Consequence here: OFT is read in lycoris's format; peft's, whose tensors are named oft_R, is not supported.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet torch==2.14.1 numpy peft==0.21.2 lycoris-lora==4.1.3

"$work/venv/bin/python" - 2> "$work/log" <<'PY' || { cat "$work/log"; exit 1; }
import math
import sys

import torch
from lycoris.functional.diag_oft import diff_weight
from peft import OFTConfig, get_peft_model
from torch import nn


def angle_and_length(weight):
    """Returns the angle in degrees and the length of the image of the first axis."""
    x, y = weight[:, 0].tolist()
    return round(math.degrees(math.atan2(y, x)), 1), round(math.hypot(x, y), 3)


def peft_weight(q, **config):
    net = nn.Sequential(nn.Linear(2, 2, bias=False))
    nn.init.eye_(net[0].weight)
    net = get_peft_model(net, OFTConfig(r=0, oft_block_size=2, target_modules=["0"], **config))
    nn.init.constant_(net.base_model.model[0].oft_R["default"].weight, q)  # Q = [[0, q], [-q, 0]]
    return net.merge_and_unload()[0].weight.detach()


def lycoris_weight(q):
    blocks = torch.tensor([[[0.0, q], [0.0, 0.0]]])  # Q = blocks - blocks.mT
    return torch.eye(2) + diff_weight(torch.eye(2), blocks, None)


found = []
for q in (0.1, 0.5, 1.0):
    weights = {
        "peft series": peft_weight(q),
        "peft exact": peft_weight(q, use_cayley_neumann=False),
        "lycoris": lycoris_weight(q),
    }
    found.append([angle_and_length(x) for x in weights.values()])
    print(f"Q {q}:", ", ".join(f"{name} {a} degrees, length {n}" for name, (a, n) in zip(weights, found[-1])))
series, exact, lycoris = zip(*found)
angles = [round(math.degrees(2 * math.atan(q)), 1) for q in (0.1, 0.5, 1.0)]
if list(lycoris) != [(a, 1.0) for a in angles] or list(exact) != [(-a, 1.0) for a in angles]:
    sys.exit("behaviour has changed")
if [a for a, _ in series[:2]] != angles[:2] or [n for _, n in series] != [1.0, 0.938, 0.0]:
    sys.exit("behaviour has changed")
PY
