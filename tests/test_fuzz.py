"""Whatever is passed to a public function: a result, or one of three errors that name the argument.

On a GPU the operator itself is fuzzed too, past the checks of the public function.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from launches import COUNTS
from problems import NO_GPU
from torch import Tensor

from flatquant import (
    available_kernels,
    dequantize_int4,
    fake_quantize,
    flatquant_dynamic_quantize,
    flatquant_dynamic_quantize_many,
    get_decompose_dim,
    kronecker_transform,
)

DTYPES = [
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.int8,
    torch.int32,
    torch.int64,
    torch.bool,
    torch.float8_e4m3fn,
]
DEVICES = ["cpu", "meta"] + ([] if NO_GPU else ["cuda"])
EXPECTED = (TypeError, ValueError, NotImplementedError)


class Subclass(Tensor):
    pass


def changed(tensor: Tensor, how: str) -> Tensor:
    """The tensor in another layout or with another property, where it can have it."""
    try:
        return {
            "transposed": lambda: tensor.mT,
            "every other": lambda: tensor[..., ::2],
            "repeated": lambda: tensor[:1].expand(3, *tensor.shape[1:]),
            "requires grad": lambda: tensor.requires_grad_(),
            "parameter": lambda: torch.nn.Parameter(tensor),
            "subclass": lambda: tensor.as_subclass(Subclass),
            "negative view": lambda: torch._neg_view(tensor),
            "sparse": lambda: tensor.to_sparse(),
            "csr": lambda: tensor.to_sparse_csr(),
            "mkldnn": lambda: tensor.to_mkldnn(),
            "nested": lambda: torch.nested.nested_tensor([tensor, tensor]),
            "jagged": lambda: torch.nested.nested_tensor([tensor, tensor], layout=torch.jagged),
            "quantised": lambda: torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8),
            "numpy": lambda: tensor.numpy(),
            "list": lambda: tensor.tolist(),
            "none": lambda: tensor,
        }[how]()
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):
        return tensor


CHANGES = "transposed/every other/repeated/requires grad/parameter/subclass/negative view/sparse"
CHANGES += "/csr/mkldnn/nested/jagged/quantised/numpy/list"


@st.composite
def tensors(draw: st.DrawFn, shapes: st.SearchStrategy[tuple[int, ...]]) -> Any:
    dtype = draw(st.sampled_from(DTYPES[:3] * 3 + DTYPES))
    device = draw(st.sampled_from(["cpu"] * 4 + DEVICES))
    tensor = torch.zeros(draw(shapes), dtype=dtype, device=device)
    how = draw(st.sampled_from(["none"] * 12 + CHANGES.split("/")))
    return changed(tensor, how)


any_shape = st.lists(st.integers(0, 9), max_size=4).map(tuple)
scalars: st.SearchStrategy[Any] = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-(10**400), 10**400),
    st.floats(),
    st.floats().map(numpy.float32),
    st.integers(-(2**31), 2**31 - 1).map(numpy.int32),
    st.fractions(),
    st.decimals(),
    st.complex_numbers(),
    st.text(max_size=9),
    st.binary(max_size=9),
    st.sampled_from(
        [torch.float16, torch.int4, torch.device("cuda", 7), "cuda:99", "cpu:3", "xla"]
    ),
    st.sampled_from(["auto", "sm90", "simt", "reference", Fraction(1, 3), numpy.bool_(True)]),
    st.sampled_from([object(), [], {}, int, len, numpy.ones(3), torch.ones(2), torch.tensor(1.5)]),
)


def right_or(right: st.SearchStrategy[Any], wrong: st.SearchStrategy[Any]) -> Any:
    """Mostly right, so that the checks behind the first one are reached."""
    return st.integers(0, 5).flatmap(lambda n: wrong if n == 0 else right)


anything = scalars | tensors(any_shape)
factors = tensors(st.integers(0, 9).map(lambda n: (n, n)))


def survives(function: Callable[..., Any], *arguments: Any) -> None:
    """Calls it. An error must be of the right type and name one of the function's arguments."""
    COUNTS["fuzzed calls"] += 1
    try:
        function(*arguments)
    except EXPECTED as error:
        COUNTS["fuzzed calls that are refused"] += 1
        names = inspect.signature(function).parameters
        assert any(name in str(error) for name in names), f"names no argument: {error}"


