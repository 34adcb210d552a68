"""Fits the transform and the clipping of one linear layer to samples of its input.

A simple recipe for one layer at a time: it needs neither the model nor the layers around it.
FlatQuant's own training (Sun et al., 2024, arXiv:2410.09426) fits the transforms of a whole
transformer block together, to the block's output.
"""

import math
import numbers
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ._checks import check_flag, check_float, check_int
from .decompose import get_decompose_dim
from .models import FlatQuantActivation, clip_ratio_from_logits
from .reference import _without_autocast
from .sample import random_orthogonal

# Singular values of a factor lie between exp(-1) and exp(1): its condition number is at most
# exp(2) = 7.4, so that float16 holds it and rounding it costs nothing.
_LARGEST_LOG_SCALE = 1.0
_INITIAL_CLIP_LOGIT = 4.0  # FlatQuant's: a ratio of 0.982
_LEAST_CLIP_LOGIT = -4.0  # a ratio of 0.018; towards 0 what is divided by the scale overflows
_CLIP_LEARNING_RATE = 10.0  # times that of the factors, as in FlatQuant
_BATCH_TOKENS, _BATCH_ROWS = 128, 512  # of the samples and of the weight, drawn for each step


@dataclass(frozen=True, eq=False)  # tensors have no one truth value
class Calibration:
    """What :func:`calibrate` found for one layer.

    Attributes:
        left: float32 ``[M, M]``, invertible.
        right: float32 ``[N, N]``, invertible.
        clip_logits: FlatQuant's ``clip_factor_a_max`` and ``clip_factor_a_min``, float32 ``[1]``.
        error_before: relative squared error with neither transform nor clipping, the mean over
            the tokens: of the layer's output if a weight was given, else of the input.
        error_after: the same with the fitted transform and clipping.
    """

    left: Tensor
    right: Tensor
    clip_logits: tuple[Tensor, Tensor]
    error_before: float
    error_after: float

    @property
    def clip_ratio(self) -> tuple[Tensor, Tensor]:
        """The ratios for ``clip_ratio=`` of the operator: (max side, min side), float32 ``[1]``."""
        return clip_ratio_from_logits(*self.clip_logits)

    def activation(self, *, pack_int32: bool = False) -> FlatQuantActivation:
        """The module that quantises the layer's input."""
        return FlatQuantActivation(self.left, self.right, self.clip_logits, pack_int32=pack_int32)


