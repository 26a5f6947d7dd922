"""The weights of a GaVaMoE under the names and in the shapes of a standard architecture, one tensor at a time.

Shapes: H `hidden_size`, P the channels that are added to it, V the vocabulary, I the width of an expert.

The added channels hold one constant, the same at every token and layer: every embedding has it, and no layer writes to
them. They serve two ends that no standard architecture has a place for. The rows of users and items in the output head
read them with a large negative weight, so that these tokens are never generated; and Qwen2-MoE's gate of the shared
expert reads them with a large positive one, so that it is 1. What the constant adds to the mean square inside each
RMSNorm is taken off its epsilon, so that all other numbers stay what they were:

    (|x|^2 + P a^2) / (H + P) + eps' = H / (H + P) * (|x|^2 / H + eps)    with    eps' = (H eps - P a^2) / (H + P)

and the factor H / (H + P) goes into the weights of the norm.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..configuration_gavamoe import GaVaMoEConfig

# Names of an expert's gate, up and down projections
_EXPERT_NAMES = {
    "mixtral": ("block_sparse_moe", ("w1", "w3", "w2")),
    "qwen2_moe": ("mlp", ("gate_proj", "up_proj", "down_proj")),
}
_DENSE_NAMES = ("gate_proj", "up_proj", "down_proj")

# The weight of all added channels together. With r the root mean square of what enters the norm, over H + P channels,
# the logits of users and items lie 2^18 / r below the mean of the others, and the gate of the shared expert is
# sigmoid(2^17 / r), which is 1 to the last bit of float32 up to r = 7,500. A pretrained Llama has tokens with an r near
# 1,000 in its middle layers. Both are small enough for float16.
_HEAD_WEIGHT = 2.0**18
_GATE_WEIGHT = 2.0**17

# Width of the shared expert, all zeros, where Qwen2-MoE is to have one and the model has none
_EMPTY_EXPERT_WIDTH = 64


@dataclass(frozen=True)
class Layout:
    """
    Sizes of the exported decoder.

    Engines take the size of a head as hidden size / heads, so that the hidden size grows by whole heads: those of as
    many key-value heads as it takes to gain at least one channel.

    Args:
        hidden_size (`int`): H + P.
        num_heads (`int`), num_kv_heads (`int`), head_dim (`int`): Of the attention; the added heads are zero.
        added (`int`): P.
        constant (`float`): What the added channels hold, a power of two, so that it is exact in any precision.
        rms_norm_eps (`float`): Epsilon of the norms, less what the constant adds.
        norm_factor (`float`): Factor of the norms' weights.
    """

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    added: int
    constant: float
    rms_norm_eps: float
    norm_factor: float


def plan_layout(config: GaVaMoEConfig, extra_kv_heads: int = 0) -> Layout:
    """
    The layout for a model of this config.

    Args:
        config ([`GaVaMoEConfig`]): The model's.
        extra_kv_heads (`int`, *optional*, defaults to 0): Key-value heads beyond those needed.

    Raises:
        `ValueError`: for a config that no standard architecture can hold.
    """
    if config.attention_bias or config.mlp_bias:
        raise ValueError(
            "Expected a model without biases, which Mixtral and Qwen2-MoE have no place for, but got "
            f"attention_bias={config.attention_bias} and mlp_bias={config.mlp_bias}. Serve it with this package."
        )
    if config.rms_norm_eps <= 0:
        raise ValueError(f"Expected a positive `rms_norm_eps`, which the export needs, but got {config.rms_norm_eps}.")
    if extra_kv_heads < 0:
        raise ValueError(f"Expected `extra_kv_heads` of 0 or more, but got {extra_kv_heads}.")
    hidden = config.hidden_size
    head_dim = config.head_dim or hidden // config.num_attention_heads
    group = config.num_attention_heads // config.num_key_value_heads
    num_kv_heads = max(config.num_key_value_heads, hidden // (head_dim * group) + 1) + extra_kv_heads
    padded = num_kv_heads * group * head_dim
    added = padded - hidden
    # At most half of the epsilon, so that a positive one is left
    constant = 2.0 ** math.floor(math.log2(math.sqrt(hidden * config.rms_norm_eps / 2 / added)))
    return Layout(
        hidden_size=padded,
        num_heads=num_kv_heads * group,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        added=added,
        constant=constant,
        rms_norm_eps=(hidden * config.rms_norm_eps - added * constant**2) / padded,
        norm_factor=math.sqrt(hidden / padded),
    )


def shared_expert_width(config: GaVaMoEConfig) -> int:
    """Width of the shared expert of a Qwen2-MoE."""
    return config.shared_expert_intermediate_size or _EMPTY_EXPERT_WIDTH


def shared_tensors(model: Any, layout: Layout, architecture: str, first_token: int) -> Iterator[tuple[str, Tensor]]:
    """
    Names and tensors that all clusters share: everything but the gates.

    Args:
        model ([`GaVaMoEForCausalLM`]): The model.
        layout (`Layout`): From [`plan_layout`].
        architecture (`str`): `"mixtral"`, `"qwen2_moe"` or `"llama"`.
        first_token (`int`): Id of the first added token: users, their population, items, their population.
    """
    yield "model.embed_tokens.weight", _input_table(model, layout, first_token)
    for index, layer in enumerate(model.model.layers):
        prefix = f"model.layers.{index}."
        yield prefix + "input_layernorm.weight", _norm(layer.input_layernorm, layout)
        yield from _attention(layer.self_attn, prefix + "self_attn.", layout, architecture)
        # Read by the gate of the shared expert, where there is one
        constant = 1 / layout.constant if architecture == "qwen2_moe" else 0.0
        yield prefix + "post_attention_layernorm.weight", _norm(layer.post_attention_layernorm, layout, constant)
        if architecture == "llama":
            mlp = layer.mlp
            projections = (mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight)
            yield from _feed_forward(projections, prefix + "mlp.", _DENSE_NAMES, layout)
        else:
            yield from _experts(layer.mlp, prefix, layout, architecture)
    yield "model.norm.weight", _norm(model.model.norm, layout, 1 / layout.constant)
    yield "lm_head.weight", _output_table(model, layout, first_token)


def gate_tensors(model: Any, layout: Layout, architecture: str, cluster: int) -> dict[str, Tensor]:
    """The gates of one cluster, which are the routers of its checkpoint; none where the layers are dense."""
    if architecture == "llama":
        return {}
    block, _ = _EXPERT_NAMES[architecture]
    return {
        f"model.layers.{index}.{block}.gate.weight": _pad(layer.mlp.gate.weight[cluster], columns=layout.added)
        for index, layer in enumerate(model.model.layers)
    }


def _pad(weight: Tensor, rows: int = 0, columns: int = 0) -> Tensor:
    return F.pad(weight.detach(), (0, columns, 0, rows)).contiguous()


def _norm(norm: nn.Module, layout: Layout, constant: float = 0.0) -> Tensor:
    """Weights of a norm, out of which the added channels come as `constant` times what they hold, normalised."""
    weight = (norm.weight.detach().double() * layout.norm_factor).to(norm.weight.dtype)
    return F.pad(weight, (0, layout.added), value=constant)


def _attention(attention: nn.Module, prefix: str, layout: Layout, architecture: str) -> Iterator[tuple[str, Tensor]]:
    for name, heads in (("q", layout.num_heads), ("k", layout.num_kv_heads), ("v", layout.num_kv_heads)):
        weight = getattr(attention, f"{name}_proj").weight
        rows = heads * layout.head_dim
        yield f"{prefix}{name}_proj.weight", _pad(weight, rows - len(weight), layout.added)
        if architecture == "qwen2_moe":
            yield f"{prefix}{name}_proj.bias", weight.new_zeros(rows)
    weight = attention.o_proj.weight
    yield f"{prefix}o_proj.weight", _pad(weight, layout.added, layout.num_heads * layout.head_dim - weight.shape[1])


def _feed_forward(
    projections: tuple[Tensor, Tensor, Tensor], prefix: str, names: tuple[str, str, str], layout: Layout
) -> Iterator[tuple[str, Tensor]]:
    """Gate and up projections [I, H], down projection [H, I]."""
    gate, up, down = projections
    yield f"{prefix}{names[0]}.weight", _pad(gate, columns=layout.added)
    yield f"{prefix}{names[1]}.weight", _pad(up, columns=layout.added)
    yield f"{prefix}{names[2]}.weight", _pad(down, rows=layout.added)


def _experts(moe: nn.Module, prefix: str, layout: Layout, architecture: str) -> Iterator[tuple[str, Tensor]]:
    block, names = _EXPERT_NAMES[architecture]
    prefix = f"{prefix}{block}."
    shared = None
    if moe.shared_expert is not None:
        shared = tuple(getattr(moe.shared_expert, name).weight for name in _DENSE_NAMES)
    for expert in range(moe.experts.num_experts):
        gate, up = moe.experts.gate_up_proj[expert].chunk(2)
        down = moe.experts.down_proj[expert]
        if architecture == "mixtral" and shared is not None:
            # The weights of a token's experts sum to one, and so do the shares of what each of them holds
            gate, up = torch.cat([gate, shared[0]]), torch.cat([up, shared[1]])
            down = torch.cat([down, shared[2]], dim=1)
        yield from _feed_forward((gate, up, down), f"{prefix}experts.{expert}.", names, layout)
    if architecture == "qwen2_moe":
        if shared is None:
            empty = moe.gate.weight.new_zeros(_EMPTY_EXPERT_WIDTH, moe.gate.weight.shape[-1])
            shared = (empty, empty, empty.T)
        yield from _feed_forward(shared, prefix + "shared_expert.", names, layout)
        # Not zeros and a doubled expert: llama.cpp takes the sigmoid as silu(x) / x
        gate = moe.gate.weight.new_zeros(1, layout.hidden_size)
        gate[:, -layout.added :] = _GATE_WEIGHT / layout.added
        yield prefix + "shared_expert_gate.weight", gate


def _input_table(model: Any, layout: Layout, first_token: int) -> Tensor:
    """Input embeddings [V, H + P], with the projected embeddings of users and items from `first_token` on."""
    embeddings = model.get_input_embeddings().weight.detach()
    rows = torch.cat(list(_pair_rows(model))).to(embeddings.dtype)
    table = embeddings.new_zeros(max(len(embeddings), first_token + len(rows)), layout.hidden_size)
    table[: len(embeddings), : embeddings.shape[1]] = embeddings
    table[first_token : first_token + len(rows), : embeddings.shape[1]] = rows
    table[:, -layout.added :] = layout.constant
    return table


@torch.no_grad()
def _pair_rows(model: Any) -> Iterator[Tensor]:
    """Input embeddings of the users, their population, the items and their population."""
    rating_model, config = model.rating_model, model.config
    for kind in ("user", "item"):
        table = torch.cat(
            [getattr(rating_model, f"{kind}_embeddings").weight, getattr(rating_model, f"population_{kind}")[None]]
        )
        if config.inject_pair_embeddings:
            projection = getattr(model.model, f"{kind}_projection")
            yield projection(table.to(projection.weight.dtype))
        else:
            token = getattr(config, f"{kind}_token_id")
            yield model.get_input_embeddings().weight[token].expand(len(table), -1)


def _output_table(model: Any, layout: Layout, first_token: int) -> Tensor:
    """
    The output head [V, H + P]. The rows that must not win, which are those of users, items and placeholders, are the
    mean of the others, less a constant: whatever the hidden state, their logit is below the mean of the others, and so
    below the largest.
    """
    weight = model.get_output_embeddings().weight.detach()
    hidden, config = weight.shape[1], model.config
    count = config.num_users + config.num_items + 2
    head = weight.new_zeros(max(len(weight), first_token + count), layout.hidden_size)
    head[: len(weight), :hidden] = weight
    barred = torch.ones(len(head), dtype=torch.bool, device=weight.device)
    barred[: len(weight)] = False
    barred[first_token : first_token + count] = True
    for token in (config.user_token_id, config.item_token_id):
        if token is not None:
            barred[token] = True
    head[barred, :hidden] = head[~barred, :hidden].mean(dim=0, dtype=torch.float32).to(head.dtype)
    head[barred, hidden:] = -_HEAD_WEIGHT / layout.added
    return head
