"""
Whether stage 1 finds planted groups of users (adjusted Rand index of the pairs' clusters), and how many there are.

    python benchmarks/clusters.py --output_dir outputs/clusters

Each run generates data, lets stage 1 choose the number of clusters (`--num_clusters auto`) and, where that is not the
planted one, trains once more with the planted one. Leaves `clusters.json` and `clusters.md` in `output_dir`.
"""

import argparse
import logging
import time
from pathlib import Path
from typing import Any

from sklearn.metrics import adjusted_rand_score
from stage_one import be_quiet, train_stage_one
from transformers import set_seed

from gavamoe_hf.data import SyntheticConfig, SyntheticData, generate_synthetic
from gavamoe_hf.evaluation import baseline_scores, rating_errors
from gavamoe_hf.evaluation.predict import predict_pairs, write_json, write_text
from gavamoe_hf.training.building import AUTO, ModelArguments, build_processor, build_rating_model
from gavamoe_hf.training.rating_trainer import RatingDataset

logger = logging.getLogger("clusters")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--groups", type=int, nargs="+", default=[2, 3, 4, 5], help="Planted groups.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="Of data and training.")
    return parser.parse_args()


def run(data: SyntheticData, num_clusters: int | str, seed: int) -> dict[str, Any]:
    """One stage 1 with its defaults: clusters, adjusted Rand index, smallest share, and RMSE on test."""
    set_seed(seed)
    arguments = ModelArguments(num_clusters=num_clusters)
    processor = build_processor(data.records["train"], arguments)
    model = build_rating_model(processor, arguments)
    start = time.perf_counter()
    choose = arguments.chooses_num_clusters
    train_stage_one(model, processor, data.records, seed, choose_num_clusters=choose)
    seconds = time.perf_counter() - start
    train, test = (RatingDataset.from_records(data.records[split], processor).columns for split in ("train", "test"))
    clusters = predict_pairs(model, train["user_id"], train["item_id"]).cluster_posterior.argmax(dim=-1)
    groups = [data.truth.user_group[user] for user in data.records["train"]["user"]]
    predicted = predict_pairs(model, test["user_id"], test["item_id"]).predicted_rating
    return {
        "num_clusters": model.config.num_clusters,
        "ari": float(adjusted_rand_score(groups, clusters.numpy())),
        "min_cluster_share": clusters.bincount(minlength=model.config.num_clusters).min().item() / len(clusters),
        "rmse": rating_errors(predicted.numpy(), test["rating"].numpy())["rating_rmse"],
        "seconds": seconds,
    }


def main() -> None:
    args = parse_args()
    be_quiet(logger)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    rows = []
    for groups in args.groups:
        for seed in args.seeds:
            data = generate_synthetic(SyntheticConfig(seed=seed, num_groups=groups))
            chosen = run(data, AUTO, seed)
            given = chosen if chosen["num_clusters"] == groups else run(data, groups, seed)
            rows.append({"groups": groups, "seed": seed, "chosen": chosen["num_clusters"], **given})
            baselines = baseline_scores(*(data.records[split] for split in ("train", "validation", "test")))
            rows[-1]["bias_rmse"] = baselines["baseline_bias_rmse"]
            logger.info("%s", {name: round(value, 3) for name, value in rows[-1].items()})
            write_json(args.output_dir / "clusters.json", rows)
            write_text(args.output_dir / "clusters.md", table(rows))
    logger.info("\n%s", table(rows))


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| planted groups | runs | number found | ARI, mean | ARI, least | least cluster share | RMSE | bias model |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for groups in sorted({row["groups"] for row in rows}):
        runs = [row for row in rows if row["groups"] == groups]

        def mean(name: str, runs: list[dict[str, Any]] = runs) -> float:
            return sum(row[name] for row in runs) / len(runs)

        found = sum(row["chosen"] == groups for row in runs)
        least = min(row["ari"] for row in runs), min(row["min_cluster_share"] for row in runs)
        lines.append(
            f"| {groups} | {len(runs)} | {found} | {mean('ari'):.3f} | {least[0]:.3f} | {least[1]:.3f} | "
            f"{mean('rmse'):.3f} | {mean('bias_rmse'):.3f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