ratios = right_or(st.floats(0.1, 2) | st.floats(0.1, 2).map(torch.tensor), anything)
clips = ratios | st.tuples(ratios, ratios) | st.lists(ratios, max_size=3).map(tuple)


def problems(draw: st.DrawFn) -> tuple[Any, Any, Any]:
    """An input and its factors, mostly right ones."""
    M, N = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    dtype = draw(st.sampled_from(DTYPES[:3]))

    def good(*shape: int) -> st.SearchStrategy[Any]:
        how = st.sampled_from(["none"] * 12 + CHANGES.split("/"))
        return how.map(lambda how: changed(torch.ones(shape, dtype=dtype), how))

    return (
        draw(right_or(good(draw(st.integers(0, 3)), M * N), anything)),
        draw(right_or(good(M, M) | st.none(), anything | factors)),
        draw(right_or(good(N, N) | st.none(), anything | factors)),
    )


@given(st.data())
def test_quantizing_anything(data: st.DataObject) -> None:
    draw = data.draw
    arguments = (
        *problems(draw),
        draw(clips),
        draw(right_or(st.booleans(), scalars)),
        draw(right_or(st.just(False), scalars)),
    )
    kernel = draw(right_or(st.sampled_from(["auto", "reference"]), scalars))

    def quantize(
        input_tensor: Any, left_trans: Any, right_trans: Any, clip_ratio: Any, pack_int32: Any,
        use_cuda: Any, kernel: Any,
    ) -> Any:  # fmt: skip
        return flatquant_dynamic_quantize(
            input_tensor, left_trans, right_trans, clip_ratio, pack_int32, use_cuda, kernel=kernel
        )

    survives(quantize, *arguments, kernel)


@given(st.data())
def test_quantizing_many_of_anything(data: st.DataObject) -> None:
    many = data.draw(right_or(st.lists(clips, max_size=12), anything))
    pack_int32 = data.draw(right_or(st.booleans(), scalars))
    survives(flatquant_dynamic_quantize_many, *problems(data.draw), many, pack_int32, False)


@given(st.data())
def test_transforming_and_fake_quantizing_anything(data: st.DataObject) -> None:
    problem = problems(data.draw)
    out_dtype = data.draw(right_or(st.none() | st.sampled_from(DTYPES[:3]), anything))
    survives(kronecker_transform, *problem, out_dtype, False)

    def fake(
        input_tensor: Any, left_trans: Any, right_trans: Any, clip_ratio: Any, invert: Any,
        out_dtype: Any,
    ) -> Any:  # fmt: skip
        return fake_quantize(
            input_tensor, left_trans, right_trans, clip_ratio, invert=invert,
            out_dtype=out_dtype, use_cuda=False,
        )  # fmt: skip

    invert = data.draw(right_or(st.booleans(), scalars))
    survives(fake, *problem, data.draw(clips), invert, out_dtype)


@given(
    right_or(tensors(any_shape), anything),
    right_or(tensors(any_shape), anything),
    right_or(st.booleans(), scalars),
    right_or(st.sampled_from(DTYPES), scalars),
)
def test_dequantizing_anything(quantized: Any, scales: Any, packed: Any, dtype: Any) -> None:
    survives(dequantize_int4, quantized, scales, packed, dtype)


@given(
    st.lists(st.integers(1, 4), max_size=3),
    st.booleans(),
    right_or(st.sampled_from([torch.float32, torch.float16]), scalars),
)
def test_dequantizing_codes_of_any_shape(shape: list[int], packed: bool, dtype: Any) -> None:
    quantized = torch.ones(*shape, 2, dtype=torch.int32 if packed else torch.int8)
    survives(dequantize_int4, quantized, torch.ones(shape), packed, dtype)


@given(
    right_or(st.integers(1, 2**70), anything),
    right_or(st.integers(1, 300), anything),
    right_or(st.sampled_from(DTYPES[:3]), anything),
    right_or(st.sampled_from([None, "cpu", "cuda", 0, -1, 2**70]), anything),
)
def test_asking_for_the_kernels_of_anything(M: Any, N: Any, dtype: Any, device: Any) -> None:
    survives(available_kernels, M, N, dtype, device)


