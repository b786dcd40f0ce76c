"""Times a step of our networks under ComfyUI's samplers, of the core alone, and of Stable Cascade's layers.

`python -m tools.bench --comfyui FOLDER` runs this with ComfyUI's own Python; the job and the results are JSON. Stable
Cascade has other conditioning, so its networks are built here from ComfyUI's layers in Würstchen's widths and depths.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from itertools import product
from typing import Any

import torch
from torch import Tensor

from .in_host import enter, load_pack

STEPS = 3  # per turn: the first, which also loads, does not count
KSAMPLER = "ddpm", "normal"
Run = Callable[[Callable[[], None]], Any]  # does STEPS steps and calls its argument after each


class Networks:
    """One stage's network in the core, in ComfyUI, and as Stable Cascade's layers."""

    def __init__(self, job: dict[str, Any], name: str, dtype: str):
        from pack.nodes.host import models
        from pack.tools.bench.cases import Case
        from pack.tools.bench.measure import Setting
        from pack.tools.bench.weights import ModelSizes, random_state
        from pack.tools.bench.wuerstchen import Wuerstchen
        from pack.wuerstchen_core.checkpoints import Part
        from pack.wuerstchen_core.checkpoints.components import COMPONENTS
        from pack.wuerstchen_core.common.dataclass_config import from_table
        from pack.wuerstchen_core.common.devices import DTYPES

        self.device = job["device"]
        tables = job["networks"].items()
        self.sizes = ModelSizes(**{part: from_table(COMPONENTS[part].params, x, part) for part, x in tables})
        state = random_state(name, self.sizes, DTYPES[dtype])
        self.model = models.load_model(Part(name, self.sizes.of(name), state), DTYPES[dtype])
        self.dtype = self.model.model.get_dtype_inference()  # ComfyUI's choice, which the others follow
        setting = Setting(Case(name, 0, 1, dtype, dtype), self.sizes, self.device, (STEPS, STEPS), self.dtype)
        self.core = Wuerstchen(setting, setting.states())
        self.cascade = cascade(name, self.sizes, self.device, self.dtype)

    def runs(self, case: Any) -> dict[str, Run]:
        """Returns the functions to time, by name."""
        import comfy.sample
        from pack.nodes.host.sampling import sample_stage
        from pack.tools.bench.cases import PRIOR_GUIDANCE, SEED, inputs
        from pack.wuerstchen_core.common.geometry import decoder_side, prior_side
        from pack.wuerstchen_core.diffusion.schedule import linear_times

        data, prior = inputs(case, self.sizes, self.device), case.stage == "prior"
        side = (prior_side if prior else decoder_side)(case.size)
        zeros = torch.zeros(case.batch, 16 if prior else 4, side, side)
        extra = {} if prior else {"stable_cascade_prior": data["features"]}
        text, negative = ("prior_text", "prior_negative") if prior else ("text", "text")
        conds, cfg = ([[data[text], extra]], [[data[negative], extra]]), PRIOR_GUIDANCE if prior else 1.0

        def ksampler(after: Callable[[], None]) -> Tensor:
            noise = torch.randn(zeros.shape, generator=torch.Generator().manual_seed(SEED))
            options = {"callback": lambda *_: after(), "disable_pbar": True, "seed": SEED}
            return comfy.sample.sample(self.model, noise, STEPS, cfg, *KSAMPLER, *conds, zeros, **options)

        def node(after: Callable[[], None]) -> Tensor:
            import latent_preview

            original, latent_preview.prepare_callback = latent_preview.prepare_callback, lambda *_: lambda *_: after()
            try:
                return sample_stage(
                    self.model, *conds, {"samples": zeros}, linear_times(STEPS), cfg, SEED, from_noise=True
                )
            finally:
                latent_preview.prepare_callback = original

        def layers(after: Callable[[], None]) -> None:
            call = cascade_call(self.cascade, case, side, self.device, self.dtype)
            for _ in range(STEPS):
                call()
                after()

        core: Run = lambda after: self.core.run(case, STEPS, after)  # noqa: E731
        return {"core": core, "KSampler": ksampler, "Würstchen Sampler": node, "Stable Cascade's layers": layers}


def cascade(name: str, sizes: Any, device: Any, dtype: torch.dtype) -> Any:
    """Returns Stable Cascade's network, built from ComfyUI's layers, as wide and as deep as ours."""
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
    """Returns one call of that network with the batch size of ours."""
    from pack.wuerstchen_core.common.geometry import prior_side

    def make(*shape: int) -> Tensor:
        return torch.randn(case.rows, *shape).to(device, dtype)

    r, small = torch.full((case.rows,), 0.5, device=device), prior_side(case.size)
    if case.stage == "prior":
        width = network.clip_txt_mapper.in_features
        x, text, pooled, image = make(16, side, side), make(77, width), make(1, width), make(1, 768)
        return lambda: network(x, r, text, pooled, image)
    x, effnet, text = make(4, side, side), make(16, small, small), make(77, network.clip_mapper.in_features)
    return lambda: network(x, r, effnet, text)


def main(job: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns a row for each case, with the seconds of each run's steps."""
    from pack.tools.bench.cases import Case
    from pack.tools.bench.measure import alternate, clock_of

    clock, rows = clock_of(job["device"]), []
    for dtype, name in product(job["dtypes"], job["stages"]):
        networks = Networks(job, name, dtype)
        for size, batch in product(job["sizes"], job["batch"]):
            seconds = alternate(networks.runs(Case(name, size, batch, dtype, dtype)), job["repeat"], 1, clock)
            ways = {way: {"median": statistics.median(times), "seconds": times} for way, times in seconds.items()}
            row = {"stage": name, "size": size, "batch": batch, "dtype": dtype}
            rows.append({**row, "comfyui_dtype": str(networks.dtype).removeprefix("torch."), "ways": ways})
    return rows


if __name__ == "__main__":
    [argument] = enter()
    job = json.loads(argument)
    from comfy.cli_args import args

    args.cpu = job["device"] == "cpu"
    if job["threads"]:
        torch.set_num_threads(job["threads"])
    load_pack()
    with torch.inference_mode():
        sys.stdout.write(json.dumps(main(job)) + "\n")
