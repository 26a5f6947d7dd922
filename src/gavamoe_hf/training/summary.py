"""What a run says at its end: its scores, what they mean, what the model says, and what to type next."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_RATING_BASELINES = {"mean": "the mean rating", "bias": "user and item biases", "mf": "matrix factorisation"}
_RANKING = "hr_10_full"
_NUM_EXAMPLES = 3


def run_summary(output_dir: Path, metrics: Mapping[str, Any], rows: list[dict[str, Any]]) -> str:
    """
    The end of `gavamoe train`.

    Args:
        output_dir (`Path`): The run's folder.
        metrics (`Mapping[str, Any]`): What `metrics.json` holds.
        rows (`list[dict]`): What `predictions_test.jsonl` holds.

    Returns:
        `str`: the scores as a table beside those of the baselines, a paragraph that says whether the model is better
        than these, explanations of test pairs, and commands.
    """
    lines = [*_table(metrics), "", *_verdict(metrics)]
    for row in rows[:_NUM_EXAMPLES]:
        lines += ["", f"{row['user']}, {row['item']}, rated {row['rating']:g}, predicted {row['predicted_rating']:.1f}"]
        lines += [f"  {row['prediction']}"]
    if rows:
        model = shlex.quote(str(output_dir))
        user, item = (shlex.quote(str(rows[0][name])) for name in ("user", "item"))
        lines += [
            "",
            "Next:",
            f"  gavamoe explain --model {model} --user={user} --item={item}",
            f"  gavamoe recommend --model {model} --user={user} --explain",
            f"  gavamoe demo --model {model}",
        ]
    return "\n".join(lines)


def _table(metrics: Mapping[str, Any]) -> list[str]:
    """The scores in the order of `metrics.json`, each beside its baselines'."""
    scores = {name: value for name, value in metrics.items() if isinstance(value, int | float)}
    own = [name for name in scores if not name.startswith("baseline_")]
    beside = {name: _baselines(scores, name) for name in own}
    columns = [kind for kind in ("mean", "popularity", "bias", "mf") if any(kind in found for found in beside.values())]
    width = max(map(len, [*own, "score"]))
    lines = [f"{'score':{width}}  {'model':>8}" + "".join(f"  {kind:>10}" for kind in columns)]
    for name in own:
        cells = "".join(f"  {beside[name][kind]:10.4f}" if kind in beside[name] else " " * 12 for kind in columns)
        lines.append(f"{name:{width}}  {scores[name]:8.4f}{cells}".rstrip())
    return lines


def _baselines(scores: Mapping[str, float], name: str) -> dict[str, float]:
    short = name.removeprefix("rating_")
    kinds = ("mean", "popularity", "bias", "mf")
    return {kind: scores[f"baseline_{kind}_{short}"] for kind in kinds if f"baseline_{kind}_{short}" in scores}


def _verdict(metrics: Mapping[str, Any]) -> list[str]:
    """Better or no better than each baseline, by the third digit, in words."""
    said = []
    error = metrics.get("rating_rmse")
    if error is not None:
        baselines = {_RATING_BASELINES[kind]: value for kind, value in _baselines(metrics, "rating_rmse").items()}
        said.append(f"Ratings: RMSE {error:.3f} stars, {_compared(-error, baselines, -1)}.")
    hits = metrics.get(_RANKING)
    popularity = _baselines(metrics, _RANKING).get("popularity")
    # Lists of 10 say nothing where the catalogue is hardly longer
    if hits is not None and popularity is not None and min(hits, popularity) < 1:
        compared = _compared(hits, {"popularity": popularity}, 1)
        advice = "" if round(hits, 3) > round(popularity, 3) else " Rank by popularity, and let the model explain."
        said.append(f"Lists: a liked item is among the first 10 for {hits:.1%} of the users, {compared}.{advice}")
    return said


def _compared(value: float, baselines: Mapping[str, float], sign: int) -> str:
    better = [f"{name} ({found:.3f})" for name, found in baselines.items() if round(value, 3) > round(sign * found, 3)]
    others = [f"{name} ({found:.3f})" for name, found in baselines.items() if round(value, 3) <= round(sign * found, 3)]
    parts = [f"better than {' and '.join(better)}"] if better else []
    parts += [f"no better than {' and '.join(others)}"] if others else []
    return ", but ".join(parts) or "with nothing to compare it with"


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The first rows of a file of predictions, none where there is none."""
    if not path.is_file():
        return []
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line, _ in zip(file, range(_NUM_EXAMPLES), strict=False)]
