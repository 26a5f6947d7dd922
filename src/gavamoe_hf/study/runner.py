"""Trains and scores the cells of a study, each once, however often it is interrupted."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import DatasetDict
from transformers import set_seed

from ..evaluation import require_text_metrics
from ..evaluation.predict import predict_records, write_json, write_json_lines
from ..evaluation.sparsity import sparsity_thirds
from ..files import records_digest
from ..processing_gavamoe import GaVaMoEProcessor
from ..training.building import build_model, build_processor, build_rating_model
from ..training.lora import lora_config
from ..training.pipeline import (
    ADAPTER_FOLDER,
    BASE_FOLDER,
    CHECKPOINT_FOLDER,
    METRICS_FILE,
    RATING_FOLDER,
    adapted_base,
    place_for_scoring,
    read_data,
    save_checkpoint,
    torch_dtype_of,
    train_explanations,
    train_rating_model,
)
from ..training.rating_trainer import RatingDataset
from ..vae_gmm_gavamoe import GaVaMoERatingModel
from .config import FULL, Cell, StudyConfig
from .scoring import score_rows

logger = logging.getLogger(__name__)

STUDY_FILE = "options.json"
CELLS_FOLDER, SHARED_FOLDER, LOCKS_FOLDER = "cells", "rating_models", "locks"
# Where a model is that another process is at
_WAIT_SECONDS = 5.0
# Options under which the cells are the same: where the data lies, and what it is trained on
_NOT_COMPARED = {"dataset", "use_cpu", "disable_tqdm", "num_clusters", "alpha", "generation_batch_size"}


@dataclass
class StudyData:
    """
    What all cells of a study share.

    Attributes:
        records ([`~datasets.DatasetDict`]): The splits.
        processor ([`GaVaMoEProcessor`]): Of the training records.
        ratings (`dict[str, RatingDataset]`): The splits as stage 1 takes them.
        thirds (`dict[str, list[int]]`): Of the test split, from [`sparsity_thirds`].
        summary (`dict[str, Any]`): Users, items, records, features, the splits' sizes, and a hash of it all.
    """

    records: DatasetDict
    processor: GaVaMoEProcessor
    ratings: dict[str, RatingDataset]
    thirds: dict[str, list[int]]
    summary: dict[str, Any]


def read_study_data(config: StudyConfig) -> StudyData:
    """Reads the data of a study and builds what follows from it alone."""
    cell = config.main_cell(config.seeds[0])
    data_args, model_args, *_ = config.arguments(cell, config.folder)
    records, _ = read_data(data_args)
    processor = build_processor(records["train"], model_args, data_args.rating_levels)
    return StudyData(
        records=records,
        processor=processor,
        ratings={split: RatingDataset.from_records(records[split], processor) for split in records},
        thirds=sparsity_thirds(list(records["train"]["user"]), list(records["test"]["user"])),
        summary=_summary(records),
    )


def _summary(records: DatasetDict) -> dict[str, Any]:
    columns = {name: [value for split in records.values() for value in split[name]] for name in ("user", "item")}
    return {
        "users": len(set(columns["user"])),
        "items": len(set(columns["item"])),
        "records": len(columns["user"]),
        "features": len({name for split in records.values() for names in split["feature"] for name in names}),
        "splits": {name: len(split) for name, split in records.items()},
        "sha256": records_digest(records),
    }


def run_study(
    config: StudyConfig, data: StudyData, only: str | None = None, max_cells: int | None = None
) -> dict[str, str]:
    """
    Trains and scores every cell that is not finished yet. Several processes may work on one folder side by side: a
    cell, or a rating model that cells share, is one process's at a time. A process that was killed leaves nothing
    behind that has to be cleaned up: its cell goes on from its last epoch.

    Each finished cell leaves in `cells/NAME/` its `metrics.json` (`cell`, `num_parameters`, `seconds`, and `scores` by
    protocol and part of the test split), `predictions_given.jsonl` and `predictions_predicted.jsonl`, and the losses
    of stage 2; with `keep_checkpoints` its model too. The rating models are in `rating_models/`.

    Args:
        config ([`StudyConfig`]): The study.
        data ([`StudyData`]): Its data, from [`read_study_data`].
        only (`str`, *optional*): A regular expression: cells in whose name it is not found are left out.
        max_cells (`int`, *optional*): Stop after so many cells.

    Returns:
        `dict[str, str]`: Why a cell failed, by its name; the others went on.

    Raises:
        `ValueError`: for a folder that holds a study with other options or data, and an `only` that fits no cell.
    """
    require_text_metrics()
    cells = _selected(config, only)
    _check_same_study(config, data)
    failures: dict[str, str] = {}
    count = 0
    while max_cells is None or count < max_cells:
        states = set()
        # From the first one every time: what other processes have finished or given up in the meantime counts
        for cell in cells:
            if not _is_done(config, cell) and cell.name not in failures:
                states.add(_run_unless_busy(config, data, cell, failures))
            if "ran" in states:
                count += 1
                break
        else:
            if "rating model busy" not in states:
                break
            time.sleep(_WAIT_SECONDS)
    return failures


def cell_states(config: StudyConfig, only: str | None = None) -> dict[str, str]:
    """`"done"`, `"running"` (in some process), `"begun"` or `"open"` for each cell's name."""
    states = {}
    for cell in _selected(config, only):
        folder = config.folder / CELLS_FOLDER / cell.name
        if _is_done(config, cell):
            states[cell.name] = "done"
        else:
            with _lock(config, cell.name) as is_held:
                states[cell.name] = ("begun" if folder.is_dir() else "open") if is_held else "running"
    return states


