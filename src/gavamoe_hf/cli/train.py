"""`gavamoe train`."""

from __future__ import annotations

import logging

from transformers import logging as transformers_logging
from trl import TrlParser


def run(argv: list[str]) -> None:
    """Trains both stages; the options are the fields of the argument classes, `--config FILE.yaml` sets them too."""
    from ..training.pipeline import DataArguments, ModelArguments, RatingArguments, run_training
    from ..training.sft_config import GaVaMoESFTConfig

    parser = TrlParser((DataArguments, ModelArguments, RatingArguments, GaVaMoESFTConfig), prog="gavamoe train")
    arguments = parser.parse_args_and_config(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    transformers_logging.set_verbosity_warning()
    for noisy in ("httpx", "absl", "rouge_score", "datasets"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    metrics = run_training(*arguments)
    width = max(map(len, metrics))
    for name, value in metrics.items():
        print(f"{name:{width}}  {value:.4f}")
