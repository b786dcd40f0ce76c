#!/usr/bin/env bash
# torch 2.14.1: interpolate(antialias=True, align_corners=True) does not align the corners; its ONNX export does.
#
# Aligned corners mean that output i is taken at input i * s, with s = (in - 1) / (out - 1); the documentation says that
# this preserves the values at the corners. With antialias=True the scale s stays, but output i is taken at
# (i + 0.5) * s - 0.5: the result is shifted by (1 - s) / 2 pixels of the input, and no longer symmetric.
# torch.onnx.export (onnxscript 0.7.2) writes a Resize with "align_corners", and ONNX Runtime 1.32.0 aligns them: the
# exported network computes something else, without an error. Without align_corners or antialias both are equal.
# Consequence here: Stage B was trained with both options, and resize_prior_latents in models/decoder.py keeps them. At
# 1024 pixels its three levels are off by 0.32, 0.13 and, to the other side, 0.27 cells of Stage C: 14, 6 and 11 pixels.
# Another framework must do the same. diffusers' UNet of Stable Cascade aligns the corners, but without antialias.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet torch==2.14.1 numpy onnx==1.23.2 onnxscript==0.7.2 onnxruntime==1.32.0

cd "$work"
"$work/venv/bin/python" - 2> "$work/log" <<'PY' || { cat "$work/log"; exit 1; }
import sys

import numpy as np
import onnxruntime
import torch
import torch.nn.functional as F
from torch import nn

RAMP = torch.arange(24.0).expand(1, 1, 1, 24)  # of Stage C's width for 1024 pixels; values are positions
MODES = {
    "antialias, aligned": {"antialias": True, "align_corners": True},
    "antialias": {"antialias": True, "align_corners": False},
    "aligned": {"antialias": False, "align_corners": True},
}


class Resize(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.options = options

    def forward(self, x):
        return F.interpolate(x, mode="bicubic", **self.options)


def by_onnx(net):
    torch.onnx.export(net, (RAMP,), "net.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession("net.onnx")
    return session.run(None, {session.get_inputs()[0].name: RAMP.numpy()})[0].ravel()


unchanged = True
for out in (64, 32, 16):  # of Stage B's levels
    s = 23 / (out - 1)
    middle = slice(out // 4, -out // 4)  # far from the edges, where a cubic overshoots
    for name, options in MODES.items():
        net = Resize(size=(1, out), **options)
        found, exported = net(RAMP).numpy().ravel(), by_onnx(net)
        shifts = [(x - np.arange(out) * s)[middle].mean() for x in (found, exported)]
        asymmetry = [np.abs(x + x[::-1] - 23).max() for x in (found, exported)]
        text = (f"shift {shift:6.3f}, asymmetry {a:5.3f}" for shift, a in zip(shifts, asymmetry))
        print(f"24 to {out}, {name:18}", *(f" {place}: {x}" for place, x in zip(("torch", "ONNX"), text)))
        if name == "antialias, aligned":
            expected = -(1 - s) / 2
            unchanged &= abs(shifts[0] - expected) < 0.02 and asymmetry[0] > 0.1
            unchanged &= abs(shifts[1]) < 0.02 and asymmetry[1] < 1e-3
        else:
            unchanged &= bool(np.abs(found - exported).max() < 1e-3 and asymmetry[0] < 1e-3)
if not unchanged:
    sys.exit("behaviour has changed")
PY
