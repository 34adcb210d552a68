"""What a FlatQuant model holds for the inputs of its linear layers, and the file it comes from.

``flat_matrices.pth``, as FlatQuant (https://github.com/ruikangliu/FlatQuant) saves it, maps each
layer's number to a dict of tensors: for each transform its matrices, for each linear layer the
logits of its clipping. docs/models.md lists the keys.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import reference
from ._checks import check_flag, check_float
from .ops import flatquant_dynamic_quantize


class _Place(NamedTuple):
    """Where the file keeps what one module holds."""

    transform: str
    quantizer: str
    left: str | None = "matrix_left"
    right: str | None = "matrix_right"


_PLACES = {
    "self_attn.q_proj": _Place("self_attn.ln_trans", "self_attn.q_proj.act_quantizer"),
    "self_attn.k_proj": _Place("self_attn.ln_trans", "self_attn.k_proj.act_quantizer"),
    "self_attn.v_proj": _Place("self_attn.ln_trans", "self_attn.v_proj.act_quantizer"),
    "self_attn.o_proj": _Place(
        "self_attn.o_trans", "self_attn.o_proj.act_quantizer", "matrix", None
    ),
    "mlp.gate_proj": _Place("mlp.up_gate_trans", "mlp.gate_proj.act_quantizer"),
    "mlp.up_proj": _Place("mlp.up_gate_trans", "mlp.up_proj.act_quantizer"),
    "mlp.down_proj": _Place("mlp.down_trans", "mlp.down_proj.act_quantizer"),
    "self_attn.kcache_trans": _Place(
        "self_attn.kcache_trans", "self_attn.k_cache_quantizer", None, "matrix"
    ),
    "self_attn.vcache_trans": _Place(
        "self_attn.vcache_trans", "self_attn.v_cache_quantizer", None, "matrix"
    ),
}
# Beside each matrix FlatQuant keeps the transposed inverse, which it applies to the weights.
_INVERSES = {
    "matrix_left": "matrix_left_inv",
    "matrix_right": "matrix_right_inv",
    "matrix": "matrix_inv_t",
}
_CLIP_NAMES = ("clip_factor_a_max", "clip_factor_a_min")
_RATIO_NAMES = ("clip_ratio_max", "clip_ratio_min")


def clip_ratio_from_logits(max_logit: Tensor, min_logit: Tensor) -> tuple[Tensor, Tensor]:
    """The pair for ``clip_ratio=`` from FlatQuant's ``clip_factor_a_max``, ``clip_factor_a_min``.

    Args:
        max_logit: ``[1]`` or 0-d, any floating-point dtype; 4 is FlatQuant's initial value.
        min_logit: the same.

    Returns:
        ``sigmoid`` of either in float32, on its device and the same on every one: (max side, min
        side).

    Raises:
        TypeError: no floating-point tensor.
    """
    check_float("max_logit", max_logit)
    check_float("min_logit", min_logit)
    # In float64 first, as float32 sigmoids of a CPU and of a GPU differ in their last bit.
    return torch.sigmoid(max_logit.double()).float(), torch.sigmoid(min_logit.double()).float()


class FlatQuantActivation(nn.Module):
    """Quantises the input of a linear layer: ``flatquant_dynamic_quantize`` with its parameters.

    The state_dict has the names of ``flat_matrices.pth``: ``matrix_left``, ``matrix_right``,
    ``clip_factor_a_max``, ``clip_factor_a_min`` and ``diag_scale``, each if there is one. The
    matrices follow ``.to()`` and ``.half()``, which must give them the dtype of the input; all else
    stays float32. A call reads nothing on the host, so it can be captured in a CUDA graph; a replay
    follows a later ``load_state_dict``.

    All tensors are copied, but for a matrix that is a frozen, contiguous Parameter: modules built
    from the same one share it. Such modules must be cast together, as the children of one module,
    or each gets a matrix of its own.

    Args:
        left: ``[M, M]``, or None for ``Y = X @ right``.
        right: ``[N, N]``, or None for ``Y = left^T @ X``; without both, Y is the input.
        clip_logits: (``clip_factor_a_max``, ``clip_factor_a_min``), one element each, or None for
            a ratio of 1. Logits, not ratios: a ratio is the sigmoid of its logit.
        diag_scale: ``[features]``, or None. :meth:`forward` does NOT apply it: as in FlatQuant, it
            belongs into the layer before, so that the input comes multiplied by it.
            :meth:`transform_weight` divides the weight by it.
        pack_int32: as in :func:`flatquant_dynamic_quantize`; so is ``kernel``.

    Raises:
        TypeError: a tensor that is no dense floating-point one.
        ValueError: a matrix that is not square, or logits or a diag_scale of a wrong shape.
    """

    matrix_left: nn.Parameter | None
    matrix_right: nn.Parameter | None
    clip_factor_a_max: Tensor | None
    clip_factor_a_min: Tensor | None
    clip_ratio_max: Tensor | None
    clip_ratio_min: Tensor | None
    diag_scale: Tensor | None

    def __init__(
        self,
        left: Tensor | None,
        right: Tensor | None,
        clip_logits: tuple[Tensor, Tensor] | None = None,
        *,
        diag_scale: Tensor | None = None,
        pack_int32: bool = False,
        kernel: str = "auto",
    ) -> None:
        super().__init__()
        check_flag("pack_int32", pack_int32)
        for name, matrix in (("left", left), ("right", right)):
            if matrix is not None:
                _square(name, matrix)
        if diag_scale is not None:
            check_float("diag_scale", diag_scale)
            sizes = [len(matrix) for matrix in (left, right) if matrix is not None]
            if diag_scale.dim() != 1 or not _fit(len(diag_scale), sizes):
                raise ValueError(
                    f"diag_scale must be [features] for matrices of size {sizes}, "
                    f"got shape {tuple(diag_scale.shape)}"
                )
        if clip_logits is not None:
            _check_logits(clip_logits)
        # Parameters: layers that share a matrix still share it after .to(), unlike buffers.
        self.matrix_left = _frozen(left)
        self.matrix_right = _frozen(right)
        self.register_buffer("diag_scale", None if diag_scale is None else _copy(diag_scale))
        for name, logit in zip(_CLIP_NAMES, clip_logits or (None, None), strict=True):
            self.register_buffer(name, None if logit is None else _copy(logit).reshape(1))
        for name in _RATIO_NAMES:
            self.register_buffer(name, None, persistent=False)
        self.pack_int32 = pack_int32
        self.kernel = kernel
        self._set_clip_ratio()
        self.register_load_state_dict_post_hook(_after_load)  # type: ignore[no-untyped-call]

    def _set_clip_ratio(self) -> None:
        """Once and not in each call, where two more launches would take as long as the kernel."""
        if self.clip_factor_a_max is None or self.clip_factor_a_min is None:
            return
        ratios = clip_ratio_from_logits(self.clip_factor_a_max, self.clip_factor_a_min)
        for name, ratio in zip(_RATIO_NAMES, ratios, strict=True):
            kept = self._buffers[name]
            if kept is not None and kept.device == ratio.device:
                kept.copy_(ratio)  # in place, for a captured CUDA graph reads it there
            else:
                self._buffers[name] = ratio

    def _apply(self, fn: Any, recurse: bool = True) -> "FlatQuantActivation":
        """Moves everything; casts the matrices only, for the operator takes float32 ratios."""
        buffers = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in buffers.items():
            moved = self._buffers[name]
            if buffer is not None and moved is not None and moved.dtype != torch.float32:
                self._buffers[name] = buffer.to(moved.device)
        return self

    @property
    def clip_ratio(self) -> float | tuple[Tensor, Tensor]:
        """For ``clip_ratio=`` of the operator: 1, or (max side, min side), float32 ``[1]``."""
        if self.clip_ratio_max is None or self.clip_ratio_min is None:
            return 1.0
        return self.clip_ratio_max, self.clip_ratio_min

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``(quantized, scales)`` of x ``[..., features]``; on the CPU by the reference.

        Raises:
            TypeError, ValueError, NotImplementedError, RuntimeError: as
                :func:`flatquant_dynamic_quantize`; its dtype must be that of the matrices.
        """
        return flatquant_dynamic_quantize(
            x,
            self.matrix_left,
            self.matrix_right,
            self.clip_ratio,
            self.pack_int32,
            use_cuda=x.is_cuda,
            kernel=self.kernel,
        )

    @torch.no_grad()
    def transform_weight(self, weight: Tensor) -> Tensor:
        """The weight that belongs to the transformed input, once, before it is quantised.

        ``x @ weight.T == transformed(x * diag_scale) @ transform_weight(weight).T``; each row is
        divided by ``diag_scale`` and transformed by the transposed inverses.

        Args:
            weight: ``[out, features]``, floating-point.

        Returns:
            Shape and dtype of ``weight``; computed in float64.

        Raises:
            TypeError: a weight that is no dense floating-point tensor.
            ValueError: a weight of a wrong shape.
            torch.linalg.LinAlgError: a matrix that has no inverse.
        """
        check_float("weight", weight)
        sizes = [len(m) for m in (self.matrix_left, self.matrix_right) if m is not None]
        if weight.dim() != 2 or not _fit(weight.shape[1], sizes):
            raise ValueError(
                f"weight must be [out, features] for matrices of size {sizes}, "
                f"got shape {tuple(weight.shape)}"
            )
        if self.diag_scale is not None and weight.shape[1] != len(self.diag_scale):
            raise ValueError(
                f"weight must have the {len(self.diag_scale)} features of diag_scale, "
                f"got shape {tuple(weight.shape)}"
            )
        rows = weight.double()
        if self.diag_scale is not None:
            rows = rows / self.diag_scale.to(rows)
        left, right = (
            None if matrix is None else torch.linalg.inv(matrix.to(rows)).T
            for matrix in (self.matrix_left, self.matrix_right)
        )
        return reference.transform(rows, left, right, torch.float64).to(weight.dtype)

    def extra_repr(self) -> str:
        sizes = [
            "-" if matrix is None else str(len(matrix))
            for matrix in (self.matrix_left, self.matrix_right)
        ]
        clip = "1" if self.clip_factor_a_max is None else "learned"
        diag = "" if self.diag_scale is None else ", diag_scale for the layer before"
        return f"{sizes[0]} x {sizes[1]}, clip {clip}, pack_int32={self.pack_int32}{diag}"


