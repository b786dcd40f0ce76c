"""The ControlNet: its shapes, its equality at initialisation, strengths, masks, and sums of several."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers.golden_data import assert_near
from helpers.networks import CONTROL, NETWORKS
from torch import Tensor

from wuerstchen_core.models.control_net import (
    ControlNet,
    ControlNetParams,
    fit_hint,
    repeat_control,
    sum_controls,
)
from wuerstchen_core.models.prior import KVCache, Prior

DEMO = ControlNetParams(192, 6, "v2", (0, 1, 2, 3, 4, 5), "outline", (32, 64, 128, 160), (1, 1, 1, 2))


@pytest.fixture(scope="module")
def prior() -> Prior:
    network = NETWORKS["prior"].perturbed().requires_grad_(False)
    assert isinstance(network, Prior)
    return network


@pytest.fixture(scope="module")
def control() -> list[Tensor | None]:
    network = NETWORKS["control_net"].perturbed()
    with torch.no_grad():
        return list(network(torch.rand(3, 3, 90, 70), (5, 7)))


def test_shapes_and_sizes() -> None:
    shapes = {}
    for name, params in {"demo": DEMO, "v2": ControlNetParams()}.items():
        with torch.device("meta"):
            network = ControlNet(params)
        shapes[name] = {key: tuple(x.shape) for key, x in network.state_dict().items()}
        assert {key for key in shapes[name] if key.startswith("projections.")} == {
            f"projections.{i}.{end}" for i in params.prior_blocks for end in ("weight", "bias")
        }
    assert shapes["demo"]["hint_stem.weight"] == (32, 3, 4, 4)
    assert shapes["demo"]["levels.0.0.depthwise.weight"] == (32, 1, 3, 3)
    assert shapes["demo"]["levels.3.1.weight"] == (160, 128, 2, 2)
    assert shapes["demo"]["levels.3.3.channelwise.4.weight"] == (160, 640)
    assert shapes["demo"]["projections.5.weight"] == (192, 160, 1, 1)
    sizes = {name: sum(torch.Size(x).numel() for x in one.values()) for name, one in shapes.items()}
    assert sizes == {"demo": 904_416, "v2": 16_660_224}
    assert sizes["demo"] * 2 < 4 * 2**20  # bytes in bf16


def test_equals_the_prior_at_initialisation(prior: Prior) -> None:
    network = ControlNet(CONTROL)
    network.init_weights()
    latents, t, text = NETWORKS["prior"].inputs()
    control = network(torch.rand(3, 3, 64, 64), (5, 7))
    assert [None if x is None else tuple(x.shape) for x in control] == [(3, 64, 5, 7)] * 2
    with torch.no_grad():
        assert torch.equal(prior(latents, t, text, control=control), prior(latents, t, text))


def test_is_added_before_the_chosen_blocks(prior: Prior, control: list[Tensor | None]) -> None:
    latents, t, text = NETWORKS["prior"].inputs()
    before: list[Tensor] = []
    hooks = [block.register_forward_pre_hook(lambda _, inputs: before.append(inputs[0])) for block in prior.blocks[::3]]
    prior(latents, t, text)
    prior(latents, t, text, control=[None, control[1]])
    for hook in hooks:
        hook.remove()
    assert torch.equal(before[2], before[0])
    assert control[1] is not None
    assert_near(before[3], before[1] + control[1], 1e-6)


def test_with_a_kv_cache_and_in_bf16(prior: Prior, control: list[Tensor | None]) -> None:
    latents, t, text = NETWORKS["prior"].inputs()
    expected = prior(latents, t, text, control=control)
    assert float((expected - prior(latents, t, text)).std()) > 0.05
    assert torch.equal(prior(latents, t, KVCache(prior)(text), control=control), expected)
    half = type(prior)(prior.params).eval().requires_grad_(False)
    half.load_state_dict(prior.state_dict())
    out = half.bfloat16()(latents.bfloat16(), t, text.bfloat16(), control=control)
    assert out.dtype == torch.bfloat16
    assert float((out.float() - expected).square().mean().sqrt() / expected.std()) < 0.03


def test_sums_strengths_masks_and_repeats(control: list[Tensor | None]) -> None:
    first, second = control
    assert first is not None and second is not None
    mask = torch.zeros(1, 1, 5, 7)
    mask[..., :3] = 1
    total = sum_controls([(control, 0.5), ([None, second], mask), ([first], 0.0)])
    assert total[0] is not None and total[1] is not None
    assert_near(total[0], first * 0.5, 1e-6)
    assert_near(total[1][..., :3], second[..., :3] * 1.5, 1e-6)
    assert_near(total[1][..., 3:], second[..., 3:] * 0.5, 1e-6)
    assert sum_controls([]) == []
    repeated = repeat_control([None, second, second[:1]], 6)
    assert repeated[0] is None and repeated[1] is not None and repeated[2] is not None
    assert torch.equal(repeated[1], torch.cat([second, second])) and len(repeated[2]) == 1


def test_hints_of_any_size_fit_the_latents() -> None:
    for size in ((64, 96), (100, 31), (7, 500)):
        view = fit_hint(torch.rand(1, 3, *size), (2, 3))
        assert tuple(view.shape) == (1, 3, 64, 96) and 0 <= float(view.min()) <= float(view.max()) <= 1
    hint = torch.rand(1, 3, 64, 96)
    assert torch.equal(fit_hint(hint, (2, 3)), hint)


@pytest.mark.parametrize(
    "wrong",
    [{"prior_blocks": (1, 0)}, {"prior_blocks": (0, 2)}, {"prior_blocks": ()}, {"widths": (8, 8)}, {"repeats": (1,)}],
    ids=str,
)
def test_params_that_make_no_sense(wrong: dict[str, tuple[int, ...]]) -> None:
    with pytest.raises(ValueError, match="ControlNet"):
        replace(CONTROL, **wrong)
