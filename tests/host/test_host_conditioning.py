"""Text and conditionings in arbitrary graphs: ComfyUI's own nodes change them as the core's arithmetic says."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from bundles import TINY
from inside_conditioning import LONG, PRIORS, STAGES, A, T
from safetensors.torch import save_file
from torch import Tensor, nn

from tools.comfyui.client import Inside, Install, run_inside
from wuerstchen_core.checkpoints import load_decoder, load_prior, load_text_encoder
from wuerstchen_core.diffusion.schedule import alpha_bar
from wuerstchen_core.models.decoder import resize_prior_latents
from wuerstchen_core.models.text_encoder import END, START, TextEncoder, tokenize_chunks

Box = tuple[int, int, int, int]  # height, width, top, left

# Embeddings by file and key: for both towers, for one of them, in the form of A1111, and of a model of another width.
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
    """What inside_conditioning.py computed in this ComfyUI."""
    for name, keys in EMBEDDINGS.items():
        tensors = {key: vectors(width) for key, width in keys.items()}
        save_file(tensors, models / "embeddings" / f"{name}.safetensors")
    given = checkpoints / TINY, models / "embeddings"
    return run_inside(install, "inside_conditioning.py", tmp_path_factory.mktemp("inside"), *given)


# text


@pytest.fixture(scope="module")
def towers(checkpoints: Path) -> dict[str, TextEncoder]:
    return {stage: load_text_encoder(checkpoints / TINY, which=stage) for stage in STAGES}


@torch.inference_mode()
def states(tower: TextEncoder, *parts: str | Tensor | tuple[str, float]) -> Tensor:
    """[1, 77 n, c] of texts, texts with a weight, and vectors in a row; weights lead away from the empty text."""
    tower, tokens, weights = deepcopy(tower), [], []
    for part in parts:
        text, weight = part if isinstance(part, tuple) else (part, 1.0)
        if isinstance(text, str):
            ids, mask = tokenize_chunks(text)
            added = [i for i in ids[mask].tolist() if i not in (START, END)]
        else:  # new words of the vocabulary
            added = list(range(tower.token_embedding.num_embeddings, tower.token_embedding.num_embeddings + len(text)))
            tower.token_embedding = nn.Embedding.from_pretrained(torch.cat([tower.token_embedding.weight, text]))
        tokens += added
        weights += [weight] * len(added)
    out, empty = [], tower(*tokenize_chunks(""))
    for i in range(0, max(len(tokens), 1), 75):
        row = [START, *tokens[i : i + 75], END]
        weight = torch.tensor([1.0, *weights[i : i + 75]] + [1.0] * (77 - len(row) + 1))
        mask = torch.arange(77) < len(row)
        found = tower(torch.tensor([row + [END] * (77 - len(row))]), mask[None])
        out.append(empty + weight[:, None] * (found - empty))
    return torch.cat(out, dim=1)


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5)


@pytest.mark.parametrize("stage", STAGES)
def test_weights_lead_away_from_the_empty_text(inside: Inside, towers: dict[str, TextEncoder], stage: str) -> None:
    found, tower = inside[0], towers[stage]
    weighted = states(tower, "a ", ("red", 1.3), " apple, ", ("small", 1.21))
    close(found[f"weighted/{stage}"], weighted)
    assert torch.equal(found[f"both/{stage}"], found[f"weighted/{stage}"])  # our node and CLIPTextEncode
    close(found[f"weight of 1/{stage}"], states(tower, "a red apple"))
    assert (weighted - states(tower, "a red apple, small")).abs().max() > 0.1


@pytest.mark.parametrize("stage", STAGES)
def test_long_text_is_read_in_pieces_as_the_core_reads_it(
    inside: Inside, towers: dict[str, TextEncoder], stage: str
) -> None:
    found, tower = inside[0], towers[stage]
    assert found[f"75 tokens/{stage}"].shape[1] == 77 and found[f"76 tokens/{stage}"].shape[1] == 154
    close(found[f"long/{stage}"], tower.encode([LONG]))
    close(found[f"76 tokens/{stage}"], tower.encode(["a " * 76]))
    close(found[f"weighted long/{stage}"], states(tower, f"{LONG} ", ("red", 0.6), " apple"))


@pytest.mark.parametrize("stage", STAGES)
def test_the_last_layer_may_be_left_out(inside: Inside, towers: dict[str, TextEncoder], stage: str) -> None:
    found, tower = inside[0], deepcopy(towers[stage])
    close(found[f"plain/{stage}"], tower.encode([A]))
    close(found[f"layer -1/{stage}"], tower.encode([A]))
    del tower.transformer.resblocks[-1]  # what is left is normed as the whole is
    close(found[f"layer -2/{stage}"], tower.encode([A]))


@pytest.mark.parametrize("stage", STAGES)
def test_embeddings_are_words_of_the_tower_that_they_fit(
    inside: Inside, towers: dict[str, TextEncoder], stage: str
) -> None:
    found, said = inside
    tower = towers[stage]
    inserted, without = (states(tower, "a ", *x, " apple") for x in ([vectors(tower.params.width)], []))
    fitting = {"prior": ("own", "sdxl", "a1111"), "decoder": ("own",)}[stage]
    for name in EMBEDDINGS:
        close(found[f"{name}/{stage}"], inserted if name in fitting else without)
        assert ("mismatch" in said[f"{name}/{stage}"]) == (name not in fitting)
    close(found[f"missing/{stage}"], without)
    assert "embedding:missing" in said[f"missing/{stage}"] and "does not exist" in said[f"missing/{stage}"]


# conditionings

# What is cut out of Stage C's 6 x 9 and Stage B's 48 x 64 latents, which are multiples of 8.
BOXES: dict[str, dict[str, Box]] = {
    "area": {"prior": (6, 4, 0, 0), "decoder": (48, 32, 0, 0)},
    "odd area": {"prior": (2, 3, 2, 2), "decoder": (24, 24, 8, 16)},
    "pixels": {"prior": (3, 3, 2, 3), "decoder": (32, 32, 16, 32)},
    "beyond the edge": {"prior": (1, 1, 5, 8), "decoder": (8, 8, 40, 56)},
    "bounds": {"prior": (6, 5, 0, 4), "decoder": (48, 32, 0, 32)},
}
# Stage B's boxes that are the left and the right half of Stage C's latents, and which of their columns these have.
HALVES = {(48, 32, 0, 0): slice(PRIORS[-1] // 2), (48, 32, 0, 32): slice(PRIORS[-1] // 2, None)}


class OneCall:
    """What the core makes of a conditioning where ComfyUI called a stage once."""

    def __init__(self, stage: str, checkpoints: Path, tensors: dict[str, Tensor]):
        self.stage, self.tensors = stage, tensors
        self.network = (load_prior if stage == "prior" else load_decoder)(checkpoints / TINY)
        self.a, self.b, self.long = (tensors[f"states/{name}/{stage}"] for name in ("a", "b", "long"))
        self.priors = torch.randn(PRIORS, generator=torch.Generator().manual_seed(5))

    @torch.inference_mode()
    def __call__(self, case: str, text: Tensor, box: Box | None = None, priors: Tensor | None = None) -> Tensor:
        """What a case denoised with one text, in an area of it."""
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
        given = (text.expand(2, -1, -1),) if self.stage == "prior" else (priors, text.expand(2, -1, -1))
        return x - sigma * self.network(x * signal.sqrt(), torch.full((2,), T), *given)

    def found(self, case: str, box: Box | None = None) -> Tensor:
        found = self.tensors[f"denoised/{case}/{self.stage}"]
        height, width, top, left = box or (*found.shape[-2:], 0, 0)
        return found[..., top : top + height, left : left + width]

    def side(self, case: str, left: bool) -> Tensor:
        """The mask of the left or the right half at the size of the latents."""
        mask = torch.full((1, 1, 192, 256), float(left))
        mask[..., 128:] = float(not left)
        return F.interpolate(mask, size=self.found(case).shape[-2:], mode="bilinear")


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
    "halves": lambda one, case: one.side(case, True) * one(case, one.a) + one.side(case, False) * one(case, one.b),
    "mask over all": lambda one, case: (
        (one.side(case, True) * one(case, one.a) + 2 * one(case, one.b)) / (one.side(case, True) + 2)
    ),
}


@pytest.mark.parametrize("case", WHOLE)
@pytest.mark.parametrize("stage", STAGES)
def test_conditionings_of_the_whole_picture(stages: dict[str, OneCall], stage: str, case: str) -> None:
    one = stages[stage]
    wanted = WHOLE[case](one, case)
    torch.testing.assert_close(one.found(case), wanted, rtol=1e-4, atol=2e-5)
    assert case in ("plain", "until later") or (one(case, one.a) - wanted).abs().max() > 1e-3


@pytest.mark.parametrize("case", BOXES)
@pytest.mark.parametrize("stage", STAGES)
def test_an_area_is_painted_for_itself_in_the_latents_of_its_stage(
    stages: dict[str, OneCall], stage: str, case: str
) -> None:
    one, box = stages[stage], BOXES[case][stage]
    found, inner = one.found(case), one.found(case, box)
    torch.testing.assert_close(inner, one(case, one.a, box), rtol=1e-4, atol=1e-4)
    assert not found.abs().sum() - inner.abs().sum() > 1e-3 * inner.abs().sum()  # nothing is painted outside


def test_an_area_of_whole_stage_c_latents_is_given_these_as_they_are(inside: Inside) -> None:
    cells = torch.arange(72.0).reshape(1, 1, 6, 12)[..., 6:]
    assert inside[1]["half of Stage C"] == cells.repeat(2, 1, 1, 1).tolist()


def test_areas_side_by_side_leave_no_row_of_stage_c_unpainted(inside: Inside) -> None:
    assert [(area[2], area[2] + area[0]) for area in inside[1]["parts in rows"]] == [(0, 15), (14, 29)]


@pytest.mark.parametrize("stage", STAGES)
def test_a_guided_area_leads_away_from_the_negative_there(stages: dict[str, OneCall], stage: str) -> None:
    one, box = stages[stage], BOXES["area"][stage]
    height, width, top, left = box
    soft = min(8, width // 4)  # the border towards the rest of the picture, where ComfyUI fades areas out
    inner = (height, width - soft, top, left)
    case = "guided area"
    whole = one(case, one.b)[..., :width]  # ComfyUI takes the negative of the whole picture, and that of the area
    wanted = 3 * one(case, one.a, box) - 2 * (whole + one(case, one.b, box)) / 2
    torch.testing.assert_close(one.found(case, inner), wanted[..., : width - soft], rtol=1e-4, atol=1e-4)


def test_a_negative_without_stage_c_is_led_by_none(stages: dict[str, OneCall]) -> None:
    one, nothing = stages["decoder"], torch.zeros(PRIORS)
    wanted = 3 * one("guided without", one.a) - 2 * one("guided without", one.b, priors=nothing)
    torch.testing.assert_close(one.found("guided without"), wanted, rtol=1e-4, atol=1e-4)
    assert one.found("guided area without").isfinite().all()


def test_a_mask_may_come_before_stage_cs_latents_or_after_them(inside: Inside) -> None:
    tensors, _ = inside
    last, first = (tensors[f"denoised/{case}/decoder"] for case in ("halves, latents last", "halves"))
    torch.testing.assert_close(last, first, rtol=0, atol=1e-6)


def test_two_pictures_of_stage_c_are_repeated_in_turn(inside: Inside) -> None:
    tensors, _ = inside
    repeated, pair = tensors["repeated"], tensors["denoised/plain/decoder"]
    torch.testing.assert_close(repeated, torch.cat([pair, pair]), rtol=1e-4, atol=1e-4)
    assert (pair[0] - pair[1]).abs().max() > 0.1


def test_conditionings_that_cannot_be_used_are_answered_by_one_sentence(inside: Inside) -> None:
    said = {name: text for name, text in inside[1].items() if name.startswith("mistake")}
    wanted = {
        "texts/prior": "Stage C was given 2 empty latents for 3 texts",
        "texts/decoder": "Stage B was given 2 empty latents for 3 texts",
        "no text/prior": "Stage C was given a conditioning without text",
        "no text/decoder": "Stage B was given a conditioning without text",
        "pictures/decoder": "2 empty latents for 3 pictures of Stage C: use the same batch size",
        "half a positive/decoder": "no Stage C latents to paint: connect Würstchen Decoder Conditioning",
        "for stage b/prior": "Stage C was given the conditioning of a decoder: connect the prior output",
    }
    assert {f"mistake: {name}" for name in wanted} == set(said)
    for name, words in wanted.items():
        answer = said[f"mistake: {name}"]
        assert words in answer and "\n" not in answer and len(answer) < 300