def _after_load(module: FlatQuantActivation, _: object) -> None:
    module._set_clip_ratio()  # from the logits just loaded


def load_flat_matrices(
    path: str | Path, *, pack_int32: bool = False
) -> dict[int, dict[str, FlatQuantActivation]]:
    """Builds the modules of each layer from FlatQuant's ``flat_matrices.pth``.

    Only tensors are read from the file, no code (``weights_only=True``), onto the CPU. Modules of
    the same transform share its matrices, and are to be cast together: put a layer's modules into
    one ``nn.ModuleDict``.

    Args:
        path: the file.
        pack_int32: of the modules.

    Returns:
        ``{layer: {name: module}}``. The names are those of the linear layers whose input is
        quantised: ``self_attn.q_proj``, ``k_proj``, ``v_proj``, ``o_proj`` (left matrix only) and
        ``mlp.gate_proj``, ``up_proj``, ``down_proj``; and ``self_attn.kcache_trans``,
        ``self_attn.vcache_trans`` (right matrix only), each if the file has it. The clipping of the
        weights (``clip_factor_w_*``) is left out.

    Raises:
        OSError: no such file, or a damaged one (which may also be a RuntimeError).
        pickle.UnpicklingError: a file that holds more than tensors in dicts.
        ValueError: an empty file, or another layout; the message names the key.
    """
    try:
        layers = torch.load(path, map_location="cpu", weights_only=True)
    except EOFError:
        raise ValueError(f"{path} must hold a dict of layers, got an empty file") from None
    if not isinstance(layers, Mapping) or not layers:
        raise ValueError(f"{path} must hold a dict of layers, got {_describe(layers)}")
    result = {}
    for number, tensors in layers.items():
        if isinstance(number, bool) or not isinstance(number, int):
            raise ValueError(f"{path}: key {number!r} must be the number of a layer, an int")
        if not isinstance(tensors, Mapping):
            raise ValueError(f"{path}: layer {number} must be a dict, got {_describe(tensors)}")
        try:
            result[number] = _layer(tensors, pack_int32)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: layer {number}: {error}") from None
    return result


