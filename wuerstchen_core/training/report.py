"""Says what a run will do before it starts, what its steps take, and how to use its weights at its end."""

from __future__ import annotations

import logging
import sys
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..checkpoints.components import TOWERS
from ..checkpoints.open import open_source
from ..common.command_line import command
from ..demo.vocabulary import unknown_words_note
from ..inference.embeddings import MARK, NAMES
from .checkpoint import kept_weights
from .config import INPUTS, LoopConfig
from .rng import StepRandom
from .stage import Stage
from .stages.networks import input_source, source_exists

log = logging.getLogger(__name__)

CAPTIONS, SEARCHED = 2, 1000  # examples in the log, and most that are searched for unknown words
FIRST, MEASURED = 1, 5  # steps before the first one whose time is measured, and steps that are
FP32 = 4  # bytes
FIXED_COPIES = 3  # of a trained weight: its gradient and AdamW's two moments


def report_start(stage: Stage[Any], config: LoopConfig, start: int, processes: int) -> None:
    """Logs the base model, some captions, parameters, steps, epochs and the memory before activations."""
    bases = ", ".join(map(str, stage.bases)) or "none: from random weights"
    trained = sum(p.numel() for p in stage.net.parameters() if p.requires_grad)
    networks = (stage.net, *stage.frozen)  # which may share parameters
    parameters = list({id(p): p for network in networks for p in network.parameters()}.values())
    total = sum(p.numel() for p in parameters)
    batch = config.batch * config.accumulate * processes
    log.info("base model: %s", bases)
    for name, caption in stage.dataset.first_captions(CAPTIONS):
        log.info("caption of %s, as it is read: %s", name, caption)
    if note := unknown_words(stage):
        log.warning("words of the captions that the text encoder, which is not trained, cannot read: %s", note)
    log.info("trains %.4g M of %.4g M parameters", trained / 1e6, total / 1e6)
    steps = config.steps - start
    epochs = f", {steps * batch / examples:.3g} epochs of {examples}" if (examples := stage.dataset.examples) else ""
    log.info("%d steps of %d pictures%s", steps, batch, epochs)
    fixed = fixed_bytes(sum(p.numel() * p.element_size() for p in parameters), trained, config.ema > 0) / 1e9
    kinds = "weights, gradients, optimizer and average" if config.ema else "weights, gradients and optimizer"
    log.info("memory: %.3g GB for %s, and more for activations", fixed, kinds)


def unknown_words(stage: Stage[Any]) -> str | None:
    """Returns a note about words in captions that the stage's frozen text encoder does not know, None if there is none.

    It reads an epoch's captions, of large datasets the first ones.
    """
    if not stage.text_source:
        return None
    metadata = open_source(stage.text_source, headers_only=True).metadata
    captions = stage.dataset.first_captions(SEARCHED) if metadata.get("vocabulary") else []
    texts = [NAMES.sub(" ", caption) for _, caption in captions]
    return unknown_words_note(texts, metadata, set(), str(stage.text_source))


def fixed_bytes(weights: int, trained: int, average: bool) -> int:
    """Returns the bytes that a run needs besides activations: of all weights, and for AdamW of the trained ones."""
    return weights + FP32 * (FIXED_COPIES + average) * trained


class StepTimes:
    """Logs the time of a step, once, after the first steps, and what the others will take."""

    def __init__(self, start: int, steps: int, device: torch.device):
        self._first, self._steps, self._device, self._began = start + FIRST, steps, device, 0.0

    def done(self, step: int) -> None:
        """To be called after `step` steps, before anything else is written."""
        if step == self._first:
            self._began = time.monotonic()
        elif step == self._first + MEASURED:
            seconds = (time.monotonic() - self._began) / MEASURED
            rest = max(0, self._steps - step)
            peak = f"; {peak:.3g} GB of memory at most so far" if (peak := _peak_bytes(self._device) / 1e9) else ""
            log.info("%.3g s a step: %s for the other %d%s", seconds, duration(seconds * rest), rest, peak)

    def shift(self, seconds: float) -> None:
        """Leaves seconds between steps out."""
        self._began += seconds


