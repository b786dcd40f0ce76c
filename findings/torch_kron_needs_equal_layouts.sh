#!/usr/bin/env bash
# torch 2.14.1: torch.kron raises an error for a transposed factor, unless both factors are transposed.
#
# "view size is not compatible with input tensor's size and stride": the product of the factors is taken with their
# memory layout and then viewed in the result's shape. Most other functions take any layout; numpy.kron does too. It is
# not only about `.T`: torch.linalg.inv returns such a matrix, and so does the reshaped result of an einsum, as for the
# Tucker core of a LoKr file. `out=` avoids the error. Two transposed factors give a transposed result, without error.
# Consequence here: wuerstchen_core/checkpoints/adapters.py gives kron contiguous matrices only, the flattened factors.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet torch==2.14.1 numpy

"$work/venv/bin/python" - <<'PY'
import sys

import numpy as np
import torch

torch.manual_seed(0)
a, b, square = torch.randn(2, 3), torch.randn(4, 5), torch.randn(4, 4)
core = torch.einsum("rskl,ro,si->oikl", torch.randn(2, 2, 3, 3), torch.randn(2, 4), torch.randn(2, 5))
one = torch.randn(2, 3, 1, 1)
kernel = torch.randn(4, 5, 3, 3)


def outcome(x, y, **out):
    expected = torch.from_numpy(np.kron(x.numpy(), y.numpy()))
    try:
        return "equal to numpy" if torch.allclose(torch.kron(x, y, **out), expected) else "differs from numpy"
    except RuntimeError as error:
        return f"RuntimeError: {str(error).split(' input')[0]} ..."


found = {
    "A, B": outcome(a, b),
    "A, B.T": outcome(a, b.T),
    "A.T, B": outcome(a.T, b),
    "A.T, B.T": outcome(a.T, b.T),
    "A, B.T with out=": outcome(a, b.T, out=torch.empty(10, 12)),
    "A, inv(C)": outcome(a, torch.linalg.inv(square)),
    "kernel": outcome(one, kernel),
    "kernel, channels last": outcome(one, kernel.contiguous(memory_format=torch.channels_last)),
    "kernel of an einsum": outcome(one, core),
    "every 2nd column of B": outcome(a, b[:, ::2]),
}
for name, text in found.items():
    print(f"{name:22} {text}")
fails = {name for name, text in found.items() if "view size is not compatible" in text}
if fails != {"A, B.T", "A.T, B", "A, inv(C)", "kernel, channels last", "kernel of an einsum"}:
    sys.exit("behaviour has changed")
if any(text != "equal to numpy" for name, text in found.items() if name not in fails):
    sys.exit("behaviour has changed")
PY
