"""
Scores of a human study that [`draw_study`] drew: means, intervals and agreement between raters.

Arrays: A raters, N pairs of a user and an item, S systems, C criteria (P, Q, U).
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from ..data.errors import show_names, show_value
from .human_study import CRITERIA, LABELS, SCALE, read_key, read_object
from .predict import write_json, write_text

SCORES_FILE = "human_scores.json"
SCORES_TABLE_FILE = "human_scores.md"


def score_study(
    key: str | os.PathLike[str],
    answers: Sequence[str | os.PathLike[str]],
    num_resamples: int = 10_000,
    seed: int = 0,
) -> dict[str, Any]:
    """
    Scores what raters saved.

    A criterion's mean is over all answers to it; Human-Score = 0.4 P + 0.3 Q + 0.3 U of these means. The 95 % intervals
    are percentiles of a bootstrap over pairs, with all answers to a pair kept together: they say how much another draw
    of pairs would change, with the same raters. Agreement is over the explanations that at least two raters scored.

    Args:
        key (`str` or `os.PathLike`): The `key.json` of the study.
        answers (`Sequence[str | os.PathLike]`): The files that the sheet saved, one for each rater, complete or not.
        num_resamples (`int`, *optional*, defaults to 10000): Resamples of the bootstrap.
        seed (`int`, *optional*, defaults to 0): Seed of the bootstrap.

    Returns:
        `dict[str, Any]`: `study`, `num_raters`, `num_pairs`, `num_answers` and `num_missing` (over all systems and
        criteria), `num_resamples` and `seed`; `systems`, by name: `num_answers`, and for `P`, `Q`, `U` and
        `human_score` a dict of `mean` and `interval`, both `None` without an answer; `differences`, a list with a dict
        for each two systems: their names as `systems`, and `P`, `Q`, `U` and `human_score` as before, of the first
        one's mean minus the second's, over the same resamples; `agreement`, by criterion: [`krippendorff_alpha`].

    Raises:
        `ValueError`: For a file that is broken, of another study or of a rater already read, for ids that the study
            lacks, for scores other than 1, 1.5, ..., 5, and where there is no answer or no resample at all.
    """
    if not answers or num_resamples < 1:
        raise ValueError(
            f"Expected at least one file of answers and one resample, but got {len(answers)} and {num_resamples}."
        )
    study = read_key(Path(key))
    names = study["systems"]
    raters: dict[str, str | os.PathLike[str]] = {}
    tables = []
    for path in answers:
        rater, table = _read_answers(Path(path), study)
        if rater in raters:
            raise ValueError(
                f"{path}: expected one file for each rater, but {raters[rater]} is by {rater!r} too. Keep the later "
                "one; where two people took the same name, change it in one of the files."
            )
        raters[rater] = path
        tables.append(table)
    values = np.stack(tables)  # [A, N, S, C]
    given = ~np.isnan(values)
    if not given.any():
        raise ValueError("Expected answers, but the files hold none.")

    sums, counts = np.nansum(values, axis=0), given.sum(axis=0)  # [N, S, C]
    num_pairs = len(study["pairs"])
    draws = np.random.default_rng(seed).multinomial(num_pairs, [1 / num_pairs] * num_pairs, size=num_resamples)
    means = _with_human_score(_divide(sums.sum(axis=0), counts.sum(axis=0)))  # [S, C + 1]
    resampled = _with_human_score(
        _divide(np.einsum("bn,nsc->bsc", draws, sums), np.einsum("bn,nsc->bsc", draws, counts))
    )  # [resamples, S, C + 1]
    scores_of = [*CRITERIA, "human_score"]
    systems = {}
    for index, name in enumerate(names):
        systems[name] = {"num_answers": int(counts[:, index].sum())} | {
            score: _summary(means[index, column], resampled[:, index, column]) for column, score in enumerate(scores_of)
        }
    differences = []
    for one, other in combinations(range(len(names)), 2):
        gap, resampled_gap = means[one] - means[other], resampled[:, one] - resampled[:, other]
        differences.append(
            {"systems": [names[one], names[other]]}
            | {score: _summary(gap[column], resampled_gap[:, column]) for column, score in enumerate(scores_of)}
        )
    return {
        "study": study["study"],
        "num_raters": len(raters),
        "num_pairs": num_pairs,
        "num_answers": int(given.sum()),
        "num_missing": int((~given).sum()),
        "num_resamples": num_resamples,
        "seed": seed,
        "systems": systems,
        "differences": differences,
        "agreement": {
            criterion: krippendorff_alpha(values[..., column].reshape(len(raters), -1))
            for column, criterion in enumerate(CRITERIA)
        },
    }


def krippendorff_alpha(values: np.ndarray) -> float | None:
    """
    Krippendorff's alpha with the interval metric: 1 - observed / expected disagreement.

    With squared differences, the observed disagreement is twice the mean of the units' sample variances, each weighed
    by the unit's number of values, and the expected one twice the sample variance of all values. Units with fewer than
    two values do not count.

    Args:
        values (`np.ndarray` of shape `(num_raters, num_units)`): The raters' values, NaN where one is missing.

    Returns:
        `float` or `None`: 1 for perfect agreement, 0 for what chance gives, below for less; `None` where it is not
        defined: no unit with two values, or one value throughout.

    Example:
        ```python
        >>> krippendorff_alpha(np.array([[1.0, 2.0], [1.0, 3.0]]))  # 1 - (1/4) / (11/12)
        0.7272727272727273
        ```
    """
    counts = (~np.isnan(values)).sum(axis=0)
    values, counts = values[:, counts > 1], counts[counts > 1]
    expected = np.nanvar(values, ddof=1) if values.size else 0.0
    if expected == 0:
        return None
    observed = np.average(np.nanvar(values, axis=0, ddof=1), weights=counts)
    return float(1 - observed / expected)


def markdown_scores(scores: Mapping[str, Any]) -> str:
    """The scores that [`score_study`] returns as Markdown: tables of systems and their differences, and counts."""
    criteria = list(CRITERIA)
    lines = [
        f"| system | {' | '.join(criteria)} | Human-Score | answers |",
        "|---" + "|---:" * (len(criteria) + 2) + "|",
    ]
    for name, system in scores["systems"].items():
        cells = [_cell(system[score]) for score in [*criteria, "human_score"]]
        lines.append(f"| {_name(name)} | {' | '.join(cells)} | {system['num_answers']} |")
    if scores["differences"]:
        lines += [
            "",
            f"| difference | {' | '.join(criteria)} | Human-Score |",
            "|---" + "|---:" * (len(criteria) + 1) + "|",
        ]
    for difference in scores["differences"]:
        cells = [_cell(difference[score]) for score in [*criteria, "human_score"]]
        lines.append(f"| {' minus '.join(map(_name, difference['systems']))} | {' | '.join(cells)} |")
    weighted = " + ".join(f"{criterion['weight']} {name}" for name, criterion in CRITERIA.items())
    agreement = ", ".join(
        f"{name} {'not defined' if alpha is None else f'{alpha:.3f}'}" for name, alpha in scores["agreement"].items()
    )
    total = scores["num_answers"] + scores["num_missing"]
    return "\n".join(
        [
            *lines,
            "",
            f"Human-Score = {weighted}. In brackets 95 % intervals, from {scores['num_resamples']} bootstrap resamples "
            f"of the pairs, with the same raters (seed {scores['seed']}).",
            "",
            f"Agreement (Krippendorff's alpha, interval): {agreement}. Raters: {scores['num_raters']}; pairs: "
            f"{scores['num_pairs']}; answers: {scores['num_answers']} of {total}. Study {scores['study']}.",
            "",
        ]
    )


def write_scores(scores: Mapping[str, Any], output_dir: str | os.PathLike[str]) -> None:
    """Writes `human_scores.json` and `human_scores.md` into a folder."""
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    write_json(output_dir / SCORES_FILE, scores)
    write_text(output_dir / SCORES_TABLE_FILE, markdown_scores(scores))


def _read_answers(path: Path, key: Mapping[str, Any]) -> tuple[str, np.ndarray]:
    """Name of the rater, and scores `[N, S, C]` by system, NaN where there is none."""
    saved = read_object(path, "answers that a sheet saved")
    if saved.get("study") != key["study"]:
        raise ValueError(
            f"{path}: expected answers to the study {key['study']!r}, but got {show_value(saved.get('study'))}. "
            "Pass the key of that study."
        )
    rater, answers = saved.get("rater"), saved.get("answers")
    if not isinstance(rater, str) or not rater.strip() or not isinstance(answers, dict):
        raise ValueError(f"{path}: expected `rater`, a name, and `answers`, an object. Save the answers again.")
    places = {
        f"{pair + 1}{label}": (pair, key["systems"].index(name))
        for pair, drawn in enumerate(key["pairs"])
        for label, name in zip(LABELS, drawn["systems"], strict=False)
    }
    table = np.full((len(key["pairs"]), len(key["systems"]), len(CRITERIA)), np.nan)
    for answer_id, scores in answers.items():
        if answer_id not in places:
            raise ValueError(f"{path}: expected ids from '1A' to {list(places)[-1]!r}, but got {answer_id!r}.")
        if not isinstance(scores, dict) or not scores.keys() <= CRITERIA.keys():
            raise ValueError(
                f"{path}, {answer_id}: expected scores of {show_names(list(CRITERIA))}, but got {show_value(scores)}."
            )
        for column, criterion in enumerate(CRITERIA):
            score = scores.get(criterion)
            if score is None:
                continue
            # `True` is equal to 1
            if isinstance(score, bool) or score not in SCALE:
                raise ValueError(
                    f"{path}, {answer_id}: expected {criterion} from 1 to 5 in half points, but got "
                    f"{show_value(score)}. Correct it with the rater."
                )
            table[*places[answer_id], column] = score
    return rater.strip(), table


def _divide(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    return np.divide(sums, counts, out=np.full(sums.shape, np.nan), where=counts > 0)


def _with_human_score(means: np.ndarray) -> np.ndarray:
    weights = [criterion["weight"] for criterion in CRITERIA.values()]
    return np.concatenate([means, (means @ weights)[..., None]], axis=-1)


def _summary(mean: float, resampled: np.ndarray) -> dict[str, Any]:
    if math.isnan(mean):
        return {"mean": None, "interval": None}
    # A resample can lack every pair that was answered, and so can all
    resampled = resampled[~np.isnan(resampled)]
    interval = np.percentile(resampled, [2.5, 97.5]).tolist() if resampled.size else None
    return {"mean": float(mean), "interval": interval}


def _cell(score: Mapping[str, Any]) -> str:
    if score["mean"] is None:
        return "n/a"
    if score["interval"] is None:
        return f"{score['mean']:.3f}"
    low, high = score["interval"]
    return f"{score['mean']:.3f} [{low:.3f}, {high:.3f}]"


def _name(system: str) -> str:
    return system.replace("|", "&#124;")
