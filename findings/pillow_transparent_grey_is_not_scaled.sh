#!/usr/bin/env bash
# Pillow 13.0.0: the transparent colour of a grey PNG of 2 or 4 bits is lost.
#
# Pillow scales the pixels to 8 bits (15 becomes 255), but keeps the colour of the tRNS chunk as it is (15), so that no
# pixel equals it and `convert("RGBA")` is opaque. With 8 bits the same picture is transparent.
# Consequence here: `inference/eight_bits.py` compares the colours itself; tests/inference/test_image_files.py checks it.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet pillow==13.0.0

"$work/venv/bin/python" - <<'PYTHON'
import io, struct, sys, zlib
from PIL import Image

def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

def alpha(bits):
    """Returns the alpha of a white and a black pixel, where white is transparent."""
    white = 2**bits - 1
    row = bytes([white << (8 - bits), 0][: 1 if bits < 8 else 2])
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 1, bits, 0, 0, 0, 0)) + chunk(b"tRNS", struct.pack(">H", white))
    png = b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0" + row)) + chunk(b"IEND", b"")
    return list(Image.open(io.BytesIO(png)).convert("RGBA").getchannel("A").tobytes())

found = {bits: alpha(bits) for bits in (1, 2, 4, 8)}
print("alpha of white (transparent) and black, by bits:", found)
sys.exit(found != {1: [0, 255], 2: [255, 255], 4: [255, 255], 8: [0, 255]})
PYTHON
