"""How fast the networks are under ComfyUI's sampling, beside the core's own and beside ComfyUI's Stable Cascade.

`python -m tools.bench --comfyui COMFYUI` runs it with that ComfyUI's Python: `measure_speed.py COMFYUI PLAN`,
with PLAN and what it prints as JSON. Every way takes the same steps of full-size networks with random weights, in turn.
Stable Cascade has other conditioning: its networks are built here in Würstchen's widths and depths out of ComfyUI's
layers, and compared by FLOP/s, too.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from .in_host import enter, load_pack

STEPS = 3  # of a run: the first, which also loads, and two that count
KSAMPLER = "ddpm", "normal"
Way = Callable[[Callable[[], None]], Any]  # walks STEPS steps, and calls back after each


class Stage:
    """A stage's network in the core, in ComfyUI, and of ComfyUI's layers."""

    def __init__(self, plan: dict[str, Any], name: str, dtype: str):
        from pack.nodes.host import models
        from pack.tools.bench.setting import Setting
        from pack.tools.bench.weights import sizes_of, weight_file
        from pack.tools.bench.wuerstchen import Ours
        from pack.wuerstchen_core.checkpoints import read_part
        from pack.wuerstchen_core.common.devices import DTYPES

        folder = Path(plan["folder"])
        self.sizes, self.device = sizes_of(folder), plan["device"]
        self.model = models.load_model(read_part(weight_file(folder, name, dtype), name), DTYPES[dtype])
        self.dtype = self.model.model.get_dtype_inference()  # which ComfyUI chooses, and all others then work in
        setting = Setting(name, dtype, folder, self.sizes, self.device, time.perf_counter, (STEPS, STEPS))
        self.ours = Ours(replace(setting, compute=self.dtype))
        self.cascade = cascade(name, self.sizes, self.device, self.dtype)

    def ways(self, case: Any) -> dict[str, Way]:
        """The ways of this case by name."""
        import comfy.sample
        from pack.nodes.host.sampling import sample_stage
        from pack.tools.bench.inputs import PRIOR_GUIDANCE, SEED, inputs
        from pack.wuerstchen_core.common.geometry import decoder_side, prior_side
        from pack.wuerstchen_core.diffusion.schedule import linear_times

        given, prior = inputs(case, self.sizes, self.device), case.stage == "prior"
        side = (prior_side if prior else decoder_side)(case.side)
        zeros = torch.zeros(case.batch, 16 if prior else 4, side, side)
        extra = {} if prior else {"stable_cascade_prior": given["features"]}
        text, negative = ("prior_text", "prior_negative") if prior else ("text", "negative")
        conds, cfg = ([[given[text], extra]], [[given[negative], extra]]), PRIOR_GUIDANCE if prior else 1.0

        def ksampler(after: Callable[[], None]) -> Tensor:
            noise = torch.randn(zeros.shape, generator=torch.Generator().manual_seed(SEED))
            told = {"callback": lambda *_: after(), "disable_pbar": True, "seed": SEED}
            return comfy.sample.sample(self.model, noise, STEPS, cfg, *KSAMPLER, *conds, zeros, **told)

        def node(after: Callable[[], None]) -> Tensor:
            import latent_preview

            kept, latent_preview.prepare_callback = latent_preview.prepare_callback, lambda *_: lambda *_: after()
            try:
                return sample_stage(self.model, *conds, {"samples": zeros}, linear_times(STEPS), cfg, SEED)
            finally:
                latent_preview.prepare_callback = kept

        def layers(after: Callable[[], None]) -> None:
            call = cascade_call(self.cascade, case, side, self.device, self.dtype)
            for _ in range(STEPS):
                call()
                after()

        core: Way = lambda after: self.ours.run(case, STEPS, after)  # noqa: E731
        return {"core": core, "KSampler": ksampler, "Würstchen Sampler": node, "Stable Cascade's layers": layers}


def cascade(name: str, sizes: Any, device: Any, dtype: torch.dtype) -> Any:
    """Stable Cascade's network of ComfyUI's layers, as wide and as deep as ours."""
    import comfy.ops
    from comfy.ldm.cascade.stage_b import StageB
    from comfy.ldm.cascade.stage_c import StageC

    common = {"t_conds": [], "operations": comfy.ops.disable_weight_init, "device": device, "dtype": dtype}
    if name == "prior":
        p = sizes.prior
        halves = [[p.depth // 2], [p.depth - p.depth // 2]]
        network: Any = StageC(
            c_cond=p.c, c_hidden=[p.c], nhead=[p.nhead], blocks=halves, block_repeat=[[1], [1]], level_config=["CTA"],
            c_clip_text=p.c_cond, c_clip_text_pooled=p.c_cond, dropout=[0.0], self_attn=True, switch_level=[], **common,
        )  # fmt: skip
    else:
        d = sizes.decoder
        network = StageB(
            c_cond=d.c_cond, c_hidden=list(d.c_hidden), nhead=list(d.nhead), c_clip=d.clip_embd, c_clip_seq=1,
            blocks=[list(d.blocks), list(reversed(d.blocks))], block_repeat=[[1] * 4] * 2,
            level_config=list(d.level_config), **common,
        )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    for tensor in network.state_dict().values():
        tensor.normal_(std=0.5 * max(tensor[0].numel(), 4) ** -0.5, generator=generator if device == "cpu" else None)
    return network.eval().requires_grad_(False)


def cascade_call(network: Any, case: Any, side: int, device: Any, dtype: torch.dtype) -> Callable[[], Tensor]:
    """One call of that network, for as many pictures as ours is called for."""
    from pack.wuerstchen_core.common.geometry import prior_side

    def make(*shape: int) -> Tensor:
        return torch.randn(case.rows, *shape).to(device, dtype)

    r, small = torch.full((case.rows,), 0.5, device=device), prior_side(case.side)
    if case.stage == "prior":
        width = network.clip_txt_mapper.in_features
        x, text, pooled, image = make(16, side, side), make(77, width), make(1, width), make(1, 768)
        return lambda: network(x, r, text, pooled, image)
    x, effnet, text = make(4, side, side), make(16, small, small), make(77, network.clip_mapper.in_features)
    return lambda: network(x, r, effnet, text)


def measure(stage: Stage, case: Any, repeat: int, clock: Callable[[], float]) -> dict[str, Any]:
    """Medians of the later steps of each way, in turn."""
    ways, seconds = stage.ways(case), {}
    for _ in range(repeat):
        for name, way in ways.items():
            ends: list[float] = []
            way(lambda ends=ends: ends.append(clock()))
            seconds.setdefault(name, []).extend(b - a for a, b in zip(ends, ends[1:], strict=False))
    return {name: {"median": statistics.median(times), "seconds": times} for name, times in seconds.items()}


def work(stage: Stage, case: Any) -> dict[str, int]:
    """FLOP of one step, ours and of Stable Cascade's layers."""
    from pack.tools.bench.roofline import flops
    from pack.wuerstchen_core.common.geometry import decoder_side, prior_side

    side = (prior_side if case.stage == "prior" else decoder_side)(case.side)
    with FlopCounterMode(display=False) as counter:  # of a real call: ComfyUI's attention asks how much memory is free
        cascade_call(stage.cascade, case, side, stage.device, stage.dtype)()
    return {"ours": flops(case, stage.sizes, False, (0, 0)), "Stable Cascade's layers": counter.get_total_flops()}


def main(plan: dict[str, Any]) -> list[dict[str, Any]]:
    from pack.tools.bench.cases import Case
    from pack.tools.bench.timing import clock_of

    clock, rows = clock_of(plan["device"]), []
    for dtype in plan["dtypes"]:
        for name in ("prior", "decoder"):
            if name not in plan["stages"]:
                continue
            stage = Stage(plan, name, dtype)
            for side in plan["sizes"]:
                for batch in plan["batches"]:
                    case = Case(name, side, batch, dtype)
                    ways = measure(stage, case, plan["repeat"], clock)
                    row = {"stage": name, "side": side, "batch": batch, "dtype": dtype, "host_dtype": str(stage.dtype)}
                    rows.append({**row, "flops": work(stage, case), "ways": ways})
    return rows


if __name__ == "__main__":
    [words] = enter()
    told = json.loads(words)
    from comfy.cli_args import args

    args.cpu = told["device"] == "cpu"
    if told["threads"]:
        torch.set_num_threads(told["threads"])
    load_pack()
    with torch.inference_mode():
        sys.stdout.write(json.dumps(main(told)) + "\n")
