"""Compares two files of bench_quantize.py: what got slower beyond the spread of repeated calls?

    python benchmarks/compare.py OLD.json NEW.json

A time counts as different if each median lies outside the other file's 10th to 90th percentile and
the medians differ by more than --tolerance, which is for what changes from run to run (clocks,
temperature). The exit status is 1 if the operator got slower anywhere or no longer runs somewhere,
2 if the files have no measurement in common.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Key = tuple[int, int, str, str, str]  # features, tokens, dtype, storage, implementation


def load(path: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if report.get("schema") != 1:
        raise SystemExit(f"{path} is no file of this version of bench_quantize.py")
    return report


def timings(report: dict[str, Any], peers: bool) -> dict[Key, dict[str, Any] | None]:
    """Entries by problem and implementation; None where the implementation did not run."""
    found: dict[Key, dict[str, Any] | None] = {}
    for result in report["results"]:
        problem = tuple(result[name] for name in ("features", "tokens", "dtype", "storage"))
        for name in [*result["implementations"], *result["not_run"]]:
            if peers or name == "flatquant":
                found[(*problem, name)] = result["implementations"].get(name)
    return found


def verdict(old: dict[str, Any] | None, new: dict[str, Any] | None, tolerance: float) -> str:
    """ "slower", "faster", "same", "no longer runs", "runs now" or "does not run"."""
    if old is None or new is None:
        if old is new:
            return "does not run"
        return "runs now" if old is None else "no longer runs"
    if new["us"] > old["us"] * (1 + tolerance):
        apart = new["us"] > old["p90_us"] and old["us"] < new["p10_us"]
        return "slower" if apart else "same"
    if new["us"] * (1 + tolerance) < old["us"]:
        apart = new["us"] < old["p10_us"] and old["us"] > new["p90_us"]
        return "faster" if apart else "same"
    return "same"


def main(argv: Sequence[str] | None = None) -> int:
    doc = (__doc__ or "").split("\n\n")
    parser = argparse.ArgumentParser(
        description=doc[0], epilog=doc[2], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old", type=Path, metavar="OLD.json")
    parser.add_argument("new", type=Path, metavar="NEW.json")
    parser.add_argument("--tolerance", type=float, default=0.02, help="(default: %(default)s)")
    parser.add_argument("--peers", action="store_true", help="compare the peers too")
    options = parser.parse_args(argv)
    old, new = load(options.old), load(options.new)

    for name in ("gpu", "driver", "torch", "cuda", "triton", "commit", "date"):
        before, after = old["environment"][name], new["environment"][name]
        if before != after:
            print(f"{name}: {before} -> {after}")
    if old["method"] != new["method"]:
        print(f"WARNING: timed differently: {old['method']} -> {new['method']}")

    before, after = (timings(report, options.peers) for report in (old, new))
    common = [key for key in before if key in after]
    if not common:
        print("the files have no measurement in common")
        return 2
    counts: dict[str, int] = {}
    worse = False
    for key in common:
        word = verdict(before[key], after[key], options.tolerance)
        counts[word] = counts.get(word, 0) + 1
        worse |= key[-1] == "flatquant" and word in ("slower", "no longer runs")
        if word not in ("same", "does not run"):
            features, tokens, dtype, storage, name = key
            change = f"{_times(before[key])} -> {_times(after[key])}"
            print(f"{word}: {name}, {features} x {tokens} tokens, {dtype}, {storage}: {change}")
    print(", ".join(f"{count} {word}" for word, count in sorted(counts.items())))
    if len(common) < len(before):
        print(f"{len(before) - len(common)} measurements of {options.old} are not in {options.new}")
    return 1 if worse else 0


def _times(entry: dict[str, Any] | None) -> str:
    if entry is None:
        return "-"
    return f"{entry['us']:.1f} us ({entry['p10_us']:.1f} .. {entry['p90_us']:.1f})"


if __name__ == "__main__":
    sys.exit(main())
