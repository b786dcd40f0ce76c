#!/usr/bin/env bash
# datasets 5.2.0: load_dataset("parquet", data_files=LOCAL) sends a request to Hugging Face for local files too.
#
# It counts the uses of its own readers ("parquet", "json", "imagefolder" ...) by a HEAD request of up to three seconds,
# unless HF_HUB_OFFLINE or HF_UPDATE_DOWNLOAD_COUNTS=0 is set. Dataset.from_parquet reads the same files without it, as
# does load_from_disk for its folders.
# Consequence here: `training/data/hf_datasets.py` reads Parquet files by Dataset.from_parquet, so that `train` uses the
# network only for sources with an address or a name of the Hub; tests/training/data/test_hf_datasets.py checks it.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet datasets==5.2.0

HF_HOME="$work/cache" "$work/venv/bin/python" - "$work" <<'PY'
import sys
from pathlib import Path

import datasets
from datasets import load

datasets.disable_progress_bars()
work, requests = Path(sys.argv[1]), []


class Session:
    def head(self, address, **_):
        requests.append(address)


load.get_session = Session
file = str(work / "a.parquet")
datasets.Dataset.from_dict({"text": ["one", "two"]}).to_parquet(file)
read = {
    "Dataset.from_parquet": lambda: datasets.Dataset.from_parquet(file),
    "load_dataset": lambda: datasets.load_dataset("parquet", data_files=file, split="train"),
}
counts = {}
for name, function in read.items():
    requests.clear()
    assert function()["text"][:] == ["one", "two"]
    counts[name] = len(requests)
print("requests for a local file:", counts)
sys.exit(counts != {"Dataset.from_parquet": 0, "load_dataset": 1})
PY
