"""
Ranking metrics of a recommender: leave-one-out hit ratio and NDCG, among sampled negatives and among all items.

Arrays: U users of the tables, N items of the tables, B users ranked at once.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from scipy.sparse import csr_matrix

from .baselines import BiasBaseline, MatrixFactorizationBaseline

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

# Scores of pairs, each `(num_pairs,)`, from the indices of their users and items: higher is recommended first.
Scorer = Callable[[np.ndarray, np.ndarray], np.ndarray]

# Pairs scored at once, which bounds the memory
_CHUNK_SIZE = 2**20


def ranking_scores(
    records: "Mapping[str, Dataset]",
    scorer: Scorer,
    users: Sequence[str],
    items: Sequence[str],
    *,
    split: str = "test",
    k: int = 10,
    num_negatives: int = 100,
    min_rating: float | None = None,
    max_users: int | None = None,
    seed: int = 0,
) -> dict[str, float]:
    """
    Leave-one-out ranking of a scorer, beside popularity, the bias model and matrix factorisation.

    For each user of the split one record is held out: the latest, where the split has a column `timestamp`, else one
    drawn at random. Its item is ranked

    - `sampled`: among `num_negatives` items drawn at random of those that the user has in no split (all of them where
      there are fewer), as in NCF (arXiv 1708.05031). Figures are much higher than among all items: chance alone gives
      an HR of k / (num_negatives + 1), 0.099;
    - `full`: among all items except those that the user has in the splits before this one: train, and validation where
      test is ranked. Other held-out items of the user stay in and compete.

    HR is the share of users whose item is among the first k; NDCG weighs it by 1 / log2(rank + 1). Where scores are
    equal, both are the expectation over a random order of these items: a constant scorer gets what chance would.

    A model that is trained to predict ratings is not trained to rank: it learns how much a user likes what the user
    chose to rate, not what the user chooses. Popularity is often ahead of it here, and so are models for implicit
    feedback.

    Args:
        records (`Mapping[str, Dataset]`):
            The splits train, validation and test, with the columns user, item and rating.
        scorer (`Callable[[np.ndarray, np.ndarray], np.ndarray]`):
            Scores of pairs given as indices into `users` and `items`, such as [`rating_scorer`] makes of a model.
        users (`Sequence[str]`):
            Raw user ids in the order of the scorer's indices, such as `processor.users`.
        items (`Sequence[str]`):
            Raw item ids in the order of the scorer's indices, such as `processor.items`: the items that are ranked.
        split (`str`, *optional*, defaults to `"test"`):
            The split whose records are held out, `"validation"` or `"test"`.
        k (`int`, *optional*, defaults to 10):
            Length of the list.
        num_negatives (`int`, *optional*, defaults to 100):
            Negatives drawn for each user.
        min_rating (`float`, *optional*):
            Rating from which on a record may be held out, such as `processor.positive_rating_threshold`: users without
            one are left out. Any record counts if not given, as is common for implicit feedback.
        max_users (`int`, *optional*):
            Users ranked at most, drawn at random; all if not given.
        seed (`int`, *optional*, defaults to 0):
            Seed of what is drawn. The baselines are ranked on the same draw.

    Returns:
        `dict[str, float]`: `hr_10_sampled`, `ndcg_10_sampled`, `hr_10_full` and `ndcg_10_full` from 0 to 1, for another
        `k` with that number; and the same with the prefixes `baseline_popularity_` (number of training records),
        `baseline_bias_` ([`BiasBaseline`]) and `baseline_mf_` ([`MatrixFactorizationBaseline`]).

    Raises:
        `ValueError`: For options that do not fit, an id that is not in the tables, a split without a record to hold
            out, or scores that are not finite.
        `ImportError`: If scikit-surprise is missing.
    """
    if split not in ("validation", "test") or min(k, num_negatives, 1 if max_users is None else max_users) < 1:
        raise ValueError(
            'expected split "validation" or "test" and `k`, `num_negatives` and `max_users` of at least 1, but got '
            f"split={split!r}, k={k}, num_negatives={num_negatives}, max_users={max_users}."
        )
    pairs = {name: _pair_indices(records[name], name, users, items) for name in ("train", "validation", "test")}
    shape = (len(users), len(items))
    earlier = ["train"] if split == "validation" else ["train", "validation"]
    known = _interactions([pairs[name] for name in earlier], shape)
    interacted = _interactions(list(pairs.values()), shape)
    rng = np.random.default_rng(seed)
    ranked_users, held_out = _hold_out(records[split], pairs[split], known, min_rating, max_users, rng)
    logger.info("Ranking the held-out items of %d users among %d items", len(ranked_users), len(items))

    scorers = {"": scorer, **_baseline_scorers(records, pairs, len(items))}
    counts: dict[str, list[np.ndarray]] = {prefix: [] for prefix in scorers}
    size = max(1, _CHUNK_SIZE // len(items))
    for start in range(0, len(ranked_users), size):
        chunk = slice(start, start + size)
        user, positive = ranked_users[chunk], held_out[chunk]
        among = {
            "sampled": _draw_negatives(interacted[user].toarray(), num_negatives, rng),
            "full": ~known[user].toarray(),
        }
        for prefix, score in scorers.items():
            scores = _score_all(score, user, len(items))
            counts[prefix].append(np.stack([_count(scores, positive, candidates) for candidates in among.values()]))
    metrics = {}
    for prefix, parts in counts.items():
        for name, (higher, tied) in zip(among, np.concatenate(parts, axis=-1), strict=True):
            hit_ratio, ndcg = expected_hit_ratio_and_ndcg(higher, tied, k)
            metrics[f"{prefix}hr_{k}_{name}"], metrics[f"{prefix}ndcg_{k}_{name}"] = hit_ratio, ndcg
    return metrics


def rating_scorer(model: Any, batch_size: int = 8192) -> Scorer:
    """
    A scorer by predicted rating.

    Args:
        model ([`GaVaMoEForCausalLM`] or [`GaVaMoERatingModel`]):
            The model. It is not changed, and predicts without dropout whatever the mode.
        batch_size (`int`, *optional*, defaults to 8192):
            Pairs scored at once.

    Returns:
        `Callable[[np.ndarray, np.ndarray], np.ndarray]`: For [`ranking_scores`], over the model's indices.
    """
    rating_model = getattr(model, "rating_model", model)
    device = rating_model.user_embeddings.weight.device

    def score(users: np.ndarray, items: np.ndarray) -> np.ndarray:
        chunks = zip(*(torch.from_numpy(ids).to(device).split(batch_size) for ids in (users, items)), strict=True)
        return torch.cat([rating_model.predict(*chunk).predicted_rating for chunk in chunks]).cpu().numpy()

    return score


def expected_hit_ratio_and_ndcg(higher: np.ndarray, tied: np.ndarray, k: int = 10) -> tuple[float, float]:
    """
    Mean HR@k and NDCG@k of held-out items, in expectation over the order of equal scores.

    With h items above an item and t others at its score, its rank is h + 1 to h + t + 1, each as likely.

    Args:
        higher (`np.ndarray` of shape `(num_users,)`):
            For each user, the number of candidates with a higher score than the held-out item.
        tied (`np.ndarray` of shape `(num_users,)`):
            The number of other candidates with its score.
        k (`int`, *optional*, defaults to 10):
            Length of the list.

    Returns:
        `tuple[float, float]`: HR@k and NDCG@k, from 0 to 1.

    Example:
        ```python
        >>> expected_hit_ratio_and_ndcg(np.array([2]), np.array([0]))  # rank 3
        (1.0, 0.5)
        ```
    """
    higher, tied = np.asarray(higher), np.asarray(tied)
    # The gain of the first 0, 1, ..., k ranks together, from which that of any run of ranks is a difference
    gains = np.concatenate([[0.0], np.cumsum(1.0 / np.log2(np.arange(1, k + 1) + 1.0))])
    first, last = np.minimum(higher, k), np.minimum(higher + tied + 1, k)
    hit_ratio = np.mean((last - first) / (tied + 1))
    return float(hit_ratio), float(np.mean((gains[last] - gains[first]) / (tied + 1)))


def _pair_indices(
    records: "Dataset", name: str, users: Sequence[str], items: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the records' users and items in the tables."""
    indices = []
    for kind, table in (("user", users), ("item", items)):
        index = pd.Index(table).get_indexer(records[kind][:])
        if (index < 0).any():
            missing = records[kind][int(np.argmin(index))]
            raise ValueError(
                f"expected every {kind} of {name} in `{kind}s`, but got {missing!r}, which is not among these "
                f"{len(table)}. Pass the ids of the training records, such as `processor.{kind}s`, and drop records "
                "that train does not know."
            )
        indices.append(index.astype(np.int64))
    return indices[0], indices[1]


