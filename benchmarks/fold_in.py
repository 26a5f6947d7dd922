"""
Users (or items) that training did not see, folded in from a few ratings, against a full retrain that has those ratings.

    python benchmarks/fold_in.py --output_dir outputs/fold_in_synthetic
    python benchmarks/fold_in.py --dataset musical_instruments --output_dir outputs/fold_in_musical_instruments

For each seed, some users are held out of every split. One rating model is trained without them, to which they are added
with `model.add_users`; the other is trained with the same few of their ratings. Both predict their remaining ratings of
train and those of test. Validation, which chooses the epoch, has none of them, and is the same for both. Eligible users
are cut in two halves once and for all: `--pool validation` is for choosing options, `--pool test` for reporting.

Leaves `fold_in.json` and `fold_in.md` in `output_dir`.
"""

import argparse
import logging
import statistics
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from datasets import Dataset, DatasetDict
from stage_one import be_quiet, train_stage_one
from transformers import set_seed

from gavamoe_hf import GaVaMoEForCausalLM, GaVaMoEProcessor
from gavamoe_hf.data import SyntheticConfig, generate_synthetic, load_records
from gavamoe_hf.evaluation import BiasBaseline
from gavamoe_hf.evaluation.predict import write_json
from gavamoe_hf.training.building import ModelArguments, build_model, build_processor

logger = logging.getLogger("fold_in")

METHODS = {"retrain": "full retrain", "fold_in": "folded in", "population": "population", "bias": "user + item bias"}
# The language model is not trained, only carried
_LANGUAGE_MODEL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "moe_intermediate_size": 8}
_SIZES = {"from scratch": (64, 32), "paper": (768, 128)}  # embedding and latent size


@dataclass
class HeldOut:
    """Who is held out: histories, the ratings to predict, and rows of train (without and with histories)."""

    histories: dict[str, list[tuple[str, float]]]
    targets: pd.DataFrame
    train: Dataset
    train_with_histories: Dataset
    validation: Dataset


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="synthetic", help='File, folder or Hub id, or "synthetic".')
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--kind", choices=["user", "item"], default="user", help="What is held out.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="One run each.")
    parser.add_argument("--pool", choices=["validation", "test"], default="test", help="Half that is drawn from.")
    parser.add_argument("--num_held_out", type=int, default=40, help="Users (or items) held out in each run.")
    parser.add_argument("--num_ratings", type=int, default=5, help="Ratings that each is folded in from.")
    parser.add_argument("--min_ratings", type=int, default=7, help="Ratings in train of those held out, at least.")
    parser.add_argument("--autoencoder_learning_rates", type=float, nargs="+", help="Of stage 1; its default if none.")
    parser.add_argument("--autoencoder_epochs", type=int, help="Of stage 1; its default if not given.")
    return parser.parse_args()


def hold_out(records: DatasetDict, args: argparse.Namespace, seed: int) -> HeldOut:
    """Draws who is held out, and which of their ratings are the history."""
    kind, partner = args.kind, "item" if args.kind == "user" else "user"
    frames = {split: records[split].select_columns(["user", "item", "rating"]).to_pandas() for split in records}
    train = frames["train"]
    counts = train[kind].value_counts()
    eligible = np.random.default_rng(0).permutation(sorted(counts.index[counts >= args.min_ratings]))
    half = len(eligible) // 2
    pool = eligible[:half] if args.pool == "validation" else eligible[half:]
    draw = np.random.default_rng(seed)
    drawn = draw.permutation(pool)[: args.num_held_out]

    is_drawn = {split: frame[kind].isin(drawn) for split, frame in frames.items()}
    # Partners that only those held out have rated are known to neither model
    known = set(train.loc[~is_drawn["train"], partner])
    is_usable = {split: frame[partner].isin(known) for split, frame in frames.items()}
    histories, history_rows, targets = {}, [], []
    for raw, ratings in train[is_drawn["train"] & is_usable["train"]].groupby(kind):
        rows = draw.permutation(ratings.index)
        if len(rows) >= args.num_ratings:
            history, rest = train.loc[rows[: args.num_ratings]], train.loc[rows[args.num_ratings :]]
            histories[raw] = list(zip(history[partner], history["rating"], strict=True))
            history_rows += list(history.index)
            targets += [rest, frames["test"][is_usable["test"] & (frames["test"][kind] == raw)]]
    train_rows = np.flatnonzero(~is_drawn["train"])
    return HeldOut(
        histories=histories,
        targets=pd.concat(targets),
        train=records["train"].select(train_rows),
        train_with_histories=records["train"].select(sorted([*train_rows, *history_rows])),
        validation=records["validation"].select(np.flatnonzero(~is_drawn["validation"] & is_usable["validation"])),
    )


def train_rating_model(
    train: Dataset, validation: Dataset, args: argparse.Namespace, seed: int
) -> tuple[GaVaMoEForCausalLM, GaVaMoEProcessor]:
    """Stage 1, with the options of the command line."""
    options = {name: getattr(args, name) for name in ("autoencoder_learning_rates", "autoencoder_epochs")}
    options = {name: value for name, value in options.items() if value is not None}
    set_seed(seed)
    model_args = ModelArguments(**_LANGUAGE_MODEL)
    processor = build_processor(train, model_args)
    model = build_model(processor, model_args)
    train_stage_one(model.rating_model, processor, {"train": train, "validation": validation}, seed, **options)
    return model.eval(), processor


