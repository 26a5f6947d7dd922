"""The run of `gavamoe prepare`: two readings of the reviews, resumable parts, and the data set with its card."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from datasets import DatasetDict, concatenate_datasets, load_from_disk
from huggingface_hub import HfApi
from huggingface_hub.utils import validate_repo_id

from ..data.errors import DataError
from ..data.splits import SPLITS, random_split
from ..evaluation.predict import write_json, write_text
from ..version import __version__
from .card import CARD_FILE, dataset_card
from .extraction import check_spacy_model, load_function
from .options import FORMATS, PrepareArguments
from .parts import RARE, Choice, choose_records, find_sentences, sentiment_judge
from .sentences import CONTACT, NO_PAIR, NO_SENTENCE
from .sources import ReviewReader
from .survey import NO_TEXT, OFF_SCALE, OTHER_LANGUAGE, REPEATED, SPARSE, Survey, survey_reviews

SUMMARY_FILE = "prepare.json"
PARTS_FOLDER = "parts"
_RUN_FILE = "run.json"
_DATASET_FILE = "dataset_dict.json"
_OUTPUTS = (_DATASET_FILE, CARD_FILE, SUMMARY_FILE, *SPLITS)

DROP_REASONS = (OFF_SCALE, NO_TEXT, OTHER_LANGUAGE, REPEATED, SPARSE, NO_SENTENCE, CONTACT, NO_PAIR, RARE)

# What shapes the parts: an interrupted run goes on only with the same. The rest may change.
_PART_OPTIONS = ("rating_levels", "k_core", "language", "language_filter", "min_words", "max_words", "max_characters")
_PART_OPTIONS += ("spacy_model", "extractor", "sentiment", "chunk_size")


def prepare_reviews(args: PrepareArguments) -> DatasetDict:
    """
    Makes a data set of raw reviews: `output_dir` then holds the splits as `save_to_disk` writes them, which
    `gavamoe train --dataset` and [`load_records`] read, their card (`README.md`) and `prepare.json`.

    The reviews are read twice, so that they need not fit into memory: first for the filters, which need all of them,
    then for their sentences. What is done of the latter lies in `output_dir/parts`; a run that was interrupted goes on
    after it. With more than one process, a script has to guard its call by `if __name__ == "__main__":`.

    Args:
        args ([`PrepareArguments`]): The options.

    Returns:
        [`~datasets.DatasetDict`]: `train`, `validation` and `test`, 8:1:1 at random, with every user and item of the
        latter two in train. Columns `user`, `item`, `rating`, `feature`, `explanation`, `opinion`, and `timestamp`
        (seconds of Unix time) where the reviews have one.

    Raises:
        DataError: The reviews cannot be read or leave too few records, or an option does not work.
        FileExistsError: `output_dir` holds a finished data set, or the parts of a run with other options.
        ImportError: spaCy, its model or VADER is missing and needed.
    """
    _check_options(args)
    output_dir = Path(args.output_dir)
    parts = output_dir / PARTS_FOLDER
    _check_output_dir(output_dir, args.overwrite_output_dir)
    _check_tools(args)
    reader = ReviewReader(args.reviews, args.format, column_mapping_of(args))
    survey = survey_reviews(reader, args)
    _check_some_left(int(survey.kept.sum()), survey.dropped)
    # Not before it is known that there is something to put in its place
    _remove(output_dir, (*_OUTPUTS, PARTS_FOLDER) if args.overwrite_output_dir else ())
    _start_or_resume(output_dir, {**{name: getattr(args, name) for name in _PART_OPTIONS}, "reviews": survey.digest})
    find_sentences(reader, survey.kept, args, parts)
    choice = choose_records(parts, args.min_feature_count)
    choice.dropped.update(survey.dropped)
    _check_some_left(len(choice.dataset), choice.dropped)
    splits = random_split(choice.dataset, seed=args.split_seed)
    summary = _summary(args, survey, choice, splits)
    _save(splits, summary, output_dir)
    return load_from_disk(str(output_dir))


def column_mapping_of(args: PrepareArguments) -> dict[str, str]:
    """`column_mapping` as a dictionary."""
    mapping = {}
    for entry in args.column_mapping or []:
        ours, separator, theirs = entry.partition("=")
        if not separator or not theirs:
            raise DataError(f"column_mapping: expected ours=theirs, but got {entry!r}. Write user=customer.")
        mapping[ours] = theirs
    return mapping


def _check_options(args: PrepareArguments) -> None:
    checks = {
        "format": (args.format in FORMATS, f"one of {', '.join(FORMATS)}"),
        "max_off_scale": (0 <= args.max_off_scale <= 1, "a share from 0 to 1"),
        "max_bad_lines": (0 <= args.max_bad_lines <= 1, "a share from 0 to 1"),
        "k_core": (args.k_core >= 0, "a number of at least 0"),
        "min_words": (1 <= args.min_words <= args.max_words, "a number from 1 to max_words"),
        "max_characters": (args.max_characters >= 1, "a number of at least 1"),
        "min_feature_count": (args.min_feature_count >= 1, "a number of at least 1"),
        "chunk_size": (args.chunk_size >= 1, "a number of at least 1"),
        "num_proc": (args.num_proc is None or args.num_proc >= 1, "a number of at least 1"),
        "rating_levels": (len(set(args.rating_levels)) > 1, "at least two different ratings"),
    }
    for name, (is_good, expected) in checks.items():
        if not is_good:
            raise DataError(f"{name}: expected {expected}, but got {getattr(args, name)!r}.")
    if args.push_to_hub is not None:
        validate_repo_id(args.push_to_hub)


def _check_output_dir(output_dir: Path, overwrite: bool) -> None:
    """Raises `FileExistsError` where a data set, or files of somebody else, would be replaced unasked."""
    if output_dir.exists() and not output_dir.is_dir():
        raise FileExistsError(f"Expected `output_dir` as a folder, but {output_dir} is a file.")
    is_unfinished = (output_dir / PARTS_FOLDER / _RUN_FILE).exists()
    found = [name for name in _OUTPUTS if (output_dir / name).exists()]
    if found and not is_unfinished and not overwrite:
        raise FileExistsError(
            f"{output_dir} already holds {', '.join(found)}. Pass --overwrite_output_dir to replace what is there, or "
            "another --output_dir."
        )


def _remove(folder: Path, names: tuple[str, ...]) -> None:
    for name in names:
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _check_tools(args: PrepareArguments) -> None:
    """Finds what is missing before anything is read."""
    if args.extractor is not None:
        load_function(args.extractor)
    else:
        check_spacy_model(args.spacy_model)
    sentiment_judge(args)


def _start_or_resume(output_dir: Path, run: dict[str, Any]) -> None:
    """Makes the folder of the parts, or checks that those in it are of the same run."""
    path = output_dir / PARTS_FOLDER / _RUN_FILE
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, run)
        return
    earlier = json.loads(path.read_text(encoding="utf-8"))
    differing = [name for name in run if earlier.get(name) != run[name]]
    if differing:
        raise FileExistsError(
            f"{output_dir} holds an unfinished run that differs in {', '.join(differing)}. Pass what it was started "
            "with to go on with it, --overwrite_output_dir to start over, or another --output_dir."
        )
    # An earlier end may have been interrupted too
    _remove(output_dir, _OUTPUTS)


def _check_some_left(num_left: int, dropped: Mapping[str, int]) -> None:
    if not num_left:
        listed = ", ".join(f"{dropped[reason]} {reason}" for reason in DROP_REASONS if dropped.get(reason))
        raise DataError(
            f"expected at least one review that gives a record, but all were dropped: {listed}. Loosen these options; "
            "--k_core 0 keeps sparse users and items."
        )


def _summary(args: PrepareArguments, survey: Survey, choice: Choice, splits: DatasetDict) -> dict[str, Any]:
    """What `prepare.json` holds."""
    everything = concatenate_datasets([splits[split] for split in SPLITS])
    options = asdict(args)
    for name in ("reviews", "output_dir", "overwrite_output_dir", "num_proc", "push_to_hub", "private"):
        del options[name]
    return {
        "version": __version__,
        "files": [{"name": Path(path).name, "bytes": Path(path).stat().st_size} for path in args.reviews],
        "options": options,
        "lines": len(survey.kept) + survey.num_bad,
        "bad_lines": {"count": survey.num_bad, "first": [line._asdict() for line in survey.bad_lines]},
        "bad_times": survey.num_bad_times,
        "dropped": {reason: choice.dropped[reason] for reason in DROP_REASONS},
        "sentences": dict(sorted(choice.sentences.items())),
        "item_names": choice.names,
        "records": {split: len(splits[split]) for split in SPLITS},
        **{f"{name}s": len(everything.unique(name)) for name in ("user", "item", "feature")},
    }


def _save(splits: DatasetDict, summary: dict[str, Any], output_dir: Path) -> None:
    """Writes everything among the parts and moves it in, what makes it a data set last."""
    beside = output_dir / PARTS_FOLDER / "dataset"
    shutil.rmtree(beside, ignore_errors=True)
    splits.save_to_disk(str(beside))
    write_json(output_dir / SUMMARY_FILE, summary)
    write_text(output_dir / CARD_FILE, str(dataset_card(splits, summary)))
    for name in (*SPLITS, _DATASET_FILE):
        os.replace(beside / name, output_dir / name)
    shutil.rmtree(output_dir / PARTS_FOLDER)


def read_summary(output_dir: str | os.PathLike[str]) -> dict[str, Any]:
    """What `prepare.json` holds."""
    return json.loads((Path(output_dir) / SUMMARY_FILE).read_text(encoding="utf-8"))


def describe_summary(summary: Mapping[str, Any]) -> str:
    """A few lines for the terminal: what was read, dropped and made."""
    counts = {
        "lines read": summary["lines"],
        "no review": summary["bad_lines"]["count"],
        **({"time not read": summary["bad_times"]} if summary["bad_times"] else {}),
        **{reason: count for reason, count in summary["dropped"].items() if count},
        "records": sum(summary["records"].values()),
        **{f"  {split}": count for split, count in summary["records"].items()},
        **{name: summary[name] for name in ("users", "items", "features")},
    }
    width = max(map(len, counts))
    return "\n".join(f"{name:{width}}  {count:>11,}" for name, count in counts.items())


def push_dataset(splits: DatasetDict, output_dir: str | os.PathLike[str], repo_id: str, private: bool = False) -> str:
    """
    Pushes a prepared data set to the Hub, with its card and `prepare.json`.

    Args:
        splits ([`~datasets.DatasetDict`]): The data set.
        output_dir (`str` or `os.PathLike`): Its folder.
        repo_id (`str`): Id of the data set on the Hub, which is made if it is not there.
        private (`bool`, *optional*, defaults to `False`): Whether a new one is private.

    Returns:
        `str`: its address.
    """
    api = HfApi()
    url = api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True)
    card = dataset_card(splits, read_summary(output_dir), hub_id=url.repo_id)
    # Before the data: `datasets` adds the files of each split to the metadata of a card that is there
    for name, content in (
        (CARD_FILE, str(card).encode()),
        (SUMMARY_FILE, (Path(output_dir) / SUMMARY_FILE).read_bytes()),
    ):
        api.upload_file(path_or_fileobj=content, path_in_repo=name, repo_id=url.repo_id, repo_type="dataset")
    splits.push_to_hub(url.repo_id, private=private)
    return str(url)
