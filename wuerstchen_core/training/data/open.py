"""Opens the sources of a `[data]` table and returns a loader of their images."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...common.text import listed
from .caption_edits import RANDOM
from .epoch_order import EpochOrder
from .error_budget import ErrorBudget
from .filters import ImageDataConfig, rejected
from .held_out import NO_VALIDATION, ValidationConfig, by_image, hold_out
from .hf_datasets import check_no_dataset
from .latent_cache import Cache, read_manifest
from .loading import BatchLoader, IndexedLoader
from .open_source import find_cache, no_hints, open_sources
from .shards import ShardSource
from .sidecars import MissingCaption
from .source import ImageSource
from .sources import JoinedSource
from .streams import StreamLoader, check_streams, is_stream

log = logging.getLogger(__name__)

COUNTED = 10_000  # images of which it is counted how many have masks and captions


def open_loader(
    config: ImageDataConfig, *, batch: int, seed: int, cache: Path, rank: int = 0, world: int = 1,
    captions: bool = True, images: bool = True, cached: tuple[str, ...] = (), hints: bool = False,
    validation: ValidationConfig = NO_VALIDATION,
) -> BatchLoader:  # fmt: skip
    """Opens the sources of a table and returns a loader of batches of `batch` images in process `rank` of `world`.

    `cache` is the folder for the indexes of shards, `cached` names the tensors to read from a cache of latents. An
    image with several captions is several examples, unless neither these nor their cached states are needed.
    ValueError if a source cannot be read or all its images are rejected. `hints`: True if hint pictures beside the
    images are read too.
    """
    options: dict[str, Any] = {"config": config, "captions": captions, "images": images, "cached": cached}
    options |= {"rank": rank, "world": world}
    names = config.names
    if any(map(is_stream, names)):
        if config.sources:
            raise ValueError("[[data.sources]] names a stream: name streams alone, as source under [data]")
        check_streams(names, config.allow_pipe)
        check_no_dataset(config.parts[0])
        if validation.fraction:
            raise ValueError(
                "[validation] cannot hold out pictures of a stream: download its shards, or remove the table"
            )
        if hints:
            raise no_hints(names[0])
        return StreamLoader(urls=names, batch=batch, seed=seed, **options)
    source = open_sources(config, cache, captions, hints)
    ErrorBudget("images", config.bad_share).add(len(source) + len(source.bad), source.bad)
    shards = ErrorBudget("shards", config.bad_share)
    for part in source.sources if isinstance(source, JoinedSource) else [source]:
        if isinstance(part, ShardSource):
            shards.add(len(part.paths), part.bad_shards)
    source.left_out.log()
    members, held_out, variants = _members(source, config, batch * world, captions or "text" in cached, validation)
    _report_masks(source, config, np.concatenate(members))
    if hints:
        _report_hints(source, np.concatenate(members))
    if captions:
        _report_uncaptioned(source, config, np.concatenate(members))
    repeats = _repeats(source, config, members) if config.sources else None
    order = EpochOrder(members, batch * world, seed, repeats)
    return IndexedLoader(source=source, order=order, held_out=held_out, variants=variants, hints=hints, **options)


def configured_cache(config: ImageDataConfig) -> Cache | None:
    """Returns the cache that is the `source` of a table, None for other sources.

    ValueError if the table names other images too, caches several sources, random crops or colours, or flips or masks
    that the cache lacks.
    """
    for part in config.parts if not config.source else ():
        if find_cache(part.names):
            raise ValueError(
                f"[[data.sources]] names the cache {part.names[0]}: make one cache of all sources, and name it as "
                "source under [data]"
            )
    if (found := find_cache(config.names)) is None:
        if config.source and config.sources:
            raise ValueError("[data] has source and sources: move the source into a table [[data.sources]]")
        return None
    if config.crop != "centre":
        raise ValueError(f'[data] crop = "{config.crop}" is impossible: a cache contains centre crops')
    check_cached_colours(config)
    cache = Cache(found, read_manifest(found))
    if (now := source_names(config)) != cache.manifest.sources:
        raise ValueError(
            f"{found} is a cache of [[data.sources]] {', '.join(cache.manifest.sources) or 'none'}, and [data] has "
            f"{', '.join(now) or 'none'}: name the same ones in this order, or make a new cache"
        )
    if any(own.flip for own in config.examples) and not cache.manifest.mirrored:
        raise ValueError(f"{found} has no mirrored pictures: make the cache with flip above 0, or remove [data] flip")
    if (kinds := mask_kinds(config)) and kinds != cache.manifest.masks:
        raise ValueError(f"{found} has no masks of these sources: make the cache with the same [data] mask")
    return cache


def source_names(config: ImageDataConfig) -> tuple[str, ...]:
    """Returns a name of each of `[[data.sources]]`."""
    return tuple(listed(part.names, 1, 200) for part in config.parts if config.sources)


def check_cached_colours(config: ImageDataConfig) -> None:
    """Raises ValueError if a cache would keep one of many random changes of colours."""
    if any(own.changes_colours for own in config.examples):
        raise ValueError(
            "[data] brightness, contrast, saturation and hue cannot be cached, since they differ from use to use: "
            "remove them, or train without a cache"
        )


def check_cached_captions(config: ImageDataConfig) -> None:
    """Raises ValueError if the text of captions cannot be cached, since they differ from use to use."""
    if any(own.varies_tags for own in config.examples):
        raise ValueError(
            "the text of shuffled or dropped tags cannot be cached: remove shuffle_tags and tag_dropout under [data], "
            'or make a cache without "text" in [cache] what'
        )


def caption_edits(config: ImageDataConfig) -> str:
    """Returns how the captions of all sources are changed at every use, as JSON; "" if they are not."""
    edits = [own.fixed_edits for own in config.examples]
    return json.dumps(edits) if any(edits) else ""


def mask_kinds(config: ImageDataConfig) -> str:
    """Returns the kinds of masks of all sources; "" if none has any."""
    return ",".join(own.mask for own in config.examples) if any(own.mask for own in config.examples) else ""


def _members(
    source: ImageSource, config: ImageDataConfig, batch: int, captions: bool, validation: ValidationConfig
) -> tuple[list[np.ndarray], list[np.ndarray], dict[int, np.ndarray]]:
    """Returns the images of each bucket that pass the filters, those of them that are held out for validation, and the
    variants of `IndexedLoader`.

    Logs their number. ValueError if none is left.

    Unless `captions` are needed, an image with several is one example.
    """
    reasons, buckets = config.select(source.records)
    line = source.records["line"]
    drawn = np.array([own.captions == RANDOM for own in config.examples])[source.origins]
    variants: dict[int, np.ndarray] = {}
    if captions and drawn.any():
        order, image = by_image(source.records, buckets, drawn & (reasons == ""))
        groups = np.split(order, np.flatnonzero(np.diff(image)) + 1)
        variants = {int(group[0]): group for group in groups if len(group) > 1}
        log.info("%d images have several captions, one of which is drawn at every use", len(variants))
    reasons = np.where((line > 0) & (drawn if captions else True), "further captions", reasons)
    if several := np.count_nonzero((line == 1) & ~drawn) * captions:
        log.info("%d images have several captions, each of which is an example", several)
    own = ~np.array([part.regularisation for part in config.parts])[source.origins]
    held_out = hold_out(validation, source.records, buckets, (reasons == "") & own)
    reasons = np.where(held_out, "held out for validation", reasons)
    counts = Counter(reasons.tolist())
    if not len(source):
        raise ValueError("[data] source contains no readable image")
    if not (used := counts.pop("", 0)):
        raise ValueError(
            f"none of {len(source)} readable images can be used: {rejected(counts)}; choose other filters, a smaller "
            "size or a larger enlarge under [data]"
        )
    members, held = (
        [np.flatnonzero(chosen & (buckets == bucket)) for bucket in range(len(config.sizes))]
        for chosen in (reasons == "", held_out)
    )
    log.info("%d images, rejected %s", used, rejected(counts))
    for (width, height), part in zip(config.sizes, members, strict=True):
        note = ", fewer than a batch, so they repeat within it" if 0 < len(part) < batch else ""
        log.info("bucket %dx%d: %d%s", width, height, len(part), note)
    return members, held, variants


def _report_masks(source: ImageSource, config: ImageDataConfig, indices: np.ndarray) -> None:
    """Logs how many of some images have the masks that weight the loss, of many images only of the first ones.

    ValueError if none has.
    """
    kinds = [own.mask for own in config.examples]
    masked = [kinds[origin] != "" for origin in source.origins[indices].tolist()]
    chosen = indices[np.array(masked, dtype=bool) & (source.records["line"][indices] == 0)][:COUNTED].tolist()
    if not chosen:
        return
    found = sum(source.has_mask(index, kinds[source.origins[index]]) for index in chosen)
    if not found:
        raise ValueError(f"none of {len(chosen)} images has a mask: add masks, or remove [data] mask")
    log.info("%d of %d images have a mask; the others count whole", found, len(chosen))


def _report_hints(source: ImageSource, indices: np.ndarray) -> None:
    """Logs how many of some images have hint pictures, of many images only of the first ones.

    ValueError if none has.
    """
    chosen = indices[source.records["line"][indices] == 0][:COUNTED].tolist()
    found = sum(map(source.has_hint, chosen))
    if not found:
        raise ValueError(f"none of {len(chosen)} images has a hint picture: add some, or choose other [control] hints")
    log.info(
        "%d of %d images have a hint picture%s",
        found,
        len(chosen),
        "" if found == len(chosen) else "; the others are not used",
    )


def _report_uncaptioned(source: ImageSource, config: ImageDataConfig, indices: np.ndarray) -> None:
    """Logs how many of some images have no caption but a trigger word, prefix or suffix, of many of the first ones."""
    edited = [bool(own.fixed_edits) for own in config.examples]
    chosen = [index for index in indices.tolist() if edited[source.origins[index]]][:COUNTED]
    missing = 0
    for index in chosen:
        try:
            source.caption(index)
        except MissingCaption:
            missing += 1
        except ValueError:  # reported when the caption is needed
            pass
    if missing:
        log.info("%d of %d captions are missing: trigger word, prefix and suffix are read alone", missing, len(chosen))


def _repeats(source: ImageSource, config: ImageDataConfig, members: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Returns how often an epoch has each image of each bucket, and logs it for each source.

    ValueError if a source has no image that can be used.
    """
    counts = np.bincount(source.origins[np.concatenate(members)], minlength=len(config.parts))
    if empty := [part.names[0] for part, count in zip(config.parts, counts.tolist(), strict=True) if not count]:
        raise ValueError(
            f"[[data.sources]] {', '.join(empty)} has no image that can be used: remove it, or see the log"
        )
    regular = np.array([part.regularisation for part in config.parts])
    repeats = np.array([part.repeats for part in config.parts], dtype=float)
    repeats[regular] = (repeats * counts)[~regular].sum() / max(1, counts[regular].sum())
    for part, count, own in zip(config.parts, counts.tolist(), repeats.tolist(), strict=True):
        kind = "regularisation set " if part.regularisation else ""
        log.info(
            "%s%s: %d images, %.4g times in an epoch, weight %g", kind, listed(part.names, 1), count, own, part.weight
        )
    return [repeats[source.origins[part]] for part in members]
