"""
A stage-2 training step beside the step of TRL's SFTTrainer: loss, backward, clipping and AdamW, in turns.

    OMP_NUM_THREADS=1 python benchmarks/training_step.py --rounds 3
    OMP_NUM_THREADS=1 python benchmarks/training_step.py --layers 4 --rows 8 --rounds 3
    OMP_NUM_THREADS=1 python benchmarks/training_step.py --memory

SmolLM2-135M's shape, 32 rows of 60 prompt and 20 explanation tokens, float32, no gradient checkpointing. Two
references: the `compute_loss` of SFTTrainer on the very same GaVaMoE (with experts, and with the dense feed-forward
layers of the plain Llama), whose loss has to be equal at alpha 0; and SFTTrainer on a `LlamaForCausalLM`, which has no
rating model.
"""

import argparse
import itertools
import json
import logging
import tempfile
from typing import Any

import torch
from datasets import Dataset
from stage_one import be_quiet
from timing import as_row, compare
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer

from gavamoe_hf import GaVaMoEConfig, GaVaMoEForCausalLM, GaVaMoEProcessor
from gavamoe_hf.data import SyntheticConfig, generate_synthetic
from gavamoe_hf.training.building import ModelArguments, build_processor
from gavamoe_hf.training.sft_config import GaVaMoESFTConfig
from gavamoe_hf.training.sft_trainer import GaVaMoESFTTrainer

logger = logging.getLogger("training_step")

TARGET, TARGET_ROWS = 0.75, 32
SMOLLM2 = dict(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_attention_heads=9,
    num_key_value_heads=3,
    tie_word_embeddings=True,
)
EXPERTS = {
    "12 experts of 128": dict(num_local_experts=12, num_experts_per_tok=2, moe_intermediate_size=128),
    "dense": dict(num_local_experts=0, router_aux_loss_coef=0.0),
}
PROMPT_TOKENS, EXPLANATION_TOKENS = 60, 20
NUM_USERS, NUM_ITEMS = 1000, 1000
USER, ITEM = 5, 6
# Far from the end of the dense model's loss: the step is timed, nothing is learned
OPTIONS = dict(learning_rate=1e-6, use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none")


def make_examples(rows: int) -> Dataset:
    """Tokenised examples, equally long: no step is faster for having less padding."""
    draw = torch.Generator().manual_seed(0)
    input_ids = torch.randint(10, SMOLLM2["vocab_size"], (rows, PROMPT_TOKENS + EXPLANATION_TOKENS), generator=draw)
    input_ids[:, PROMPT_TOKENS // 2], input_ids[:, PROMPT_TOKENS // 2 + 1] = USER, ITEM
    labels = input_ids.clone()
    labels[:, :PROMPT_TOKENS] = -100
    columns = {
        "user_id": torch.randint(NUM_USERS, (rows,), generator=draw),
        "item_id": torch.randint(NUM_ITEMS, (rows,), generator=draw),
        "rating": torch.randint(1, 6, (rows,), generator=draw).float(),
    }
    texts = {"input_ids": input_ids.tolist(), "labels": labels.tolist()}
    return Dataset.from_dict({**texts, **{name: column.tolist() for name, column in columns.items()}})


class PlainLossTrainer(GaVaMoESFTTrainer):
    """SFTTrainer's loss, whose language-model head is fused and scores every position, on the same model."""

    compute_loss = SFTTrainer.compute_loss


class Step:
    """
    A trainer's step on one batch, outside `train`, so that two of them can take turns.

    Args:
        trainer ([`~trl.SFTTrainer`]): Trainer whose `training_step` is taken.
        optimizer (`torch.optim.Optimizer`, *optional*): Of another step on the same model; the trainer's if not given.
    """

    def __init__(self, trainer: SFTTrainer, optimizer: torch.optim.Optimizer | None = None):
        self.trainer = trainer
        self.optimizer = trainer.create_optimizer() if optimizer is None else optimizer
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = 1
        self.batch = next(iter(trainer.get_train_dataloader()))
        self.num_tokens = (self.batch["labels"] != -100).sum()

    def loss(self) -> float:
        torch.manual_seed(0)
        with torch.no_grad():
            return self.trainer.compute_loss(self.trainer.model, dict(self.batch), False, self.num_tokens).item()

    def __call__(self) -> None:
        trainer = self.trainer
        trainer.training_step(trainer.model, dict(self.batch), self.num_tokens)
        trainer.accelerator.clip_grad_norm_(trainer.model.parameters(), trainer.args.max_grad_norm)
        self.optimizer.step()
        trainer.model.zero_grad()


def measure_step(name: str, reference: str, step: Step, reference_step: Step, rounds: int) -> dict[str, Any]:
    """A row of two steps in turns; the target is for a whole batch."""
    logger.info("%s beside %s ...", name, reference)
    target = TARGET if len(step.batch["labels"]) >= TARGET_ROWS else None
    return as_row(name, reference, compare(step, reference_step, rounds), target)


def make_trainer(
    trainer_class: type, model: GaVaMoEForCausalLM, processor: GaVaMoEProcessor, examples: Dataset, folder: str
) -> GaVaMoESFTTrainer:
    args = GaVaMoESFTConfig(
        output_dir=folder,
        per_device_train_batch_size=len(examples),
        eval_strategy="no",
        save_strategy="no",
        load_best_model_at_end=False,
        **OPTIONS,
    )
    return trainer_class(model, args, examples, processor=processor)


def prepare(experts: str, layers: int, rows: int) -> tuple[GaVaMoEForCausalLM, GaVaMoEProcessor, Dataset]:
    """A model, a processor for its trainers, which tokenises nothing here, and their examples."""
    torch.manual_seed(0)
    records = generate_synthetic(SyntheticConfig(num_users=12, num_items=10, records_per_user=6)).records["train"]
    processor = build_processor(records, ModelArguments(vocab_size=400))
    sizes = dict(num_users=NUM_USERS, num_items=NUM_ITEMS, user_token_id=USER, item_token_id=ITEM)
    model = GaVaMoEForCausalLM(GaVaMoEConfig(num_hidden_layers=layers, **SMOLLM2, **EXPERTS[experts], **sizes))
    return model, processor, make_examples(rows)


def measure_model(experts: str, layers: int, rows: int, rounds: int) -> list[dict[str, Any]]:
    """Rows of one model: beside SFTTrainer's loss on it and, for the dense one, SFTTrainer on a plain Llama."""
    model, processor, examples = prepare(experts, layers, rows)
    name = f"stage-2 step, {experts}, {layers} layers, {rows} rows"
    results = []
    with tempfile.TemporaryDirectory() as folder:
        step = Step(make_trainer(GaVaMoESFTTrainer, model, processor, examples, folder))
        plain = Step(make_trainer(PlainLossTrainer, model, processor, examples, folder), step.optimizer)
        alpha, model.config.alpha = model.config.alpha, 0.0
        losses = step.loss(), plain.loss()
        model.config.alpha = alpha
        assert abs(losses[0] - losses[1]) < 1e-5, f"Expected equal losses, got {losses}."
        results.append(measure_step(name, "SFTTrainer's loss on the same model", step, plain, rounds))
        if experts == "dense":
            llama = LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, **SMOLLM2))
            args = SFTConfig(folder, per_device_train_batch_size=rows, max_length=None, **OPTIONS)
            tokens = examples.select_columns(["input_ids", "labels"])
            trainer = SFTTrainer(llama, args, train_dataset=tokens, processing_class=processor.tokenizer)
            results.append(measure_step(name, "SFTTrainer on a plain Llama", step, Step(trainer), rounds))
    return results


