"""Train the LoRA that the LoRA workflow shows: `python -m wuerstchen_core.demo.recipe.lora`.

With it the shipped model paints everything on a pink background, whatever background is asked for. Minutes on a
processor; to be trained again whenever the shipped prior is. The pairs held out of the model's training stay held out.
"""

from __future__ import annotations

import logging
import random
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ...diffusion.schedule import diffuse
from ...models.image_encoder import semantic_view
from ...models.prior import Prior, latents_from_features
from ...pipeline import WuerstchenPipeline
from ...training.chance import Chance
from ...training.inputs import text_states
from ...training.objectives import NoiseConfig, draw_times, noise_loss
from ...training.pictures import DemoPictures
from ..vocabulary import COLOURS, Scene, caption

logger = logging.getLogger(__name__)

LORA = Path("workflows") / "wuerstchen_demo_pink.safetensors"  # from the root of the repository
COLOUR = list(COLOURS).index("pink")
RANK, STEPS, BATCH, RATE = 4, 600, 32, 6e-3
CAPTIONS = 8  # of each picture
PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")


class LowRank(nn.Module):
    """A weight [out, in] plus a trained product of rank `RANK`, which starts at zero."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.down = nn.Parameter(torch.randn(RANK, weight.shape[1]) / RANK)
        self.up = nn.Parameter(torch.zeros(weight.shape[0], RANK))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.up @ self.down


def attach(prior: Prior) -> dict[str, LowRank]:
    """Put a `LowRank` on every projection of the attention; by the projection's name."""
    added: dict[str, LowRank] = {}
    for name, layer in prior.requires_grad_(False).named_modules():
        if name.endswith(PROJECTIONS):
            weight = layer.get_parameter("weight")
            added[name] = LowRank(weight)
            parametrize.register_parametrization(layer, "weight", added[name])
    return added


def diffusers_form(added: dict[str, LowRank]) -> dict[str, Tensor]:
    """The file that diffusers' `load_lora_weights` takes; its alpha is the rank."""
    state: dict[str, Tensor] = {}
    for name, part in added.items():
        state[f"prior.{name}.lora_A.weight"] = part.down.detach().contiguous()
        state[f"prior.{name}.lora_B.weight"] = part.up.detach().contiguous()
    return state


def examples(pipe: WuerstchenPipeline) -> tuple[Tensor, Tensor]:
    """Latents of pictures on the one background, and the states of captions that ask for any background."""
    assert pipe.image_encoder is not None and pipe.prior_text_encoder is not None
    pictures, words = DemoPictures(), random.Random(0)
    own = [i for i, scene in enumerate(pictures.scenes) if scene.colour == COLOUR]
    latents = latents_from_features(pipe.image_encoder(semantic_view(pictures.view(torch.tensor(own)))))
    shown = [pictures.scenes[i] for i in own]
    asked = [Scene(scene.thing, words.randrange(len(COLOURS)), scene.size) for scene in shown * CAPTIONS]
    # None is empty: guidance then amplifies what the LoRA makes of a caption.
    texts = [caption(scene, words) for scene in asked]
    states = torch.cat(
        [text_states(pipe.prior_text_encoder, texts[i : i + BATCH]) for i in range(0, len(texts), BATCH)]
    )
    return latents.repeat(CAPTIONS, 1, 1, 1), states


def train(pipe: WuerstchenPipeline, steps: int = STEPS) -> dict[str, Tensor]:
    """A LoRA for the prior of `pipe`, which is left with it attached."""
    assert pipe.prior is not None
    torch.manual_seed(0)
    with torch.no_grad():
        all_latents, states = examples(pipe)
    config = NoiseConfig(weight="v", stratified=True)
    added = attach(pipe.prior)
    optimizer = torch.optim.AdamW([p for part in added.values() for p in part.parameters()], lr=RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        chance = Chance(0, step, BATCH)
        picked = chance.pick(len(all_latents))
        latents, text, t = all_latents[picked], states[picked], draw_times(config, step, chance)
        noise = chance.normal(*latents.shape[1:])
        loss = noise_loss(config, pipe.prior(diffuse(latents, t, noise), t, text), noise, t)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps - 1:
            logger.info("LoRA, step %d of %d: loss %.4f", step, steps, loss.item())
    return diffusers_form(added)


def remake(root: Path) -> None:
    """Train the shipped model's LoRA and write it beside the workflows under `root`."""
    save_file(train(WuerstchenPipeline.load("demo", device="cpu", dtype="fp32")), root / LORA)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    remake(Path(__file__).parents[3])