def save_flat_matrices(
    path: str | Path, layers: Mapping[int, Mapping[str, FlatQuantActivation]]
) -> None:
    """Writes what :func:`load_flat_matrices` reads, and the inverses that FlatQuant reads.

    Args:
        path: the file.
        layers: as :func:`load_flat_matrices` returns it. Modules of the same transform must have
            equal matrices and an equal ``diag_scale``.

    Raises:
        TypeError: layers of another type.
        ValueError: a module that the file cannot hold: a name for which it has no key, matrices
            other than those of its place, or other than those of the same transform elsewhere.
        torch.linalg.LinAlgError: a matrix that has no inverse.
    """
    if not isinstance(layers, Mapping) or not all(isinstance(m, Mapping) for m in layers.values()):
        raise TypeError(f"layers must be a dict of dicts of modules, got {_describe(layers)}")
    file: dict[int, dict[str, Tensor]] = {}
    for number, modules in layers.items():
        tensors: dict[str, Tensor | None] = {}
        for name, module in modules.items():
            try:
                _save(tensors, name, module)
            except ValueError as error:
                raise ValueError(f"layer {number}: {error}") from None
        file[number] = {key: tensor for key, tensor in tensors.items() if tensor is not None}
    torch.save(file, path)


def _save(tensors: dict[str, Tensor | None], name: str, module: FlatQuantActivation) -> None:
    """Adds what a module holds, and None for what modules of its transform must not hold."""
    place = _PLACES.get(name)
    if place is None:
        raise ValueError(f"{name!r} must be one of {', '.join(_PLACES)}")
    keys = {"matrix_left": place.left, "matrix_right": place.right}
    expected = [side for side, key in keys.items() if key]
    sides = [side for side in keys if getattr(module, side) is not None]
    # The file of a model without transforms has the clipping alone.
    clipping_alone = (
        not sides and module.diag_scale is None and module.clip_factor_a_max is not None
    )
    if sides != expected and not clipping_alone:
        raise ValueError(
            f"{name} must have {' and '.join(expected)}, got {' and '.join(sides) or 'neither'}"
        )
    of_transform = {key: getattr(module, side) for side, key in keys.items() if key}
    for key, tensor in {**of_transform, "diag_scale": module.diag_scale}.items():
        tensor = None if tensor is None else tensor.detach().cpu()
        place_key = f"{place.transform}.{key}"
        if place_key not in tensors:
            tensors[place_key] = tensor
            if tensor is not None and key in _INVERSES:
                inverse = torch.linalg.inv(tensor.double()).T.contiguous().to(tensor)
                tensors[f"{place.transform}.{_INVERSES[key]}"] = inverse
        elif not _equal(tensor, tensors[place_key]):
            raise ValueError(f"{name} must have the same {place_key!r} as the modules before it")
    for key in _CLIP_NAMES:
        if (logit := getattr(module, key)) is not None:
            tensors[f"{place.quantizer}.{key}"] = logit.cpu()


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.dtype == b.dtype and torch.equal(a, b)


