"""Fixtures of the host tests. Each ComfyUI found is started once, with small untrained models in its folders."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bundles import FOREIGN, HALF, OUTLINE, SAMPLING, SAMPLING_V1, TINY, V1, Generate, Graph, find
from helpers.archive import unpacked_archive
from helpers.networks import NETWORKS, PRIOR
from random_prompts import add_probe
from safetensors.torch import save_file

from tools.comfyui.client import Install, Outcome, Server, installs
from tools.comfyui.graphs import api_form, workflow
from tools.comfyui.workflow_pictures import newest
from tools.demo.judge import Judge
from wuerstchen_core.checkpoints import read_part, save_bundle
from wuerstchen_core.models.prior import Prior
from wuerstchen_core.models.text_encoder import TextEncoder, TextEncoderParams

VOCABULARY = {"words": ["a", "apple", "red"], "things": ["apple"], "colours": ["red"], "sizes": ["large"]}


@pytest.hookimpl(tryfirst=True)  # before -m deselects long tests
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here, found = Path(__file__).parent, installs()
    latest = newest(found) if found else None
    for item in items:
        if here not in item.path.parents:
            continue
        item.add_marker(pytest.mark.host)
        own = item.callspec.params.get("install") if isinstance(item, pytest.Function) else None
        if item.get_closest_marker("newest") and own != latest:
            item.add_marker(pytest.mark.long)
        if own and _is_variant(own, found) and not item.get_closest_marker("packages"):
            item.add_marker(pytest.mark.long)


def _is_variant(install: Install, found: list[Install]) -> bool:
    """True if another of the ComfyUIs differs only in its packages, which are those that it requires."""
    twins = [other for other in found if other.version == install.version and other.has_own_packages]
    return bool(twins) and install not in twins


def _name(install: Install | None) -> str:
    return install.name if install else "none"


@pytest.fixture(scope="session", params=installs() or [None], ids=_name)
def install(request: pytest.FixtureRequest) -> Install:
    """Each ComfyUI on this machine."""
    if request.param is None:
        pytest.skip("no ComfyUI found: set COMFYUI_PATH to its folder")
    return request.param


@pytest.fixture(autouse=True)
def host_version(install: Install, record_property: Callable[[str, Any], None]) -> None:
    record_property("host_version", install.name)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models folder that all ComfyUIs share; tests may add files to its folders."""
    folder = tmp_path_factory.mktemp("models")
    for name in ("checkpoints", "diffusion_models", "text_encoders", "vae", "loras", "embeddings", "controlnet"):
        (folder / name).mkdir()
    return folder


def v1_parts(parts: Mapping[str, Any]) -> dict[str, Any]:
    """Returns an untrained v1 model: its prior uses the features' units, and both stages share a text encoder."""
    tower = parts["decoder_text_encoder"]
    params = replace(PRIOR, c_cond=tower.params.width, feature_scale=1.0, feature_shift=0.0)
    own = {
        "prior": replace(NETWORKS["prior"], build=lambda: Prior(params)).perturbed(),
        "token_decoder": NETWORKS["token_decoder"].perturbed(),
    }
    towers = dict.fromkeys(("prior_text_encoder", "decoder_text_encoder"), tower)
    return {**own, **towers, "vqgan": parts["vqgan"], "image_encoder": parts["image_encoder"]}


@pytest.fixture(scope="session")
def checkpoints(models: Path) -> Path:
    """The checkpoints folder: an untrained model whose text encoders differ in width, a bundle of one part, a v1 model,
    and another model's file. Beside it is a ControlNet of the first."""
    folder = models / "checkpoints"
    parts = {name: NETWORKS[name].perturbed() for name in ("prior", "decoder", "vqgan", "image_encoder")}
    torch.nn.init.constant_(parts["vqgan"].out_block[0].bias, 0.5)  # grey images, not clipped to black
    for stage, width in (("prior", parts["prior"].params.c_cond), ("decoder", parts["decoder"].params.clip_embd)):
        tower = TextEncoder(TextEncoderParams(width=width, heads=2, layers=2))
        tower.init_weights()
        parts[f"{stage}_text_encoder"] = tower
    save_bundle(folder / TINY, parts, {"sampling": SAMPLING, "vocabulary": VOCABULARY})
    save_bundle(models / "controlnet" / OUTLINE, {"control_net": NETWORKS["control_net"].perturbed()}, {})
    save_bundle(folder / HALF, {"vqgan": parts["vqgan"]}, {})
    save_bundle(folder / V1, v1_parts(parts), {"sampling": SAMPLING_V1})
    save_file({"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(4, 4, 3, 3)}, folder / FOREIGN)
    assert read_part(folder / TINY, "prior").params == parts["prior"].params
    return folder


@pytest.fixture(scope="session")
def server(
    install: Install, models: Path, checkpoints: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """The running ComfyUI, with the node pack as the registry distributes it."""
    pack = unpacked_archive(tmp_path_factory.mktemp("archive"))
    server = Server(install, tmp_path_factory.mktemp("comfyui") / "base", pack)
    (server.folder / "models").symlink_to(models, target_is_directory=True)
    add_probe(server)
    try:
        server.start()
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="session")
def object_info(server: Server) -> dict[str, Any]:
    """The ComfyUI's description of its nodes."""
    return server.get("/object_info")


@pytest.fixture
def shipped(object_info: dict[str, Any]) -> dict[str, Any]:
    """The shipped text-to-image workflow as a prompt."""
    return api_form(workflow("text_to_image"), object_info)


@pytest.fixture
def graph(shipped: dict[str, Any]) -> dict[str, Any]:
    """The same prompt for the untrained model, with few steps."""
    find(shipped, "WuerstchenBundleLoader")["bundle"] = TINY
    find(shipped, "WuerstchenEmptyLatents").update(width=SAMPLING["width"], height=SAMPLING["height"])
    find(shipped, "WuerstchenPriorSample").update(
        schedule=SAMPLING["schedule"], steps=SAMPLING["prior_steps"], cfg=SAMPLING["prior_guidance"]
    )
    find(shipped, "WuerstchenDecoderSample").update(steps=SAMPLING["decoder_steps"])
    return shipped


@pytest.fixture
def generate(server: Server) -> Generate:
    """Runs a prompt and asserts that it succeeds."""

    def run(graph: Graph) -> Outcome:
        outcome = server.run(graph)
        assert outcome.status == "execution_success", outcome.error + outcome.log
        return outcome

    return run


@pytest.fixture(scope="session")
def judge() -> Judge:
    """Recognises what an image of the shipped model shows."""
    return Judge()


@pytest.fixture
def load(object_info: dict[str, Any]) -> Callable[[str], Graph]:
    """Returns a shipped workflow by name, as a prompt."""
    return lambda name: api_form(workflow(name), object_info)
