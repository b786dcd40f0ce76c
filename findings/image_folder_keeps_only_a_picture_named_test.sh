#!/usr/bin/env bash
# datasets 5.2.0: one picture named `test tube.png` makes `imagefolder` drop all others, and its own caption, silently.
#
# The words train, training, test, testing, dev, val, valid, validation, eval and evaluation name splits wherever they
# stand between separators in a file name. If any file matches, files that match none are in no split, and metadata.jsonl
# is such a file: three pictures with three captions become one picture without a caption. Nothing is logged. A folder
# named `train` around all of them, or data_files={"train": "**"}, avoids it; `latest.png` does not match.
# Consequence here: `generate --prompts` names pictures by numbers, not by their prompts, so its folders load whole; a
# folder of one's own may not, though `train` reads all of it.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet datasets==5.2.0 pillow

HF_HOME="$work/cache" HF_HUB_OFFLINE=1 "$work/venv/bin/python" - "$work" <<'PY'
import json
import sys
from pathlib import Path

from datasets import disable_progress_bars, load_dataset
from PIL import Image

disable_progress_bars()
work = Path(sys.argv[1])


def read(names, folder="", **options):
    """Returns the captions by split, of pictures whose captions are their names."""
    root = work / f"pictures{len(list(work.glob('pictures*')))}"
    (root / folder).mkdir(parents=True)
    for name in names:
        Image.new("RGB", (8, 8)).save(root / folder / name)
    rows = [{"file_name": name, "text": Path(name).stem} for name in names]
    (root / folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    splits = load_dataset("imagefolder", data_dir=str(root), cache_dir=str(work / "cache" / root.name), **options)
    return {split: [row.get("text") for row in rows] for split, rows in splits.items()}


def check(label, found, expected):
    print(f"{label:22} {found}")
    if found != expected:
        sys.exit("behaviour has changed")


three = ["apple.png", "cat.png", "test tube.png"]
check("apple, cat, latest", read(["apple.png", "cat.png", "latest.png"]), {"train": ["apple", "cat", "latest"]})
check("apple, cat, test tube", read(three), {"test": [None]})
check("apple, cat, dev-board", read(["apple.png", "cat.png", "dev-board.png"]), {"validation": [None]})
check("apple, cat, training", read(["apple.png", "cat.png", "training.png"]), {"train": [None]})
check("in a folder `train`", read(three, "train"), {"train": ["apple", "cat", "test tube"]})
check("with data_files", read(three, data_files={"train": "**"}), {"train": ["apple", "cat", "test tube"]})
PY
