"""Peers' predictions beside a study's own: scored by the same code, and compared on the same records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..evaluation.evaluator import evaluate_predictions
from ..evaluation.prediction_files import Corpus
from .config import StudyConfig
from .runner import StudyData, predictions_path, read_metrics
from .scoring import score_rows


def peer_path(config: StudyConfig, name: str) -> Path:
    """A peer's predictions file."""
    return Path(config.train["dataset"]) / config.peers[name]["predictions"]


def score_peer(config: StudyConfig, data: StudyData, name: str) -> dict[str, dict[str, float]]:
    """
    What [`score_rows`] gives for a peer.

    Raises:
        `ValueError`: for a file whose rows are not those of the test split.
    """
    path, test = peer_path(config, name), data.records["test"]
    rows = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise ValueError(f"{path}: expected one JSON object a line, but line {number}: {error}.") from error
    if len(rows) != len(test):
        raise ValueError(f"{path}: expected the {len(test)} records of the test split, but got {len(rows)} lines.")
    for number, (row, user, item) in enumerate(zip(rows, test["user"], test["item"], strict=True), start=1):
        if (str(row.get("user")), str(row.get("item"))) != (user, item):
            raise ValueError(
                f"{path}: expected the test records in order, user {user!r} and item {item!r} in line {number}, but "
                f"got {row.get('user')!r} and {row.get('item')!r}. Is it of another split?"
            )
    return score_rows(rows, data.thirds)


def compare_with_peer(config: StudyConfig, data: StudyData, name: str) -> dict[int, dict[str, dict[str, Any]]]:
    """
    Paired bootstrap tests of the main table's model against a peer, under the peer's protocol.

    Args:
        config ([`StudyConfig`]): The study.
        data ([`StudyData`]): Its data.
        name (`str`): The peer.

    Returns:
        `dict[int, dict[str, dict]]`: By the seed of each finished model and by metric `difference` (the model's score
        less the peer's), `confidence_95` and `p_value`, as in [`evaluate_predictions`]; empty where the study does not
        have the peer's protocol.
    """
    protocol = config.peers[name]["protocol"]
    if protocol not in config.protocols:
        return {}
    corpus = Corpus.from_records(data.records, "test")
    tests = {}
    for seed in config.seeds:
        cell = config.main_cell(seed)
        if read_metrics(config, cell) is not None:
            result = evaluate_predictions(
                predictions_path(config, cell, protocol),
                corpus=corpus,
                protocol=protocol,
                compare=peer_path(config, name),
                compare_protocol=protocol,
            )
            tests[seed] = result["comparison"]["tests"]
    return tests
