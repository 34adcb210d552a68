"""Draws the plots of README from the committed results and fills in its performance tables.

    python benchmarks/publish.py            # after new files in benchmarks/results/
    python benchmarks/publish.py --check    # changes nothing; status 1 if a page does not agree

The results are the files of `bench_quantize.py --json` in benchmarks/results/, by the commands that
the README there names: models.json holds the sizes of all models, the others more. What stands
between the two marks in a page is written here; nothing between them is written by hand.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Installed or not: a checkout finds itself.
sys.path.append(str(Path(__file__).resolve().parents[1]))

from models import sizes
from peers import LABELS

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BEGIN = "<!-- written by benchmarks/publish.py: begin -->"
END = "<!-- end -->"
HEADING = """# All results

Written by `python benchmarks/publish.py` from the files here, which a GPU made with

```bash
python benchmarks/bench_quantize.py --model all --tokens 16384 131072 --repeats 20 \\
  --flatquant-repo PATH --json benchmarks/results/models.json
python benchmarks/bench_quantize.py --features 4096 14336 --tokens 1 16 64 256 1024 4096 16384 \\
  --cuda-graph --repeats 20 --flatquant-repo PATH --json benchmarks/results/tokens.json
python benchmarks/bench_quantize.py --features 4096 8192 14336 28672 --tokens 1 64 --warm \\
  --peers triton products --json benchmarks/results/decode.json
python benchmarks/bench_quantize.py --model all --features 5376 6144 7168 9216 10240 17408 17920 \\
  18432 21504 32768 36864 --tokens 1024 4096 16384 131072 --peers copy --repeats 20 \\
  --json benchmarks/results/sizes.json
python benchmarks/bench_quantize.py --features 4096 8192 14336 28672 --dtypes bfloat16 float32 \\
  tf32 --storage int32 int8 --peers copy --repeats 20 --json benchmarks/results/dtypes.json
python benchmarks/bench_quantize.py --features 4096 8192 14336 28672 --dtypes float16 float32 \\
  tf32 --kernel sm80 --peers copy --repeats 20 --json benchmarks/results/sm80.json
python benchmarks/bench_quantize.py --features 4096 14336 --dtypes float16 float32 --kernel simt \\
  --peers eager --repeats 20 --json benchmarks/results/simt.json
```

