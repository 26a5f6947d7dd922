"""
Time and memory of `gavamoe evaluate` on generated predictions: one process for each number of records, one thread.

    OMP_NUM_THREADS=1 python benchmarks/evaluation_speed.py --output_dir outputs/evaluation_speed

As part of `make benchmark`, how the time grows with the number of records.

Texts are drawn from a Zipf vocabulary, 8 to 22 words, one of 5,000 features in most. Leaves `evaluation_speed.json` and
`evaluation_speed.md` in `output_dir`. The memory is the process's peak, less its peak before the file is read.
"""

import argparse
import json
import logging
import multiprocessing
import resource
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from timing import as_row, compare

from gavamoe_hf.evaluation import EvaluationOptions, evaluate_predictions, feature_diversity
from gavamoe_hf.evaluation.predict import write_json, write_text

_VOCABULARY, _FEATURES = 20_000, 5_000


def generate(path: Path, num_records: int, seed: int = 0) -> None:
    """Writes predictions line by line."""
    generator = np.random.default_rng(seed)
    with open(path, "w", encoding="utf-8") as file:
        for number in range(num_records):
            lengths = generator.integers(8, 23, size=2)
            words = generator.zipf(1.3, size=lengths.sum()) % _VOCABULARY
            prediction, reference = ([f"w{word}" for word in part] for part in np.split(words, lengths[:1]))
            rating = int(generator.integers(1, 6))
            row = {
                "user": f"u{number % 9973}",
                "item": f"i{number % 6007}",
                "rating": rating,
                "predicted_rating": rating + float(generator.normal()),
                "feature": [f"w{generator.zipf(1.3) % _FEATURES}"],
                "reference": " ".join(reference) + ".",
                "prediction": " ".join(prediction) + ".",
            }
            file.write(json.dumps(row) + "\n")


def measure_file(path: Path, num_records: int, profiles: list[str]) -> dict[str, float]:
    """Seconds and MiB of one evaluation, and seconds of DIV alone."""
    generate(path, num_records)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    evaluate_predictions(path, EvaluationOptions(profiles=profiles))
    seconds = time.perf_counter() - start
    mebibytes = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    predictions, features = [row["prediction"] for row in rows], {row["feature"][0] for row in rows}
    start = time.perf_counter()
    feature_diversity(predictions, features)
    return {
        "num_records": num_records,
        "profiles": ", ".join(profiles),
        "file_mebibytes": path.stat().st_size / 2**20,
        "seconds": seconds,
        "peak_mebibytes": mebibytes,
        "div_seconds": time.perf_counter() - start,
    }


def measure(quick: bool = False) -> list[dict[str, Any]]:
    """A row: a file of 2,000 records beside four evaluations of 500, or half of both where `quick`."""
    few = 250 if quick else 500
    options = EvaluationOptions(profiles=["default"])
    # There is no data set beside the file, which is said at each evaluation
    logging.getLogger("gavamoe_hf").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        small, large = Path(folder) / "small.jsonl", Path(folder) / "large.jsonl"
        generate(small, few)
        generate(large, 4 * few)
        timed = compare(
            lambda: evaluate_predictions(large, options),
            lambda: [evaluate_predictions(small, options) for _ in range(4)],
            rounds=3,
        )
    return [as_row(f"evaluate, {4 * few:,} records", f"4 times {few:,} records", timed)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--sizes", type=int, nargs="+", default=[3_000, 100_000])
    parser.add_argument("--profiles", nargs="+", default=["default"])
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    results = []
    for size in args.sizes:
        # A fresh process for each, so that one's peak is not another's
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            path = args.output_dir / f"predictions_{size}.jsonl"
            results.append(pool.submit(measure_file, path, size, args.profiles).result())
    write_json(args.output_dir / "evaluation_speed.json", results)
    lines = [
        "| records | profiles | file, MiB | seconds | peak, MiB | DIV alone, s |",
        "| ---: | --- |" + " ---: |" * 4,
    ]
    for result in results:
        lines.append(
            f"| {result['num_records']:,} | {result['profiles']} | {result['file_mebibytes']:.0f} | "
            f"{result['seconds']:.1f} | {result['peak_mebibytes']:.0f} | {result['div_seconds']:.1f} |"
        )
    write_text(args.output_dir / "evaluation_speed.md", "\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