@given(right_or(st.integers(-(2**70), 10**9), anything))
def test_decomposing_anything(n: Any) -> None:
    if isinstance(n, int) and n > 10**12:
        n = -n  # a large prime takes its square root of steps
    survives(get_decompose_dim, n)


# ------------------------------------------------------------------------ the operator, past Python

X, LEFT, RIGHT = (torch.ones(shape) for shape in ((3, 24), (4, 4), (6, 6)))

WRONG = [
    # what is wrong, the arguments changed, the operator's message
    ("input's dtype", {"input": X.double()}, "input must be float16, .*, got Double"),
    ("input's device", {"input": X.cpu()}, "CUDA tensor"),
    ("no square", {"left_trans": LEFT[:2]}, r"left_trans must be a square .*got shape \(2, 4\)"),
    ("a vector", {"right_trans": RIGHT[0]}, r"right_trans must be a square .*got shape \(6\)"),
    ("transposed", {"left_trans": LEFT.T}, r"left_trans must be contiguous, got strides \(1, 4\)"),
    ("factor's dtype", {"right_trans": RIGHT.half()}, "dtype of input, Float, got Half"),
    ("features", {"input": X[:, :20]}, r"input has 20 features, the factors 4 \* 6"),
    ("strides", {"input": torch.ones(3, 48)[:, ::2]}, r"last dimension, got strides \(48, 2\)"),
    ("batches", {"input": torch.ones(2, 5, 24)[:, :3]}, r"one stride, got shape \(2, 3, 24\)"),
    ("packing", {"input": torch.ones(3, 12), "left_trans": LEFT[:2, :2].clone()}, "got 12"),
    ("clip_ratio", {"clip_ratio": 1e-60}, "clip_ratio must be .* got 1e-60"),
    ("kernel", {"kernel_name": "sm91"}, "kernel 'sm91' does not serve 3 tokens of 4 x 6 float32"),
]


@pytest.mark.skipif(bool(NO_GPU), reason=NO_GPU)
@pytest.mark.parametrize("what, wrong, message", WRONG, ids=[what for what, *_ in WRONG])
def test_the_operator_names_what_it_got(what: str, wrong: dict[str, Any], message: str) -> None:
    arguments = {"input": X, "left_trans": LEFT, "right_trans": RIGHT, "pack_int32": True, **wrong}
    arguments = {  # .to() would make a transposed or strided tensor contiguous
        name: torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda")
        if isinstance(value, Tensor)
        else value
        for name, value in arguments.items()
    }
    if what == "input's device":
        # The factors decide that the CUDA implementation is asked.
        arguments["input"] = X
    with pytest.raises((RuntimeError, ValueError), match=message):
        torch.ops.flatquant.dynamic_quantize(**arguments)


@pytest.mark.skipif(bool(NO_GPU), reason=NO_GPU)
@given(st.data())
def test_the_operator_survives_anything(data: st.DataObject) -> None:
    draw = data.draw
    M, N, dtype = draw(st.integers(1, 9)), draw(st.integers(1, 9)), draw(st.sampled_from(DTYPES))
    strange = tensors(any_shape)
    x = torch.ones(draw(st.integers(0, 3)), M * N, device="cuda").to(dtype)
    arguments = (
        draw(right_or(st.just(x), strange)),
        draw(right_or(st.just(torch.ones(M, M, device="cuda").to(dtype)), strange)),
        draw(right_or(st.just(torch.ones(N, N, device="cuda").to(dtype)), strange)),
        draw(st.floats()),
        draw(st.booleans()),
        draw(st.sampled_from(["auto", "simt", "sm90", "", "reference"])),
    )
    COUNTS["fuzzed calls of the operator"] += 1
    try:
        torch.ops.flatquant.dynamic_quantize(*arguments)
    except (*EXPECTED, RuntimeError):
        COUNTS["fuzzed calls of the operator that are refused"] += 1
    torch.cuda.synchronize()  # an error of the device would come out here
