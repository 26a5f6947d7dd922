"""Metrics of explanations, ratings and rankings (section 4 of arXiv 2410.11841), and baselines for the ratings."""

from .baselines import BiasBaseline, MatrixFactorizationBaseline, MeanBaseline, baseline_scores, require_baselines
from .ranking_metrics import expected_hit_ratio_and_ndcg, ranking_scores, rating_scorer
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
    "MatrixFactorizationBaseline",
    "MeanBaseline",
    "baseline_scores",
    "bleu",
    "distinct_n",
    "expected_hit_ratio_and_ndcg",
    "feature_match",
    "ranking_scores",
    "rating_errors",
    "rating_scorer",
    "require_baselines",
    "require_text_metrics",
    "rouge",
    "score_text",
    "unique_sentence_ratio",
]
