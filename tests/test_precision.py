"""What the dtypes cost on the golden data, and how it is measured."""

from __future__ import annotations

from dataclasses import replace
from math import isnan

import pytest
import torch
from torch import nn

from wuerstchen_core.checkpoints.precision import FP8
from wuerstchen_core.demo.recipe import precision
from wuerstchen_core.demo.recipe.precision import KINDS, MARKS, largest_inside, relative_error
from wuerstchen_core.demo.recipe.precision_cases import Case, golden_cases, golden_image_encoders

# In percent of the result, twice what was measured (the README's table).
MOST = {"bf16": 2.6, "fp16": 0.4, "fp8, computed in bf16": 7.5, "fp8, computed in fp32": 7.5}


@pytest.fixture(scope="module")
def cases() -> dict[str, Case]:
    return {case.name: case for case in golden_cases()}


def check(case: Case, most: dict[str, float]) -> None:
    errors = {kind: relative_error(case, *dtypes) for kind, dtypes in KINDS.items()}
    assert all(0 < error < most[kind] for kind, error in errors.items()), errors
    assert errors["fp16"] < errors["bf16"] < errors["fp8, computed in bf16"]


@pytest.mark.parametrize("name", ["prior", "decoder", "token_decoder", "vqgan"])
def test_errors_on_the_golden_data(cases: dict[str, Case], name: str) -> None:
    check(cases[name], MOST)


@pytest.mark.long
def test_errors_of_the_golden_image_encoders() -> None:
    for case in golden_image_encoders():
        check(case, MOST | {"fp8, computed in bf16": 16, "fp8, computed in fp32": 16})


def test_fp32_is_exact_and_an_overflow_is_no_number(cases: dict[str, Case]) -> None:
    case = cases["decoder"]
    assert relative_error(case, torch.float32, torch.float32) == 0
    state = dict(case.part.state_dict)
    state["embedding.1.weight"] = 6e4 * torch.ones_like(state["embedding.1.weight"])
    large = replace(case, part=replace(case.part, state_dict=state), inputs=(1e3 * case.inputs[0], *case.inputs[1:]))
    assert isnan(relative_error(large, torch.float16, torch.float16))
    assert relative_error(large, torch.bfloat16, torch.bfloat16) < 100


def test_the_largest_number_inside_is_found() -> None:
    network = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Tanh())
    nn.init.constant_(network[0].weight, -300.0)
    assert largest_inside(network, lambda: network(torch.ones(1, 1))) == (300.0, "0")
    assert FP8 not in (dtype for _, dtype in KINDS.values())  # for storage alone


def test_the_readme_has_a_place_for_the_tables() -> None:
    text = precision.README.read_text("utf-8")
    assert [text.count(mark) for mark in MARKS] == [1, 1]
