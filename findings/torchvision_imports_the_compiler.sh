#!/usr/bin/env bash
# torchvision 0.29.1 with torch 2.14.1: `import torchvision` imports torch's compiler.
#
# torchvision/ops/roi_align.py takes one function from torch._dynamo.utils at its import, although it compiles nothing
# before roi_align is called. The compiler makes `import torchvision` take as long as `import torch`, also where another
# package imports it: open_clip and timm do.
# Consequence here: the networks and picture transforms that torchvision has are this repository's own, and
# tests/cli/test_process.py checks that neither torchvision nor torch._dynamo is imported by `generate`.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet torch==2.14.1 torchvision==0.29.1

"$work/venv/bin/python" - <<'PY'
import sys
import time

start = time.process_time()
import torch

torch_alone, modules = time.process_time() - start, len(sys.modules)
assert "torch._dynamo" not in sys.modules
start = time.process_time()
import torchvision

print(f"torch: {torch_alone:.1f} s of processor time, {modules} modules")
print(f"torchvision after it: {time.process_time() - start:.1f} s, {len(sys.modules) - modules} modules more")
sys.exit(None if "torch._dynamo" in sys.modules else "behaviour has changed")
PY
