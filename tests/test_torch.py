"""The operator under torch's tracers: opcheck, fake tensors, torch.compile, torch.export."""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from problems import DTYPES, NO_GPU, dtype_name, exact_problem, float64, random_problem
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode

from flatquant import (
    accuracy,
    available_kernels,
    fake_quantize,
    flatquant_dynamic_quantize,
    flatquant_dynamic_quantize_many,
    kronecker_transform,
    ops,
    reference,
)

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(bool(NO_GPU), reason=NO_GPU))]

operator = torch.ops.flatquant.dynamic_quantize
many = torch.ops.flatquant.dynamic_quantize_many
transform = torch.ops.flatquant.kronecker_transform


def equal(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("pack_int32", [False, True])
@pytest.mark.parametrize("case", ["rows", "no tokens", "one token", "batches", "strided rows"])
def test_opcheck_passes(case: str, pack_int32: bool, dtype: torch.dtype, device: str) -> None:
    x, left, right = random_problem(8, 16, 6, dtype, device)
    x = {
        "rows": x,
        "no tokens": x[:0],
        "one token": x[0],
        "batches": x.view(2, 3, 128),
        "strided rows": torch.cat((x, x), dim=1).view(2, 3, 256)[..., :128],
    }[case]
    torch.library.opcheck(operator.default, (x, left, right, 0.9, pack_int32))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("factors", ["both", "left", "right", "none"])
def test_opcheck_passes_for_many_and_the_transform(
    factors: str, dtype: torch.dtype, device: str
) -> None:
    x, left, right = random_problem(8, 16, 6, dtype, device)
    x = torch.cat((x, x), dim=1).view(2, 3, 256)[..., :128]
    problem = (
        x,
        left if factors in ("both", "left") else None,
        right if factors in ("both", "right") else None,
    )
    ratios = [torch.tensor(0.9, device=device), torch.tensor([0.8], device=device)]
    torch.library.opcheck(many.default, (*problem, [0.9, 0.9, 1.0, 0.5], [], True))
    # The same tensor twice, and one output.
    torch.library.opcheck(many.default, (*problem, [0.0] * 4, [*ratios, *ratios[::-1]], False))
    torch.library.opcheck(many.default, (*problem, [0.0, 0.5, 1.0, 0.0], ratios, False))
    torch.library.opcheck(many.default, (x[0, 0], *problem[1:], [0.0] * 2, ratios[:1] * 2, False))
    if factors != "none":
        torch.library.opcheck(transform.default, (*problem, torch.float32))
        torch.library.opcheck(transform.default, (x.new_empty(0, 128), *problem[1:], torch.half))


def test_the_new_operators_run_the_reference_on_cpu_tensors() -> None:
    problem = random_problem(8, 16, 5, torch.bfloat16)
    first, second = (reference.dynamic_quantize(*problem, c, True) for c in ((0.9, 0.5), 1.0))
    ratios = [torch.tensor(c) for c in (0.9, 0.5, 1.0, 1.0)]
    for kernel in ("auto", "reference"):
        assert equal(many(*problem, [0.9, 0.5, 1.0, 1.0], [], True, kernel), (*first, *second))
        assert equal(many(*problem, [0.0] * 4, ratios, True, kernel), (*first, *second))
        mixed = many(*problem, [0.9, 0.0, 0.0, 1.0], ratios[1:3], True, kernel)
        assert equal(mixed, (*first, *second))
        expected = reference.transform(*problem)
        assert torch.equal(transform(*problem, torch.float16, kernel), expected.half())
    with pytest.raises(ValueError, match="kernel_name must be 'auto' or 'reference'.*got 'simt'"):
        many(*problem, [1.0, 1.0], [], False, "simt")
    with pytest.raises(ValueError, match="kernel_name must be 'auto' or 'reference'.*got 'simt'"):
        transform(*problem, torch.float32, "simt")


def test_the_operators_know_two_precisions_of_float32() -> None:
    problem = random_problem(8, 16, 5, torch.float32)
    for precision in ("highest", "high"):
        expected = reference.dynamic_quantize(*problem, 1.0, False)
        assert equal(operator(*problem, 1.0, False, "auto", precision), expected)
    for call in (
        lambda: operator(*problem, 1.0, False, "auto", "medium"),
        lambda: many(*problem, [1.0, 1.0], [], False, "auto", "medium"),
        lambda: transform(*problem, torch.float32, "auto", "medium"),
    ):
        with pytest.raises(ValueError, match="must be 'highest' or 'high', got 'medium'"):
            call()


def test_importing_flatquant_does_not_import_the_compiler() -> None:
    """It takes most of a second."""
    program = (
        "import sys, torch\n"
        "before = 'torch._dynamo' in sys.modules\n"
        "import flatquant\n"
        "assert before or 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.fixture
def float32_precision() -> Iterator[None]:
    """Sets torch's precision of float32 products back after the test."""
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.usefixtures("float32_precision")
def test_the_precision_of_float32_is_torchs_at_the_call() -> None:
    def scaled(x: torch.Tensor) -> torch.Tensor:
        return x * (3 if ops._float32_precision(x.dtype) == "high" else 2)

    compiled = torch.compile(scaled, fullgraph=True, backend="eager")
    one, half = torch.ones(1), torch.ones(1, dtype=torch.float16)
    for setting, factor in (("highest", 2), ("high", 3), ("medium", 3), ("highest", 2)):
        torch.set_float32_matmul_precision(setting)
        assert compiled(one).item() == scaled(one).item() == factor
        assert compiled(half).item() == scaled(half).item() == 2  # 16 bits have no such choice
    # The newer interface, which torch does not let one mix with the older everywhere.
    for name, factor in (("tf32", 3), ("ieee", 2)):
        torch.backends.cuda.matmul.fp32_precision = name
        assert scaled(one).item() == factor


@pytest.mark.usefixtures("float32_precision")
def test_available_kernels_asks_by_the_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def kernel_names(*arguments: Any) -> str:
        asked.append(arguments)
        return "simt"

    monkeypatch.setattr(ops, "CUDA_AVAILABLE", True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 9))
    monkeypatch.setattr(torch.ops.flatquant, "kernel_names", kernel_names, raising=False)
    for setting in ("highest", "high", "medium"):
        torch.set_float32_matmul_precision(setting)
        for dtype in DTYPES:
            assert available_kernels(64, 80, dtype, "cuda") == ["simt", "reference"]
            is_high = dtype == torch.float32 and setting != "highest"
            assert asked.pop() == (64, 80, dtype, 89, "high" if is_high else "highest")


@pytest.mark.skipif(bool(NO_GPU), reason=NO_GPU)
@pytest.mark.usefixtures("float32_precision")
@pytest.mark.parametrize(
    "M, N", [(24, 24), (64, 64), (56, 128), (112, 128), (61, 50), (128, 148), (128, 224)]
)
def test_tf32_is_as_accurate_as_it_may_be_and_as_fresh_as_the_setting(M: int, N: int) -> None:
    problem = random_problem(M, N, 200, torch.float32, "cuda")
    exact = float64(problem)

    def both(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        codes, _ = flatquant_dynamic_quantize(x, *problem[1:])
        return codes, kronecker_transform(x, *problem[1:])

    compiled = torch.compile(both, fullgraph=True)
    found = []
    for setting, tolerance in (("highest", None), ("high", accuracy.TF32)):
        torch.set_float32_matmul_precision(setting)
        output = flatquant_dynamic_quantize(*problem)
        result = accuracy.compare(*output, exact, 1.0, torch.float32, tolerance=tolerance)
        assert result.ok, f"{setting}: {result}"
        eager = both(problem.input)
        assert equal(compiled(problem.input), eager), setting
        assert torch.equal(eager[0], output[0]), setting
        found.append(eager[1])
        names = available_kernels(M, N, torch.float32)[:-1]
        for kernel in names:
            output = flatquant_dynamic_quantize(*problem, kernel=kernel)
            result = accuracy.compare(*output, exact, 1.0, torch.float32, tolerance=tolerance)
            assert result.ok, f"{kernel}, {setting}: {result}"
    if names[0] != "simt":
        assert not torch.equal(*found), "TF32 was allowed and not used"


@pytest.mark.skipif(bool(NO_GPU), reason=NO_GPU)
@pytest.mark.usefixtures("float32_precision")
@pytest.mark.parametrize("M, N", [(64, 64), (86, 128), (61, 50)])
def test_tf32_with_several_outputs_missing_factors_and_special_tokens(M: int, N: int) -> None:
    torch.set_float32_matmul_precision("high")
    x, left, right = random_problem(M, N, 70, torch.float32, "cuda")
    clips = [(0.9, 0.8), 1.0]
    for kernel in available_kernels(M, N, torch.float32)[:-1]:
        tolerance = None if kernel == "simt" else accuracy.TF32
        for factors in ((left, right), (None, right), (left, None)):
            exact = reference.transform(x, *factors, torch.float64)
            outputs = flatquant_dynamic_quantize_many(x, *factors, clips, kernel=kernel)
            for clip, output in zip(clips, outputs, strict=True):
                result = accuracy.compare(*output, exact, clip, torch.float32, tolerance=tolerance)
                assert result.ok, f"{kernel}, {clip}: {result}"
            special = x.clone()
            special[3, 5], special[40, 6], special[41] = torch.nan, torch.inf, 0.0
            others = [token for token in range(70) if token not in (3, 40, 41)]
            found = flatquant_dynamic_quantize_many(special, *factors, clips, kernel=kernel)
            for (codes, scales), (clean_codes, clean_scales) in zip(found, outputs, strict=True):
                assert scales[3].isnan() and not scales[40].isfinite() and scales[41] == 1.0
                assert not codes[[3, 40, 41]].any()
                assert torch.equal(codes[others], clean_codes[others])
                assert torch.equal(scales[others], clean_scales[others])


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_new_operators_refuse_what_the_public_functions_refuse(device: str) -> None:
    x, left, right = (torch.empty(n, n, device=device) for n in (16, 4, 4))
    ratio = torch.ones((), device=device)
    for numbers in ([], [1.0], [1.0] * 18, [0.0] * 18):
        message = f"clip_ratios must hold 1 to 8 pairs, got {len(numbers)} numbers"
        with pytest.raises(ValueError, match=message):
            many(x, left, right, numbers, [ratio] * len(numbers))
    for numbers, tensors in (([1.0, 1.0], [ratio]), ([1.0, 0.0], []), ([0.0, 0.0], [ratio])):
        message = f"one for each 0 in clip_ratios, {numbers.count(0.0)}, got {len(tensors)}"
        with pytest.raises(ValueError, match=message):
            many(x, left, right, numbers, tensors)
    with pytest.raises(ValueError, match="clip_ratios must be finite and > 0"):
        many(x, left, right, [1.0, -1.0], [])
    with pytest.raises(TypeError, match="device_clip_ratios must hold one torch.float32"):
        many(x, left, right, [0.0, 0.0], [ratio, ratio.half()])
    with pytest.raises(ValueError, match="left_trans must be a square matrix"):
        many(x, left[:3], None, [1.0, 1.0], [])
    with pytest.raises(ValueError, match="multiple of 4 features"):
        transform(x[:, :15], None, right, torch.float32)
    with pytest.raises(ValueError, match="must not both be None"):
        transform(x, None, None, torch.float32)
    with pytest.raises(TypeError, match="out_dtype must be .*, got torch.float64"):
        transform(x, left, right, torch.float64)


def test_the_operator_runs_the_reference_on_cpu_tensors() -> None:
    problem = random_problem(8, 16, 5, torch.bfloat16)
    expected = reference.dynamic_quantize(*problem, 0.9, True)
    for kernel in ("auto", "reference"):
        assert equal(operator(*problem, 0.9, True, kernel), expected)
    assert equal(operator(*problem), reference.dynamic_quantize(*problem))


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    "shape, strides, left_shape, clip_ratio, message",
    [
        ((2, 24), (24, 1), (4, 4), 1.0, "input_tensor must have M \\* N = 4 \\* 4 = 16 features"),
        ((2, 16), (32, 2), (4, 4), 1.0, "one stride between tokens"),
        ((2, 16), (16, 1), (3, 4), 1.0, "left_trans must be a square matrix"),
        ((2, 16), (16, 1), (4, 4), -1.0, "clip_ratio must be finite"),
    ],
)
def test_the_operator_refuses_what_the_public_function_refuses(
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    left_shape: tuple[int, ...],
    clip_ratio: float,
    message: str,
    device: str,
) -> None:
    x = torch.empty_strided(shape, strides, device=device)
    left, right = torch.empty(left_shape, device=device), torch.empty(4, 4, device=device)
    with pytest.raises(ValueError, match=message):
        operator(x, left, right, clip_ratio)


def test_the_operator_refuses_a_cuda_kernel_for_cpu_tensors() -> None:
    problem = random_problem(4, 4, 2, torch.float16)
    with pytest.raises(ValueError, match="kernel_name must be 'auto' or 'reference'.*got 'simt'"):
        operator(*problem, 1.0, False, "simt")


@pytest.mark.parametrize("pack_int32", [False, True])
def test_fake_cuda_tensors_go_through_the_public_function(
    monkeypatch: pytest.MonkeyPatch, pack_int32: bool
) -> None:
    monkeypatch.setattr(ops, "EXTENSION_LOADED", True)
    with FakeTensorMode():
        x = torch.empty(2, 3, 128, dtype=torch.float16, device="cuda")
        left = torch.empty(8, 8, dtype=torch.float16, device="cuda")
        right = torch.empty(16, 16, dtype=torch.float16, device="cuda")
        quantized, scales = flatquant_dynamic_quantize(x, left, right, 1.0, pack_int32)
    expected = (torch.int32, (2, 3, 16)) if pack_int32 else (torch.int8, (2, 3, 128))
    assert (quantized.dtype, quantized.shape) == expected
    assert (scales.dtype, scales.shape) == (torch.float32, (2, 3))
    assert quantized.device.type == scales.device.type == "cuda"
    assert quantized.is_contiguous() and scales.is_contiguous()


def public(x: Tensor, left: Tensor, right: Tensor, clip_ratio: float) -> tuple[Tensor, Tensor]:
    use_cuda = x.device.type == "cuda"
    quantized, scales = flatquant_dynamic_quantize(x * 2, left, right, clip_ratio, True, use_cuda)
    return quantized + 1, scales * 2


def direct(x: Tensor, left: Tensor, right: Tensor, clip_ratio: float) -> tuple[Tensor, Tensor]:
    # kernel_name is left at its default on purpose: a compiler may fill it in by name.
    quantized, scales = operator(x * 2, left, right, clip_ratio, True)
    return quantized + 1, scales * 2


def public_many(x: Tensor, left: Tensor, right: Tensor, clip_ratio: float) -> tuple[Tensor, ...]:
    use_cuda = x.device.type == "cuda"
    clips = [1.0, (clip_ratio, 1.0), clip_ratio, 1.0]
    outputs = flatquant_dynamic_quantize_many(x * 2, left, None, clips, True, use_cuda)
    y = kronecker_transform(x, None, right, torch.float32, use_cuda)
    return (*(tensor + 1 for output in outputs for tensor in output), y * 2)


def public_tensors(x: Tensor, left: Tensor, right: Tensor, clip_ratio: float) -> Any:
    use_cuda = x.device.type == "cuda"
    ratio = left.float().abs().amax() / 4 + clip_ratio
    outputs = flatquant_dynamic_quantize_many(
        x * 2, left, right, [ratio, (clip_ratio, ratio), (ratio, ratio)], True, use_cuda
    )
    plain = fake_quantize(x, None, None, (ratio, 1.0), use_cuda=use_cuda)
    return (*(tensor + 1 for output in outputs for tensor in output), plain)


BACKENDS = [
    "aot_eager",
    pytest.param(
        "inductor",
        marks=pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs g++"),
    ),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("function", [public, direct, public_many, public_tensors])
def test_compiled_functions_take_changing_token_counts_without_recompiling(
    function: Any, backend: str, device: str
) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=backend)
    # Integers, so that compiled and uncompiled products are equal whatever their order.
    left, right = (torch.randint(-2, 3, (n, n), device=device).half() for n in (8, 16))

    def check(tokens: int, clip_ratio: float) -> None:
        x = torch.randint(-4, 5, (tokens, 128), device=device).half()
        expected = function(x, left, right, clip_ratio)
        assert equal(compiled(x, left, right, clip_ratio), expected), tokens

    check(5, 0.9)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for tokens, clip_ratio in ((17, 0.9), (2, 0.9), (1000, 0.9)):
            check(tokens, clip_ratio)
    # Torch specialises sizes 0 and 1 and may specialise floats; the results stay right.
    for tokens, clip_ratio in ((1, 0.9), (0, 0.9), (3, 0.5)):
        check(tokens, clip_ratio)


@pytest.mark.parametrize("device", DEVICES)
def test_a_compiled_function_may_choose_its_tokens_by_a_mask(device: str) -> None:
    torch._dynamo.reset()

    def chosen(x: Tensor, mask: Tensor, left: Tensor, right: Tensor) -> Any:
        return operator(x[mask], left, right)

    problem = random_problem(8, 16, 9, torch.float16, device)
    compiled = torch.compile(chosen, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        for mask in (torch.arange(9) % 2 == 0, torch.arange(9) < 0):
            mask = mask.to(device)
            expected = chosen(problem.input, mask, *problem[1:])
            assert equal(compiled(problem.input, mask, *problem[1:]), expected)


class Quantizer(torch.nn.Module):
    def __init__(self, left: Tensor, right: Tensor) -> None:
        super().__init__()
        self.register_buffer("left", left)
        self.register_buffer("right", right)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return operator(x, self.left, self.right, 0.9, True)


class ManyQuantizer(Quantizer):
    def __init__(self, left: Tensor, right: Tensor) -> None:
        super().__init__(left, right)
        self.register_buffer("ratio", torch.full((1,), 0.7, device=left.device))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        ratios = [self.ratio, self.ratio, self.ratio, self.ratio]
        return (
            *many(x, self.left, self.right, [0.9, 0.8, 1.0, 1.0], [], True),
            *many(x, None, self.right, [0.0] * 4, ratios),
            *many(x, self.left, None, [0.0, 0.5], ratios[:1]),
            transform(x, self.left, None, torch.bfloat16),
        )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", [Quantizer, ManyQuantizer])
def test_an_exported_program_survives_saving_and_takes_any_token_count(
    kind: type[Quantizer], device: str
) -> None:
    problem = random_problem(8, 16, 6, torch.float16, device)
    module = kind(*problem[1:])
    tokens = torch.export.Dim("tokens", min=0)
    program = torch.export.export(module, (problem.input,), dynamic_shapes=({0: tokens},))
    assert "flatquant.dynamic_quantize" in str(program.graph)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for x in (problem.input, problem.input[:1], problem.input[:0], problem.input.repeat(50, 1)):
        assert equal(loaded(x), module(x))


# ------------------------------------------------------------------ modes, gradients and subclasses


@pytest.mark.skipif(bool(NO_GPU), reason=NO_GPU)
def test_opcheck_passes_for_the_operators_without_tensors() -> None:
    # All of opcheck but test_aot_dispatch_dynamic, which compares tensors and cannot compare a str.
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    names = torch.ops.flatquant.kernel_names.default
    torch.library.opcheck(names, (64, 64, torch.float16, 90), test_utils=checks)
    torch.library.opcheck(names, (64, 64, torch.float32, 90, "high"), test_utils=checks)
    with pytest.raises(RuntimeError, match="must be 'highest' or 'high', got 'medium'"):
        names(64, 64, torch.float32, 90, "medium")
    torch.library.opcheck(torch.ops.flatquant.cuda_archs.default, (), test_utils=checks)


def quantized(*problem: Tensor) -> tuple[Tensor, Tensor]:
    return flatquant_dynamic_quantize(*problem, 0.9, True, problem[0].device.type == "cuda")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("function", [quantized, operator])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_inference_mode_and_autocast_change_nothing(
    dtype: torch.dtype, function: Any, device: str
) -> None:
    problem = random_problem(8, 16, 6, dtype, device)
    expected = function(*problem)
    with torch.inference_mode():
        assert equal(function(*problem), expected)
        inference_tensors = [tensor.clone() for tensor in problem]
    assert equal(function(*inference_tensors), expected)
    for lower in (torch.float16, torch.bfloat16):
        with torch.autocast(device, lower):
            assert equal(function(*problem), expected)
            assert (problem.input @ problem.input.mT).dtype == lower, "autocast was not on"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["input_tensor", "left_trans", "right_trans"])
def test_what_requires_a_gradient_is_refused_while_gradients_are_recorded(
    name: str, device: str
) -> None:
    # Exact numbers: whether a gradient is required decides how torch folds a matrix product.
    problem = exact_problem(8, 16, 6, torch.float32, device=device).problem
    expected = quantized(*problem)
    problem[["input_tensor", "left_trans", "right_trans"].index(name)].requires_grad_()
    with pytest.raises(NotImplementedError, match=rf"{name} must not require a gradient.*no_grad"):
        quantized(*problem)
    with torch.no_grad():
        assert equal(quantized(*problem), expected)


@pytest.mark.parametrize("device", DEVICES)
def test_a_lazily_negated_tensor_is_negated(device: str) -> None:
    x, left, right = random_problem(8, 16, 6, torch.float16, device)
    assert torch._neg_view(x).is_neg()
    assert equal(quantized(torch._neg_view(x), left, right), quantized(-x, left, right))


@pytest.mark.parametrize("device", DEVICES)
def test_subclasses_go_through_their_own_dispatch(device: str) -> None:
    """By inheritance alone, and as a wrapper that computes on two tensors at once."""

    class Plain(Tensor):
        pass

    x, left, right = random_problem(8, 16, 6, torch.float16, device)
    expected = operator(x, left, right)
    codes, scales = operator(x.as_subclass(Plain), left, right)
    assert isinstance(codes, Plain) and isinstance(scales, Plain)
    assert equal((codes.as_subclass(Tensor), scales.as_subclass(Tensor)), expected)

    pairs = [TwoTensor(tensor, tensor.clone()) for tensor in (x, left, right)]
    codes, scales = operator(*pairs)
    for half in ("a", "b"):
        assert equal((getattr(codes, half), getattr(scales, half)), expected)


@pytest.mark.parametrize("device", DEVICES)
def test_a_dispatch_mode_sees_the_operator(device: str) -> None:
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    problem = random_problem(8, 16, 6, torch.float16, device)
    expected = operator(*problem)
    with Watch():
        assert equal(operator(*problem), expected)
    assert operator.default in seen
