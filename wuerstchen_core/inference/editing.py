"""Edits pictures: reconstruction, variations, inpainting, outpainting and interpolation.

WuerstchenPipeline's docstring describes the arguments that these functions share.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate as resize

from ..common.numbers import plain, to_int
from ..diffusion.interpolate import TOKEN, check_fraction, slerp
from ..diffusion.masks import latent_mask
from ..diffusion.samplers import Seed
from ..diffusion.schedule import linear_times, strength_times
from ..models.prior import features_from_latents, latents_from_features
from .components import Components
from .control import AnyHint, load_hints
from .images import Picture, pad_to_legal, read_batch, read_extended, read_masked, read_pixels, to_pictures
from .prompts import Prompt, average_states, check_request, encode_prompt, encode_request
from .settings import Callback, SamplingOptions, check_count, notify
from .stages import decode, encode_pixels, sample_decoder, sample_prior

if TYPE_CHECKING:
    from typing_extensions import Unpack


class EditOptions(SamplingOptions, total=False):
    """Keyword arguments of the functions that generate `count` pictures; seeds as in `generate`."""

    negative: str
    count: int
    seed: Seed
    control: AnyHint | Sequence[AnyHint] | None
    callback: Callback | None


@torch.inference_mode()
def encode(
    model: Components, image: Picture | Sequence[Picture], *, width: int | None = None, height: int | None = None
) -> Tensor:
    """Returns the Stage C features [B, 16, H/42.67, W/42.67] of one or several pictures.

    Pictures are scaled to cover width x height and cropped around their centres; by default to the legal size nearest
    to their own, which must then be the same for all.
    """
    return encode_pixels(model, read_batch(image, width, height))


@torch.inference_mode()
def reconstruct(
    model: Components,
    image: Picture | Sequence[Picture],
    *,
    prompt: Prompt = "",
    seed: Seed = 0,
    width: int | None = None,
    height: int | None = None,
    callback: Callback | None = None,
    **settings: Unpack[SamplingOptions],
) -> list[Image.Image]:
    """Compresses pictures by 42.67 to Stage C features, and decodes these (and the prompt) with Stages B and A.

    Sizes as in `encode`, seeds as in `generate`.
    """
    pixels = read_batch(image, width, height)
    height, width = pixels.shape[-2:]
    sampling = model.sampling.updated(width=width, height=height, **settings)
    _, seed = check_count(len(pixels), seed)
    text = _decoder_states(model, prompt, len(pixels))
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
    width: int | None = None,
    height: int | None = None,
    **options: Unpack[EditOptions],
) -> list[Image.Image]:
    """Generates variations of a picture by image to image at Stage C: its features are noised to `strength`.

    Strength 0 equals `reconstruct` with the prompt, 1 equals `generate`. `options` are negative, count, seed, control,
    callback and settings, as in `generate`. Sizes as in `encode`.
    """
    return _edit(model, read_pixels(image, width, height), None, prompt, strength, **options)


@torch.inference_mode()
def inpaint(
    model: Components,
    image: Picture,
    mask: Picture,
    prompt: Prompt,
    *,
    strength: float = 1.0,
    composite: bool = True,
    **options: Unpack[EditOptions],
) -> list[Image.Image]:
    """Replaces the part of a picture where the mask is white; black is kept, grey is mixed.

    Of a mask with transparency, the transparent part is replaced, whatever its colours. A mask that is all white or all
    black is refused. It must have the picture's size. The results have it too, unless a side is above 2048 pixels: then
    both are scaled down. Stage C generates each of its cells (42.67 pixels) that the mask touches, Stage B follows the
    mask to 4 pixels: replace whole things, not details finer than a cell. A cell is as white as its whitest pixel; a
    grey one mixes the latents of picture and result in each step, and in v1's Stage B is image to image of that
    strength. With `composite` the unmasked part has its original pixels, otherwise it is their reconstruction.
    `strength` and `options` as in `variations`.
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
    **options: Unpack[EditOptions],
) -> list[Image.Image]:
    """Extends a picture by `left`, `top`, `right` and `bottom` generated pixels; other arguments as in `inpaint`.

    The result may have at most 2048 pixels per side; hints in `control` show all of it. Below strength 1 the new part
    starts from the picture's repeated edge pixels.
    """
    pixels, mask_pixels = read_extended(image, left, top, right, bottom)
    return _edit(model, pixels, mask_pixels, prompt, strength, composite, **options)


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
    **settings: Unpack[SamplingOptions],
) -> list[Image.Image]:
    """Generates pictures between a and b: `steps` of them including both ends, or one for each of `fractions`.

    A `str` or a mapping is a prompt; a picture is a PIL image or a `Path`. Fraction 0 equals `generate` or
    `reconstruct` of a, 1 that of b. Between two prompts the text states are interpolated, otherwise the Stage C
    latents, in the prior's units. All results have the same seed, and the size of the first picture or width x height.
    """
    if fractions is None and (steps := to_int("steps", steps)) < 2:
        raise ValueError(f"{steps} steps cannot be taken: choose at least 2, for the two ends")
    fractions = linear_times(steps - 1, 0.0, 1.0).tolist() if fractions is None else list(plain(fractions))
    for fraction in fractions:
        check_fraction(fraction)
    pictures = [end for end in (a, b) if not isinstance(end, str | Mapping)]
    prompts = [end for end in (a, b) if isinstance(end, str | Mapping)]
    seed = to_int("seed", seed)
    check_request(model, [*prompts, negative], len(fractions), seed, with_pictures=bool(pictures))
    if pictures:
        height, width = read_pixels(pictures[0], width, height).shape[-2:]
    sampling = model.sampling.updated(width=width, height=height, **settings)
    _, uncond = encode_request(model, [], negative, sampling)
    run: dict[str, Any] = {"seed": seed, "callback": callback}

    def features_of(states: Tensor) -> Tensor:
        return sample_prior(model, states, sampling, negative=uncond[0], **run)

    def encode_end(end: Prompt | Picture) -> tuple[Tensor, Tensor]:
        """Returns the features or text states to interpolate at Stage C, and the text states of Stage B."""
        if isinstance(end, str | Mapping):
            prior, decoder = encode_prompt(model, end)
            return (features_of(prior) if pictures else prior), decoder
        pixels = read_pixels(end, sampling.width, sampling.height)
        return encode_pixels(model, pixels), _decoder_states(model)

    first, last = encode_end(a), encode_end(b)
    if pictures:
        features = [_between(model, first[0], last[0], fraction) for fraction in fractions]
    else:
        with model.using("prior"):
            features = [features_of(slerp(first[0], last[0], fraction, TOKEN)) for fraction in fractions]
    texts = [slerp(first[1], last[1], fraction, TOKEN) for fraction in fractions]
    with model.using(model.stage_b):
        latents = [
            sample_decoder(model, x, text, sampling, negative=uncond[1], **run)
            for x, text in zip(features, texts, strict=True)
        ]
    with model.using("vqgan"):
        images = [image for x in latents for image in decode(model, x)]
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
    seed: Seed = 0,
    control: AnyHint | Sequence[AnyHint] | None = None,
    callback: Callback | None = None,
    **settings: Unpack[SamplingOptions],
) -> list[Image.Image]:
    """Replaces the pixels [1, 3, H, W] where `mask` [1, 1, H, W] is 1, or all of them if it is None."""
    canvas = pad_to_legal(pixels)
    sampling = model.sampling.updated(width=canvas.shape[-1], height=canvas.shape[-2], **settings)
    strength_times(sampling.prior_times(), strength)  # raises ValueError if out of range
    count = to_int("count", count)
    seed = check_request(model, [prompt, negative], count, seed, with_pictures=True)
    area = pixels.shape[-2], pixels.shape[-1]
    hints = load_hints(model, control, sampling, count, strength=strength, area=area)
    (cond, *empty), uncond = encode_request(model, [prompt, *([] if mask is None else [""])], negative, sampling)
    notify(callback, "text")
    prior_text, text = (states.expand(count, -1, -1) for states in cond)
    run: dict[str, Any] = {"seed": seed, "callback": callback}
    init = encode_pixels(model, canvas).expand(count, -1, -1, -1)
    grid = None if mask is None else pad_to_legal(mask).to(model.device)
    cells = None if grid is None else latent_mask(grid, *init.shape[-2:])
    features = sample_prior(
        model, prior_text, sampling, negative=uncond[0], init=init, mask=cells, strength=strength, control=hints, **run
    )
    kept_latents = None
    with model.using(model.stage_b):
        if grid is not None:
            [(_, plain)] = empty
            kept_latents = sample_decoder(model, init, plain.expand(count, -1, -1), sampling, negative=plain, **run)
            cells = latent_mask(grid, *kept_latents.shape[-2:])
        latents = sample_decoder(
            model, features, text, sampling, negative=uncond[1], init=kept_latents, mask=cells, **run
        )
    images = [image.crop((0, 0, pixels.shape[-1], pixels.shape[-2])) for image in decode(model, latents)]
    notify(callback, "picture")
    if mask is None or cells is None or not composite:
        return images
    height, width = mask.shape[-2:]
    # Stage B has mixed the latents of grey cells already.
    mask = mask / resize(cells.to(mask), canvas.shape[-2:])[..., :height, :width].clamp(min=1e-6)
    [picture], [blend] = to_pictures(pixels), to_pictures(mask)
    return [Image.composite(image, picture, blend) for image in images]


def _decoder_states(model: Components, prompt: Prompt = "", count: int = 1) -> Tensor:
    """Returns the text states of a prompt for Stage B, [count, 77 n, c]."""
    return average_states(model, "decoder", prompt).expand(count, -1, -1)


def _between(model: Components, a: Tensor, b: Tensor, fraction: float) -> Tensor:
    """Returns the interpolation of two pictures' features, in the prior's units."""
    if fraction in (0, 1):  # exactly; converting units and back would round
        return b if fraction else a
    params = model.require("prior").params
    between = slerp(latents_from_features(a, params), latents_from_features(b, params), fraction)
    return features_from_latents(between, params)
