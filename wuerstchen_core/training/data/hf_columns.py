"""The columns of a Hugging Face dataset with images and captions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

from .sidecars import CAPTION_KEYS

Column: TypeAlias = tuple[str, ...]  # the path of a column, whose later names are those of nested fields


def columns_of(features: Mapping[str, Any], path: Column = ()) -> Iterator[tuple[Column, Any]]:
    """Yields the columns of a dataset and the fields nested in them, but for those of files, with their types."""
    for name, feature in features.items():
        yield (*path, name), feature
        if isinstance(feature, Mapping) and not _is_file(feature):
            yield from columns_of(feature, (*path, name))


def image_column(columns: Mapping[Column, Any], name: str | None, where: str) -> Column:
    """Returns the column of images: the one called `name`, else the only one, or the only one of binary files.

    ValueError, which names the dataset `where`.
    """
    images = [column for column, feature in columns.items() if getattr(feature, "_type", "") == "Image"]
    files = [column for column, feature in columns.items() if _has_files(feature)]
    found = images or files if name is None else [x for x in images + files if ".".join(x) == name]
    if len(found) == 1:
        return found[0]
    listing = ", ".join(".".join(column) for column in found or columns)
    problem = f"several columns of images ({listing})" if found else f"no column of images{f' {name}' if name else ''}"
    raise ValueError(f"{where} has {problem}: set image_column to one of {listing}")


def _has_files(feature: Any) -> bool:
    """True for binary files, which tables of other programs have, alone or with their paths."""
    return _is_file(feature) or getattr(feature, "dtype", "") in ("binary", "large_binary")


def _is_file(feature: Any) -> bool:
    return isinstance(feature, Mapping) and "bytes" in feature


def caption_column(columns: Mapping[Column, Any], name: str | None, where: str, needed: bool) -> Column | None:
    """Returns the column of captions: the one called `name`, or the first of CAPTION_KEYS.

    None if there is none and none is `needed`, otherwise ValueError, which names the dataset `where`.
    """
    texts = [column for column, feature in columns.items() if _is_text_feature(feature)]
    if name is not None:
        found = [column for column in texts if ".".join(column) == name]
    else:
        found = [column for key in CAPTION_KEYS for column in sorted(texts, key=len) if column[-1].lower() == key]
    if not found and (needed or name is not None):
        listing = ", ".join(".".join(column) for column in texts) or "none"
        problem = f"{where} has no column of captions{f' {name}' if name else ''}"
        raise ValueError(f"{problem}: set caption_column, to a column of texts ({listing})")
    return found[0] if found else None


def _is_text_feature(feature: Any) -> bool:
    """True for texts and lists of texts."""
    inner = feature[0] if isinstance(feature, list) else getattr(feature, "feature", feature)
    return getattr(inner, "dtype", "") in ("string", "large_string", "string_view")
