"""Configurations of GaVaMoE on published base models."""

from __future__ import annotations

import copy
from typing import Any

import torch

from .configuration_gavamoe import GaVaMoEConfig

_LLAMA_3_1_8B_VOCAB = 128256
_LLAMA_3_1_8B = {
    # The two placeholder tokens come after the base's own
    "vocab_size": _LLAMA_3_1_8B_VOCAB + 2,
    "user_token_id": _LLAMA_3_1_8B_VOCAB,
    "item_token_id": _LLAMA_3_1_8B_VOCAB + 1,
    "bos_token_id": 128000,
    # Of Llama-3.1-8B-Instruct: end of text, of message, of turn
    "eos_token_id": [128001, 128008, 128009],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131072,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "tie_word_embeddings": False,
    "dtype": torch.bfloat16,
}


def llama_3_1_8b_paper(num_users: int, num_items: int, num_clusters: int = 3, **overrides: Any) -> GaVaMoEConfig:
    """
    The paper's model (section 4.1): Llama-3.1-8B whose feed-forward layers, 14336 wide, give way to 12 experts of width
    1280, two of them active. What the paper does not report is left at its default.

    Args:
        num_users (`int`): Number of known users.
        num_items (`int`): Number of known items.
        num_clusters (`int`, *optional*, defaults to 3): Clusters and gates K.
        overrides: other fields of [`GaVaMoEConfig`].

    Returns:
        [`GaVaMoEConfig`]
    """
    fields = {
        "num_local_experts": 12,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 1280,
        "norm_topk_prob": False,
        "router_aux_loss_coef": 0.0,
        "vae_embedding_size": 768,
        "vae_num_layers": 2,
        "latent_size": 128,
        "vae_id_dropout": 0.0,
        "rating_likelihood": "bernoulli",
        "alpha": 0.1,
        "beta": 0.1,
    }
    return _config(num_users, num_items, num_clusters, {**fields, **overrides})


def llama_3_1_8b(num_users: int, num_items: int, num_clusters: int = 3, **overrides: Any) -> GaVaMoEConfig:
    """
    What [`~GaVaMoEForCausalLM.from_llama`] makes of Llama-3.1-8B with its defaults and `moe_intermediate_size=256`: the
    feed-forward layers stay as shared experts, beside 12 smaller ones; ratings are categorical.

    Args:
        num_users (`int`): Number of known users.
        num_items (`int`): Number of known items.
        num_clusters (`int`, *optional*, defaults to 3): Clusters and gates K.
        overrides: other fields of [`GaVaMoEConfig`].

    Returns:
        [`GaVaMoEConfig`]
    """
    fields = {"shared_expert_intermediate_size": 14336, "moe_intermediate_size": 256}
    return _config(num_users, num_items, num_clusters, {**fields, **overrides})


def _config(num_users: int, num_items: int, num_clusters: int, fields: dict[str, Any]) -> GaVaMoEConfig:
    sizes = {"num_users": num_users, "num_items": num_items, "num_clusters": num_clusters}
    # A copy: configs keep the dicts and lists that they are given
    return GaVaMoEConfig(**copy.deepcopy({**_LLAMA_3_1_8B, **sizes, **fields}))


__all__ = ["llama_3_1_8b", "llama_3_1_8b_paper"]
