"""The components of a model: its networks and its metadata."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..checkpoints import PARTS
from ..checkpoints.components import TEXT_ENCODER, TOWERS
from ..checkpoints.convert import write_model
from ..checkpoints.embeddings import Embedding
from ..checkpoints.lora_merge import LoraStack
from ..checkpoints.release import release_of_model
from ..common.devices import NETWORK_DTYPES, pick_device, pick_dtype
from ..common.values import to_path
from ..models.decoder import Decoder
from ..models.image_encoder import ImageEncoder
from ..models.int8 import is_int8, set_dtype
from ..models.prior import Prior
from ..models.text_encoder import TextEncoder
from ..models.token_decoder import TokenDecoder
from ..models.vqgan import VQGAN
from .arguments import check_keywords, named_arguments
from .low_memory import StoredNetworks
from .settings import SamplingSettings
from .sources import AnyPath, source_name

if TYPE_CHECKING:
    from typing_extensions import Self

logger = logging.getLogger(__name__)

Group = tuple[str, ...]  # names of settings
Values = dict[str, Any]  # by name


@dataclass(kw_only=True, eq=False, repr=False)
class Components:
    """The networks of one model, and its metadata. A network may be None: then the functions that need it fail.

    Networks that only ComfyUI nodes use have no field here.
    """

    prior: Prior | None = None
    decoder: Decoder | None = None
    token_decoder: TokenDecoder | None = None
    vqgan: VQGAN | None = None
    image_encoder: ImageEncoder | None = None
    prior_text_encoder: TextEncoder | None = None
    decoder_text_encoder: TextEncoder | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    version: str = field(init=False)  # "v1" or "v2"
    sampling: SamplingSettings = field(init=False)  # the model's defaults
    source: str | None = field(default=None, init=False)  # its name for `inspect`, if it was loaded from one source
    lora_stack: LoraStack = field(default_factory=LoraStack, init=False)  # see `load_lora`
    # By LoRA and group of settings in `sampling` that it sets: the values before, and its own.
    lora_settings: dict[str, dict[Group, tuple[Values, Values]]] = field(default_factory=dict, init=False)
    embeddings: dict[str, Embedding] = field(default_factory=dict, init=False)  # for embedding:NAME in prompts
    files: dict[str, Any] = field(default_factory=dict, init=False)  # their names and fingerprints, for metadata
    stored: StoredNetworks | None = field(default=None, init=False)  # with `load(low_memory=True)`
    reported_words: set[str] = field(default_factory=set, init=False)  # unknown words that were logged
    reported_hints: set[str] = field(default_factory=set, init=False)
    reported_sizes: set[tuple[int, int]] = field(default_factory=set, init=False)

    def __post_init__(self) -> None:
        self.metadata = dict(self.metadata or {})
        self.version = release_of_model([network.params for network in self.networks()])
        self.sampling = SamplingSettings.from_metadata(self.metadata, self.version)

    @property
    def loras(self) -> dict[str, float]:
        """The strengths of the loaded LoRAs, by name."""
        return self.lora_stack.strengths

    @property
    def device(self) -> torch.device:
        """The device of the networks."""
        if self.stored is not None:
            return self.stored.device
        for network in self.networks():
            return first_weight(network).device
        raise ValueError("this model has no network: load at least one component")

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the networks except the image encoder, which stays in its own; int8 if linear layers are."""
        if self.stored is not None:
            return self.stored.dtype
        networks = sorted(self.networks(), key=lambda network: network is self.image_encoder)
        if any(is_int8(network) for network in networks):
            return torch.int8
        for network in networks:
            return first_weight(network).dtype
        raise ValueError("this model has no network: load at least one component")

    @property
    def stage_b(self) -> str:
        """The name of Stage B's network."""
        return "decoder" if self.token_decoder is None else "token_decoder"

    def named_networks(self) -> dict[str, Any]:
        """Returns the networks that are not None, by name."""
        return {name: network for name in PARTS if (network := getattr(self, name, None)) is not None}

    def networks(self) -> Iterator[Any]:
        """Yields the networks that are not None."""
        return iter(self.named_networks().values())

    def require(self, name: str) -> Any:
        """Returns a network by name: with `low_memory`, without its weights. Raises ValueError if it is None."""
        network = getattr(self, name)
        if network is None:
            raise ValueError(
                f"this model has no {name.replace('_', ' ')}, which is needed here: "
                "load a complete bundle or folder, or all components from separate files"
            )
        return network

    @contextmanager
    def using(self, name: str) -> Iterator[Any]:
        """Yields a network by name; with `low_memory` it is read now, and released at the end of the block.

        Raises ValueError if it is None, or if its file has changed.
        """
        network = self.require(name)
        if self.stored is None:
            yield network
        else:
            with self.stored.using(name, self.lora_stack) as network:
                yield network

    def __repr__(self) -> str:
        networks = self.named_networks()
        if not networks:
            return f"{type(self).__name__} without networks"
        if self.prior_text_encoder is not None and self.prior_text_encoder is self.decoder_text_encoder:
            del networks[TOWERS[1]]
            networks[TEXT_ENCODER] = networks.pop(TOWERS[0])
        model = f"{source_name(self.source)}, " if self.source else ""
        dtype = str(self.dtype).removeprefix("torch.")
        sizes = {name: sum(x.numel() for x in network.parameters()) / 1e6 for name, network in networks.items()}
        lines = [f"  {name}: {size:.1f} M parameters" for name, size in sizes.items()]
        return "\n".join([f"{type(self).__name__}({model}{self.version}, {dtype} on {self.device})", *lines])

    def to(self, *targets: str | torch.device | torch.dtype, **named: Any) -> Self:
        """Moves the networks to a device, converts them to a dtype, or both, and returns the model.

        As in torch: `to("cuda")`, `to(torch.bfloat16)`, `to("cuda", "bf16")`, `to(device=..., dtype=...)`. The image
        encoder keeps its dtype. Raises ValueError for other arguments, and for devices that this machine lacks.
        """
        check_keywords("to", named, ["device", "dtype"])
        device, dtype = named.get("device"), named.get("dtype")
        for target in targets:
            if isinstance(target, torch.dtype) or target in NETWORK_DTYPES:
                dtype = target
            else:
                device = target
        moved = None if device is None else pick_device(device)
        cast = None if dtype is None else pick_dtype(dtype, moved or self.device, 0)
        if self.stored is not None:
            self.stored.device, self.stored.dtype = moved or self.stored.device, cast or self.stored.dtype
        for network in self.networks():
            if self.stored is None:
                network.to(moved)
            if cast is not None and network is not self.image_encoder:
                set_dtype(network, cast)
        return self

    @named_arguments
    def save(self, path: AnyPath) -> None:
        """Writes all networks and the metadata, as they are now: merged LoRAs are part of the networks.

        A name that ends in .safetensors is a bundle, any other a folder with one file per component; `load` reads both.
        Existing files are overwritten. Raises ValueError for other endings and with `low_memory`, OSError if writing
        fails.
        """
        if self.stored is not None:
            raise ValueError("save needs all networks in memory: load the model without low_memory, or use convert")
        if self.dtype == torch.int8:
            logger.warning('%s gets int8 weights: for exact ones, load the model with dtype="fp32" or "bf16"', path)
        write_model(to_path(path), self.named_networks(), self.metadata, force=True)


def first_weight(network: nn.Module) -> Tensor:
    """Returns a floating-point parameter of the network, for the device and dtype of its inputs."""
    return next(x for x in network.parameters() if x.is_floating_point())