def read_metrics(config: StudyConfig, cell: Cell) -> dict[str, Any] | None:
    """What a finished cell's `metrics.json` holds; `None` for one that is not finished."""
    if not _is_done(config, cell):
        return None
    return json.loads((config.folder / CELLS_FOLDER / cell.name / METRICS_FILE).read_text(encoding="utf-8"))


def predictions_path(config: StudyConfig, cell: Cell, protocol: str) -> Path:
    """Where a finished cell's predictions of the test split are."""
    return config.folder / CELLS_FOLDER / cell.name / f"predictions_{protocol}.jsonl"


def load_rating_model(config: StudyConfig, cell: Cell) -> GaVaMoERatingModel | None:
    """A cell's rating model as stage 1 left it; `None` where it has not been trained."""
    folder = config.folder / SHARED_FOLDER / cell.rating_name / RATING_FOLDER
    return GaVaMoERatingModel.from_pretrained(folder) if folder.is_dir() else None


def _selected(config: StudyConfig, only: str | None) -> list[Cell]:
    cells = config.cells()
    chosen = [cell for cell in cells if only is None or re.search(only, cell.name)]
    if not chosen:
        raise ValueError(f"Expected `only` to fit a cell such as {cells[0].name}, but {only!r} fits none.")
    return chosen


def _is_done(config: StudyConfig, cell: Cell) -> bool:
    return (config.folder / CELLS_FOLDER / cell.name / METRICS_FILE).is_file()


def _run_unless_busy(config: StudyConfig, data: StudyData, cell: Cell, failures: dict[str, str]) -> str:
    """`"ran"`, `"busy"`, or `"rating model busy"`: then there is something to do here later."""
    with _lock(config, cell.name) as is_held:
        # Another process may have finished it since it was listed
        if not is_held or _is_done(config, cell):
            return "busy"
        try:
            with _lock(config, f"rating_{cell.rating_name}") as is_held:
                if not is_held:
                    return "rating model busy"
                _train_shared_rating_model(config, data, cell)
            _run_cell(config, data, cell)
        except Exception as error:
            # Whatever it is, such as a cluster that stays empty: the other cells do not depend on it
            logger.exception("Cell %s failed", cell.name)
            failures[cell.name] = f"{type(error).__name__}: {error}"
        return "ran"


