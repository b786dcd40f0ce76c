#!/usr/bin/env bash
# peft 0.21.2: a saved LoRA can have other strengths and ranks when it is loaded again, if patterns overlap.
#
# Of the entries of LoraConfig.alpha_pattern and rank_pattern, the first that matches a module counts. save_pretrained
# writes adapter_config.json with sorted keys, so a pattern that came first in training can come later after loading.
# Consequence here: adapter_config.json is read in the order of the file, as peft reads it; that equals the trained
# strength only if patterns do not overlap. Tests compare with the adapter that peft has loaded, not with the trained one.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet torch==2.14.1 numpy peft==0.21.2

WORK="$work" "$work/venv/bin/python" - 2> "$work/log" <<'PY' || { cat "$work/log"; exit 1; }
import os
import sys

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(nn.Linear(4, 4))


def scale(model):
    return model.base_model.model.block[0].scaling["default"]


config = LoraConfig(r=2, lora_alpha=2, target_modules=["0"], alpha_pattern={"block.0": 8, "0": 4})
trained = get_peft_model(Net(), config)
trained.save_pretrained(os.environ["WORK"] + "/adapter")
loaded = PeftModel.from_pretrained(Net(), os.environ["WORK"] + "/adapter")
print(f"trained: {scale(trained)}, loaded: {scale(loaded)}")
if (scale(trained), scale(loaded)) != (4.0, 2.0):
    sys.exit("behaviour has changed")
PY
