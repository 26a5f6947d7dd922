"""The metrics reproduce the figures known for PETER, PETER+ and two floors, where that data is present."""

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import load_dataset
from references import MUSICAL_INSTRUMENTS

from gavamoe_hf.evaluation import baseline_scores, rating_errors, score_profile

pytestmark = pytest.mark.skipif(not MUSICAL_INSTRUMENTS.is_dir(), reason="the real data is not on this machine")


def _scores(name: str) -> dict[str, float]:
    lines = (MUSICAL_INSTRUMENTS / "peer_predictions" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    records: list[dict[str, Any]] = [json.loads(line) for line in lines]
    assert len(records) == 821
    scores = score_profile(
        [record["prediction"] for record in records],
        [record["reference"] for record in records],
        features=[[record["feature"]] for record in records],
    )
    predicted, actual = ([record[key] for record in records] for key in ("predicted_rating", "rating"))
    return scores | rating_errors(predicted, actual)


def test_peter_plus() -> None:
    scores = _scores("peter_plus")
    assert round(scores["bleu_4"], 2) == 1.95
    assert round(scores["rouge_l"], 1) == 18.3
    assert round(scores["distinct_2"], 1) == 7.9
    assert round(scores["feature_match"], 2) == 0.64
    assert round(scores["rating_rmse"], 3) == 0.916
    assert round(scores["rating_mae"], 3) == 0.705


def test_peter() -> None:
    scores = _scores("peter")
    assert round(scores["bleu_4"], 2) == 0.90
    assert round(scores["rouge_l"], 1) == 13.6
    assert round(scores["distinct_2"], 1) == 4.0
    assert round(scores["rating_rmse"], 3) == 0.931


def test_baselines(tmp_path: Path) -> None:
    files = {split: str(MUSICAL_INSTRUMENTS / f"{split}.jsonl") for split in ("train", "validation", "test")}
    splits = load_dataset("json", data_files=files, cache_dir=str(tmp_path))
    scores = baseline_scores(splits["train"], splits["validation"], splits["test"])
    assert round(scores["baseline_mean_rmse"], 3) == 0.927
    assert round(scores["baseline_mean_mae"], 3) == 0.707
    # The shrinkage behind the known 0.900 / 0.657 is not published; the validation split chooses 10 and 10
    # here.
    assert scores["baseline_bias_rmse"] == pytest.approx(0.900, abs=0.003)
    assert scores["baseline_bias_mae"] == pytest.approx(0.657, abs=0.003)
