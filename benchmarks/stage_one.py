"""A quiet stage 1, which several benchmarks train and measure, and its speed for `make benchmark`."""

import argparse
import logging
import tempfile
from collections.abc import Mapping
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from transformers import PrinterCallback
from transformers.utils.logging import disable_progress_bar

from gavamoe_hf import GaVaMoEProcessor, GaVaMoERatingModel
from gavamoe_hf.training.rating_trainer import AUTOENCODER, RatingDataset, RatingTrainer, RatingTrainingArguments

LOWEST_RATE = 0.7


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
    A row: steps of the trainer at the size of TripAdvisor beside the bare loop of their matrix products, in turns, on
    one thread. The paper's batches of 4,096, and more, are in `rating_scale.py`.
    """
    import rating_scale

    be_quiet(logging.getLogger("stage_one"))
    batch_size = 256 if quick else 1024
    args = argparse.Namespace(size="tripadvisor", batch_size=batch_size, max_steps=10, turn_steps=2, seed=0)
    model, ratings = rating_scale.prepare(args)
    phase = rating_scale.time_phase(model, ratings, AUTOENCODER, args, torch.empty(0))
    wall, processor = phase["wall"], phase["processor"]
    return [
        {
            "name": f"stage-1 step of {batch_size:,} pairs, one thread",
            "reference": "bare loop of its matrix products",
            "ratio": 1 / wall["ratio"],
            "processor_ratio": 1 / processor["ratio"],
            "seconds": batch_size / wall["pairs_per_second"],
            "reference_seconds": batch_size / wall["bare_pairs_per_second"],
            "target": 1 / LOWEST_RATE,
        }
    ]
