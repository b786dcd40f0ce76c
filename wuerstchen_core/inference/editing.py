"""Editing pictures: reconstruction, variations, inpainting, outpainting and interpolation.

`settings` are fields of SamplingSettings, such as prior_steps; None means the model's default. Pictures whose size is
not legal are scaled to cover the nearest legal size and cropped around the centre; a side above 2048 pixels is scaled
down to it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..diffusion.interpolate import TOKEN, check_fraction, slerp
from ..diffusion.masks import MASK_THRESHOLD, latent_mask
from ..diffusion.schedule import linear_times, strength_times
from ..models.prior import features_from_latents, latents_from_features
from .images import (
    Picture,
    extend,
    open_picture,
    pad_to_legal,
    read_batch,
    read_masked,
    read_pixels,
    to_pictures,
    to_pixels,
)
from .prompts import Prompt, check_request, encode_prompt, prompt_states
from .settings import Callback, SamplingSettings, check_count, notify
from .stages import Components, decode, encode_pixels, encode_text, sample_decoder, sample_prior


@torch.inference_mode()
def encode(
    model: Components,
    image: Picture | Sequence[Picture],
    *,
    width: int | None = None,
    height: int | None = None,
) -> Tensor:
    """Returns the Stage C features [B, 16, h, w] of a picture, or of several that end up in one size."""
    return encode_pixels(model, read_batch(image, width, height))


@torch.inference_mode()
def reconstruct(
    model: Components,
    image: Picture | Sequence[Picture],
    *,
    prompt: Prompt = "",
    seed: int = 0,
    width: int | None = None,
    height: int | None = None,
    callback: Callback | None = None,
    **settings: Any,
) -> list[Image.Image]:
    """Compresses pictures 42.67x and decodes them with Stages B and A; picture i has seed `seed` + i."""
    pixels = read_batch(image, width, height)
    sampling = _sampling(model, pixels, settings)
    check_count(len(pixels), seed)
    text = prompt_states(model, prompt, "decoder_text_encoder").expand(len(pixels), -1, -1)
    latents = sample_decoder(model, encode_pixels(model, pixels), text, sampling, seed=seed, callback=callback)
    images = decode(model, latents)
    notify(callback, "picture")
    return images


@torch.inference_mode()
def variations(
    model: Components,
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
    **settings: Any,
) -> list[Image.Image]:
    """Generates `count` variations of a picture from its partly noised features: image to image at Stage C.

    Strength 0 is the reconstruction (whose Stage B reads the prompt); at 1 the picture is ignored, as in `generate`.
    Picture i has seed `seed` + i.
    """
    pixels = read_pixels(image, width, height)
    run: dict[str, Any] = {"negative": negative, "count": count, "seed": seed, "callback": callback}
    return _edit(model, pixels, None, prompt, strength, **run, **settings)


@torch.inference_mode()
def inpaint(
    model: Components,
    image: Picture,
    mask: Picture,
    prompt: Prompt,
    *,
    strength: float = 1.0,
    composite: bool = True,
    **options: Any,
) -> list[Image.Image]:
    """Generates the white part of a mask anew. `options` are those of `variations`: negative, count, seed, callback
    and settings.

    Stage C generates each of its cells of 42.67 pixels that the mask touches; Stage B follows the mask to 4 pixels. Use
    it for whole things, not for details finer than a cell. With `composite` the original pixels are laid over the
    unmasked part (blended where the mask is grey); without, that part is their reconstruction. The mask must have the
    picture's size, which stays unless a side is above 2048 pixels.
    """
    pixels, mask_pixels = read_masked(image, mask)
    return _edit(model, pixels, mask_pixels, prompt, strength, composite, **options)


@torch.inference_mode()
def outpaint(
    model: Components,
    image: Picture,
    prompt: Prompt,
    *,
    left: int = 0,
    top: int = 0,
    right: int = 0,
    bottom: int = 0,
    strength: float = 1.0,
    composite: bool = True,
    **options: Any,
) -> list[Image.Image]:
    """Extends a picture by `left`, `top`, `right` and `bottom` generated pixels; the rest as in `inpaint`.

    Below strength 1 the new part starts from the picture's repeated edge pixels.
    """
    pixels = to_pixels(open_picture(image))
    canvas, mask = extend(pixels, torch.zeros_like(pixels[:, :1]), (left, top, right, bottom))
    return _edit(model, canvas, mask, prompt, strength, composite, **options)


@torch.inference_mode()
def interpolate(
    model: Components,
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
    **settings: Any,
) -> list[Image.Image]:
    """Generates pictures on the way from a to b: `steps` of them including both ends, or one for each of `fractions`.

    A `str` is a prompt; a picture is a PIL image or a `Path`. All results have one seed and one size, that of the first
    picture. Between two prompts the text states are interpolated; otherwise the Stage C latents, in the prior's units.
    The ends equal `generate` and `reconstruct`.
    """
    if fractions is None and steps < 2:
        raise ValueError(f"{steps} steps cannot be taken: choose at least 2, for the two ends")
    fractions = linear_times(steps - 1, 0.0, 1.0).tolist() if fractions is None else list(fractions)
    for fraction in fractions:
        check_fraction(fraction)
    pictures = [end for end in (a, b) if not isinstance(end, str | Mapping)]
    prompts = [end for end in (a, b) if isinstance(end, str | Mapping)]
    check_request(model, [*prompts, negative], len(fractions), seed, with_pictures=bool(pictures))
    if pictures:
        height, width = read_pixels(pictures[0], width, height).shape[-2:]
    sampling = model.sampling.updated(width=width, height=height, **settings)
    uncond = encode_text(model, [negative])
    run: dict[str, Any] = {"seed": seed, "callback": callback}

    def features_of(states: Tensor) -> Tensor:
        return sample_prior(model, states, sampling, negative=uncond[0], **run)

    def end_of(end: Prompt | Picture) -> tuple[Tensor, Tensor]:
        """Returns the features or text states to interpolate at Stage C, and the decoder's text states."""
        if isinstance(end, str | Mapping):
            prior, decoder = encode_prompt(model, end)
            return (features_of(prior) if pictures else prior), decoder
        pixels = read_pixels(end, sampling.width, sampling.height)
        return encode_pixels(model, pixels), prompt_states(model, "", "decoder_text_encoder")

    first, last = end_of(a), end_of(b)
    images: list[Image.Image] = []
    for fraction in fractions:
        if pictures:
            features = _between(model, first[0], last[0], fraction)
        else:
            features = features_of(slerp(first[0], last[0], fraction, TOKEN))
        text = slerp(first[1], last[1], fraction, TOKEN)
        images += decode(model, sample_decoder(model, features, text, sampling, negative=uncond[1], **run))
    notify(callback, "picture")
    return images


