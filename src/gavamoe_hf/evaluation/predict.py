"""Explanations for the records of a data set, and the files that they are written to."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import set_seed

from ..vae_gmm_gavamoe import GaVaMoERatingModel, GaVaMoERatingOutput

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
    return list(iterate_predictions(model, processor, records, protocol, batch_size, **generate_kwargs))


def iterate_predictions(
    model: Any,
    processor: Any,
    records: Dataset,
    protocol: Protocol = "given",
    batch_size: int = 64,
    first: int = 0,
    seed: int | None = None,
    **generate_kwargs: Any,
) -> Iterator[dict[str, Any]]:
    """
    The rows of [`predict_records`], one at a time.

    Args:
        model, processor, records, protocol, batch_size, generate_kwargs: as in [`predict_records`].
        first (`int`, *optional*, defaults to 0): The record to start with.
        seed (`int`, *optional*):
            Seeds each batch with this and its first record, so that a run that starts at a later batch samples what a
            whole run does.
    """
    if protocol not in ("given", "predicted"):
        raise ValueError(f'Expected `protocol` "given" or "predicted", but got {protocol!r}.')

    # Of its own, so that the check above comes with the call rather than with the first row
    def rows() -> Iterator[dict[str, Any]]:
        was_training = model.training
        model.eval()
        options = {"do_sample": False, **generate_kwargs}
        try:
            for start in tqdm(range(first, len(records), batch_size), desc="Explaining", unit="batch"):
                if seed is not None:
                    set_seed(seed + start)
                batch = records[start : start + batch_size]
                is_given = protocol == "given"
                explanations = model.explain(
                    processor,
                    user=batch["user"],
                    item=batch["item"],
                    rating=batch["rating"] if is_given else None,
                    features=batch["feature"] if is_given else None,
                    **options,
                )
                for index, explained in enumerate(explanations):
                    yield {
                        "user": explained.user,
                        "item": explained.item,
                        "rating": batch["rating"][index],
                        "predicted_rating": explained.predicted_rating,
                        "feature": batch["feature"][index],
                        "reference": batch["explanation"][index],
                        "prediction": explained.explanation,
                    }
        finally:
            model.train(was_training)

    return rows()


def write_predictions(
    path: str | os.PathLike[str],
    model: Any,
    processor: Any,
    records: Dataset,
    protocol: Protocol = "given",
    batch_size: int = 64,
    seed: int = 0,
    **generate_kwargs: Any,
) -> None:
    """
    Writes the rows of [`predict_records`] as they come, beside the path, and renames when they are all there.

    What an interrupted call has left beside the path is gone on with: its whole batches are kept. A caller has to know
    that they are of the same model, records and options.
    """
    path = Path(path)
    beside = path.with_name(path.name + ".part")
    append_batches(
        beside,
        lambda first: iterate_predictions(
            model, processor, records, protocol, batch_size, first, seed, **generate_kwargs
        ),
        batch_size,
    )
    os.replace(beside, path)


def append_batches(
    path: Path,
    rows_from: Callable[[int], Iterable[dict[str, Any]]],
    batch_size: int,
    header: dict[str, Any] | None = None,
) -> None:
    """
    Writes rows as JSON lines as they come. What an interrupted call has left is gone on with, after its last whole
    batch; wherever it was killed, no row is lost or there twice.

    Args:
        path (`Path`): The file, which a caller renames when it is whole.
        rows_from (`Callable[[int], Iterable[dict]]`): The rows without as many first ones as it is given.
        batch_size (`int`): Rows that belong together.
        header (`dict[str, Any]`, *optional*): The line before the rows.
    """
    first = _keep_whole_batches(path, batch_size, num_header_lines=int(header is not None))
    with open(path, "a", encoding="utf-8") as file:
        if header is not None and file.tell() == 0:
            file.write(to_json(header) + "\n")
        for number, row in enumerate(rows_from(first), start=first + 1):
            file.write(to_json(row) + "\n")
            if number % batch_size == 0:
                file.flush()


def _keep_whole_batches(path: Path, batch_size: int, num_header_lines: int) -> int:
    """Cuts an unfinished file after its last whole batch, and returns the number of rows that are left."""
    if not path.exists():
        return 0
    count, kept, size = 0, 0, 0
    with open(path, "r+b") as file:
        for number, line in enumerate(file, start=1 - num_header_lines):
            size += len(line)
            if line.endswith(b"\n") and number % batch_size == 0:
                count, kept = number, size
        file.truncate(kept)
    return count


def to_json(value: Any, indent: int | None = None) -> str:
    """A value as JSON, which has no NaN or infinity: a number that is none is `null`."""

    def plain(part: Any) -> Any:
        if isinstance(part, float):
            return part if math.isfinite(part) else None
        if isinstance(part, Mapping):
            return {key: plain(entry) for key, entry in part.items()}
        return [plain(entry) for entry in part] if isinstance(part, list | tuple) else part

    return json.dumps(plain(value), indent=indent, ensure_ascii=False, allow_nan=False)


def write_json_lines(path: str | os.PathLike[str], rows: Sequence[dict[str, Any]]) -> None:
    """Writes rows beside the path and renames, so that the file is whole or not there."""
    path = Path(path)
    beside = path.with_name(path.name + ".part")
    # A link there would be followed
    beside.unlink(missing_ok=True)
    with open(beside, "w", encoding="utf-8") as file:
        for row in rows:
            file.write(to_json(row) + "\n")
    os.replace(beside, path)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes a JSON file beside the path and renames, so that the file is whole or not there."""
    write_text(path, to_json(value, indent=2) + "\n")


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes a text file beside the path and renames, so that the file is whole or not there."""
    path = Path(path)
    beside = path.with_name(path.name + ".part")
    beside.unlink(missing_ok=True)
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
