"""FlatQuant's file, the modules built from it, and the benchmark that puts them into a model."""

from __future__ import annotations

import copy
import io
import pickle
import sys
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from problems import NO_GPU
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

import smollm2_quality

from flatquant import (
    FlatQuantActivation,
    clip_ratio_from_logits,
    dequantize_int4,
    flatquant_dynamic_quantize,
    load_flat_matrices,
    reference,
    save_flat_matrices,
)
from flatquant.packing import unpack_int4

needs_gpu = pytest.mark.skipif(bool(NO_GPU), reason=NO_GPU)

HEADS, HEAD_DIM, HIDDEN, INTERMEDIATE = 3, 8, (4, 6), (4, 12)
MAX, MIN = "clip_factor_a_max", "clip_factor_a_min"
LINEARS = {
    "self_attn.q_proj": "self_attn.ln_trans",
    "self_attn.k_proj": "self_attn.ln_trans",
    "self_attn.v_proj": "self_attn.ln_trans",
    "self_attn.o_proj": "self_attn.o_trans",
    "mlp.gate_proj": "mlp.up_gate_trans",
    "mlp.up_proj": "mlp.up_gate_trans",
    "mlp.down_proj": "mlp.down_trans",
}
CACHES = {
    "self_attn.kcache_trans": "self_attn.k_cache_quantizer",
    "self_attn.vcache_trans": "self_attn.v_cache_quantizer",
}


def matrix_and_inverse(size: int) -> tuple[Tensor, Tensor]:
    matrix = torch.linalg.qr(torch.randn(size, size)).Q * (0.5 + torch.rand(size))
    return matrix.contiguous(), torch.linalg.inv(matrix).T.contiguous()


def layer_as_flatquant_saves_it() -> OrderedDict[str, Tensor]:
    """The keys in FlatQuant's order: matrices, diag_scale, weight clipping, activation clipping."""
    tensors: OrderedDict[str, Tensor] = OrderedDict()
    decomposed = {
        "self_attn.ln_trans": HIDDEN,
        "mlp.up_gate_trans": HIDDEN,
        "mlp.down_trans": INTERMEDIATE,
    }
    for name, sizes in decomposed.items():
        for side, size in zip(("left", "right"), sizes, strict=True):
            matrix, inverse = matrix_and_inverse(size)
            tensors[f"{name}.matrix_{side}"] = matrix
            tensors[f"{name}.matrix_{side}_inv"] = inverse
    single = {"o_trans": HEADS, "kcache_trans": HEAD_DIM, "vcache_trans": HEAD_DIM}
    for name, size in single.items():
        matrix, inverse = matrix_and_inverse(size)
        tensors[f"self_attn.{name}.matrix"] = matrix
        tensors[f"self_attn.{name}.matrix_inv_t"] = inverse
    for name, (left, right) in decomposed.items():
        tensors[f"{name}.diag_scale"] = 0.5 + torch.rand(left * right)
    for linear in LINEARS:
        tensors[f"{linear}.clip_factor_w_max"] = torch.full((5, 1), 4.0)
        tensors[f"{linear}.clip_factor_w_min"] = torch.full((5, 1), 4.0)
    for quantizer in (*(f"{linear}.act_quantizer" for linear in LINEARS), *CACHES.values()):
        tensors[f"{quantizer}.{MAX}"] = torch.rand(1) + 0.5
        tensors[f"{quantizer}.{MIN}"] = torch.rand(1) - 0.5
    return tensors


@pytest.fixture
def layers() -> dict[int, OrderedDict[str, Tensor]]:
    return {0: layer_as_flatquant_saves_it(), 1: layer_as_flatquant_saves_it()}


@pytest.fixture
def path(tmp_path: Path, layers: dict[int, OrderedDict[str, Tensor]]) -> Path:
    path = tmp_path / "flat_matrices.pth"
    torch.save(layers, path)
    return path


