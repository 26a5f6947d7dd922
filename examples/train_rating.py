"""
Stage 1 alone: trains the rating model, whose clusters choose the gates, and compares it with baselines.

    python examples/train_rating.py --output_dir outputs/rating --use_cpu
    python examples/train_rating.py --dataset reviews.csv --num_clusters 4 --output_dir outputs/rating
"""

import logging
from dataclasses import dataclass, field

from trl import TrlParser

from gavamoe_hf.evaluation import baseline_scores, rating_errors
from gavamoe_hf.training.building import ModelArguments, build_model, build_processor
from gavamoe_hf.training.pipeline import DataArguments, read_data
from gavamoe_hf.training.rating_trainer import RatingDataset, RatingTrainer, RatingTrainingArguments


@dataclass
class ScriptArguments:
    dataset: str = field(
        default="synthetic", metadata={"help": 'File, folder or Hub id, or "synthetic" for the built-in data.'}
    )


def main(args: ScriptArguments, model_args: ModelArguments, training_args: RatingTrainingArguments) -> None:
    records, _ = read_data(DataArguments(dataset=args.dataset))
    processor = build_processor(records["train"], model_args)
    rating_model = build_model(processor, model_args).rating_model
    ratings = {split: RatingDataset.from_records(records[split], processor) for split in records}

    training_args.choose_num_clusters = model_args.chooses_num_clusters
    trainer = RatingTrainer(rating_model, training_args, ratings["train"], ratings["validation"])
    trainer.train()
    rating_model.save_pretrained(training_args.output_dir)
    processor.save_pretrained(training_args.output_dir)

    rating_model.cpu()
    train, test = ratings["train"].columns, ratings["test"].columns
    predicted = rating_model.predict(test["user_id"], test["item_id"]).predicted_rating
    errors = rating_errors(predicted.numpy(), test["rating"].numpy())
    baselines = baseline_scores(records["train"], records["validation"], records["test"])
    print(f"{'test split':18}   RMSE    MAE")
    print(f"{'rating model':18} {errors['rating_rmse']:6.3f} {errors['rating_mae']:6.3f}")
    for name, label in (("mean", "mean rating"), ("bias", "user + item bias")):
        print(f"{label:18} {baselines[f'baseline_{name}_rmse']:6.3f} {baselines[f'baseline_{name}_mae']:6.3f}")
    clusters = rating_model.predict(train["user_id"], train["item_id"]).cluster_posterior.argmax(dim=-1)
    shares = clusters.bincount(minlength=rating_model.config.num_clusters) / len(clusters)
    print("share of the training pairs by cluster: " + ", ".join(f"{share:.1%}" for share in shares))


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = TrlParser((ScriptArguments, ModelArguments, RatingTrainingArguments))
    main(*parser.parse_args_and_config())
