"""What can be measured: a stage's work at a size, a batch and a dtype."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from wuerstchen_core.common.geometry import check_size


@dataclass(frozen=True)
class Stage:
    """A piece of work."""

    parts: tuple[str, ...]  # the networks that work
    what: str
    copies: int = 1  # of each picture in a network's batch: guided work computes two
    steps: bool = False  # what is measured is one of a sampler's
    beside: tuple[str, ...] = ()  # networks that ours asks for their sizes alone
    learns: bool = False  # whether the step is one of training


PICTURE = "text-to-picture"
STAGES = {
    "prior": Stage(("prior",), "a guided step of Stage C", copies=2, steps=True),
    "decoder": Stage(("decoder",), "a step of Stage B", steps=True, beside=("vqgan",)),
    "decoder-guided": Stage(("decoder",), "a guided step of Stage B", copies=2, steps=True, beside=("vqgan",)),
    "vqgan-decode": Stage(("vqgan",), "Stage A: latents to pictures"),
    "vqgan-encode": Stage(("vqgan",), "Stage A: pictures to latents"),
    "image-encoder": Stage(("image_encoder",), "the semantic compressor: pictures to features"),
    PICTURE: Stage(("prior", "decoder", "vqgan"), "all three stages, text states given"),
    "train-prior": Stage(("prior",), "a training step of Stage C", steps=True, learns=True),
    "train-decoder": Stage(("decoder",), "a training step of Stage B", steps=True, learns=True),
}
GROUPS = {
    "vqgan": ("vqgan-decode", "vqgan-encode"),
    "train": tuple(name for name, stage in STAGES.items() if stage.learns),
    "all": tuple(name for name, stage in STAGES.items() if not stage.learns),  # that paint
}
STEPS = 30, 12  # of a picture: of Stage C and Stage B
DTYPES = ("bf16", "fp32", "fp16")


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    stage: str
    side: int  # pixels
    batch: int
    dtype: str

    @property
    def label(self) -> str:
        batch = f" x{self.batch}" if self.batch > 1 else ""
        return f"{self.stage} {self.side}²{batch} {self.dtype}"

    @property
    def pixels(self) -> int:
        return self.side**2 * self.batch

    @property
    def rows(self) -> int:
        """How many pictures a network sees at once."""
        return self.batch * STAGES[self.stage].copies


def stored(stage: str, dtype: str) -> str:
    """In which dtype the weights of a stage are: in training by mixed precision, fp32."""
    return "fp32" if STAGES[stage].learns else dtype


def stage_names(asked: Sequence[str]) -> list[str]:
    """Stages, with a group's members in its place. Raises ValueError for a name that is neither."""
    unknown = [name for name in asked if name not in STAGES and name not in GROUPS]
    if unknown:
        raise ValueError(f"stage {unknown[0]!r} is unknown: choose of {', '.join((*STAGES, *GROUPS))}")
    return list(dict.fromkeys(name for one in asked for name in GROUPS.get(one, (one,))))


def check(
    stages: Sequence[str],
    sizes: Sequence[int],
    batches: Sequence[int],
    dtypes: Sequence[str],
    repeat: int,
    steps: Sequence[int],
) -> None:
    """Raise ValueError where one can't be measured."""
    for side in sizes:
        check_size(side, side)
    if not stages:
        raise ValueError(f"no stage was named: choose of {', '.join((*STAGES, *GROUPS))}")
    if min(batches) < 1:
        raise ValueError(f"a batch of {min(batches)} holds no picture: give at least 1")
    if repeat < 1:
        raise ValueError(f"{repeat} repetitions measure nothing: give at least 1")
    if len(steps) != 2 or min(steps) < 1:
        raise ValueError("--steps takes those of Stage C and of Stage B, each at least 1: such as 30+12, or fast")
    unknown = [dtype for dtype in dtypes if dtype not in DTYPES]
    if unknown or not dtypes:
        raise ValueError(f"dtype {unknown[0] if unknown else ''!r} is unknown: choose of {', '.join(DTYPES)}")
    if "fp16" in dtypes and any(STAGES[name].learns for name in stages):
        raise ValueError("training is measured in bf16, which is mixed precision, and fp32: leave out fp16")


def cases(stages: Sequence[str], sizes: Sequence[int], batches: Sequence[int], dtypes: Sequence[str]) -> Iterator[Case]:
    """Every combination, the smallest first within a network, so that it is loaded once."""
    for dtype, stage, batch, side in product(dtypes, stages, sorted(batches), sorted(sizes)):
        yield Case(stage, side, batch, dtype)
