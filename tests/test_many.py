"""Clip pairs, several outputs, missing factors and the transform alone.

First the reference through the public functions, then every kernel against float64 and itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from launches import (
    KINDS,
    by_dtype,
    by_the_boundary_rule,
    equal,
    judged_as,
    kernels,
    storages,
    tolerance_of,
)
from problems import DTYPES, NO_GPU, Problem, dtype_name, exact_problem, float64, random_problem
from shapes import ODD
from torch import Tensor

from flatquant import (
    accuracy,
    available_kernels,
    dequantize_int4,
    fake_quantize,
    flatquant_dynamic_quantize,
    flatquant_dynamic_quantize_many,
    kronecker_transform,
    reference,
)
from flatquant.packing import unpack_int4

needs_gpu = pytest.mark.skipif(bool(NO_GPU), reason=NO_GPU)

# Ordinary ones, ones that clamp most of one side, and one that clamps everything.
CLIPS = [(0.95, 0.95), (1.0, 0.3), (0.3, 1e-3)]


def run(function: Any, x: Tensor, *arguments: Any, **options: Any) -> Any:
    return function(x, *arguments, use_cuda=x.device.type == "cuda", **options)


def some_factors(problem: Problem) -> Iterator[tuple[str, tuple[Tensor, Any, Any], Problem]]:
    """The problem without its left, its right and both factors, each with its explicit identity."""
    x, left, right = problem
    one_left, one_right = (
        torch.eye(len(factor), dtype=x.dtype, device=x.device) for factor in (left, right)
    )
    yield "right only", (x, None, right), Problem(x, one_left, right)
    yield "left only", (x, left, None), Problem(x, left, one_right)
    yield "plain", (x, None, None), Problem(x, one_left, one_right)


# ------------------------------------------------------------------------------- the reference, CPU


@pytest.mark.parametrize(
    "values, clip, codes, scale",
    [
        pytest.param([14, -2, 0.5], (0.5, 1.0), [7, -2, 0], 1.0, id="max side clipped"),
        pytest.param([14, -2, 2.5], (1.0, 0.5), [7, -1, 1], 2.0, id="max side whole"),
        pytest.param([2, -28, -16.5], (1.0, 0.25), [2, -8, -8], 1.0, id="min side clipped"),
        pytest.param([2, -28, -10], (0.25, 1.0), [0, -7, -2], 4.0, id="min side whole"),
        pytest.param([3, 14, 0], (0.5, 100.0), [3, 7, 0], 1.0, id="nothing below zero"),
        pytest.param([-3, -14, 0], (100.0, 0.5), [-3, -8, 0], 1.0, id="nothing above zero"),
        pytest.param([0.0, -0.0, 0], (0.5, 100.0), [0, 0, 0], 1.0, id="zeros"),
        pytest.param([math.nan, 1, 2], (0.5, 1.0), [0, 0, 0], math.nan, id="NaN"),
        pytest.param([-math.nan, math.inf, 2], (0.5, 1.0), [0, 0, 0], math.nan, id="NaN, Inf"),
        pytest.param([-math.inf, 1, 2], (0.5, 1e-30), [0, 0, 0], math.inf, id="-Inf"),
        pytest.param([7, 0.5, -1.5], (1.0, 1.0), [7, 0, -2], 1.0, id="ties to even"),
    ],
)
@pytest.mark.parametrize("form", ["numbers", "tensors", "mixed", "one-element tensors"])
def test_a_pair_scales_the_larger_side(
    values: list[float], clip: tuple[float, float], codes: list[int], scale: float, form: str
) -> None:
    pair: Any = {
        "numbers": clip,
        "tensors": tuple(map(torch.tensor, clip)),
        "mixed": (torch.tensor(clip[0]), clip[1]),
        "one-element tensors": tuple(torch.tensor([ratio]) for ratio in clip),
    }[form]
    x = torch.tensor(values, dtype=torch.float32)
    for token in (x, x[None]):
        got, scales = flatquant_dynamic_quantize(token, None, None, pair, use_cuda=False)
        assert (got.shape, scales.shape) == (token.shape, token.shape[:-1])
        assert got.flatten().tolist() == codes
        assert scales.item() == scale or (math.isnan(scale) and scales.isnan().all())


@pytest.mark.parametrize("sign", [1, -1])
def test_a_pair_follows_its_definition_in_float64_on_one_sided_data(sign: int) -> None:
    x = sign * random_problem(8, 16, 300, torch.float32).input.abs()
    problem = Problem(x, 0.5 * torch.eye(8), torch.eye(16).roll(1, 0))
    y = float64(problem)
    assert (sign * y >= 0).all()
    for clip in ((0.9, 0.4), (0.4, 0.9), (1e-3, 1.9)):
        codes, scales = flatquant_dynamic_quantize(*problem, clip, use_cuda=False)
        ratio = clip[0] if sign > 0 else clip[1]
        expected = ratio * y.abs().amax(1) / 7
        torch.testing.assert_close(scales.double(), expected, rtol=1e-5, atol=0)
        exact = (y / expected[:, None]).round().clamp(-8, 7)
        assert ((codes - exact).abs().sum() <= 1) and codes.unique().numel() > 1
        assert accuracy.compare(codes, scales, y, clip, torch.float32).ok
        # The sides swapped are a different result, which the comparison sees.
        assert not accuracy.compare(codes, scales, y, clip[::-1], torch.float32).ok


def test_one_ratio_is_the_pair_of_it_and_a_tensor_is_its_number() -> None:
    problem = random_problem(24, 32, 50, torch.float16)
    for ratio in (1.0, 0.7, 2.0, 1e-3):
        expected = flatquant_dynamic_quantize(*problem, ratio, use_cuda=False)
        tensor = torch.tensor(ratio)
        for clip in ((ratio, ratio), tensor, tensor[None], (tensor, ratio), (tensor, tensor)):
            assert equal(flatquant_dynamic_quantize(*problem, clip, use_cuda=False), expected)


def test_equal_clips_share_their_result_and_others_share_no_memory() -> None:
    problem = random_problem(8, 16, 5, torch.bfloat16)
    a, b = torch.tensor(0.5), torch.tensor(0.5)
    clips: list[Any] = [1.0, (1, 1.0), 0.5, (0.5, 1.0), (1.0, 0.5), a, (a, a), b, (a, b), 1]
    results = flatquant_dynamic_quantize_many(*problem, clips, True, use_cuda=False)
    places = [0, 0, 2, 3, 4, 5, 5, 7, 8, 0]
    for i, (place, clip) in enumerate(zip(places, clips, strict=True)):
        assert results[i][0] is results[place][0] and results[i][1] is results[place][1]
        assert equal(results[i], flatquant_dynamic_quantize(*problem, clip, True, use_cuda=False))
    tensors = [tensor for place in sorted(set(places)) for tensor in results[place]]
    assert len({tensor.data_ptr() for tensor in tensors}) == len(tensors)


def test_more_clips_than_one_kernel_serves_are_all_quantised() -> None:
    problem = random_problem(8, 16, 5, torch.float16)
    clips = [(1 - i / 40, 1.0) for i in range(20)]
    results = flatquant_dynamic_quantize_many(*problem, clips, use_cuda=False)
    for clip, result in zip(clips, results, strict=True):
        assert equal(result, flatquant_dynamic_quantize(*problem, clip, use_cuda=False)), clip


@by_dtype
@pytest.mark.parametrize("M, N", [(1, 1), (3, 5), (24, 32), (32, 24)])
def test_a_missing_factor_is_the_identity(M: int, N: int, dtype: torch.dtype) -> None:
    for name, missing, explicit in some_factors(random_problem(M, N, 9, dtype)):
        for clip in (0.9, (0.9, 0.5)):
            got = flatquant_dynamic_quantize(*missing, clip, use_cuda=False)
            assert equal(got, flatquant_dynamic_quantize(*explicit, clip, use_cuda=False)), name
        if name != "plain":
            y = kronecker_transform(*missing, torch.float32, use_cuda=False)
            assert torch.equal(y, kronecker_transform(*explicit, torch.float32, use_cuda=False))


def test_the_transform_is_rounded_once_to_the_dtype_asked_for() -> None:
    problem = random_problem(24, 32, 20, torch.bfloat16)
    exact = reference.transform(*problem)
    for dtype in DTYPES:
        y = kronecker_transform(*problem, dtype, use_cuda=False)
        assert y.dtype == dtype and torch.equal(y, exact.to(dtype))
    assert torch.equal(kronecker_transform(*problem, use_cuda=False), exact.bfloat16())
    batches = problem.input.view(2, 10, -1)
    y = kronecker_transform(batches, *problem[1:], torch.float16, use_cuda=False)
    assert torch.equal(y.flatten(0, 1), exact.half())
    assert kronecker_transform(batches[:0], *problem[1:], use_cuda=False).shape == (0, 10, 768)


@by_dtype
def test_fake_quantising_leaves_half_a_step_at_most(dtype: torch.dtype) -> None:
    problem = random_problem(8, 16, 40, dtype)
    y = reference.transform(*problem)
    for clip in (1.0, (1.0, 0.9)):
        codes, scales = flatquant_dynamic_quantize(*problem, clip, use_cuda=False)
        fake = fake_quantize(*problem, clip, use_cuda=False)
        assert fake.dtype == dtype
        assert torch.equal(fake, dequantize_int4(codes, scales, dtype=dtype))
        wide = fake_quantize(*problem, clip, out_dtype=torch.float32, use_cuda=False)
        assert wide.dtype == torch.float32
        if clip == 1.0:
            assert ((wide - y).abs() <= 0.501 * scales[:, None]).all()


@by_dtype
def test_the_inverse_brings_fake_quantised_tokens_back(dtype: torch.dtype) -> None:
    problem = random_problem(8, 12, 40, dtype)  # orthogonal factors
    x = problem.input.double()
    for _, (_, left, right), _ in [("both", problem, None), *some_factors(problem)]:
        arguments = (problem.input, left, right)
        back = fake_quantize(
            *arguments, invert=True, out_dtype=torch.float32, use_cuda=False
        ).double()
        y = fake_quantize(*arguments, out_dtype=torch.float32, use_cuda=False)
        # Transformed again it is what was dequantised; the error is no larger than there.
        torch.testing.assert_close(
            reference.transform(back, left, right), y, rtol=1e-4, atol=float(1e-4 * y.abs().max())
        )
        error = (back - x).norm(dim=1) / x.norm(dim=1)
        assert (error < 0.3).all() and (error > 0.01).all()


@by_dtype
def test_plain_quantising_is_what_it_is_by_hand(dtype: torch.dtype) -> None:
    x = torch.tensor([[7.0, -3.5, 2.5, 1.5, 0.5, -0.5, -6.75, 3.0], [0] * 8]).to(dtype)
    codes, scales = flatquant_dynamic_quantize(x, None, None, use_cuda=False)
    assert codes.tolist() == [[7, -4, 2, 2, 0, 0, -7, 3], [0] * 8]
    assert scales.tolist() == [1.0, 1.0]
    words, _ = flatquant_dynamic_quantize(x, None, None, pack_int32=True, use_cuda=False)
    assert torch.equal(unpack_int4(words), codes)


# -------------------------------------------------------------------------------------- the kernels


def loosened(dtype: torch.dtype, M: int, N: int, clip: tuple[float, float]) -> accuracy.Tolerance:
    """For a step that is smaller by the clip ratio."""
    bound = tolerance_of(dtype, M, N)
    return replace(bound, mismatch=bound.mismatch / max(clip))


def tokens_of(M: int, N: int) -> int:
    return max(67, 2**18 // (M * N) + 1)


@needs_gpu
@by_dtype
@pytest.mark.parametrize("M, N", [*KINDS, *ODD])
def test_every_output_of_many_agrees_with_float64(M: int, N: int, dtype: torch.dtype) -> None:
    problem = random_problem(M, N, tokens_of(M, N), dtype, "cuda")
    exact = float64(problem)
    for kernel in kernels(M, N, dtype):
        for pack_int32 in storages(M, N):
            options = {"pack_int32": pack_int32, "kernel": kernel}
            outputs = flatquant_dynamic_quantize_many(*problem, CLIPS, **options)
            for clip, output in zip(CLIPS, outputs, strict=True):
                tolerance = loosened(dtype, M, N, clip)
                # Where a token has next to nothing on the side of the larger ratio, a step may be
                # less than the error that Y may have, and the code anything.
                steps = reference.quantize(exact, clip)[1]
                judged = steps > 4 * tolerance.transform * exact.abs().amax(-1)
                codes, scales = output[0][judged], output[1][judged]
                result = accuracy.compare(
                    codes, scales, exact[judged], clip, dtype, tolerance=tolerance
                )
                assert result.ok, f"{kernel}, {pack_int32}, {clip}: {result}"
                assert judged.any() or (M * N >= 2048 and min(M, N) <= 4), "no token is judged"
                # Alone it is the same, and so it is with its ratios on the device.
                alone = flatquant_dynamic_quantize(*problem, clip, **options)
                assert equal(alone, output), (kernel, clip)
            basic = flatquant_dynamic_quantize(*problem, CLIPS[0][0], **options)
            assert equal(outputs[0], basic), kernel
            ratios = [tuple(torch.tensor(r, device="cuda") for r in clip) for clip in CLIPS]
            on_device = flatquant_dynamic_quantize_many(*problem, ratios, **options)
            for got, output in zip(on_device, outputs, strict=True):
                assert equal(got, output), f"{kernel}: ratios on the device"
            (alone,) = flatquant_dynamic_quantize_many(*problem, ratios[-1:], **options)
            assert equal(alone, outputs[-1]), f"{kernel}: ratios on the device, one output"


@needs_gpu
@by_dtype
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("M, N", KINDS)
def test_each_side_has_its_ratio(M: int, N: int, sign: int, dtype: torch.dtype) -> None:
    problem = random_problem(M, N, 67, dtype, "cuda")
    positive = Problem(sign * problem.input.abs(), problem.left.abs(), problem.right.abs())
    for kernel in kernels(M, N, dtype):
        for ratio in (0.9, 0.25, 2.0):
            expected = flatquant_dynamic_quantize(*positive, ratio, kernel=kernel)
            # The other side has nothing, whatever its ratio.
            clip = (ratio, 3.0) if sign > 0 else (3.0, ratio)
            got = flatquant_dynamic_quantize(*positive, clip, kernel=kernel)
            if ratio != 0.9 or kernel == "sm90":
                assert equal(got, expected), (kernel, ratio)
            else:
                # Codes are clamped by another path where both sides have to be, which there rounds
                # otherwise within 2^-19 steps of a tie.
                assert torch.equal(got[1], expected[1])
                steps = (got[0].int() - expected[0].int()).abs()
                assert steps.max() <= 1, kernel
                assert steps.count_nonzero() <= 1 + 1e-5 * steps.numel(), kernel
            swapped = flatquant_dynamic_quantize(*positive, clip[::-1], kernel=kernel)
            assert not torch.equal(swapped[1], expected[1])


@needs_gpu
@by_dtype
@pytest.mark.parametrize("clip", [1.0, (0.5, 0.5), (1.0, 1.0)])
@pytest.mark.parametrize("M, N", [*KINDS, (3, 5)])
def test_exact_data_gives_exact_codes(
    M: int, N: int, clip: float | tuple[float, float], dtype: torch.dtype
) -> None:
    ratio = clip[0] if isinstance(clip, tuple) else clip
    problem, _, codes, scales = exact_problem(M, N, 257, dtype, ratio, "cuda")
    for kernel in kernels(M, N, dtype):
        outputs = flatquant_dynamic_quantize_many(
            *problem, [(ratio, 7.0), clip, (7.0, ratio)], kernel=kernel
        )
        assert equal(outputs[1], (codes, scales)), kernel
        y = kronecker_transform(*problem, torch.float32, kernel=kernel)
        assert torch.equal(y, float64(problem).float()), kernel


@needs_gpu
@by_dtype
@pytest.mark.parametrize("M, N", [*KINDS, *ODD])
def test_a_missing_factor_is_the_identity_on_the_gpu(M: int, N: int, dtype: torch.dtype) -> None:
    problem = random_problem(M, N, tokens_of(M, N), dtype, "cuda")
    clip = (0.9, 0.8)
    tolerance = loosened(torch.float32, M, N, clip)
    for name, missing, explicit in some_factors(problem):
        exact = float64(explicit)
        sizes = (0, 0) if name == "plain" else (M, N)
        for kernel in kernels(*sizes, dtype):
            for pack_int32 in storages(M, N):
                options = {"pack_int32": pack_int32, "kernel": kernel}
                first, second = flatquant_dynamic_quantize_many(*missing, [clip, 1.0], **options)
                for ratio, output in ((clip, first), (1.0, second)):
                    # Nothing is rounded before the codes; but quotients of 16-bit numbers are
                    # often next to a tie, so that the number of codes says nothing.
                    result = accuracy.compare(*output, exact, ratio, dtype, tolerance=tolerance)
                    allowed = by_the_boundary_rule(result, min(clip))
                    assert allowed, f"{name}, {kernel}, {pack_int32}: {result}"
                    assert equal(flatquant_dynamic_quantize(*missing, ratio, **options), output)


@needs_gpu
@by_dtype
def test_plain_quantising_has_a_kernel_of_its_own(dtype: torch.dtype) -> None:
    assert available_kernels(0, 0, dtype, "cuda") == ["plain", "reference"]
    assert "plain" not in available_kernels(64, 64, dtype, "cuda")
    x = random_problem(8, 16, 3, dtype, "cuda").input
    with pytest.raises(ValueError, match=r"one of \['plain', 'reference'\] for M=0, N=0"):
        flatquant_dynamic_quantize(x, None, None, kernel="simt")


@needs_gpu
@by_dtype
@pytest.mark.parametrize("features", [1, 7, 8, 100, 4096, 4100, 11008, 53248])
def test_plain_quantising_gives_exact_codes_of_any_number_of_features(
    features: int, dtype: torch.dtype
) -> None:
    steps = torch.randint(-56, 57, (133, features), device="cuda") / 8  # half of them ties
    steps = torch.where(torch.rand_like(steps) < 0.5, steps.floor() + 0.5, steps).clamp(-7, 7)
    steps[:, features // 2] = 7 * (2.0 * torch.randint(2, (133,), device="cuda") - 1)
    codes = steps.round().to(torch.int8)
    scales = torch.exp2(torch.randint(-4, 5, (133,), device="cuda"))
    x = (steps * scales[:, None]).to(dtype)
    wide = torch.cat((torch.ones_like(x), x), dim=1)[:, features:]  # at any offset
    cases = [(x, codes, scales), (wide, codes, scales), (x[5], codes[5], scales[5])]
    for kernel in kernels(0, 0, dtype):
        for pack_int32 in storages(1, features):
            for tokens, *expected in cases:
                got = flatquant_dynamic_quantize(tokens, None, None, 1.0, pack_int32, kernel=kernel)
                assert equal(got, tuple(expected)), (kernel, pack_int32, tokens.stride())


@needs_gpu
@by_dtype
def test_plain_quantising_of_special_tokens(dtype: torch.dtype) -> None:
    x = torch.randn(70, 4096, device="cuda").to(dtype)
    clean = flatquant_dynamic_quantize(x, None, None, (0.9, 0.8))
    dirty = x.clone()
    dirty[0, 0], dirty[7, 4095], dirty[21, 9] = math.nan, math.inf, -math.inf
    dirty[22, 1], dirty[22, 2], dirty[33] = math.inf, -math.nan, 0
    codes, scales = flatquant_dynamic_quantize(dirty, None, None, (0.9, 0.8))
    special = [0, 7, 21, 22, 33]
    expected = torch.tensor([math.nan, math.inf, math.inf, math.nan, 1.0], device="cuda")
    torch.testing.assert_close(scales[special], expected, equal_nan=True, rtol=0, atol=0)
    assert (codes[special] == 0).all()
    others = [token for token in range(70) if token not in special]
    assert equal((codes[others], scales[others]), (clean[0][others], clean[1][others]))


@needs_gpu
@by_dtype
@pytest.mark.parametrize("M, N", [*KINDS, *ODD])
def test_the_transform_agrees_with_float64(M: int, N: int, dtype: torch.dtype) -> None:
    problem = random_problem(M, N, tokens_of(M, N), dtype, "cuda")
    cases: list[Any] = [("both", problem, problem), *some_factors(problem)][:3]
    for name, arguments, explicit in cases:
        # With one factor there is no intermediate to be rounded.
        bound = tolerance_of(dtype if name == "both" else torch.float32, M, N).transform
        exact = float64(explicit)
        largest = exact.abs().amax(1, keepdim=True)
        for kernel in kernels(M, N, dtype):
            for out_dtype in DTYPES:
                y = kronecker_transform(*arguments, out_dtype, kernel=kernel)
                assert y.dtype == out_dtype and y.shape == exact.shape
                # Half a unit in the last place, and half the smallest subnormal.
                info = torch.finfo(out_dtype)
                rounding = info.eps / 2 * exact.abs() + info.smallest_normal * info.eps / 2
                allowed = bound * largest * (1 + info.eps) + rounding
                wrong = ~((y.double() - exact).abs() <= allowed)
                assert not wrong.any(), f"{name}, {kernel}, {out_dtype}: {int(wrong.sum())} wrong"
            wide = kronecker_transform(*arguments, torch.float32, kernel=kernel)
            for out_dtype in DTYPES[:2]:
                y = kronecker_transform(*arguments, out_dtype, kernel=kernel)
                assert torch.equal(y, wide.to(out_dtype)), f"{name}, {kernel}: not rounded once"


@needs_gpu
@by_dtype
def test_what_is_transformed_is_what_is_quantised(dtype: torch.dtype) -> None:
    for M, N in KINDS:
        problem = random_problem(M, N, 67, dtype, "cuda")
        for kernel in kernels(M, N, dtype):
            y = kronecker_transform(*problem, torch.float32, kernel=kernel)
            output = flatquant_dynamic_quantize(*problem, (0.9, 0.7), kernel=kernel)
            result = accuracy.compare(*output, y.double(), (0.9, 0.7), torch.float32)
            assert by_the_boundary_rule(result, 0.7), f"{M} x {N}, {kernel}: {result}"


@needs_gpu
@by_dtype
@pytest.mark.parametrize("M, N", [(64, 64), (112, 128), (13, 17), (0, 0)])
def test_a_captured_graph_reads_its_ratios_at_every_replay(
    M: int, N: int, dtype: torch.dtype
) -> None:
    problem: Any = random_problem(M or 64, N or 64, 300, dtype, "cuda")
    if (M, N) == (0, 0):
        problem = (problem.input, None, None)
    ratios = [torch.ones(1, device="cuda") for _ in range(3)]
    clips: list[Any] = [ratios[0], (ratios[1], ratios[2]), (ratios[1], 0.5)]
    for kernel in kernels(M, N, dtype):
        flatquant_dynamic_quantize_many(*problem, clips, kernel=kernel)  # loads the kernel
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = flatquant_dynamic_quantize_many(*problem, clips, kernel=kernel)
        for values in ((0.9, 0.8, 0.7), (1e-3, 2.0, 1.0)):
            for ratio, value in zip(ratios, values, strict=True):
                ratio.fill_(value)
            graph.replay()
            a, b, c = values
            expected = flatquant_dynamic_quantize_many(
                *problem, [a, (b, c), (b, 0.5)], kernel=kernel
            )
            for got, output in zip(outputs, expected, strict=True):
                assert equal(got, output), (kernel, values)


@needs_gpu
def test_ratios_on_the_device_wait_for_nothing() -> None:
    problem = random_problem(64, 64, 300, torch.float16, "cuda")
    ratio = torch.ones((), device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for clips in ([ratio, (ratio, 0.5)], [1.0, 0.5]):
            flatquant_dynamic_quantize_many(*problem, clips)
        flatquant_dynamic_quantize(*problem, (ratio, ratio))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_gpu
@by_dtype
@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_a_ratio_on_the_device_that_is_no_ratio_does_no_harm(
    bad: float, dtype: torch.dtype
) -> None:
    for M, N in ((64, 64), (13, 17), (0, 0)):
        problem: Any = random_problem(M or 64, N or 64, 300, dtype, "cuda")
        if (M, N) == (0, 0):
            problem = (problem.input, None, None)
        ratio = torch.tensor(bad, device="cuda")
        for kernel in kernels(M, N, dtype):
            codes, _ = flatquant_dynamic_quantize(*problem, (ratio, ratio), kernel=kernel)
            assert codes.min() >= -8 and codes.max() <= 7
            good = flatquant_dynamic_quantize_many(*problem, [ratio, 0.9], kernel=kernel)[1]
            assert equal(good, flatquant_dynamic_quantize(*problem, 0.9, kernel=kernel))


@needs_gpu
@by_dtype
@pytest.mark.parametrize("M, N", [(64, 64), (24, 24), (128, 148), (208, 256), (13, 17), (0, 0)])
def test_every_split_of_a_batch_gives_the_same_tokens(M: int, N: int, dtype: torch.dtype) -> None:
    tokens = 2000
    problem: Any = random_problem(M or 64, N or 64, tokens, dtype, "cuda")
    x, left, right = (problem.input, None, None) if (M, N) == (0, 0) else problem
    forms = [(left, right)] if M == 0 else [(left, right), (None, right), (left, None)]
    splits = [[1, 3, 6, 137, 268, 400, 533, 1597], list(range(132, tokens, 132)), [1999]]
    for left, right in forms:
        for kernel in kernels(M, N, dtype):
            whole = flatquant_dynamic_quantize_many(x, left, right, CLIPS, kernel=kernel)
            y = None if M == 0 else kronecker_transform(x, left, right, kernel=kernel)
            wrong = torch.zeros((), dtype=torch.int64, device="cuda")
            for cuts in splits:
                for start, end in zip([0, *cuts], [*cuts, tokens], strict=True):
                    # A copy at another address: the place in memory must not matter either.
                    part = x[start:end].clone()
                    got = flatquant_dynamic_quantize_many(part, left, right, CLIPS, kernel=kernel)
                    for (codes, scales), (all_codes, all_scales) in zip(got, whole, strict=True):
                        wrong += (codes != all_codes[start:end]).any()
                        wrong += (scales != all_scales[start:end]).any()
                    if y is not None:
                        transformed = kronecker_transform(part, left, right, kernel=kernel)
                        wrong += (transformed != y[start:end]).any()
            assert wrong == 0, f"{kernel}: {int(wrong)} parts differ"


@needs_gpu
@by_dtype
def test_more_than_one_kernels_outputs_no_tokens_and_strides(dtype: torch.dtype) -> None:
    wide = torch.randn(3, 50, 4160, device="cuda").to(dtype)
    _, left, right = random_problem(64, 64, 0, dtype, "cuda")
    clips = [(1 - i / 40, 1.0) for i in range(20)]
    for factors in ((left, right), (None, right), (left, None), (None, None)):
        x = wide[..., 32 : 32 + 4096]
        outputs = flatquant_dynamic_quantize_many(x, *factors, clips, True)
        for clip, output in zip(clips, outputs, strict=True):
            expected = flatquant_dynamic_quantize(x.contiguous(), *factors, clip, True)
            assert equal(output, expected), clip
        for codes, scales in flatquant_dynamic_quantize_many(x[:0], *factors, clips[:3], True):
            assert (codes.shape, scales.shape) == ((0, 50, 512), (0, 50))
        if factors != (None, None):
            y = kronecker_transform(x, *factors)
            assert torch.equal(y, kronecker_transform(x.contiguous(), *factors))
            assert kronecker_transform(x[:0], *factors).shape == (0, 50, 4096)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=dtype_name)
@pytest.mark.parametrize("offset, pitch", [(1, 4160), (0, 4099), (4, 4160)])
def test_unaligned_rows_are_served(offset: int, pitch: int, dtype: torch.dtype) -> None:
    storage = torch.randn(9 * pitch + offset, device="cuda").to(dtype)
    x = storage[offset:].view(9, pitch)[:, :4096]
    problem = Problem(x, *random_problem(64, 64, 0, dtype, "cuda")[1:])
    cases: list[Any] = [("both", problem, problem), *some_factors(problem)]
    for name, arguments, explicit in cases:
        outputs = flatquant_dynamic_quantize_many(*arguments, CLIPS[:2])
        for clip, output in zip(CLIPS[:2], outputs, strict=True):
            result = accuracy.compare(*output, float64(explicit), clip, dtype)
            assert result.ok, f"{name}: {result}"


@needs_gpu
@by_dtype
def test_fake_quantising_runs_the_kernels_and_their_inverse(dtype: torch.dtype) -> None:
    problem = random_problem(64, 64, 200, dtype, "cuda")
    orthogonal = [torch.linalg.qr(torch.randn(64, 64, device="cuda"))[0] for _ in range(2)]
    left, right = (factor.to(dtype).contiguous() for factor in orthogonal)
    arguments = (problem.input, left, right)
    for kernel in [*kernels(64, 64, dtype), "reference"]:
        codes, scales = flatquant_dynamic_quantize(*arguments, (0.9, 0.8), kernel=kernel)
        fake = fake_quantize(*arguments, (0.9, 0.8), kernel=kernel)
        assert torch.equal(fake, dequantize_int4(codes, scales, dtype=dtype))
        back = fake_quantize(*arguments, invert=True, out_dtype=torch.float32, kernel=kernel)
        x = problem.input.float()
        error = (back - x).norm(dim=1) / x.norm(dim=1)
        assert 0.01 < error.mean() < 0.2 and (error < 0.5).all(), judged_as(dtype, kernel)
