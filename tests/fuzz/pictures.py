"""Damages pictures at random and reads them: `PYTHONPATH=.. python -m fuzz.pictures --cases 1000`, in tests/.

A case is wrong if anything but a one-line ValueError that names the file is raised, if the size in the header is not
that of the picture, or if it takes too long.
"""

from __future__ import annotations

import io
import random
import warnings
from functools import cache
from typing import Any

from fuzz.weights import Wrong, damaged_bytes, main, time_limit
from PIL import Image

from wuerstchen_core.inference.images import open_mask, open_picture, picture_size

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "PNG": ("RGB", {}), "PNG palette": ("P", {"transparency": 3}), "PNG 16": ("I;16", {}), "PNG alpha": ("RGBA", {}),
    "JPEG": ("RGB", {}), "JPEG CMYK": ("CMYK", {}), "JPEG progressive": ("L", {"progressive": True}),
    "WEBP": ("RGBA", {}), "WEBP lossless": ("RGB", {"lossless": True}), "GIF": ("P", {}), "BMP": ("RGB", {}),
    "TIFF": ("RGB", {}), "TIFF deflated": ("RGB", {"compression": "tiff_adobe_deflate"}),
    "TIFF packed": ("RGBA", {"compression": "packbits"}), "TIFF LZW": ("L", {"compression": "tiff_lzw"}),
    "TIFF 16": ("I;16", {}), "AVIF": ("RGB", {}), "MPO": ("RGB", {}),
}  # fmt: skip


@cache
def _whole(name: str, exif: bool) -> bytes:
    mode, options = KINDS[name]
    rng = random.Random(name)
    image = Image.frombytes("RGBA", (37, 23), rng.randbytes(37 * 23 * 4)).convert("RGB" if mode == "I;16" else mode)
    image = image.convert("L").convert("I;16") if mode == "I;16" else image
    tags = Image.Exif()
    tags[274], tags[270] = 6, "it"
    kind = name.split()[0]
    more = {"exif": tags} if exif and kind not in ("GIF", "BMP") else {}
    image.save(file := io.BytesIO(), kind, **options, **more)
    return file.getvalue()


def run_case(seed: int) -> str:
    """Runs one case; returns "accepted", "refused", or what is wrong with it."""
    rng = random.Random(seed)
    name = rng.choice([name for name in KINDS if name.split()[0] in Image.SAVE or not Image.init()])
    data = bytearray(_whole(name, rng.random() < 0.5))
    for _ in range(rng.choice((1, 1, 2, 5))):
        data = damaged_bytes(rng, data) or bytearray(b"x")
    outcomes = {}
    try:
        with time_limit(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for read in (picture_size, open_picture, open_mask):
                outcomes[read.__name__] = _outcome(read, bytes(data))
        size, picture = outcomes["picture_size"], outcomes["open_picture"]
        if isinstance(picture, Image.Image) and picture.size != size:
            raise Wrong(f"the size is {picture.size}, by the header {size}")
    except Wrong as error:
        return f"{name}: {error}"
    return "accepted" if isinstance(picture, Image.Image) else "refused"


def _outcome(read: Any, data: bytes) -> Any:
    file = io.BytesIO(data)
    file.name = "it.png"  # type: ignore[attr-defined]
    try:
        return read(file) if read is open_mask else read(file, "it.png")
    except ValueError as error:
        if not str(error).isprintable() or len(str(error)) > 500:
            raise Wrong(f"{read.__name__}: {error!r:.200}") from error
        return None
    except Exception as error:
        raise Wrong(f"{read.__name__}: {type(error).__name__} {str(error):.100}") from error


if __name__ == "__main__":
    main(__doc__, run_case)
