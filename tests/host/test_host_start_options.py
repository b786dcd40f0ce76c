"""The shipped model generates the same thing whatever options ComfyUI is started with."""

from __future__ import annotations

from pathlib import Path

import pytest
from images import content

from tools.comfyui.client import Install, Server
from tools.comfyui.graphs import api_form, workflow
from tools.demo.judge import Judge

pytestmark = pytest.mark.long

# What changes dtypes, attention, memory or caches, and goes with --cpu. Not --fp8_e8m0fnu-unet, which rounds weights to
# powers of two, and --enable-dynamic-vram, with which ComfyUI does not start on a CPU.
OPTIONS = [
    "--force-fp32", "--force-fp16", "--fp32-unet", "--fp64-unet", "--bf16-unet", "--fp16-unet", "--fp8_e4m3fn-unet",
    "--fp8_e5m2-unet", "--fp16-vae", "--fp32-vae", "--bf16-vae", "--cpu-vae", "--fp8_e4m3fn-text-enc",
    "--fp8_e5m2-text-enc", "--fp16-text-enc", "--fp32-text-enc", "--bf16-text-enc", "--fp16-intermediates",
    "--force-channels-last", "--supports-fp8-compute", "--cache-none", "--cache-classic",
    "--use-split-cross-attention", "--use-quad-cross-attention", "--use-pytorch-cross-attention",
    "--force-upcast-attention", "--dont-upcast-attention", "--async-offload", "--disable-async-offload",
    "--force-non-blocking", "--disable-smart-memory", "--deterministic", "--fast", "--disable-mmap",
    "--disable-dynamic-vram", "--disable-pinned-memory",
]  # fmt: skip


@pytest.mark.parametrize("option", OPTIONS)
def test_a_start_option_does_not_break_the_first_workflow(
    install: Install, option: str, tmp_path: Path, judge: Judge
) -> None:
    if option not in (install.root / "comfy" / "cli_args.py").read_text(encoding="utf-8"):
        pytest.skip("this ComfyUI has no such option")
    server = Server(install, tmp_path / "base", options=[option])
    try:
        server.start()
        outcome = server.run(api_form(workflow("text_to_image"), server.get("/object_info")))
    finally:
        server.stop()
    assert outcome.status == "execution_success", outcome.error
    assert content(judge, outcome.pictures[0]) == ("red apple", "blue")
