"""Text and conditioning from ComfyUI's own nodes have the effect that the core's arithmetic predicts."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from bundles import TINY
from conditioning_walk import DIFFERENT, NOTICE, OWN_ERROR, REFUSED
from errors import check_error
from helpers.picture_folders import examples, write_folder
from helpers.texts import texts
from inside_conditioning import LONG, PRIORS, STAGES, THIN, WITH_EMBEDDINGS, A, T
from safetensors.torch import save_file
from torch import Tensor, nn

from tools.comfyui.client import Inside, Install, run_inside
from wuerstchen_core import WuerstchenPipeline
from wuerstchen_core.checkpoints import load_decoder, load_prior, load_text_encoder
from wuerstchen_core.diffusion.masks import latent_mask
from wuerstchen_core.diffusion.schedule import alpha_bar
from wuerstchen_core.models.decoder import resize_prior_latents
from wuerstchen_core.models.text_encoder import END, START, TextEncoder, tokenize_whole
from wuerstchen_core.training.stages.embedding import VECTORS, DecoderEmbeddingStage, EmbeddingStage

Box = tuple[int, int, int, int]  # height, width, top, left

# Embedding files and the widths of their keys: one for SDXL, one for both encoders, one of A1111, one of another width.
EMBEDDINGS = {
    "sdxl": {"clip_g": 32, "clip_l": 12},
    "own": {"clip_g": 32, "clip_h": 24},
    "a1111": {"emb_params": 32},
    "narrow": {"emb_params": 12},
}


def vectors(width: int) -> Tensor:
    return torch.randn(3, width, generator=torch.Generator().manual_seed(width))


@pytest.fixture(scope="module")
def inside(install: Install, models: Path, checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> Inside:
    """The results of inside_conditioning.py in this ComfyUI."""
    for name, keys in EMBEDDINGS.items():
        tensors = {key: vectors(width) for key, width in keys.items()}
        save_file(tensors, models / "embeddings" / f"{name}.safetensors")
    both = {"clip_g": vectors(32), "clip_h": vectors(24)}
    save_file(both, models / "outside.safetensors")  # beside the folder of embeddings
    bundled = {f"bundle_emb.<{name}>.{key}": x[:2].clone() for name in "ab" for key, x in both.items()}
    save_file(bundled, models / "embeddings" / "lora.safetensors")
    save_file({key: x.repeat(4, 1)[:11] for key, x in both.items()}, models / "embeddings" / "eleven.safetensors")
    webui = {"string_to_token": {"*": 265}, "string_to_param": {"*": vectors(32)}, "name": "webui", "step": 5}
    torch.save(webui, models / "embeddings" / "webui.pt")
    torch.save({"<cat>": vectors(32)[0]}, models / "embeddings" / "learned_embeds.bin")
    write_trained_embedding(models / "embeddings" / "my-fox.safetensors", checkpoints / TINY)
    folder = tmp_path_factory.mktemp("inside")
    (folder / "texts.json").write_text(json.dumps(texts()), encoding="utf-8")
    arguments = checkpoints / TINY, models / "embeddings", folder / "texts.json"
    return run_inside(install, "inside_conditioning.py", folder, *arguments)


def write_trained_embedding(path: Path, bundle: Path) -> None:
    """Writes an embedding for both text encoders as the two trainings of it do, with random vectors."""
    pictures = write_folder(path.parent.parent / "pictures", examples(range(2), 64, 64))
    table: dict[str, object] = {"name": path.stem, "init": "red apple", "vectors": 3}
    config = {
        "run": str(path.parent), "data": {"source": str(pictures), "size": 64, "multiple": 64},
        "inputs": dict.fromkeys(("prior", "decoder", "encoder", "text", "vqgan"), str(bundle)),
    }  # fmt: skip
    for kind in (EmbeddingStage, DecoderEmbeddingStage):
        stage = kind(config | {"embedding": table})
        stage.net.get_parameter(VECTORS).data += vectors(stage.net.get_parameter(VECTORS).shape[1])
        stage.save(path, stage.net, {})
        table["start"] = str(path)


# text


@pytest.fixture(scope="module")
def towers(checkpoints: Path) -> dict[str, TextEncoder]:
    return {stage: load_text_encoder(checkpoints / TINY, which=stage) for stage in STAGES}


@torch.inference_mode()
def states(tower: TextEncoder, *parts: str | Tensor | tuple[str, float]) -> Tensor:
    """Returns the states [1, 77 n, c] of a sequence of texts, weighted texts and vectors.

    A weight scales the difference from the empty text.
    """
    tower, tokens, weights = deepcopy(tower), [], []
    for part in parts:
        text, weight = part if isinstance(part, tuple) else (part, 1.0)
        if isinstance(text, str):
            ids, mask = tokenize_whole(text)
            added = [i for i in ids[mask].tolist() if i not in (START, END)]
        else:  # new words of the vocabulary
            added = list(range(tower.token_embedding.num_embeddings, tower.token_embedding.num_embeddings + len(text)))
            tower.token_embedding = nn.Embedding.from_pretrained(torch.cat([tower.token_embedding.weight, text]))
        tokens += added
        weights += [weight] * len(added)
    out, empty = [], tower(*tokenize_whole(""))
    for i in range(0, max(len(tokens), 1), 75):
        row = [START, *tokens[i : i + 75], END]
        weight = torch.tensor([1.0, *weights[i : i + 75]] + [1.0] * (77 - len(row) + 1))
        mask = torch.arange(77) < len(row)
        found = tower(torch.tensor([row + [END] * (77 - len(row))]), mask[None])
        out.append(empty + weight[:, None] * (found - empty))
    return torch.cat(out, dim=1)


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("stage", STAGES)
def test_texts_become_the_token_ids_of_the_core(inside: Inside, stage: str) -> None:
    for text, found in zip(texts(), inside[1][f"ids/{stage}"], strict=True):
        assert found == tokenize_whole(text)[0].tolist(), text


@pytest.mark.parametrize("stage", STAGES)
def test_word_weights_scale_the_change_from_the_empty_text(
    inside: Inside, towers: dict[str, TextEncoder], stage: str
) -> None:
    found, tower = inside[0], towers[stage]
    weighted = states(tower, "a ", ("red", 1.3), " apple, ", ("small", 1.21))
    assert_close(found[f"weighted/{stage}"], weighted)
    for name in ("weighted", "trained"):  # our node and CLIPTextEncode
        assert torch.equal(found[f"both/{name}/{stage}"], found[f"{name}/{stage}"])
    assert_close(found[f"weight of 1/{stage}"], states(tower, "a red apple"))
    assert (weighted - states(tower, "a red apple, small")).abs().max() > 0.1


@pytest.mark.parametrize("stage", STAGES)
def test_long_text_is_encoded_in_chunks_like_in_the_core(
    inside: Inside, towers: dict[str, TextEncoder], stage: str
) -> None:
    found, tower = inside[0], towers[stage]
    assert found[f"75 tokens/{stage}"].shape[1] == 77 and found[f"76 tokens/{stage}"].shape[1] == 154
    assert_close(found[f"long/{stage}"], tower.encode([LONG]))
    assert_close(found[f"76 tokens/{stage}"], tower.encode(["a " * 76]))
    assert_close(found[f"weighted long/{stage}"], states(tower, f"{LONG} ", ("red", 0.6), " apple"))


@pytest.mark.parametrize("stage", STAGES)
def test_clip_set_last_layer_skips_layers(inside: Inside, towers: dict[str, TextEncoder], stage: str) -> None:
    found, tower = inside[0], deepcopy(towers[stage])
    assert_close(found[f"plain/{stage}"], tower.encode([A]))
    assert_close(found[f"layer -1/{stage}"], tower.encode([A]))
    del tower.transformer.resblocks[-1]  # the final norm follows all the same
    assert_close(found[f"layer -2/{stage}"], tower.encode([A]))


@pytest.mark.parametrize("stage", STAGES)
def test_embeddings_work_in_the_encoder_that_they_fit(
    inside: Inside, towers: dict[str, TextEncoder], stage: str
) -> None:
    found, logs = inside
    tower = towers[stage]
    inserted, without = (states(tower, "a ", *x, " apple") for x in ([vectors(tower.params.width)], []))
    fitting = {"prior": ("own", "sdxl", "a1111"), "decoder": ("own",)}[stage]
    for name in EMBEDDINGS:
        assert_close(found[f"{name}/{stage}"], inserted if name in fitting else without)
        assert ("mismatch" in logs[f"{name}/{stage}"]) == (name not in fitting)
    assert_close(found[f"missing/{stage}"], without)
    assert "embedding:missing" in logs[f"missing/{stage}"] and "does not exist" in logs[f"missing/{stage}"]


@pytest.mark.parametrize("stage", STAGES)
def test_a_prompt_reads_no_embedding_outside_of_its_folder(inside: Inside, stage: str) -> None:
    assert inside[1][f"outside/{stage}"] == [True, True, False]  # the last one is inside


@pytest.mark.parametrize("name", WITH_EMBEDDINGS)
def test_embeddings_are_encoded_as_in_python(inside: Inside, models: Path, checkpoints: Path, name: str) -> None:
    pipeline = WuerstchenPipeline.load(checkpoints / TINY, device="cpu", dtype="fp32")
    pipeline.load_embeddings(models / "embeddings")
    for stage, states in zip(STAGES, pipeline.encode_prompt(WITH_EMBEDDINGS[name]), strict=True):
        assert_close(inside[0][f"{name}/{stage}"], states)


# conditionings

# The areas of Stage C's 6 x 9 and Stage B's 48 x 64 latents; Stage B's are multiples of 8.
BOXES: dict[str, dict[str, Box]] = {
    "area": {"prior": (6, 4, 0, 0), "decoder": (48, 32, 0, 0)},
    "odd area": {"prior": (2, 3, 2, 2), "decoder": (24, 24, 8, 16)},
    "pixels": {"prior": (3, 3, 2, 3), "decoder": (32, 32, 16, 32)},
    "beyond the edge": {"prior": (1, 1, 5, 8), "decoder": (8, 8, 40, 56)},
    "bounds": {"prior": (6, 5, 0, 4), "decoder": (48, 32, 0, 32)},
}
# Stage B's boxes that match the left and the right half of Stage C's latents, and the columns of these halves.
HALVES = {(48, 32, 0, 0): slice(PRIORS[-1] // 2), (48, 32, 0, 32): slice(PRIORS[-1] // 2, None)}


class OneCall:
    """The core's result for one call of a stage with a conditioning."""

    def __init__(self, stage: str, checkpoints: Path, tensors: dict[str, Tensor]):
        self.stage, self.tensors = stage, tensors
        self.network = (load_prior if stage == "prior" else load_decoder)(checkpoints / TINY)
        self.a, self.b, self.long = (tensors[f"states/{name}/{stage}"] for name in ("a", "b", "long"))
        self.priors = torch.randn(PRIORS, generator=torch.Generator().manual_seed(5))

    @torch.inference_mode()
    def __call__(self, case: str, text: Tensor, box: Box | None = None, priors: Tensor | None = None) -> Tensor:
        """Returns the denoised latents of a case with one text, in an area."""
        signal = alpha_bar(torch.tensor(T))
        sigma = ((1 - signal) / signal).sqrt()
        x = self.tensors[f"x/{case}/{self.stage}"]
        priors = self.priors if priors is None else priors
        if box:
            height, width, top, left = box
            if box in HALVES:
                priors = priors[..., HALVES[box]]
            else:
                priors = resize_prior_latents(priors, x.shape[-2:])[..., top : top + height, left : left + width]
            x = x[..., top : top + height, left : left + width]
        conds = (text.expand(2, -1, -1),) if self.stage == "prior" else (priors, text.expand(2, -1, -1))
        return x - sigma * self.network(x * signal.sqrt(), torch.full((2,), T), *conds)

    def found(self, case: str, box: Box | None = None) -> Tensor:
        found = self.tensors[f"denoised/{case}/{self.stage}"]
        height, width, top, left = box or (*found.shape[-2:], 0, 0)
        return found[..., top : top + height, left : left + width]

    def side(self, case: str, left: bool) -> Tensor:
        """Returns the mask of the left or right half at the size of the latents."""
        mask = torch.full((1, 1, 192, 256), float(left))
        mask[..., 128:] = float(not left)
        return latent_mask(mask, *self.found(case).shape[-2:])


