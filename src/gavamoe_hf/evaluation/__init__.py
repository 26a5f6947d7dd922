"""Metrics of explanations and of ratings (section 4 of arXiv 2410.11841), and baselines for the ratings."""

from .baselines import BiasBaseline, MeanBaseline, baseline_scores
from .rating_metrics import rating_errors
from .text_metrics import (
    bleu,
    distinct_n,
    feature_match,
    require_text_metrics,
    rouge,
    score_text,
    unique_sentence_ratio,
)

__all__ = [
    "BiasBaseline",
    "MeanBaseline",
    "baseline_scores",
    "bleu",
    "distinct_n",
    "feature_match",
    "rating_errors",
    "require_text_metrics",
    "rouge",
    "score_text",
    "unique_sentence_ratio",
]
