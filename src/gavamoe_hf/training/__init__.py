"""Stage 1, stage 2, and the run that does both."""

from .building import ModelArguments, build_model, build_processor
from .pipeline import DataArguments, RatingArguments, run_training
from .rating_trainer import RatingDataset, RatingTrainer, RatingTrainingArguments
from .sft_config import GaVaMoESFTConfig
from .sft_trainer import GaVaMoESFTTrainer, tokenize_records

__all__ = [
    "DataArguments",
    "GaVaMoESFTConfig",
    "GaVaMoESFTTrainer",
    "ModelArguments",
    "RatingArguments",
    "RatingDataset",
    "RatingTrainer",
    "RatingTrainingArguments",
    "build_model",
    "build_processor",
    "run_training",
    "tokenize_records",
]
