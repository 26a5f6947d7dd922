"""What the clusters of a rating model hold: sizes, ratings, and the users, items and features that are typical."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset

from ..modeling_gavamoe import GaVaMoEForCausalLM
from ..processing_gavamoe import GaVaMoEProcessor
from ..vae_gmm_gavamoe import GaVaMoERatingModel, GaVaMoERatingOutput
from .predict import predict_pairs, write_json, write_text

CLUSTERS_FILE, CLUSTERS_TABLE_FILE = "clusters.json", "clusters.md"

# Records without any preference that a lift starts from: what occurs a few times only stays near 1
_LIFT_PRIOR = 5.0
# Scores are compared as they are shown: posteriors saturate, and beyond this their order is rounding
_SCORE_DECIMALS = 3
_NAME_WIDTH = 40


@dataclass
class TypicalMember:
    """
    A user, an item or a feature that is typical of a cluster.

    Args:
        name (`str`): Raw id, or the feature.
        score (`float`): Of a user, the mean posterior of the cluster over the user's pairs, 0 to 1; of an item or a
            feature, its lift, greater than 1.
        num_pairs (`int`): Its pairs in the cluster.
        mean_rating (`float`): Mean rating of these pairs' records.
        z_score (`float`, *optional*): Of an item or a feature, how many standard deviations `num_pairs` lies above
            what chance would give it: below about 2 it may well be chance. `None` for users.
    """

    name: str
    score: float
    num_pairs: int
    mean_rating: float
    z_score: float | None = None


@dataclass
class ClusterSummary:
    """
    One cluster, from [`cluster_report`].

    Args:
        cluster (`int`): Its index, which is its gate's.
        num_pairs (`int`): Records whose pair is in it.
        share (`float`): The same as a share of all records, 0 to 1.
        num_users (`int`): Users of whose pairs it has the most (of equals, the cluster of the higher mean posterior).
        user_stability (`float`, *optional*): Mean over these users of the share of their pairs that it has, 0 to 1.
            Users with a single pair are left out; `None` where there are no others.
        mean_rating (`float`, *optional*): Mean rating of its records; `None` where it is empty.
        mean_predicted_rating (`float`, *optional*): Mean predicted rating of its records; `None` where it is empty.
        typical_users (`list[TypicalMember]`): Most typical first.
        typical_items (`list[TypicalMember]`): Likewise.
        typical_features (`list[TypicalMember]`): Likewise.
    """

    cluster: int
    num_pairs: int
    share: float
    num_users: int
    user_stability: float | None
    mean_rating: float | None
    mean_predicted_rating: float | None
    typical_users: list[TypicalMember]
    typical_items: list[TypicalMember]
    typical_features: list[TypicalMember]


def predict_pairs_of(
    model: GaVaMoEForCausalLM | GaVaMoERatingModel, processor: GaVaMoEProcessor, records: Dataset
) -> GaVaMoERatingOutput:
    """
    [`GaVaMoERatingModel.predict`] for the pairs of records, in order, on the CPU: latent means, posteriors, ratings.

    Args:
        model ([`GaVaMoEForCausalLM`] or [`GaVaMoERatingModel`]): The model.
        processor ([`GaVaMoEProcessor`]): Its processor.
        records ([`~datasets.Dataset`]): Columns user and item.

    Raises:
        `ValueError`: without records, for users or items that the model does not know, and where a model predicts NaN.
    """
    rating_model = model if isinstance(model, GaVaMoERatingModel) else model.rating_model
    if len(records) == 0:
        raise ValueError("Expected at least one record to assign to a cluster, but got none.")
    users = torch.from_numpy(_table_rows("user", records["user"], processor.users))
    items = torch.from_numpy(_table_rows("item", records["item"], processor.items))
    outputs = predict_pairs(rating_model, users, items)
    outputs = GaVaMoERatingOutput(**{name: value.float() for name, value in outputs.items()})
    return outputs


def cluster_report(
    model: GaVaMoEForCausalLM | GaVaMoERatingModel,
    processor: GaVaMoEProcessor,
    records: Dataset,
    top_n: int = 5,
    min_count: int = 3,
    outputs: GaVaMoERatingOutput | None = None,
) -> list[ClusterSummary]:
    """
    Describes the clusters (section 3.2) by the records whose pairs they hold. The cluster of a pair is the most
    probable one at z = mu, as for its gate (eq. 9). Every record counts, also where a pair has several.

    What is typical needs `min_count` records in the cluster, and is ranked by its score, rounded to three decimals;
    of equals, the one with more records in the cluster comes first, then the smaller id:

    - users: of those counted in `num_users`, by the mean posterior of the cluster over the user's pairs;
    - items and features: by lift, p(cluster | item) / p(cluster), with 5 occurrences added that are spread over the
      clusters as all occurrences of items, or of features, are. 1 is as common as anywhere, and only lifts greater
      than 1 are listed: none where there is a single cluster. A lift says what a cluster's users rate and write about,
      which is not yet what they like: `mean_rating` of the entry says that. Lists are also filled where clusters have
      nothing to do with items; `z_score` tells.

    Args:
        model ([`GaVaMoEForCausalLM`] or [`GaVaMoERatingModel`]): The model.
        processor ([`GaVaMoEProcessor`]): Its processor, which knows the raw ids.
        records ([`~datasets.Dataset`]): Columns user, item, rating and feature (lists, which may be empty), as
            [`load_records`] returns them.
        top_n (`int`, *optional*, defaults to 5): Most entries of each list of typical users, items and features.
        min_count (`int`, *optional*, defaults to 3): Fewest records in the cluster of a typical user, item or feature.
        outputs ([`GaVaMoERatingOutput`], *optional*): What [`predict_pairs_of`] gave for these records, if at hand.

    Returns:
        `list[ClusterSummary]`: one for each cluster, in the order of their indices, empty clusters too.

    Raises:
        `ValueError`: as [`predict_pairs_of`], and for `top_n` or `min_count` below 1.
    """
    if top_n < 1 or min_count < 1:
        raise ValueError(f"Expected `top_n` and `min_count` of at least 1, but got {top_n} and {min_count}.")
    outputs = predict_pairs_of(model, processor, records) if outputs is None else outputs
    posterior = outputs.cluster_posterior.double().numpy()  # [pairs, K]
    num_clusters, clusters = posterior.shape[1], posterior.argmax(axis=1)
    ratings, predicted = np.asarray(records["rating"], dtype=float), outputs.predicted_rating.numpy()
    sizes = np.bincount(clusters, minlength=num_clusters)

    user_rows = _table_rows("user", records["user"], processor.users)
    item_rows = _table_rows("item", records["item"], processor.items)
    pairs, feature_rows, feature_names = _feature_occurrences(records["feature"])
    users = _Tally(processor.users, user_rows, clusters, ratings, num_clusters)
    items = _Tally(processor.items, item_rows, clusters, ratings, num_clusters)
    features = _Tally(feature_names, feature_rows, clusters[pairs], ratings[pairs], num_clusters)
    membership = _user_membership(user_rows, posterior, users.counts)
    return [
        ClusterSummary(
            cluster=cluster,
            num_pairs=int(sizes[cluster]),
            share=float(sizes[cluster] / len(records)),
            num_users=int((membership.main_cluster == cluster).sum()),
            user_stability=membership.stability(cluster),
            mean_rating=_mean(ratings[clusters == cluster]),
            mean_predicted_rating=_mean(predicted[clusters == cluster]),
            typical_users=users.top(cluster, membership.typical_scores, min_count, top_n),
            typical_items=items.top(cluster, items.lift(), min_count, top_n, items.z_scores()),
            typical_features=features.top(cluster, features.lift(), min_count, top_n, features.z_scores()),
        )
        for cluster in range(num_clusters)
    ]


def markdown_report(report: Sequence[ClusterSummary], split: str = "train", top_n: int = 3) -> str:
    """
    A report as two Markdown tables and a line on how to read them.

    Args:
        report (`Sequence[ClusterSummary]`): From [`cluster_report`].
        split (`str`, *optional*, defaults to `"train"`): Which records it is of.
        top_n (`int`, *optional*, defaults to 3): Most entries of each typical list that are shown.
    """
    lines = [
        f"Clusters of the {sum(summary.num_pairs for summary in report):,} pairs of the {split} split",
        "",
        "| cluster | pairs | share | users | stability | mean rating | mean predicted rating |",
        "|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for summary in report:
        cells = [
            str(summary.cluster),
            f"{summary.num_pairs:,}",
            f"{summary.share:.1%}",
            f"{summary.num_users:,}",
            *(_number(value) for value in (summary.user_stability, summary.mean_rating, summary.mean_predicted_rating)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| cluster | typical users | typical items | typical features |", "|---:|---|---|---|"]
    for summary in report:
        lists = (summary.typical_users, summary.typical_items, summary.typical_features)
        cells = [", ".join(map(_member, members[:top_n])) or "-" for members in lists]
        lines.append(f"| {summary.cluster} | {' | '.join(cells)} |")
    lines += [
        "",
        "Users: those of whose pairs the cluster has the most. Stability: the share of their pairs that it has, users "
        "with one pair left out. After a user, the mean posterior of the cluster; after an item or a feature, its "
        "lift, p(cluster given it) / p(cluster), smoothed, and how many standard deviations (z) it is more common here "
        "than by chance: below about 2 it may well be chance.",
    ]
    return "\n".join(lines) + "\n"


def write_cluster_report(
    report: Sequence[ClusterSummary], output_dir: str | os.PathLike[str], split: str = "train"
) -> None:
    """
    Writes `clusters.json`, with `split` and the list `clusters`, and `clusters.md`, each whole or not at all.

    Args:
        report (`Sequence[ClusterSummary]`): From [`cluster_report`].
        output_dir (`str` or `os.PathLike`): Folder, made where it does not exist.
        split (`str`, *optional*, defaults to `"train"`): Which records it is of.
    """
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    write_json(output_dir / CLUSTERS_FILE, {"split": split, "clusters": [asdict(summary) for summary in report]})
    write_text(output_dir / CLUSTERS_TABLE_FILE, markdown_report(report, split))


class _Tally:
    """How often each of some things occurs in each cluster, and how it is rated there."""

    def __init__(
        self, names: Sequence[str], index: np.ndarray, clusters: np.ndarray, ratings: np.ndarray, num_clusters: int
    ):
        self.names = names
        cells, shape = index * num_clusters + clusters, (len(names), num_clusters)
        self.counts = np.bincount(cells, minlength=len(names) * num_clusters).reshape(shape)
        self.rating_sums = np.bincount(cells, ratings, minlength=len(names) * num_clusters).reshape(shape)

    def shares(self) -> np.ndarray:
        """p(cluster), `(num_clusters,)`."""
        # An empty cluster has no counts either, whatever its share is taken to be
        return np.maximum(self.counts.sum(axis=0), 1) / max(self.counts.sum(), 1)

    def lift(self) -> np.ndarray:
        """Smoothed p(cluster | name) / p(cluster), `(num_names, num_clusters)`, NaN where it is not above 1."""
        totals, shares = self.counts.sum(axis=1, keepdims=True), self.shares()
        lift = (self.counts + _LIFT_PRIOR * shares) / ((totals + _LIFT_PRIOR) * shares)
        return np.where(lift.round(_SCORE_DECIMALS) > 1, lift, np.nan)

    def z_scores(self) -> np.ndarray:
        """Counts less their expectation, in standard deviations of the binomial, `(num_names, num_clusters)`."""
        totals, shares = self.counts.sum(axis=1, keepdims=True), self.shares()
        variance = totals * shares * (1 - shares)
        return (self.counts - totals * shares) / np.sqrt(np.maximum(variance, np.finfo(float).tiny))

    def top(
        self, cluster: int, scores: np.ndarray, min_count: int, top_n: int, z_scores: np.ndarray | None = None
    ) -> list[TypicalMember]:
        """Those with the highest scores of a cluster; `scores` `(num_names, num_clusters)`, NaN leaves out."""
        counts, scores = self.counts[:, cluster], scores[:, cluster].round(_SCORE_DECIMALS)
        eligible = np.flatnonzero((counts >= min_count) & ~np.isnan(scores)).tolist()
        best = sorted(eligible, key=lambda row: (-scores[row], -counts[row], self.names[row]))[:top_n]
        return [
            TypicalMember(
                name=self.names[row],
                score=float(scores[row]),
                num_pairs=int(counts[row]),
                mean_rating=float(self.rating_sums[row, cluster] / counts[row]),
                z_score=None if z_scores is None else float(z_scores[row, cluster]),
            )
            for row in best
        ]


@dataclass
class _UserMembership:
    main_cluster: np.ndarray  # [users], -1 for users without records
    typical_scores: np.ndarray  # [users, K]: mean posterior in the main cluster, NaN elsewhere
    main_shares: np.ndarray  # [users]: share of the pairs in the main cluster, NaN for users with fewer than two

    def stability(self, cluster: int) -> float | None:
        shares = self.main_shares[self.main_cluster == cluster]
        return _mean(shares[~np.isnan(shares)])


def _user_membership(users: np.ndarray, posterior: np.ndarray, counts: np.ndarray) -> _UserMembership:
    """Main cluster of each user, from the user `(num_pairs,)` of each pair and the counts `(num_users, K)`."""
    totals = counts.sum(axis=1)
    sums = np.stack([np.bincount(users, column, minlength=len(counts)) for column in posterior.T], axis=1)
    mean_posterior = sums / np.maximum(totals, 1)[:, None]
    # Half a posterior never outweighs a pair: it only decides between clusters with equally many
    main = np.where(totals > 0, (counts + 0.5 * mean_posterior).argmax(axis=1), -1)
    is_main = main[:, None] == np.arange(counts.shape[1])
    return _UserMembership(
        main_cluster=main,
        typical_scores=np.where(is_main, mean_posterior, np.nan),
        main_shares=np.where(totals > 1, counts.max(axis=1) / np.maximum(totals, 1), np.nan),
    )


def _table_rows(kind: str, raw_ids: Sequence[str], known: Sequence[str]) -> np.ndarray:
    index = {raw: row for row, raw in enumerate(known)}
    unknown = sorted({raw for raw in raw_ids if raw not in index}, key=str)
    if unknown:
        raise ValueError(
            f"Expected records of {kind}s that the model knows, but {len(unknown)} are not among its {len(known)}, "
            f"such as {unknown[0]!r}. Pass the data that the model was trained on."
        )
    return np.array([index[raw] for raw in raw_ids], dtype=np.int64)


def _feature_occurrences(features: Sequence[Sequence[str]]) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Row and feature of each occurrence, and the features' names; a feature counts once a record."""
    index: dict[str, int] = {}
    rows, columns = [], []
    for row, names in enumerate(features):
        for name in dict.fromkeys(names):
            rows.append(row)
            columns.append(index.setdefault(name, len(index)))
    return np.array(rows, dtype=np.int64), np.array(columns, dtype=np.int64), list(index)


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean(dtype=float)) if len(values) else None


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _member(member: TypicalMember) -> str:
    # In a code span no character of an id is markup, but for these
    name = " ".join(member.name.split()).replace("`", "'").replace("|", "\\|")
    shown = name if len(name) <= _NAME_WIDTH else name[: _NAME_WIDTH - 1] + "…"
    z_score = "" if member.z_score is None else f"z {member.z_score:.1f}, "
    return f"`{shown}` {member.score:.2f} ({z_score}rated {member.mean_rating:.1f})"
