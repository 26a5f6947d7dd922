"""
A quiet stage 1, which several benchmarks train and measure; by itself, its steps beside a bare loop of their matrix
products.

    OMP_NUM_THREADS=1 python benchmarks/stage_one.py

`rating_scale.py` does the same at length, with memory and rates.
"""

import argparse
import json
import logging
import tempfile
from collections.abc import Mapping
from typing import Any

import torch
from bare_loop import BareLoop, bare_batches
from datasets import Dataset, disable_progress_bars
from rating_scale import SIZES, TakeTurns, generate_ratings, run_phase, summarise
from transformers import PrinterCallback, set_seed
from transformers.utils.logging import disable_progress_bar

from gavamoe_hf import GaVaMoEConfig, GaVaMoEProcessor, GaVaMoERatingModel
from gavamoe_hf.training.rating_trainer import (
    AUTOENCODER,
    ELBO,
    RatingDataset,
    RatingTrainer,
    RatingTrainingArguments,
)

logger = logging.getLogger("stage_one")

TARGET = 1 / 0.7  # the trainer has at least 0.7 of the bare loop's speed
_PAIRS = 10_000  # a pair for each user, and no more to evaluate


def be_quiet(logger: logging.Logger) -> None:
    """Leaves the terminal to one logger: no progress bars, no messages of the libraries' below warnings."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logger.setLevel(logging.INFO)
    disable_progress_bars()
    disable_progress_bar()


def train_stage_one(
    model: GaVaMoERatingModel, processor: GaVaMoEProcessor, records: Mapping[str, Dataset], seed: int, **options: Any
) -> None:
    """Trains a rating model on the records of train and validation, in place, on the CPU, leaving no files."""
    train, validation = (RatingDataset.from_records(records[split], processor) for split in ("train", "validation"))
    with tempfile.TemporaryDirectory() as folder:
        args = RatingTrainingArguments(
            output_dir=folder, seed=seed, use_cpu=True, disable_tqdm=True, report_to="none", **options
        )
        trainer = RatingTrainer(model, args, train, validation)
        trainer.remove_callback(PrinterCallback)
        trainer.train()


def measure(quick: bool = False) -> list[dict[str, Any]]:
    """
    Rows with name, reference, ratio, seconds, reference_seconds and target: a step of the trainer and of the bare loop
    in turns, with TripAdvisor's users and items and the paper's sizes.

    Args:
        quick (`bool`, *optional*, defaults to `False`): The default batch of 64 alone, and fewer steps.
    """
    be_quiet(logger)
    set_seed(0)
    num_users, num_items, _ = SIZES["tripadvisor"]
    model = GaVaMoERatingModel(GaVaMoEConfig(num_users=num_users, num_items=num_items))
    ratings = generate_ratings(num_users, num_items, _PAIRS, seed=0)
    cluster_target = torch.full((num_users, model.config.num_clusters), 1 / model.config.num_clusters)
    rows = []
    for batch_size, turn_steps in ((64, 4),) if quick else ((64, 8), (1024, 1)):
        for phase in (AUTOENCODER, ELBO):
            args = argparse.Namespace(batch_size=batch_size, turn_steps=turn_steps, max_steps=4 * turn_steps, seed=0)
            bare = BareLoop(model.config, trains_tables=phase != ELBO)
            turns = TakeTurns(bare, bare_batches(ratings, batch_size), turn_steps)
            run_phase(model, ratings, phase, args, cluster_target, turns)
            summary = summarise(turns.turns[1:], len(ratings))
            wall = summary["wall"]
            rows.append(
                {
                    "name": f"stage-1 step, {phase}, {batch_size} pairs",
                    "reference": "bare loop of its matrix products",
                    "ratio": 1 / wall["ratio"],
                    # For a machine with other work
                    "processor_ratio": 1 / summary["processor"]["ratio"],
                    "seconds": batch_size / wall["pairs_per_second"],
                    "reference_seconds": batch_size / wall["bare_pairs_per_second"],
                    "target": TARGET,
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="The default batch of 64 alone, and fewer steps.")
    print(json.dumps(measure(parser.parse_args().quick), indent=2))


if __name__ == "__main__":
    main()
