"""Tests the error of each dtype on the golden data, and how it is measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import isinf, isnan

import pytest
import torch

from tools.demo import precision
from tools.demo.network_calls import NetworkCall, golden_calls, golden_image_encoders
from tools.demo.precision import KINDS, MARKS, LargestFp16, relative_error
from wuerstchen_core.checkpoints.quant import FP8
from wuerstchen_core.kernels.mlp import MIN_POSITIONS
from wuerstchen_core.models.layers import ChannelwiseMLP

# Limits in percent of the result, twice the measured errors.
MOST = {"bf16": 2.6, "fp16": 0.4, "fp8 weights, bf16 math": 7.5, "fp8 weights, fp32 math": 7.5, "int8": 5.4}


@pytest.fixture(scope="module")
def cases() -> dict[str, NetworkCall]:
    return {case.name: case for case in golden_calls()}


def check(case: NetworkCall, most: dict[str, float]) -> None:
    errors = {kind: relative_error(case, *dtypes) for kind, dtypes in KINDS.items()}
    assert all(0 < error < most[kind] for kind, error in errors.items()), errors
    assert errors["fp16"] < errors["bf16"] < errors["fp8 weights, bf16 math"]


@pytest.mark.parametrize("name", ["prior", "decoder", "token_decoder", "vqgan"])
def test_errors_on_the_golden_data(cases: dict[str, NetworkCall], name: str) -> None:
    check(cases[name], MOST)


@pytest.mark.long
def test_errors_of_the_golden_image_encoders() -> None:
    """They have no matrices, so with fp8 they are in bf16."""
    for case in golden_image_encoders():
        errors = {kind: relative_error(case, *dtypes) for kind, dtypes in KINDS.items()}
        assert 0 < errors["fp16"] < errors["bf16"] == errors["fp8 weights, bf16 math"] < MOST["bf16"]


def test_fp32_is_exact_and_an_overflow_gives_nan(cases: dict[str, NetworkCall]) -> None:
    case = cases["decoder"]
    assert relative_error(case, torch.float32, torch.float32) == 0
    state = dict(case.part.state_dict)
    state["embedding.1.weight"] = 6e4 * torch.ones_like(state["embedding.1.weight"])
    large = replace(case, part=replace(case.part, state_dict=state), inputs=(1e3 * case.inputs[0], *case.inputs[1:]))
    assert isnan(relative_error(large, torch.float16, torch.float16))
    assert relative_error(large, torch.bfloat16, torch.bfloat16) < 100


def largest(call: Callable[[], object]) -> float:
    with torch.inference_mode(), LargestFp16() as inside:
        call()
    return float(inside.value)


@torch.no_grad()
def test_the_largest_number_in_fp16_is_found_before_a_gelu() -> None:
    mlp = ChannelwiseMLP(2, 2, 0.0).eval()
    mlp[0].bias.fill_(-3000.0)  # GELU makes it 0
    x = torch.zeros(1, 32, MIN_POSITIONS // 32, 2)
    assert largest(lambda: mlp(x + 6e4).half()) == 0  # fp32 does not count
    mlp.half()
    assert largest(lambda: mlp(x.half())) == 3000
    assert isinf(largest(lambda: mlp(x.half()) + 1 / x.half()))


def test_nan_is_reported_among_larger_numbers() -> None:
    def call() -> None:
        torch.full((2,), float("nan"), dtype=torch.float16)
        torch.full((2,), 3, dtype=torch.float16)

    assert isnan(largest(call))
    assert largest(lambda: torch.empty(10**6, dtype=torch.float16)[1:].fill_(7)) == 7
    assert FP8 not in (dtype for _, dtype in KINDS.values())  # it is for storage only


def test_the_page_has_marks_for_the_tables() -> None:
    text = precision.PAGE.read_text("utf-8")
    assert [text.count(mark) for mark in MARKS] == [1, 1]
