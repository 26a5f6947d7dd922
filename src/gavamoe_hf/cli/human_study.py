"""`gavamoe human-study draw` and `gavamoe human-study score`."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from typing import Any

from .arguments import CommandParser


@dataclass
class DrawArguments:
    """Options of `gavamoe human-study draw`."""

    predictions: list[str] = field(
        metadata={
            "help": "Systems as NAME=FILE: JSON lines with user, item, reference, prediction and optionally rating, "
            "feature and item_title; the same records in the same order in each.",
            "action": "extend",
        }
    )
    output_dir: str = field(metadata={"help": "Folder for sheet.html, for the raters, and key.json, not for them."})
    num_pairs: int = field(
        default=50, metadata={"help": "Records drawn; each is shown with the explanations of all systems."}
    )
    seed: int = field(
        default=0, metadata={"help": "Seed of records and orders: one that the raters do not know keeps them blind."}
    )
    include_reference: bool = field(
        default=False, metadata={"help": "Have what the user wrote rated too, as the system `reference`."}
    )
    positive_rating_threshold: float = field(
        default=3.0, metadata={"help": "Lowest rating that is called a positive experience."}
    )

    dataset: str | None = field(
        default=None,
        metadata={
            "help": "The data that the systems were trained on, as for `gavamoe train`: raters see what each user "
            "rated in train, and items by their `item_title`, if it has this column."
        },
    )
    column_mapping: list[str] | None = field(
        default=None,
        metadata={"help": "Names of columns that differ, as for `gavamoe train`, and item_title=THEIRS."},
    )
    rating_levels: list[float] = field(
        default_factory=lambda: [1.0, 2.0, 3.0, 4.0, 5.0], metadata={"help": "The values a rating can take."}
    )
    split_seed: int = field(default=0, metadata={"help": "Seed of a random split, as for `gavamoe train`."})
    synthetic_groups: int = field(default=3, metadata={"help": 'Planted groups of users of "synthetic".'})


@dataclass
class ScoreArguments:
    """Options of `gavamoe human-study score`."""

    key: str = field(metadata={"help": "The key.json of the study."})
    answers: list[str] = field(
        metadata={"help": "The files that the raters saved, complete or not.", "action": "extend"}
    )
    output_dir: str | None = field(
        default=None,
        metadata={"help": "Folder for human_scores.json and human_scores.md. Not given, the table is only printed."},
    )
    num_resamples: int = field(default=10_000, metadata={"help": "Bootstrap resamples of the pairs."})
    seed: int = field(default=0, metadata={"help": "Seed of the bootstrap."})


def run(argv: list[str]) -> None:
    """Draws a study, or scores its answers."""
    actions = {"draw": _draw, "score": _score}
    parser = argparse.ArgumentParser(
        prog="gavamoe human-study", epilog="`gavamoe human-study ACTION --help` lists an action's options."
    )
    parser.add_argument(
        "action", choices=actions, help="draw: write a blinded sheet for raters; score: score what they saved"
    )
    actions[parser.parse_args(argv[:1]).action](argv[1:])


def _draw(argv: list[str]) -> None:
    (args,) = CommandParser(DrawArguments, prog="gavamoe human-study draw").parse(argv)
    from ..evaluation.human_study import KEY_FILE, SHEET_FILE, draw_study

    key = draw_study(
        _named(args.predictions),
        args.output_dir,
        num_pairs=args.num_pairs,
        seed=args.seed,
        include_reference=args.include_reference,
        positive_rating_threshold=args.positive_rating_threshold,
        **_known_of(args),
    )
    print(f"Study {key['study']}: {len(key['pairs'])} pairs, {len(key['systems'])} explanations each.")
    print(f"Send {SHEET_FILE} in {args.output_dir} to the raters, and keep {KEY_FILE}: `score` needs it.")


def _known_of(args: DrawArguments) -> dict[str, Any]:
    """What `--dataset` knows of users and items."""
    if args.dataset is None:
        return {}
    from ..data.readers import read_source
    from ..training.pipeline import SYNTHETIC, DataArguments, read_data

    mapping = [entry for entry in args.column_mapping or [] if not entry.startswith("item_title=")]
    names = dict(entry.split("=", 1) for entry in args.column_mapping or [] if "=" in entry)
    data_args = DataArguments(
        dataset=args.dataset,
        column_mapping=mapping,
        rating_levels=args.rating_levels,
        unknown_held_out="drop",
        split_seed=args.split_seed,
        synthetic_groups=args.synthetic_groups,
    )
    histories: dict[str, list[dict[str, Any]]] = {}
    for record in read_data(data_args)[0]["train"]:
        histories.setdefault(record["user"], []).append(record)
    titles: dict[str, str] = {}
    if args.dataset != SYNTHETIC:
        item, title = names.get("item", "item"), names.get("item_title", "item_title")
        for part in read_source(args.dataset, {item, title}).values():
            pairs = zip(part.columns.get(item, ()), part.columns.get(title, ()), strict=False)
            titles |= {str(raw): name for raw, name in pairs if isinstance(name, str) and name}
    return {"histories": histories, "item_titles": titles}


def _named(predictions: list[str]) -> dict[str, str]:
    named: dict[str, str] = {}
    for option in predictions:
        name, separator, path = option.partition("=")
        if not (name and separator and path):
            raise ValueError(f"Expected `predictions` as NAME=FILE, but got {option!r}.")
        if name in named:
            raise ValueError(f"Expected different names in `predictions`, but got {name!r} twice.")
        named[name] = path
    return named


def _score(argv: list[str]) -> None:
    (args,) = CommandParser(ScoreArguments, prog="gavamoe human-study score").parse(argv)
    from ..evaluation.human_scores import markdown_scores, score_study, write_scores

    scores = score_study(args.key, args.answers, num_resamples=args.num_resamples, seed=args.seed)
    print(markdown_scores(scores), end="")
    if args.output_dir is not None:
        write_scores(scores, args.output_dir)
