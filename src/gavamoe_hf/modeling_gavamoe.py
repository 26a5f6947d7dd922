# Copyright 2026 The gavamoe-hf authors. Licensed under the Apache License, Version 2.0.
"""GaVaMoE: a Llama whose feed-forward layers are multi-gate mixtures of experts, routed by a VAE-GMM rating model.

Shapes: B batch, T tokens, H `hidden_size`, I `moe_intermediate_size`, K `num_clusters`, X `num_local_experts`,
E `vae_embedding_size`, V vocabulary, L layers.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.integrations import use_experts_implementation
from transformers.modeling_utils import slice_logits_to_keep
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaMLP,
    LlamaModel,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from transformers.utils import ModelOutput
from transformers.utils.output_capturing import OutputRecorder

from .configuration_gavamoe import GaVaMoEConfig, share_weights
from .experts_gavamoe import SORTED_MM
from .fold_in_gavamoe import GaVaMoEFoldInMixin
from .generation_gavamoe import GaVaMoEGenerationMixin
from .recommendation_gavamoe import GaVaMoERecommendationMixin
from .upcycling_gavamoe import GaVaMoEUpcyclingMixin
from .vae_gmm_gavamoe import GaVaMoERatingModel, GaVaMoERatingOutput


@dataclass
class GaVaMoEModelOutputWithPast(ModelOutput):
    """
    Output of [`GaVaMoEModel`].

    Args:
        last_hidden_state (`torch.FloatTensor` of shape `(batch_size, sequence_length, hidden_size)`).
        past_key_values ([`~transformers.Cache`], *optional*).
        hidden_states (`tuple[torch.FloatTensor]`, *optional*): with `output_hidden_states=True`.
        attentions (`tuple[torch.FloatTensor]`, *optional*): with `output_attentions=True`.
        router_logits (`tuple[torch.FloatTensor]`, *optional*, with `output_router_logits=True`):
            For each layer, `(batch_size * sequence_length, num_experts)`.
        elbo_loss (`torch.FloatTensor` of shape `(1,)`, *optional*, returned when `rating` is given):
            Negative ELBO of the pairs in nats (eq. 12): `reconstruction_loss + beta * kl_loss`.
        reconstruction_loss (`torch.FloatTensor` of shape `(1,)`, *optional*): -log p(rating | z), in nats.
        kl_loss (`torch.FloatTensor` of shape `(1,)`, *optional*): KL divergence from the prior, in nats.
        rating_logits (`torch.FloatTensor` of shape `(batch_size, num_levels)`, *optional*): of the rating decoder.
        cluster_posterior (`torch.FloatTensor` of shape `(batch_size, num_clusters)`, *optional*): eq. 8, at z = mu.
        gate_index (`torch.LongTensor` of shape `(batch_size,)`, *optional*): The gate of each sample (eq. 9).
    """

    last_hidden_state: torch.FloatTensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None
    router_logits: tuple[torch.FloatTensor, ...] | None = None
    elbo_loss: torch.FloatTensor | None = None
    reconstruction_loss: torch.FloatTensor | None = None
    kl_loss: torch.FloatTensor | None = None
    rating_logits: torch.FloatTensor | None = None
    cluster_posterior: torch.FloatTensor | None = None
    gate_index: torch.LongTensor | None = None


@dataclass
class GaVaMoECausalLMOutputWithPast(ModelOutput):
    """
    Output of [`GaVaMoEForCausalLM`]: the fields of [`GaVaMoEModelOutputWithPast`], of which `last_hidden_state` becomes

    Args:
        loss (`torch.FloatTensor` of shape `(1,)`, *optional*, returned when `labels` is given):
            `alpha * elbo_loss + (1 - alpha) * (nll_loss + router_aux_loss_coef * aux_loss)` (eq. 13) when `rating` is
            given too, the second bracket alone when it is not.
        nll_loss (`torch.FloatTensor` of shape `(1,)`, *optional*): Mean over labelled tokens, in nats.
        aux_loss (`torch.FloatTensor` of shape `(1,)`, *optional*, with `output_router_logits=True`):
            Load-balancing loss (arXiv 2101.03961), unweighted.
        logits (`torch.FloatTensor` of shape `(batch_size, sequence_length, vocab_size)`).
    """

    loss: torch.FloatTensor | None = None
    nll_loss: torch.FloatTensor | None = None
    aux_loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None
    router_logits: tuple[torch.FloatTensor, ...] | None = None
    elbo_loss: torch.FloatTensor | None = None
    reconstruction_loss: torch.FloatTensor | None = None
    kl_loss: torch.FloatTensor | None = None
    rating_logits: torch.FloatTensor | None = None
    cluster_posterior: torch.FloatTensor | None = None
    gate_index: torch.LongTensor | None = None


@use_experts_implementation
class GaVaMoEExperts(nn.Module):
    """The experts of one layer as stacked SwiGLU weights, shared by all gates (section 3.3.2)."""

    def __init__(self, config: GaVaMoEConfig):
        super().__init__()
        self.num_experts = config.num_local_experts
        hidden, width = config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * width, hidden))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, hidden, width))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        # The reference ("eager"): one expert after the other. [tokens, H], [tokens, k], [tokens, k] -> [tokens, H]
        output = torch.zeros_like(hidden_states)
        for expert in range(self.num_experts):
            token, choice = torch.where(top_k_index == expert)
            if len(token) == 0:
                continue
            gate, up = F.linear(hidden_states[token], self.gate_up_proj[expert]).chunk(2, dim=-1)
            expert_output = F.linear(self.act_fn(gate) * up, self.down_proj[expert])
            weighted = expert_output * top_k_weights[token, choice, None]
            output.index_add_(0, token, weighted.to(output.dtype))
        return output


class GaVaMoEMultiGateRouter(nn.Module):
    """
    One gate for each cluster (eq. 9-11), all scoring the same experts. The gate is chosen per sample and used for all
    of its tokens.
    """

    def __init__(self, config: GaVaMoEConfig):
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.norm_topk_prob = config.norm_topk_prob
        self.weight = nn.Parameter(torch.empty(config.num_clusters, config.num_local_experts, config.hidden_size))

    def forward(
        self, hidden_states: torch.Tensor, gate_index: torch.LongTensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if hidden_states.shape[1] == 1:
            # A decode step: to score with all gates takes less time than to copy a gate for each sample
            scores = F.linear(hidden_states[:, 0], self.weight.flatten(0, 1)).unflatten(1, self.weight.shape[:2])
            logits = scores.take_along_dim(gate_index[:, None, None], dim=1)[:, 0]
        else:
            # Looked up as an embedding, whose gradient is summed faster than that of an index: [B, X, H]
            gates = F.embedding(gate_index, self.weight.flatten(1)).unflatten(1, self.weight.shape[1:])
            # [B, T, H] x [B, H, X] -> [B, T, X]
            logits = torch.bmm(hidden_states, gates.transpose(1, 2)).flatten(0, 1)
        probabilities = logits.softmax(dim=-1, dtype=torch.float32)
        top_k_weights, top_k_index = probabilities.topk(self.top_k, dim=-1)
        if self.norm_topk_prob:
            top_k_weights = top_k_weights / top_k_weights.sum(dim=-1, keepdim=True)
        return logits, top_k_weights.to(hidden_states.dtype), top_k_index


class GaVaMoESparseMoeBlock(nn.Module):
    """Multi-gate mixture of experts, in place of the Llama feed-forward layer, with an optional shared expert."""

    def __init__(self, config: GaVaMoEConfig):
        super().__init__()
        self.gate = GaVaMoEMultiGateRouter(config)
        self.experts = GaVaMoEExperts(config)
        self.shared_expert = None
        if config.shared_expert_intermediate_size > 0:
            dense_config = copy.copy(config)
            dense_config.intermediate_size = config.shared_expert_intermediate_size
            self.shared_expert = LlamaMLP(dense_config)

    def forward(self, hidden_states: torch.Tensor, gate_index: torch.LongTensor) -> torch.Tensor:
        _, top_k_weights, top_k_index = self.gate(hidden_states, gate_index)
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])  # [B * T, H]
        output = self.experts(tokens, top_k_index, top_k_weights).view_as(hidden_states)
        if self.shared_expert is not None:
            output = output + self.shared_expert(hidden_states)
        return output


class GaVaMoEDecoderLayer(LlamaDecoderLayer):
    """A Llama layer that hands the gate index to its mixture of experts."""

    def __init__(self, config: GaVaMoEConfig, layer_idx: int):
        # Not LlamaDecoderLayer.__init__, which builds a dense feed-forward layer first: a tenth of the time to load
        super(LlamaDecoderLayer, self).__init__()
        self.hidden_size = config.hidden_size
        self.self_attn = LlamaAttention(config=config, layer_idx=layer_idx)
        self.is_sparse = config.num_local_experts > 0
        if self.is_sparse and torch.get_default_device().type != "meta":
            # Drawn and thrown away, so that a seed gives the random model of the published figures
            LlamaMLP(config)
        self.mlp = GaVaMoESparseMoeBlock(config) if self.is_sparse else LlamaMLP(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self, hidden_states: torch.Tensor, gate_index: torch.LongTensor | None = None, **kwargs
    ) -> torch.Tensor:
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        normed = self.post_attention_layernorm(hidden_states)
        return hidden_states + (self.mlp(normed, gate_index) if self.is_sparse else self.mlp(normed))


class GaVaMoEPreTrainedModel(LlamaPreTrainedModel):
    config: GaVaMoEConfig
    config_class = GaVaMoEConfig
    _no_split_modules = ["GaVaMoEDecoderLayer", "GaVaMoERatingModel"]
    # Otherwise inherited from Llama, which has no experts, once a Llama has been asked in the same process
    _can_set_experts_implementation_cached_value = True
    # Gates must not depend on the precision that the language model is loaded in. A regular expression, whatever the
    # type of what it matches: item indices stay integers
    _keep_in_fp32_modules_strict = [r"rating_model(?!\.interaction)"]
    _can_record_outputs = {
        "router_logits": OutputRecorder(GaVaMoEMultiGateRouter, index=0),
        "hidden_states": GaVaMoEDecoderLayer,
        "attentions": LlamaAttention,
    }

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        """`"gavamoe_sorted_mm"` where none is named: away from a CPU it is transformers' `"grouped_mm"`."""
        return super().get_correct_experts_implementation(requested_experts or SORTED_MM)

    def get_experts_implementation(self) -> dict[str, str | None]:
        """What runs on the model's device. transformers asks, since it decodes with another in place of grouped_mm."""
        names = super().get_experts_implementation()
        if self.device.type == "cpu":
            return names
        return {key: "grouped_mm" if name == SORTED_MM else name for key, name in names.items()}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, GaVaMoEExperts):
            init.normal_(module.gate_up_proj, mean=0.0, std=self.config.initializer_range)
            init.normal_(module.down_proj, mean=0.0, std=self.config.initializer_range)
        elif isinstance(module, GaVaMoEMultiGateRouter):
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)


