"""The public functions without a kernel: what they accept, return and refuse."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from problems import DTYPES, dtype_name, random_problem
from torch import Tensor
from torch._subclasses import FakeTensorMode

import flatquant
import quant_ops
from flatquant import (
    _library,
    available_kernels,
    dequantize_int4,
    fake_quantize,
    flatquant_dynamic_quantize,
    flatquant_dynamic_quantize_many,
    kronecker_transform,
    ops,
    reference,
)
from flatquant._checks import row_stride
from flatquant.packing import pack_int4


def reference_of(*problem: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    return flatquant_dynamic_quantize(*problem, use_cuda=False, **options)


# ------------------------------------------------------------------------------------ what it takes


def test_the_originals_import_works_and_is_the_package() -> None:
    for name in quant_ops.__all__:
        assert getattr(quant_ops, name) is getattr(flatquant, name)
    assert set(quant_ops.__all__) == {
        "flatquant_dynamic_quantize",
        "dequantize_int4",
        "get_decompose_dim",
        "CUDA_AVAILABLE",
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("pack_int32", [False, True])
@pytest.mark.parametrize("tokens", [(), (1,), (0,), (5,), (2, 3), (2, 0, 3), (1, 1, 4)])
def test_results_have_the_inputs_leading_dimensions(
    tokens: tuple[int, ...], pack_int32: bool, dtype: torch.dtype
) -> None:
    problem = random_problem(4, 6, math.prod(tokens), dtype)
    x = problem.input.view(*tokens, 24)
    quantized, scales = reference_of(x, *problem[1:], pack_int32=pack_int32)
    assert (scales.dtype, scales.shape) == (torch.float32, tokens)
    if pack_int32:
        assert (quantized.dtype, quantized.shape) == (torch.int32, (*tokens, 3))
    else:
        assert (quantized.dtype, quantized.shape) == (torch.int8, (*tokens, 24))
    dequantized = dequantize_int4(quantized, scales, packed_int32=pack_int32)
    assert (dequantized.dtype, dequantized.shape) == (torch.float32, (*tokens, 24))


WIDE = torch.randn(4, 6, 40)

STRIDED = [
    # tensor [..., 24], elements from token to token (None: no one stride)
    pytest.param(WIDE[0, :, :24], 40, id="slice of a wider tensor"),
    pytest.param(WIDE[:, :, 7:31], 40, id="slice with two leading dimensions"),
    pytest.param(WIDE[:, 2, 7:31], 240, id="one of the leading dimensions taken"),
    pytest.param(WIDE[:, 2:3, 7:31], 240, id="a dimension of size 1 has no say"),
    pytest.param(WIDE[0, ::2, :24], 80, id="every other token"),
    pytest.param(WIDE[:, ::2, :24], 80, id="every other token of every batch"),
    pytest.param(WIDE[0, :1, :24].expand(5, 24), 0, id="one token repeated"),
    pytest.param(WIDE.flatten().as_strided((5, 24), (3, 1)), 3, id="overlapping tokens"),
    pytest.param(torch.empty(3, 0, 24).transpose(0, 1), 24, id="no tokens"),
    pytest.param(WIDE[0, :, :24].contiguous()[0], 24, id="one dimension"),
    pytest.param(WIDE[:, :5, :24], None, id="batches further apart than their tokens"),
    pytest.param(WIDE[:, :, :24].transpose(0, 1), None, id="leading dimensions transposed"),
    pytest.param(WIDE[:1, :2, :24].expand(3, 2, 24), None, id="one batch repeated"),
    pytest.param(torch.randn(24, 5).T, None, id="tokens transposed"),
    pytest.param(WIDE[0, :, :24:1].repeat(1, 2)[:, ::2], None, id="every other feature"),
]


@pytest.mark.parametrize("x, stride", STRIDED)
def test_rows_of_one_stride_are_taken_and_others_are_refused(x: Tensor, stride: int | None) -> None:
    factors = random_problem(4, 6, 1, torch.float32)[1:]
    assert row_stride(x) == stride
    if stride is None:
        with pytest.raises(ValueError, match=r"one stride between tokens.*call \.contiguous\(\)"):
            reference_of(x, *factors)
        x = x.contiguous()
    codes, scales = reference_of(x, *factors)
    expected_codes, expected_scales = reference.dynamic_quantize(x.contiguous(), *factors)
    assert torch.equal(codes, expected_codes) and torch.equal(scales, expected_scales)


@pytest.mark.parametrize(
    "clip_ratio", [1, 0.5, numpy.float32(0.5), numpy.int64(2), Fraction(1, 2), 2.0**-149, 3.4e38]
)
def test_any_real_clip_ratio_that_float32_holds_is_taken(clip_ratio: Any) -> None:
    problem = random_problem(4, 6, 3, torch.float16)
    codes, scales = reference_of(*problem, clip_ratio=clip_ratio)
    expected_codes, expected_scales = reference.dynamic_quantize(*problem, float(clip_ratio))
    assert torch.equal(codes, expected_codes) and torch.equal(scales, expected_scales)


@pytest.mark.parametrize("options", [{"use_cuda": False}, {"kernel": "reference"}])
def test_the_reference_is_what_runs_without_cuda_and_by_name(options: dict[str, Any]) -> None:
    problem = random_problem(4, 6, 3, torch.float16)
    codes, scales = flatquant_dynamic_quantize(*problem, 0.9, True, **options)
    expected_codes, expected_scales = reference.dynamic_quantize(*problem, 0.9, True)
    assert torch.equal(codes, expected_codes) and torch.equal(scales, expected_scales)


def test_inputs_stay_as_they_are_and_results_carry_no_gradient() -> None:
    problem = [tensor.requires_grad_() for tensor in random_problem(4, 6, 3, torch.float32)]
    before = [tensor.detach().clone() for tensor in problem]
    for gradients_off in (torch.no_grad(), torch.inference_mode()):
        with gradients_off:
            _, scales = reference_of(*problem)
        assert not scales.requires_grad
    assert all(torch.equal(a, b) for a, b in zip(problem, before, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("packed", [False, True])
def test_dequantized_is_code_times_scale(packed: bool, dtype: torch.dtype) -> None:
    codes = torch.randint(-8, 8, (2, 3, 16), dtype=torch.int8)
    scales = torch.tensor([[0.5, 1.0, 0.1], [3.0, 1e-3, 7.0]])
    got = dequantize_int4(pack_int4(codes) if packed else codes, scales, packed, dtype)
    assert got.dtype == dtype
    assert torch.equal(got, (codes * scales[..., None]).to(dtype))


@pytest.mark.parametrize("scale", [math.nan, math.inf])
def test_a_token_without_a_finite_scale_dequantizes_to_nan(scale: float) -> None:
    codes = torch.zeros(1, 8, dtype=torch.int8)
    assert dequantize_int4(codes, torch.tensor([scale])).isnan().all()


def test_the_cpu_has_the_reference_only() -> None:
    for dtype in DTYPES:
        assert available_kernels(64, 64, dtype, "cpu") == ["reference"]
        assert available_kernels(64, 64, dtype, torch.device("cpu")) == ["reference"]
        assert available_kernels(64, 64, dtype)[-1] == "reference"
        assert available_kernels(0, 0, dtype, "cpu") == ["reference"]


# ---------------------------------------------------------------------------------- what it refuses

X, LEFT, RIGHT = random_problem(4, 6, 3, torch.float16)

NO_RATIO = "must be a real number, a float32 tensor or a tuple of two such, "
REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    # changed arguments, error, what the message says: the argument, what it was, what it must be
    ({"input_tensor": [1.0]}, TypeError, "input_tensor must be a torch.Tensor, got list"),
    ({"left_trans": 1.0}, TypeError, "left_trans must be a torch.Tensor, got float"),
    ({"right_trans": 3}, TypeError, "right_trans must be a torch.Tensor, got int"),
    (
        {"input_tensor": X.double()},
        TypeError,
        "input_tensor must be float16, bfloat16 or float32, got torch.float64",
    ),
    (
        {"input_tensor": X.int()},
        TypeError,
        "input_tensor must be float16, bfloat16 or float32, got torch.int32",
    ),
    (
        {"left_trans": LEFT.float()},
        TypeError,
        "left_trans must have the dtype of input_tensor, torch.float16, got torch.float32",
    ),
    (
        {"right_trans": RIGHT.bfloat16()},
        TypeError,
        "right_trans must have the dtype of input_tensor, torch.float16, got torch.bfloat16",
    ),
    (
        {"left_trans": LEFT.to("meta")},
        ValueError,
        "left_trans must be on the device of input_tensor, cpu, got meta",
    ),
    ({"left_trans": LEFT[:2]}, ValueError, "left_trans must be a square matrix, got shape (2, 4)"),
    ({"left_trans": LEFT[0]}, ValueError, "left_trans must be a square matrix, got shape (4,)"),
    (
        {"right_trans": RIGHT[:0, :0]},
        ValueError,
        "right_trans must be a square matrix, got shape (0, 0)",
    ),
    (
        {"right_trans": RIGHT[None]},
        ValueError,
        "right_trans must be a square matrix, got shape (1, 6, 6)",
    ),
    (
        {"left_trans": LEFT.T},
        ValueError,
        "left_trans must be contiguous, got strides (1, 4): call .contiguous()",
    ),
    (
        {"input_tensor": X[:, :23]},
        ValueError,
        "input_tensor must have M * N = 4 * 6 = 24 features in its last dimension, "
        "from left_trans [4, 4] and right_trans [6, 6], got shape (3, 23)",
    ),
    ({"input_tensor": X[0, 0]}, ValueError, "= 24 features in its last dimension"),
    (
        {"input_tensor": X.repeat(1, 2)[:, ::2]},
        ValueError,
        "got shape (3, 24) with strides (48, 2): call .contiguous()",
    ),
    ({"clip_ratio": 0}, ValueError, "clip_ratio must be finite and > 0 in float32, got 0"),
    ({"clip_ratio": -1.0}, ValueError, "clip_ratio must be finite and > 0 in float32, got -1.0"),
    ({"clip_ratio": math.nan}, ValueError, "clip_ratio must be finite and > 0 in float32, got nan"),
    ({"clip_ratio": math.inf}, ValueError, "clip_ratio must be finite and > 0 in float32, got inf"),
    ({"clip_ratio": 1e39}, ValueError, "clip_ratio must be finite and > 0 in float32, got 1e+39"),
    ({"clip_ratio": 1e-46}, ValueError, "clip_ratio must be finite and > 0 in float32, got 1e-46"),
    ({"clip_ratio": True}, TypeError, "clip_ratio " + NO_RATIO + "got True of type bool"),
    ({"clip_ratio": "1"}, TypeError, "clip_ratio " + NO_RATIO + "got '1' of type str"),
    ({"clip_ratio": 1j}, TypeError, "clip_ratio " + NO_RATIO + "got 1j of type complex"),
    (
        {"clip_ratio": X[0, 0]},
        TypeError,
        "clip_ratio must hold one torch.float32 where it is a tensor, "
        "got torch.float16 of shape ()",
    ),
    ({"clip_ratio": torch.ones(2)}, ValueError, "got torch.float32 of shape (2,)"),
    (
        {"clip_ratio": torch.ones((), device="meta")},
        ValueError,
        "clip_ratio must be on the device of input_tensor, cpu, got meta",
    ),
    (
        {"clip_ratio": torch.ones(1).to_sparse()},
        TypeError,
        "clip_ratio must be a dense (torch.strided) tensor, got a torch.sparse_coo one",
    ),
    (
        {"clip_ratio": (1.0, torch.nn.Parameter(torch.ones(1)))},
        NotImplementedError,
        "[1] must not require a gradient, for there is none",
    ),
    (
        {"clip_ratio": torch.nn.Parameter(torch.ones(()))},
        NotImplementedError,
        "must not require a gradient, for there is none",
    ),
    ({"clip_ratio": [1.0, 0.9]}, TypeError, "clip_ratio " + NO_RATIO + "got [1.0, 0.9]"),
    ({"clip_ratio": (1.0, 0)}, ValueError, "clip_ratio must be finite and > 0 in float32, got 0"),
    ({"clip_ratio": (math.nan, 1)}, ValueError, "clip_ratio must be finite and > 0 in float32"),
    ({"clip_ratio": (1, "1")}, TypeError, "clip_ratio " + NO_RATIO + "got '1'"),
    (
        {"clip_ratio": (1.0,)},
        ValueError,
        "clip_ratio must be one ratio or the pair (max side, min side), got 1",
    ),
    (
        {"left_trans": None, "input_tensor": X[:, :23]},
        ValueError,
        "input_tensor must have a multiple of 6 features in its last dimension, at least 6, "
        "from right_trans [6, 6], got shape (3, 23)",
    ),
    (
        {"right_trans": None, "input_tensor": X[:, :0]},
        ValueError,
        "must have a multiple of 4 features in its last dimension, at least 4, "
        "from left_trans [4, 4], got shape (3, 0)",
    ),
    (
        {"left_trans": None, "right_trans": None, "input_tensor": X[:, :0]},
        ValueError,
        "must have at least one feature in its last dimension, got shape (3, 0)",
    ),
    (
        {"left_trans": None, "right_trans": None, "input_tensor": X[0, 0]},
        ValueError,
        "must have at least one feature in its last dimension, got shape ()",
    ),
    (
        {"left_trans": None, "input_tensor": X[:, :12].clone(), "pack_int32": True},
        ValueError,
        "pack_int32=True needs features that are a multiple of 8, got 12",
    ),
    (
        {"input_tensor": X[:, :12].clone(), "left_trans": LEFT[:2, :2].clone(), "pack_int32": True},
        ValueError,
        "pack_int32=True needs features that are a multiple of 8, got 12",
    ),
    (
        {"input_tensor": X.to_sparse()},
        TypeError,
        "input_tensor must be a dense (torch.strided) tensor, got a torch.sparse_coo one",
    ),
    (
        {"left_trans": torch.nested.nested_tensor([LEFT, LEFT])},
        TypeError,
        "left_trans must be a dense (torch.strided) tensor, got a nested one",
    ),
    (
        {"right_trans": torch.nn.Parameter(RIGHT), "left_trans": torch.nn.Parameter(LEFT)},
        NotImplementedError,
        "left_trans and right_trans must not require a gradient, for there is none: "
        "call under torch.no_grad(), or pass left_trans.detach()",
    ),
    ({"pack_int32": 1}, TypeError, "pack_int32 must be a bool, got 1 of type int"),
    ({"use_cuda": "no"}, TypeError, "use_cuda must be a bool, got 'no' of type str"),
    ({"kernel": None}, TypeError, "kernel must be a str, got None of type NoneType"),
    (
        {"kernel": "simt"},
        ValueError,
        "kernel must be 'auto' or 'reference' with use_cuda=False, got 'simt'",
    ),
    (
        {"use_cuda": True},
        ValueError,
        "input_tensor must be on a CUDA device with use_cuda=True, got cpu: "
        "move the tensors to CUDA, or pass use_cuda=False to run the reference",
    ),
    ({"use_cuda": True, "kernel": "simt"}, ValueError, "must be on a CUDA device"),
]


@pytest.mark.parametrize("changed, error, message", REFUSED)
def test_a_wrong_argument_is_named_with_what_it_was_and_must_be(
    changed: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments = {"input_tensor": X, "left_trans": LEFT, "right_trans": RIGHT, "use_cuda": False}
    flatquant_dynamic_quantize(**arguments)
    with pytest.raises(error, match=re.escape(message)):
        flatquant_dynamic_quantize(**{**arguments, **changed})


def refused_by_others() -> Iterator[Any]:
    """The cases of REFUSED for the functions that have all of the arguments changed."""
    for changed, error, message in REFUSED:
        if "pack_int32" not in changed:
            yield fake_quantize, changed, error, message
            without_factors = {"left_trans", "right_trans"} <= {
                k for k in changed if changed[k] is None
            }
            if "clip_ratio" not in changed and not without_factors:
                yield kronecker_transform, changed, error, message
        many = {"clip_ratios": [1.0], **changed}
        if "clip_ratio" in changed:
            # The second is the wrong one, and is named.
            many["clip_ratios"] = [1.0, many.pop("clip_ratio")]
            if error is not NotImplementedError:
                message = re.sub("^clip_ratio", "clip_ratios[1]", message)
        yield flatquant_dynamic_quantize_many, many, error, message


@pytest.mark.parametrize("function, changed, error, message", list(refused_by_others()))
def test_the_other_functions_refuse_the_same_in_the_same_words(
    function: Any, changed: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments = {"input_tensor": X, "left_trans": LEFT, "right_trans": RIGHT, "use_cuda": False}
    with pytest.raises(error, match=re.escape(message)):
        function(**{**arguments, **changed})


@pytest.mark.parametrize(
    "function, changed, error, message",
    [
        (
            flatquant_dynamic_quantize_many,
            {"clip_ratios": []},
            ValueError,
            "clip_ratios must hold at least one clip ratio, got none",
        ),
        (
            flatquant_dynamic_quantize_many,
            {"clip_ratios": 0.9},
            TypeError,
            "clip_ratios must be a list or tuple, got 0.9 of type float",
        ),
        (
            flatquant_dynamic_quantize_many,
            {"clip_ratios": torch.ones(3)},
            TypeError,
            "clip_ratios must be a list or tuple, got tensor([1., 1., 1.]) of type Tensor",
        ),
        (
            kronecker_transform,
            {"left_trans": None, "right_trans": None},
            ValueError,
            "left_trans and right_trans must not both be None, got None and None",
        ),
        (
            kronecker_transform,
            {"out_dtype": torch.float64},
            TypeError,
            "out_dtype must be torch.float16, bfloat16 or float32, got torch.float64",
        ),
        (fake_quantize, {"out_dtype": "float16"}, TypeError, "got 'float16'"),
        (fake_quantize, {"invert": 1}, TypeError, "invert must be a bool, got 1 of type int"),
        (
            fake_quantize,
            {"invert": True, "right_trans": torch.zeros_like(RIGHT)},
            ValueError,
            "right_trans must have an inverse with invert=True",
        ),
    ],
)
def test_the_other_functions_name_their_own_arguments(
    function: Any, changed: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments = {"input_tensor": X, "left_trans": LEFT, "right_trans": RIGHT, "use_cuda": False}
    with pytest.raises(error, match=re.escape(message)):
        function(**{**arguments, **changed})


CODES, SCALES = torch.zeros(3, 8, dtype=torch.int8), torch.ones(3)

REFUSED_CODES = [
    (
        {"scales": SCALES.to_sparse()},
        TypeError,
        "scales must be a dense (torch.strided) tensor, got a torch.sparse_coo one",
    ),
    ({"packed_int32": None}, TypeError, "packed_int32 must be a bool, got None of type NoneType"),
    ({"quantized": [0]}, TypeError, "quantized must be a torch.Tensor, got list"),
    ({"scales": 1.0}, TypeError, "scales must be a torch.Tensor, got float"),
    (
        {"quantized": CODES.int()},
        TypeError,
        "quantized must be torch.int8 with packed_int32=False, got torch.int32",
    ),
    (
        {"packed_int32": True},
        TypeError,
        "quantized must be torch.int32 with packed_int32=True, got torch.int8",
    ),
    (
        {"scales": torch.ones(3).half()},
        TypeError,
        "scales must be torch.float32, got torch.float16",
    ),
    (
        {"scales": torch.ones(3, 1)},
        ValueError,
        "scales must have the shape of quantized without its last dimension, "
        "got scales (3, 1) for quantized (3, 8)",
    ),
    ({"quantized": CODES[0, 0]}, ValueError, "got scales (3,) for quantized ()"),
    (
        {"scales": torch.ones(3, device="meta")},
        ValueError,
        "scales must be on the device of quantized, cpu, got meta",
    ),
    (
        {"dtype": torch.int8},
        TypeError,
        "dtype must be a floating-point torch.dtype, got torch.int8",
    ),
    ({"dtype": "float32"}, TypeError, "dtype must be a floating-point torch.dtype, got 'float32'"),
]


@pytest.mark.parametrize("changed, error, message", REFUSED_CODES)
def test_dequantize_names_a_wrong_argument_with_what_it_was_and_must_be(
    changed: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments = {"quantized": CODES, "scales": SCALES}
    dequantize_int4(**arguments)
    with pytest.raises(error, match=re.escape(message)):
        dequantize_int4(**{**arguments, **changed})


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ((0, 64, torch.float16), ValueError, "M must be at least 1, got 0"),
        ((64, -1, torch.float16), ValueError, "N must be at least 1, got -1"),
        ((64, 0, torch.float16), ValueError, "N must be at least 1, got 0"),
        ((64.0, 64, torch.float16), TypeError, "M must be an int, got 64.0 of type float"),
        ((64, True, torch.float16), TypeError, "N must be an int, got True of type bool"),
        (
            (64, 64, torch.float64),
            TypeError,
            "dtype must be torch.float16, bfloat16 or float32, got torch.float64",
        ),
        ((64, 64, "float16"), TypeError, "got 'float16'"),
        (
            (64, 64, torch.float16, "gpu"),
            ValueError,
            "device must name a device of torch, got 'gpu'",
        ),
        ((64, 64, torch.float16, -1), ValueError, "device must name a device of torch, got -1"),
        ((64, 64, torch.float16, True), TypeError, "device must be a torch.device, str or int"),
    ],
)
def test_available_kernels_names_a_wrong_argument(
    arguments: tuple[Any, ...], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=re.escape(message)):
        available_kernels(*arguments)


# ------------------------------------------------------------------------------------ the extension


def test_a_device_or_a_size_past_the_last_is_not_asked_for_its_kernels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ops, "CUDA_AVAILABLE", True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="device must be one of 2, got cuda:2"):
        available_kernels(64, 64, torch.float16, 2)
    assert available_kernels(2**64, 64, torch.float16, "cuda:1") == ["reference"]


def test_cuda_tensors_without_the_extension_are_an_error_that_names_reason_and_remedy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ops, "EXTENSION_LOADED", False)
    monkeypatch.setattr(ops, "LOAD_ERROR", "the linker said no")
    with FakeTensorMode():
        x, left, right = (torch.empty(8, 8, device="cuda") for _ in range(3))
        for kernel in ("auto", "simt"):
            with pytest.raises(RuntimeError, match=r"the linker said no.*\./scripts/build\.sh"):
                flatquant_dynamic_quantize(x.view(1, 64), left, right, kernel=kernel)
            with pytest.raises(RuntimeError, match="the linker said no"):
                flatquant_dynamic_quantize_many(x, None, right, [1.0], kernel=kernel)
            with pytest.raises(RuntimeError, match="the linker said no"):
                kronecker_transform(x, None, right, kernel=kernel)
            with pytest.raises(RuntimeError, match="the linker said no"):
                fake_quantize(x, None, right, kernel=kernel)


@pytest.mark.parametrize("clip_ratio", [0.5, 1, Fraction(1, 2)])
@pytest.mark.parametrize("pack_int32", [False, True])
def test_cuda_tensors_go_to_the_operator_with_all_arguments(
    monkeypatch: pytest.MonkeyPatch, pack_int32: bool, clip_ratio: Any
) -> None:
    calls = []
    monkeypatch.setattr(ops, "EXTENSION_LOADED", True)
    monkeypatch.setattr(ops, "_dynamic_quantize", lambda *arguments: calls.append(arguments))
    with FakeTensorMode():
        left, right, x = (torch.empty(n, n, device="cuda") for n in (2, 4, 8))
        flatquant_dynamic_quantize(x, left, right, clip_ratio, pack_int32)
    assert calls == [(x, left, right, float(clip_ratio), pack_int32, "auto", "highest")]
    assert type(calls[0][3]) is float


@pytest.mark.parametrize(
    "offset, pitch, fits",
    [(0, 64, True), (8, 64, True), (0, 72, True), (1, 64, False), (4, 64, False), (0, 68, False)],
)
def test_forcing_sm90_needs_tokens_aligned_to_16_bytes(
    monkeypatch: pytest.MonkeyPatch, offset: int, pitch: int, fits: bool
) -> None:
    monkeypatch.setattr(ops, "available_kernels", lambda *_: ["sm90", "simt", "reference"])
    x = torch.empty(5 * pitch + offset, dtype=torch.float16)[offset:].view(5, pitch)[:, :64]
    factor = torch.empty(8, 8, dtype=torch.float16)
    for left in (factor, None):
        ops._check_kernel("simt", x, left, factor, 8, 8)
        if fits:
            ops._check_kernel("sm90", x, left, factor, 8, 8)
            continue
        message = f"{2 * offset % 16} bytes off and {2 * pitch} bytes from token to token"
        with pytest.raises(ValueError, match=f"kernel='sm90'.*to 16 bytes, got.*{message}"):
            ops._check_kernel("sm90", x, left, factor, 8, 8)


def test_many_calls_the_operator_with_different_pairs_in_eights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = []

    def operator(x: Any, left: Any, right: Any, numbers: Any, tensors: Any, *more: Any) -> Any:
        calls.append((numbers, tensors, *more))
        return [(len(calls), i) for i in range(len(numbers))]

    monkeypatch.setattr(ops, "EXTENSION_LOADED", True)
    monkeypatch.setattr(ops, "_dynamic_quantize_many", operator)
    with FakeTensorMode():
        x, factor = torch.empty(5, 8, device="cuda"), torch.empty(4, 4, device="cuda")
        ratio = torch.empty((), device="cuda")
        numbers = [1.0, 0.5, (0.5, 1), 0.5, (0.5, 0.5), *(i + 2 for i in range(8)), 1]
        results = flatquant_dynamic_quantize_many(x, None, factor, numbers, True)
        same = flatquant_dynamic_quantize_many(x, None, None, [ratio, (ratio, ratio)])
        mixed = flatquant_dynamic_quantize_many(x, None, None, [ratio, (0.5, ratio)])
    expected = [1.0, 1.0, 0.5, 0.5, 0.5, 1.0, *(float(i // 2 + 2) for i in range(10))]
    assert calls[0] == (expected, [], True, "auto", "highest")
    assert calls[1] == ([float(i // 2 + 7) for i in range(6)], [], True, "auto", "highest")
    assert calls[2] == ([0.0, 0.0], [ratio, ratio], False, "auto", "highest")
    assert calls[3] == ([0.0, 0.0, 0.5, 0.0], [ratio, ratio, ratio], False, "auto", "highest")
    assert all(tensor is ratio for call in calls[2:] for tensor in call[1])
    assert [call[0] for call, _ in results] == [1] * 10 + [2] * 3 + [1]
    assert results[1] is results[3] is results[4] and results[0] is results[-1]
    assert same[0] is same[1] and mixed[0] != mixed[1]


def test_an_extension_that_does_not_load_leaves_the_linkers_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken = tmp_path / "_C.abi3.so"
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "is built without CUDA" in str(_library.load_extension(broken))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert f"{broken} does not exist" in str(_library.load_extension(broken))
    broken.write_text("no shared library")
    reason = str(_library.load_extension(broken))
    assert f"{broken} does not load" in reason
    assert "file too short" in reason or "invalid ELF header" in reason


def test_an_extension_that_is_there_loads_wherever_torch_has_cuda() -> None:
    if torch.version.cuda is None or not _library.EXTENSION.exists():
        pytest.skip(f"nothing to load: {_library.LOAD_ERROR}")
    assert _library.LOAD_ERROR is None


def test_the_architectures_are_those_of_the_extension() -> None:
    if _library.EXTENSION_LOADED:
        assert flatquant.__cuda_archs__
        assert all(re.fullmatch(r"\d+[af]?(\+PTX)?", arch) for arch in flatquant.__cuda_archs__)
    else:
        assert flatquant.__cuda_archs__ == ()
        assert not flatquant.CUDA_AVAILABLE
