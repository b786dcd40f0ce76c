"""Tables of the configurations of distillation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from ...common.dataclass_config import Count, Fraction, Range, option
from .adapters import AdapterConfig

TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "kv_mapper.1", "channelwise.0", "channelwise.4", "mapper")
Guidance = Annotated[float, Range(least=1)]


@dataclass(frozen=True)
class DistillConfig:
    """The `[distill]` table of Stage C.

    The student takes `steps` equal steps of time, from pure noise. From each of its states the frozen teacher takes
    `teacher_steps` DDIM steps, with guidance, to the end of the student's step; the loss is the squared distance of the
    two results. That is progressive distillation (arXiv 2202.00512), of guidance too (arXiv 2210.03142), in one round
    and from the states that the student has when it generates (arXiv 2405.14867, section 4.5).
    """

    guidance: Guidance = option(
        meaning="guidance scale of the teacher, which the student learns; 1: none, so that it is used with guidance"
    )
    steps: Count = option(2, "steps of the student")
    teacher_steps: Count = option(4, "steps of the teacher for each of the student")
    text_drop: Fraction = option(0.05, 'fraction of captions replaced by ""')

    def corruption(self) -> dict[str, float]:
        """Returns the table [noise] of the stage, with the keys for the student's conditioning."""
        return {"text_drop": self.text_drop}


@dataclass(frozen=True)
class DecoderDistillConfig(DistillConfig):
    """The `[distill]` table of Stage B.

    Stage B is sampled by DDPM, each of whose steps draws new noise around a prediction of the picture. So the teacher's
    steps always lead to the end, as in consistency distillation (arXiv 2310.04378).
    """

    guidance: Guidance = option(1.0, "guidance scale of the teacher, which the student learns; 1: none")
    steps: Count = option(1, "steps of the student")
    noised: Fraction = option(0.1, "fraction of features that gets noise, since Stage C's are not perfect")

    def corruption(self) -> dict[str, float]:
        return {"text_drop": self.text_drop, "drop": 0.0, "noised": self.noised}


@dataclass(frozen=True)
class PriorAdapterConfig(AdapterConfig):
    """The `[lora]` table of Stage C: by default of attention, MLPs, mappings and the last layer."""

    targets: tuple[str, ...] = option((*TARGETS, "out.1"), "last components of the paths of adapted layers")


@dataclass(frozen=True)
class DecoderAdapterConfig(AdapterConfig):
    """The `[lora]` table of Stage B, as that of Stage C."""

    targets: tuple[str, ...] = option((*TARGETS, "clf.1"), "last components of the paths of adapted layers")
