"""
Confidence intervals of scores, and the paired test between two systems, from the records' statistics.

Scores that are means or ratios of sums over records (BLEU, ROUGE, BERTScore, rating errors, feature match, DIV) are
bootstrapped: records are drawn with replacement, and the interval is that of the middle 95 % of the resamples' scores
(Efron, 1979); the test is the paired bootstrap of Koehn (2004), two-sided.

Scores that count different things (Distinct, unique sentence ratio, feature coverage) cannot be: a resample holds about
63 % of the records, some of them repeatedly, so that each of its scores is too low. For them the interval is normal,
with the jackknife's standard error (Quenouille and Tukey), which by the inequality of Efron and Stein (1981) is not too
small on average; the test is a z-test of the difference with the jackknife's standard error of the difference.

Where nothing varies (one record, outputs that are all different, a score that no resample has) the data say nothing of
the uncertainty: there is no interval, rather than one without width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from .record_statistics import ProfileStatistics

BOOTSTRAP, JACKKNIFE = "bootstrap", "jackknife"

_NORMAL_95 = 1.959963984540054
# Of the matrix of weights, so that 100,000 records and 1,000 resamples do not need 800 MB
_WEIGHTS_AT_ONCE = 500_000


def resample_weights(num_records: int, num_resamples: int, seed: int) -> Iterator[np.ndarray]:
    """
    Draws records with replacement.

    Args:
        num_records (`int`): How many records there are, and how many each resample draws.
        num_resamples (`int`): How many resamples.
        seed (`int`): The same seed and sizes give the same resamples.

    Returns:
        `Iterator[np.ndarray]` of shape `(some resamples, num_records)`: how often each record is drawn.
    """
    generator = np.random.default_rng(seed)
    at_once = max(1, _WEIGHTS_AT_ONCE // num_records)
    for start in range(0, num_resamples, at_once):
        rows = range(min(at_once, num_resamples - start))
        draws = (generator.integers(num_records, size=num_records) for _ in rows)
        yield np.stack([np.bincount(draw, minlength=num_records) for draw in draws]).astype(float)


def resample_scores(
    systems: Sequence[ProfileStatistics], num_resamples: int = 1000, seed: int = 0
) -> list[dict[str, np.ndarray]]:
    """
    Scores of the same resamples for each of several profiles or systems of the same records.

    Returns:
        `list[dict[str, np.ndarray]]`: for each, arrays of shape `(num_resamples,)` by key.
    """
    parts: list[list[dict[str, np.ndarray]]] = [[] for _ in systems]
    for weights in resample_weights(systems[0].num_records, num_resamples, seed):
        for system, scores in zip(systems, parts, strict=True):
            scores.append(system.resampled(weights))
    return [{key: np.concatenate([part[key] for part in scores]) for key in scores[0]} for scores in parts]


def confidence_intervals(
    statistics: ProfileStatistics, resampled: dict[str, np.ndarray]
) -> dict[str, list[float] | None]:
    """
    95 % confidence intervals.

    Args:
        statistics ([`ProfileStatistics`]): The records' statistics.
        resampled (`dict[str, np.ndarray]`): Their [`resample_scores`].

    Returns:
        `dict[str, list[float] | None]`: lower and upper bound by key, for every score; `None` where no resample has the
        score, or where it is the same in all of them, or whichever record is left out.
    """
    intervals = {key: _middle(values) for key, values in resampled.items()}
    for key, coverage in statistics.coverages.items():
        half = _NORMAL_95 * _jackknife_error(coverage.without_each())
        score = coverage.score()
        intervals[key] = [max(score - half, 0.0), min(score + half, coverage.scale)] if half else None
    return {key: intervals[key] for key in statistics.scores()}


def interval_methods(statistics: ProfileStatistics) -> dict[str, str]:
    """By key, whether a score's interval and test are `"bootstrap"` or `"jackknife"`."""
    return {key: JACKKNIFE if key in statistics.coverages else BOOTSTRAP for key in statistics.scores()}


def paired_test(
    left: ProfileStatistics,
    right: ProfileStatistics,
    left_resampled: dict[str, np.ndarray],
    right_resampled: dict[str, np.ndarray],
) -> dict[str, dict[str, object]]:
    """
    Differences between two systems' scores of the same records.

    Args:
        left, right ([`ProfileStatistics`]): Their statistics, records in the same order.
        left_resampled, right_resampled (`dict[str, np.ndarray]`): [`resample_scores`] of the same call.

    Returns:
        `dict[str, dict]`: by key, `difference` (left - right), `confidence_95` of it and a two-sided `p_value`. The
        bootstrap's is twice the share of resamples in which the better system is not better, counting one more of each:
        it is never below 2 / (resamples + 1). A difference that does not vary, as in [`confidence_intervals`], has no
        interval, and no p-value unless it is 0 (`None`).
    """
    ours, theirs, tests = left.scores(), right.scores(), {}
    for key in (key for key in ours if key in theirs):
        difference = ours[key] - theirs[key]
        if key in left.coverages:
            each = left.coverages[key].without_each() - right.coverages[key].without_each()
            error = _jackknife_error(each)
            interval = [difference - _NORMAL_95 * error, difference + _NORMAL_95 * error] if error else None
            p_value = math.erfc(abs(difference) / error / math.sqrt(2)) if error else None
        else:
            differences = left_resampled[key] - right_resampled[key]
            differences = differences[~np.isnan(differences)]
            interval = _middle(differences)
            reversed_ = min((differences <= 0).sum(), (differences >= 0).sum())
            p_value = min(1.0, 2 * (1 + int(reversed_)) / (len(differences) + 1))
        if interval is None:
            p_value = 1.0 if difference == 0 else None
        tests[key] = {"difference": difference, "confidence_95": interval, "p_value": p_value}
    return tests


def _middle(values: np.ndarray) -> list[float] | None:
    values = values[~np.isnan(values)]
    # What is left of rounding is not a spread
    if not len(values) or np.ptp(values) < 1e-9:
        return None
    return np.percentile(values, [2.5, 97.5]).tolist()


def _jackknife_error(without_each: np.ndarray) -> float:
    num_records = len(without_each)
    spread = without_each - without_each.mean()
    # What adding up a hundred thousand equal numbers leaves is not a spread
    if np.abs(spread).max() < 1e-12:
        return 0.0
    return float(np.sqrt((num_records - 1) / num_records * (spread**2).sum()))
