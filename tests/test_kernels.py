"""The CUDA kernels, each of them forced in turn, against float64 and against themselves."""

from __future__ import annotations

import math

import pytest
import torch
from launches import (
    KINDS,
    by_dtype,
    by_kind,
    codes_of,
    equal,
    kernels,
    quantize,
    tolerance_of,
    variants,
)
from problems import (
    NO_GPU,
    Problem,
    dtype_name,
    eager_mismatches,
    exact_problem,
    float64,
    random_problem,
)
from shapes import ODD, RAGGED, SIZES

from flatquant import (
    accuracy,
    available_kernels,
    dequantize_int4,
    flatquant_dynamic_quantize,
    get_decompose_dim,
    reference,
)

pytestmark = pytest.mark.skipif(bool(NO_GPU), reason=NO_GPU)


# ----------------------------------------------------------------------------------------- accuracy


@by_dtype
@pytest.mark.parametrize("M, N", [*SIZES, *ODD])
def test_codes_and_scales_agree_with_float64(M: int, N: int, dtype: torch.dtype) -> None:
    # 2^20 elements give the smallest mismatch limit, 2e-5, a count of 20 to be judged by.
    tokens = max(257, 2**20 // (M * N) + 1)
    problem = random_problem(M, N, tokens, dtype, "cuda")
    exact = float64(problem)
    clip_ratio = 0.95
    eager = eager_mismatches(problem, clip_ratio, exact)
    tolerance = tolerance_of(dtype, M, N)
    failures = []
    for kernel, pack_int32 in variants(M, N, dtype):
        output = quantize(problem, kernel, pack_int32, clip_ratio)
        result = accuracy.compare(*output, exact, clip_ratio, dtype, tolerance=tolerance)
        name = f"{kernel}, {'int32' if pack_int32 else 'int8'}"
        if not result.ok:
            failures.append(f"{name}: {result}")
        # Both counts are sums of rare independent events, so their difference has a standard
        # deviation of at most sqrt(a + b). Four of those is chance; more is a worse kernel.
        slack = 4 * math.sqrt(eager + result.mismatches)
        if dtype != torch.float32 and result.mismatches > eager + slack:
            failures.append(f"{name}: {result.mismatches} codes differ, in eager PyTorch {eager}")
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("clip_ratio", [1.0, 0.5, 2.0])
@by_dtype
@pytest.mark.parametrize("M, N", [*KINDS, *ODD])
def test_exact_data_gives_exact_codes(
    M: int, N: int, dtype: torch.dtype, clip_ratio: float
) -> None:
    problem, _, codes, scales = exact_problem(M, N, 257, dtype, clip_ratio, "cuda")
    for kernel, pack_int32 in variants(M, N, dtype):
        got_codes, got_scales = quantize(problem, kernel, pack_int32, clip_ratio)
        assert torch.equal(got_scales, scales), kernel
        assert torch.equal(codes_of(got_codes), codes), (kernel, pack_int32)


@by_dtype
def test_the_originals_example_is_accurate(dtype: torch.dtype) -> None:
    M, N = get_decompose_dim(4096)
    problem = Problem(
        *(torch.randn(r, c, dtype=dtype, device="cuda") for r, c in ((128, 4096), (M, M), (N, N)))
    )
    exact = float64(problem)
    for pack_int32 in (False, True):
        output = flatquant_dynamic_quantize(
            *problem, clip_ratio=1.0, pack_int32=pack_int32, use_cuda=True
        )
        result = accuracy.compare(*output, exact, 1.0, dtype)
        assert result.ok, result
        error = dequantize_int4(*output, packed_int32=pack_int32) - exact
        assert (error.abs() <= 0.6 * output[1][:, None]).all()


@pytest.mark.parametrize("M, N", [(64, 64), (112, 128)])
def test_an_intermediate_past_the_largest_float16_does_no_harm(M: int, N: int) -> None:
    """W reaches some 16 * 30000, past float16's 65504; Y = W / 64 does not."""
    signs = 1 - 2 * (torch.arange(N, device="cuda") % 2)
    x = 30000.0 * signs.repeat(5, M, 1)
    x[3:] = torch.randn(2, M, N, device="cuda")  # tokens that need no care, beside those that do
    left = (0.5 + torch.rand(M, M, device="cuda")) * 16 / M
    right = torch.eye(N, device="cuda") / 64
    problem = Problem(x.flatten(1).half(), left.half(), right.half())
    exact = float64(problem)
    assert (
        exact.abs().max()
        < 65504
        < reference.transform(problem.input, problem.left, torch.eye(N, device="cuda")).abs().max()
    )
    for kernel, pack_int32 in variants(M, N, torch.float16):
        result = accuracy.compare(*quantize(problem, kernel, pack_int32), exact, 1.0, torch.float16)
        assert result.ok, f"{kernel}: {result}"


# ----------------------------------------------------------------------------------- special tokens


@by_dtype
@by_kind
def test_special_tokens_get_their_scales_and_touch_no_other(
    M: int, N: int, dtype: torch.dtype
) -> None:
    clean = random_problem(M, N, 70, dtype, "cuda")
    # Positive factors: then Inf in a token makes all of Y Inf, not NaN.
    clean = Problem(clean.input, clean.left.abs() + 0.01, clean.right.abs() + 0.01)
    features = M * N
    special = {
        0: {0: math.nan},
        7: {features - 1: math.nan},
        8: {0: math.inf},
        21: {features // 2: -math.inf},
        22: {0: math.inf, features - 1: math.nan},
        33: None,  # all zeros
        69: {features - 1: math.inf},
    }
    dirty = clean.input.clone()
    for token, values in special.items():
        if values is None:
            dirty[token] = 0
        else:
            for feature, value in values.items():
                dirty[token, feature] = value
    others = [token for token in range(70) if token not in special]
    expected = torch.tensor(
        [math.nan, math.nan, math.inf, math.inf, math.nan, 1.0, math.inf], device="cuda"
    )
    for kernel, pack_int32 in variants(M, N, dtype):
        codes, scales = quantize(Problem(dirty, *clean[1:]), kernel, pack_int32)
        clean_codes, clean_scales = quantize(clean, kernel, pack_int32)
        chosen = list(special)
        torch.testing.assert_close(scales[chosen], expected, equal_nan=True, rtol=0, atol=0)
        assert (codes[chosen] == 0).all(), kernel
        assert equal((codes[others], scales[others]), (clean_codes[others], clean_scales[others]))


@pytest.mark.parametrize(
    "values, clip_ratio, codes, scale",
    [
        pytest.param([10 * 2.0**-149, -(2.0**-148)], 1.0, [7, -2], 2.0**-149, id="subnormal"),
        pytest.param([7 * 2.0**-130, 2.0**-130], 1.0, [7, 1], 2.0**-130, id="tiny"),
        pytest.param([2.0**-149, 0.0], 1.0, [0, 0], 1.0, id="scale of subnormals underflows"),
        pytest.param([3.0, 0.5], 2.0**-149, [0, 0], 1.0, id="clip ratio makes it underflow"),
        pytest.param([7 * 2.0**120, -(2.0**120)], 1.0, [7, -1], 2.0**120, id="huge"),
        pytest.param([3e38, 1.0], 2.0, [0, 0], math.inf, id="scale overflows"),
    ],
)
def test_scales_at_the_ends_of_float32(
    values: list[float], clip_ratio: float, codes: list[int], scale: float
) -> None:
    x = torch.zeros(3, 64, device="cuda")
    x[1, :2] = torch.tensor(values)
    eye = torch.eye(8, device="cuda")
    for kernel, pack_int32 in variants(8, 8, torch.float32):
        got_codes, got_scales = quantize(Problem(x, eye, eye), kernel, pack_int32, clip_ratio)
        assert codes_of(got_codes)[1].tolist() == codes + [0] * 62, kernel
        assert got_scales.tolist() == [1.0, scale, 1.0], kernel


@by_dtype
@pytest.mark.parametrize("tokens", [(0,), (2, 0, 3)])
def test_no_tokens_give_empty_results(tokens: tuple[int, ...], dtype: torch.dtype) -> None:
    problem = random_problem(64, 64, 0, dtype, "cuda")
    problem = Problem(problem.input.view(*tokens, 4096), *problem[1:])
    for kernel, pack_int32 in variants(64, 64, dtype):
        codes, scales = quantize(problem, kernel, pack_int32)
        assert codes_of(codes).shape == (*tokens, 4096) and scales.shape == tokens


# -------------------------------------------------------------------------- batch and memory layout


@by_dtype
@by_kind
def test_strided_rows_give_the_result_of_contiguous_ones(
    M: int, N: int, dtype: torch.dtype
) -> None:
    features = M * N
    pitch = -(-(features + 40) // 8) * 8  # 16-byte multiples, so that every kernel takes the slices
    wide = torch.randn(3, 50, pitch, device="cuda").to(dtype)
    factors = random_problem(M, N, 0, dtype, "cuda")[1:]
    inputs = {
        "slice": wide[0, :, :features],
        "slice at an offset": wide[0, :, 32 : 32 + features],
        "slice of a batch": wide[:, :, 8 : 8 + features],
        "one row of every batch": wide[:, 7, :features],
        "every other token": wide[1, ::2, :features],
        "one token": wide[1, 3, :features],
        "one token repeated": wide[2, :1, :features].expand(9, features),
    }
    for name, x in inputs.items():
        for kernel, pack_int32 in variants(M, N, dtype):
            expected = quantize(Problem(x.contiguous(), *factors), kernel)
            assert equal(quantize(Problem(x, *factors), kernel, pack_int32), expected), (
                name,
                kernel,
            )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=dtype_name)
@pytest.mark.parametrize("offset, pitch", [(1, 4160), (0, 4099), (3, 4103), (4, 4160), (0, 4100)])
def test_unaligned_rows_are_served_by_auto_and_refused_by_sm90(
    offset: int, pitch: int, dtype: torch.dtype
) -> None:
    storage = torch.randn(9 * pitch + offset, device="cuda").to(dtype)
    x = storage[offset:].view(9, pitch)[:, :4096]
    problem = Problem(x, *random_problem(64, 64, 0, dtype, "cuda")[1:])
    result = accuracy.compare(*quantize(problem, "auto"), float64(problem), 1.0, dtype)
    assert result.ok, result
    aligned = problem._replace(input=x.contiguous())
    assert equal(quantize(problem, "simt"), quantize(aligned, "simt"))
    if "sm90" in kernels(64, 64, dtype):
        with pytest.raises(ValueError, match=r"kernel='sm90' needs every token.*16 bytes"):
            quantize(problem, "sm90")


@by_dtype
@pytest.mark.parametrize("M, N", [(64, 64), (56, 64), (112, 128)])
def test_unaligned_rows_give_the_bits_of_aligned_ones(M: int, N: int, dtype: torch.dtype) -> None:
    """What simt and sm80 take without padding if it is aligned, tiles of seven rows included."""
    aligned = random_problem(M, N, 9, dtype, "cuda")
    for offset, gap in ((1, 0), (2, 0), (0, 1), (0, 2), (0, 4)):
        storage = torch.empty(9 * (M * N + gap) + offset, dtype=dtype, device="cuda")
        x = storage[offset:].view(9, -1)[:, : M * N].copy_(aligned.input)
        for kernel in {"simt", "sm80"} & set(kernels(M, N, dtype)):
            result = quantize(aligned._replace(input=x), kernel)
            assert equal(result, quantize(aligned, kernel)), (kernel, offset, gap)


@pytest.mark.parametrize("which", ["left_trans", "right_trans"])
def test_unaligned_factors_are_served_by_auto_and_refused_by_sm90(which: str) -> None:
    aligned = random_problem(64, 64, 9, torch.float16, "cuda")
    storage = torch.empty(64 * 64 + 1, dtype=torch.float16, device="cuda")
    position = 1 if which == "left_trans" else 2
    factor = storage[1:].view(64, 64).copy_(aligned[position])
    problem = Problem(*aligned[:position], factor, *aligned[position + 1 :])
    result = accuracy.compare(*quantize(problem, "auto"), float64(problem), 1.0, torch.float16)
    assert result.ok, result
    assert equal(quantize(problem, "simt"), quantize(aligned, "simt"))
    if "sm90" in kernels(64, 64, torch.float16):
        with pytest.raises(ValueError, match=f"kernel='sm90' needs {which} aligned to 16 bytes"):
            quantize(problem, "sm90")


def test_no_memory_is_taken_but_for_the_results() -> None:
    wide = random_problem(64, 128, 3000, torch.float16, "cuda").input
    factors = random_problem(64, 64, 0, torch.float16, "cuda")[1:]
    for kernel in kernels(64, 64, torch.float16):
        # Or a larger cached block that others left may be handed out unsplit.
        torch.cuda.empty_cache()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = flatquant_dynamic_quantize(wide[:, :4096], *factors, 1.0, True, kernel=kernel)
        kept = torch.cuda.memory_allocated() - before
        assert torch.cuda.max_memory_allocated() - before == kept, kernel
        assert kept <= sum(t.numel() * 4 + 512 for t in result), kernel
        del result


# --------------------------------------------------------------------------------- choice of kernel


@by_dtype
@by_kind
def test_auto_is_the_first_of_the_available_kernels(M: int, N: int, dtype: torch.dtype) -> None:
    problem = random_problem(M, N, 65, dtype, "cuda")
    best = kernels(M, N, dtype)[0]
    assert equal(quantize(problem, "auto"), quantize(problem, best))
    by_index = available_kernels(M, N, dtype, torch.cuda.current_device())
    assert available_kernels(M, N, dtype) == by_index


@by_dtype
def test_a_hopper_gpu_runs_sm90(dtype: torch.dtype) -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a GPU of compute capability 9.0")
    for M, N in SIZES:
        names = kernels(M, N, dtype)
        assert "simt" in names, (M, N)
        if dtype == torch.float32:
            assert ("sm90" in names) == (N % 8 == 0 and max(M, N) <= 128), (M, N)
        elif M * N <= 28672 and (N % 8 == 0 or (M, N) in RAGGED):
            assert names[0] == "sm90", (M, N)


@pytest.mark.parametrize(
    "M, N, dtype, kernel",
    [
        (64, 64, torch.float16, "sm91"),
        (64, 64, torch.float16, ""),
        (112, 136, torch.float32, "sm90"),
        (13, 17, torch.float16, "sm90"),
    ],
)
def test_an_unknown_or_unfit_kernel_is_refused_with_those_that_serve(
    M: int, N: int, dtype: torch.dtype, kernel: str
) -> None:
    problem = random_problem(M, N, 2, dtype, "cuda")
    with pytest.raises(ValueError, match=rf"kernel must be .*'simt'.*M={M}, N={N}") as caught:
        flatquant_dynamic_quantize(*problem, kernel=kernel)
    assert repr(kernel) in str(caught.value)
    assert ("at precision highest" in str(caught.value)) == (dtype == torch.float32)


def test_tensors_on_two_devices_are_refused() -> None:
    x, left, right = random_problem(8, 8, 2, torch.float16, "cuda")
    with pytest.raises(ValueError, match="right_trans must be on the device of input_tensor, cuda"):
        flatquant_dynamic_quantize(x, left, right.cpu())
    with pytest.raises(ValueError, match="left_trans must be on the device of input_tensor, cpu"):
        flatquant_dynamic_quantize(x.cpu(), left, right, use_cuda=False)


def test_the_reference_runs_on_the_gpu_and_is_accurate() -> None:
    problem = random_problem(112, 128, 300, torch.bfloat16, "cuda")
    for options in ({"use_cuda": False}, {"kernel": "reference"}):
        output = flatquant_dynamic_quantize(*problem, **options)
        assert output[0].device.type == "cuda"
        result = accuracy.compare(*output, float64(problem), 1.0, torch.float32)
        assert result.ok, result
    problem, clip_ratio, codes, scales = exact_problem(24, 32, 300, torch.float16, 0.5, "cuda")
    got = flatquant_dynamic_quantize(*problem, clip_ratio, use_cuda=False)
    assert torch.equal(got[0], codes) and torch.equal(got[1], scales)
