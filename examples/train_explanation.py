"""
Stage 2: trains the explanations, from a rating model that `train_rating.py` saved or from one trained here.

    python examples/train_explanation.py --rating_model outputs/rating --output_dir outputs/explanation \
        --learning_rate 3e-3 --num_train_epochs 4 --per_device_train_batch_size 32 --use_cpu

The data set and the sizes of the rating model have to be those of stage 1.
"""

import logging
from dataclasses import dataclass, field

from trl import TrlParser

from gavamoe_hf import GaVaMoEProcessor, GaVaMoERatingModel
from gavamoe_hf.evaluation.predict import predict_records
from gavamoe_hf.training.building import ModelArguments, build_model, build_processor
from gavamoe_hf.training.pipeline import DataArguments, read_data
from gavamoe_hf.training.rating_trainer import RatingDataset, RatingTrainer, RatingTrainingArguments
from gavamoe_hf.training.sft_config import GaVaMoESFTConfig
from gavamoe_hf.training.sft_trainer import GaVaMoESFTTrainer


@dataclass
class ScriptArguments:
    dataset: str = field(
        default="synthetic", metadata={"help": 'File, folder or Hub id, or "synthetic" for the built-in data.'}
    )
    rating_model: str | None = field(
        default=None, metadata={"help": "Folder of `train_rating.py`; stage 1 is run first if not given."}
    )
    num_examples: int = field(default=3, metadata={"help": "Explanations of test records to show at the end."})


def main(args: ScriptArguments, model_args: ModelArguments, training_args: GaVaMoESFTConfig) -> None:
    records, _ = read_data(DataArguments(dataset=args.dataset))
    if args.rating_model is None:
        processor = build_processor(records["train"], model_args)
        model = build_model(processor, model_args)
        ratings = {split: RatingDataset.from_records(records[split], processor) for split in records}
        rating_args = RatingTrainingArguments(f"{training_args.output_dir}/rating", use_cpu=training_args.use_cpu)
        RatingTrainer(model.rating_model, rating_args, ratings["train"], ratings["validation"]).train()
    else:
        processor = GaVaMoEProcessor.from_pretrained(args.rating_model)
        model = build_model(processor, model_args)
        model.rating_model.load_state_dict(GaVaMoERatingModel.from_pretrained(args.rating_model).state_dict())
    # For `recommend`, which leaves out what a user has
    train = RatingDataset.from_records(records["train"], processor).columns
    model.set_interactions(train["user_id"], train["item_id"])

    trainer = GaVaMoESFTTrainer(
        model,
        training_args,
        train_dataset=records["train"],
        eval_dataset=records["validation"],
        processor=processor,
    )
    trainer.train()
    # Model, code and processor: a checkpoint for `explain.py`
    trainer.save_model()

    print(f"validation negative log-likelihood of a token: {trainer.evaluate()['eval_nll']:.3f} nats")
    chosen = records["test"].select(range(min(args.num_examples, len(records["test"]))))
    for row in predict_records(model, processor, chosen):
        print(
            f"\n{row['user']}, {row['item']}, rated {row['rating']:g}, about {', '.join(row['feature']) or 'nothing'}"
        )
        print(f"  predicted  {row['prediction']}")
        print(f"  reference  {row['reference']}")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = TrlParser((ScriptArguments, ModelArguments, GaVaMoESFTConfig))
    main(*parser.parse_args_and_config())
