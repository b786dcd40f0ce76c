#!/usr/bin/env bash
# torch 2.14.1: most of Muon's update for a gradient of low rank is amplified rounding error.
#
# Muon orthogonalizes the gradient by five steps in bfloat16, whatever the dtype of the weights. Each multiplies small
# singular values by 3.4445, all by 485, and so the rounding errors too: singular values of zero come out about as large
# as the others. For a gradient of rank 1, about 70 % of the squared update is in directions in which the gradient is
# zero, and 1.1 times the gradient gives another update, although Muon should not depend on the gradient's scale. The
# same steps in float64 have neither. A gradient has low rank where a layer gets one row per image, as time embeddings
# and pooled texts are, in the first steps and with few or fixed times. The errors are orthogonal to these rows, so they
# do not change what these give, and later updates average them out.
# Consequence here: [train] muon_lr trains the `mapper` of the time in each block too. For the demo's prior 65 % of its
# first update is such error with one image per step, 7 % with 16; in its other matrices at most 5 %.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet torch==2.14.1 numpy

"$work/venv/bin/python" - <<'PY'
import sys

import torch
from torch import nn

SHAPE = 256, 64


def by_torch(gradient):
    weight = nn.Parameter(torch.zeros(SHAPE))
    optimizer = torch.optim.Muon([weight], lr=1.0, weight_decay=0.0)
    weight.grad = gradient.clone()
    optimizer.step()
    return weight.detach().double()


def in_float64(gradient):
    a, b, c = torch.optim.Muon([nn.Parameter(torch.zeros(SHAPE))]).defaults["ns_coefficients"]
    u, s, v = torch.linalg.svd(gradient.double(), full_matrices=False)  # the steps change singular values only
    s = s / s.norm()
    for _ in range(5):
        s = a * s + b * s**3 + c * s**5
    return -(u * s) @ v


def outside(update, gradient, rank):
    """Returns the fraction of the squared update in directions in which the gradient is zero."""
    u, _, v = torch.linalg.svd(gradient.double(), full_matrices=False)
    u, v = u[:, :rank], v[:rank]
    inside = u @ (u.T @ update @ v.T) @ v
    return float((update - inside).square().sum() / update.square().sum())


def cosine(one, other):
    return float(torch.cosine_similarity(one.flatten(), other.flatten(), dim=0))


torch.manual_seed(0)
found = {}
for rank in (1, 4, 16, 64):
    gradient = torch.randn(SHAPE[0], rank) @ torch.randn(rank, SHAPE[1])
    row = []
    for name, muon in (("torch", by_torch), ("float64", in_float64)):
        update = muon(gradient)
        row += [outside(update, gradient, rank), cosine(update, muon(1.1 * gradient))]
        text = f"{row[-2]:6.1%} where the gradient is zero, cosine to the update of 1.1 times it {row[-1]:.3f}"
        print(f"rank {rank:2} {name:7} {text}")
    found[rank] = row
if any(zero > 0.01 or same < 0.999 for _, _, zero, same in found.values()):
    sys.exit("the comparison is wrong")
if not (found[1][0] > 0.5 and found[1][1] < 0.6 and found[4][0] > 0.1 and found[64][0] < 0.01 and found[64][1] > 0.99):
    sys.exit("behaviour has changed")
PY
