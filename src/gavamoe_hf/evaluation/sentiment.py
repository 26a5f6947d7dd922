"""Does an explanation sound as its rating is? A text's sentiment, from a lexicon unless another judge is passed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.metadata import version

from ..version import install_hint
from .text_metrics import _check_texts

# Above 0 for a positive text, below 0 for a negative one, 0 for one that is neither
Sentiment = Callable[[str], float]

# VADER's own bounds of a neutral compound score
_NEUTRAL = 0.05


def vader_sentiment() -> Sentiment:
    """
    Sentiment by VADER's lexicon and rules (Hutto and Gilbert, 2014), for English; neutral where the compound score is
    within 0.05 of 0. Works without a network.

    Raises:
        `ImportError`: If vaderSentiment is missing; the message says how to install it.
    """
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError as error:
        raise ImportError(
            "expected the package vaderSentiment, but could not import it. " + install_hint("sentiment")
        ) from error
    analyzer = SentimentIntensityAnalyzer()

    def judge(text: str) -> float:
        compound = analyzer.polarity_scores(text)["compound"]
        return compound if abs(compound) >= _NEUTRAL else 0.0

    judge.signature = f"vader-{version('vaderSentiment')}"  # type: ignore[attr-defined]
    return judge


def sentiment_agreement(
    predictions: Sequence[str],
    ratings: Sequence[float],
    threshold: float = 3.0,
    sentiment: Sentiment | None = None,
) -> dict[str, float]:
    """
    Share of explanations that sound positive where the rating is, and negative where it is.

    Args:
        predictions (`Sequence[str]`): Generated explanations.
        ratings (`Sequence[float]`): The records' ratings, in the same order.
        threshold (`float`, *optional*, defaults to 3.0): A rating from here on is positive, as in the paper's prompt.
        sentiment (`Callable[[str], float]`, *optional*, defaults to [`vader_sentiment`]'s): The judge.

    Returns:
        `dict[str, float]`: `sentiment_agreement`, the share among the explanations that express a sentiment (absent
        where none does), and `sentiment_neutral`, the share of all that express none: the first says little where
        the second is high. Both from 0 to 1.

    Raises:
        `ImportError`: If vaderSentiment is needed and missing.
        `ValueError`: If the lengths differ or if there is no text.
    """
    _check_texts(predictions, "predictions")
    if len(ratings) != len(predictions):
        raise ValueError(
            f"expected one rating for each prediction, but got {len(predictions)} predictions and {len(ratings)} "
            "ratings. Pass both in the order of the same records."
        )
    judge = vader_sentiment() if sentiment is None else sentiment
    agrees, expressed = 0, 0
    for text, rating in zip(predictions, ratings, strict=True):
        agrees_here, expressed_here = agreement_counts(judge(text), rating, threshold)
        agrees, expressed = agrees + agrees_here, expressed + expressed_here
    shares = {"sentiment_agreement": agrees / expressed} if expressed else {}
    return {**shares, "sentiment_neutral": 1 - expressed / len(predictions)}


def agreement_counts(sentiment: float, rating: float, threshold: float) -> tuple[int, int]:
    """Whether one text agrees with its rating, and whether it expresses a sentiment at all."""
    return int(sentiment != 0 and (sentiment > 0) == (rating >= threshold)), int(sentiment != 0)
