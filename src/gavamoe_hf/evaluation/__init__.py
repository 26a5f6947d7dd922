"""Metrics of explanations, ratings and rankings (section 4 of arXiv 2410.11841), and baselines for the ratings."""

from .baselines import BiasBaseline, MatrixFactorizationBaseline, MeanBaseline, baseline_scores, require_baselines
from .bert_scores import BertScorer
from .evaluator import METRICS_MODULE, EvaluationOptions, evaluate_predictions, score_profile
from .feature_metrics import feature_coverage, feature_diversity
from .profiles import PROFILES, Profile
from .ranking_metrics import expected_hit_ratio_and_ndcg, ranking_scores, rating_scorer
from .rating_metrics import rating_errors
from .sentiment import sentiment_agreement, vader_sentiment
from .text_metrics import require_text_metrics

__all__ = [
    "METRICS_MODULE",
    "PROFILES",
    "BertScorer",
    "BiasBaseline",
    "EvaluationOptions",
    "MatrixFactorizationBaseline",
    "MeanBaseline",
    "Profile",
    "baseline_scores",
    "evaluate_predictions",
    "expected_hit_ratio_and_ndcg",
    "feature_coverage",
    "feature_diversity",
    "ranking_scores",
    "rating_errors",
    "rating_scorer",
    "require_baselines",
    "require_text_metrics",
    "score_profile",
    "sentiment_agreement",
    "vader_sentiment",
]
