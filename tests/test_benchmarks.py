"""The benchmarks' own code: what is run, how it is reported, compared, plotted and published."""

from __future__ import annotations

import copy
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import NO_GPU
from shapes import SIZES

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

import bench_outputs
import bench_quantize
import compare
import measure
import models
import peers
import publish

from flatquant import get_decompose_dim


def a_report(slower: float = 1.0) -> dict[str, Any]:
    """As bench_quantize would write it, on a GPU that copies 4 TB/s and multiplies 800 TFLOP/s."""
    rates = measure.Rates(4000.0, {"float16": 800.0})
    results = []
    for features in models.sizes(["llama-3-8b", "llama-3-70b"]):
        rows, cols = get_decompose_dim(features)
        for tokens in (64, 1024, 16384):
            moved, flops = tokens * (features * 5 // 2 + 4), 2 * tokens * features * (rows + cols)
            floor, bound = rates.floor(moved, flops, "float16")
            us = floor / 0.8 + 2
            entries = {
                name: {
                    "us": us * factor,
                    "p10_us": us * factor * 0.99,
                    "p90_us": us * factor * 1.01,
                    "repeats": 30,
                    "peak_bytes": moved // 5,
                }
                for name, factor in {"flatquant": slower, "triton": 1.2, "copy": 0.9}.items()
            }
            results.append(
                {
                    "features": features,
                    "rows": rows,
                    "cols": cols,
                    "tokens": tokens,
                    "dtype": "float16",
                    "storage": "int32",
                    "kernel": "sm90",
                    "bytes": moved,
                    "flops": flops,
                    "floor_us": floor,
                    "bound": bound,
                    "implementations": entries,
                    "not_run": {"hadamard": "not installed"},
                }
            )
    environment = {**measure.environment("0123456789"), "gpu": "Some GPU", "driver": "1.2"}
    return {
        "schema": bench_quantize.SCHEMA,
        "environment": environment,
        "method": {"kernel": "auto", "cuda_graph": False, "cold_l2": True, "repeats": 30},
        "rates": {"copy_gb_per_s": 4000.0, "matmul_tflop_per_s": {"float16": 800.0}},
        "results": results,
    }


def saved(report: dict[str, Any], path: Path) -> str:
    path.write_text(json.dumps(report, allow_nan=False), encoding="utf-8")
    return str(path)


# What is run


def test_every_size_of_a_model_is_a_known_size() -> None:
    for name, model in models.MODELS.items():
        assert model.layers.keys() == {"q/k/v", "o", "gate/up", "down"}
        for size in model.layers.values():
            assert get_decompose_dim(size) in SIZES, (name, size)


def test_models_and_features_are_measured_together_once() -> None:
    options = bench_quantize.parse(["--model", "llama-3-8b", "mistral-7b", "--features", "576"])
    assert options.features == [576, 4096, 14336]
    everything = bench_quantize.parse(["--model", "all"]).features
    assert everything == sorted({size for model in models.MODELS.values() for size in model})
    assert bench_quantize.parse([]).features == [4096, 8192, 14336]


def test_the_floor_is_the_larger_of_memory_and_compute() -> None:
    rates = measure.Rates(4000.0, {"float16": 800.0})  # GB/s, TFLOP/s
    assert rates.floor(8e6, 800e6, "float16") == (2.0, "memory")
    assert rates.floor(4e6, 4000e6, "float16") == (5.0, "compute")


@pytest.mark.parametrize("storage", ["int32", "int8"])
@pytest.mark.parametrize("dtype", peers.DTYPES)
def test_eager_pytorch_computes_the_same(dtype: str, storage: str) -> None:
    problem = bench_quantize.random_problem(24, 32, 50, dtype, storage)
    x = problem.inputs[0]
    ours = peers.flatquant_kernel(problem)(x)
    other = peers.eager(problem)(x)
    assert other[0].dtype == ours[0].dtype and other[0].shape == ours[0].shape
    codes = [bench_quantize.first_codes(output, 768) for output in (ours, other)]
    assert (codes[0] != codes[1]).float().mean() < bench_quantize.WRONG / 2
    torch.testing.assert_close(other[1], ours[1], rtol=2e-2, atol=0)
    assert problem.moved_bytes == sum(t.numel() * t.element_size() for t in (x, *ours))


def test_timed_takes_the_inputs_in_turn_and_orders_its_percentiles() -> None:
    seen: list[int] = []
    inputs = [torch.zeros(1), torch.ones(1)]
    timing = measure.timed(lambda x: seen.append(int(x)), inputs, repeats=9)
    assert timing.repeats == 9
    assert seen == [0, 1] + [0, 1] * 4 + [0]
    assert 0 < timing.p10_us <= timing.us <= timing.p90_us
    assert measure.timed(lambda x: None, inputs, 1000, seconds=0).repeats == measure.FEWEST_REPEATS
    assert measure.timed(lambda x: seen.append(0), inputs, repeats=2, warm=True).us > 0


def test_the_hadamard_transform_is_chosen_by_size() -> None:
    package = types.SimpleNamespace(hadamard_transform=1, hadamard_transform_28N=28)
    assert peers._hadamard_of(package, 4096) == 1
    assert peers._hadamard_of(package, 14336) == 28
    for features in (11008, 12288):  # no function for 43 * 2^8; none installed for 12 * 2^10
        with pytest.raises(peers.CannotRun, match="size"):
            peers._hadamard_of(package, features)


def test_flatquants_file_is_loaded_without_its_package(tmp_path: Path) -> None:
    file = tmp_path / "deploy" / "kernels" / "kron_matmul.py"
    with pytest.raises(peers.CannotRun, match="kron_matmul.py does not exist"):
        peers._kron_matmul(tmp_path)
    file.parent.mkdir(parents=True)
    file.write_text(
        "import deploy\nfrom deploy.nn.quantization import Quantizer\n"
        "def kron_matmul(*args): return deploy.PackedQuantizedTensor(*args)\n"
    )
    assert peers._kron_matmul(tmp_path)(1, 2) == (1, 2)
    assert "deploy" not in sys.modules
    other = tmp_path / "other"
    (other / "deploy" / "kernels").mkdir(parents=True)
    (other / "deploy" / "kernels" / "kron_matmul.py").write_text("import no_such_package\n")
    with pytest.raises(peers.CannotRun, match="needs no_such_package, which is not installed"):
        peers._kron_matmul(other)


# How it is reported


def test_the_table_of_outputs_times_every_case(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_outputs.main(["--features", "576", "200", "--tokens", "3", "--repeats", "3"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert rows[0] == "| | 576, 3 tokens | 200, 3 tokens |"
    left, right = torch.eye(24), torch.eye(24)
    names = [case.name for case in bench_outputs.cases(left, right)]
    assert [row.split(" | ")[0] for row in rows[1:]] == [f"| {name}" for name in names]
    for row in rows[1:]:
        for cell in row.removesuffix(" |").split(" | ")[1:]:
            assert float(cell.split()[0]) > 0


@pytest.mark.skipif(not NO_GPU, reason="says what a machine without a GPU shows")
def test_without_a_gpu_each_peer_that_cannot_run_gets_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "results.json"
    arguments = ["--features", "576", "768", "--tokens", "1", "4", "--repeats", "3"]
    assert bench_quantize.main([*arguments, "--json", str(file), "--commit", "abc"]) == 0
    output = capsys.readouterr().out
    assert "No GPU" in output
    for name in ("triton", "flatquant-repo", "compile", "hadamard"):
        assert f"  {peers.LABELS[name]}: needs a GPU\n" in output

    report = json.loads(file.read_text(), parse_constant=pytest.fail)
    assert report["schema"] == bench_quantize.SCHEMA
    assert report["environment"]["commit"] == "abc"
    assert report["environment"]["torch"] == torch.__version__
    assert report["rates"] is None
    assert [(r["features"], r["tokens"]) for r in report["results"]] == [
        (576, 1), (576, 4), (768, 1), (768, 4),
    ]  # fmt: skip
    for result in report["results"]:
        assert list(result["implementations"]) == ["flatquant", "products", "eager", "copy"]
        for entry in result["implementations"].values():
            assert 0 < entry["p10_us"] <= entry["us"] <= entry["p90_us"]
            assert entry["repeats"] == 3
        ours = result["implementations"]["flatquant"]
        assert ours["output_bytes"] == result["tokens"] * (result["features"] // 2 + 4)


def test_a_peer_that_breaks_gets_a_line_and_the_operators_error_is_raised(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def raising(error: Exception) -> Any:
        def build(*_: object, **__: object) -> None:
            raise error

        return build

    monkeypatch.setattr(peers, "eager", raising(RuntimeError("broken\nat length")))
    monkeypatch.setattr(peers, "products", raising(torch.OutOfMemoryError("no")))
    problem = ["--features", "576", "--tokens", "2", "--repeats", "3"]
    options = bench_quantize.parse([*problem, "--peers", "eager", "products"])
    lines: list[str] = []
    report = bench_quantize.run(options, lines.append)
    assert report["results"][0]["not_run"] == {
        "eager": "RuntimeError: broken",
        "products": "out of memory at 2 tokens",
    }
    assert lines[-2:] == [
        "  the two matmuls alone: out of memory at 2 tokens",
        "  eager PyTorch: RuntimeError: broken",
    ]
    monkeypatch.setattr(peers, "flatquant_kernel", raising(RuntimeError("ours")))
    with pytest.raises(RuntimeError, match="ours"):
        bench_quantize.run(options, lines.append)


def test_a_kernel_that_does_not_serve_a_size_gets_a_line() -> None:
    problem = ["--features", "576", "--tokens", "2", "--repeats", "3"]
    options = bench_quantize.parse([*problem, "--kernel", "sm70", "--peers", "copy"])
    result = bench_quantize.run(options, lambda _: None)["results"][0]
    assert list(result["implementations"]) == ["copy"]
    reason = "kernel sm70 does not serve these sizes in float16 here"
    assert result["not_run"] == {"flatquant": reason}


def test_a_reason_names_the_sizes_where_it_holds_only_there() -> None:
    report = a_report()
    assert bench_quantize.not_run(report)[1:] == ["  Hadamard + int4: not installed"]
    for result in report["results"]:
        if result["features"] != 8192:
            result["not_run"] = {}
    assert bench_quantize.not_run(report)[1:] == ["  Hadamard + int4: not installed (8192)"]


def test_the_table_shows_rates_ratios_and_memory() -> None:
    result = a_report()["results"][2]
    lines = bench_quantize.table(result).strip().splitlines()
    assert lines[0] == "4096 (64x64), 16384 tokens, float16, int32, kernel sm90"
    ours, triton, same_bytes, floor = (line.split() for line in lines[2:])
    # 16384 * 10244 bytes at 4 TB/s; 80% of that and 2 us more; 2 * 16384 * 4096 * 128 FLOP
    assert floor == ["floor", "(memory)", "42.0"]
    assert ours == ["flatquant", "54.4", "53.9", "..", "55.0", "3082", "315.52", "0.77", "33.6"]
    assert triton[-3:] == ["0.64", "1.20x", "33.6"]
    assert not any(word.endswith("x") for word in same_bytes)

    result["implementations"]["triton"]["mismatch"] = 0.4
    assert "WARNING: 40% of its codes differ" in bench_quantize.table(result)
    result["implementations"]["flatquant"]["peak_bytes"] = None
    assert bench_quantize.table(result).splitlines()[3].split()[-1] == "-"


@pytest.mark.parametrize("with_tqdm", [True, False])
def test_the_progress_bar_needs_no_tqdm(
    with_tqdm: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if with_tqdm:
        pytest.importorskip("tqdm")
    else:
        monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    items, write = bench_quantize.progress([1, 2, 3], print)
    for item in items:
        write(f"item {item}")
    captured = capsys.readouterr()
    assert captured.out.split("\n")[:3] == ["item 1", "item 2", "item 3"]
    assert "0/3" in captured.err


# How two runs are compared


@pytest.mark.parametrize(
    "old, new, word",
    [
        ((100, 99, 101), (110, 109, 111), "slower"),
        ((110, 109, 111), (100, 99, 101), "faster"),
        ((100, 99, 101), (101.5, 101.2, 101.8), "same"),  # apart, but within the tolerance
        ((100, 90, 111), (110, 109, 111), "same"),  # within the old spread
        ((100, 99, 101), (110, 99, 120), "same"),  # within the new spread
        ((100, 99, 101), None, "no longer runs"),
        (None, (100, 99, 101), "runs now"),
        (None, None, "does not run"),
    ],
)
def test_only_what_lies_beyond_the_spread_is_flagged(
    old: tuple[float, ...] | None, new: tuple[float, ...] | None, word: str
) -> None:
    old_entry, new_entry = (
        times and dict(zip(("us", "p10_us", "p90_us"), times, strict=True)) for times in (old, new)
    )
    assert compare.verdict(old_entry, new_entry, 0.02) == word


def test_compare_names_what_got_slower(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = saved(a_report(), tmp_path / "old.json")
    assert compare.main([old, old]) == 0
    assert capsys.readouterr().out == "12 same\n"

    slower = a_report()
    slower["results"][0] = a_report(slower=1.1)["results"][0]
    slower["environment"]["driver"] = "1.3"
    new = saved(slower, tmp_path / "new.json")
    assert compare.main([old, new]) == 1
    output = capsys.readouterr().out
    assert "driver: 1.2 -> 1.3" in output
    assert "slower: flatquant, 4096 x 64 tokens, float16, int32: 2.2 us (2.2 .. 2.2) ->" in output
    assert output.endswith("\n11 same, 1 slower\n")
    assert compare.main([new, old]) == 0
    assert "faster: flatquant" in capsys.readouterr().out

    gone = a_report()
    del gone["results"][0]["implementations"]["flatquant"]
    gone["results"][0]["not_run"]["flatquant"] = "out of memory"
    assert compare.main([old, saved(gone, tmp_path / "gone.json")]) == 1
    assert "no longer runs: flatquant, 4096 x 64 tokens" in capsys.readouterr().out


def test_a_slower_peer_is_shown_on_request_and_is_no_failure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = a_report()
    for result in changed["results"]:
        for name in ("us", "p10_us", "p90_us"):
            result["implementations"]["triton"][name] *= 2
    files = [saved(a_report(), tmp_path / "old.json"), saved(changed, tmp_path / "new.json")]
    assert compare.main(files) == 0
    assert "triton" not in capsys.readouterr().out
    assert compare.main([*files, "--peers"]) == 0
    assert "slower: triton" in capsys.readouterr().out


def test_compare_needs_common_measurements_of_its_own_schema(tmp_path: Path) -> None:
    report = a_report()
    old = saved(report, tmp_path / "old.json")
    empty = saved({**report, "results": []}, tmp_path / "empty.json")
    assert compare.main([old, empty]) == 2
    with pytest.raises(SystemExit, match="no file of this version"):
        compare.main([old, saved({**report, "schema": 0}, tmp_path / "other.json")])


# How it is shown


def test_the_plots_are_made_from_the_reports_alone(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    import plots

    report = a_report()
    written = plots.draw([report], tmp_path / "first")
    assert [path.name for path in written] == ["roofline.svg", "tokens.svg", "models.svg"]
    again = plots.draw([report], tmp_path / "second")
    for path, same in zip(written, again, strict=True):
        assert "<svg" in path.read_text() and path.read_bytes() == same.read_bytes()
    other = plots.draw([a_report(slower=1.1)], tmp_path / "third")
    assert all(a.read_bytes() != b.read_bytes() for a, b in zip(written, other, strict=True))

    on_cpu = {**report, "rates": None, "results": report["results"][2:3]}
    assert plots.draw([on_cpu], tmp_path / "cpu") == []


def test_publish_fills_the_pages_and_notices_any_drift(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    for page in ("README.md", "README.zh.md"):
        text = f"# Title\n{publish.BEGIN}\nold\n{publish.END}\nmore\n"
        (tmp_path / page).write_text(text, encoding="utf-8")
    results = tmp_path / "results"
    results.mkdir()
    where = ["--results", str(results), "--root", str(tmp_path)]
    assert publish.main(where) == 1  # no results yet
    saved(a_report(), results / "models.json")
    assert publish.main([*where, "--check"]) == 1
    assert publish.main(where) == 0
    assert publish.main([*where, "--check"]) == 0
    assert all((results / f"{name}.svg").is_file() for name in publish.PLOTS)

    page = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert page.startswith("# Title\n") and page.endswith(f"{publish.END}\nmore\n")
    assert "old" not in page
    # flatquant, floor, floor / time, Triton, copy
    assert "| 4096 (64x64) | 16,384 | float16 | 54.4 | 42.0 | 0.77 | 65.3 | 49.0 |" in page
    verdict = "No peer is faster by 1% or more. Of 12 measurements, each ran in: "
    assert f"{verdict}plain fused Triton 12.\n" in page
    assert "| 4096 (64x64) | 16,384 |" in (tmp_path / "README.zh.md").read_text(encoding="utf-8")
    (tmp_path / "README.md").write_text(page.replace("54.4", "54.3"), encoding="utf-8")
    assert publish.main([*where, "--check"]) == 1
    assert "README.md does not agree" in capsys.readouterr().out


def test_publish_lists_every_size_where_a_peer_is_faster() -> None:
    report = copy.deepcopy(a_report())
    result = report["results"][2]
    result["implementations"]["triton"]["us"] = result["implementations"]["flatquant"]["us"] / 1.25
    text = publish.section(report, "en", features=[14336])
    assert "4096 at 16,384 tokens, float16, int32 (plain fused Triton, 1.25)" in text
    assert "| 4096" not in text and "| 14336" in text
    result["implementations"]["triton"]["us"] = result["implementations"]["flatquant"]["us"] / 1.009
    assert "No peer is faster by 1% or more." in publish.section(report, "en")


def test_the_readmes_have_a_place_for_the_results() -> None:
    for page in ("README.md", "README.zh.md"):
        publish.filled((publish.ROOT / page).read_text(encoding="utf-8"), "")


@pytest.mark.skipif(
    not (publish.RESULTS / "models.json").is_file(), reason="no results are committed"
)
def test_the_readmes_agree_with_the_committed_results() -> None:
    assert publish.main(["--check"]) == 0
    for name in publish.PLOTS:
        assert (publish.RESULTS / f"{name}.svg").is_file()


# On a GPU


@pytest.mark.skipif(bool(NO_GPU), reason=NO_GPU)
@pytest.mark.parametrize("how", [[], ["--cuda-graph"], ["--warm"]], ids=["calls", "graph", "warm"])
def test_every_peer_that_runs_computes_the_same(how: list[str]) -> None:
    arguments = ["--features", "4096", "--tokens", "1", "256", "--repeats", "7", "--slow-peers-at"]
    report = bench_quantize.run(bench_quantize.parse([*arguments, *how]), lambda text: None)
    assert report["method"]["cold_l2"] == (how != ["--warm"])
    for result in report["results"]:
        assert {"flatquant", "products", "eager", "copy"} <= set(result["implementations"])
        if measure.environment()["triton"] is not None:
            assert {"compile", "triton"} <= set(result["implementations"])
        for name, entry in result["implementations"].items():
            assert entry["us"] > 0
            assert entry.get("mismatch", 0) < bench_quantize.WRONG, name
        ours = result["implementations"]["flatquant"]
        # Its results and nothing else; the allocator gives out multiples of 512 bytes.
        assert ours["output_bytes"] <= ours["peak_bytes"] < ours["output_bytes"] + 1024
