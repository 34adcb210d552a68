"""Plots of what bench_quantize.py reports; needs matplotlib: pip install -e ".[plots]"."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from models import MODELS
from peers import LABELS

matplotlib.use("svg")
matplotlib.rcParams.update(
    {
        "axes.grid": True,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "font.size": 9,
        "grid.alpha": 0.3,
        "svg.hashsalt": "flatquant",  # the same report gives the same file
    }
)
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.ticker import LogLocator  # noqa: E402

COLORS = dict(zip(LABELS, plt.get_cmap("tab10").colors, strict=False))


def draw(reports: Sequence[dict[str, Any]], folder: Path) -> list[Path]:
    """Draws roofline.svg, tokens.svg and models.svg, as far as the reports hold what they show.

    Args:
        reports: of one GPU; float16 with int32 storage is shown.
        folder: made if it does not exist.

    Returns:
        The files written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    figures = {"roofline": roofline(reports), "tokens": tokens(reports), "models": models(reports)}
    written = []
    for name, figure in figures.items():
        if figure is None:
            continue
        environment = reports[0]["environment"]
        commits = dict.fromkeys(
            (report["environment"]["commit"] or "unknown")[:7] for report in reports
        )
        figure.text(
            0.99,
            0.005,
            f"{environment['gpu'] or 'CPU'}, torch {environment['torch']}, "
            f"{environment['date']}, commit {', '.join(commits)}",
            ha="right",
            fontsize=6,
            color="grey",
        )
        path = folder / f"{name}.svg"
        figure.savefig(path, metadata={"Date": None}, bbox_inches="tight")
        plt.close(figure)
        written.append(path)
    return written


