"""Describes LoRA files: format, ranks and strength, the networks that they change, and what their header says."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ..common.text import listed, parse_json, printable
from .adapters import Adapter, Adapters, rank_of
from .components import COMPONENTS, Loader
from .damage import names_source
from .embeddings import bundled_embeddings
from .lora_files import ignored, read_lora
from .lora_folders import find_loras
from .lora_keys import stage_of
from .weight_files import read_file_metadata

Number = TypeVar("Number", int, float)

LORA_LOADER = Loader("loras", "Würstchen LoRA Loader")
_MOST_WORDS = 8

_FORMATS = (  # by a tensor of the adapter
    ("oft_blocks", "OFT"),
    ("hada_w1_b", "LoHa"),
    ("lokr_w1", "LoKr"),
    ("lokr_w1_b", "LoKr"),
    ("lora_up.weight", "LoRA"),
    ("set_weight", "new values"),
    ("diff", "differences"),
    ("diff_b", "differences"),
)


@dataclass(frozen=True)
class LoraInfo:
    """A description of a LoRA. `targets` are numbers of adapters by network, `ignored` describes what is not applied.

    `strength` says where alpha is stated, "" if nowhere. `title` and `trigger_words` are those of the header, and
    `sampling` the settings in that of a distilled model.
    """

    source: str
    formats: tuple[str, ...]
    ranks: tuple[int, ...]
    alphas: tuple[float, ...]
    strength: str
    targets: dict[str, int]
    family: str
    embeddings: tuple[str, ...]  # names of bundled textual inversions
    ignored: tuple[str, ...]
    title: str
    trigger_words: str
    sampling: dict[str, Any]
    folder: str = LORA_LOADER.folder
    node: str = LORA_LOADER.node

    def lines(self) -> list[str]:
        """Returns the description as lines of text, with control characters escaped."""
        out = [f"{self.source}: {', '.join(self.formats)}"]
        out += [f"  title: {self.title}"] if self.title else []
        if self.ranks:
            alphas = f"alpha {_range(self.alphas)} ({self.strength})" if self.alphas else "no alpha: it is the rank"
            out.append(f"  rank {_range(self.ranks)}, {alphas}")
        out += [f"  {name}: {count} adapters" for name, count in self.targets.items()]
        if not self.targets:
            out.append(f"  it seems to be for {self.family}, not for Würstchen")
        if self.sampling:
            out.append(f"  sets {', '.join(f'{key} = {value}' for key, value in self.sampling.items())}")
        out += [f"  trigger words: {self.trigger_words}"] if self.trigger_words else []
        out += [
            f"  bundled embedding: embedding:{name} in a prompt of Python or the command line"
            for name in self.embeddings
        ]
        out += [f"  not applied: {text}" for text in self.ignored]
        out += [f"  in ComfyUI: models/{self.folder}, {self.node}"] if self.targets else []
        return list(map(printable, out))


@names_source
def describe_lora(source: str | os.PathLike[str]) -> LoraInfo:
    """Describes a LoRA file or folder. Raises ValueError as `read_lora`."""
    path, lora = Path(source), read_lora(source)
    metadata = read_file_metadata(find_loras(path)[0] if path.is_dir() else path)
    adapters = [*lora.network.values(), *lora.text.values()]
    alphas = (float(x.tensors["alpha"]) for x in adapters if "alpha" in x.tensors and rank_of(x.tensors))
    return LoraInfo(
        source=str(source),
        formats=tuple(dict.fromkeys(map(_format, adapters))),
        ranks=_distinct(rank for x in adapters if (rank := rank_of(x.tensors)) is not None),
        alphas=_distinct(alphas),
        strength=lora.strength,
        targets=_targets(lora.network) | ({f"text encoder ({lora.clip})": len(lora.text)} if lora.text else {}),
        family=lora.family(),
        embeddings=tuple(bundled_embeddings(lora.embeddings)),
        ignored=(*ignored(lora, ()), *([lora.note] if lora.note else [])),
        title=metadata.get("modelspec.title") or metadata.get("ss_output_name", ""),
        trigger_words=trigger_words(metadata),
        sampling=dict(lora.sampling),
    )


def _format(adapter: Adapter) -> str:
    name = next(name for tensor, name in _FORMATS if tensor in adapter.tensors)
    return f"{name} with DoRA" if "dora_scale" in adapter.tensors else name


def _targets(network: Adapters) -> dict[str, int]:
    """Returns the numbers of adapters by stage. Adapters of other models' modules are not counted."""
    counts = Counter(stage for path in network if (stage := stage_of(path)))
    return {f"{stage} ({COMPONENTS[stage].stage})": count for stage, count in counts.items()}


def trigger_words(metadata: Mapping[str, str]) -> str:
    """Returns the trigger words of a safetensors header, or Kohya's most frequent tags; "" if it names none."""
    if phrase := metadata.get("modelspec.trigger_phrase"):
        return phrase
    try:
        tags = parse_json(metadata.get("ss_tag_frequency") or "{}")
        counts = Counter({tag: 0 for folder in tags.values() for tag in folder})
        for folder in tags.values():
            counts.update({tag: int(count) for tag, count in folder.items()})
    except (ValueError, AttributeError, TypeError, OverflowError):
        return ""
    words = [tag.strip() for tag, _ in counts.most_common()]
    return f"{listed(words, _MOST_WORDS)} (its most frequent tags)" if words else ""


def _distinct(values: Iterable[Number]) -> tuple[Number, ...]:
    return tuple(sorted(set(values)))


def _range(values: Sequence[float]) -> str:
    return f"{values[0]:g}" + (f" to {values[-1]:g}" if len(values) > 1 else "")