def predict(model: GaVaMoEForCausalLM, processor: GaVaMoEProcessor, pairs: pd.DataFrame) -> np.ndarray:
    users, items = map(processor.user_index, pairs["user"]), map(processor.item_index, pairs["item"])
    return model.predict_rating(list(users), list(items)).numpy()


def run(records: DatasetDict, args: argparse.Namespace, seed: int) -> dict[str, np.ndarray]:
    """Errors of each method, a rating to predict each."""
    held_out = hold_out(records, args, seed)
    targets, actual = held_out.targets, held_out.targets["rating"].to_numpy()
    predicted = {}
    retrained = train_rating_model(held_out.train_with_histories, held_out.validation, args, seed)
    predicted["retrain"] = predict(*retrained, targets)
    model, processor = train_rating_model(held_out.train, held_out.validation, args, seed)
    predicted["population"] = predict(model, processor, targets.assign(**{args.kind: None}))
    (model.add_users if args.kind == "user" else model.add_items)(processor, held_out.histories)
    predicted["fold_in"] = predict(model, processor, targets)
    columns = [list(held_out.train_with_histories[name]) for name in ("user", "item", "rating")]
    validation = tuple(list(held_out.validation[name]) for name in ("user", "item", "rating"))
    baseline = BiasBaseline().fit(*columns, validation=validation)
    predicted["bias"] = baseline.predict(list(targets["user"]), list(targets["item"]))
    return {method: predicted[method] - actual for method in METHODS}


def scores(errors: dict[str, np.ndarray]) -> dict[str, float]:
    rmse = {method: float(np.sqrt(np.mean(error**2))) for method, error in errors.items()}
    return {"num_targets": len(errors["retrain"]), **rmse, "ratio": rmse["fold_in"] / rmse["retrain"]}


def time_one_user(embedding_size: int, latent_size: int, num_ratings: int) -> dict[str, float]:
    """Seconds that one user takes on one thread, wall clock and processor: the median of 10 users, one by one."""
    torch.set_num_threads(1)
    records = generate_synthetic(SyntheticConfig()).records["train"]
    model_args = ModelArguments(**_LANGUAGE_MODEL, vae_embedding_size=embedding_size, latent_size=latent_size)
    processor = build_processor(records, model_args)
    model = build_model(processor, model_args).eval()
    history = [(item, 1.0 + index % 5) for index, item in enumerate(processor.items[:num_ratings])]
    seconds = defaultdict(list)
    for repeat in range(10):
        start = time.perf_counter(), time.process_time()
        model.add_users(processor, {f"new {repeat}": history})
        seconds["wall"].append(time.perf_counter() - start[0])
        seconds["processor"].append(time.process_time() - start[1])
    return {name: statistics.median(values) for name, values in seconds.items()}


def as_markdown(report: dict[str, Any]) -> str:
    header = ["seed", "ratings predicted", *METHODS.values(), "folded in / retrain"]
    lines = [
        f"RMSE in stars of {report['kind']}s held out of {report['dataset']}, folded in from {report['num_ratings']} "
        "ratings.",
        "",
        "| " + " | ".join(header) + " |",
        "|" + "---|" * len(header),
    ]
    for name, row in [*report["seeds"].items(), ("all", report["all"])]:
        cells = [name, row["num_targets"], *(f"{row[method]:.4f}" for method in METHODS), f"{row['ratio']:.3f}"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines += ["", "| sizes | E | D | one user, wall clock | processor time |", "|---|---|---|---|---|"]
    for name, seconds in report["seconds"].items():
        sizes = " | ".join(map(str, _SIZES[name]))
        lines.append(f"| {name} | {sizes} | {seconds['wall']:.3f} s | {seconds['processor']:.3f} s |")
    return "\n".join(lines) + "\n"


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    be_quiet(logger)
    errors: dict[str, list[np.ndarray]] = defaultdict(list)
    seeds = {}
    for seed in args.seeds:
        is_planted = args.dataset == "synthetic"
        records = generate_synthetic(SyntheticConfig(seed=seed)).records if is_planted else load_records(args.dataset)
        of_seed = run(records, args, seed)
        seeds[str(seed)] = scores(of_seed)
        for method, error in of_seed.items():
            errors[method].append(error)
        logger.info("seed %d: %s", seed, seeds[str(seed)])
    report = {
        **{name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()},
        "dataset": Path(args.dataset).name,
        "seeds": seeds,
        "all": scores({method: np.concatenate(parts) for method, parts in errors.items()}),
        "seconds": {name: time_one_user(*sizes, args.num_ratings) for name, sizes in _SIZES.items()},
    }
    args.output_dir.mkdir(parents=True, exist_ok=True)
    write_json(args.output_dir / "fold_in.json", report)
    markdown = as_markdown(report)
    (args.output_dir / "fold_in.md").write_text(markdown, encoding="utf-8")
    print(markdown)


if __name__ == "__main__":
    main(parse_args())
