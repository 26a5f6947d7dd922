"""What a run would do, before anything is trained: parameters, memory, and what the model is shown."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..configuration_gavamoe import GaVaMoEConfig
from ..processing_gavamoe import GaVaMoEProcessor
from ..upcycling_gavamoe import count_parameters
from .building import ModelArguments, build_config, build_processor
from .lora import LoraArguments, check_widths, lora_config, untrained_model
from .pipeline import DataArguments, check_output_dir, is_resumed, read_data, torch_dtype_of
from .sft_config import GaVaMoESFTConfig
from .sft_trainer import tokenize_records

# Training records whose lengths are looked at
_SAMPLE = 2000
# Scales of 4-bit blocks: 32 bits for 64 weights
_BYTES_OF_4_BIT = 0.5 + 4 / 64


def describe_run(
    data_args: DataArguments,
    model_args: ModelArguments,
    rating_args: Any,
    sft_args: GaVaMoESFTConfig,
    lora_args: LoraArguments,
) -> str:
    """
    Checks data and options, prompts on a sample, and describes the run; no weights are read or trained.

    Returns:
        `str`: the parameters; an estimate of the memory of a step of stage 2, for each kind of tensor; lengths of the
        examples; and the first batch in the order of the records, what is scored apart from what is not.

    Raises:
        `ValueError`: for data or options that do not work; `FileExistsError`: if `output_dir` holds another run.
    """
    check_output_dir(Path(sft_args.output_dir), is_resumed(sft_args), data_args.overwrite_output_dir)
    train = read_data(data_args)[0]["train"]
    processor = build_processor(train, model_args, data_args.rating_levels)
    config = build_config(processor, model_args, data_args.rating_levels)
    peft_config = lora_config(lora_args, sft_args, config)
    model = untrained_model(config, torch_dtype_of(model_args, lora_args), sft_args, peft_config)
    if lora_args.load_in_4bit:
        check_widths(model)
    sample = tokenize_records(train.select(range(min(_SAMPLE, len(train)))), processor, sft_args.max_length)
    batch = sample.select(range(min(sft_args.per_device_train_batch_size, len(sample))))
    lengths = [len(ids) for ids in sample["input_ids"]]
    scored = [sum(label != -100 for label in labels) for labels in sample["labels"]]
    memory = memory_estimate(model, config, sft_args, max(lengths), max(scored), lora_args.load_in_4bit)
    counts = count_parameters(model)
    lines = [
        "Parameters",
        f"  total      {counts['total']:>16,}",
        f"  active     {counts['active']:>16,}  for one token",
        f"  trainable  {counts['trainable']:>16,}",
        "",
        f"Memory of a step on one device, estimated, {len(batch)} rows of {max(lengths)} tokens",
        *(f"  {name:12}{size / 2**30:>12.2f} GiB" for name, size in memory.items()),
        f"  {'total':12}{sum(memory.values()) / 2**30:>12.2f} GiB",
        "",
        *_time_lines(counts["active"], config, lengths, scored, len(train), sft_args),
        "",
        f"Tokens of the first {len(sample):,} records, mean and most (cut at {sft_args.max_length})",
        f"  prompt and explanation  {sum(lengths) / len(lengths):.1f}  {max(lengths)}",
        f"  explanation, scored     {sum(scored) / len(scored):.1f}  {max(scored)}",
        "",
        "First batch in the order of the records: what is read, and [what is scored]",
        *_decoded(batch, processor),
    ]
    return "\n".join(lines)


def memory_estimate(
    model: nn.Module,
    config: GaVaMoEConfig,
    args: GaVaMoESFTConfig,
    num_tokens: int,
    num_scored: int,
    is_4_bit: bool = False,
) -> dict[str, float]:
    """
    Bytes that a training step of stage 2 needs on one device, by AdamW, without what the libraries need themselves.

    Args:
        model (`nn.Module`): The model, with its adapters; it may be on the meta device.
        config ([`GaVaMoEConfig`]): Its config.
        args ([`GaVaMoESFTConfig`]): Batch size, precision, activation checkpointing.
        num_tokens (`int`): Tokens of a row, prompt and explanation.
        num_scored (`int`): Those that are scored.
        is_4_bit (`bool`, *optional*, defaults to `False`): Whether frozen linear layers are in 4 bits.

    Returns:
        `dict[str, float]`: `weights` (with autocast's copies), `gradients`, `optimizer` (two moments), `activations`
        kept for the backward pass, and `logits` (over which their gradient is written).
    """
    weights = gradients = 0.0
    quantised = _linear_weights(model) if is_4_bit else set()
    for name, parameter in model.named_parameters():
        is_quantised = name in quantised and not parameter.requires_grad
        weights += parameter.numel() * (_BYTES_OF_4_BIT if is_quantised else parameter.element_size())
        if (args.bf16 or args.fp16) and parameter.dtype == torch.float32 and ".rating_model." not in name:
            weights += parameter.numel() * 2  # autocast's copy
        if parameter.requires_grad:
            gradients += parameter.numel() * parameter.element_size()
    size = 2 if args.bf16 or args.fp16 or config.dtype in (torch.bfloat16, torch.float16) else 4
    rows = args.per_device_train_batch_size
    hidden, key_value = config.hidden_size, config.num_key_value_heads * config.head_dim
    # Of each token: inputs of the two norms (in 32 bits, before and after) and of the projections; queries, keys and
    # values before and after rotation; what attention gives
    attention = hidden * (4 * 4 + 3 * size) + 2 * (hidden + key_value) * size + key_value * size
    # Of each width: gate, its activation, up, and their product
    if config.num_local_experts == 0:
        feed_forward = 4 * config.intermediate_size * size
    else:
        chosen = config.num_experts_per_tok * config.moe_intermediate_size
        # On a CPU gate and up alone are kept of an expert; elsewhere its inputs and outputs are gathered, too
        routed = 2 * chosen if args.device.type == "cpu" else 4 * chosen + 3 * config.num_experts_per_tok * hidden
        feed_forward = (routed + 4 * config.shared_expert_intermediate_size) * size
    layer = rows * num_tokens * (attention + feed_forward)
    kept = config.num_hidden_layers * layer
    if args.gradient_checkpointing:
        kept = config.num_hidden_layers * rows * num_tokens * hidden * size + layer
    return {
        "weights": weights,
        "gradients": gradients,
        "optimizer": 2 * gradients,
        "activations": kept,
        "logits": rows * num_scored * config.vocab_size * size,
    }


def _time_lines(
    active: int,
    config: GaVaMoEConfig,
    lengths: list[int],
    scored: list[int],
    num_records: int,
    args: GaVaMoESFTConfig,
) -> list[str]:
    """How long the products of stage 2 would take at the rate of one large product on this device."""
    head = config.vocab_size * config.hidden_size
    # Tables are looked up, and the head is for scored tokens alone; forward and backward, two operations a weight
    body = sum(lengths) / len(lengths) * (active - head * (1 if config.tie_word_embeddings else 2))
    operations = 6 * (max(body, 0) + sum(scored) / len(scored) * head)
    records = args.max_steps * args.train_batch_size if args.max_steps > 0 else num_records * args.num_train_epochs
    rate = _product_rate(args.device, torch.bfloat16 if args.bf16 else torch.float32)
    seconds = operations * records / rate
    return [
        "Time of stage 2 on one device, estimated: what its matrix products take at the rate of a large one here",
        f"  {'at least':12}{seconds / 60:>12.1f} min for {records:,.0f} records; a model of a few million parameters "
        "takes several times as long",
    ]


def _product_rate(device: torch.device, dtype: torch.dtype, size: int = 1024) -> float:
    """Operations a second in a square matrix product, the best of a few."""
    left = torch.randn(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        product = left @ left
        product[0, 0].item()  # which waits for it
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def _linear_weights(model: nn.Module) -> set[str]:
    """Names of what bitsandbytes quantises: linear layers but for the head, the rating model and those trained."""
    kept = ("rating_model", "user_projection", "item_projection", "lm_head", "lora_", "original_module")
    return {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not any(part in name for part in kept)
    }


def _decoded(batch: Any, processor: GaVaMoEProcessor) -> Iterator[str]:
    for row in batch:
        start = next(index for index, label in enumerate(row["labels"]) if label != -100)
        read, scored = row["input_ids"][:start], [label for label in row["labels"] if label != -100]
        user, item = processor.users[row["user_id"]], processor.items[row["item_id"]]
        yield f"  user {user}, item {item}, rating {row['rating']:g}"
        yield f"    {processor.tokenizer.decode(read)!r}"
        yield f"    [{processor.tokenizer.decode(scored)!r}]"