def flatquant_fake_quantize(y: Tensor, max_logit: Tensor, min_logit: Tensor) -> Tensor:
    """FlatQuant's learned clipping, symmetric, 4 bits, from its definition in the paper's code."""
    largest = y.amax(-1, keepdim=True).clamp(min=0) * torch.sigmoid(max_logit)
    smallest = y.amin(-1, keepdim=True).clamp(max=0) * torch.sigmoid(min_logit)
    scale = torch.maximum(largest, -smallest) / 7
    return (y / scale).round().clamp(-8, 7) * scale


def test_clip_ratios_are_sigmoids_in_float32() -> None:
    ratios = clip_ratio_from_logits(
        torch.tensor([4.0], dtype=torch.float16), torch.tensor(-1.0, dtype=torch.float64)
    )
    expected = (0.98201379, 0.26894142)
    for ratio, value in zip(ratios, expected, strict=True):
        assert ratio.dtype == torch.float32
        assert ratio.item() == pytest.approx(value, rel=1e-6)
    with pytest.raises(TypeError, match=r"min_logit must be a torch.Tensor, got float"):
        clip_ratio_from_logits(torch.ones(1), 4.0)  # type: ignore[arg-type]


def test_a_loaded_file_gives_flatquants_results(path: Path, layers: dict) -> None:
    loaded = load_flat_matrices(path)
    assert loaded.keys() == layers.keys()
    for number, tensors in layers.items():
        modules = loaded[number]
        assert modules.keys() == {*LINEARS, *CACHES}
        for linear, transform in LINEARS.items():
            if transform == "self_attn.o_trans":
                factor = torch.kron(tensors[f"{transform}.matrix"], torch.eye(HEAD_DIM))
            else:
                factor = torch.kron(
                    tensors[f"{transform}.matrix_left"], tensors[f"{transform}.matrix_right"]
                )
            x = torch.randn(2, 7, len(factor))
            quantized, scales = modules[linear](x)
            logits = [tensors[f"{linear}.act_quantizer.{name}"] for name in (MAX, MIN)]
            expected = flatquant_fake_quantize(x @ factor, *logits)
            step = scales.unsqueeze(-1)
            difference = (dequantize_int4(quantized, scales) - expected).abs() / step
            assert difference.max() < 1.01, linear  # a tie may fall to either side
            assert (difference > 0.01).float().mean() < 0.01, linear
        for cache, quantizer in CACHES.items():
            x = torch.randn(5, HEADS, HEAD_DIM)
            quantized, scales = modules[cache](x)
            logits = [tensors[f"{quantizer}.{name}"] for name in (MAX, MIN)]
            expected = flatquant_fake_quantize(x @ tensors[f"{cache}.matrix"], *logits)
            assert scales.shape == (5, HEADS)
            difference = (dequantize_int4(quantized, scales) - expected).abs()
            assert (difference / scales.unsqueeze(-1)).max() < 1.01


def test_state_dict_has_the_files_names(path: Path, layers: dict) -> None:
    modules = load_flat_matrices(path)[1]
    tensors = layers[1]
    state = modules["mlp.down_proj"].state_dict()
    for name in ("matrix_left", "matrix_right", "diag_scale"):
        assert torch.equal(state.pop(name), tensors[f"mlp.down_trans.{name}"])
    for name in (MAX, MIN):
        assert torch.equal(state.pop(name), tensors[f"mlp.down_proj.act_quantizer.{name}"])
    assert not state
    assert "matrix_right" not in modules["self_attn.o_proj"].state_dict()


def test_linear_layers_share_their_transform_after_a_cast(path: Path) -> None:
    modules = load_flat_matrices(path)[0]
    layer = torch.nn.ModuleDict({name.replace(".", "_"): m for name, m in modules.items()}).half()
    q, v, gate = (layer[name] for name in ("self_attn_q_proj", "self_attn_v_proj", "mlp_gate_proj"))
    assert q.matrix_left is v.matrix_left and q.matrix_left is not gate.matrix_left
    assert q.matrix_left.dtype == torch.float16


