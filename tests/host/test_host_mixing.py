"""Latents and images between our nodes and other models' nodes: in the same units, or rejected with a clear error."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from bundles import TINY
from errors import check_error
from safetensors.torch import save_file

from tools.comfyui.client import Inside, Install, run_inside
from wuerstchen_core.models.vqgan import VQGAN, VQGANParams

OURS, CASCADES = 0.3764, 0.43  # each family's Stage B divides codebook units by this


@pytest.fixture(scope="module")
def stage_a(tmp_path_factory: pytest.TempPathFactory) -> tuple[VQGAN, Path]:
    """An untrained Stage A of the released size, and its file with the original keys that ComfyUI's VAELoader reads."""
    torch.manual_seed(0)
    network = VQGAN(VQGANParams())
    network.init_weights()
    state = network.state_dict()
    for key, x in state.items():
        if x.is_floating_point():
            x.add_(torch.rand_like(x), alpha=0.05 if key.endswith(("gammas", "running_var", "running_mean")) else 0.01)
    torch.nn.init.constant_(network.out_block[0].bias, 0.5)  # grey images, not clipped
    file = tmp_path_factory.mktemp("vae") / "stage_a.safetensors"
    save_file({key: x.contiguous() for key, x in network.state_dict().items()}, file)
    return network.eval(), file


@pytest.fixture(scope="module")
def mixed(
    install: Install, checkpoints: Path, stage_a: tuple[VQGAN, Path], tmp_path_factory: pytest.TempPathFactory
) -> Inside:
    """The results of inside_mixing.py in this ComfyUI."""
    arguments = checkpoints / TINY, stage_a[1]
    return run_inside(install, "inside_mixing.py", tmp_path_factory.mktemp("mixing"), *arguments)


@pytest.mark.parametrize(("family", "ratio"), [("ours", OURS / CASCADES), ("cascade", CASCADES / OURS)])
def test_stage_b_latents_are_in_codebook_units_outside(mixed: Inside, family: str, ratio: float) -> None:
    inside, outside, other = (
        mixed[0][f"units/{family}/{where}"] for where in ("inside", "outside", "inside the other")
    )
    torch.testing.assert_close(outside, inside * {"ours": OURS, "cascade": CASCADES}[family])
    torch.testing.assert_close(other, inside * ratio)


def test_comfyuis_stage_a_equals_ours(mixed: Inside, stage_a: tuple[VQGAN, Path]) -> None:
    network, tensors = stage_a[0], {key.removeprefix("stage a/"): x for key, x in mixed[0].items()}
    with torch.inference_mode():
        decoded = network.decode(tensors["latents"]).clamp(0, 1).movedim(1, -1)
        encoded = network.encode(tensors["pixels"].movedim(-1, 1))
    assert decoded.std() > 0.01 and encoded.std() > 0.01
    for name in ("ours", "stock"):
        # ComfyUI clamps when it saves.
        torch.testing.assert_close(tensors[f"{name}/decoded"].clamp(0, 1), decoded, rtol=0, atol=1e-5)
        torch.testing.assert_close(tensors[f"{name}/encoded"], encoded, rtol=1e-5, atol=1e-5)


def test_stable_cascades_nodes_can_replace_ours(mixed: Inside) -> None:
    tensors, facts = mixed
    assert torch.equal(tensors["cascade/stock"], tensors["cascade/ours"])
    assert facts["cascade empty c"] == [1, 16, 4, 6]  # rounded down: one row less than ours
    assert facts["cascade odd size for stage c"] == [1, 16, 6, 6]
    for side, ((stock_c, stock_b), (our_c, our_b)) in facts["cascade sizes"].items():
        assert stock_b == our_b, side
        assert 0 <= our_c - stock_c <= 1, side