class GaVaMoEModel(GaVaMoEPreTrainedModel, LlamaModel):
    """
    The decoder together with the rating model that routes it. In one forward pass it looks the pair up, chooses its
    gate, puts the projected user and item embeddings at the placeholder tokens and, given the rating, computes the
    ELBO; see [`~GaVaMoEModel.forward`].
    """

    def __init__(self, config: GaVaMoEConfig):
        # Not LlamaModel.__init__, which would build the dense layers only to throw them away
        super(LlamaModel, self).__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(
            [GaVaMoEDecoderLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers)]
        )
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        # A config of its own, since the attention and experts implementations are chosen for the decoder alone
        rating_config = copy.deepcopy(config)
        rating_config._attn_implementation = rating_config._experts_implementation = "eager"
        self.rating_model = GaVaMoERatingModel(rating_config)
        if config.inject_pair_embeddings:
            self.user_projection = nn.Linear(config.vae_embedding_size, config.hidden_size)
            self.item_projection = nn.Linear(config.vae_embedding_size, config.hidden_size)
        self.post_init()

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        user_id: torch.LongTensor | None = None,
        item_id: torch.LongTensor | None = None,
        rating: torch.Tensor | None = None,
        gate_index: torch.LongTensor | None = None,
        **kwargs,
    ) -> GaVaMoEModelOutputWithPast:
        """
        Arguments of [`~transformers.LlamaModel`], and:

        Args:
            user_id (`torch.LongTensor` of shape `(batch_size,)`, *optional*): User indices, -1 for the population.
            item_id (`torch.LongTensor` of shape `(batch_size,)`, *optional*): Item indices, -1 for the population.
            rating (`torch.Tensor` of shape `(batch_size,)`, *optional*): Ratings; the ELBO is computed when given.
            gate_index (`torch.LongTensor` of shape `(batch_size,)`, *optional*):
                The gates, where they are known already, as in every step of a generation. The rating model then runs
                only if `rating` is given.

        Raises:
            `ValueError`: without a gate where there is more than one, for a pair with `inputs_embeds`, or where a
            prompt does not hold exactly one user and one item placeholder. With `past_key_values` the prompt may come
            in parts, which is not looked at.
            `IndexError`: for an id outside the tables.
        """
        if (user_id is None) != (item_id is None):
            raise ValueError("Expected `user_id` and `item_id` together, but got one of them alone.")
        pair_embeddings, rating_output = None, GaVaMoERatingOutput()
        cluster_posterior = None
        if user_id is not None:
            pair_embeddings = self.rating_model.embed(*self.rating_model.drop_ids(user_id, item_id))
            if gate_index is None:
                gate_index, cluster_posterior = self.rating_model.route(pair_embeddings)
            if rating is not None or cluster_posterior is not None:
                rating_output = self.rating_model(pair_embeddings=pair_embeddings, rating=rating)
        if inputs_embeds is not None and pair_embeddings is not None and self.config.inject_pair_embeddings:
            raise ValueError(
                "Expected the prompt as `input_ids`, but got `inputs_embeds`, in which the placeholders of user and "
                "item cannot be told, so that every pair would read alike. Prompt tuning, which passes embeddings, "
                "does not work for this model: use LoRA."
            )
        if inputs_embeds is None and input_ids is not None:
            inputs_embeds = self.embed_tokens(input_ids)
            if pair_embeddings is not None and self.config.inject_pair_embeddings:
                if past_key_values is None:
                    self.check_placeholders(input_ids)
                inputs_embeds = self._inject(input_ids, inputs_embeds, pair_embeddings)
            input_ids = None
        outputs = super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            gate_index=self._resolve_gate(gate_index, inputs_embeds),
            **kwargs,
        )
        return GaVaMoEModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions"),
            router_logits=outputs.get("router_logits"),
            elbo_loss=rating_output.loss,
            reconstruction_loss=rating_output.reconstruction_loss,
            kl_loss=rating_output.kl_loss,
            rating_logits=rating_output.rating_logits,
            cluster_posterior=cluster_posterior,
            gate_index=gate_index,
        )

    def _resolve_gate(
        self, gate_index: torch.LongTensor | None, inputs_embeds: torch.Tensor
    ) -> torch.LongTensor | None:
        if gate_index is not None or self.config.num_local_experts == 0:
            return gate_index
        if self.config.num_clusters > 1:
            raise ValueError(
                f"Each sample needs a gate, one of {self.config.num_clusters}: pass `user_id` and `item_id` (-1 for "
                "the population), or `gate_index`."
            )
        return torch.zeros(len(inputs_embeds), dtype=torch.long, device=inputs_embeds.device)

    def _inject(
        self, input_ids: torch.LongTensor, inputs_embeds: torch.Tensor, pair_embeddings: torch.Tensor
    ) -> torch.Tensor:
        """Puts the projected user and item embeddings at their placeholder tokens, wherever they stand in each row."""
        projected = (
            (self.user_projection, pair_embeddings[:, 0]),
            (self.item_projection, pair_embeddings[:, 1]),
        )
        names = ("user_token_id", "item_token_id")
        for name, (projection, embedding) in zip(names, projected, strict=True):
            token = getattr(self.config, name)
            if token is None:
                raise ValueError(f"`config.{name}` is not set: set it to the id of the placeholder token.")
            position = input_ids == token  # [B, T]
            vector = projection(embedding.to(projection.weight.dtype))[:, None]  # [B, 1, H]
            inputs_embeds = torch.where(position[..., None], vector.to(inputs_embeds.dtype), inputs_embeds)
        return inputs_embeds

    def check_placeholders(self, input_ids: torch.LongTensor) -> None:
        """Raises `ValueError` unless each row of whole prompts has one placeholder of the user and one of the item."""
        if torch.compiler.is_compiling() or not self.config.inject_pair_embeddings:
            return
        for name, token in (("user", self.config.user_token_id), ("item", self.config.item_token_id)):
            if token is None:
                continue  # `_inject` says so
            counts = (input_ids == token).sum(dim=-1)
            if (counts != 1).any():
                row = (counts != 1).nonzero()[0].item()
                raise ValueError(
                    f"Expected exactly one {name} placeholder (token {token}) in each prompt, but row {row} has "
                    f"{counts[row].item()}. Build prompts with the checkpoint's processor."
                )


