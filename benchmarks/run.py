"""
Runs the benchmarks, each in a process of its own, and writes a table: `make benchmark`.

    python benchmarks/run.py
    python benchmarks/run.py --quick --modules loading growth --output_dir outputs/benchmark_quick

Leaves `benchmark.json` and `benchmark.md` in `output_dir`, rewritten after each module. A module of `MODULES` has a
function `measure(quick)` that returns rows with `name`, `reference` and `ratio`, a time by the time of the reference in
the same run; further `seconds` and `reference_seconds`, or `value`, `reference_value` and `unit` of what is no time;
and optionally `target`, the highest ratio that is good, or with `at_least` true the lowest.

Exits with 1 where a module failed, not where a target is missed.
"""

import argparse
import faulthandler
import importlib
import importlib.util
import logging
import multiprocessing
import sys
import time
import traceback
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from timing import describe_machine

from gavamoe_hf.evaluation.predict import write_json, write_text

logger = logging.getLogger("benchmark")

MODULES = ("moe_layer", "training_step", "generation", "loading", "stage_one", "evaluation_speed", "growth")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/benchmark"))
    parser.add_argument("--quick", action="store_true", help="Smaller sizes, to try the benchmarks.")
    parser.add_argument("--modules", nargs="+", choices=MODULES, default=MODULES, help="All if not given.")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch's own number if not given.")
    return parser.parse_args(argv)


def run_module(name: str, quick: bool, threads: int, seconds: float | None = None) -> list[dict[str, Any]]:
    """
    The rows of `measure` of a module, or of another function of it (`module:function`), in whatever process this is;
    the process ends where it takes longer than `seconds`.
    """
    if seconds is not None:
        faulthandler.dump_traceback_later(seconds, exit=True)
    torch.set_num_threads(threads)
    module, _, function = name.partition(":")
    rows = getattr(importlib.import_module(module), function or "measure")(quick)
    for row in rows:
        missing = [key for key in ("name", "reference", "ratio") if key not in row]
        if missing:
            raise ValueError(f"Expected name, reference and ratio in each row of {name}, but {row} lacks {missing}.")
    return rows


def run_modules(
    modules: list[str], quick: bool, threads: int, output_dir: Path, seconds: float | None = None
) -> dict[str, Any]:
    """Rows, seconds and failures of all modules, written to `output_dir` after each; `seconds` bounds each of them."""
    report: dict[str, Any] = {"machine": describe_machine(threads), "quick": quick, "seconds": {}, "failed": {}}
    report["rows"] = []
    for number, name in enumerate(modules, start=1):
        logger.info("%d/%d %s ...", number, len(modules), name)
        start = time.perf_counter()
        try:
            # A fresh process for each: what one has imported, cached or allocated is not another's
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                rows = pool.submit(run_module, name, quick, threads, seconds).result()
        except Exception as error:
            report["failed"][name] = f"{type(error).__name__}: {error}"
            logger.error("%s failed:\n%s", name, traceback.format_exc())
            rows = []
        report["rows"] += [{"module": name, **row} for row in rows]
        report["seconds"][name] = time.perf_counter() - start
        logger.info("%d/%d %s: %.0f s, %d rows", number, len(modules), name, report["seconds"][name], len(rows))
        write_json(output_dir / "benchmark.json", report)
        write_text(output_dir / "benchmark.md", as_markdown(report))
    return report


def is_met(row: dict[str, Any]) -> bool | None:
    """Whether a row's target is reached; `None` without one."""
    if row.get("target") is None:
        return None
    return row["ratio"] >= row["target"] if row.get("at_least") else row["ratio"] <= row["target"]


def as_markdown(report: dict[str, Any]) -> str:
    machine = report["machine"]
    bfloat16 = ", ".join(machine["bfloat16_instructions"]) or "none"
    lines = [
        f"{machine['processor']}, {machine['cores']} cores, threads: {machine['threads']}, {machine['memory_gib']:.0f} "
        f"GiB, {machine['instructions']}, bfloat16 instructions: {bfloat16}, GPU: {machine['gpu'] or 'none'}; load "
        f"average at the start {machine['load_average']:.1f}; Python {machine['python']}, torch {machine['torch']}, "
        f"transformers {machine['transformers']}; {machine['date']}; "
        f"{sum(report['seconds'].values()) / 60:.1f} minutes in all{', quick sizes' if report['quick'] else ''}.",
        "",
        "| what | reference | ratio | target | met | time | reference's |",
        "|---|---|---:|---:|---|---:|---:|",
        *(_table_row(row) for row in report["rows"]),
        *(f"\n{name} failed: {error}" for name, error in report["failed"].items()),
    ]
    return "\n".join(lines) + "\n"


def _table_row(row: dict[str, Any]) -> str:
    target = ""
    if row.get("target") is not None:
        target = f"{'≥' if row.get('at_least') else '≤'} {row['target']:g}"
    met = {True: "yes", False: "**no**", None: ""}[is_met(row)]
    unit, keys = row.get("unit"), ("value", "reference_value")
    if unit is None:
        keys = ("seconds", "reference_seconds")
    values = [_amount(row.get(key), unit) for key in keys]
    cells = [str(row["name"]), str(row["reference"]), f"{row['ratio']:.3f}", target, met, *values]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _amount(value: float | None, unit: str | None) -> str:
    if value is None:
        return ""
    if unit is not None:
        return f"{value:,.4g} {unit}"
    return f"{value:.3g} s" if value >= 1 else f"{1000 * value:.3g} ms"


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    absent = [name for name in args.modules if importlib.util.find_spec(name) is None]
    if absent:
        names = ", ".join(f"{name}.py" for name in absent)
        sys.exit(
            f"Expected {names} beside {Path(__file__).name}, but there is no such file. Leave it out of --modules."
        )
    args.output_dir.mkdir(parents=True, exist_ok=True)
    report = run_modules(list(args.modules), args.quick, args.threads, args.output_dir)
    print(as_markdown(report), end="")
    return 1 if report["failed"] else 0


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logger.setLevel(logging.INFO)
    sys.exit(main())
