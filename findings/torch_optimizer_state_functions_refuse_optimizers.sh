#!/usr/bin/env bash
# torch 2.14.1: the functions for full optimizer states refuse some optimizers, and change others before their first step.
#
# torch.distributed.checkpoint.state_dict, with StateDictOptions(full_state_dict=True, cpu_offload=True):
# - set_optimizer_state_dict raises AssertionError for an optimizer without tensors in its state, such as SGD without
#   momentum, and KeyError for entries of a parameter group that only exist after a step, as Prodigy has them.
# - get_optimizer_state_dict calls step() with zero gradients if the state is still empty. AdamW then counts one step
#   more, so a run that saves a checkpoint before its first step (all were skipped) differs from one that does not.
# - There is no such function for tensors that belong to no optimizer, such as the average of the weights.
# Consequence here: wuerstchen_core/training/sharding.py gathers and shards the states of all of them itself.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet torch==2.14.1 numpy prodigyopt==1.1.2

"$work/venv/bin/python" - <<'PY'
import sys

import torch
from prodigyopt import Prodigy
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict

OPTIONS = StateDictOptions(full_state_dict=True, cpu_offload=True)


def new(kind, **settings):
    torch.manual_seed(0)
    network = nn.Linear(8, 1)
    return network, kind(network.parameters(), **settings)


def train(network, optimizer, steps):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        network(torch.randn(4, 8, generator=generator)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def resumed(kind, **settings):
    network, optimizer = new(kind, **settings)
    train(network, optimizer, 3)
    state = get_optimizer_state_dict(network, optimizer, options=OPTIONS)
    other = new(kind, **settings)
    try:
        set_optimizer_state_dict(*other, state, options=OPTIONS)
    except (AssertionError, KeyError) as error:
        return f"{type(error).__name__}: {error}"
    return "loaded"


def change(kind, **settings):
    one, other = new(kind, **settings), new(kind, **settings)
    get_optimizer_state_dict(*one, options=OPTIONS)
    for network, optimizer in (one, other):
        train(network, optimizer, 4)
    return float((one[0].weight - other[0].weight).detach().abs().max())


kinds = {
    "SGD": (torch.optim.SGD, {"lr": 0.01}),
    "SGD with momentum": (torch.optim.SGD, {"lr": 0.01, "momentum": 0.9}),
    "AdamW": (torch.optim.AdamW, {"lr": 0.01}),
    "Prodigy": (Prodigy, {"lr": 1.0}),
}
found = {name: (resumed(kind, **settings), change(kind, **settings)) for name, (kind, settings) in kinds.items()}
for name, (outcome, difference) in found.items():
    print(f"{name:18} {outcome}; saved before the first step, weights differ by {difference:.4f} after four")
if {name for name, (outcome, _) in found.items() if outcome != "loaded"} != {"SGD", "Prodigy"}:
    sys.exit("behaviour has changed")
if {name for name, (_, difference) in found.items() if difference} != {"AdamW"}:
    sys.exit("behaviour has changed")
PY
