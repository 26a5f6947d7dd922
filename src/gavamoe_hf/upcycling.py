"""A dense Llama becomes a GaVaMoE."""

from __future__ import annotations

import copy
import logging
from typing import Any, Literal

import torch
from transformers import LlamaForCausalLM

from .configuration_gavamoe import GaVaMoEConfig
from .modeling_gavamoe import GaVaMoEForCausalLM

logger = logging.getLogger(__name__)

EXPERT_INITS = ("residual", "random")


@torch.no_grad()
def upcycle_llama(
    base: LlamaForCausalLM,
    vocab_size: int,
    expert_init: Literal["residual", "random"] = "residual",
    **config_kwargs: Any,
) -> GaVaMoEForCausalLM:
    """
    Turns a pretrained Llama into a GaVaMoE.

    Args:
        base ([`~transformers.LlamaForCausalLM`]): The dense model.
        vocab_size (`int`): Length of its tokenizer with the two placeholder tokens; the embeddings grow to it where
            they are smaller.
        expert_init (`str`, *optional*, defaults to `"residual"`):
            `"residual"`: the dense feed-forward layer stays as a shared expert and the routed experts, whose down
            projection starts at zero, are added to it, so that the model equals its base on the first step.
            `"random"`: new experts in its place (the released practice), whose knowledge is lost.
        config_kwargs: fields of [`GaVaMoEConfig`] that the base does not have (`num_users`, `num_clusters`, ...).

    Returns:
        [`GaVaMoEForCausalLM`] in the base's dtype, the rating model in float32.

    Raises:
        `ValueError`: for a base that is not a Llama, or an unknown `expert_init`.
    """
    if base.config.model_type != "llama":
        raise ValueError(
            f'Expected a Llama (model_type "llama") as the base model, but got model_type "{base.config.model_type}".'
        )
    if expert_init not in EXPERT_INITS:
        raise ValueError(f"Expected `expert_init` among {list(EXPERT_INITS)}, but got {expert_init!r}.")
    inherited = base.config.to_dict()
    for name in ("model_type", "architectures", "transformers_version", "quantization_config", "auto_map"):
        inherited.pop(name, None)
    inherited["vocab_size"] = max(vocab_size, base.config.vocab_size)
    if expert_init == "residual" and config_kwargs.get("num_local_experts") != 0:
        inherited["shared_expert_intermediate_size"] = base.config.intermediate_size
    config = GaVaMoEConfig(**{**inherited, **config_kwargs})
    model = GaVaMoEForCausalLM(config).to(base.dtype)
    model.rating_model.float()
    _copy_weights(base, model, expert_init)
    model.generation_config = copy.deepcopy(base.generation_config)
    new = sum(parameter.numel() for parameter in model.parameters())
    old = sum(parameter.numel() for parameter in base.parameters())
    logger.info("Upcycled %s: %.1f M parameters, %.1f M of them new", expert_init, new / 1e6, (new - old) / 1e6)
    return model


def _copy_weights(base: LlamaForCausalLM, model: GaVaMoEForCausalLM, expert_init: str) -> None:
    is_dense = model.config.num_local_experts == 0
    target = dict(model.named_parameters())
    for name, parameter in base.named_parameters():
        if ".mlp." in name and not is_dense:
            if expert_init == "random":
                continue
            name = name.replace(".mlp.", ".mlp.shared_expert.")
        if parameter.shape[0] < target[name].shape[0]:
            # New vocabulary rows start at the mean of the known ones
            known = len(parameter)
            target[name][:known].copy_(parameter)
            target[name][known:].copy_(parameter.float().mean(dim=0))
        else:
            target[name].copy_(parameter)
    if expert_init == "residual" and not is_dense:
        for layer in model.model.layers:
            layer.mlp.experts.down_proj.zero_()
