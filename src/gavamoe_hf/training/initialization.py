"""What the rating model starts from: statistics of the training ratings, and clusters of users."""

from __future__ import annotations

import logging

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.metrics import silhouette_score

from ..evaluation.predict import predict_pairs
from ..vae_gmm_gavamoe import GaVaMoERatingModel

logger = logging.getLogger(__name__)

# Floors of the initial variances and weights, so that no component starts as a point or without mass.
_VARIANCE_FLOOR = 1e-4
_WEIGHT_FLOOR = 1e-3
_BATCH_SIZE = 8192

# Scale of the biases that tables start with: a bias of a tenth of the rating scale is about one unit, well above the
# random start, so that it is what the encoder sees first.
_BIAS_SCALE = 12.0

# Ratings by which biases are shrunken
_SHRINKAGE = 10.0

# Items, and principal components of their predicted ratings, by which users are compared
_PROFILE_ITEMS, _PROFILE_COMPONENTS = 64, 8
# Decimals to which profiles are the same, in stars
_PROFILE_DECIMALS = 5

# The most clusters that are tried where their number is chosen, and the users that judge it (Yelp's would need 6 GB)
MAX_CHOSEN_CLUSTERS, _SILHOUETTE_USERS = 8, 5000


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
    Writes each user's and item's bias, shrunken as in [`~gavamoe_hf.evaluation.BiasBaseline`], into the first column of
    its table. On sparse ratings the encoder otherwise learns rows by heart before it learns what a bias is.

    Args:
        model ([`GaVaMoERatingModel`]): Untrained model.
        user_id (`torch.LongTensor` of shape `(num_pairs,)`): Users of the training pairs.
        item_id (`torch.LongTensor` of shape `(num_pairs,)`): Items of the training pairs.
        rating (`torch.FloatTensor` of shape `(num_pairs,)`): Their ratings.
    """
    for table, ids, deviation in _deviations(model, user_id, item_id, rating):
        count = torch.bincount(ids, minlength=len(table))
        total = torch.bincount(ids, weights=deviation, minlength=len(table))
        table[:, 0] = (total / (count + _SHRINKAGE)).to(table)


@torch.no_grad()
def leave_one_out_offsets(
    model: GaVaMoERatingModel, user_id: torch.Tensor, item_id: torch.Tensor, rating: torch.Tensor
) -> torch.Tensor:
    """
    What to add to the first column of each training pair's embeddings so that the biases are those without its rating.

    A pair's own rating is part of the biases that [`initialize_tables`] writes. A model that is fitted to them learns
    to trust them far more than a pair that is not in them warrants.

    Args: those of [`initialize_tables`].

    Returns:
        `torch.FloatTensor` of shape `(num_pairs, 2)`: for user and item.
    """
    offsets = []
    for table, ids, deviation in _deviations(model, user_id, item_id, rating):
        count = torch.bincount(ids, minlength=len(table))[ids]
        total = torch.bincount(ids, weights=deviation, minlength=len(table))[ids]
        offsets.append((total - deviation) / (count - 1 + _SHRINKAGE) - total / (count + _SHRINKAGE))
    return torch.stack(offsets, dim=1).float()


def leave_one_out_embeddings(
    model: GaVaMoERatingModel, user_id: torch.Tensor, item_id: torch.Tensor, offset: torch.Tensor
) -> torch.Tensor:
    """
    The embeddings `(num_pairs, 2, vae_embedding_size)` of training pairs, their biases without their own ratings;
    `offset` `(num_pairs, 2)` is from [`leave_one_out_offsets`].
    """
    embeddings = model.embed(user_id, item_id)
    first_column = F.one_hot(torch.zeros_like(user_id), embeddings.shape[-1])  # [B, E]
    return embeddings + offset[..., None] * first_column[:, None]


@torch.no_grad()
def leave_one_out_logits(
    model: GaVaMoERatingModel, user_id: torch.Tensor, item_id: torch.Tensor, offset: torch.Tensor
) -> torch.Tensor:
    """
    The rating logits of training pairs as [`leave_one_out_embeddings`] shows them, at z = mu and without dropout: on
    the CPU, `(num_pairs, num_levels)`.
    """
    device = model.population_user.device
    chunks = zip(*(column.split(_BATCH_SIZE) for column in (user_id, item_id, offset)), strict=True)
    logits = []
    for chunk in chunks:
        embeddings = leave_one_out_embeddings(model, *(column.to(device) for column in chunk))
        logits.append(model.decode(model.encode(embeddings)[0]).cpu())
    return torch.cat(logits)


def _deviations(
    model: GaVaMoERatingModel, user_id: torch.Tensor, item_id: torch.Tensor, rating: torch.Tensor
) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """
    For users and items: table, ids and what each rating adds to its bias, `(num_pairs,)`: the deviation from the mean
    for items, and from mean and item bias for users, as in [`~gavamoe_hf.evaluation.BiasBaseline`].
    """
    levels = model.config.rating_levels
    deviation = (rating.double() - rating.double().mean()) * _BIAS_SCALE / (levels[-1] - levels[0])
    count = torch.bincount(item_id, minlength=model.config.num_items)
    total = torch.bincount(item_id, weights=deviation, minlength=model.config.num_items)
    item_bias = total / (count + _SHRINKAGE)
    return [
        (model.user_embeddings.weight, user_id, deviation - item_bias[item_id]),
        (model.item_embeddings.weight, item_id, deviation),
    ]


@torch.no_grad()
def initialize_mixture(
    model: GaVaMoERatingModel,
    user_id: torch.Tensor,
    item_id: torch.Tensor,
    seed: int = 0,
    num_init: int = 5,
    profiles: np.ndarray | None = None,
) -> torch.Tensor:
    """
    Finds clusters of users and initialises the mixture from them.

    The paper fits the mixture to the pairs' latent means. A latent that only has to rebuild the rating tells little
    but the rating, so that such clusters are levels of the rating (adjusted Rand index about 0 with planted groups of
    users). A preference belongs to a user: here k-means groups the training users by what they would rate a sample of
    items, as the model so far predicts it, and each component takes mean, variance and weight from the latent means of
    its users' pairs. The encoder starts with the variance of the components.

    Args:
        model ([`GaVaMoERatingModel`]): Model after the autoencoder phase; its mixture and its variance head are set.
        user_id (`torch.LongTensor` of shape `(num_pairs,)`): Users of the training pairs.
        item_id (`torch.LongTensor` of shape `(num_pairs,)`): Items of the training pairs.
        seed (`int`, *optional*, defaults to 0): Seed of the fit.
        num_init (`int`, *optional*, defaults to 5): Starts, of which the tightest clustering is taken.
        profiles (`np.ndarray`, *optional*): From [`user_profiles`], of `user_id.unique()`; computed if not given.

    Returns:
        `torch.Tensor` of shape `(num_users, num_clusters)`: the cluster of each user, as probabilities; uniform for a
        user without training pairs.

    Raises:
        `ValueError`: where the users differ in fewer ways than there are clusters.
    """
    num_clusters, device = model.config.num_clusters, model.population_user.device
    users = user_id.unique()
    profiles = user_profiles(model, users, seed) if profiles is None else profiles
    responsibilities = _cluster_users(model, users, profiles, seed, num_init)
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


@torch.no_grad()
def write_cluster_code(model: GaVaMoERatingModel, responsibilities: torch.Tensor) -> None:
    """
    Adds each user's cluster, as a one-hot code less its mean, to the columns of the user table after the first.

    The encoder then reads a cluster off the table. It would otherwise have to learn each user's by heart, in layers
    that the rating goes through as well.

    Args:
        model ([`GaVaMoERatingModel`]): Model whose user table is written to.
        responsibilities (`torch.Tensor` of shape `(num_users, num_clusters)`): From [`initialize_mixture`].
    """
    table = model.user_embeddings.weight
    code = responsibilities - responsibilities.mean(dim=0)
    table[:, 1 : 1 + code.shape[1]] += code.to(table)


def choose_num_clusters(profiles: np.ndarray, seed: int = 0, num_init: int = 5) -> tuple[int, dict[int, float]]:
    """
    The number of clusters of users, 2 to 8, whose k-means clustering has the largest mean silhouette (Rousseeuw, 1987):
    how much closer users are to their own cluster than to the next, by what they would rate a sample of items.

    Args:
        profiles (`np.ndarray` of shape `(num_users, num_components)`): From [`user_profiles`].
        seed (`int`, *optional*, defaults to 0): Seed of the fits and, of many users, the sample.
        num_init (`int`, *optional*, defaults to 5): Starts of each fit.

    Returns:
        `tuple[int, dict[int, float]]`: the number, and the silhouette, -1 to 1, of each that was tried.

    Raises:
        `ValueError`: where fewer than three users differ in what they would rate.
    """
    distinct = _num_distinct(profiles)
    if distinct < 3:
        raise ValueError(
            f"Expected at least three users that differ in what they would rate, to choose a number of clusters, but "
            f"got {distinct} of {len(profiles)}. Set `num_clusters` to a number."
        )
    sample_size = min(len(profiles), _SILHOUETTE_USERS)
    silhouettes = {}
    for num_clusters in range(2, min(MAX_CHOSEN_CLUSTERS, distinct - 1) + 1):
        labels = KMeans(num_clusters, n_init=num_init, random_state=seed).fit_predict(profiles)
        score = silhouette_score(profiles, labels, sample_size=sample_size, random_state=seed)
        silhouettes[num_clusters] = float(score)
    return max(silhouettes, key=silhouettes.__getitem__), silhouettes


def _cluster_users(
    model: GaVaMoERatingModel, users: torch.Tensor, profiles: np.ndarray, seed: int, num_init: int
) -> torch.Tensor:
    num_clusters, distinct = model.config.num_clusters, _num_distinct(profiles)
    if distinct < num_clusters:
        raise ValueError(
            f"Expected users that differ in what they would rate in at least {num_clusters} ways, one for each "
            f"cluster, but got {distinct} of {len(users)} users. Lower `num_clusters` to {distinct}."
        )
    # Not a mixture, which gives the few users far from a crowded middle a component of their own
    labels = KMeans(num_clusters, n_init=num_init, random_state=seed).fit_predict(profiles)
    probabilities = F.one_hot(torch.from_numpy(labels).long(), num_clusters).float()
    responsibilities = torch.full((model.config.num_users, num_clusters), 1 / num_clusters)
    responsibilities[users] = probabilities
    return responsibilities


def _num_distinct(profiles: np.ndarray) -> int:
    return len(np.unique(profiles.round(_PROFILE_DECIMALS), axis=0))


@torch.no_grad()
def user_profiles(model: GaVaMoERatingModel, users: torch.Tensor, seed: int = 0) -> np.ndarray:
    """
    Principal components of what users would rate a sample of items, by which they are compared. It takes a prediction
    for each user and item of the sample, more than an epoch of sparse ratings.

    Args:
        model ([`GaVaMoERatingModel`]): Model after the autoencoder phase.
        users (`torch.LongTensor` of shape `(num_users,)`): The users.
        seed (`int`, *optional*, defaults to 0): Seed of the sample.

    Returns:
        `np.ndarray` of shape `(num_users, num_components)`
    """
    items = torch.randperm(model.config.num_items, generator=torch.Generator().manual_seed(seed))[:_PROFILE_ITEMS]
    device = model.population_user.device
    rows = []
    for chunk in users.split(max(1, _BATCH_SIZE // len(items))):
        pairs = chunk.repeat_interleave(len(items)).to(device), items.repeat(len(chunk)).to(device)
        rows.append(model.predict(*pairs).predicted_rating.view(len(chunk), -1).double().cpu())
    ratings = torch.cat(rows).numpy()
    return PCA(min(_PROFILE_COMPONENTS, *ratings.shape), random_state=seed).fit_transform(ratings)
