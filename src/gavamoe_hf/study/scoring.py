"""How a study scores predictions: one function for its own models and its peers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..evaluation.evaluator import score_predictions

WHOLE = "all"


def score_rows(rows: Sequence[Mapping[str, Any]], thirds: Mapping[str, Sequence[int]]) -> dict[str, dict[str, float]]:
    """
    Scores of predictions for the test split, whole and by how well training knows the users.

    Args:
        rows (`Sequence[dict]`): One for each test record, in order, as [`predict_records`] returns them.
        thirds (`dict[str, list[int]]`): From [`sparsity_thirds`].

    Returns:
        `dict[str, dict[str, float]]`: Scores by name, under `all`, `ds1`, `ds2` and `ds3`; a part without records is
        left out.
    """
    parts = {WHOLE: range(len(rows)), **thirds}
    return {name: _numbers([rows[row] for row in part]) for name, part in parts.items() if len(part)}


def _numbers(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    # The protocol is named beside the scores
    scores = score_predictions(rows, "given")
    return {key: scores[key] for key in scores["signatures"]}
