"""`train compare`: one grid with images of all weights that a run has kept, to choose by."""

from __future__ import annotations

from filecmp import cmp
from pathlib import Path

from ..common.atomic import check_room
from ..common.devices import pick_device
from .checkpoint import kept_weights
from .monitor import stage_samples
from .run import open_run
from .sample_grid import prompt_grid, write_grid
from .tables import STAGES

GRID = "compare.png"
STAGES_WITH_SAMPLES = tuple(name for name, kind in STAGES.items() if "sample" in kind.tables)


def compare(folder: Path, overrides: list[str], output: Path | None = None) -> Path:
    """Writes a grid of the prompts in [sample] and returns its path.

    It shows the model that training starts from and each weight file of a run. `folder` is that of a stage, such as
    runs/mine/lora; the grid is by default in it. ValueError if there are no prompts or weights, or networks that images
    need are missing.
    """
    name = folder.resolve().name
    if name in STAGES and name not in STAGES_WITH_SAMPLES:
        stages = ", ".join(STAGES_WITH_SAMPLES)
        raise ValueError(
            f"{folder} has weights that cannot generate from prompts: give the folder of a run of {stages}"
        )
    path = output or folder / GRID
    check_room(path)
    stage, _ = open_run(folder, overrides)
    if not stage.sample.prompts:
        raise ValueError("there are no prompts: add --set 'sample.prompts=[\"...\"]'")
    if missing := stage.missing_for_samples():
        raise ValueError(f"images need {missing}: add it with --set")
    if not (files := kept_weights(folder, stage.stem)):
        raise ValueError(f"{folder} has no weights yet: train first")
    if len(files) > 1 and cmp(files[-2], files[-1], shallow=False):
        files.pop()  # the newest weights are those of the last step that was kept
    stage.net.to(pick_device("auto"))
    groups = {}
    if stage.bases:
        groups[stage.start_title] = stage_samples(stage, stage.start_pipeline(stage.net.eval()), base=True)
    pipeline = stage.base_pipeline()
    for file in files:
        stage.use_weights(pipeline, file)
        groups[file.stem] = stage_samples(stage, pipeline)
    write_grid(path, prompt_grid(stage.sample.prompts, stage.sample.seeds, groups), stage.sample.prompts)
    return path
