#!/usr/bin/env bash
# diffusers 0.42.1: from_pretrained cannot load a Würstchen pipeline that save_pretrained wrote, nor a published one.
#
# Since the pipeline is in diffusers.pipelines.deprecated (0.38), save_pretrained writes ["diffusers", "WuerstchenPrior"]
# into model_index.json, which diffusers does not export; published folders have ["wuerstchen", "WuerstchenPrior"], which
# is no library that diffusers imports. Both raise ValueError. The full name of the module with the class, which has been
# imported by then, works.
# Consequence here: wuerstchen_core/checkpoints/diffusers_pipeline.py writes those names (MODULES).
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet torch==2.14.1 numpy diffusers==0.42.1 transformers==5.24.0 accelerate

cd "$work"
"$work/venv/bin/python" - <<'PY'
import json
import sys
from pathlib import Path

from diffusers import DDPMWuerstchenScheduler, WuerstchenPriorPipeline
from diffusers.pipelines.deprecated.wuerstchen import WuerstchenPrior
from transformers import CLIPTextConfig, CLIPTextModel

config = CLIPTextConfig(
    vocab_size=9, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1, eos_token_id=8
)
pipeline = WuerstchenPriorPipeline(
    tokenizer=None,
    text_encoder=CLIPTextModel(config),
    prior=WuerstchenPrior(c_in=16, c=64, c_cond=64, c_r=8, depth=1, nhead=1),
    scheduler=DDPMWuerstchenScheduler(),
)
pipeline.save_pretrained("saved")
index = Path("saved/model_index.json")
saved = json.loads(index.read_text())
names = [saved["prior"][0], "wuerstchen", WuerstchenPrior.__module__]
found = {}
for name in names:
    index.write_text(json.dumps({**saved, "prior": [name, "WuerstchenPrior"]}))
    try:
        WuerstchenPriorPipeline.from_pretrained("saved", tokenizer=None)
        found[name] = "loaded"
    except ValueError as error:
        found[name] = f"ValueError: {str(error)[:60]} ..."
for name, outcome in found.items():
    print(f"{name}: {outcome}")
if [outcome == "loaded" for outcome in found.values()] != [False, False, True]:
    sys.exit("behaviour has changed")
PY