def _train_shared_rating_model(config: StudyConfig, data: StudyData, cell: Cell) -> None:
    """Stage 1, which knows nothing of alpha and ablations but K: once for all cells of a seed and K."""
    folder = config.folder / SHARED_FOLDER / cell.rating_name
    if (folder / RATING_FOLDER).is_dir():
        return
    logger.info("Training the rating model %s", cell.rating_name)
    stage_one = dataclasses.replace(cell, ablation=FULL)
    data_args, model_args, rating_args, sft_args, _ = config.arguments(stage_one, folder)
    set_seed(cell.seed)
    rating_model = build_rating_model(data.processor, model_args, data_args.rating_levels)
    train_rating_model(rating_model, data.ratings, rating_args, sft_args, folder, resume=True)
    shutil.rmtree(folder / CHECKPOINT_FOLDER, ignore_errors=True)


def _run_cell(config: StudyConfig, data: StudyData, cell: Cell) -> None:
    """Stage 2 from the shared rating model, predictions and scores; `metrics.json` comes last."""
    start = time.perf_counter()
    logger.info("Cell %s", cell.name)
    folder = config.folder / CELLS_FOLDER / cell.name
    folder.mkdir(parents=True, exist_ok=True)
    data_args, model_args, _, sft_args, lora_args = config.arguments(cell, folder)
    set_seed(cell.seed)
    dtype = torch_dtype_of(model_args, lora_args)
    model = build_model(data.processor, model_args, data_args.rating_levels, dtype)
    model.rating_model.load_state_dict(load_rating_model(config, cell).state_dict())
    train = data.ratings["train"].columns
    model.set_interactions(train["user_id"], train["item_id"])
    peft_config = lora_config(lora_args, sft_args, model.config)
    if peft_config is not None:
        model = adapted_base(model, data.processor, lora_args, peft_config, sft_args, folder, resume=True)
    model = train_explanations(model, data.processor, data.records, sft_args, folder, True, peft_config)
    place_for_scoring(model, sft_args.device)
    scores = {}
    for protocol in config.protocols:
        batch_size = data_args.generation_batch_size
        rows = predict_records(model, data.processor, data.records["test"], protocol, batch_size)
        write_json_lines(predictions_path(config, cell, protocol), rows)
        scores[protocol] = score_rows(rows, data.thirds)
    if config.keep_checkpoints:
        save_checkpoint(model, data.processor, folder)
    metrics = {
        "cell": dataclasses.asdict(cell),
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "seconds": round(time.perf_counter() - start, 1),
        "scores": scores,
    }
    write_json(folder / METRICS_FILE, metrics)
    for name in (CHECKPOINT_FOLDER, BASE_FOLDER, ADAPTER_FOLDER):
        shutil.rmtree(folder / name, ignore_errors=True)


def _check_same_study(config: StudyConfig, data: StudyData) -> None:
    """Writes the options that finished cells depend on, or compares them with those of the study that is there."""
    options = {name: value for name, value in config.train.items() if name not in _NOT_COMPARED}
    here = {"train": options, "protocols": config.protocols, "data": data.summary}
    path = config.folder / STUDY_FILE
    with lock_study(config):
        if not path.is_file():
            write_json(path, here)
            return
        there = json.loads(path.read_text(encoding="utf-8"))
    changed = [
        f"{name} was {_entry(there, part, name)!r}, now {_entry(here, part, name)!r}"
        for part in here
        for name in sorted({*_names(there, part), *_names(here, part)})
        if _entry(there, part, name) != _entry(here, part, name)
    ]
    if changed:
        raise ValueError(
            f"Expected the options and data of the study in {config.folder}, but {', '.join(changed)}. Change them "
            "back, or choose another output_dir."
        )


def _names(options: Mapping[str, Any], part: str) -> list[str]:
    return list(options[part]) if isinstance(options[part], Mapping) else [part]


def _entry(options: Mapping[str, Any], part: str, name: str) -> Any:
    return options[part].get(name) if isinstance(options[part], Mapping) else options[part]


@contextmanager
def lock_study(config: StudyConfig) -> Iterator[None]:
    """Keeps other processes from the files that all of them write."""
    with _lock(config, "study", wait=True):
        yield


@contextmanager
def _lock(config: StudyConfig, name: str, wait: bool = False) -> Iterator[bool]:
    """
    Whether this process holds the lock of that name for as long as the context lasts. The operating system holds it
    for the process, and ends it with the process however that ends: no lock is ever stale.
    """
    import fcntl

    folder = config.folder / LOCKS_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"{name}.lock", "a", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True
