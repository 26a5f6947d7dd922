"""What the rating model starts from: statistics of the training ratings, and clusters of users."""

from __future__ import annotations

import logging

import numpy as np
import torch
from sklearn.mixture import GaussianMixture

from ..evaluation.baselines import BiasBaseline
from ..vae_gmm_gavamoe import GaVaMoERatingModel, GaVaMoERatingOutput

logger = logging.getLogger(__name__)

# Floors of the initial variances and weights, so that no component starts as a point or without mass.
_VARIANCE_FLOOR = 1e-4
_WEIGHT_FLOOR = 1e-3
_BATCH_SIZE = 8192

# Scale of the biases that tables start with: a bias of a tenth of the rating scale is about one unit, well above the
# random start, so that it is what the encoder sees first.
_BIAS_SCALE = 12.0


@torch.no_grad()
def predict_pairs(model: GaVaMoERatingModel, user_id: torch.Tensor, item_id: torch.Tensor) -> GaVaMoERatingOutput:
    """[`GaVaMoERatingModel.predict`] over many pairs, in chunks, on the CPU."""
    device = model.population_user.device
    chunks = [
        model.predict(users.to(device), items.to(device))
        for users, items in zip(user_id.split(_BATCH_SIZE), item_id.split(_BATCH_SIZE), strict=True)
    ]
    return GaVaMoERatingOutput(**{name: torch.cat([chunk[name].cpu() for chunk in chunks]) for name in chunks[0]})


def cluster_shares(model: GaVaMoERatingModel, user_id: torch.Tensor, item_id: torch.Tensor) -> np.ndarray:
    """Share of the pairs in each cluster, `(num_clusters,)`, at z = mu."""
    clusters = predict_pairs(model, user_id, item_id).cluster_posterior.argmax(dim=-1)
    return np.bincount(clusters.numpy(), minlength=model.config.num_clusters) / len(clusters)


@torch.no_grad()
def initialize_decoder_bias(model: GaVaMoERatingModel, rating: torch.Tensor) -> None:
    """Starts the rating decoder at the marginal distribution of the training ratings (categorical likelihood)."""
    if model.config.rating_likelihood != "categorical":
        return
    levels = torch.tensor(model.config.rating_levels)
    counts = torch.bincount((rating[:, None] - levels).abs().argmin(dim=-1), minlength=len(levels))
    # One pseudo-count for each level: a level that train lacks is unlikely, not impossible
    frequencies = (counts + 1) / (counts + 1).sum()
    model.decoder_output.bias.copy_(frequencies.log())


@torch.no_grad()
def initialize_tables(
    model: GaVaMoERatingModel, user_id: torch.Tensor, item_id: torch.Tensor, rating: torch.Tensor
) -> None:
    """
    Writes each user's and item's shrunken bias ([`~gavamoe_hf.evaluation.BiasBaseline`]) into the first column of its
    table. On sparse ratings the encoder otherwise learns rows by heart before it learns what a bias is.

    Args:
        model ([`GaVaMoERatingModel`]): Untrained model.
        user_id (`torch.LongTensor` of shape `(num_pairs,)`): Users of the training pairs.
        item_id (`torch.LongTensor` of shape `(num_pairs,)`): Items of the training pairs.
        rating (`torch.FloatTensor` of shape `(num_pairs,)`): Their ratings.
    """
    levels = model.config.rating_levels
    baseline = BiasBaseline().fit(user_id.tolist(), item_id.tolist(), rating.tolist())
    nobody = [None]
    for table, predict in (
        (model.user_embeddings.weight, lambda ids: baseline.predict(ids, nobody * len(ids))),
        (model.item_embeddings.weight, lambda ids: baseline.predict(nobody * len(ids), ids)),
    ):
        biases = torch.from_numpy(predict(list(range(len(table)))) - baseline.mean_)
        table[:, 0] = (biases * _BIAS_SCALE / (levels[-1] - levels[0])).to(table)


@torch.no_grad()
def initialize_mixture(
    model: GaVaMoERatingModel, user_id: torch.Tensor, item_id: torch.Tensor, seed: int = 0, num_init: int = 5
) -> torch.Tensor:
    """
    Finds clusters of users and initialises the mixture from them.

    The paper fits the mixture to the pairs' latent means. A latent that only has to rebuild the rating tells little
    but the rating, so that such clusters are levels of the rating (adjusted Rand index about 0 with planted groups of
    users). A preference belongs to a user: here a diagonal-covariance mixture is fitted to the embeddings of the
    training users, as the autoencoder phase has learned them, and each component takes mean, variance and weight from
    the latent means of its users' pairs. The encoder starts with the variance of the components.

    Args:
        model ([`GaVaMoERatingModel`]): Model after the autoencoder phase; its mixture and its variance head are set.
        user_id (`torch.LongTensor` of shape `(num_pairs,)`): Users of the training pairs.
        item_id (`torch.LongTensor` of shape `(num_pairs,)`): Items of the training pairs.
        seed (`int`, *optional*, defaults to 0): Seed of the fit.
        num_init (`int`, *optional*, defaults to 5): Starts, of which the likeliest fit is taken.

    Returns:
        `torch.Tensor` of shape `(num_users, num_clusters)`: cluster probabilities of each user; uniform for a user
        without training pairs.

    Raises:
        `ValueError`: with fewer users than clusters.
    """
    num_clusters, device = model.config.num_clusters, model.population_user.device
    responsibilities = _cluster_users(model, user_id.unique(), seed, num_init)
    latent = predict_pairs(model, user_id, item_id).latent_mean
    component = responsibilities.argmax(dim=-1)[user_id]  # of each pair
    weights = torch.empty(num_clusters)
    for cluster in range(num_clusters):
        members = latent[component == cluster]
        weights[cluster] = max(len(members) / len(latent), _WEIGHT_FLOOR)
        if len(members) == 0:
            members = latent
        model.mixture.means[cluster] = members.mean(dim=0).to(device)
        variance = members.var(dim=0, correction=0).clamp(min=_VARIANCE_FLOOR)
        model.mixture.log_variances[cluster] = variance.log().to(device)
    model.mixture.logits.copy_(weights.log())
    model.log_variance_head.weight.zero_()
    model.log_variance_head.bias.copy_(model.mixture.log_variances.mean(dim=0))
    logger.info("Mixture initialised with weights %s", [round(weight, 3) for weight in weights.tolist()])
    return responsibilities


def _cluster_users(model: GaVaMoERatingModel, users: torch.Tensor, seed: int, num_init: int) -> torch.Tensor:
    num_clusters = model.config.num_clusters
    if len(users) < num_clusters:
        raise ValueError(
            f"Expected at least as many users as clusters, but got {len(users)} users for {num_clusters} clusters. "
            "Lower `num_clusters`."
        )
    # Not the first column, which started as the user's bias: clusters are of what users like, not of how they rate
    embeddings = model.user_embeddings.weight[users.to(model.user_embeddings.weight.device), 1:].double().cpu()
    embeddings = embeddings - embeddings.mean(dim=0)
    # Embeddings have no natural scale: the floor of the fit's variances is taken relative to their spread
    embeddings = embeddings / embeddings.std().clamp(min=1e-12)
    fit = GaussianMixture(num_clusters, covariance_type="diag", n_init=num_init, random_state=seed, reg_covar=1e-2)
    probabilities = torch.from_numpy(fit.fit(embeddings.numpy()).predict_proba(embeddings.numpy())).float()
    responsibilities = torch.full((model.config.num_users, num_clusters), 1 / num_clusters)
    responsibilities[users] = probabilities
    return responsibilities
