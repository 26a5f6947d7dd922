# Copyright 2026 The gavamoe-hf authors. Licensed under the Apache License, Version 2.0.
"""GaVaMoE configuration."""

import itertools
import math
import os
import stat
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig

# Raised when the layout of a saved checkpoint changes in a way that an older package cannot read.
FORMAT_VERSION = 1

# More than any model has: layers are built one by one, and a config with a billion of them would fill the memory
MAX_LAYERS = 1000
# Likewise of a rating scale: half points from 0 to 500
MAX_RATING_LEVELS = 1001

# The index that stands for "a user (or item) that the model does not know": the population embedding.
POPULATION_ID = -1


@strict
class GaVaMoEConfig(LlamaConfig):
    r"""
    Configuration of [`GaVaMoEForCausalLM`]: a Llama whose feed-forward layers are multi-gate mixtures of experts,
    together with the VAE-GMM rating model that chooses the gate (arXiv 2410.11841).

    All arguments of [`~transformers.LlamaConfig`] keep their meaning and default. `intermediate_size` is the width of
    the dense feed-forward layer of the base Llama; it is used where `num_local_experts=0`. "Paper" below is the value
    that arXiv 2410.11841 reports, where it reports one.

    Args:
        num_users (`int`, *optional*, defaults to 1):
            Number of known users, rows of the user table. Paper: 9,765 / 7,506 / 27,147.
        num_items (`int`, *optional*, defaults to 1):
            Number of known items, rows of the item table. Paper: 6,280 / 7,360 / 20,266.
        num_added_users (`int`, *optional*, defaults to 0):
            How many of them, at the end of the table, were folded in after training (`add_users`).
        num_added_items (`int`, *optional*, defaults to 0): Likewise for items (`add_items`).
        num_interactions (`int`, *optional*, defaults to 0):
            Number of (user, item) pairs that the checkpoint holds and `recommend` leaves out. Training sets it, by
            `set_interactions`.
        vae_embedding_size (`int`, *optional*, defaults to 768):
            Size of the user and item embeddings and width of the pair encoder. Paper: 768.
        vae_num_layers (`int`, *optional*, defaults to 2):
            Transformer layers of the pair encoder. Paper: 2.
        vae_num_heads (`int`, *optional*, defaults to 8):
            Attention heads of the pair encoder; divides `vae_embedding_size`. Paper: not reported.
        vae_intermediate_size (`int`, *optional*, defaults to 1536):
            Feed-forward width of the pair encoder. Paper: not reported.
        vae_decoder_hidden_size (`int`, *optional*, defaults to 256):
            Hidden width of the two-layer rating decoder (eq. 3). Paper: not reported.
        vae_dropout (`float`, *optional*, defaults to 0.2):
            Dropout probability inside the rating model while it trains. Paper: not reported.
        vae_id_dropout (`float`, *optional*, defaults to 0.2):
            Probability with which, while it trains, a user (and, independently, an item) is replaced by the
            population embedding, which is how the population learns to stand for ids never seen. Paper: not used.
        latent_size (`int`, *optional*, defaults to 128):
            Size D of the latent variable z. Paper: 128.
        num_clusters (`int`, *optional*, defaults to 3):
            Mixture components K, which is also the number of gates of every layer. Paper: 3 (2 to 5 compared).
        rating_likelihood (`str`, *optional*, defaults to `"categorical"`):
            `"categorical"` over the levels (the predicted rating is the expectation), or `"bernoulli"` on the rating
            scaled to [0, 1]. Paper: Bernoulli (eq. 7).
        rating_levels (`list[float]`, *optional*, defaults to `[1, 2, 3, 4, 5]`):
            The values a rating can take, ascending.
        positive_rating_threshold (`float`, *optional*):
            Ratings from here on read as a positive experience in the prompt. Defaults to the middle of the scale, 3
            for 1 to 5. Paper: 3.
        alpha (`float`, *optional*, defaults to 0.1):
            Weight of the negative ELBO in the loss of stage 2, `alpha * elbo + (1 - alpha) * nll` (eq. 13). Paper:
            not reported.
        beta (`float`, *optional*, defaults to 0.01):
            Weight of the KL term in the negative ELBO (eq. 12). Paper: 0.1, under which a latent of sparse ratings
            costs more than it tells about them, and ends up telling nothing.
        num_local_experts (`int`, *optional*, defaults to 12):
            Experts of each layer, shared by all gates; also readable as `num_experts`. 0 keeps Llama's dense
            feed-forward layer and has no gates. Paper: 12.
        num_experts_per_tok (`int`, *optional*, defaults to 2):
            Experts that each token uses. Paper: 2.
        moe_intermediate_size (`int`, *optional*, defaults to 1280):
            Width of one expert. Paper: 1280 beside a dense width of 14336.
        shared_expert_intermediate_size (`int`, *optional*, defaults to 0):
            Width of a dense expert that every token uses besides the routed ones; 0 for none. Paper: none.
        norm_topk_prob (`bool`, *optional*, defaults to `True`):
            Whether the weights of the chosen experts are rescaled to sum to one. Paper: not rescaled (eq. 10).
        router_aux_loss_coef (`float`, *optional*, defaults to 0.001):
            Weight of the load-balancing loss (arXiv 2101.03961) in training. Paper: not used.
        output_router_logits (`bool`, *optional*, defaults to `False`):
            Whether the router logits and the load-balancing loss are returned.
        inject_pair_embeddings (`bool`, *optional*, defaults to `True`):
            Whether the embeddings at the placeholder tokens are replaced by the projected user and item embeddings
            (section 3.3). `False` together with `num_local_experts=0` is the plain Llama of the ablation study.
        user_token_id (`int`, *optional*):
            Token that stands for the user in a prompt.
        item_token_id (`int`, *optional*):
            Token that stands for the item in a prompt.
        stored_prompts (`dict[str, list[int]]`, *optional*):
            Token ids of the prompts that `generate(user_id=..., item_id=...)` uses when it is given no `input_ids`,
            under `"positive"` and `"negative"`. Training fills it in.
        format_version (`int`, *optional*, defaults to 1):
            Layout of the checkpoint, checked at loading.

    Raises:
        `ValueError`: for values that cannot work, saying which would.

    Example:

    ```python
    >>> from gavamoe_hf import GaVaMoEConfig, GaVaMoEForCausalLM

    >>> config = GaVaMoEConfig(
    ...     vocab_size=512, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_users=10, num_items=20,
    ...     vae_embedding_size=32, latent_size=16, moe_intermediate_size=32, user_token_id=510, item_token_id=511,
    ... )
    >>> model = GaVaMoEForCausalLM(config)
    ```"""

    model_type = "gavamoe"
    # TRL, PEFT and transformers read either name.
    attribute_map = {"num_experts": "num_local_experts"}
    base_model_tp_plan = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.experts.gate_up_proj": "packed_colwise",
        "layers.*.mlp.experts.down_proj": "rowwise",
        "layers.*.mlp.experts": "moe_tp_experts",
        "layers.*.mlp.shared_expert.gate_proj": "colwise",
        "layers.*.mlp.shared_expert.up_proj": "colwise",
        "layers.*.mlp.shared_expert.down_proj": "rowwise",
        # Dense layers, where there are no experts
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }
    base_model_ep_plan = {
        "layers.*.mlp.experts.gate_up_proj": "grouped_gemm",
        "layers.*.mlp.experts.down_proj": "grouped_gemm",
        "layers.*.mlp.experts": "ep_dispatch_experts",
    }

    num_users: int = 1
    num_items: int = 1
    num_added_users: int = 0
    num_added_items: int = 0
    num_interactions: int = 0
    vae_embedding_size: int = 768
    vae_num_layers: int = 2
    vae_num_heads: int = 8
    vae_intermediate_size: int = 1536
    vae_decoder_hidden_size: int = 256
    vae_dropout: float | int = 0.2
    vae_id_dropout: float | int = 0.2
    latent_size: int = 128
    num_clusters: int = 3
    rating_likelihood: str = "categorical"
    rating_levels: list[float | int] | tuple[float | int, ...] = (1.0, 2.0, 3.0, 4.0, 5.0)
    positive_rating_threshold: float | int | None = None
    alpha: float | int = 0.1
    beta: float | int = 0.01
    num_local_experts: int = 12
    num_experts_per_tok: int = 2
    moe_intermediate_size: int = 1280
    shared_expert_intermediate_size: int = 0
    norm_topk_prob: bool = True
    router_aux_loss_coef: float | int = 0.001
    output_router_logits: bool = False
    inject_pair_embeddings: bool = True
    user_token_id: int | None = None
    item_token_id: int | None = None
    stored_prompts: dict[str, Any] | None = None
    format_version: int = FORMAT_VERSION
    # Every layer is a mixture: constant, read by TRL's FLOPs count.
    decoder_sparse_step: int = 1

    def __post_init__(self, **kwargs):
        # As a field of its own, which `@strict` checks the type of; the alias alone is set unchecked
        if "num_experts" in kwargs:
            self.num_local_experts = kwargs.pop("num_experts")
        if not __name__.startswith("transformers_modules."):
            # Beside the package transformers knows the task: it would ask for `trust_remote_code` to run a second copy
            kwargs.pop("custom_pipelines", None)
        self.rating_levels = [float(level) for level in self.rating_levels]
        if self.positive_rating_threshold is None and len(self.rating_levels) > 0:
            self.positive_rating_threshold = (self.rating_levels[0] + self.rating_levels[-1]) / 2
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        # Before the fields are looked at: one of a newer format may be of another type
        _require_format(config_dict.get("format_version"))
        return super().from_dict(config_dict, **kwargs)

    def validate_architecture(self) -> None:
        """Refuses combinations of values that cannot work; called by `@strict` after construction."""
        super().validate_architecture()
        _require_format(self.format_version)
        self._validate_rating_model()
        self._validate_experts()
        self._validate_prompt()

    def _validate_rating_model(self) -> None:
        for name in (
            "num_users",
            "num_items",
            "num_clusters",
            "latent_size",
            "vae_embedding_size",
            "vae_num_layers",
            "vae_intermediate_size",
            "vae_decoder_hidden_size",
        ):
            _require(getattr(self, name) >= 1, f"`{name}` must be at least 1, got {getattr(self, name)}.")
        _require(self.num_interactions >= 0, f"`num_interactions` must not be negative, got {self.num_interactions}.")
        for name in ("num_hidden_layers", "vae_num_layers"):
            _require(getattr(self, name) <= MAX_LAYERS, f"`{name}` must be at most {MAX_LAYERS}, got more.")
        _require(
            self.vae_num_heads >= 1 and self.vae_embedding_size % self.vae_num_heads == 0,
            f"`vae_num_heads` must divide `vae_embedding_size` ({self.vae_embedding_size}), got {self.vae_num_heads}.",
        )
        for name in ("vae_dropout", "vae_id_dropout"):
            _require(0 <= getattr(self, name) < 1, f"`{name}` must be in [0, 1), got {getattr(self, name)}.")
        _require(
            self.rating_likelihood in ("categorical", "bernoulli"),
            f'`rating_likelihood` must be "categorical" or "bernoulli", got "{self.rating_likelihood}".',
        )
        levels = self.rating_levels
        _require(
            2 <= len(levels) <= MAX_RATING_LEVELS
            and all(math.isfinite(level) for level in levels)
            and all(low < high for low, high in itertools.pairwise(levels)),
            "`rating_levels` must be at least two finite, ascending numbers such as [1, 2, 3, 4, 5], and at most "
            f"{MAX_RATING_LEVELS}, got {str(levels)[:200]}.",
        )
        _require(0 <= self.alpha <= 1, f"`alpha` must be in [0, 1], got {self.alpha}.")
        _require(self.beta >= 0, f"`beta` must not be negative, got {self.beta}.")

    def _validate_experts(self) -> None:
        _require(
            self.num_local_experts >= 0,
            f"`num_local_experts` must be 0 (dense layers) or more, got {self.num_local_experts}.",
        )
        _require(
            self.shared_expert_intermediate_size >= 0,
            f"`shared_expert_intermediate_size` must be 0 (none) or more, got {self.shared_expert_intermediate_size}.",
        )
        if self.num_local_experts == 0:
            return
        _require(
            1 <= self.num_experts_per_tok <= self.num_local_experts,
            f"`num_experts_per_tok` must be between 1 and `num_local_experts` ({self.num_local_experts}), "
            f"got {self.num_experts_per_tok}.",
        )
        _require(
            self.moe_intermediate_size >= 1,
            f"`moe_intermediate_size` must be at least 1, got {self.moe_intermediate_size}.",
        )

    def _validate_prompt(self) -> None:
        for name in ("user_token_id", "item_token_id"):
            token = getattr(self, name)
            _require(
                token is None or 0 <= token < self.vocab_size,
                f"`{name}` must be inside the vocabulary, 0 to {self.vocab_size - 1}, got {token}. Add the placeholder "
                "tokens to the tokenizer and set `vocab_size` to its length.",
            )
        _require(
            self.user_token_id is None or self.user_token_id != self.item_token_id,
            f"`user_token_id` and `item_token_id` must differ, got {self.user_token_id} for both.",
        )
        _require(
            self.stored_prompts is None or set(self.stored_prompts) == {"positive", "negative"},
            '`stored_prompts` must hold token ids under "positive" and "negative", '
            f"got the keys {sorted(self.stored_prompts or {})}.",
        )


def to_python(value: Any) -> Any:
    """
    Series, arrays, tensors and other collections as lists of Python's own numbers and strings, at every level, in their
    order and without an index; everything else, strings and mappings among it, as it is.
    """
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Collection) and not isinstance(value, str | bytes | Mapping):
        return [to_python(element) for element in value]
    return value


def share_weights(folder: str | os.PathLike[str]) -> None:
    """Makes the weights in a folder as readable as the JSON beside them; safetensors leaves them to their owner."""
    folder = Path(folder)
    beside = min(folder.glob("*.json"), default=None)
    if beside is None:
        return
    for weights in folder.glob("*.safetensors"):
        weights.chmod(stat.S_IMODE(beside.stat().st_mode))


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _require_format(version: Any) -> None:
    _require(
        not isinstance(version, int) or version <= FORMAT_VERSION,
        f"This checkpoint has format version {version}, but this package reads up to {FORMAT_VERSION}. Install a newer "
        "gavamoe-hf.",
    )


GaVaMoEConfig.register_for_auto_class()

__all__ = ["POPULATION_ID", "GaVaMoEConfig", "share_weights", "to_python"]