def test_weight_and_input_transforms_cancel(path: Path) -> None:
    module = load_flat_matrices(path)[0]["mlp.down_proj"].double()
    features = INTERMEDIATE[0] * INTERMEDIATE[1]
    x, weight = torch.randn(9, features).double(), torch.randn(5, features).double()
    assert module.diag_scale is not None
    transformed = reference.transform(
        x * module.diag_scale, module.matrix_left, module.matrix_right, torch.float64
    )
    product = transformed @ module.transform_weight(weight).T
    torch.testing.assert_close(product, x @ weight.T)
    assert module.transform_weight(weight.float()).dtype == torch.float32


def test_the_value_transform_merges_into_the_weights_around_attention(path: Path) -> None:
    modules = load_flat_matrices(path)[0]
    o, v = modules["self_attn.o_proj"], modules["self_attn.vcache_trans"]
    hidden = HEADS * HEAD_DIM
    x = torch.randn(9, hidden).double()
    v_weight, o_weight = (torch.randn(hidden, hidden).double() for _ in range(2))
    assert v.matrix_right is not None
    merged_v = reference.transform(v_weight.T, None, v.matrix_right, torch.float64).T
    merged_o = o.transform_weight(v.transform_weight(o_weight))
    values = reference.transform(x @ merged_v.T, o.matrix_left, None, torch.float64)
    torch.testing.assert_close(values @ merged_o.T, x @ v_weight.T @ o_weight.T)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_casts_leave_the_clipping_in_float32(dtype: torch.dtype) -> None:
    logits = torch.tensor([1.2345678]), torch.tensor([-0.1234567])
    diag_scale = torch.rand(24)
    module = FlatQuantActivation(torch.eye(4), torch.eye(6), logits, diag_scale=diag_scale)
    module = module.to(dtype)
    assert module.matrix_left is not None and module.matrix_left.dtype == dtype
    assert module.diag_scale is not None and torch.equal(module.diag_scale, diag_scale)
    for name, logit in zip((MAX, MIN), logits, strict=True):
        assert torch.equal(getattr(module, name), logit)
    assert module.clip_ratio == clip_ratio_from_logits(*logits)
    if dtype != torch.float64:
        _, scales = module(torch.randn(3, 24).to(dtype))
        assert scales.dtype == torch.float32


def test_loading_a_state_dict_sets_the_ratios() -> None:
    source = FlatQuantActivation(2 * torch.eye(4), None, (torch.zeros(1), torch.ones(1)))
    target = FlatQuantActivation(torch.eye(4), None, (torch.ones(1), torch.ones(1)))
    target.load_state_dict(source.state_dict())
    x = torch.randn(3, 8)
    for ours, theirs in zip(target(x), source(x), strict=True):
        assert torch.equal(ours, theirs)
    assert target.clip_ratio == clip_ratio_from_logits(torch.zeros(1), torch.ones(1))


def test_casts_and_loading_leave_the_ratios_where_a_captured_graph_reads_them() -> None:
    module = FlatQuantActivation(torch.eye(4), None, (torch.ones(1), torch.ones(1)))
    other = FlatQuantActivation(torch.eye(4), None, (torch.zeros(1), torch.zeros(1)))
    assert isinstance(module.clip_ratio, tuple)
    pointers = [ratio.data_ptr() for ratio in module.clip_ratio]
    torch.nn.ModuleList([module.half().cpu().float()]).load_state_dict(
        {f"0.{key}": tensor for key, tensor in other.state_dict().items()}
    )
    assert [ratio.data_ptr() for ratio in module.clip_ratio] == pointers
    assert module.clip_ratio == (0.5, 0.5)


def test_a_module_shares_no_memory_with_plain_tensors() -> None:
    left, max_logit, min_logit, diag_scale = (torch.ones(n) for n in (1, 1, 1, 4))
    left = left[None]
    module = FlatQuantActivation(left, None, (max_logit, min_logit), diag_scale=diag_scale)
    kept = {key: tensor.clone() for key, tensor in module.state_dict().items()}
    for tensor in (left, max_logit, min_logit, diag_scale):
        tensor.zero_()
    for key, tensor in module.state_dict().items():
        assert torch.equal(tensor, kept[key]), key


