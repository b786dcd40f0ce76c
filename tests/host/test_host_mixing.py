"""Latents and pictures between our nodes and other models': in the same units, or refused in a sentence."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from bundles import TINY
from safetensors.torch import save_file

from tools.comfyui.client import Inside, Install, run_inside
from wuerstchen_core.models.vqgan import VQGAN, VQGANParams

OURS, CASCADES = 0.3764, 0.43  # what each family's Stage B divides codebook units by


@pytest.fixture(scope="module")
def stage_a(tmp_path_factory: pytest.TempPathFactory) -> tuple[VQGAN, Path]:
    """An untrained Stage A of the released size, and its file in the original's names, as ComfyUI's VAELoader reads."""
    torch.manual_seed(0)
    network = VQGAN(VQGANParams())
    network.init_weights()
    state = network.state_dict()
    for key, x in state.items():
        if x.is_floating_point():
            x.add_(torch.rand_like(x), alpha=0.05 if key.endswith(("gammas", "running_var", "running_mean")) else 0.01)
    torch.nn.init.constant_(network.out_block[0].bias, 0.5)  # pictures that are grey, not clipped
    file = tmp_path_factory.mktemp("vae") / "stage_a.safetensors"
    save_file({key: x.contiguous() for key, x in network.state_dict().items()}, file)
    return network.eval(), file


@pytest.fixture(scope="module")
def mixed(
    install: Install, checkpoints: Path, stage_a: tuple[VQGAN, Path], tmp_path_factory: pytest.TempPathFactory
) -> Inside:
    """What inside_mixing.py computed in this ComfyUI."""
    given = checkpoints / TINY, stage_a[1]
    return run_inside(install, "inside_mixing.py", tmp_path_factory.mktemp("mixing"), *given)


@pytest.mark.parametrize(("one", "ratio"), [("ours", OURS / CASCADES), ("theirs", CASCADES / OURS)])
def test_stage_b_latents_leave_in_codebook_units_and_enter_the_other_family_in_its_own(
    mixed: Inside, one: str, ratio: float
) -> None:
    inside, outside, other = (mixed[0][f"units/{one}/{place}"] for place in ("inside", "outside", "inside the other"))
    torch.testing.assert_close(outside, inside * {"ours": OURS, "theirs": CASCADES}[one])
    torch.testing.assert_close(other, inside * ratio)


def test_the_hosts_stage_a_and_ours_give_the_same_picture_and_latents(
    mixed: Inside, stage_a: tuple[VQGAN, Path]
) -> None:
    network, tensors = stage_a[0], {key.removeprefix("stage a/"): x for key, x in mixed[0].items()}
    with torch.inference_mode():
        decoded = network.decode(tensors["latents"]).clamp(0, 1).movedim(1, -1)
        encoded = network.encode(tensors["pixels"].movedim(-1, 1))
    assert decoded.std() > 0.01 and encoded.std() > 0.01
    for whose in ("ours", "theirs"):
        # The host leaves what is beyond black and white to the node that saves.
        torch.testing.assert_close(tensors[f"{whose}/decoded"].clamp(0, 1), decoded, rtol=0, atol=1e-5)
        torch.testing.assert_close(tensors[f"{whose}/encoded"], encoded, rtol=1e-5, atol=1e-5)


def test_the_hosts_cascade_nodes_stand_in_for_ours(mixed: Inside) -> None:
    tensors, facts = mixed
    assert torch.equal(tensors["cascade/theirs"], tensors["cascade/ours"])
    assert facts["cascade empty c"] == [1, 16, 4, 6]  # one row less than ours: it rounds down
    assert facts["cascade odd size for stage c"] == [1, 16, 6, 6]
    for side, ((their_c, their_b), (our_c, our_b)) in facts["cascade sizes"].items():
        assert their_b == our_b, side
        assert 0 <= our_c - their_c <= 1, side


SENTENCES = {
    "cascade odd size": ("66x64", "264x256 pixels", "multiples of"),
    "cascade odd size in a KSampler": ("66x64", "multiples of", "Würstchen Empty Latents"),
    "sd in a KSampler on stage c": ("Stage C needs", "[1, 4, 32, 32]", "stage_c output"),
    "flux in a KSampler on stage c": ("64x64", "2731x2731 pixels", "another model's", "stage_c output"),
    "flux in a KSampler on stage b": ("Stage B needs", "[1, 16, 64, 64]", "stage_b output"),
    "stage c in a KSampler on stage b": ("Stage B needs", "[1, 16, 6, 6]", "stage_b output"),
    "video in a KSampler on stage c": ("Stage C needs", "[1, 16, 1, 12, 12]"),
    "empty sd3 in our prior node": ("Würstchen Prior Sample", "64x64", "stage_c output"),
    "flux in our conditioning node": ("Würstchen Decoder Conditioning", "64x64", "stage_c output"),
    "another model in our prior node": (
        "Würstchen Prior Sample was given another model (StableCascade_C)",
        "connect the prior output of a Würstchen loader",
    ),
    "another model in our decoder node": (
        "Würstchen Decoder Sample was given another model (StableCascade_C)",
        "connect the decoder output of a Würstchen loader",
    ),
}


@pytest.mark.parametrize("case", SENTENCES)
def test_what_is_another_familys_is_refused_in_a_sentence(mixed: Inside, case: str) -> None:
    said = mixed[1][case]
    assert isinstance(said, str) and "\n" not in said and len(said) < 300, said
    assert all(word in said for word in SENTENCES[case]), said


@pytest.mark.parametrize("family", ["sd", "sd3"])
def test_empty_latents_of_8_pixels_are_made_ours_or_refused(mixed: Inside, family: str) -> None:
    """The newer host knows our size of a latent; the older one would make them 7 times too many."""
    became = mixed[1][f"empty {family} 512 in a KSampler on stage c"]
    assert became == [1, 16, 12, 12] or ("64x64" in became and "Würstchen Empty Latents" in became)


def test_stages_of_very_different_sizes_are_said(mixed: Inside) -> None:
    _, facts = mixed
    assert facts["ours in a KSampler on stage c"] == [1, 16, 6, 6]
    assert facts["ours in a KSampler on stage b"] == [1, 4, 64, 64]
    assert not facts["quiet"]
    if facts["empty sd 256 in a KSampler on stage b"] == [1, 4, 64, 64]:  # the newer host
        assert not facts["warned"]
        assert "8 pixels each" in facts["empty sd in our decoder node"]
    else:
        assert facts["empty sd 256 in a KSampler on stage b"] == [1, 4, 32, 32]
        [line] = facts["warned"]
        assert "128x128" in line and "256x256" in line


def test_a_picture_taken_from_a_batch_keeps_its_seed(mixed: Inside) -> None:
    tensors, _ = mixed
    for stage in "cb":
        both = tensors[f"batches/both {stage}"]
        torch.testing.assert_close(tensors[f"batches/second {stage}"], both[1:], rtol=1e-4, atol=1e-4)
        assert (both[0] - both[1]).abs().mean() > 0.1
    torch.testing.assert_close(tensors["batches/repeated c"], tensors["batches/both c"], rtol=1e-4, atol=1e-4)


def test_the_hosts_nodes_for_latents_keep_ours_ours(mixed: Inside) -> None:
    tensors, facts = mixed
    after = {key.removeprefix("after "): what for key, what in facts.items() if key.startswith("after ")}
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
    # Kept but for what the original's last step, which does not end at no noise at all, leaves behind.
    torch.testing.assert_close(masked[:, :, 0], before[:, :, 0], rtol=1e-4, atol=0.02)
    assert (masked[:, :, 2] - before[:, :, 2]).abs().mean() > 0.1


def test_pictures_go_on_to_another_models_encoder(mixed: Inside) -> None:
    tensors, facts = mixed
    image, scaled, encoded = (tensors[f"pictures/{name}"] for name in ("image", "scaled", "encoded"))
    assert image.shape == (2, 64, 96, 3) and image.dtype == torch.float32 and facts["on the host's device"]
    assert image.min() >= 0 and image.max() <= 1 and image.std() > 0.01
    assert scaled.shape == (2, 64, 128, 3) and encoded.shape == (2, 4, 16, 32)
