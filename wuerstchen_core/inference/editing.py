"""Pictures in: through the bottleneck and back, varied, painted over in parts, and the way between two of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..diffusion.interpolate import TOKEN, check_fraction, slerp
from ..diffusion.masks import PAINTED, latent_mask
from ..diffusion.schedule import linear_times, strength_times
from ..models.prior import features_from_latents, latents_from_features
from .images import (
    Picture,
    legal_canvas,
    open_picture,
    read_batch,
    read_masked,
    read_pixels,
    to_pictures,
    to_pixels,
    widen,
)
from .prompts import Prompt, Prompts
from .settings import Callback, SamplingSettings, check_count, ignore
from .stages import need


class Editing(Prompts):
    """What a model makes of pictures. `numbers` are those of `generate`: steps, guidance and so on, None: as usual.

    Where a picture's size is not a legal one it is scaled until it covers the nearest legal one and cropped around
    its centre; a picture with a side above 2048 pixels is scaled down to it.
    """

    @torch.inference_mode()
    def encode(
        self, image: Picture | Sequence[Picture], *, width: int | None = None, height: int | None = None
    ) -> Tensor:
        """A picture, or several that end up in one size, to Stage C features [B, 16, h, w]."""
        return self.features(read_batch(image, width, height))

    @torch.inference_mode()
    def reconstruct(
        self,
        image: Picture | Sequence[Picture],
        *,
        prompt: Prompt = "",
        seed: int = 0,
        width: int | None = None,
        height: int | None = None,
        callback: Callback | None = None,
        **numbers: Any,
    ) -> list[Image.Image]:
        """Pictures through the 42.67x bottleneck and back, as Stage B remembers them; picture i has seed `seed` + i."""
        pixels = read_batch(image, width, height)
        sampling = self._sampling(pixels, numbers)
        check_count(len(pixels), seed)
        text = self.prompt_states(prompt, "decoder_text_encoder").expand(len(pixels), -1, -1)
        images = self.paint(self.features(pixels), text, sampling, seed=seed, callback=callback)
        (callback or ignore)("picture", 1, 1, None)
        return images

    @torch.inference_mode()
    def variations(
        self,
        image: Picture,
        prompt: Prompt = "",
        *,
        strength: float = 0.7,
        negative: str = "",
        count: int = 1,
        seed: int = 0,
        width: int | None = None,
        height: int | None = None,
        callback: Callback | None = None,
        **numbers: Any,
    ) -> list[Image.Image]:
        """A picture painted anew from its own features, partly noised: image to image at Stage C.

        At strength 0 it is the reconstruction (by Stage B, which reads the prompt), at 1 the picture is ignored and it
        is what `generate` paints. Picture i of `count` has the seed `seed` + i.
        """
        pixels = read_pixels(image, width, height)
        sampling = self._sampling(pixels, numbers)
        strength_times(sampling.prior_times(), strength)  # which refuses what cannot be used
        self.check([prompt, negative], count, seed, with_pictures=True)
        features = self.features(pixels).expand(count, -1, -1, -1)
        told: dict[str, Any] = {"seed": seed, "callback": callback}
        text, unwanted = self.texts(prompt, negative, count, callback)
        features = self.sample_prior(text[0], sampling, negative=unwanted[0], init=features, strength=strength, **told)
        images = self.paint(features, text[1], sampling, negative=unwanted[1], **told)
        (callback or ignore)("picture", 1, 1, None)
        return images

    @torch.inference_mode()
    def inpaint(
        self,
        image: Picture,
        mask: Picture,
        prompt: Prompt,
        *,
        strength: float = 1.0,
        composite: bool = True,
        **told: Any,
    ) -> list[Image.Image]:
        """Paint the white of a mask anew; `told` is what `variations` takes: negative, count, seed, callback, numbers.

        Stage C works in cells of 42.67 pixels, and paints each that the mask touches; Stage B and what is kept follow
        the mask to 4 pixels. Sound for whole things, not for what is finer than a cell. With `composite` the picture
        itself is laid over what was not masked (softly where the mask is grey); without, that is its reconstruction.
        The picture keeps its size, unless a side is above 2048 pixels; the mask has to have the same.
        """
        pixels, marked = read_masked(image, mask)
        return self._paint_over(pixels, marked, prompt, strength, composite, **told)

    @torch.inference_mode()
    def outpaint(
        self,
        image: Picture,
        prompt: Prompt,
        *,
        left: int = 0,
        top: int = 0,
        right: int = 0,
        bottom: int = 0,
        strength: float = 1.0,
        composite: bool = True,
        **told: Any,
    ) -> list[Image.Image]:
        """Paint a picture on, `left`, `top`, `right` and `bottom` pixels wider; the rest as in `inpaint`.

        Below strength 1 what is painted starts from the picture's edges, drawn out.
        """
        pixels = to_pixels(open_picture(image))
        wider = widen(pixels, torch.zeros_like(pixels[:, :1]), (left, top, right, bottom))
        return self._paint_over(*wider, prompt, strength, composite, **told)

    @torch.inference_mode()
    def interpolate(
        self,
        a: Prompt | PathLike[str] | Image.Image,
        b: Prompt | PathLike[str] | Image.Image,
        *,
        steps: int = 5,
        fractions: Sequence[float] | None = None,
        negative: str = "",
        seed: int = 0,
        width: int | None = None,
        height: int | None = None,
        callback: Callback | None = None,
        **numbers: Any,
    ) -> list[Image.Image]:
        """Pictures on the way from a to b: `steps` of them, both ends among them, or one for each of `fractions`.

        A `str` is a prompt; a picture is PIL's, or a `Path`. All pictures have one seed and one size, the first
        picture's. Between prompts the text states turn, and each picture is painted from its own; as soon as one end
        is a picture the Stage C latents turn, in the prior's units. The ends are what `generate` and `reconstruct`
        give.
        """
        if fractions is None and steps < 2:
            raise ValueError(f"{steps} steps were asked for: at least 2 are needed, the two ends")
        wanted = linear_times(steps - 1, 0.0, 1.0).tolist() if fractions is None else list(fractions)
        for fraction in wanted:
            check_fraction(fraction)
        pictures = [end for end in (a, b) if not isinstance(end, str | Mapping)]
        prompts = [end for end in (a, b) if isinstance(end, str | Mapping)]
        self.check([*prompts, negative], len(wanted), seed, with_pictures=bool(pictures))
        if pictures:
            height, width = read_pixels(pictures[0], width, height).shape[-2:]
        sampling = self.sampling.changed(width=width, height=height, **numbers)
        unwanted = self.encode_text([negative])
        stage_c: dict[str, Any] = {"negative": unwanted[0], "seed": seed, "callback": callback}
        if pictures:
            first, last = (self._end(end, sampling, stage_c) for end in (a, b))
        else:
            first, last = (self.encode_prompt(prompt) for prompt in prompts)
        images: list[Image.Image] = []
        for fraction in wanted:
            if pictures:
                features = self._between(first[0], last[0], fraction)
            else:
                features = self.sample_prior(slerp(first[0], last[0], fraction, TOKEN), sampling, **stage_c)
            text = slerp(first[1], last[1], fraction, TOKEN)
            images += self.paint(features, text, sampling, negative=unwanted[1], seed=seed, callback=callback)
        (callback or ignore)("picture", 1, 1, None)
        return images

    def _paint_over(
        self,
        pixels: Tensor,
        mask: Tensor,
        prompt: Prompt,
        strength: float,
        composite: bool,
        *,
        negative: str = "",
        count: int = 1,
        seed: int = 0,
        callback: Callback | None = None,
        **numbers: Any,
    ) -> list[Image.Image]:
        canvas, painted = legal_canvas(pixels), legal_canvas(mask).to(self.device)
        sampling = self._sampling(canvas, numbers)
        strength_times(sampling.prior_times(), strength)
        self.check([prompt, negative], count, seed, with_pictures=True)
        told: dict[str, Any] = {"seed": seed, "callback": callback}
        text, unwanted = self.texts(prompt, negative, count, callback)
        init: Tensor = self.features(canvas).expand(count, -1, -1, -1)
        keeps = not bool((painted >= PAINTED).all())  # else it is as in `variations`
        cells = latent_mask(painted, *init.shape[-2:]) if keeps else None
        features = self.sample_prior(
            text[0], sampling, negative=unwanted[0], init=init, mask=cells, strength=strength, **told
        )
        kept = None
        if keeps:
            plain = self.prompt_states("", "decoder_text_encoder").expand(count, -1, -1)
            kept = self.sample_decoder(init, plain, sampling, **told)
            cells = latent_mask(painted, *kept.shape[-2:])
        latents = self.sample_decoder(features, text[1], sampling, negative=unwanted[1], init=kept, mask=cells, **told)
        [picture], [soft] = to_pictures(pixels), to_pictures(mask)
        images = [image.crop((0, 0, *picture.size)) for image in self.decode(latents)]
        (callback or ignore)("picture", 1, 1, None)
        return [Image.composite(image, picture, soft) for image in images] if composite else images

    def _sampling(self, pixels: Tensor, numbers: Mapping[str, Any]) -> SamplingSettings:
        return self.sampling.changed(width=pixels.shape[-1], height=pixels.shape[-2], **numbers)

    def _end(
        self, end: Prompt | Picture, sampling: SamplingSettings, stage_c: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """Features and the decoder's text states of one end of an interpolation."""
        if isinstance(end, str | Mapping):
            prior, decoder = self.encode_prompt(end)
            return self.sample_prior(prior, sampling, **stage_c), decoder
        pixels = read_pixels(end, sampling.width, sampling.height)
        return self.features(pixels), self.prompt_states("", "decoder_text_encoder")

    def _between(self, a: Tensor, b: Tensor, fraction: float) -> Tensor:
        if fraction in (0, 1):  # exactly, which the way into other units and back is not
            return b if fraction else a
        params = need(self.prior, "prior").params
        between = slerp(latents_from_features(a, params), latents_from_features(b, params), fraction)
        return features_from_latents(between, params)