def measure(
    quick: bool = False, layers: int = 30, rows: int = 8, rounds: int = 2, models: tuple[str, ...] = tuple(EXPERTS)
) -> list[dict[str, Any]]:
    """
    Rows with name, reference, ratio, seconds, reference_seconds and target.

    Args:
        quick (`bool`, *optional*, defaults to `False`): A model of 4 layers, whatever else is asked for.
        layers (`int`, *optional*, defaults to 30): Layers.
        rows (`int`, *optional*, defaults to 8): Rows of the batch; a quarter of what the script takes by itself.
        rounds (`int`, *optional*, defaults to 2): Turns that are counted; the ratio is their median.
        models (`tuple[str, ...]`, *optional*): Keys of `EXPERTS`, all if not given.
    """
    if quick:
        layers = 4
    be_quiet(logger)
    return [row for experts in models for row in measure_model(experts, layers, rows, rounds)]


def peak_of(step: Step) -> float:
    """MiB that the tensors of forward and backward take at most, beyond parameters and the batch."""
    step.trainer.model.zero_grad()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step.trainer.training_step(step.trainer.model, dict(step.batch), step.num_tokens)
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(changes)) / 2**20


def counted_peak(layers: int, rows: int) -> float:
    """
    MiB of the dense model's step by hand, where the backward pass begins and has gone through the head.

    Of a token and layer, H the hidden, K the key or value and I the feed-forward size: two norms keep their input,
    what is normalised and the product with the weight (6H), attention its query, key, value and output (2H + 2K), the
    feed-forward layer gate, its activation, up and their product (4I). Then the logits of the explanation tokens, which
    became their gradient, and the gradient of the head.
    """
    hidden, vocabulary = SMOLLM2["hidden_size"], SMOLLM2["vocab_size"]
    key = hidden * SMOLLM2["num_key_value_heads"] // SMOLLM2["num_attention_heads"]
    of_layer = 8 * hidden + 2 * key + 4 * SMOLLM2["intermediate_size"]
    activations = rows * (PROMPT_TOKENS + EXPLANATION_TOKENS) * layers * of_layer
    return 4 * (activations + rows * EXPLANATION_TOKENS * vocabulary + vocabulary * hidden) / 2**20


def measure_memory(layers: int = 4, rows: int = 32) -> list[dict[str, Any]]:
    """Rows of peak memory in MiB, beside SFTTrainer's loss on the same model and, if dense, a count by hand."""
    be_quiet(logger)
    results = []
    for experts in EXPERTS:
        model, processor, examples = prepare(experts, layers, rows)
        with tempfile.TemporaryDirectory() as folder:
            peaks = [
                peak_of(Step(make_trainer(trainer_class, model, processor, examples, folder)))
                for trainer_class in (GaVaMoESFTTrainer, PlainLossTrainer)
            ]
        references = {"SFTTrainer's loss on the same model": peaks[1]}
        if experts == "dense":
            references["count by hand"] = counted_peak(layers, rows)
        results += [
            {
                "name": f"memory of a stage-2 step, {experts}, {layers} layers, {rows} rows",
                "reference": reference,
                "ratio": peaks[0] / mib,
                "mib": peaks[0],
                "reference_mib": mib,
            }
            for reference, mib in references.items()
        ]
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="4 layers.")
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3, help="Turns that are counted.")
    parser.add_argument("--models", nargs="+", choices=list(EXPERTS), default=list(EXPERTS))
    parser.add_argument("--memory", action="store_true", help="Peak memory instead, of 4 layers.")
    args = parser.parse_args()
    if args.memory:
        print(json.dumps(measure_memory(rows=args.rows), indent=2))
        return
    print(json.dumps(measure(args.quick, args.layers, args.rows, args.rounds, tuple(args.models)), indent=2))


if __name__ == "__main__":
    main()
