"""Explanations for the records of a data set, and their scores."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset
from tqdm.auto import tqdm

from ..vae_gmm_gavamoe import GaVaMoERatingModel, GaVaMoERatingOutput
from .rating_metrics import rating_errors
from .text_metrics import score_text

Protocol = Literal["given", "predicted"]

# Pairs rated at once
_BATCH_SIZE = 8192


def predict_records(
    model: Any,
    processor: Any,
    records: Dataset,
    protocol: Protocol = "given",
    batch_size: int = 64,
    **generate_kwargs: Any,
) -> list[dict[str, Any]]:
    """
    Explains every record, greedily unless told otherwise.

    Args:
        model ([`GaVaMoEForCausalLM`]): The model.
        processor ([`GaVaMoEProcessor`]): Its processor.
        records ([`~datasets.Dataset`]): Columns user, item, rating, feature and explanation.
        protocol (`str`, *optional*, defaults to `"given"`):
            `"given"`: the prompt states the sentiment of the record's rating and names its features, as in the paper.
            `"predicted"`: the sentiment of the predicted rating and the features that the item is known by.
        batch_size (`int`, *optional*, defaults to 64): Pairs explained at once.
        generate_kwargs: everything that `generate` takes.

    Returns:
        `list[dict]`: one for each record, in order, with `user`, `item`, `rating`, `predicted_rating`, `feature`,
        `reference` and `prediction`.
    """
    if protocol not in ("given", "predicted"):
        raise ValueError(f'Expected `protocol` "given" or "predicted", but got {protocol!r}.')
    was_training = model.training
    model.eval()
    rows: list[dict[str, Any]] = []
    generate_kwargs = {"do_sample": False, **generate_kwargs}
    for start in tqdm(range(0, len(records), batch_size), desc="Explaining", unit="batch"):
        batch = records[start : start + batch_size]
        is_given = protocol == "given"
        explanations = model.explain(
            processor,
            user=batch["user"],
            item=batch["item"],
            rating=batch["rating"] if is_given else None,
            features=batch["feature"] if is_given else None,
            **generate_kwargs,
        )
        for index, explained in enumerate(explanations):
            rows.append(
                {
                    "user": explained.user,
                    "item": explained.item,
                    "rating": batch["rating"][index],
                    "predicted_rating": explained.predicted_rating,
                    "feature": batch["feature"][index],
                    "reference": batch["explanation"][index],
                    "prediction": explained.explanation,
                }
            )
    model.train(was_training)
    return rows


def score_predictions(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """
    Scores of rows as [`predict_records`] returns them: ratings and text, under flat names (`rating_rmse`, ...).
    """
    if not rows:
        raise ValueError("Expected at least one prediction to score, but got none.")
    ratings = rating_errors([row["predicted_rating"] for row in rows], [row["rating"] for row in rows])
    features = [[row["feature"]] if isinstance(row["feature"], str) else list(row["feature"] or []) for row in rows]
    texts = score_text([row["prediction"] for row in rows], [row["reference"] for row in rows], features)
    return {**ratings, **texts}


def write_json_lines(path: str | os.PathLike[str], rows: Sequence[dict[str, Any]]) -> None:
    """Writes rows beside the path and renames, so that the file is whole or not there."""
    path = Path(path)
    beside = path.with_name(path.name + ".part")
    with open(beside, "w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    os.replace(beside, path)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes a JSON file beside the path and renames, so that the file is whole or not there."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes a text file beside the path and renames, so that the file is whole or not there."""
    path = Path(path)
    beside = path.with_name(path.name + ".part")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


@torch.no_grad()
def predict_pairs(model: GaVaMoERatingModel, user_id: torch.Tensor, item_id: torch.Tensor) -> GaVaMoERatingOutput:
    """[`GaVaMoERatingModel.predict`] over many pairs, in chunks, on the CPU."""
    device = model.population_user.device
    chunks = [
        model.predict(users.to(device), items.to(device))
        for users, items in zip(user_id.split(_BATCH_SIZE), item_id.split(_BATCH_SIZE), strict=True)
    ]
    return GaVaMoERatingOutput(**{name: torch.cat([chunk[name].cpu() for chunk in chunks]) for name in chunks[0]})
