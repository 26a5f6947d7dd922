"""`gavamoe evaluate`."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arguments import CommandParser

if TYPE_CHECKING:
    from datasets import DatasetDict

    from ..evaluation.evaluator import EvaluationOptions
    from ..evaluation.prediction_files import Corpus

# The options of the predictions that a folder holds: others are not mixed with them
RUN_FILE = "evaluate_run.json"
_GENERATION_OPTIONS = ("model", "dataset", "split", "column_mapping", "rating_levels", "split_seed", "synthetic_groups")
_GENERATION_OPTIONS += ("unknown_held_out", "batch_size", "max_new_tokens", "temperature", "seed")


@dataclass
class EvaluateArguments:
    """Options of `gavamoe evaluate`."""

    output_dir: str = field(
        metadata={"help": "Folder for metrics.json, metrics.md and, with `model`, predictions_PROTOCOL.jsonl."}
    )
    model: str | None = field(
        default=None,
        metadata={"help": "Folder or Hub id of a checkpoint: its explanations are generated and scored."},
    )
    predictions: str | None = field(
        default=None,
        metadata={
            "help": "Instead of `model`: any system's explanations as JSON lines with user, item, reference, "
            "prediction and optionally feature, rating, predicted_rating."
        },
    )
    dataset: str | None = field(
        default=None,
        metadata={
            "help": "The data, as for `gavamoe train`. With `predictions`, optional: the file must then hold the "
            "records of the split, and features and range of ratings are those of all the data."
        },
    )
    unknown_held_out: str | None = field(
        default=None,
        metadata={
            "help": "What to do with held-out records whose user or item train does not have. With `model` drop if not "
            "said, as no model knows them; else error. To score what `model` left, drop them too.",
            "choices": ["error", "drop"],
        },
    )
    split: str = field(
        default="test", metadata={"help": "The records that are explained.", "choices": ["train", "validation", "test"]}
    )
    protocol: str | None = field(
        default=None,
        metadata={
            "help": "given: the prompt has the record's rating and feature, as in the paper. predicted: it has "
            "neither. With `model` given if not said; with `predictions` only named in the result.",
            "choices": ["given", "predicted", "both"],
        },
    )
    profile: list[str] = field(
        default_factory=lambda: ["default"],
        metadata={
            "help": "Definitions of the metrics: default, peter, pepler, gavamoe-released, xrec. The first one's "
            "scores are at the top of metrics.json."
        },
    )
    compare: str | None = field(
        default=None,
        metadata={
            "help": "Another system's predictions of the same records, for a paired test of the differences. Both are "
            "scored on the keys that both files have."
        },
    )
    compare_protocol: str | None = field(
        default=None,
        metadata={
            "help": "The protocol of the system in `compare`; only named in the result.",
            "choices": ["given", "predicted"],
        },
    )
    bertscore_model: str | None = field(
        default=None,
        metadata={
            "help": "Folder or Hub id of BERTScore's encoder. Not given, default has no BERTScore and xrec takes "
            "roberta-large."
        },
    )
    bertscore_num_layers: int | None = field(
        default=None,
        metadata={"help": "Layer that BERTScore compares; bert_score's choice, or the last, by default."},
    )
    bertscore_rescale: bool = field(
        default=False, metadata={"help": "Rescale the BERTScore of default with a baseline. xrec always does."}
    )
    bertscore_baseline: str | None = field(
        default=None, metadata={"help": "The baseline as CSV (LAYER,P,R,F); bert_score's for English if not given."}
    )
    sentiment: bool = field(
        default=False, metadata={"help": "Score whether explanations sound as their ratings are (VADER, English)."}
    )
    positive_rating_threshold: float | None = field(
        default=None,
        metadata={"help": "A rating from here on is positive; the checkpoint's, or 3, if not given."},
    )
    bootstrap_samples: int = field(default=1000, metadata={"help": "Resamples behind intervals and test."})
    seed: int = field(default=0, metadata={"help": "Seed of the resamples and of sampled explanations."})
    batch_size: int = field(default=64, metadata={"help": "Pairs explained at once."})
    max_new_tokens: int | None = field(
        default=None, metadata={"help": "Most tokens of an explanation; the checkpoint's own if not given. Paper: 30."}
    )
    temperature: float = field(default=0.0, metadata={"help": "Sampling temperature; 0 decodes greedily. Paper: 0.7."})
    column_mapping: list[str] | None = field(
        default=None, metadata={"help": "Names of columns that differ, as for `gavamoe train`."}
    )
    rating_levels: list[float] = field(
        default_factory=lambda: [1.0, 2.0, 3.0, 4.0, 5.0],
        metadata={"help": "The values a rating of the data can take."},
    )
    split_seed: int = field(default=0, metadata={"help": "Seed of a random split, as for `gavamoe train`."})
    synthetic_groups: int = field(default=3, metadata={"help": 'Planted groups of users of "synthetic".'})
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Replace what a run with other options has left in `output_dir`."}
    )

    def __post_init__(self) -> None:
        if (self.model is None) == (self.predictions is None):
            raise ValueError("Expected either `--model` or `--predictions`. Pass one of them.")
        if self.model is not None and self.dataset is None:
            raise ValueError("Expected the data to explain with `--model`. Pass `--dataset`.")
        if self.predictions is not None and self.protocol == "both":
            raise ValueError("Expected one protocol with `--predictions`: a file was made under one. Score two files.")
        if self.compare_protocol is not None and self.compare is None:
            raise ValueError("Expected a file to compare with `--compare_protocol`. Pass `--compare`.")
        if self.unknown_held_out is None:
            self.unknown_held_out = "error" if self.model is None else "drop"
        if self.batch_size < 1:
            raise ValueError(f"Expected `--batch_size` of at least 1, but got {self.batch_size}.")


def run(argv: list[str]) -> None:
    """Scores a checkpoint or a predictions file, prints the table and writes it."""
    (args,) = CommandParser(EvaluateArguments, prog="gavamoe evaluate").parse(argv)
    from ..files import one_writer

    for noisy in ("absl", "rouge_score"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    output_dir = Path(args.output_dir)
    _check_output_dir(output_dir, args.overwrite_output_dir)
    with one_writer(output_dir.resolve()):
        _score(args, output_dir)


def _score(args: EvaluateArguments, output_dir: Path) -> None:
    from ..evaluation.evaluator import evaluate_predictions, markdown_table, write_evaluation
    from ..evaluation.prediction_files import Corpus

    options = _options(args)
    records = None if args.dataset is None else _read_records(args)
    dropped = {} if records is None else {"num_dropped": _num_dropped(args, records)}
    corpus = None if records is None else Corpus.from_records(records, args.split)
    if args.model is None:
        result = evaluate_predictions(
            args.predictions, options, corpus, args.protocol, args.compare, args.compare_protocol
        )
    else:
        result = _evaluate_model(args, options, records, corpus, output_dir)
    write_evaluation({**result, **dropped}, output_dir)
    print(markdown_table(result), end="")


def _options(args: EvaluateArguments) -> EvaluationOptions:
    from ..evaluation.evaluator import EvaluationOptions
    from ..evaluation.sentiment import vader_sentiment

    return EvaluationOptions(
        profiles=args.profile,
        num_resamples=args.bootstrap_samples,
        seed=args.seed,
        bertscore_model=args.bertscore_model,
        bertscore_num_layers=args.bertscore_num_layers,
        bertscore_rescale=args.bertscore_rescale,
        bertscore_baseline=args.bertscore_baseline,
        sentiment=vader_sentiment() if args.sentiment else None,
        positive_threshold=3.0 if args.positive_rating_threshold is None else args.positive_rating_threshold,
    )


def _evaluate_model(
    args: EvaluateArguments, options: EvaluationOptions, records: DatasetDict, corpus: Corpus, output_dir: Path
) -> dict[str, Any]:
    from ..evaluation.evaluator import evaluate_predictions, require_ratings
    from ..evaluation.predict import write_predictions
    from ..evaluation.prediction_files import check_predictions
    from ..loading import load_checkpoint

    if args.compare is not None:
        # Before anything is generated
        summary, _ = check_predictions(args.compare, corpus)
        require_ratings(args.compare, summary, options)
    # Missing packages and models too
    _ = options.bert_scorers
    model, processor = load_checkpoint(args.model)
    if args.positive_rating_threshold is None:
        options.positive_threshold = processor.positive_rating_threshold
    _claim(output_dir, args)
    generation: dict[str, Any] = {} if args.max_new_tokens is None else {"max_new_tokens": args.max_new_tokens}
    if args.temperature > 0:
        generation |= {"do_sample": True, "temperature": args.temperature}
    results = {}
    for protocol in ("given", "predicted") if args.protocol == "both" else (args.protocol or "given",):
        path = output_dir / f"predictions_{protocol}.jsonl"
        if not path.exists():
            write_predictions(
                path, model, processor, records[args.split], protocol, args.batch_size, args.seed, **generation
            )
        results[protocol] = evaluate_predictions(path, options, corpus, protocol, args.compare, args.compare_protocol)
    first, *rest = results
    return {**results[first], **({"protocols": {name: results[name] for name in rest}} if rest else {})}


def _check_output_dir(output_dir: Path, overwrite: bool) -> None:
    """Raises where a folder's metrics.json is not this command's to replace, as that of `gavamoe train`."""
    if output_dir.exists() and not output_dir.is_dir():
        raise FileExistsError(f"Expected `output_dir` as a folder, but {output_dir} is a file.")
    metrics = output_dir / "metrics.json"
    if metrics.exists() and not overwrite and '"bootstrap"' not in metrics.read_text(encoding="utf-8"):
        raise FileExistsError(
            f"{metrics} is not from `gavamoe evaluate`. Pass another --output_dir, or --overwrite_output_dir to "
            "replace it."
        )


def _claim(output_dir: Path, args: EvaluateArguments) -> None:
    """Keeps the predictions of an earlier run with the same options, so that it goes on, and refuses others."""
    from ..evaluation.predict import write_json
    from ..files import checkpoint_identity
    from ..loading import local_folder

    described = {name: getattr(args, name) for name in _GENERATION_OPTIONS}
    described |= checkpoint_identity(local_folder(args.model))
    file = output_dir / RUN_FILE
    earlier = json.loads(file.read_text(encoding="utf-8")) if file.exists() else None
    found = [path for name in ("given", "predicted") for path in output_dir.glob(f"predictions_{name}.jsonl*")]
    if found and earlier != described:
        if not args.overwrite_output_dir:
            raise FileExistsError(
                f"{output_dir} holds predictions of another model, data or options. Pass --overwrite_output_dir to "
                "replace them, or another --output_dir."
            )
        for path in found:
            path.unlink()
    output_dir.mkdir(parents=True, exist_ok=True)
    write_json(file, described)


def _read_records(args: EvaluateArguments) -> DatasetDict:
    from ..training.pipeline import DataArguments, read_data

    records, _ = read_data(
        DataArguments(
            dataset=args.dataset,
            column_mapping=args.column_mapping,
            rating_levels=args.rating_levels,
            unknown_held_out=args.unknown_held_out,
            split_seed=args.split_seed,
            synthetic_groups=args.synthetic_groups,
        )
    )
    return records


def _num_dropped(args: EvaluateArguments, records: DatasetDict) -> int:
    """How many records of the split were left out: only those of a split that the source itself has can be."""
    from ..data.checks import clean_split_names
    from ..data.readers import read_source
    from ..training.pipeline import SYNTHETIC

    if args.dataset == SYNTHETIC or args.split == "train" or args.unknown_held_out == "error":
        return 0
    column = dict(entry.split("=", 1) for entry in args.column_mapping or []).get("split", "split")
    parts = read_source(args.dataset, {column})
    whole = parts[args.split].num_rows if args.split in parts else 0
    if set(parts) == {"train"} and column in parts["train"].columns:
        whole = int((clean_split_names(parts["train"], column) == args.split).sum())
    return whole - len(records[args.split]) if whole else 0
