# Copyright 2026 The gavamoe-hf authors. Licensed under the Apache License, Version 2.0.
"""The rating model of GaVaMoE: a variational autoencoder of user-item pairs with a Gaussian-mixture prior.

Shapes: B pairs, E `vae_embedding_size`, D `latent_size`, K `num_clusters`, R number of rating levels.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from .configuration_gavamoe import POPULATION_ID, GaVaMoEConfig, share_weights, to_python

# Log variances are kept in this range so that neither exp() nor its inverse overflows in float32.
_MIN_LOG_VARIANCE, _MAX_LOG_VARIANCE = -12.0, 8.0

# Embeddings start small and grow with what the ratings teach. With the usual epsilon, a LayerNorm would scale the
# random start up to unit variance and give every user a code to memorise; with this one, small stays small.
_NORM_EPS = 1.0
_TABLE_STD = 0.02


@dataclass
class GaVaMoERatingOutput(ModelOutput):
    """
    Output of [`GaVaMoERatingModel`].

    Args:
        loss (`torch.FloatTensor` of shape `(1,)`, *optional*, returned when `rating` is given):
            Negative ELBO, `reconstruction_loss + beta * kl_loss` (eq. 12), in nats.
        reconstruction_loss (`torch.FloatTensor` of shape `(1,)`, *optional*):
            Mean of -log p(rating | z), in nats.
        kl_loss (`torch.FloatTensor` of shape `(1,)`, *optional*):
            Mean of KL(q(z, c | pair) || p(z, c)), in nats.
        cluster_loss (`torch.FloatTensor` of shape `(1,)`, *optional*, returned when `cluster_target` is given):
            Mean cross-entropy of p(c | z) against the target, in nats; not part of `loss`.
        rating_logits (`torch.FloatTensor` of shape `(batch_size, num_levels)`, or `(batch_size, 1)` for bernoulli):
            Scores of the rating levels.
        predicted_rating (`torch.FloatTensor` of shape `(batch_size,)`):
            Expected rating, on the rating scale.
        cluster_posterior (`torch.FloatTensor` of shape `(batch_size, num_clusters)`):
            p(c | z) (eq. 8), at the latent that was decoded.
        latent_mean (`torch.FloatTensor` of shape `(batch_size, latent_size)`): mu (eq. 1).
        latent_log_variance (`torch.FloatTensor` of shape `(batch_size, latent_size)`): log sigma^2 (eq. 1).
    """

    loss: torch.FloatTensor | None = None
    reconstruction_loss: torch.FloatTensor | None = None
    kl_loss: torch.FloatTensor | None = None
    cluster_loss: torch.FloatTensor | None = None
    rating_logits: torch.FloatTensor | None = None
    predicted_rating: torch.FloatTensor | None = None
    cluster_posterior: torch.FloatTensor | None = None
    latent_mean: torch.FloatTensor | None = None
    latent_log_variance: torch.FloatTensor | None = None


class GaVaMoEPairEncoderLayer(nn.Module):
    """
    Pre-norm Transformer layer over the two tokens [user, item] of each pair. Dropout is an argument rather than module
    state, so that one forward pass can take the noisy latent for the loss and the exact one for the gate.
    """

    def __init__(self, config: GaVaMoEConfig):
        super().__init__()
        self.num_heads = config.vae_num_heads
        size = config.vae_embedding_size
        self.attention_norm = nn.LayerNorm(size, eps=_NORM_EPS)
        self.query_key_value = nn.Linear(size, 3 * size)
        self.attention_output = nn.Linear(size, size)
        self.feed_forward_norm = nn.LayerNorm(size, eps=_NORM_EPS)
        self.feed_forward_up = nn.Linear(size, config.vae_intermediate_size)
        self.feed_forward_down = nn.Linear(config.vae_intermediate_size, size)

    def forward(self, hidden_states: torch.Tensor, dropout: float) -> torch.Tensor:
        batch, tokens, size = hidden_states.shape
        heads = self.query_key_value(self.attention_norm(hidden_states))
        heads = heads.view(batch, tokens, 3, self.num_heads, size // self.num_heads)
        query, key, value = heads.permute(2, 0, 3, 1, 4)  # [B, heads, 2, E / heads] each
        attended = F.scaled_dot_product_attention(query, key, value)
        attended = self.attention_output(attended.transpose(1, 2).reshape(batch, tokens, size))
        hidden_states = hidden_states + F.dropout(attended, dropout, training=dropout > 0)
        expanded = F.gelu(self.feed_forward_up(self.feed_forward_norm(hidden_states)))
        return hidden_states + F.dropout(self.feed_forward_down(expanded), dropout, training=dropout > 0)


class GaVaMoEGaussianMixture(nn.Module):
    """Prior p(c) p(z | c): a mixture of K Gaussians with diagonal covariance (eq. 4-5)."""

    def __init__(self, config: GaVaMoEConfig):
        super().__init__()
        shape = (config.num_clusters, config.latent_size)
        self.logits = nn.Parameter(torch.zeros(config.num_clusters))
        self.means = nn.Parameter(torch.empty(shape))
        self.log_variances = nn.Parameter(torch.zeros(shape))

    def log_weights(self) -> torch.Tensor:
        """log pi, of shape `(num_clusters,)`."""
        return self.logits.log_softmax(dim=-1)

    def log_posterior(self, latent: torch.Tensor) -> torch.Tensor:
        """log p(c | z) (eq. 8) of latents `(batch_size, latent_size)`, in log space: `(batch_size, num_clusters)`."""
        log_variances = self.log_variances.clamp(_MIN_LOG_VARIANCE, _MAX_LOG_VARIANCE)
        squared = (latent[:, None] - self.means).square() * (-log_variances).exp()  # [B, K, D]
        log_density = -0.5 * (squared + log_variances + math.log(2 * math.pi)).sum(dim=-1)
        return (self.log_weights() + log_density).log_softmax(dim=-1)

    def kl_divergence(
        self, log_posterior: torch.Tensor, mean: torch.Tensor, log_variance: torch.Tensor
    ) -> torch.Tensor:
        """
        KL(q(z, c | pair) || p(z, c)) of each pair, `(batch_size,)`, in nats (VaDE, arXiv 1611.05148, eq. 12; the
        paper's eq. 17 prints its negative).

        Args:
            log_posterior (`torch.Tensor` of shape `(batch_size, num_clusters)`): log gamma.
            mean (`torch.Tensor` of shape `(batch_size, latent_size)`): mu of q(z | pair).
            log_variance (`torch.Tensor` of shape `(batch_size, latent_size)`): log sigma^2 of q(z | pair).
        """
        posterior = log_posterior.exp()
        log_variances = self.log_variances.clamp(_MIN_LOG_VARIANCE, _MAX_LOG_VARIANCE)
        spread = log_variance.exp()[:, None] + (mean[:, None] - self.means).square()  # [B, K, D]
        expected = (log_variances + spread * (-log_variances).exp()).sum(dim=-1)  # [B, K]
        latent_term = 0.5 * (posterior * expected).sum(dim=-1) - 0.5 * (1 + log_variance).sum(dim=-1)
        # gamma log gamma is 0 at gamma = 0; in log space no epsilon is needed
        cluster_term = (posterior * (log_posterior - self.log_weights())).sum(dim=-1)
        return latent_term + cluster_term


class GaVaMoERatingModel(PreTrainedModel):
    """
    VAE-GMM over user-item pairs (section 3.2): it predicts the rating of a pair and the cluster that chooses its gate.

    Users and items are indices from 0; [`POPULATION_ID`] (-1) is anyone not known, whose embedding is learned by
    replacing known ids at random (`vae_id_dropout`). A pair's output never depends on the rest of its batch. The
    computation is in the parameters' own precision, outside autocast: routing must not change with the precision of
    the language model.

    Args:
        config ([`GaVaMoEConfig`]): sizes, likelihood and rating scale.
    """

    config: GaVaMoEConfig
    config_class = GaVaMoEConfig
    base_model_prefix = "rating_model"
    main_input_name = "user_id"
    # Its attention is always torch's own; whatever a language model around it is asked to use, it takes
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(self, config: GaVaMoEConfig):
        super().__init__(config)
        size = config.vae_embedding_size
        self.user_embeddings = nn.Embedding(config.num_users, size)
        self.item_embeddings = nn.Embedding(config.num_items, size)
        self.population_user = nn.Parameter(torch.zeros(size))
        self.population_item = nn.Parameter(torch.zeros(size))
        self.layers = nn.ModuleList(GaVaMoEPairEncoderLayer(config) for _ in range(config.vae_num_layers))
        self.mean_head = nn.Linear(3 * size, config.latent_size)
        self.log_variance_head = nn.Linear(3 * size, config.latent_size)
        num_outputs = len(config.rating_levels) if config.rating_likelihood == "categorical" else 1
        self.decoder_hidden = nn.Linear(config.latent_size, config.vae_decoder_hidden_size)
        self.decoder_output = nn.Linear(config.vae_decoder_hidden_size, num_outputs)
        self.mixture = GaVaMoEGaussianMixture(config)
        # What users have, as the rows of a sparse matrix; neither is there, nor in the file, where nothing is known
        is_known = config.num_interactions > 0
        offsets = torch.zeros(config.num_users + 1, dtype=torch.int64) if is_known else None
        items = torch.zeros(config.num_interactions, dtype=torch.int32) if is_known else None
        self.register_buffer("interaction_offsets", offsets)
        self.register_buffer("interaction_items", items)
        # What a visitor has, for whom the population's user stands
        self.population_items: list[int] = []
        self.post_init()

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "GaVaMoERatingModel":
        """Moves as any module does, but in no lower precision than float32: `model.half()` keeps gates and ratings."""

        def keep_precision(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            if not tensor.is_floating_point() and moved.dtype != tensor.dtype:
                # Item indices, which `model.type(...)` would round
                return tensor.to(moved.device)
            if tensor.is_floating_point() and moved.is_floating_point() and moved.element_size() < 4:
                return tensor.to(moved.device, torch.float32)
            return moved

        return super()._apply(keep_precision, recurse)

    def loaded_device(self) -> torch.device:
        """
        The device of the weights, which are here afterwards: accelerate's hooks bring offloaded weights in `forward`
        alone, and the tables are looked up outside of it.
        """
        if self.population_user.is_meta:
            for module in self.modules():
                hook = getattr(module, "_hf_hook", None)
                if hook is not None and any(tensor.is_meta for tensor in module.parameters(recurse=False)):
                    hook.pre_forward(module)
        return self.population_user.device

    def save_pretrained(self, save_directory: Any, *args, **kwargs) -> None:
        """[`~transformers.PreTrainedModel.save_pretrained`], its weights as readable as its config."""
        super().save_pretrained(save_directory, *args, **kwargs)
        share_weights(save_directory)

    def init_parallel_plans(self) -> None:
        """None: the config's plans are the decoder's, and every process keeps the whole rating model."""
        self._tp_plan, self._ep_plan, self._pp_plan, self._fsdp_plan = {}, {}, {}, {}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            init.xavier_uniform_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            # Small: what the tables hold should come from the ratings, not from the draw, or clusters follow noise
            init.normal_(module.weight, mean=0.0, std=_TABLE_STD)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, GaVaMoEGaussianMixture):
            init.zeros_(module.logits)
            init.normal_(module.means, mean=0.0, std=1.0)
            init.zeros_(module.log_variances)
        elif isinstance(module, GaVaMoERatingModel):
            init.zeros_(module.population_user)
            init.zeros_(module.population_item)
            if module.interaction_items is not None:
                init.zeros_(module.interaction_offsets)
                init.zeros_(module.interaction_items)

    def embed(self, user_id: torch.Tensor, item_id: torch.Tensor) -> torch.Tensor:
        """The embeddings of the pairs' users and items, `(batch_size, 2, vae_embedding_size)`."""
        self.loaded_device()
        self.check_ids(user_id, item_id)
        user = self.user_embeddings(user_id.clamp(min=0))
        item = self.item_embeddings(item_id.clamp(min=0))
        user = torch.where(user_id[:, None] < 0, self.population_user, user)
        item = torch.where(item_id[:, None] < 0, self.population_item, item)
        return torch.stack([user, item], dim=1)

    def encode(self, pair_embeddings: torch.Tensor, dropout: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
        """
        q(z | pair) (eq. 1).

        Args:
            pair_embeddings (`torch.Tensor` of shape `(batch_size, 2, vae_embedding_size)`): from [`~embed`].
            dropout (`float`, *optional*, defaults to 0.0): Dropout probability.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: mu and log sigma^2, `(batch_size, latent_size)` each.
        """
        hidden_states = F.dropout(pair_embeddings, dropout, training=dropout > 0)
        for layer in self.layers:
            hidden_states = layer(hidden_states, dropout)
        user, item = hidden_states.unbind(dim=1)
        # The product makes who-likes-what linear in the heads; scaled, since it is tiny while embeddings are small
        product = user * item * math.sqrt(user.shape[-1])
        hidden_states = torch.cat([user, item, product], dim=-1)  # [B, 3E]
        log_variance = self.log_variance_head(hidden_states).clamp(_MIN_LOG_VARIANCE, _MAX_LOG_VARIANCE)
        return self.mean_head(hidden_states), log_variance

    def decode(self, latent: torch.Tensor, dropout: float = 0.0) -> torch.Tensor:
        """Rating logits (eq. 3) of latents `(batch_size, latent_size)`."""
        hidden_states = F.gelu(self.decoder_hidden(latent))
        return self.decoder_output(F.dropout(hidden_states, dropout, training=dropout > 0))

    def expected_rating(self, rating_logits: torch.Tensor) -> torch.Tensor:
        """Expected rating `(batch_size,)` on the rating scale."""
        levels = torch.tensor(self.config.rating_levels, device=rating_logits.device, dtype=rating_logits.dtype)
        if self.config.rating_likelihood == "categorical":
            return rating_logits.softmax(dim=-1) @ levels
        return levels[0] + rating_logits.sigmoid().squeeze(-1) * (levels[-1] - levels[0])

    def reconstruction_loss(self, rating_logits: torch.Tensor, rating: torch.Tensor) -> torch.Tensor:
        """-log p(rating | z) of each pair, `(batch_size,)`, in nats; `rating` `(batch_size,)` on the rating scale."""
        levels = torch.tensor(self.config.rating_levels, device=rating.device, dtype=rating_logits.dtype)
        rating = rating.to(rating_logits.dtype)
        if self.config.rating_likelihood == "categorical":
            distance = (rating[:, None] - levels).abs()
            return F.cross_entropy(rating_logits, distance.argmin(dim=-1), reduction="none")
        target = (rating - levels[0]) / (levels[-1] - levels[0])
        return F.binary_cross_entropy_with_logits(rating_logits.squeeze(-1), target, reduction="none")

    def drop_ids(self, user_id: torch.Tensor, item_id: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Replaces ids by the population with probability `vae_id_dropout` while the model trains and is not frozen."""
        probability = self.config.vae_id_dropout
        is_frozen = not self.user_embeddings.weight.requires_grad
        if not self.training or probability == 0 or is_frozen:
            return user_id, item_id
        drop_user, drop_item = torch.rand(2, len(user_id), device=user_id.device) < probability
        return user_id.masked_fill(drop_user, POPULATION_ID), item_id.masked_fill(drop_item, POPULATION_ID)

    def route(self, pair_embeddings: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        The gate of each pair (eq. 9), at z = mu and without dropout, so that a pair always takes the same gate.

        Args:
            pair_embeddings (`torch.Tensor` of shape `(batch_size, 2, vae_embedding_size)`): from [`~embed`].

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: the gate's index `(batch_size,)` and the cluster posterior
            `(batch_size, num_clusters)`.
        """
        with torch.no_grad(), torch.autocast(pair_embeddings.device.type, enabled=False):
            mean, _ = self.encode(pair_embeddings)
            posterior = self.mixture.log_posterior(mean).exp()
        return posterior.argmax(dim=-1), posterior

    def forward(
        self,
        user_id: torch.LongTensor | None = None,
        item_id: torch.LongTensor | None = None,
        rating: torch.Tensor | None = None,
        pair_embeddings: torch.Tensor | None = None,
        sample_latent: bool | None = None,
        beta: float | None = None,
        dropout: float | None = None,
        cluster_target: torch.Tensor | None = None,
        **kwargs,
    ) -> GaVaMoERatingOutput:
        """
        Args:
            user_id (`torch.LongTensor` of shape `(batch_size,)`): User indices; -1 for anyone not known.
            item_id (`torch.LongTensor` of shape `(batch_size,)`): Item indices; -1 for anything not known.
            rating (`torch.Tensor` of shape `(batch_size,)`, *optional*):
                Ratings on the rating scale; the loss is computed when given.
            pair_embeddings (`torch.Tensor` of shape `(batch_size, 2, vae_embedding_size)`, *optional*):
                Instead of the ids, embeddings from [`~embed`].
            sample_latent (`bool`, *optional*, defaults to the training mode):
                Whether z is sampled (eq. 2) rather than set to mu.
            beta (`float`, *optional*, defaults to `config.beta`): Weight of the KL term.
            dropout (`float`, *optional*, defaults to `config.vae_dropout` in training mode): Dropout probability.
            cluster_target (`torch.Tensor` of shape `(batch_size, num_clusters)`, *optional*):
                Cluster probabilities of the pairs' users; `cluster_loss` is computed when given.

        Returns:
            [`GaVaMoERatingOutput`]

        Raises:
            `IndexError`: for an id outside the tables.
        """
        if pair_embeddings is None:
            pair_embeddings = self.embed(*self.drop_ids(user_id, item_id))
        sample_latent = self.training if sample_latent is None else sample_latent
        beta = self.config.beta if beta is None else beta
        if dropout is None:
            dropout = self.config.vae_dropout if self.training else 0.0
        with torch.autocast(pair_embeddings.device.type, enabled=False):
            mean, log_variance = self.encode(pair_embeddings, dropout)
            latent = mean
            if sample_latent:
                latent = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
            logits = self.decode(latent, dropout)
            log_posterior = self.mixture.log_posterior(latent)
            loss = reconstruction_loss = kl_loss = cluster_loss = None
            if cluster_target is not None:
                cluster_loss = -(cluster_target * log_posterior).sum(dim=-1).mean()
            if rating is not None:
                reconstruction_loss = self.reconstruction_loss(logits, rating).mean()
                kl_loss = self.mixture.kl_divergence(log_posterior, mean, log_variance).mean()
                loss = reconstruction_loss + beta * kl_loss
            predicted_rating = self.expected_rating(logits)
        return GaVaMoERatingOutput(
            loss=loss,
            reconstruction_loss=reconstruction_loss,
            kl_loss=kl_loss,
            cluster_loss=cluster_loss,
            rating_logits=logits,
            predicted_rating=predicted_rating,
            cluster_posterior=log_posterior.exp(),
            latent_mean=mean,
            latent_log_variance=log_variance,
        )

    @torch.no_grad()
    def predict(self, user_id: torch.LongTensor, item_id: torch.LongTensor) -> GaVaMoERatingOutput:
        """The output for pairs at z = mu, without dropout or sampling whatever the mode; ids as for `forward`."""
        pair_embeddings = self.embed(user_id, item_id)
        with torch.autocast(pair_embeddings.device.type, enabled=False):
            mean, log_variance = self.encode(pair_embeddings)
            logits = self.decode(mean)
            predicted_rating = self.expected_rating(logits)
            posterior = self.mixture.log_posterior(mean).exp()
            is_finite = predicted_rating.isfinite() & posterior.isfinite().all(dim=-1)
            if not (torch.compiler.is_compiling() or mean.is_meta or is_finite.all()):
                raise ValueError(
                    f"Expected ratings and clusters that are numbers, but those of {(~is_finite).sum()} of "
                    f"{len(is_finite)} pairs are NaN or infinite: the rating model's weights are broken. Load another "
                    "checkpoint, or train again with a lower learning rate."
                )
            return GaVaMoERatingOutput(
                rating_logits=logits,
                predicted_rating=predicted_rating,
                cluster_posterior=posterior,
                latent_mean=mean,
                latent_log_variance=log_variance,
            )

    @torch.no_grad()
    def grow_table(self, kind: str, rows: torch.Tensor) -> None:
        """
        Appends rows to the user or item table, in its precision, and counts them in the config: in `num_users`, or
        `num_items`, and in `num_added_users`, or `num_added_items`, which tells them from those that training learned.
        Known ids keep their rows and indices. An optimiser made before holds the old table.

        Args:
            kind (`str`): `"user"` or `"item"`.
            rows (`torch.Tensor` of shape `(num_rows, vae_embedding_size)`): The new rows, in the order of their ids.
        """
        table = self.user_embeddings if kind == "user" else self.item_embeddings
        weight = torch.cat([table.weight, rows.to(table.weight)])
        table.weight = nn.Parameter(weight, requires_grad=table.weight.requires_grad)
        table.num_embeddings = len(weight)
        if kind == "user" and self.interaction_offsets is not None:
            offsets = self.interaction_offsets
            self.interaction_offsets = torch.cat([offsets, offsets[-1:].expand(len(rows))])
        for name in (f"num_{kind}s", f"num_added_{kind}s"):
            setattr(self.config, name, getattr(self.config, name) + len(rows))

    def interactions(self) -> tuple[torch.LongTensor, torch.LongTensor]:
        """Users and items of the pairs that [`~set_interactions`] kept, `(num_interactions,)` each, in their order."""
        device = self.loaded_device()
        if self.interaction_items is None:
            return torch.zeros(2, 0, dtype=torch.long, device=device).unbind()
        position = torch.arange(len(self.interaction_items), device=self.interaction_items.device)
        user_id = torch.searchsorted(self.interaction_offsets, position, right=True) - 1
        return user_id, self.interaction_items.long()

    def set_interactions(self, user_id: torch.Tensor | Sequence[int], item_id: torch.Tensor | Sequence[int]) -> None:
        """
        Keeps which items each user has, in place of what was kept before. Pairs that come twice are kept once; without
        any, nothing is known of anybody.

        Args:
            user_id (`torch.LongTensor` of shape `(num_pairs,)`): User indices.
            item_id (`torch.LongTensor` of shape `(num_pairs,)`): The items' indices. Pairs with the population (-1) are
                left out.

        Raises:
            `ValueError`: unless there is one user for each item; `IndexError`: for an id outside the tables.
        """
        device = self.loaded_device()
        ids = [
            torch.as_tensor(ids if isinstance(ids, torch.Tensor) else to_python(ids), device=device)
            for ids in (user_id, item_id)
        ]
        if any(len(one) and (one.is_floating_point() or one.dtype == torch.bool) for one in ids) or not (
            ids[0].ndim == 1 and ids[0].shape == ids[1].shape
        ):
            got = " and ".join(f"{one.dtype} of shape {tuple(one.shape)}" for one in ids)
            raise ValueError(f"Expected the index of a user and that of an item for each pair, but got {got}.")
        user_id, item_id = (one.long() for one in ids)
        self.check_ids(user_id, item_id)
        is_known = (user_id >= 0) & (item_id >= 0)
        num_items = self.config.num_items
        pairs = (user_id * num_items + item_id)[is_known].unique()  # by user, then by item
        self.config.num_interactions = len(pairs)
        self.interaction_offsets = self.interaction_items = None
        if len(pairs):
            counts = (pairs // num_items).bincount(minlength=self.config.num_users)
            self.interaction_offsets = F.pad(counts.cumsum(dim=0), (1, 0))
            self.interaction_items = (pairs % num_items).to(torch.int32)

    def known_items(self, user_id: int) -> list[int]:
        """Indices of the items that a user is known to have, ascending; those of a visitor for the population (-1)."""
        if user_id < 0:
            return self.population_items
        self.loaded_device()
        if self.interaction_items is None:
            return []
        first, end = self.interaction_offsets[user_id : user_id + 2].tolist()
        return self.interaction_items[first:end].tolist()

    @torch.no_grad()
    def resize_mixture(self, num_clusters: int) -> None:
        """Puts an untrained mixture of another number of components in place of the present one."""
        device, dtype = self.mixture.means.device, self.mixture.means.dtype
        self.config.num_clusters = num_clusters
        self.mixture = GaVaMoEGaussianMixture(self.config).to(device, dtype)
        self._init_weights(self.mixture)

    def check_ids(self, user_id: torch.Tensor, item_id: torch.Tensor) -> None:
        """Raises `IndexError` for an id outside the tables, naming it, the known range and the remedy."""
        if torch.compiler.is_compiling() or user_id.is_meta:
            return
        for name, ids, count in (
            ("user_id", user_id, self.config.num_users),
            ("item_id", item_id, self.config.num_items),
        ):
            outside = (ids < POPULATION_ID) | (ids >= count)
            if outside.any():
                raise IndexError(
                    f"`{name}` {ids[outside][0].item()} is out of range: this model knows 0 to {count - 1} "
                    f"({count} in all). Look raw ids up with the checkpoint's processor, or pass {POPULATION_ID} for "
                    "one that is not known."
                )


__all__ = ["POPULATION_ID", "GaVaMoERatingModel", "GaVaMoERatingOutput"]