def results(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The float16, int32 results in which the operator ran."""
    return [
        result
        for result in report["results"]
        if (result["dtype"], result["storage"]) == ("float16", "int32")
        and "flatquant" in result["implementations"]
    ]


def roofline(reports: Sequence[dict[str, Any]]) -> Any:
    """Every measured size under the roof of its run: TFLOP/s against FLOP per byte."""
    reports = [report for report in reports if report["rates"] and results(report)]
    if not reports:
        return None
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    copy = reports[0]["rates"]["copy_gb_per_s"]
    matmul = reports[0]["rates"]["matmul_tflop_per_s"]["float16"]
    points = [result for report in reports for result in results(report)]
    intensities = [result["flops"] / result["bytes"] for result in points]
    ridge = matmul * 1e3 / copy
    ends = [min(intensities) / 1.2, ridge, max(*intensities, ridge) * 1.2]
    roof = [min(end * copy / 1e3, matmul) for end in ends]
    axes.plot(ends, roof, color="black", linewidth=1)
    axes.annotate(f"{copy / 1e3:.2f} TB/s", (ends[0], roof[0]), (4, 8), textcoords="offset points")
    axes.annotate(
        f"{matmul:.0f} TFLOP/s", (ends[2], roof[2]), (0, 4), textcoords="offset points", ha="right"
    )
    counts = sorted({result["tokens"] for result in points})
    for count in counts:
        chosen = sorted(
            (result for result in points if result["tokens"] == count),
            key=lambda result: result["features"],
        )
        axes.plot(
            [result["flops"] / result["bytes"] for result in chosen],
            [
                result["flops"] / result["implementations"]["flatquant"]["us"] / 1e6
                for result in chosen
            ],
            "o",
            markersize=4,
            color=plt.get_cmap("viridis")(0.8 * counts.index(count) / max(1, len(counts) - 1)),
            label=f"{count:,} tokens",
        )
        if count == counts[-1]:
            for result in chosen:
                axes.annotate(
                    str(result["features"]),
                    (
                        result["flops"] / result["bytes"],
                        result["flops"] / result["implementations"]["flatquant"]["us"] / 1e6,
                    ),
                    (3, -9),
                    textcoords="offset points",
                    fontsize=6,
                )
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="FLOP per byte",
        ylabel="TFLOP/s",
        title="flatquant under the measured roof, float16 to int32-packed int4",
    )
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.set_minor_formatter(lambda value, _: "")
    axes.legend(fontsize=7, loc="lower right")
    return figure


def tokens(reports: Sequence[dict[str, Any]]) -> Any:
    """Time against tokens, a panel for each size of the report with the most token counts."""

    def counts(report: dict[str, Any]) -> int:
        return len({result["tokens"] for result in results(report)})

    report = max(reports, key=counts)
    if counts(report) < 3:
        return None
    sizes = sorted({result["features"] for result in results(report)})
    figure, panels = plt.subplots(
        1, len(sizes), figsize=(3.6 * len(sizes), 3.8), layout="constrained", squeeze=False
    )
    for axes, features in zip(panels[0], sizes, strict=True):
        chosen = sorted(
            (result for result in results(report) if result["features"] == features),
            key=lambda result: result["tokens"],
        )
        for name, label in LABELS.items():
            line = [
                (result["tokens"], result["implementations"][name]["us"])
                for result in chosen
                if name in result["implementations"]
            ]
            if line:
                axes.plot(
                    *zip(*line, strict=True),
                    marker=".",
                    label=label,
                    color=COLORS[name],
                    linewidth=2 if name == "flatquant" else 1,
                    linestyle=":" if name == "copy" else "-",
                )
        if report["rates"]:
            axes.plot(
                [result["tokens"] for result in chosen],
                [result["floor_us"] for result in chosen],
                "--",
                color="black",
                linewidth=1,
                label="floor",
            )
        title = f"{features} ({chosen[0]['rows']}x{chosen[0]['cols']})"
        axes.set(xscale="log", yscale="log", xlabel="tokens", title=title)
    graph = " in a CUDA graph" if report["method"]["cuda_graph"] else ""
    panels[0][0].set_ylabel(f"microseconds of one call{graph}")
    panels[0][0].legend(fontsize=7)
    return figure


def models(reports: Sequence[dict[str, Any]]) -> Any:
    """Speed-up over each peer for what one block of a model quantises, where all was measured."""
    report = max(reports, key=lambda report: len({r["features"] for r in results(report)}))
    by_tokens: dict[int, dict[int, dict[str, Any]]] = {}
    for result in results(report):
        by_tokens.setdefault(result["tokens"], {})[result["features"]] = result["implementations"]
    count = min(by_tokens, key=lambda tokens: abs(tokens - 16384), default=0)
    by_size = by_tokens.get(count, {})
    complete = {
        name: [by_size[size] for size in model.layers.values()]
        for name, model in MODELS.items()
        if set(model) <= set(by_size)
    }
    peers = [name for name in LABELS if name not in ("flatquant", "copy")]
    speed_ups = {
        peer: {
            model: sum(layer[peer]["us"] for layer in layers)
            / sum(layer["flatquant"]["us"] for layer in layers)
            for model, layers in complete.items()
            if all(peer in layer for layer in layers)
        }
        for peer in peers
    }
    speed_ups = {peer: bars for peer, bars in speed_ups.items() if bars}
    if not speed_ups:
        return None
    figure, axes = plt.subplots(figsize=(max(5, 0.75 * len(complete) + 2), 4), layout="constrained")
    width = 0.8 / len(speed_ups)
    for index, (peer, bars) in enumerate(speed_ups.items()):
        axes.bar(
            [list(complete).index(model) + (index + 0.5) * width - 0.4 for model in bars],
            [speed_up - 1 for speed_up in bars.values()],
            width,
            bottom=1,  # bars go down where the peer is faster
            label=f"over {LABELS[peer]}",
            color=COLORS[peer],
        )
    axes.axhline(1, color="black", linewidth=1)
    axes.set_xticks(range(len(complete)), list(complete), rotation=35, ha="right")
    axes.set(
        yscale="log",
        ylabel="speed-up of flatquant",
        title=f"What one block quantises, {count:,} tokens, float16",
    )
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    axes.yaxis.set_minor_formatter(lambda value, _: "")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    figure.legend(fontsize=7, ncols=3, loc="outside lower center")
    return figure