without anything else on the GPU. `tf32` is float32 with torch's matmul precision at `high`, and
`decode.json` has warm calls, all others cold ones. Storage is int32 and the kernel `sm90` where no
other is named."""
# README shows the sizes of these; results/README.md all that were measured.
SHOWN_MODELS = ["llama-3-8b", "llama-3-70b", "qwen2.5-7b", "llama-2-7b"]
PLOTS = ["roofline", "tokens", "models"]
PLOTTED = ["models.json", "tokens.json"]
USUAL = {"int32", "sm90"}  # storage and kernel that go without saying
PEERS = [name for name in LABELS if name not in ("flatquant", "copy")]

TEXTS = {
    "en": {
        "where": "{gpu}, driver {driver}, torch {torch}, CUDA {cuda}, {date}, commit {commit}: "
        "copy {copy:.2f} TB/s, 16-bit matmul {matmul:.0f} TFLOP/s. Microseconds.",
        "columns": ["features (M x N)", "tokens", "dtype", "flatquant", "floor", "floor / time"],
        "labels": LABELS,
        "loses": "Slower than a peer by 1% or more (flatquant's time over the peer's): {list}.",
        "wins": "No peer is faster by 1% or more. Of {count} measurements, each ran in: {list}.",
        "warm": "Calls back to back, which overlap where a kernel allows it, warm L2. ",
        "loss": "{features} at {tokens:,} tokens, {dtype}, {storage} ({label}, {ratio:.2f})",
    },
    "zh": {
        "where": "{gpu}，驱动 {driver}，torch {torch}，CUDA {cuda}，{date}，提交 {commit}："
        "拷贝 {copy:.2f} TB/s，16 位矩阵乘 {matmul:.0f} TFLOP/s。单位微秒。",
        "columns": ["features (M x N)", "token 数", "数据类型", "flatquant", "下限", "下限 / 时间"],
        "labels": {
            **LABELS,
            "triton": "普通融合 Triton",
            "flatquant-repo": "FlatQuant 的 Triton 核函数",
            "products": "仅两次矩阵乘",
            "eager": "逐算子 PyTorch",
            "copy": "拷贝同样字节",
        },
        "loses": "慢于对照 1% 以上的情形（flatquant 用时与对照之比）：{list}。",
        "wins": "没有快 1% 以上的对照。{count} 次测量中各对照运行的次数：{list}。",
        "warm": "连续调用（内核允许时相互重叠），L2 为热。",
        "loss": "{features}、{tokens:,} 个 token、{dtype}、{storage}（{label}，{ratio:.2f}）",
    },
}


def section(report: dict[str, Any], language: str, features: Sequence[int] | None = None) -> str:
    """Markdown of a report: where it ran, the table of these sizes (or all), and where it loses."""
    text = TEXTS[language]
    labels: dict[str, str] = text["labels"]
    environment, rates = report["environment"], report["rates"]
    ran = [result for result in report["results"] if "flatquant" in result["implementations"]]
    shown = [r for r in ran if features is None or r["features"] in features]
    measured = {name for result in ran for name in result["implementations"]}
    columns = [name for name in [*PEERS, "copy"] if name in measured]
    lines = [
        text["where"].format(
            **{**environment, "commit": (environment["commit"] or "?")[:7]},
            copy=rates["copy_gb_per_s"] / 1e3,
            matmul=max(rates["matmul_tflop_per_s"].values()),
        ),
        "",
        "| " + " | ".join([*text["columns"], *(labels[name] for name in columns)]) + " |",
        "|---" * (len(text["columns"]) + len(columns)) + "|",
    ]
    for result in shown:
        entries = result["implementations"]
        us = entries["flatquant"]["us"]
        cells = [
            f"{result['features']} ({result['rows']}x{result['cols']})",
            f"{result['tokens']:,}",
            ", ".join([result["dtype"], *sorted({result["storage"], result["kernel"]} - USUAL)]),
            _us(us),
            _us(result["floor_us"]),
            f"{result['floor_us'] / us:.2f}",
            *(_us(entries[name]["us"]) if name in entries else "-" for name in columns),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", verdict(report, language)]).rstrip()


def verdict(report: dict[str, Any], language: str) -> str:
    """Where a peer is 1% faster or more, or that none is; empty of a kernel that was forced."""
    text = TEXTS[language]
    ran = [result for result in report["results"] if "flatquant" in result["implementations"]]
    if report["method"]["kernel"] != "auto":
        return ""
    losses = [
        text["loss"].format(
            **result,
            label=text["labels"][name],
            ratio=result["implementations"]["flatquant"]["us"]
            / result["implementations"][name]["us"],
        )
        for result in ran
        for name in PEERS
        if name in result["implementations"]
        and 1.01 * result["implementations"][name]["us"]
        <= result["implementations"]["flatquant"]["us"]
    ]
    counts = {name: sum(name in result["implementations"] for result in ran) for name in PEERS}
    runs = [f"{text['labels'][name]} {count}" for name, count in counts.items() if count]
    joined = ("、" if language == "zh" else "; ").join(losses or runs)
    if not runs:
        return ""
    warm = "" if report["method"]["cold_l2"] else text["warm"]
    return warm + text["loses" if losses else "wins"].format(list=joined, count=len(ran))


def _us(us: float) -> str:
    return f"{us:.1f}" if us < 1000 else f"{us:,.0f}"


def filled(page: str, text: str) -> str:
    """The page with `text` between its two marks."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page has no {BEGIN!r} ... {END!r}")
    return f"{before}{BEGIN}\n{text}\n{END}{after}"


def read_reports(results: Path) -> dict[str, dict[str, Any]]:
    """Every report of a folder by its file's name."""
    return {
        path.name: json.loads(path.read_text(encoding="utf-8"))
        for path in sorted(results.glob("*.json"))
    }


def pages(reports: dict[str, dict[str, Any]], results: Path, root: Path) -> dict[Path, str]:
    """What each page must hold: both READMEs, and the table of everything beside the results."""
    wanted = {
        root / name: "\n\n".join(
            [
                section(reports["models.json"], language, sizes(SHOWN_MODELS)),
                *(
                    f"[{file}](benchmarks/results/{file}): {text}"
                    for file, report in reports.items()
                    if file != "models.json" and (text := verdict(report, language))
                ),
            ]
        )
        for name, language in [("README.md", "en"), ("README.zh.md", "zh")]
    }
    images = "\n\n" + "\n".join(f"![{name}](benchmarks/results/{name}.svg)" for name in PLOTS)
    pages = {
        path: filled(path.read_text(encoding="utf-8"), text + images)
        for path, text in wanted.items()
    }
    everything = [HEADING]
    for file, report in reports.items():
        everything += ["", f"## [{file}]({file})", "", section(report, "en")]
    pages[results / "README.md"] = "\n".join(everything) + "\n"
    return pages


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing, compare the pages")
    parser.add_argument("--results", type=Path, default=RESULTS, help="(default: %(default)s)")
    parser.add_argument("--root", type=Path, default=ROOT, help="folder of the READMEs")
    options = parser.parse_args(argv)
    reports = read_reports(options.results)
    if "models.json" not in reports:
        print(f"no results: {options.results / 'models.json'} does not exist")
        return 1
    wanted = pages(reports, options.results, options.root)
    if options.check:
        wrong = [
            path
            for path, text in wanted.items()
            if not path.is_file() or path.read_text(encoding="utf-8") != text
        ]
        for path in wrong:
            print(f"{path} does not agree with the results: run python benchmarks/publish.py")
        return 1 if wrong else 0
    import plots

    for path, text in wanted.items():
        path.write_text(text, encoding="utf-8")
        print(path)
    shown = [report for file, report in reports.items() if file in PLOTTED]
    for path in plots.draw(shown, options.results):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
