"""The published files: where they are, their sizes and checksums, and the sets that make a complete model."""

from __future__ import annotations

from dataclasses import dataclass

from .components import TOWERS, component

HUB = "https://huggingface.co"


@dataclass(frozen=True)
class PublishedFile:
    """A file on the Hugging Face hub, with the name that the workflows give it.

    `sha256` are the first digits of its checksum, "" if unknown; `size` is in bytes, some are rounded. `revision` is
    the hub's branch or commit.
    """

    repo: str
    path: str
    name: str
    part: str
    size: int
    sha256: str = ""
    revision: str = "main"

    @property
    def folder(self) -> str:
        """The folder under ComfyUI's `models`."""
        return component(self.part).loader.folder

    @property
    def url(self) -> str:
        return f"{HUB}/{self.repo}/resolve/{self.revision}/{self.path}"


def _original(path: str, part: str, size: int, sha256: str = "", revision: str = "main") -> PublishedFile:
    return PublishedFile("dome272/wuerstchen", path, path, part, size, sha256, revision)


_WEIGHTS = "diffusion_pytorch_model.safetensors"
_PRIOR = PublishedFile(
    "warp-ai/wuerstchen-prior", f"prior/{_WEIGHTS}", "wuerstchen_v2_prior.safetensors", "prior", 3_970_000_000
)
_DECODER = PublishedFile(
    "warp-ai/wuerstchen", f"decoder/{_WEIGHTS}", "wuerstchen_v2_decoder.safetensors", "decoder", 4_220_000_000
)
_STAGE_A = PublishedFile(
    "warp-ai/wuerstchen", f"vqgan/{_WEIGHTS}", "wuerstchen_v2_stage_a.safetensors", "vqgan", 74_000_000
)
_CLIP_BIGG = PublishedFile(
    "warp-ai/wuerstchen-prior", "text_encoder/model.safetensors", "wuerstchen_v2_clip_bigg.safetensors", TOWERS[0],
    2_770_000_000,
)  # fmt: skip
_CLIP_H = PublishedFile(
    "warp-ai/wuerstchen", "text_encoder/model.safetensors", "wuerstchen_v2_clip_h.safetensors", TOWERS[1],
    1_410_000_000,
)  # fmt: skip
_V2_STAGE_B = _original("model_v2_stage_b.pt", "decoder", 4_303_483_515, "aba31f16")  # with the image encoder
_ORIGINAL_STAGE_A = _original("vqgan_f4_v1_500k.pt", "vqgan", 296_000_000, "b4a81dd8")
_MEAN = "model_v2_stage_c_finetune_interpolation.pt"

_SHARED = (_V2_STAGE_B, _CLIP_BIGG, _CLIP_H, _ORIGINAL_STAGE_A)  # of the sets of original files of v2
SETS: dict[str, tuple[PublishedFile, ...]] = {
    "v2": (_PRIOR, _DECODER, _CLIP_BIGG, _CLIP_H, _STAGE_A),
    "v2-original": (_original(_MEAN, "prior", 3_974_759_010, "d7178185"), *_SHARED),
    "v2-base": (_original("model_v2_stage_c.pt", "prior", 3_974_739_662, "666e397f"), *_SHARED),
    "v2-finetuned": (_original("model_v2_stage_c_finetune.pt", "prior", 3_974_751_674, "dac84898"), *_SHARED),
    "v1": (
        _original("model_stage_c_ema.pt", "prior", 3_970_000_000, "fde4bce5"),
        _original("model_stage_b.pt", "token_decoder", 3_390_000_000),
        _CLIP_H,
        _ORIGINAL_STAGE_A,
    ),
}
