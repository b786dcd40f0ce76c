#!/usr/bin/env bash
# torch 2.14.1: torch.load does not compare the checksums of the zip archive that a PyTorch file is.
#
# A PyTorch file is a zip archive with a CRC-32 for each tensor's bytes. After one byte of a tensor has changed, as on a
# failing disk or in a broken download, torch.load returns the changed tensor without a warning, mapped or not, and also
# if the member is compressed; the same holds for the pickle with the names. Python's own zipfile raises BadZipFile for the
# same file. Only sizes are compared: a tensor whose bytes are cut off is an error.
# Consequence here: checkpoints/torch_files.py compares the checksums of every member that it reads.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet torch==2.14.1 numpy==2.3.4

"$work/venv/bin/python" - "$work" <<'PY'
import sys
import zipfile
from pathlib import Path

import torch

folder = Path(sys.argv[1])
torch.save({"a": torch.ones(64)}, folder / "plain.pt")
with zipfile.ZipFile(folder / "plain.pt") as source, zipfile.ZipFile(folder / "deflated.pt", "w") as target:
    for name in source.namelist():
        target.writestr(zipfile.ZipInfo(name), source.read(name), compress_type=zipfile.ZIP_DEFLATED)

results = []
for name in ("plain", "deflated"):
    path = folder / f"{name}.pt"
    with zipfile.ZipFile(path) as archive:
        [member] = [x for x in archive.infolist() if x.filename.endswith("data/0")]
    content = bytearray(path.read_bytes())
    if name == "plain":  # the last byte of the number 1.0
        content[content.index(torch.ones(1).numpy().tobytes() * 64) + 3] ^= 1
    else:
        crc = member.CRC.to_bytes(4, "little")
        content = content.replace(crc, bytes([crc[0] ^ 1]) + crc[1:])
    path.write_bytes(content)
    with zipfile.ZipFile(path) as archive:
        seen = archive.testzip()
    ways = [{}, {"mmap": True}] if name == "plain" else [{}]
    sums = [float(torch.load(path, weights_only=True, **way)["a"].sum()) for way in ways]
    print(f"{name}: zipfile finds {Path(seen).name} damaged; torch.load returns tensors with the sums {sums} (64 was saved)")
    results.append((Path(seen).name, sums))
expected = [("0", [63.25, 63.25]), ("0", [64.0])]
sys.exit(0 if results == expected else f"behaviour has changed: {results}")
PY