def test_frozen_parameters_are_shared_if_they_are_contiguous() -> None:
    frozen = torch.nn.Parameter(torch.randn(4, 4), requires_grad=False)
    transposed = torch.nn.Parameter(torch.randn(4, 4).T, requires_grad=False)
    module = FlatQuantActivation(frozen, transposed)
    assert module.matrix_left is frozen
    assert module.matrix_right is not None and torch.equal(module.matrix_right, transposed)
    module(torch.randn(3, 16))


@pytest.mark.parametrize("sides", ["both", "left", "right", "none"])
@pytest.mark.parametrize("clipped", [False, True])
def test_the_module_is_the_function(sides: str, clipped: bool) -> None:
    left = torch.randn(4, 4) if sides in ("both", "left") else None
    right = torch.randn(6, 6) if sides in ("both", "right") else None
    logits = (torch.tensor([0.5]), torch.tensor(-0.5)) if clipped else None
    module = FlatQuantActivation(left, right, logits, pack_int32=True)
    x = torch.randn(2, 5, 24)
    words, scales = module(x)
    ratio = (torch.sigmoid(torch.tensor(0.5)), torch.sigmoid(torch.tensor(-0.5)))
    codes, expected = flatquant_dynamic_quantize(
        x, left, right, ratio if clipped else 1.0, use_cuda=False
    )
    assert torch.equal(unpack_int4(words), codes) and torch.equal(scales, expected)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(x)[0], words)


def test_the_module_compiles_in_one_graph() -> None:
    module = FlatQuantActivation(torch.eye(4), torch.eye(6), (torch.ones(1), torch.zeros(1)))
    x = torch.randn(3, 24)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for ours, expected in zip(compiled(x), module(x), strict=True):
        assert torch.equal(ours, expected)


def test_a_trained_matrix_needs_no_detach() -> None:
    left = torch.nn.Parameter(torch.eye(4))
    module = FlatQuantActivation(left, None)
    assert module.matrix_left is not None and not module.matrix_left.requires_grad
    assert left.requires_grad
    module(torch.randn(3, 8))


def test_what_is_saved_is_loaded_and_has_flatquants_inverses(path: Path, layers: dict) -> None:
    file = io.BytesIO()
    save_flat_matrices(file, load_flat_matrices(path))  # type: ignore[arg-type]
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    for number, tensors in layers.items():
        kept = {key: t for key, t in tensors.items() if "clip_factor_w" not in key}
        assert saved[number].keys() == kept.keys()
        for key, tensor in kept.items():
            torch.testing.assert_close(saved[number][key], tensor, msg=key)


def change(layers: dict, key: str, value: object) -> None:
    if value is None:
        del layers[1][key]
    else:
        layers[1][key] = value


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("mlp.down_trans.matrix_right", None, "'mlp.down_trans.matrix_right' is missing"),
        (f"mlp.up_proj.act_quantizer.{MIN}", None, f"'mlp.up_proj.act_quantizer.{MIN}' is missing"),
        ("mlp.down_trans.matrix_left", torch.ones(3, 4), "matrix_left must be a square matrix"),
        ("self_attn.o_trans.matrix", torch.ones(3, 3).int(), "o_trans.matrix must be floating"),
        (f"mlp.up_proj.act_quantizer.{MAX}", torch.ones(2), "must have one element"),
        ("mlp.down_trans.diag_scale", torch.ones(7), "diag_scale must be"),
        ("self_attn.q_a_trans.matrix_left", torch.eye(4), "'self_attn.q_a_trans.matrix_left' must"),
        ("self_attn.o_trans.matrix", "x", "'self_attn.o_trans.matrix' must name a tensor"),
        ("self_attn.q_a_trans.diag_scale", torch.ones(4), "_trans.diag_scale' must belong to one"),
        ("self_attn.o_trans.linear_u.weight", torch.eye(3), "this is flat_parameters.pth"),
    ],
)
def test_a_wrong_key_is_named(
    tmp_path: Path, layers: dict, key: str, value: object, message: str
) -> None:
    change(layers, key, value)
    torch.save(layers, tmp_path / "wrong.pth")
    with pytest.raises(ValueError, match="layer 1") as error:
        load_flat_matrices(tmp_path / "wrong.pth")
    assert message in str(error.value)


