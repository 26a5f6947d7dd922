"""
The rating model as stage 1 leaves it with its defaults, against the mean, the bias model and matrix factorisation.

    python benchmarks/rating_accuracy.py --dataset musical_instruments --output_dir outputs/rating_accuracy

One stage 1 for each seed, RMSE and MAE on the split that `--split` names: `validation` for choosing options, `test` for
reporting. Leaves `rating_accuracy.json` and `rating_accuracy.md` in `output_dir`.
"""

import argparse
import logging
import statistics
from pathlib import Path

from datasets import DatasetDict
from stage_one import be_quiet, train_stage_one
from transformers import set_seed

from gavamoe_hf.data import load_records
from gavamoe_hf.evaluation import baseline_scores, rating_errors
from gavamoe_hf.evaluation.predict import predict_pairs, write_json, write_text
from gavamoe_hf.training.building import ModelArguments, build_processor, build_rating_model
from gavamoe_hf.training.rating_trainer import RatingDataset

logger = logging.getLogger("rating_accuracy")

BASELINES = {"mean": "mean rating", "bias": "user + item bias", "mf": "matrix factorisation"}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True, help="File, folder or Hub id.")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="One stage 1 each.")
    parser.add_argument("--split", choices=["validation", "test"], default="test")
    return parser.parse_args()


def errors_of_run(records: DatasetDict, seed: int, split: str) -> dict[str, float]:
    """One stage 1 with its defaults, and its errors on the split."""
    set_seed(seed)
    arguments = ModelArguments()
    processor = build_processor(records["train"], arguments)
    model = build_rating_model(processor, arguments)
    train_stage_one(model, processor, records, seed)
    columns = RatingDataset.from_records(records[split], processor).columns
    predicted = predict_pairs(model, columns["user_id"], columns["item_id"]).predicted_rating
    return rating_errors(predicted.numpy(), columns["rating"].numpy())


def main() -> None:
    args = parse_args()
    be_quiet(logger)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    records = load_records(args.dataset)
    runs = []
    for seed in args.seeds:
        runs.append(errors_of_run(records, seed, args.split))
        logger.info("seed %d: RMSE %.4f, MAE %.4f", seed, runs[-1]["rating_rmse"], runs[-1]["rating_mae"])
    baselines = baseline_scores(records["train"], records["validation"], records[args.split])
    lines = [f"| {args.split} | RMSE | MAE |", "|---|---|---|"]
    for name, label in BASELINES.items():
        lines.append(
            f"| {label} | {baselines[f'baseline_{name}_rmse']:.4f} | {baselines[f'baseline_{name}_mae']:.4f} |"
        )
    cells = []
    for name in ("rating_rmse", "rating_mae"):
        values = [run[name] for run in runs]
        cells.append(f"{statistics.mean(values):.4f} ({min(values):.4f} to {max(values):.4f})")
    lines.append(f"| rating model, mean of {len(runs)} seeds (least to most) | {' | '.join(cells)} |")
    table = "\n".join(lines) + "\n"
    write_json(args.output_dir / "rating_accuracy.json", {"runs": runs, "baselines": baselines})
    write_text(args.output_dir / "rating_accuracy.md", table)
    logger.info("\n%s", table)


if __name__ == "__main__":
    main()