def calibrate(
    x_samples: Tensor,
    weight: Tensor | None = None,
    *,
    left_size: int | None = None,
    steps: int = 200,
    lr: float = 1e-2,
    seed: int = 0,
    progress: bool = True,
) -> Calibration:
    """Fits factors and clipping of one layer by gradient descent on the quantisation error.

    Minimises, by Adam with a straight-through estimate of the rounding, the relative squared error
    of a token: with ``weight`` that of the layer's output ``x @ weight.T``, where the weight is
    transformed by the inverse and quantised to int4 with one scale per row; without, that of the
    input mapped back through the inverse. A factor is ``U diag(s) V^T R``: U and V orthogonal
    by the Cayley transform, as in FlatQuant, R the random rotation that the fit starts from; its
    condition number is at most exp(2). The same arguments give the same result on one device.
    torch.autocast and torch's default dtype and device have no say.

    Args:
        x_samples: ``[..., features]``, floating-point and finite; some hundred tokens or more,
            from a text other than those to be evaluated. The fit runs on their device in float32.
        weight: ``[out, features]``, floating-point, on the device of the samples; for layers that
            share the input (q, k, v; gate, up) their weights, concatenated along the rows.
        left_size: M, a divisor of ``features``; by default that of :func:`get_decompose_dim`.
        steps: steps of gradient descent, >= 1.
        lr: learning rate of the factors at the first step; it falls to 0 as a cosine.
        seed: of the starting rotations and of the batches.
        progress: show a progress bar on standard error, where that is a terminal.

    Returns:
        The factors and clip logits, on the device of the samples, and the errors without and with.

    Raises:
        TypeError: an argument of a wrong type or dtype.
        ValueError: a wrong shape, device or number; samples or a weight that are not finite, or so
            large that the error of the fit is not.
    """
    M, N = _check(x_samples, weight, left_size, steps, lr, seed)
    check_flag("progress", progress)
    device = x_samples.device
    # Leave what the caller has set: autocast, a default device, no_grad or inference_mode. The
    # copies below are no inference tensors.
    with (
        _without_autocast(device.type),
        torch.device("cpu"),
        torch.inference_mode(False),
        torch.enable_grad(),
    ):
        generator = torch.Generator().manual_seed(seed)
        x = x_samples.detach().reshape(-1, M * N).to(torch.float32, copy=True)
        w = None if weight is None else weight.detach().to(torch.float32, copy=True)
        left, right = (_Factor(size, generator).to(device) for size in (M, N))
        logits = [
            torch.full((1,), _INITIAL_CLIP_LOGIT, dtype=torch.float32, device=device)
            for _ in ("max", "min")
        ]
        for logit in logits:
            logit.requires_grad_()
        groups: list[dict[str, Any]] = [
            {"params": [*left.parameters(), *right.parameters()]},
            {"params": logits, "lr": _CLIP_LEARNING_RATE * lr},
        ]
        optimizer = torch.optim.Adam(groups, lr=lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for step in range(steps):
            tokens = _draw(len(x), _BATCH_TOKENS, generator).to(device)
            rows = None if w is None else w[_draw(len(w), _BATCH_ROWS, generator).to(device)]
            ratios = clip_ratio_from_logits(*logits)
            loss = _error(x[tokens], rows, left(), right(), ratios)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            with torch.no_grad():
                for logit in logits:
                    logit.clamp_(min=_LEAST_CLIP_LOGIT)
            schedule.step()
            if progress and sys.stderr.isatty():
                _show(step + 1, steps, loss.item())
        with torch.no_grad():
            identity = [(_identity(size, device),) * 2 for size in (M, N)]
            one = torch.ones_like(logits[0])
            before = _error(x, w, identity[0], identity[1], (one, one)).item()
            after = _error(x, w, left(), right(), clip_ratio_from_logits(*logits)).item()
            factors = left()[0].contiguous(), right()[0].contiguous()
    if not (math.isfinite(before) and math.isfinite(after)):
        raise ValueError(
            "x_samples and weight must be small enough, and lr too, for a finite error in float32, "
            f"got {before} before and {after} after the fit with lr={lr}"
        )
    return Calibration(*factors, (logits[0].detach(), logits[1].detach()), before, after)


class _Factor(nn.Module):
    """An invertible matrix ``U diag(s) V^T R`` and its inverse, R a fixed random rotation."""

    def __init__(self, size: int, generator: torch.Generator) -> None:
        super().__init__()
        self.start: Tensor
        self.register_buffer("start", random_orthogonal(size, generator).float())
        self.u, self.v = (nn.Parameter(torch.zeros_like(self.start)) for _ in range(2))
        self.log_scale = nn.Parameter(torch.zeros_like(self.start[0]))

    def forward(self) -> tuple[Tensor, Tensor]:
        u, v = _cayley(self.u), _cayley(self.v)
        scale = (_LARGEST_LOG_SCALE * torch.tanh(self.log_scale / _LARGEST_LOG_SCALE)).exp()
        return (u * scale) @ v.T @ self.start, self.start.T @ (v / scale) @ u.T


def _cayley(free: Tensor) -> Tensor:
    """An orthogonal matrix for any square one, of which the strict upper triangle counts."""
    skew = free.triu(1) - free.triu(1).T
    identity = _identity(len(free), free.device)
    orthogonal: Tensor = torch.linalg.solve(identity + skew, identity - skew)
    return orthogonal


def _identity(size: int, device: torch.device) -> Tensor:
    return torch.eye(size, dtype=torch.float32, device=device)


def _error(
    x: Tensor,
    weight: Tensor | None,
    left: tuple[Tensor, Tensor],
    right: tuple[Tensor, Tensor],
    clip_ratio: tuple[Tensor, Tensor],
) -> Tensor:
    """Relative squared error of the layer's output, or of x without a weight; mean over tokens."""
    y = _fake_quantize(_kronecker(x, left[0], right[0]), clip_ratio)
    if weight is None:
        exact, approximation = x, _kronecker(y, left[1], right[1])
    else:
        one = torch.ones_like(clip_ratio[0])
        w = _fake_quantize(_kronecker(weight, left[1].T, right[1].T), (one, one))
        exact, approximation = x @ weight.T, y @ w.T
    energy = exact.square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
    return ((approximation - exact).square().sum(-1) / energy).mean()


def _kronecker(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """``left^T @ X @ right`` of each row, with gradients, which the operator has not."""
    return (left.T @ x.view(-1, len(left), len(right)) @ right).view(x.shape)


def _fake_quantize(y: Tensor, clip_ratio: tuple[Tensor, Tensor]) -> Tensor:
    """int4 codes times scale of each row; rounding has the gradient of the identity."""
    largest = clip_ratio[0] * y.amax(-1, keepdim=True).clamp_min(0)
    smallest = clip_ratio[1] * (-y.amin(-1, keepdim=True)).clamp_min(0)
    scale = torch.maximum(largest, smallest) / 7
    scale = torch.where(scale == 0, 1.0, scale)
    codes = y / scale
    codes = codes + (codes.round() - codes).detach()
    return codes.clamp(-8, 7) * scale


def _draw(count: int, most: int, generator: torch.Generator) -> Tensor:
    return torch.randperm(count, generator=generator)[:most]


def _show(step: int, steps: int, error: float) -> None:
    bar = "#" * (30 * step // steps)
    end = "\n" if step == steps else ""
    text = f"\r\033[K[{bar:<30}] {step}/{steps} error {error:.3%}"
    print(text, end=end, file=sys.stderr, flush=True)


def _check(
    x_samples: Tensor,
    weight: Tensor | None,
    left_size: int | None,
    steps: int,
    lr: float,
    seed: int,
) -> tuple[int, int]:
    """Checks the arguments of :func:`calibrate`; the factor sizes ``(M, N)`` if they are right."""
    check_float("x_samples", x_samples)
    if x_samples.dim() == 0 or x_samples.numel() == 0:
        raise ValueError(
            f"x_samples must be [..., features] with a token, got {tuple(x_samples.shape)}"
        )
    if not bool(x_samples.isfinite().all()):
        raise ValueError("x_samples must be finite, got NaN or Inf")
    features = x_samples.shape[-1]
    if weight is not None:
        check_float("weight", weight)
        if weight.dim() != 2 or weight.shape[1] != features or len(weight) == 0:
            raise ValueError(f"weight must be [out, {features}], got {tuple(weight.shape)}")
        if weight.device != x_samples.device:
            raise ValueError(
                f"weight must be on the device of x_samples, {x_samples.device}, "
                f"got {weight.device}"
            )
        if not bool(weight.isfinite().all()):
            raise ValueError("weight must be finite, got NaN or Inf")
    check_int("steps", steps)
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    check_int("seed", seed)
    if isinstance(lr, bool) or not isinstance(lr, numbers.Real):
        raise TypeError(f"lr must be a real number, got {lr!r} of type {type(lr).__name__}")
    if not (math.isfinite(lr) and lr > 0):
        raise ValueError(f"lr must be finite and > 0, got {lr!r}")
    if left_size is None:
        return get_decompose_dim(features)
    check_int("left_size", left_size)
    if left_size < 1 or features % left_size:
        raise ValueError(f"left_size must divide the {features} features, got {left_size}")
    return left_size, features // left_size