def _layer(tensors: Mapping[str, Any], pack_int32: bool) -> dict[str, FlatQuantActivation]:
    """The modules of one layer by name."""
    transforms = {place.transform for place in _PLACES.values()}
    for key, tensor in tensors.items():
        if not isinstance(key, str) or not isinstance(tensor, Tensor):
            raise ValueError(f"{key!r} must name a tensor, got {_describe(tensor)}")
        if "trans.linear" in key:
            raise ValueError(
                f"{key!r} must not be there: this is flat_parameters.pth; save flat_matrices.pth "
                "with FlatQuant's --save_matrix"
            )
        transform, _, last = key.rpartition(".")
        if ("trans.matrix" in key or last == "diag_scale") and transform not in transforms:
            raise ValueError(f"{key!r} must belong to one of {', '.join(sorted(transforms))}")
    matrices = {
        key: _frozen(_square(key, tensor))
        for key, tensor in tensors.items()
        if key.rpartition(".")[2] in _INVERSES
    }
    modules = {}
    for name, place in _PLACES.items():
        keys = [f"{place.transform}.{key}" for key in (place.left, place.right) if key]
        clip_keys = [f"{place.quantizer}.{key}" for key in _CLIP_NAMES]
        has_transform, has_clip = _all_or_none(tensors, keys), _all_or_none(tensors, clip_keys)
        diag_key = f"{place.transform}.diag_scale"
        if diag_key in tensors and not has_transform:
            raise ValueError(f"{keys[0]!r} is missing, which belongs to {diag_key!r}")
        if not has_transform and not has_clip:
            continue
        for key in clip_keys if has_clip else ():
            if tensors[key].numel() != 1:
                raise ValueError(f"{key!r} must have one element, got {tuple(tensors[key].shape)}")
        modules[name] = FlatQuantActivation(
            matrices.get(f"{place.transform}.{place.left}"),
            matrices.get(f"{place.transform}.{place.right}"),
            (tensors[clip_keys[0]], tensors[clip_keys[1]]) if has_clip else None,
            diag_scale=tensors.get(diag_key),
            pack_int32=pack_int32,
        )
    if not modules:
        raise ValueError(f"must hold a transform, one of {', '.join(sorted(transforms))}")
    return modules