class GaVaMoEForCausalLM(
    GaVaMoEGenerationMixin,
    GaVaMoERecommendationMixin,
    GaVaMoEFoldInMixin,
    GaVaMoEUpcyclingMixin,
    GaVaMoEPreTrainedModel,
    LlamaForCausalLM,
):
    """
    GaVaMoE with a language-modelling head: explains user-item pairs and predicts their ratings.

    Example:

    ```python
    >>> from transformers import AutoModel, AutoProcessor

    >>> model = AutoModel.from_pretrained("outputs/quickstart", trust_remote_code=True)
    >>> processor = AutoProcessor.from_pretrained("outputs/quickstart", trust_remote_code=True)
    >>> tokens = model.generate(user_id=3, item_id=5, max_new_tokens=30)
    >>> processor.batch_decode(tokens, skip_special_tokens=True)
    ```"""

    def __init__(self, config: GaVaMoEConfig):
        super(LlamaForCausalLM, self).__init__(config)
        self.model = GaVaMoEModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @property
    def rating_model(self) -> GaVaMoERatingModel:
        """The VAE-GMM that predicts ratings and chooses gates."""
        return self.model.rating_model

    def drop_gates(self) -> None:
        """Leaves each layer as many of its gates as the rating model has clusters, after it chose their number."""
        self.config.num_clusters = self.rating_model.config.num_clusters
        for module in self.modules():
            if isinstance(module, GaVaMoEMultiGateRouter):
                kept = module.weight.detach()[: self.config.num_clusters].clone()
                module.weight = nn.Parameter(kept, requires_grad=module.weight.requires_grad)

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        user_id: torch.LongTensor | None = None,
        item_id: torch.LongTensor | None = None,
        rating: torch.Tensor | None = None,
        gate_index: torch.LongTensor | None = None,
        **kwargs,
    ) -> GaVaMoECausalLMOutputWithPast:
        """
        Arguments of [`~transformers.LlamaForCausalLM`] and of [`GaVaMoEModel`].

        Returns:
            [`GaVaMoECausalLMOutputWithPast`]
        """
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        return_dict = kwargs.pop("return_dict", None)
        outputs: GaVaMoEModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_router_logits=output_router_logits,
            user_id=user_id,
            item_id=item_id,
            rating=rating,
            gate_index=gate_index,
            **kwargs,
        )
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        aux_loss = None
        if output_router_logits and outputs.router_logits:
            aux_loss = load_balancing_loss_func(
                outputs.router_logits,
                self.config.num_experts,
                self.config.num_experts_per_tok,
                attention_mask,
            )
        loss = nll_loss = None
        if labels is not None:
            nll_loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
            loss = nll_loss
            # Of a batch that comes in several parts, whose tokens are counted over all, this is one part's share
            share: Any = 1.0
            if kwargs.get("num_items_in_batch") is not None:
                share = (labels[..., 1:] != -100).sum() / kwargs["num_items_in_batch"]
            if aux_loss is not None:
                loss = loss + self.config.router_aux_loss_coef * share * aux_loss.to(loss.device)
            if outputs.elbo_loss is not None:
                loss = self.config.alpha * share * outputs.elbo_loss.to(loss.device) + (1 - self.config.alpha) * loss
        fields = {key: value for key, value in outputs.items() if key != "last_hidden_state"}
        output = GaVaMoECausalLMOutputWithPast(loss=loss, nll_loss=nll_loss, aux_loss=aux_loss, logits=logits, **fields)
        return output.to_tuple() if return_dict is False else output

    def save_pretrained(self, save_directory: Any, *args, **kwargs) -> None:
        """[`~transformers.PreTrainedModel.save_pretrained`], with the code files, an `auto_map` that makes
        `AutoModel` load this class as well as `AutoModelForCausalLM`, and the pipeline."""
        # An import of this file, so that the pipeline's travels too; here, since a model alone has no need of it
        from .pipeline_gavamoe import TASK, ExplainableRecommendationPipeline

        # FSDP2 puts a class of its own, from torch's files, before a model's: the code to save is the model's
        sharded_class = type(self)
        self.__class__ = next(cls for cls in sharded_class.__mro__ if not cls.__name__.startswith("FSDP"))
        try:
            reference = f"{type(self).__module__.split('.')[-1]}.{type(self).__name__}"
            self.config.auto_map = {**(getattr(self.config, "auto_map", None) or {}), "AutoModel": reference}
            implementation = f"pipeline_gavamoe.{ExplainableRecommendationPipeline.__name__}"
            self.config.custom_pipelines = {TASK: {"impl": implementation, "pt": ["AutoModelForCausalLM"]}}
            super().save_pretrained(save_directory, *args, **kwargs)
            share_weights(save_directory)
        finally:
            self.__class__ = sharded_class


GaVaMoEForCausalLM.register_for_auto_class("AutoModelForCausalLM")

__all__ = [
    "GaVaMoECausalLMOutputWithPast",
    "GaVaMoEForCausalLM",
    "GaVaMoEModel",
    "GaVaMoEModelOutputWithPast",
    "GaVaMoEPreTrainedModel",
]