@pytest.fixture(scope="module")
def stages(inside: Inside, checkpoints: Path) -> dict[str, OneCall]:
    return {stage: OneCall(stage, checkpoints, inside[0]) for stage in STAGES}


WHOLE: dict[str, Callable[[OneCall, str], Tensor]] = {
    "plain": lambda one, case: one(case, one.a),
    "guided": lambda one, case: 3 * one(case, one.a) - 2 * one(case, one.b),
    "long": lambda one, case: 3 * one(case, one.long) - 2 * one(case, one.b),
    "combined": lambda one, case: (one(case, one.a) + one(case, one.b)) / 2,
    "concatenated": lambda one, case: one(case, torch.cat([one.a, one.b], dim=1)),
    "averaged": lambda one, case: one(case, one.a * 0.25 + one.b * 0.75),
    "strengths": lambda one, case: (3 * one(case, one.a) + one(case, one.b)) / 4,
    "until later": lambda one, case: one(case, one.a),
    "since earlier": lambda one, case: one(case, one.b),
    "halves": lambda one, case: (
        (one.side(case, True) * one(case, one.a) + one.side(case, False) * one(case, one.b))
        / (one.side(case, True) + one.side(case, False))
    ),
    "thin mask": lambda one, case: torch.where(
        torch.arange(one.found(case).shape[-1]) == THIN * one.found(case).shape[-1] // 256,
        (one(case, one.a) + one(case, one.b)) / 2,
        one(case, one.b),
    ),
    "mask over all": lambda one, case: (
        (one.side(case, True) * one(case, one.a) + 2 * one(case, one.b)) / (one.side(case, True) + 2)
    ),
}


