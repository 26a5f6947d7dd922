"""`gavamoe prepare`."""

from __future__ import annotations

import logging
from pathlib import Path

from ..prepare.options import PrepareArguments
from .arguments import CommandParser


def run(argv: list[str]) -> None:
    """Makes a data set of raw reviews, and prints what became of them."""
    (args,) = CommandParser(PrepareArguments, prog="gavamoe prepare").parse(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for noisy in ("httpx", "datasets"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    from ..files import one_writer
    from ..prepare.pipeline import describe_summary, prepare_reviews, push_dataset, read_summary

    with one_writer(Path(args.output_dir).resolve()):
        splits = prepare_reviews(args)
    print(describe_summary(read_summary(args.output_dir)))
    print(f"{Path(args.output_dir)}: read it with `gavamoe train --dataset {args.output_dir}`")
    if args.push_to_hub is not None:
        print(push_dataset(splits, args.output_dir, args.push_to_hub, args.private))
