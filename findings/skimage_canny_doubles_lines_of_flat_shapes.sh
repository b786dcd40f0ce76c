#!/usr/bin/env bash
# scikit-image 0.26.0: canny draws outlines of flat shapes one or two pixels wide, depending on their colours.
#
# The documentation says that it thins edges "to 1-pixel wide curves". Between two flat colours the smoothed gradient
# has two equal maxima, one on each side of the edge. canny keeps pixels that equal their neighbour, so both stay,
# unless rounding makes one greater. That depends on the two colours, on float32 or float64, and on the direction: the
# upright sides of a square can be twice as wide as the others. cv2.Canny (opencv-python-headless 5.0.0.93) keeps one of
# two equal pixels. Photographs have hardly any such edges; drawings, masks and diagrams have them throughout.
# Consequence here: `train control` draws outlines in random widths (line_widths), single and double lines among them.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet numpy==2.4.6 scikit-image==0.26.0 opencv-python-headless==5.0.0.93

"$work/venv/bin/python" - <<'PY'
import sys
from collections import Counter

import cv2
import numpy as np
from skimage.feature import canny

GREYS = range(0, 256, 15)
KINDS = {frozenset({1}): "one pixel", frozenset({2}): "two pixels", frozenset({1, 2}): "one and two"}


def square(background, colour):
    image = np.full((64, 64), background, np.uint8)
    image[16:48, 16:48] = colour
    return image


def widths(edges):
    """Returns the widths of the left, right, upper and lower line."""
    across, down = edges[32], edges[:, 32]
    return tuple(int(half.sum()) for line in (across, down) for half in (line[:32], line[32:]))


squares = [square(a, b) for a in GREYS for b in GREYS if abs(a - b) >= 75]
found = {}
for name, function in {
    "skimage, uint8": canny,
    "skimage, float64": lambda x: canny(x / 255),
    "skimage, float32": lambda x: canny((x / 255).astype(np.float32)),
    "OpenCV": lambda x: cv2.Canny(x, 50, 100) > 0,
}.items():
    kinds = Counter()
    for image in squares:
        kinds[KINDS.get(frozenset(widths(function(image))), "other")] += 1
    found[name] = kinds
    counts = (f"{kind} {count}" for kind, count in sorted(kinds.items()))
    print(f"{name:16} of {len(squares)} squares:", ", ".join(counts))
if found.pop("OpenCV") != {"one pixel": len(squares)}:
    sys.exit("behaviour has changed")
if any(kinds["two pixels"] < 10 or kinds["one pixel"] < 50 or kinds["other"] for kinds in found.values()):
    sys.exit("behaviour has changed")
if found["skimage, float64"]["one and two"] < 10:
    sys.exit("behaviour has changed")
PY