@pytest.mark.parametrize("case", WHOLE)
@pytest.mark.parametrize("stage", STAGES)
def test_conditionings_of_the_whole_picture(stages: dict[str, OneCall], stage: str, case: str) -> None:
    one = stages[stage]
    expected = WHOLE[case](one, case)
    torch.testing.assert_close(one.found(case), expected, rtol=1e-4, atol=2e-5)
    assert case in ("plain", "until later") or (one(case, one.a) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("case", BOXES)
@pytest.mark.parametrize("stage", STAGES)
def test_an_area_is_sampled_like_an_image_of_its_own(stages: dict[str, OneCall], stage: str, case: str) -> None:
    one, box = stages[stage], BOXES[case][stage]
    found, inner = one.found(case), one.found(case, box)
    torch.testing.assert_close(inner, one(case, one.a, box), rtol=1e-4, atol=1e-4)
    assert not found.abs().sum() - inner.abs().sum() > 1e-3 * inner.abs().sum()  # nothing outside


def test_an_area_on_stage_cs_grid_gets_these_latents_unchanged(inside: Inside) -> None:
    cells = torch.arange(72.0).reshape(1, 1, 6, 12)[..., 6:]
    assert inside[1]["half of Stage C"] == cells.repeat(2, 1, 1, 1).tolist()


def test_neighbouring_areas_leave_no_row_of_stage_c_out(inside: Inside) -> None:
    assert [(area[2], area[2] + area[0]) for area in inside[1]["parts in rows"]] == [(0, 15), (14, 29)]


@pytest.mark.parametrize("stage", STAGES)
def test_guidance_in_an_area_uses_its_negative(stages: dict[str, OneCall], stage: str) -> None:
    one, box = stages[stage], BOXES["area"][stage]
    height, width, top, left = box
    soft = min(8, width // 4)  # ComfyUI fades areas out at inner borders
    inner = (height, width - soft, top, left)
    case = "guided area"
    whole = one(case, one.b)[..., :width]  # ComfyUI averages both negatives
    expected = 3 * one(case, one.a, box) - 2 * (whole + one(case, one.b, box)) / 2
    torch.testing.assert_close(one.found(case, inner), expected[..., : width - soft], rtol=1e-4, atol=1e-4)


def test_a_negative_without_stage_c_gets_zeros(stages: dict[str, OneCall]) -> None:
    one, zeros = stages["decoder"], torch.zeros(PRIORS)
    expected = 3 * one("guided without", one.a) - 2 * one("guided without", one.b, priors=zeros)
    torch.testing.assert_close(one.found("guided without"), expected, rtol=1e-4, atol=1e-4)
    assert one.found("guided area without").isfinite().all()


def test_a_mask_can_be_set_before_or_after_stage_cs_latents(inside: Inside) -> None:
    tensors, _ = inside
    last, first = (tensors[f"denoised/{case}/decoder"] for case in ("halves, latents last", "halves"))
    torch.testing.assert_close(last, first, rtol=0, atol=1e-6)


def test_two_stage_c_latents_are_repeated_in_turn(inside: Inside) -> None:
    tensors, _ = inside
    repeated, pair = tensors["repeated"], tensors["denoised/plain/decoder"]
    torch.testing.assert_close(repeated, torch.cat([pair, pair]), rtol=1e-4, atol=1e-4)
    assert (pair[0] - pair[1]).abs().max() > 0.1


MISTAKES = {  # what the error must name
    "not finite/decoder": ("Stage C", "not finite"),
    "text not finite/prior": ("text encoder of Stage C", "not finite"),
    "text not finite/decoder": ("text encoder of Stage B", "not finite"),
    "texts/prior": ("Stage C", "2 empty latents", "3 texts"),
    "texts/decoder": ("Stage B", "2 empty latents", "3 texts"),
    "no text/prior": ("Stage C", "Würstchen Text Encode"),
    "no text/decoder": ("Stage B", "Würstchen Text Encode"),
    "stage c/decoder": ("2 empty latents", "3 Stage C latents", "batch size"),
    "half a positive/decoder": ("Stage C latents", "Würstchen Decoder Conditioning"),
    "for stage b/prior": ("Stage C", "prior output"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_wrong_conditioning_is_explained_in_one_line(inside: Inside, mistake: str) -> None:
    check_error(inside[1].get(f"mistake: {mistake}", ""), *MISTAKES[mistake])


# ComfyUI's own nodes

WORKS = {
    "ConditioningAverage", "ConditioningCombine", "ConditioningConcat", "ConditioningMultiply", "ConditioningSetArea",
    "ConditioningSetAreaPercentage", "ConditioningSetAreaPercentageVideo", "ConditioningSetAreaStrength",
    "ConditioningSetDefaultCombine", "ConditioningSetMask", "ConditioningSetProperties",
    "ConditioningSetPropertiesAndCombine", "ConditioningSetTimestepRange", "ConditioningZeroOut",
    "PairConditioningCombine", "PairConditioningSetDefaultCombine", "PairConditioningSetProperties",
    "PairConditioningSetPropertiesAndCombine",
}  # fmt: skip
REFUSED_NODES = {
    "ControlNetApply", "ControlNetApplyAdvanced", "ControlNetApplySD3", "ControlNetInpaintingAliMamaApply",
    "GLIGENTextBoxApply", "StableCascade_StageB_Conditioning",
}  # fmt: skip


@pytest.mark.parametrize("stage", STAGES)
def test_no_conditioning_node_is_ignored_silently(inside: Inside, stage: str) -> None:
    """Each changes the result, or one sentence says that it cannot; others fail themselves on what is not theirs."""
    outcomes = inside[1][f"nodes/{stage}"]
    by_kind: dict[str, set[str]] = {}
    for name, (kind, sentence) in outcomes.items():
        by_kind.setdefault(kind, set()).add(name)
        if kind in (NOTICE, REFUSED):
            check_error(sentence, {"prior": "Stage C", "decoder": "Stage B"}[stage])
    assert by_kind[DIFFERENT] == WORKS & outcomes.keys()
    assert by_kind[REFUSED] == REFUSED_NODES
    assert by_kind.keys() == {DIFFERENT, NOTICE, REFUSED, OWN_ERROR}
    assert {"FluxGuidance", "InpaintModelConditioning", "ReferenceLatent", "unCLIPConditioning"} <= by_kind[NOTICE]
