"""`python -m flatquant` on the CPU, and the activations that ship with the package."""

import json
import os
import subprocess
import sys

import pytest
import torch

from flatquant import CUDA_AVAILABLE, available_kernels, get_decompose_dim, sample
from flatquant import __main__ as demo
from flatquant.accuracy import TOLERANCES

RESULT_KEYS = {
    *("name", "tokens", "features", "M", "N", "dtype", "kernel", "storage", "ok", "failures"),
    *("mismatch", "limit", "max_step", "scale_error", "sqnr_plain", "sqnr"),
}
SYSTEM_KEYS = {
    *("version", "distribution", "torch", "cuda", "gpu", "extension_error", "compiled_archs"),
    *("kernels", "results", "ok"),
}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own that sees no GPU."""
    return subprocess.run(
        [sys.executable, "-m", "flatquant", *arguments],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_shipped_activations_by_the_reference():
    process = run()
    assert process.returncode == 0, process.stdout + process.stderr
    assert "no GPU" in process.stdout
    for item in sample.load():
        assert process.stdout.count(item.name) == 2  # both storages
    assert process.stdout.splitlines()[-1].startswith("OK: ")


def test_json_is_one_object_with_the_promised_keys():
    process = run("--json")
    assert process.returncode == 0, process.stderr
    report = json.loads(process.stdout)
    assert set(report) == SYSTEM_KEYS
    assert report["ok"] is True and report["gpu"] is None
    assert report["torch"] == torch.__version__
    sizes = {row["features"]: (row["M"], row["N"]) for row in report["kernels"]}
    assert sizes == {n: get_decompose_dim(n) for n in (576, 1536, 4096, 8192, 14336)}
    assert all(row["kernels"] == ["reference"] for row in report["kernels"])
    assert [(r["features"], r["storage"]) for r in report["results"]] == [
        *((1536, "int8"), (1536, "int32"), (576, "int8"), (576, "int32"))
    ]
    for result in report["results"]:
        assert set(result) == RESULT_KEYS
        assert result["ok"] and result["failures"] == []
        assert result["tokens"] == 64 and result["kernel"] == "reference"
        assert result["mismatch"] <= result["limit"] == 1e-3
        assert result["sqnr"] > result["sqnr_plain"] + 10


@pytest.mark.skipif(not CUDA_AVAILABLE, reason="needs a CUDA device and the compiled extension")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_a_gpu_runs_its_best_kernel(dtype, capsys):
    assert demo.main(["--dtype", dtype, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["gpu"] and report["compiled_archs"]
    for result in report["results"]:
        best = available_kernels(result["M"], result["N"], getattr(torch, dtype))[0]
        assert result["kernel"] == best != "reference"


@pytest.mark.parametrize(
    ("arguments", "factors", "storages"),
    [
        (["--features", "4096", "--tokens", "3"], (64, 64), ["int8", "int32"]),
        (["--features", "14", "--dtype", "float32"], (2, 7), ["int8"]),
        (["--features", "1", "--dtype", "bfloat16"], (1, 1), ["int8"]),
        (["--features", "768", "--dtype", "bfloat16"], (24, 32), ["int8", "int32"]),
    ],
)
def test_synthetic_sizes(arguments, factors, storages, capsys):
    assert demo.main([*arguments, "--kernel", "reference", "--json"]) == 0
    results = json.loads(capsys.readouterr().out)["results"]
    assert [result["storage"] for result in results] == storages
    for result in results:
        assert (result["M"], result["N"]) == factors
        assert result["dtype"] == (arguments[-1] if "--dtype" in arguments else "float16")
        assert result["tokens"] == (3 if "--tokens" in arguments else 128)
        assert result["limit"] == TOLERANCES[getattr(torch, result["dtype"])].mismatch


def flip_one_word(quantized, scales):
    quantized[-1, -1] ^= 1 << 1  # two steps off, in either storage
    return quantized, scales


@pytest.mark.parametrize(
    "spoil",
    [
        flip_one_word,
        lambda quantized, scales: (quantized, scales * 1.01),
        lambda quantized, scales: (quantized, torch.full_like(scales, torch.nan)),
        lambda quantized, scales: (quantized.roll(1, dims=0), scales),
    ],
    ids=["code", "scale", "nan", "tokens"],
)
def test_a_wrong_result_gives_exit_status_1(spoil, monkeypatch, capsys):
    quantize = sample.flatquant_dynamic_quantize
    monkeypatch.setattr(
        sample, "flatquant_dynamic_quantize", lambda *args, **kw: spoil(*quantize(*args, **kw))
    )
    assert demo.main(["--kernel", "reference", "--json"]) == 1
    report = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)  # no NaN in JSON
    assert report["ok"] is False
    assert all(not r["ok"] and r["failures"] for r in report["results"])
    assert demo.main(["--kernel", "reference"]) == 1
    assert "\nWRONG: 4 of 4 results" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kernel", "nonesuch"], "--kernel must be auto or one of"),
        (["--features", "0"], "must be at least 1, got 0"),
        (["--tokens", "-1"], "must be at least 1, got -1"),
        (["--dtype", "float64"], "invalid choice"),
    ],
)
def test_wrong_arguments_give_exit_status_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit:
        demo.main(arguments)
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


def test_shipped_activations_are_small_and_have_the_outliers():
    folder = sample.SHIPPED.parent
    assert sum(file.stat().st_size for file in folder.iterdir()) < 300_000
    down_proj, q_proj = sample.load()
    assert down_proj.input.shape == (64, 1536) and q_proj.input.shape == (64, 576)
    for item in (down_proj, q_proj):
        x = item.input.double()
        peak = x.abs().amax(-1) / x.square().mean(-1).sqrt()
        assert peak.median() > 20
        assert item.name in (folder / "README.md").read_text(encoding="utf-8")
    assert down_proj.input.abs().max() > 2000


def test_saved_inputs_are_read_back(tmp_path):
    item = sample.synthetic(24, tokens=5)
    sample.save(tmp_path / "a.npz", [item, item._replace(name="b.c")])
    first, second = sample.load(tmp_path / "a.npz")
    assert (first.name, second.name) == ("synthetic 24", "b.c")
    for wanted, got in zip(item[1:], first[1:], strict=True):
        assert torch.equal(wanted.half(), got)


def test_inverse_transform_undoes_the_transform():
    item = sample.synthetic(96, tokens=4)
    y = sample.reference.transform(*item[1:], torch.float64)
    torch.testing.assert_close(sample.inverse_transform(y, *item[2:]), item.input)


def test_sqnr_is_the_mean_of_the_tokens():
    x = torch.tensor([[3.0, 4.0], [30.0, 40.0]])
    noise = torch.tensor([[0.5, 0.0], [0.0, 0.5]])  # 20 and 40 dB below
    assert sample.sqnr(x, x + noise) == pytest.approx(30.0)
    assert sample.sqnr(x, x) == pytest.approx(160.0)
