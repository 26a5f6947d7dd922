"""
Explains all records of a file with `datasets.map` and writes them with their explanations: `gavamoe_hf` need not be
installed.

    python examples/batch_explain.py --model outputs/quickstart --pairs pairs.jsonl --output explained.jsonl

The lines have `user` and `item`, and may have `rating` and `features`, which the prompt then states; other columns are
kept.
"""

from dataclasses import dataclass, field
from uuid import uuid4

import torch
from datasets import Dataset, load_dataset
from transformers import AutoModel, AutoProcessor
from trl import TrlParser


@dataclass
class ScriptArguments:
    model: str = field(metadata={"help": "Folder or Hub id of a checkpoint, whose code is run."})
    pairs: str = field(metadata={"help": "JSON lines with user, item and optionally rating and features."})
    output: str = field(metadata={"help": "The same lines, with explanation, predicted rating and cluster."})
    batch_size: int = field(default=64, metadata={"help": "Pairs explained at once."})
    max_new_tokens: int = field(default=40, metadata={"help": "Most tokens of an explanation."})


def explain_batch(batch: dict[str, list], model, processor, **generate_kwargs) -> dict[str, list]:
    """The columns that `map(..., batched=True)` adds: explanation, predicted rating and cluster of each pair."""
    explained = model.explain(
        processor,
        user=batch["user"],
        item=batch["item"],
        rating=batch.get("rating"),
        features=batch.get("features"),
        **generate_kwargs,
    )
    names = ("explanation", "predicted_rating", "cluster")
    return {name: [getattr(explanation, name) for explanation in explained] for name in names}


def main(args: ScriptArguments) -> Dataset:
    model = AutoModel.from_pretrained(args.model, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(args.model, trust_remote_code=True)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    pairs = load_dataset("json", data_files=args.pairs, split="train")
    explained = pairs.map(
        explain_batch,
        batched=True,
        batch_size=args.batch_size,
        fn_kwargs={"model": model, "processor": processor, "do_sample": False, "max_new_tokens": args.max_new_tokens},
        # Given, as the whole model would be hashed for it
        new_fingerprint=uuid4().hex,
        desc="Explaining",
    )
    explained.to_json(args.output, force_ascii=False)
    return explained


if __name__ == "__main__":
    (script_args,) = TrlParser(ScriptArguments).parse_args_and_config()
    main(script_args)
