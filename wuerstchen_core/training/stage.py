"""The interface between the training loop and the network that it trains."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

from torch import Tensor, nn

from ..checkpoints import save_bundle
from ..checkpoints.components import component
from ..common.atomic import link_file
from ..inference.pipeline import WuerstchenPipeline
from .data.dataset import ImageDataset, IndexedDataset
from .rng import StepRandom
from .samples import SampleConfig

N = TypeVar("N", bound=nn.Module)
BASE_TITLE = "base model"  # in grids, of what `base_pipeline` generates
LATE = 10**9  # a step after all that a stage does only at first


class Stage(ABC, Generic[N]):
    """A network, the batches that it is trained on, and its loss."""

    name: str  # for the command, the run's subfolder and the file of weights
    part: str  # the part of a bundle that is saved: the submodule of `net` with this name, else `net` itself
    # Keys and tables of the configuration that only some stages have: their types, or the field of a key.
    tables: Mapping[str, Any]
    net: N
    dataset: ImageDataset
    frozen: Sequence[nn.Module] = ()  # networks that `batch` calls
    has_large_frozen = False  # True if [train] frozen applies to some frozen networks
    bases: Sequence[str | Path] = ()  # sources of the weights that training starts from, whose licences are passed on
    text_source: str | Path = ""  # of a text encoder that reads captions and is not trained
    stated: Mapping[str, Any] = {}  # by the [modelspec] table, for the header of the weights
    has_preview = False  # True if a picture beside the weights shows them, as in ComfyUI's model library
    sample = SampleConfig()  # the [sample] table
    changes_sampling = False  # True if the trained model is sampled with other settings than its base
    unused_weights = False  # True if some weights get no gradient in some steps
    fsdp_conflict = ""  # the feature, if any, that cannot be trained with sharded weights

    def batch(self, step: int, rng: StepRandom) -> tuple[Any, ...]:
        """Returns the samples of `rng` of a step's batch."""
        return self.prepare(self.dataset.sample_batch(rng), step, rng)

    @property
    def comfyui_folder(self) -> str:
        """The folder below ComfyUI's `models` from which a node loads the weights; "" if none does."""
        return component(self.part).loader.folder

    @property
    def comfyui_node(self) -> str:
        """The node that loads the weights from `comfyui_folder`; "" for embeddings, which prompts name."""
        return component(self.part).loader.node

    def few_steps(self) -> dict[str, Any]:
        """Returns the settings of sampling that a distilled network needs; {} for others."""
        return {}

    @property
    def stem(self) -> str:
        """The name of the file of weights, without its ending."""
        return self.name

    @abstractmethod
    def prepare(self, picked: Any, step: int, rng: StepRandom) -> tuple[Any, ...]:
        """Returns the arguments of `loss` for a batch of the dataset.

        `rng` must be the only source of randomness: then runs resume exactly.
        """

    @abstractmethod
    def loss(self, net: N, *batch: Any) -> Tensor:
        """Returns the mean loss of a batch (scalar). `net` is `self.net`, perhaps wrapped by accelerate."""

    def validation_loss(self, net: N, picked: Any, rng: StepRandom) -> Tensor:
        """Returns the mean loss of held-out images. It should depend on no setting that two runs may compare."""
        device = next(net.parameters()).device
        batch = [x.to(device) if isinstance(x, Tensor) else x for x in self.prepare(picked, LATE, rng)]
        return self.loss(net, *batch)

    @abstractmethod
    def samples(self, net: N, validation: IndexedDataset) -> list[Tensor]:
        """Returns images [B, 3, H, W] in [0, 1] and the results of `net` (the EMA)."""

    def missing_for_samples(self) -> str:
        """Returns what `samples` and `pipeline` need and do not find, as in "decoder under [inputs]"; "" if nothing."""
        return ""

    def pipeline(self, net: N) -> WuerstchenPipeline:
        """Returns a pipeline of `net` and the other networks, for stages with a table [sample]."""
        raise NotImplementedError

    def start_pipeline(self, net: N) -> WuerstchenPipeline:
        """Returns a pipeline of the model that training starts from; `net` has its weights."""
        return self.pipeline(net)

    def base_pipeline(self) -> WuerstchenPipeline:
        """Returns a pipeline of the model that training starts from, for `use_weights`."""
        return self.pipeline(self.net.eval())

    @property
    def start_title(self) -> str:
        """The name of the model at step 0."""
        return BASE_TITLE

    def use_weights(self, pipeline: WuerstchenPipeline, path: Path) -> None:
        """Puts the weights of a file that `save` wrote into a pipeline that `base_pipeline` returned."""
        raise NotImplementedError

    def reconstructions(self, net: N, images: Tensor) -> dict[str, Tensor]:
        """Returns images [B, 3, H, W] in [0, 1] after Stage A, and after Stages B and A, by name: what is available.

        They are those of frozen networks only; `net` has their device.
        """
        return {}

    def sampling(self) -> dict[str, Any]:
        """Returns the settings of a model's `sampling` that training determines; the others are those of its base."""
        return {}

    def facts(self) -> dict[str, Any]:
        """Returns facts about the training for the header of the weights."""
        return {}

    def publish(self, file: Path, folder: Path, metadata: Mapping[str, Any]) -> None:
        """Writes the weights of a file that `save` wrote, and what else others load them from, to a folder."""
        link_file(file, folder / f"{self.stem}.safetensors")

    def save(self, path: Path, net: N, metadata: Mapping[str, Any]) -> None:
        """Writes the weights of `net` (the EMA)."""
        save_bundle(path, {self.part: getattr(net, self.part, net)}, metadata)