def duration(seconds: float) -> str:
    """Returns a time in words, such as "3 h 20 min"."""
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _peak_bytes(device: torch.device) -> int:
    """Returns the largest use of memory by this process: the GPU's, else the processor's; 0 if it is unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def report_end(stage: Stage[Any], config: Mapping[str, Any], file: Path) -> None:
    """Logs the files with weights, the command that generates an image with them, and their folder in ComfyUI."""
    log.info("wrote %s", ", ".join(map(str, kept_weights(file.parent, stage.stem))))
    if arguments := generate_arguments(stage, config, file, first_caption(stage)):
        log.info("generate with it: %s", command(arguments))
    log.info("for diffusers and the Hugging Face hub: %s", command(["train", "export", str(file.parent)]))
    if stage.comfyui_folder:
        preview = file.with_suffix(".png")
        files = f"{file} and {preview.name}" if preview.exists() else str(file)
        use = f"; load it with {stage.comfyui_node}{comfyui_use(stage)}" if stage.comfyui_node else ""
        text = "for ComfyUI, copy %s to its folder models/%s, under one name of your choice%s"
        log.info(text, files, stage.comfyui_folder, use)


def comfyui_use(stage: Stage[Any]) -> str:
    """Returns how ComfyUI uses what a stage's node loads, to follow the node's name; "" if the node does all."""
    if "control" in stage.tables:
        return ", and connect it to Apply ControlNet"
    return "" if stage.has_preview else ", in place of that part of the base model"


def first_caption(stage: Stage[Any]) -> str:
    """Returns a caption of the training images, or a prompt in its place."""
    images = stage.dataset.preview_images()
    texts = [] if images is None else images.captions(torch.tensor([0]), StepRandom(0, 0, 1))
    return texts[0] if texts and texts[0] else "a picture"


def generate_arguments(stage: Stage[Any], config: Mapping[str, Any], file: Path, prompt: str) -> list[str]:
    """Returns arguments of the command line that generate with a trained network; [] if it needs unknown networks."""
    own, sources = trained_part(stage), other_sources(stage, config)
    if not all(sources.values()) or not sources:
        return []
    arguments = ["generate", prompt]
    model = Counter(sources.values()).most_common(1)[0][0]
    parts = {part: source for part, source in sources.items() if source != model} | ({own: str(file)} if own else {})
    towers = {parts.get(tower) for tower in TOWERS}
    if len(towers) == 1 and None not in towers:  # both stages have the same
        parts["text_encoder"] = parts.pop(TOWERS[0])
        del parts[TOWERS[1]]
    arguments += ["--model", model]
    arguments += [x for part, source in parts.items() for x in (f"--{part.replace('_', '-')}", source)]
    if "embedding" in stage.tables:
        return ["generate", f"{MARK}{stage.stem}", *arguments[2:], "--embedding", str(file)]
    if "control" in stage.tables:
        return [*arguments, "--control", str(file), "hint.png"]
    return arguments if own else [*arguments, "--lora", str(file)]


def trained_part(stage: Stage[Any]) -> str:
    """Returns the part of a bundle that a stage trains, "" if it trains adapters or embeddings for one."""
    return stage.part if stage.part in INPUTS.values() else ""


def other_sources(stage: Stage[Any], config: Mapping[str, Any]) -> dict[str, str]:
    """Returns the sources of the parts that generate images with the one that a stage trains, "" for unknown ones.

    {} if the stage trains no part that generates images from text.
    """
    own = trained_part(stage)
    decoder = getattr(stage, "decoder_stage", getattr(stage, "network", stage.name).replace("_", "-"))
    if decoder not in ("decoder", "token-decoder"):
        return {}
    needed = {"prior": "prior", INPUTS[decoder]: decoder, "vqgan": "vqgan", TOWERS[0]: "text", TOWERS[1]: decoder}
    return {part: _source_of(config, part, name) for part, name in needed.items() if part != own}


def _source_of(config: Mapping[str, Any], part: str, stage: str) -> str:
    """Returns the source of a part in a configuration, "" if there is none."""
    inputs = config.get("inputs", {})
    candidates = [input_source(config, stage), config.get("start"), *inputs.values(), input_source(config, "text")]
    for source in filter(None, candidates):
        if source_exists(source) and part in open_source(source, headers_only=True).networks:
            return str(source)
    return ""
