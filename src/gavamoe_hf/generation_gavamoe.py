# Copyright 2026 The gavamoe-hf authors. Licensed under the Apache License, Version 2.0.
"""What one asks a GaVaMoE model about user-item pairs: explanations, ratings, clusters and routes.

Shapes: B batch, T tokens, P tokens of a shared prefix, G distinct gates, X `num_local_experts`, L layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers import (
    Cache,
    DynamicCache,
    LogitsProcessorList,
    StaticCache,
    SuppressTokensLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)
from transformers.utils import ModelOutput

from .configuration_gavamoe import to_python

# Prompt tokens that a shared prefix has to save, since it costs a forward pass more
_MIN_SAVED_TOKENS = 128

# Options of `generate` under which a forward pass would not belong to its pair, and what to do instead
_REFUSED_OPTIONS = {
    "assistant_model": "its drafts are made without the pair. Use `prompt_lookup_num_tokens`, or leave it out",
    "assistant_early_exit": "its drafts are made without the pair. Use `prompt_lookup_num_tokens`, or leave it out",
    "custom_generate": "it may come from the Hub as code, and need not hand the pair on. Leave it out",
    "inputs_embeds": "in embeddings the placeholders of user and item cannot be told. Pass `input_ids`",
    "token_healing": "it drops the end of the prompt, where the placeholders may be. Leave it out",
}


@dataclass
class GaVaMoERoutingReport(ModelOutput):
    """
    How pairs are routed, from [`GaVaMoEForCausalLM.routing_report`].

    Args:
        gate_index (`torch.LongTensor` of shape `(batch_size,)`): The gate used, which is the most probable cluster.
        cluster_posterior (`torch.FloatTensor` of shape `(batch_size, num_clusters)`): eq. 8, at z = mu.
        predicted_rating (`torch.FloatTensor` of shape `(batch_size,)`): Expected rating, on the rating scale.
        expert_share (`torch.FloatTensor` of shape `(batch_size, num_hidden_layers, num_experts)`, *optional*):
            Share of the sample's (token, choice) slots that each expert of each layer takes; sums to 1. `None` where
            the layers are dense.
    """

    gate_index: torch.LongTensor | None = None
    cluster_posterior: torch.FloatTensor | None = None
    predicted_rating: torch.FloatTensor | None = None
    expert_share: torch.FloatTensor | None = None


@dataclass
class GaVaMoEExplanation:
    """
    One explained pair, from [`GaVaMoEForCausalLM.explain`].

    Args:
        user (`str`), item (`str`): Raw ids.
        explanation (`str`): The generated text.
        rating (`float`): The rating whose sentiment the prompt stated: the one given, else the predicted one.
        predicted_rating (`float`): The rating model's expectation.
        features (`list[str]`): The features that the prompt named.
        cluster (`int`): Cluster of the pair, which is its gate.
        cluster_posterior (`list[float]`): Probability of each cluster.
    """

    user: str
    item: str
    explanation: str
    rating: float
    predicted_rating: float
    features: list[str]
    cluster: int
    cluster_posterior: list[float]


class PlaceholderSuppressor(SuppressTokensLogitsProcessor):
    """
    Rules the placeholders out: each stands for an embedding and no text, and a second one in the sequence would mean
    nothing. A class of its own, since `generate` lets a processor that is passed replace its own of the same class,
    which has the caller's `suppress_tokens`.
    """


class _WithGate:
    """The model as guidance runs it: on what is said alone, by the gate of the pair."""

    def __init__(self, model: Any, gate_index: torch.LongTensor | None):
        self.model, self.gate_index = model, gate_index

    def __call__(self, input_ids: torch.LongTensor, **kwargs: Any) -> Any:
        if self.gate_index is not None:
            # Beams and returned sequences are rows beside each other
            kwargs["gate_index"] = self.gate_index.repeat_interleave(len(input_ids) // len(self.gate_index))
        return self.model(input_ids, **kwargs)


class GaVaMoEGenerationMixin:
    """Generation and questions about pairs, for [`GaVaMoEForCausalLM`]."""

    def prepare_inputs_for_generation(self, input_ids: torch.LongTensor, **kwargs) -> dict[str, Any]:
        model_inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)
        # A flag of training: the load-balancing loss of one step means nothing, and the mask covers all steps
        model_inputs["output_router_logits"] = False
        # The placeholders are in the prompt, whose keys and values are cached after the first step
        if kwargs.get("use_cache", True) and not kwargs.get("is_first_iteration", False):
            model_inputs.pop("user_id", None)
            model_inputs.pop("item_id", None)
        return model_inputs

    def _prefill(self, input_ids: torch.LongTensor, generation_config: Any, model_kwargs: dict, *args, **kwargs):
        # Here since beams are rows by now, options are merged and the cache is there
        cache = model_kwargs.get("past_key_values")
        if (
            type(cache) in (DynamicCache, StaticCache)
            and cache.get_seq_length() == 0
            and model_kwargs.get("inputs_embeds") is None
            # Which would lack the prefix
            and not generation_config.output_hidden_states
            and not generation_config.output_attentions
        ):
            mask, gate_index = (model_kwargs.get(name) for name in ("attention_mask", "gate_index"))
            self._cache_shared_prefix(cache, input_ids, mask, gate_index)
        return super()._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)

    def _cache_shared_prefix(
        self,
        cache: Cache,
        input_ids: torch.LongTensor,
        attention_mask: torch.LongTensor | None,
        gate_index: torch.LongTensor | None,
    ) -> None:
        """
        Fills an empty cache with the first columns of the prompts where these begin alike: their keys and values are
        computed once for each gate in place of each row. The rest of the prompts is left to the caller.

        Keys depend on a token's position among those of its row, and not on the column. So where a row has p padding
        tokens, its column c takes token c - p of the prefix.
        """
        batch_size, width = input_ids.shape
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        elif attention_mask.ndim != 2 or (attention_mask.long().diff(dim=1) < 0).any():
            return
        padding = (attention_mask == 0).sum(dim=1, keepdim=True)  # [B, 1]
        column = torch.arange(width, device=input_ids.device)
        tokens = input_ids.gather(1, (column + padding).clamp(max=width - 1))  # [B, T], padding at the end
        # At least one token is left to every row, and both placeholders
        shared = (tokens == tokens[0]).all(dim=0) & (column < width - 1 - padding.max())
        for placeholder in self._placeholders():
            shared &= (tokens != placeholder).all(dim=0)
        length = int(shared.long().cumprod(dim=0).sum())
        if gate_index is None:
            gate_index = torch.zeros(batch_size, dtype=torch.long, device=input_ids.device)
        gates, row_gate = gate_index.unique(return_inverse=True)
        if (batch_size - len(gates)) * length < _MIN_SAVED_TOKENS:
            return
        prefix = self(
            input_ids=tokens[:1, :length].expand(len(gates), -1),
            gate_index=gates,
            use_cache=True,
            output_router_logits=False,
            logits_to_keep=1,
        )
        token = (column[:length] - padding).clamp(min=0)  # [B, P]
        for index, layer in enumerate(prefix.past_key_values.layers):
            # [G, heads, P, width] -> [B, heads, P, width]
            keys, values = (
                states[row_gate[:, None], :, token].transpose(1, 2) for states in (layer.keys, layer.values)
            )
            cache.update(keys, values, index)

    def _placeholders(self) -> list[int]:
        return [token for token in (self.config.user_token_id, self.config.item_token_id) if token is not None]

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.LongTensor | None = None,
        *args,
        user_id: int | Sequence[int] | torch.LongTensor | None = None,
        item_id: int | Sequence[int] | torch.LongTensor | None = None,
        negative_input_ids: torch.LongTensor | None = None,
        negative_attention_mask: torch.LongTensor | None = None,
        **kwargs,
    ):
        """
        [`~transformers.GenerationMixin.generate`] for user-item pairs. Each sequence takes the gate of its own pair,
        chosen once for the whole generation.

        Args:
            inputs (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Prompts, as `input_ids` too; each holds one user and one item placeholder. Without prompts, the
                checkpoint's stored prompt is used, its sentiment from the predicted rating.
            user_id (`int`, `Sequence[int]` or `torch.LongTensor` of shape `(batch_size,)`):
                User indices, -1 for the population. One index is used for every item given.
            item_id (`int`, `Sequence[int]` or `torch.LongTensor` of shape `(batch_size,)`): Item indices, likewise.
            negative_input_ids (`torch.LongTensor`, *optional*):
                What the processor adds where a rating is not known: for rows whose predicted rating is negative these
                prompts take the place of `input_ids`. Rows filled with -1 keep `input_ids`.
            negative_attention_mask (`torch.LongTensor`, *optional*): The mask of `negative_input_ids`.
            kwargs: everything that `generate` takes, and `gate_index` of shape `(batch_size,)` where it is known.

        What left-padded prompts begin with in common, up to the first placeholder, is computed once for each gate where
        that saves time. The tokens are the same.

        Returns:
            What `generate` returns: prompts with their continuations, in which there are no placeholder tokens.

        Raises:
            `ValueError`: for missing or unfit ids or prompts; `IndexError`: for an id outside the tables.
        """
        if user_id is None and item_id is None:
            return super().generate(inputs, *args, **kwargs)
        generation_config = kwargs.get("generation_config", args[0] if args else None)
        for name, reason in _REFUSED_OPTIONS.items():
            value = self._option(name, generation_config, kwargs)
            if value is not None and value is not False:
                raise ValueError(f"`{name}` does not work with `user_id` and `item_id`: {reason}.")
        user_id, item_id = self._pair_tensors(user_id, item_id)
        input_ids = kwargs.pop("input_ids", inputs)
        attention_mask = kwargs.pop("attention_mask", None)
        if input_ids is None:
            input_ids, attention_mask, negative_input_ids, negative_attention_mask = self._stored_prompts(len(user_id))
        if negative_input_ids is not None:
            input_ids, attention_mask = self._prompts_by_sentiment(
                self.predict_rating(user_id, item_id),
                input_ids,
                attention_mask,
                negative_input_ids,
                negative_attention_mask,
            )
        if len(input_ids) != len(user_id):
            raise ValueError(
                f"Expected one pair for each prompt, but got {len(user_id)} pair(s) and {len(input_ids)} prompt(s)."
            )
        kwargs["input_ids"] = input_ids
        if kwargs.get("past_key_values") is None:
            # Here, where the prompt is whole: the model may be given it in parts
            self.model.check_placeholders(input_ids)
        if attention_mask is not None:
            kwargs["attention_mask"] = attention_mask
        if self.config.num_local_experts == 0:
            kwargs.pop("gate_index", None)
        elif kwargs.get("gate_index") is None:
            kwargs["gate_index"] = self.gate_index(user_id, item_id)
        processors = LogitsProcessorList(kwargs.pop("logits_processor", None) or [])
        guidance_scale = self._option("guidance_scale", generation_config, kwargs)
        if guidance_scale is not None and guidance_scale != 1:
            # In place of transformers' own, which would run the model without a gate
            processors.append(
                UnbatchedClassifierFreeGuidanceLogitsProcessor(
                    guidance_scale,
                    _WithGate(self, kwargs.get("gate_index")),
                    unconditional_ids=kwargs.get("negative_prompt_ids"),
                    unconditional_attention_mask=kwargs.get("negative_prompt_attention_mask"),
                )
            )
        placeholders = self._placeholders()
        if placeholders:
            processors.append(PlaceholderSuppressor(placeholders, device=user_id.device))
        kwargs["logits_processor"] = processors
        return super().generate(None, *args, user_id=user_id, item_id=item_id, **kwargs)

    def _option(self, name: str, generation_config: Any, options: dict[str, Any]) -> Any:
        """What an option of `generate` is in this call."""
        return options.get(name, getattr(generation_config or self.generation_config, name, None))

    def _pair_tensors(self, user_id: Any, item_id: Any) -> tuple[torch.LongTensor, torch.LongTensor]:
        """Ids given as ints, lists or tensors, as index tensors of one length on the model's device, checked."""
        tensors = []
        device = self.rating_model.loaded_device()
        for name, ids in (("user_id", user_id), ("item_id", item_id)):
            if ids is None:
                raise ValueError(f"Expected `user_id` and `item_id`, but `{name}` is missing.")
            try:
                tensor = torch.as_tensor(ids if isinstance(ids, torch.Tensor) else to_python(ids), device=device)
                got = f"{tensor.dtype} of shape {tuple(tensor.shape)}"
            except (TypeError, ValueError, RuntimeError):
                tensor, got = None, repr(ids)[:100]
            if (
                tensor is None
                or tensor.dtype == torch.bool
                or tensor.is_floating_point()
                or tensor.ndim > 1
                or tensor.numel() == 0
            ):
                raise ValueError(
                    f"Expected `{name}` as an int, a list of ints or an integer tensor of shape (batch_size,), but "
                    f"got {got} ({type(ids).__name__}). Raw ids are looked up by the checkpoint's processor."
                )
            tensors.append(tensor.long().reshape(-1))
        user_id, item_id = tensors
        if len(user_id) != len(item_id) and 1 not in (len(user_id), len(item_id)):
            raise ValueError(
                f"Expected as many users as items, or one for all, but got {len(user_id)} and {len(item_id)}."
            )
        user_id, item_id = torch.broadcast_tensors(user_id, item_id)
        self.rating_model.check_ids(user_id, item_id)
        return user_id.contiguous(), item_id.contiguous()

    def _stored_prompts(self, batch_size: int) -> tuple[torch.LongTensor, ...]:
        """The stored positive and negative prompts, left-padded to one length, each followed by its mask."""
        if self.config.stored_prompts is None:
            raise ValueError(
                "This checkpoint stores no prompt: pass `input_ids` from its processor, or set "
                "`config.stored_prompts = processor.stored_prompts()`."
            )
        prompts = [self.config.stored_prompts[sentiment] for sentiment in ("positive", "negative")]
        length = max(map(len, prompts))
        padding = self.config.pad_token_id if self.config.pad_token_id is not None else 0
        tensors = []
        for prompt in prompts:
            pad = length - len(prompt)
            for row in ([padding] * pad + list(prompt), [0] * pad + [1] * len(prompt)):
                tensors.append(torch.tensor(row, device=self.device).expand(batch_size, -1))
        return tuple(tensors)

    def _prompts_by_sentiment(
        self,
        predicted_rating: torch.FloatTensor,
        input_ids: torch.LongTensor,
        attention_mask: torch.LongTensor,
        negative_input_ids: torch.LongTensor,
        negative_attention_mask: torch.LongTensor,
    ) -> tuple[torch.LongTensor, torch.LongTensor]:
        """The prompts and their mask, negative ones where the predicted rating is and the rating was not given."""
        negative = predicted_rating < self.config.positive_rating_threshold
        negative = negative[:, None] & (negative_input_ids[:, -1:] >= 0)
        return (
            torch.where(negative, negative_input_ids, input_ids),
            torch.where(negative, negative_attention_mask, attention_mask),
        )

    @torch.no_grad()
    def predict_rating(self, user_id: Any, item_id: Any) -> torch.FloatTensor:
        """
        Expected ratings on the rating scale, without dropout or sampling whatever the mode.

        Args:
            user_id (`int`, `Sequence[int]` or `torch.LongTensor` of shape `(batch_size,)`): User indices, -1 for the
                population. One index is used for every item given.
            item_id (`int`, `Sequence[int]` or `torch.LongTensor` of shape `(batch_size,)`): Item indices, likewise.

        Returns:
            `torch.FloatTensor` of shape `(batch_size,)`.
        """
        return self.rating_model.predict(*self._pair_tensors(user_id, item_id)).predicted_rating

    @torch.no_grad()
    def cluster_posterior(self, user_id: Any, item_id: Any) -> torch.FloatTensor:
        """p(c | pair) (eq. 8) at z = mu, `(batch_size, num_clusters)`; arguments as for [`~predict_rating`]."""
        return self.rating_model.predict(*self._pair_tensors(user_id, item_id)).cluster_posterior

    @torch.no_grad()
    def gate_index(self, user_id: Any, item_id: Any) -> torch.LongTensor:
        """The gate of each pair (eq. 9), `(batch_size,)`; arguments as for [`~predict_rating`]."""
        pair_embeddings = self.rating_model.embed(*self._pair_tensors(user_id, item_id))
        return self.rating_model.route(pair_embeddings)[0]

    @torch.no_grad()
    def routing_report(
        self,
        user_id: Any,
        item_id: Any,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.LongTensor | None = None,
    ) -> GaVaMoERoutingReport:
        """
        Which cluster, gate and experts pairs use, layer by layer, over a prompt.

        Args:
            user_id (`int`, `Sequence[int]` or `torch.LongTensor` of shape `(batch_size,)`): User indices.
            item_id (`int`, `Sequence[int]` or `torch.LongTensor` of shape `(batch_size,)`): Item indices.
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*, defaults to the stored
                prompt of a positive experience): Prompts, with or without explanations.
            attention_mask (`torch.LongTensor`, *optional*): Mask of `input_ids`.

        Returns:
            [`GaVaMoERoutingReport`]
        """
        user_id, item_id = self._pair_tensors(user_id, item_id)
        predicted = self.rating_model.predict(user_id, item_id)
        report = GaVaMoERoutingReport(
            gate_index=predicted.cluster_posterior.argmax(dim=-1),
            cluster_posterior=predicted.cluster_posterior,
            predicted_rating=predicted.predicted_rating,
        )
        if self.config.num_local_experts == 0:
            return report
        if input_ids is None:
            input_ids, attention_mask, _, _ = self._stored_prompts(len(user_id))
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            user_id=user_id,
            item_id=item_id,
            gate_index=report.gate_index,
            output_router_logits=True,
            use_cache=False,
        )
        shares = []
        for logits in outputs.router_logits:
            chosen = logits.view(*input_ids.shape, -1).topk(self.config.num_experts_per_tok, dim=-1).indices
            counts = F.one_hot(chosen, self.config.num_experts).sum(dim=2) * attention_mask[..., None]  # [B, T, X]
            shares.append(counts.sum(dim=1) / counts.sum(dim=(1, 2))[:, None])
        report.expert_share = torch.stack(shares, dim=1)
        return report

    def explain(
        self,
        processor: Any,
        user: str | Sequence[str],
        item: str | Sequence[str],
        rating: float | Sequence[float | None] | None = None,
        features: Sequence[str] | Sequence[Sequence[str] | None] | None = None,
        **generate_kwargs,
    ) -> list[GaVaMoEExplanation]:
        """
        Explanations of pairs named by their raw ids.

        Args:
            processor ([`GaVaMoEProcessor`]): The checkpoint's processor.
            user (`str` or `Sequence[str]`): Raw user ids.
            item (`str` or `Sequence[str]`): Raw item ids.
            rating (`float` or `Sequence[float | None]`, *optional*, defaults to the predicted rating):
                Ratings whose sentiment the prompt states.
            features (`Sequence[str]`, or one sequence for each pair, *optional*):
                Features for the prompt to name; those that the item is known by if not given.
            generate_kwargs: everything that `generate` takes.

        Returns:
            `list[GaVaMoEExplanation]`: one for each pair, in order.
        """
        pairs = processor.normalize_pairs(user=user, item=item, rating=rating, features=features)
        self._check_ratings([pair.rating for pair in pairs])
        device = self.rating_model.loaded_device()
        batch = processor(user=user, item=item, rating=rating, features=features).to(device)
        # One pass of the rating model answers for sentiment, gate and report
        predicted = self.rating_model.predict(batch["user_id"], batch["item_id"])
        if "negative_input_ids" in batch:
            names = ("input_ids", "attention_mask", "negative_input_ids", "negative_attention_mask")
            prompts = self._prompts_by_sentiment(predicted.predicted_rating, *(batch.pop(name) for name in names))
            batch["input_ids"], batch["attention_mask"] = prompts
        gates = predicted.cluster_posterior.argmax(dim=-1)
        tokens = self.generate(**batch, gate_index=gates, **{"return_dict_in_generate": False, **generate_kwargs})
        tokens = tokens if isinstance(tokens, torch.Tensor) else tokens.sequences
        texts = processor.batch_decode(tokens[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        repeats = len(texts) // len(pairs)
        explanations = []
        for row, pair in enumerate(pairs):
            predicted_rating = predicted.predicted_rating[row].item()
            posterior = predicted.cluster_posterior[row].tolist()
            for text in texts[row * repeats : (row + 1) * repeats]:
                explanations.append(
                    GaVaMoEExplanation(
                        user=pair.user,
                        item=pair.item,
                        explanation=text.strip(),
                        rating=predicted_rating if pair.rating is None else pair.rating,
                        predicted_rating=predicted_rating,
                        features=pair.features,
                        cluster=max(range(len(posterior)), key=posterior.__getitem__),
                        cluster_posterior=posterior,
                    )
                )
        return explanations

    def _check_ratings(self, ratings: Sequence[float | None]) -> None:
        """Raises `ValueError` for a rating that the scale does not reach."""
        low, high = self.config.rating_levels[0], self.config.rating_levels[-1]
        outside = [rating for rating in ratings if rating is not None and not low <= rating <= high]
        if outside:
            raise ValueError(f"Expected ratings from {low:g} to {high:g}, this model's scale, but got {outside[0]:g}.")


__all__ = ["GaVaMoEExplanation", "GaVaMoEGenerationMixin", "GaVaMoERoutingReport"]
