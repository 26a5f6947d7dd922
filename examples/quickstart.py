"""
Trains both stages on the built-in synthetic data, then explains from a new process that cannot import the package.

    python examples/quickstart.py --output_dir outputs/quickstart

Every option of `gavamoe train` may follow and overrides the ones below.
"""

import json
import logging
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from trl import TrlParser

from gavamoe_hf.training.building import ModelArguments
from gavamoe_hf.training.pipeline import METRICS_FILE, RUN_FILE, DataArguments, RatingArguments, run_training
from gavamoe_hf.training.sft_config import GaVaMoESFTConfig

# Sizes and schedule: the options of `gavamoe train`
OPTIONS = [
    *("--dataset", "synthetic"),
    *("--hidden_size", "128"),
    *("--num_hidden_layers", "2"),
    *("--moe_intermediate_size", "64"),
    *("--learning_rate", "3e-3"),
    *("--num_train_epochs", "5"),
    *("--per_device_train_batch_size", "16"),
    "--use_cpu",
]

SCORES = {
    "rating_rmse": "rating RMSE, stars",
    "baseline_bias_rmse": "  of user + item biases",
    "baseline_mean_rmse": "  of the mean rating",
    "bleu_4": "BLEU-4, %",
    "rouge_l": "ROUGE-L, %",
    "distinct_2": "Distinct-2, %",
    "feature_match": "explanations that name the given feature, share",
    "wording_match": "explanations in the wording of the user's group, share",
    "cluster_ari": "clusters against planted groups, adjusted Rand index",
    "min_cluster_share": "smallest cluster, share of training pairs",
}

# Runs a script in a process in which `gavamoe_hf` cannot be imported, installed or not
RUN_WITHOUT_PACKAGE = """
import runpy, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "gavamoe_hf":
            raise ModuleNotFoundError(f"{name} is blocked: a checkpoint has to work without the package", name=name)

sys.meta_path.insert(0, Blocker())
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def main(
    data_args: DataArguments, model_args: ModelArguments, rating_args: Any, training_args: GaVaMoESFTConfig
) -> None:
    start = time.perf_counter()
    # A model of this size is as fast on one thread, and a second one stalls wherever it shares its core
    torch.set_num_threads(1)
    output_dir = Path(training_args.output_dir)
    data_args.overwrite_output_dir |= holds_own_run(output_dir)
    run_training(data_args, model_args, rating_args, training_args)

    print(f"\nExplanations from {output_dir}, loaded in a new process without the package", flush=True)
    run_without_package(Path(__file__).with_name("explain.py"), "--model", str(output_dir.resolve()))

    metrics = json.loads((output_dir / METRICS_FILE).read_text(encoding="utf-8"))
    print("\nScores of the test split")
    for name, label in SCORES.items():
        if name in metrics:
            print(f"  {label:54} {metrics[name]:8.3f}")
    print(f"\n{time.perf_counter() - start:.0f} s, peak memory {peak_memory() / 2**30:.2f} GiB")


def holds_own_run(output_dir: Path) -> bool:
    """Whether the run in a folder is on synthetic data, which costs nothing to replace."""
    run = output_dir / RUN_FILE
    return run.is_file() and json.loads(run.read_text(encoding="utf-8")).get("dataset") == "synthetic"


def run_without_package(script: Path, *options: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "HF_MODULES_CACHE": folder, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", RUN_WITHOUT_PACKAGE, str(script.resolve()), *options]
        subprocess.run(command, cwd=folder, env=environment, check=True)


def peak_memory() -> int:
    """Bytes, of the larger of this process and the largest that it started."""
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = TrlParser((DataArguments, ModelArguments, RatingArguments, GaVaMoESFTConfig))
    main(*parser.parse_args_and_config([*OPTIONS, *sys.argv[1:]]))
