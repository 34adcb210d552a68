"""How far a quantised result may lie from float64, and how far it does: one comparison for all.

The tests, the demo and the benchmarks call :func:`compare`. A code may differ from the float64
code only by one step, only where Y / scale lies near the boundary between the two codes, and
only rarely.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from . import reference
from ._checks import ClipRatio, as_pair
from .packing import unpack_int4


@dataclass(frozen=True)
class Tolerance:
    """Bounds for one input dtype.

    Attributes:
        transform: error of an element of Y, as a share of its token's max|Y|. The bounds of the
            scale and of the distance to a rounding boundary follow from it.
        mismatch: share of the codes that may differ.
    """

    transform: float
    mismatch: float


# Float32 sums of up to 256 products, twice: about sqrt(256) = 16 roundings of 2^-24 each way in a
# random walk; 2^-18 is four times that.
_ACCUMULATION = 2.0**-18

# For 16-bit inputs the intermediate is rounded once to the input dtype, with relative error of at
# most u = 2^-11 (float16) or 2^-8 (bfloat16) each. An element of Y sums M or N such errors with
# random signs: its error is normal with sigma of about 0.4 u rms(Y), and max|Y| is 2 to 5 rms(Y),
# so 2 u max|Y| is 10 sigma in the smallest token.
TOLERANCES = {
    torch.float16: Tolerance(transform=2 * 2.0**-11 + _ACCUMULATION, mismatch=1e-3),
    torch.bfloat16: Tolerance(transform=2 * 2.0**-8 + _ACCUMULATION, mismatch=8e-3),
    torch.float32: Tolerance(transform=_ACCUMULATION, mismatch=2e-5),
}

# float32 inputs with TF32 allowed: X, both factors and the intermediate are rounded to 11 bits.
TF32 = Tolerance(transform=4 * 2.0**-11 + _ACCUMULATION, mismatch=2e-3)


@dataclass(frozen=True)
class Comparison:
    """What :func:`compare` found.

    Attributes:
        tokens: number of tokens.
        features: features per token.
        mismatches: number of codes that differ from the float64 codes.
        max_step: largest difference of a code.
        max_distance: largest distance of Y / scale from the boundary between the two codes, over
            the codes that differ; in steps.
        scale_error: largest relative error of a scale; Inf where a NaN or Inf scale is not equal.
        tolerance: the bounds of the dtype.
        failures: what is wrong, with examples; empty if the result is within the bounds.
    """

    tokens: int
    features: int
    mismatches: int
    max_step: int
    max_distance: float
    scale_error: float
    tolerance: Tolerance
    failures: tuple[str, ...]

    @property
    def mismatch(self) -> float:
        """Share of the codes that differ."""
        return self.mismatches / max(1, self.tokens * self.features)

    @property
    def ok(self) -> bool:
        return not self.failures

    def __str__(self) -> str:
        """The figures in one line, then what is wrong."""
        figures = (
            f"{self.tokens} x {self.features}: mismatch {self.mismatch:.2e} "
            f"(limit {self.tolerance.mismatch:.0e}), largest step {self.max_step}, "
            f"distance {self.max_distance:.2e}, scale error {self.scale_error:.2e}"
        )
        return "\n".join((figures, *self.failures))


def compare(
    quantized: Tensor,
    scales: Tensor,
    transformed: Tensor,
    clip_ratio: ClipRatio,
    dtype: torch.dtype,
    examples: int = 8,
    tolerance: Tolerance | None = None,
) -> Comparison:
    """Compare a quantised result with the float64 transform of the same input.

    Tokens whose Y holds NaN or Inf must have that scale and codes 0; so must tokens of zeros have
    scale 1 and codes 0.

    Args:
        quantized: int8 codes ``[..., features]`` or int32 words ``[..., features / 8]``.
        scales: float32 ``[...]``.
        transformed: Y, float64 ``[..., features]``, from :func:`flatquant.reference.transform`.
        clip_ratio: as given to the operator, one ratio or a pair.
        dtype: the operator's input dtype; it chooses the tolerance if none is given.
        examples: how many differing elements a failure shows.
        tolerance: another than the dtype's, such as ``TF32``.

    Raises:
        ValueError: a shape or dtype of the result does not fit ``transformed``.
    """
    tolerance = tolerance or TOLERANCES[dtype]
    codes = unpack_int4(quantized) if quantized.dtype == torch.int32 else quantized
    if transformed.dtype != torch.float64:
        raise ValueError(f"transformed must be torch.float64, got {transformed.dtype}")
    if codes.dtype != torch.int8 or codes.shape != transformed.shape:
        raise ValueError(
            f"quantized must hold the codes of {tuple(transformed.shape)} elements as int8 or "
            f"packed int32, got {quantized.dtype} {tuple(quantized.shape)}"
        )
    if scales.dtype != torch.float32 or scales.shape != transformed.shape[:-1]:
        raise ValueError(
            f"scales must be torch.float32 {tuple(transformed.shape[:-1])}, "
            f"got {scales.dtype} {tuple(scales.shape)}"
        )
    features = transformed.shape[-1]
    transformed = transformed.reshape(-1, features)
    codes, scales = codes.reshape(-1, features).int(), scales.flatten()

    exact_codes, exact_scales = reference.quantize(transformed, clip_ratio)
    exact_codes = exact_codes.int()
    scale_errors = _relative_error(scales, exact_scales)

    # Only the codes that differ are looked at further.
    token, feature = torch.nonzero(codes != exact_codes, as_tuple=True)
    got, exact = codes[token, feature], exact_codes[token, feature]
    ratios = transformed[token, feature] / exact_scales[token].double()
    steps = (got - exact).abs()
    distances = (ratios - (got + exact) / 2).abs()

    # Y carries an error of tolerance.transform * max|Y|; with it the scale one of up to the larger
    # ratio times that / 7, which is the same share of the scale if both ratios are equal, more if
    # the scale comes from the side that is not max|Y|'s. |Y / scale| carries both.
    largest = transformed.abs().amax(-1) / exact_scales
    larger_ratio = max(map(float, as_pair(clip_ratio)))
    shares = (largest * larger_ratio / 7).nan_to_num(nan=1.0).clamp(min=1.0)
    scale_limits = tolerance.transform * shares
    distance_limits = (tolerance.transform * largest * (1 + shares))[token]
    bad_codes = (steps > 1) | ~(distances <= distance_limits)
    # One code may always differ: among fewer than 1 / mismatch elements a share says nothing.
    allowed = max(1.0, tolerance.mismatch * codes.numel())

    def show(chosen: Tensor) -> str:
        rows = torch.nonzero(chosen).flatten()[:examples].tolist()
        return "".join(
            f"\n    token {token[i]}, feature {feature[i]}: Y/scale {ratios[i]:.6f}, "
            f"code {got[i]}, float64 {exact[i]}, may be {distance_limits[i]:.2e} from the boundary"
            for i in rows
        )

    failures = []
    bad_scales = torch.nonzero(~(scale_errors <= scale_limits)).flatten()
    if len(bad_scales):
        failures.append(
            f"  {len(bad_scales)} scales differ by more than the share of them that may:"
            + "".join(
                f"\n    token {i}: scale {scales[i]:.9g}, float64 {exact_scales[i]:.9g}, "
                f"may {scale_limits[i]:.2e}"
                for i in bad_scales[:examples].tolist()
            )
        )
    if bad_codes.any():
        failures.append(
            f"  {int(bad_codes.sum())} codes differ by more than one step, or further from the "
            "boundary than they may:" + show(bad_codes)
        )
    if len(token) > allowed:
        failures.append(
            f"  {len(token)} codes differ, {allowed:.0f} may:" + show(torch.ones_like(bad_codes))
        )
    return Comparison(
        tokens=codes.shape[0],
        features=features,
        mismatches=len(token),
        max_step=int(steps.max()) if len(token) else 0,
        max_distance=float(distances.max()) if len(token) else 0.0,
        scale_error=float(scale_errors.max()) if len(scale_errors) else 0.0,
        tolerance=tolerance,
        failures=tuple(failures),
    )


def _relative_error(scales: Tensor, exact: Tensor) -> Tensor:
    """``|scales / exact - 1|`` in float64; 0 for equal NaN or Inf, Inf for any other NaN."""
    same = (scales == exact) | (scales.isnan() & exact.isnan())
    error = (scales.double() / exact.double() - 1).abs().nan_to_num(nan=math.inf)
    return torch.where(same, 0.0, error)
