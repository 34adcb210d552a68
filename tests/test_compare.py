"""accuracy.compare must let rounding pass and nothing else."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from flatquant import accuracy, reference
from flatquant.packing import pack_int4

FLOAT16 = accuracy.TOLERANCES[torch.float16]
DISTANCE = 14 * FLOAT16.transform  # of Y / scale from a boundary, at clip ratio 1


def transformed() -> Tensor:
    """2 x 1000 values with scale 1, none near a rounding boundary but [0, 1] and [0, 2]."""
    values = torch.randint(-6, 7, (2, 1000)).double() + 0.2
    values[:, 0] = 7
    values[0, 1] = 2.5 - DISTANCE / 2
    values[0, 2] = 2.5 - DISTANCE * 2
    return values


def correct() -> tuple[Tensor, Tensor, Tensor]:
    values = transformed()
    return (*reference.quantize(values), values)


def test_the_float64_result_has_no_failure_in_either_storage() -> None:
    codes, scales, values = correct()
    for quantized in (codes, pack_int4(codes)):
        result = accuracy.compare(quantized, scales, values, 1.0, torch.float16)
        assert result.ok
        assert (result.mismatches, result.max_step, result.scale_error) == (0, 0, 0.0)


def test_one_step_next_to_the_boundary_passes_and_is_counted() -> None:
    codes, scales, values = correct()
    codes[0, 1] = 3
    result = accuracy.compare(codes, scales, values, 1.0, torch.float16)
    assert result.ok
    assert (result.mismatches, result.mismatch, result.max_step) == (1, 1 / 2000, 1)
    assert result.max_distance == pytest.approx(DISTANCE / 2)


@pytest.mark.parametrize(
    "index, code, shown",
    [
        pytest.param((0, 2), 3, "token 0, feature 2: Y/scale 2.47", id="one step, far away"),
        pytest.param((0, 1), 4, "token 0, feature 1: Y/scale 2.49", id="two steps, near by"),
        pytest.param((0, 1), 1, "code 1, float64 2", id="one step to the wrong side"),
        pytest.param((1, 0), 8, "token 1, feature 0: Y/scale 7.0", id="no int4 code"),
    ],
)
def test_a_wrong_code_fails_and_is_shown(index: tuple[int, int], code: int, shown: str) -> None:
    codes, scales, values = correct()
    codes[index] = code
    result = accuracy.compare(codes, scales, values, 1.0, torch.float16)
    assert not result.ok
    assert shown in str(result)


def test_too_many_codes_next_to_the_boundary_fail() -> None:
    values = transformed()
    values[1, 1:] = 2.5 - DISTANCE / 4
    codes, scales = reference.quantize(values)
    codes[1, 1:3] = 3  # 2 of 2000 may differ
    assert accuracy.compare(codes, scales, values, 1.0, torch.float16).ok
    codes[1, 3] = 3
    result = accuracy.compare(codes, scales, values, 1.0, torch.float16)
    assert "3 codes differ, 2 may" in str(result)


def test_the_distance_that_passes_grows_as_the_clip_ratio_shrinks() -> None:
    values = transformed()
    values[:, 0] = 14
    codes, scales = reference.quantize(values, 0.5)
    codes[0, 1] = 3
    assert accuracy.compare(codes, scales, values, 0.5, torch.float16).ok
    values[0, 1] = 2.5 - DISTANCE * 1.5
    assert accuracy.compare(codes, scales, values, 0.5, torch.float16).ok
    values[0, 1] = 2.5 - DISTANCE * 2.5
    assert not accuracy.compare(codes, scales, values, 0.5, torch.float16).ok


def test_two_steps_fail_even_where_the_distance_that_passes_is_wide() -> None:
    values = transformed()
    values[:, 0] = 700
    codes, scales = reference.quantize(values, 0.01)
    codes[0, 1] = 3
    assert accuracy.compare(codes, scales, values, 0.01, torch.float16).ok
    codes[0, 1] = 4
    assert not accuracy.compare(codes, scales, values, 0.01, torch.float16).ok


def test_a_pair_is_judged_by_the_side_its_scale_comes_from() -> None:
    """The scale comes from 7 above, max|Y| is 28 below: its error may be four times as large."""
    values = transformed()
    values[:, 0], values[:, 2] = 7, -28
    pair = (1.0, 0.25 / 2)
    codes, scales = reference.quantize(values, pair)
    assert scales.tolist() == [1.0, 1.0] and codes[0, 2] == -8
    assert not accuracy.compare(codes, scales, values, 1.0, torch.float16).ok
    for share, passes in ((3.0, True), (5.0, False)):
        off = scales * (1 + share * FLOAT16.transform)
        assert accuracy.compare(codes, off, values, pair, torch.float16).ok == passes
    codes[0, 1] = 3
    limit = 28 * FLOAT16.transform * (1 + 4)
    for distance, passes in ((0.9 * limit, True), (1.1 * limit, False)):
        values[0, 1] = 2.5 - distance
        assert accuracy.compare(codes, scales, values, pair, torch.float16).ok == passes


@pytest.mark.parametrize("share, passes", [(0.5, True), (-0.5, True), (2.0, False), (-2.0, False)])
def test_scales_may_be_off_by_their_tolerance(share: float, passes: bool) -> None:
    codes, scales, values = correct()
    scales[1] *= 1 + share * FLOAT16.transform
    result = accuracy.compare(codes, scales, values, 1.0, torch.float16)
    assert result.ok == passes
    assert result.scale_error == pytest.approx(abs(share) * FLOAT16.transform, rel=1e-3)
    assert passes or "token 1: scale" in str(result)


@pytest.mark.parametrize(
    "value, scale, code, passes",
    [
        pytest.param(math.nan, math.nan, 0, True, id="NaN"),
        pytest.param(math.nan, math.inf, 0, False, id="NaN, scale Inf"),
        pytest.param(math.nan, 1.0, 0, False, id="NaN, scale 1"),
        pytest.param(math.nan, math.nan, 1, False, id="NaN, code 1"),
        pytest.param(math.inf, math.inf, 0, True, id="Inf"),
        pytest.param(math.inf, math.nan, 0, False, id="Inf, scale NaN"),
        pytest.param(math.inf, math.inf, 7, False, id="Inf, code 7"),
        pytest.param(0.0, 1.0, 0, True, id="zero"),
        pytest.param(0.0, 0.0, 0, False, id="zero, scale 0"),
        pytest.param(0.0, 1.0, 1, False, id="zero, code 1"),
        pytest.param(7.0, math.nan, 7, False, id="finite, scale NaN"),
    ],
)
def test_special_tokens(value: float, scale: float, code: int, passes: bool) -> None:
    values = torch.full((1, 8), value, dtype=torch.float64)
    codes = torch.full((1, 8), code, dtype=torch.int8)
    result = accuracy.compare(codes, torch.tensor([scale]), values, 1.0, torch.float16)
    assert result.ok == passes, result


def test_no_tokens_compare_equal() -> None:
    empty = torch.zeros(0, 8)
    result = accuracy.compare(empty.to(torch.int8), empty[:, 0], empty.double(), 1.0, torch.float16)
    assert result.ok and result.mismatch == 0


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"quantized": torch.zeros(3, 8, dtype=torch.int8)}, r"int8 \(3, 8\)"),
        ({"quantized": torch.zeros(2, 8)}, r"float32 \(2, 8\)"),
        ({"scales": torch.zeros(2, 1)}, r"float32 \(2, 1\)"),
        ({"scales": torch.zeros(2, dtype=torch.float16)}, r"float16 \(2,\)"),
        ({"transformed": torch.zeros(2, 8)}, "transformed must be torch.float64"),
    ],
)
def test_a_result_of_another_shape_or_dtype_is_refused(
    changed: dict[str, Tensor], message: str
) -> None:
    arguments = {
        "quantized": torch.zeros(2, 8, dtype=torch.int8),
        "scales": torch.ones(2),
        "transformed": torch.zeros(2, 8, dtype=torch.float64),
    }
    with pytest.raises(ValueError, match=message):
        accuracy.compare(**{**arguments, **changed}, clip_ratio=1.0, dtype=torch.float16)
