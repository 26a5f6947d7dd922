"""AdamW parameter groups with learning rates of their own, which both trainers use."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import torch
from transformers import Trainer


def grouped_optimizer(
    trainer: Trainer, model: torch.nn.Module, lr_scale: Callable[[str], float]
) -> torch.optim.Optimizer:
    """
    The trainer's own optimizer class, or the one that it was given, with its weight decay, and the learning rate scaled
    by parameter.

    Args:
        trainer ([`~transformers.Trainer`]): Says class, options, learning rate, and which parameters decay.
        model (`torch.nn.Module`): Model whose trainable parameters are optimised.
        lr_scale (`Callable[[str], float]`): Factor of the learning rate for a parameter's name.
    """
    decayed = set(trainer.get_decay_parameter_names(model))
    groups: dict[tuple[float, bool], list[torch.nn.Parameter]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[lr_scale(name), name in decayed].append(parameter)
    optimizer_class, options = trainer.optimizer_cls_and_kwargs or trainer.get_optimizer_cls_and_kwargs(
        trainer.args, model
    )
    learning_rate = options.get("lr", trainer.args.learning_rate)
    return optimizer_class(
        [
            {
                "params": parameters,
                "lr": learning_rate * scale,
                "weight_decay": trainer.args.weight_decay if is_decayed else 0.0,
            }
            for (scale, is_decayed), parameters in groups.items()
        ],
        **options,
    )