def _all_or_none(tensors: Mapping[str, Tensor], keys: list[str]) -> bool:
    """Whether the file has all of these keys; one without the others is an error."""
    missing = [key for key in keys if key not in tensors]
    if missing and len(missing) < len(keys):
        raise ValueError(f"{missing[0]!r} is missing")
    return not missing


def _square(name: str, matrix: Tensor) -> Tensor:
    check_float(name, matrix)
    if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1] or len(matrix) == 0:
        raise ValueError(f"{name} must be a square matrix, got shape {tuple(matrix.shape)}")
    return matrix


def _frozen(matrix: Tensor | None) -> nn.Parameter | None:
    """The Parameter itself if it is one that can be shared, else one of a copy."""
    if matrix is None:
        return None
    if isinstance(matrix, nn.Parameter) and not matrix.requires_grad and matrix.is_contiguous():
        return matrix
    copy = matrix.detach().clone(memory_format=torch.contiguous_format)
    return nn.Parameter(copy, requires_grad=False)


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.float32, copy=True)


def _fit(features: int, sizes: Sequence[int]) -> bool:
    """Whether matrices of these sizes transform this many features."""
    size = math.prod(sizes)
    return features == size if len(sizes) == 2 else features > 0 and features % size == 0


def _check_logits(clip_logits: object) -> None:
    message = f"clip_logits must be a tuple of two tensors, got {_describe(clip_logits)}"
    if not isinstance(clip_logits, (tuple, list)):
        raise TypeError(message)
    if len(clip_logits) != 2:
        raise ValueError(message)
    for name, logit in zip(_CLIP_NAMES, clip_logits, strict=True):
        check_float(f"clip_logits ({name})", logit)
        if logit.numel() != 1:
            raise ValueError(
                f"clip_logits ({name}) must have one element, got {tuple(logit.shape)}"
            )


def _describe(value: object) -> str:
    return f"{value!r:.60} of type {type(value).__name__}"
