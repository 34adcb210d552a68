"""Fitting a layer's transform: it must help, be invertible and repeatable."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from problems import NO_GPU
from torch import Tensor

from flatquant import calibrate, dequantize_int4, flatquant_dynamic_quantize, reference
from flatquant.sample import inverse_transform

FEATURES = 48  # 6 x 8


@pytest.fixture
def samples() -> Tensor:
    """Correlated tokens with two outlier channels."""
    mixing = torch.randn(FEATURES, FEATURES) / FEATURES**0.5
    x = torch.randn(300, FEATURES) @ mixing
    x[:, [5, 31]] *= 30
    return x


@pytest.fixture
def weight() -> Tensor:
    return torch.randn(40, FEATURES) / FEATURES**0.5


def relative_error(approximation: Tensor, exact: Tensor) -> float:
    errors = (approximation - exact).square().sum(-1) / exact.square().sum(-1)
    return errors.mean().item()


def test_the_error_of_the_input_is_that_of_the_operator(samples: Tensor) -> None:
    fit = calibrate(samples, steps=100)
    quantized, scales = flatquant_dynamic_quantize(
        samples, fit.left, fit.right, fit.clip_ratio, use_cuda=False
    )
    decoded = dequantize_int4(quantized, scales)
    restored = inverse_transform(decoded, fit.left, fit.right).float()
    error = relative_error(restored, samples)
    assert error == pytest.approx(fit.error_after, rel=0.02)
    codes, scales = reference.quantize(samples)
    before = relative_error(dequantize_int4(codes, scales), samples)
    assert before == pytest.approx(fit.error_before, rel=1e-4)


def test_the_error_of_the_output_is_that_of_the_layer(samples: Tensor, weight: Tensor) -> None:
    fit = calibrate(samples, weight, steps=100)
    activation = fit.activation()
    codes, weight_scales = reference.quantize(activation.transform_weight(weight))
    x = dequantize_int4(*activation(samples))
    output = x @ dequantize_int4(codes, weight_scales).T
    error = relative_error(output, samples @ weight.T)
    assert error == pytest.approx(fit.error_after, rel=0.02)


@pytest.mark.parametrize("weighted", [False, True])
def test_fitting_beats_plain_int4_and_a_rotation(
    samples: Tensor, weight: Tensor, weighted: bool
) -> None:
    target = weight if weighted else None
    fit = calibrate(samples, target, steps=200)
    assert fit.error_after < 0.3 * fit.error_before
    # One step at no learning rate to speak of: the random rotations it starts from.
    start = calibrate(samples, target, steps=1, lr=1e-9)
    assert fit.error_after < 0.9 * start.error_after


@pytest.mark.parametrize("lr", [1.0, 10.0])
def test_factors_are_well_conditioned(samples: Tensor, lr: float) -> None:
    fit = calibrate(samples, steps=100, lr=lr)  # far too fast
    for factor, size in ((fit.left, 6), (fit.right, 8)):
        assert factor.shape == (size, size) and factor.dtype == torch.float32
        assert torch.linalg.cond(factor) <= math.exp(2) * 1.001
    assert math.isfinite(fit.error_after)
    for ratio in fit.clip_ratio:
        assert ratio.shape == (1,) and ratio.dtype == torch.float32 and 0 < ratio <= 1


def test_same_seed_same_result(samples: Tensor, weight: Tensor) -> None:
    first, again, other = (calibrate(samples, weight, steps=5, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.left, again.left) and torch.equal(first.right, again.right)
    assert first.clip_logits == again.clip_logits
    assert not torch.equal(first.left, other.left)


def test_left_size_and_leading_dimensions(samples: Tensor) -> None:
    fit = calibrate(samples.view(3, 100, FEATURES), left_size=3, steps=2)
    assert (len(fit.left), len(fit.right)) == (3, 16)
    flat = calibrate(samples, left_size=3, steps=2)
    assert torch.equal(fit.left, flat.left)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_it_runs_where_gradients_are_off(mode: type, samples: Tensor, weight: Tensor) -> None:
    expected = calibrate(samples, weight, steps=3)
    with mode():
        fit = calibrate(samples.clone(), weight.clone(), steps=3)
    assert torch.equal(fit.left, expected.left)
    assert not fit.left.requires_grad and not fit.clip_logits[0].requires_grad


def test_what_is_set_for_other_code_changes_nothing(
    samples: Tensor, weight: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = calibrate(samples, weight, steps=3)

    def check() -> None:
        fit = calibrate(samples, weight, steps=3)
        assert torch.equal(fit.left, expected.left) and torch.equal(fit.right, expected.right)
        for ours, theirs in zip(fit.clip_logits, expected.clip_logits, strict=True):
            assert ours.dtype == torch.float32 and torch.equal(ours, theirs)
        assert fit.error_after == expected.error_after

    with torch.autocast("cpu", torch.bfloat16):
        check()
    with torch.device("meta"):
        check()
    for dtype in (torch.float64, torch.float16):
        torch.set_default_dtype(dtype)
        try:
            check()
        finally:
            torch.set_default_dtype(torch.float32)


def test_a_fit_whose_error_is_not_finite_is_refused(samples: Tensor) -> None:
    with pytest.raises(ValueError, match="x_samples and weight must be small enough.*lr=0.01"):
        calibrate(1e30 * samples, steps=1)


@pytest.mark.skipif(bool(NO_GPU), reason=NO_GPU)
def test_it_fits_on_a_gpu_what_the_kernels_quantise(samples: Tensor, weight: Tensor) -> None:
    samples, weight = samples.cuda(), weight.cuda()
    fit = calibrate(samples, weight, steps=100)
    assert fit.left.is_cuda and fit.clip_logits[0].is_cuda
    assert fit.error_after < 0.5 * fit.error_before
    activation = fit.activation()
    codes, weight_scales = reference.quantize(activation.transform_weight(weight))
    x = dequantize_int4(*activation(samples))
    error = relative_error(x @ dequantize_int4(codes, weight_scales).T, samples @ weight.T)
    assert error == pytest.approx(fit.error_after, rel=0.02)
    activation.half()(samples.half())


def test_arguments_are_left_alone(samples: Tensor, weight: Tensor) -> None:
    weight.requires_grad_()
    kept = samples.clone()
    calibrate(samples, weight, steps=2)
    assert torch.equal(samples, kept) and weight.grad is None


def test_tokens_of_zeros_do_no_harm(samples: Tensor, weight: Tensor) -> None:
    samples[::2] = 0
    for target in (None, weight):
        fit = calibrate(samples, target, steps=20)
        assert math.isfinite(fit.error_after) and torch.isfinite(fit.left).all()


def test_the_progress_bar(
    samples: Tensor, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calibrate(samples, steps=3)
    assert capsys.readouterr().err == ""  # no terminal
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    calibrate(samples, steps=3, progress=False)
    assert capsys.readouterr().err == ""
    calibrate(samples, steps=3)
    assert "3/3 error" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"x_samples": [1.0]}, TypeError, "x_samples must be a torch.Tensor"),
        ({"x_samples": torch.ones(3, 48).int()}, TypeError, "x_samples must be floating-point"),
        ({"x_samples": torch.ones(0, 48)}, ValueError, "x_samples must be"),
        ({"x_samples": torch.full((3, 48), math.nan)}, ValueError, "x_samples must be finite"),
        ({"weight": torch.ones(4, 47)}, ValueError, r"weight must be \[out, 48\], got \(4, 47\)"),
        ({"weight": torch.full((4, 48), math.inf)}, ValueError, "weight must be finite"),
        ({"weight": torch.ones(4, 48).int()}, TypeError, "weight must be floating-point"),
        ({"weight": torch.ones(4, 48, device="meta")}, ValueError, "weight must be on the device"),
        ({"left_size": 5}, ValueError, "left_size must divide the 48 features, got 5"),
        ({"left_size": 6.0}, TypeError, "left_size must be an int"),
        ({"steps": 0}, ValueError, "steps must be at least 1, got 0"),
        ({"steps": True}, TypeError, "steps must be an int"),
        ({"lr": 0.0}, ValueError, "lr must be finite and > 0, got 0.0"),
        ({"lr": "a"}, TypeError, "lr must be a real number, got 'a' of type str"),
        ({"seed": 1.0}, TypeError, "seed must be an int"),
        ({"progress": "yes"}, TypeError, "progress must be a bool"),
    ],
)
def test_wrong_arguments(
    samples: Tensor, arguments: dict, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        calibrate(**{"x_samples": samples, **arguments})
