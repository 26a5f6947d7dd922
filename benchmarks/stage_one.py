"""A quiet stage 1, which several benchmarks train and measure."""

import logging
import tempfile
from collections.abc import Mapping
from typing import Any

from datasets import Dataset, disable_progress_bars
from transformers import PrinterCallback
from transformers.utils.logging import disable_progress_bar

from gavamoe_hf import GaVaMoEProcessor, GaVaMoERatingModel
from gavamoe_hf.training.rating_trainer import RatingDataset, RatingTrainer, RatingTrainingArguments


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