def test_flatquants_other_file_is_refused(tmp_path: Path) -> None:
    tensors = {
        "self_attn.ln_trans.linear_u_left.parametrizations.weight.0.base": torch.eye(4),
        "self_attn.ln_trans.linear_diag_left": torch.ones(4),
        "self_attn.ln_trans.diag_scale": torch.ones(24),
        f"self_attn.q_proj.act_quantizer.{MAX}": torch.ones(1),
        f"self_attn.q_proj.act_quantizer.{MIN}": torch.ones(1),
    }
    torch.save({0: tensors}, tmp_path / "flat_parameters.pth")
    with pytest.raises(ValueError, match=r"linear_u_left.* this is flat_parameters.pth; save"):
        load_flat_matrices(tmp_path / "flat_parameters.pth")
    # Nor is a diag_scale dropped because of which no other key is there.
    kept = {key: tensor for key, tensor in tensors.items() if "linear" not in key}
    torch.save({0: kept}, tmp_path / "flat_parameters.pth")
    with pytest.raises(ValueError, match=r"ln_trans.matrix_left' is missing.*ln_trans.diag_scale'"):
        load_flat_matrices(tmp_path / "flat_parameters.pth")


def test_an_empty_and_a_damaged_file_are_refused(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises((OSError, RuntimeError)):
        load_flat_matrices(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="must hold a dict of layers, got an empty file"):
        load_flat_matrices(path)


@pytest.mark.parametrize(
    "content, message",
    [
        (torch.ones(3), "must hold a dict of layers"),
        ({}, "must hold a dict of layers"),
        ({"model.norm.weight": torch.ones(3)}, "key 'model.norm.weight' must be the number"),
        ({0: torch.ones(3)}, "layer 0 must be a dict"),
        ({0: {"self_attn.q_proj.weight": torch.ones(3)}}, "must hold a transform"),
    ],
)
def test_another_file_is_refused(tmp_path: Path, content: object, message: str) -> None:
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(ValueError) as error:
        load_flat_matrices(tmp_path / "other.pth")
    assert message in str(error.value)


def test_a_file_with_code_is_not_run(tmp_path: Path) -> None:
    torch.save({0: FlatQuantActivation(torch.eye(2), None)}, tmp_path / "code.pth")
    with pytest.raises(pickle.UnpicklingError):
        load_flat_matrices(tmp_path / "code.pth")


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ((torch.ones(2, 3), None), ValueError, "left must be a square matrix"),
        ((None, torch.ones(0, 0)), ValueError, "right must be a square matrix"),
        ((torch.ones(2, 2).int(), None), TypeError, "left must be floating-point"),
        (([[1.0]], None), TypeError, "left must be a torch.Tensor"),
        ((None, None, (torch.ones(2), torch.ones(1))), ValueError, "must have one element"),
        ((None, None, (4.0, 4.0)), TypeError, r"clip_logits \(clip_factor_a_max\) must be a torch"),
        ((None, None, 0.9), TypeError, "clip_logits must be a tuple of two tensors, got 0.9"),
        ((None, None, torch.ones(2)), TypeError, "clip_logits must be a tuple of two tensors"),
        ((None, None, (torch.ones(1),)), ValueError, "clip_logits must be a tuple of two"),
        ((None, None, (torch.ones(1),) * 3), ValueError, "clip_logits must be a tuple of two"),
        ((None, None, (torch.ones(1), None)), TypeError, r"\(clip_factor_a_min\) must be a torch"),
    ],
)
def test_wrong_arguments(arguments: tuple, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        FlatQuantActivation(*arguments)


@pytest.mark.parametrize(
    "sizes, features", [((4, 6), 23), ((4, None), 6), ((None, 6), 10), ((None, None), 0)]
)
def test_a_diag_scale_that_does_not_fit_is_refused(sizes: tuple, features: int) -> None:
    matrices = [None if size is None else torch.eye(size) for size in sizes]
    with pytest.raises(ValueError, match=r"diag_scale must be \[features\] for matrices of size"):
        FlatQuantActivation(*matrices, diag_scale=torch.ones(features))


@pytest.mark.parametrize("shape", [(5, 23), (24,), (5, 48)])
def test_a_weight_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    module = FlatQuantActivation(torch.eye(4), torch.eye(6))
    with pytest.raises(ValueError, match=r"weight must be \[out, features\] .* \[4, 6\], got"):
        module.transform_weight(torch.ones(shape))
    with pytest.raises(ValueError, match="got shape"):
        FlatQuantActivation(None, torch.eye(7)).transform_weight(torch.ones(shape))
    with pytest.raises(ValueError, match="got shape"):
        FlatQuantActivation(torch.eye(7), None).transform_weight(torch.ones(5, 0))
    with pytest.raises(ValueError, match="weight must have the 7 features of diag_scale"):
        FlatQuantActivation(None, None, diag_scale=torch.ones(7)).transform_weight(torch.ones(5, 6))


def test_what_the_file_has_no_key_for_is_not_saved(tmp_path: Path) -> None:
    for layers in ([1], {0: [1]}):
        with pytest.raises(TypeError, match="layers must be a dict of dicts of modules, got"):
            save_flat_matrices(tmp_path / "x.pth", layers)  # type: ignore[arg-type]
    two_sided = FlatQuantActivation(torch.eye(3), torch.eye(8))
    message = "layer 2: self_attn.o_proj must have matrix_left, got matrix_left and matrix_right"
    with pytest.raises(ValueError, match=message):
        save_flat_matrices(tmp_path / "x.pth", {2: {"self_attn.o_proj": two_sided}})
    with pytest.raises(ValueError, match="'lm_head' must be one of"):
        save_flat_matrices(tmp_path / "x.pth", {0: {"lm_head": two_sided}})
    one_sided = FlatQuantActivation(torch.eye(3), None)
    plain = FlatQuantActivation(None, None)
    for module, got in ((one_sided, "matrix_left"), (plain, "neither")):
        with pytest.raises(ValueError, match=f"must have matrix_left and matrix_right, got {got}$"):
            save_flat_matrices(tmp_path / "x.pth", {0: {"mlp.down_proj": module}})
    assert not (tmp_path / "x.pth").exists()


def test_modules_of_one_transform_must_agree_to_be_saved(tmp_path: Path) -> None:
    def module(diagonal: float = 1.0, **options: Any) -> FlatQuantActivation:
        return FlatQuantActivation(diagonal * torch.eye(3), torch.eye(8), **options)

    logits = (torch.ones(1), torch.ones(1))
    file = tmp_path / "x.pth"
    save_flat_matrices(file, {0: {"mlp.gate_proj": module(), "mlp.up_proj": module()}})
    clip_only = FlatQuantActivation(None, None, logits)
    for other, key in (
        (module(2.0), "matrix_left"),
        (module().half(), "matrix_left"),
        (module(diag_scale=torch.ones(24)), "diag_scale"),
        (clip_only, "matrix_left"),
    ):
        for pair in ((module(), other), (other, module())):
            modules = dict(zip(("mlp.gate_proj", "mlp.up_proj"), pair, strict=True))
            message = f"layer 0: mlp.up_proj must have the same 'mlp.up_gate_trans.{key}'"
            with pytest.raises(ValueError, match=message):
                save_flat_matrices(file, {0: modules})
    # The clipping alone, as of a model without transforms.
    save_flat_matrices(file, {0: {"mlp.gate_proj": clip_only}})
    assert load_flat_matrices(file)[0]["mlp.gate_proj"].clip_ratio == clip_only.clip_ratio


@needs_gpu
def test_the_module_in_a_cuda_graph(path: Path) -> None:
    module = load_flat_matrices(path)[0]["mlp.down_proj"].half().cuda()
    x = torch.randn(16, INTERMEDIATE[0] * INTERMEDIATE[1], dtype=torch.float16, device="cuda")
    module(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        quantized, scales = module(x)
    x.copy_(torch.randn_like(x))
    graph.replay()
    for ours, expected in zip((quantized, scales), module(x), strict=True):
        assert torch.equal(ours, expected)
    assert module.clip_ratio_max.is_cuda and module.clip_ratio_max.dtype == torch.float32


@needs_gpu
def test_a_replay_follows_a_state_that_is_loaded_after_the_capture() -> None:
    module, other = (
        FlatQuantActivation(
            torch.randn(8, 8), torch.randn(16, 16), (torch.randn(1), torch.randn(1))
        )
        .half()
        .cuda()
        for _ in range(2)
    )
    x = torch.randn(16, 128, dtype=torch.float16, device="cuda")
    module(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = module(x)
    module.half().load_state_dict(other.state_dict())
    graph.replay()
    for ours, expected in zip(outputs, other(x), strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("size", [1, 2, 12, 24, 32, 48])
def test_hadamard_matrices(size: int) -> None:
    matrix = smollm2_quality.hadamard(size)
    assert torch.equal(matrix.abs(), torch.ones(size, size))
    assert torch.equal(matrix @ matrix.T, size * torch.eye(size))


def test_perplexity() -> None:
    """A model that gives the right next token half of the probability, in every stretch."""
    vocabulary, tokens = 5, smollm2_quality.CONTEXT + 3

    def model(ids: Tensor) -> SimpleNamespace:
        following = torch.nn.functional.one_hot(ids.roll(-1, dims=1), vocabulary)
        return SimpleNamespace(logits=torch.where(following == 1, 0.5, 0.125).log())

    ids = torch.randint(vocabulary, (1, tokens))
    assert smollm2_quality.perplexity(model, ids) == pytest.approx(2.0)


class Attention(torch.nn.Module):
    """One token attends to itself: o_proj reads what v_proj gives, each value head three times."""

    def __init__(self) -> None:
        super().__init__()
        self.v_proj = torch.nn.Linear(576, 192, bias=False)
        self.o_proj = torch.nn.Linear(576, 576, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        values = self.v_proj(x).view(-1, 3, 1, 64).expand(-1, 3, 3, 64)
        return self.o_proj(values.reshape(-1, 576))


def test_a_quantised_block_is_near_the_block_with_values_in_another_basis() -> None:
    block = torch.nn.Module()
    block.self_attn = Attention()
    x = torch.randn(64, 576)
    with torch.no_grad():
        exact = block.self_attn(x)

    def rotation(size: int) -> Tensor:
        return torch.linalg.qr(torch.randn(size, size)).Q

    modules = {
        "self_attn.v_proj": FlatQuantActivation(rotation(24), rotation(24)),
        "self_attn.o_proj": FlatQuantActivation(rotation(9), None),
        "self_attn.vcache_trans": FlatQuantActivation(None, rotation(64)),
    }
    for module in modules.values():
        module.half()
    linears = {name: block.get_submodule(name) for name in list(modules)[:2]}
    smollm2_quality.quantize_block(block, linears, modules)
    error = (block.self_attn(x) - exact).square().sum() / exact.square().sum()
    # Four roundings to int4, each with 0.8 to 2% of the energy; a basis that is not undone: > 1.
    assert 0.01 < error < 0.15
    assert max(len(row.unique()) for row in block.self_attn.v_proj.weight) <= 15
