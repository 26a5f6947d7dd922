"""Batches for stage 2."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass
class ExplanationCollator:
    """
    Pads tokenised examples on the right and keeps what tells the pair.

    Args:
        pad_token_id (`int`): Token to pad `input_ids` with.
        pad_to_multiple_of (`int`, *optional*): Rounds the padded length up.

    Returns `input_ids`, `attention_mask` and `labels` `(batch_size, sequence_length)`, `user_id`, `item_id` and
    `rating` `(batch_size,)`.
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        length = max(len(example["input_ids"]) for example in examples)
        if self.pad_to_multiple_of:
            length += -length % self.pad_to_multiple_of
        rows: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
        for example in examples:
            ids, labels = example["input_ids"], example["labels"]
            padding = length - len(ids)
            rows["input_ids"].append([*ids, *[self.pad_token_id] * padding])
            rows["attention_mask"].append([1] * len(ids) + [0] * padding)
            rows["labels"].append([*labels, *[-100] * padding])
        batch = {name: torch.tensor(values) for name, values in rows.items()}
        for name in ("user_id", "item_id"):
            batch[name] = torch.tensor([example[name] for example in examples])
        batch["rating"] = torch.tensor([example["rating"] for example in examples], dtype=torch.float32)
        return batch