def _interactions(pairs: Sequence[tuple[np.ndarray, np.ndarray]], shape: tuple[int, int]) -> csr_matrix:
    """Which user has which item, `[U, N]`, sparse."""
    users, items = (np.concatenate(column) for column in zip(*pairs, strict=True))
    return csr_matrix((np.ones(len(users), dtype=bool), (users, items)), shape=shape)


def _hold_out(
    records: "Dataset",
    pairs: tuple[np.ndarray, np.ndarray],
    known: csr_matrix,
    min_rating: float | None,
    max_users: int | None,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """The users that are ranked, ascending, and the item that is held out of each."""
    user, item = pairs
    # A pair that an earlier split has as well is no item that is new to the user
    may_be_held_out = ~np.asarray(known[user, item]).ravel()
    if min_rating is not None:
        may_be_held_out &= np.asarray(records["rating"][:], dtype=np.float64) >= min_rating
    order = rng.permutation(len(user))
    if "timestamp" in records.column_names:
        order = order[np.argsort(-np.asarray(records["timestamp"][:], dtype=np.float64)[order], kind="stable")]
    order = order[may_be_held_out[order]]
    if not len(order):
        raise ValueError(
            "expected a record that can be held out, but none has an item that is new to its user and a rating of at "
            f"least min_rating={min_rating}. Lower `min_rating`, or check the splits."
        )
    ranked_users, first = np.unique(user[order], return_index=True)
    held_out = item[order[first]]
    if max_users is not None and len(ranked_users) > max_users:
        kept = np.sort(rng.choice(len(ranked_users), max_users, replace=False))
        ranked_users, held_out = ranked_users[kept], held_out[kept]
    return ranked_users, held_out


def _baseline_scorers(
    records: "Mapping[str, Dataset]", pairs: Mapping[str, tuple[np.ndarray, np.ndarray]], num_items: int
) -> dict[str, Scorer]:
    popularity = np.bincount(pairs["train"][1], minlength=num_items)
    train, validation = ((*pairs[name], records[name]["rating"][:]) for name in ("train", "validation"))
    return {
        "baseline_popularity_": lambda users, items: popularity[items],
        "baseline_bias_": BiasBaseline().fit(*train, validation=validation).predict,
        "baseline_mf_": MatrixFactorizationBaseline().fit(*train, validation=validation).predict,
    }


def _draw_negatives(interacted: np.ndarray, num_negatives: int, rng: np.random.Generator) -> np.ndarray:
    """Marks, for each user, items drawn of those that the user has nowhere, `[B, N]`."""
    keys = rng.random(interacted.shape)
    keys[interacted] = 2.0
    if num_negatives >= interacted.shape[1]:
        return ~interacted
    drawn = np.zeros_like(interacted)
    np.put_along_axis(drawn, np.argpartition(keys, num_negatives, axis=1)[:, :num_negatives], True, axis=1)
    return drawn & ~interacted


def _score_all(scorer: Scorer, users: np.ndarray, num_items: int) -> np.ndarray:
    """Scores of all items for each user, `[B, N]`."""
    scores = np.asarray(scorer(np.repeat(users, num_items), np.tile(np.arange(num_items), len(users))))
    if scores.shape != (len(users) * num_items,) or not np.isfinite(scores).all():
        raise ValueError(
            f"expected one finite score for each of {len(users) * num_items} pairs, but got shape {scores.shape}, "
            f"{int((~np.isfinite(scores)).sum())} not finite. Return a flat array, and check the model for divergence."
        )
    return scores.reshape(len(users), num_items)


def _count(scores: np.ndarray, positive: np.ndarray, candidates: np.ndarray) -> np.ndarray:
    """How many candidates score higher than each user's item, and how many others the same, `[2, B]`."""
    own = np.take_along_axis(scores, positive[:, None], axis=1)
    others = candidates.copy()
    np.put_along_axis(others, positive[:, None], False, axis=1)
    return np.stack([((scores > own) & others).sum(axis=1), ((scores == own) & others).sum(axis=1)])


__all__ = ["Scorer", "expected_hit_ratio_and_ndcg", "ranking_scores", "rating_scorer"]
