"""`gavamoe train`."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from transformers import logging as transformers_logging

from .arguments import CommandParser, read_config

# A model from scratch, where the options do not say otherwise: chosen by validation on a corpus of 6,573 records. The
# paper's own (learning rate 3e-5, 3 epochs, clipping at 0.3) are for a pretrained Llama.
FROM_SCRATCH = {
    "shared_expert_intermediate_size": 512,
    "learning_rate": 1e-3,
    # At the high learning rate of the texts, ratings would be learned by heart after all
    "rating_learning_rate_scale": 0.001,
    "num_train_epochs": 5,
    "per_device_train_batch_size": 16,
    "weight_decay": 0.1,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 100,
    # On a small corpus probabilities grow overconfident while the most probable tokens, which greedy decoding takes,
    # still get better
    "metric_for_best_model": "eval_mean_token_accuracy",
    "greater_is_better": True,
}


def run(argv: list[str]) -> None:
    """Trains both stages; the options are the fields of the argument classes, `--config FILE.yaml` sets them too."""
    from ..training.dry_run import describe_run
    from ..training.lora import LoraArguments
    from ..training.pipeline import PREDICTIONS_FILE, DataArguments, ModelArguments, RatingArguments, run_training
    from ..training.sft_config import GaVaMoESFTConfig
    from ..training.summary import read_rows, run_summary

    groups = (DataArguments, ModelArguments, RatingArguments, GaVaMoESFTConfig, LoraArguments)
    defaults = {} if _names_base_model(argv) else FROM_SCRATCH
    arguments = CommandParser(groups, prog="gavamoe train").parse(argv, defaults)
    is_first = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(level=logging.INFO if is_first else logging.WARNING, format="%(message)s")
    transformers_logging.set_verbosity_warning()
    for noisy in ("httpx", "absl", "rouge_score", "datasets"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    if arguments[0].dry_run:
        text = describe_run(*arguments)
        print(text if is_first else "", end="\n" * is_first)
        return
    metrics = run_training(*arguments)
    if not metrics:
        return
    output_dir = Path(arguments[3].output_dir)
    print(run_summary(output_dir, metrics, read_rows(output_dir / PREDICTIONS_FILE)))


def _names_base_model(argv: list[str]) -> bool:
    """Whether the options or their YAML file name a base model."""
    if any(option.split("=")[0].replace("-", "_") == "__base_model" for option in argv):
        return True
    return "--config" in argv[:-1] and read_config(argv[argv.index("--config") + 1]).get("base_model") is not None