def _edit(
    model: Components,
    pixels: Tensor,
    mask: Tensor | None,
    prompt: Prompt,
    strength: float,
    composite: bool = False,
    *,
    negative: str = "",
    count: int = 1,
    seed: int = 0,
    callback: Callback | None = None,
    **settings: Any,
) -> list[Image.Image]:
    """Generates pixels [1, 3, H, W] anew where `mask` [1, 1, H, W] is 1, or all of them if it is None."""
    canvas = pad_to_legal(pixels)
    sampling = _sampling(model, canvas, settings)
    strength_times(sampling.prior_times(), strength)  # raises ValueError if out of range
    check_request(model, [prompt, negative], count, seed, with_pictures=True)
    cond, uncond = encode_prompt(model, prompt), encode_text(model, [negative])
    notify(callback, "text")
    prior_text, text = (states.expand(count, -1, -1) for states in cond)
    run: dict[str, Any] = {"seed": seed, "callback": callback}
    init = encode_pixels(model, canvas).expand(count, -1, -1, -1)
    grid = None if mask is None else pad_to_legal(mask).to(model.device)
    if grid is not None and bool((grid >= MASK_THRESHOLD).all()):
        grid = None
    cells = None if grid is None else latent_mask(grid, *init.shape[-2:])
    features = sample_prior(
        model, prior_text, sampling, negative=uncond[0], init=init, mask=cells, strength=strength, **run
    )
    kept_latents = None
    if grid is not None:
        plain = prompt_states(model, "", "decoder_text_encoder").expand(count, -1, -1)
        kept_latents = sample_decoder(model, init, plain, sampling, **run)
        cells = latent_mask(grid, *kept_latents.shape[-2:])
    latents = sample_decoder(model, features, text, sampling, negative=uncond[1], init=kept_latents, mask=cells, **run)
    images = [image.crop((0, 0, pixels.shape[-1], pixels.shape[-2])) for image in decode(model, latents)]
    notify(callback, "picture")
    if mask is None or not composite:
        return images
    [picture], [blend] = to_pictures(pixels), to_pictures(mask)
    return [Image.composite(image, picture, blend) for image in images]


def _sampling(model: Components, pixels: Tensor, settings: Mapping[str, Any]) -> SamplingSettings:
    """Returns the settings of a run in the size of the pixels."""
    return model.sampling.updated(width=pixels.shape[-1], height=pixels.shape[-2], **settings)


def _between(model: Components, a: Tensor, b: Tensor, fraction: float) -> Tensor:
    """Interpolates features in the prior's units."""
    if fraction in (0, 1):  # exact, which converting units and back is not
        return b if fraction else a
    params = model.require("prior").params
    between = slerp(latents_from_features(a, params), latents_from_features(b, params), fraction)
    return features_from_latents(between, params)