MISTAKES = {  # what the error must name
    "cascade odd size": ("66x64", "264x256 pixels", "multiples"),
    "cascade odd size in a KSampler": ("66x64", "multiples", "Würstchen Empty Latents"),
    "sd in a KSampler on stage c": ("Stage C", "[1, 4, 32, 32]", "stage_c"),
    "flux in a KSampler on stage c": ("64x64", "2731x2731 pixels", "stage_c"),
    "flux in a KSampler on stage b": ("Stage B", "[1, 16, 64, 64]", "stage_b"),
    "stage c in a KSampler on stage b": ("Stage B", "[1, 16, 6, 6]", "stage_b"),
    "video in a KSampler on stage c": ("Stage C", "[1, 16, 1, 12, 12]"),
    "empty sd3 in our prior node": ("Würstchen Prior Sample", "64x64", "stage_c"),
    "flux in our conditioning node": ("Würstchen Decoder Conditioning", "64x64", "stage_c"),
    "another model in our prior node": ("Würstchen Prior Sample", "StableCascade_C", "prior output"),
    "another model in our decoder node": ("Würstchen Decoder Sample", "StableCascade_C", "decoder output"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_other_models_latents_are_rejected_in_one_line(mixed: Inside, mistake: str) -> None:
    assert isinstance(mixed[1][mistake], str)
    check_error(mixed[1][mistake], *MISTAKES[mistake])


@pytest.mark.parametrize("family", ["sd", "sd3"])
def test_empty_latents_of_8_pixels_are_resized_or_rejected(mixed: Inside, family: str) -> None:
    """Newer ComfyUI versions resize them to our pixels per latent; in older ones they are 7 times too large."""
    result = mixed[1][f"empty {family} 512 in a KSampler on stage c"]
    assert result == [1, 16, 12, 12] or ("64x64" in result and "Würstchen Empty Latents" in result)


def test_stages_of_very_different_sizes_give_a_warning(mixed: Inside) -> None:
    _, facts = mixed
    assert facts["ours in a KSampler on stage c"] == [1, 16, 6, 6]
    assert facts["ours in a KSampler on stage b"] == [1, 4, 64, 64]
    assert not facts["no warning"]
    if facts["empty sd 256 in a KSampler on stage b"] == [1, 4, 64, 64]:  # newer ComfyUI versions
        assert not facts["warning"]
        check_error(facts["empty sd in our decoder node"], "8 pixels", "stage_b")
    else:
        assert facts["empty sd 256 in a KSampler on stage b"] == [1, 4, 32, 32]
        [line] = facts["warning"]
        assert "128x128" in line and "256x256" in line


def test_an_image_taken_from_a_batch_keeps_its_seed(mixed: Inside) -> None:
    tensors, _ = mixed
    for stage in "cb":
        both = tensors[f"batches/both {stage}"]
        torch.testing.assert_close(tensors[f"batches/second {stage}"], both[1:], rtol=1e-4, atol=1e-4)
        assert (both[0] - both[1]).abs().mean() > 0.1
    torch.testing.assert_close(tensors["batches/repeated c"], tensors["batches/both c"], rtol=1e-4, atol=1e-4)


def test_comfyuis_latent_nodes_keep_our_tag(mixed: Inside) -> None:
    tensors, facts = mixed
    after = {key.removeprefix("after "): found for key, found in facts.items() if key.startswith("after ")}
    assert {name: shape[0] for name, (_, shape) in after.items()} == {
        "LatentFromBatch": 1,
        "RepeatLatentBatch": 4,
        "LatentBatch": 3,
        "LatentUpscaleBy": 2,
        "SetLatentNoiseMask": 1,
        "KSampler": 2,
    }
    assert {tag for tag, _ in after.values()} == {"stage_c"}
    assert after["LatentUpscaleBy"][1] == [2, 16, 6, 4]
    before, masked = tensors["batches/both c"][:1], tensors["batches/masked c"]
    # Equal up to the noise that the original's last step leaves.
    torch.testing.assert_close(masked[:, :, 0], before[:, :, 0], rtol=1e-4, atol=0.02)
    assert (masked[:, :, 2] - before[:, :, 2]).abs().mean() > 0.1


def test_our_images_work_in_another_models_encoder(mixed: Inside) -> None:
    tensors, facts = mixed
    image, scaled, encoded = (tensors[f"pictures/{name}"] for name in ("image", "scaled", "encoded"))
    assert image.shape == (2, 64, 96, 3) and image.dtype == torch.float32 and facts["on ComfyUI's device"]
    assert image.min() >= 0 and image.max() <= 1 and image.std() > 0.01
    assert scaled.shape == (2, 64, 128, 3) and encoded.shape == (2, 4, 16, 32)
