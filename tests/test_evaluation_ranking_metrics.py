"""Ranking metrics against values worked out by hand and a slow reference."""

import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from references import all_pairs, spread_clusters, tiny_model

from gavamoe_hf.evaluation import (
    BiasBaseline,
    MatrixFactorizationBaseline,
    expected_hit_ratio_and_ndcg,
    ranking_metrics,
    ranking_scores,
    rating_scorer,
)

USERS, ITEMS = ["a", "b", "c"], ["v", "w", "x", "y", "z"]


def table(*rows: tuple) -> Dataset:
    names = ("user", "item", "rating", "timestamp")[: len(rows[0])]
    return Dataset.from_dict(dict(zip(names, map(list, zip(*rows, strict=True)), strict=True)))


def records(test: Dataset) -> dict[str, Dataset]:
    """Train has v three times, w twice and x once."""
    return {
        "train": table(("a", "v", 5), ("a", "w", 4), ("b", "v", 4), ("b", "w", 2), ("c", "v", 3), ("c", "x", 1)),
        "validation": table(("a", "x", 4), ("b", "x", 3)),
        "test": test,
    }


def by_item(*scores: float):
    return lambda users, items: np.asarray(scores)[items]


def random_records(seed: int, num_users: int, num_items: int) -> tuple[dict[str, Dataset], list[str], list[str]]:
    """Every pair at most once, cut into splits of which train has every user and item."""
    rng = np.random.default_rng(seed)
    pairs = [divmod(int(pair), num_items) for pair in rng.permutation(num_users * num_items)[: num_users * 6]]
    diagonal = [(n % num_users, n % num_items) for n in range(max(num_users, num_items))]
    rows = [
        (f"u{user}", f"i{item}", float(rng.integers(1, 6))) for user, item in [p for p in pairs if p not in diagonal]
    ]
    first = [(f"u{user}", f"i{item}", 3.0) for user, item in diagonal]
    third = len(rows) // 3
    splits = {
        "train": table(*first, *rows[:third]),
        "validation": table(*rows[third : 2 * third]),
        "test": table(*rows[2 * third :]),
    }
    return splits, [f"u{n}" for n in range(num_users)], [f"i{n}" for n in range(num_items)]


class TestExpectedHitRatioAndNdcg:
    @pytest.mark.parametrize(
        ("higher", "tied", "k", "expected"),
        [
            (0, 0, 10, (1, 1)),
            (2, 0, 10, (1, 1 / 2)),  # rank 3: 1 / log2(4)
            (9, 0, 10, (1, 1 / math.log2(11))),
            (10, 0, 10, (0, 0)),
            (0, 3, 2, (2 / 4, (1 + 1 / math.log2(3)) / 4)),  # rank 1, 2, 3 or 4
            (1, 2, 2, (1 / 3, 1 / math.log2(3) / 3)),  # rank 2, 3 or 4
            (1, 1, 10, (1, (1 / math.log2(3) + 1 / 2) / 2)),  # rank 2 or 3
            (12, 5, 10, (0, 0)),
        ],
    )
    def test_hand_worked(self, higher: int, tied: int, k: int, expected: tuple) -> None:
        assert expected_hit_ratio_and_ndcg(np.array([higher]), np.array([tied]), k) == pytest.approx(expected)

    def test_all_equal_is_chance(self) -> None:
        assert expected_hit_ratio_and_ndcg(np.zeros(5, dtype=int), np.full(5, 100))[0] == pytest.approx(10 / 101)

    def test_mean_over_users(self) -> None:
        scores = expected_hit_ratio_and_ndcg(np.array([0, 2, 99, 10]), np.zeros(4, dtype=int))
        assert scores == pytest.approx((2 / 4, 1.5 / 4))


class TestRankingScores:
    def test_hand_worked(self) -> None:
        # a: y competes with z alone, having v and w in train and x in validation: rank 2 by the scorer.
        # b: likewise z against y: rank 1. c: y against w and z: rank 3.
        scores = ranking_scores(
            records(table(("a", "y", 5), ("b", "z", 1), ("c", "y", 2))), by_item(9, 4, 8, 2, 3), USERS, ITEMS, k=2
        )
        second = 1 / math.log2(3)
        for candidates in ("full", "sampled"):
            # No user has a second item in test, and 100 negatives are all that there are: the lists are the same
            assert scores[f"hr_2_{candidates}"] == pytest.approx(2 / 3)
            assert scores[f"ndcg_2_{candidates}"] == pytest.approx((second + 1) / 3)
            # y and z are never bought: they tie at the end. a and b: rank 1 or 2. c: after w, rank 2 or 3.
            assert scores[f"baseline_popularity_hr_2_{candidates}"] == pytest.approx((1 + 1 + 1 / 2) / 3)
            assert scores[f"baseline_popularity_ndcg_2_{candidates}"] == pytest.approx(
                ((1 + second) / 2 * 2 + second / 2) / 3
            )
        assert set(scores) == {
            f"{prefix}{metric}_2_{candidates}"
            for prefix in ("", "baseline_popularity_", "baseline_bias_", "baseline_mf_")
            for metric in ("hr", "ndcg")
            for candidates in ("full", "sampled")
        }

    def test_names_at_the_default_length(self) -> None:
        scores = ranking_scores(records(table(("a", "y", 5))), by_item(0, 0, 0, 1, 0), USERS, ITEMS)
        assert {"hr_10_sampled", "ndcg_10_sampled", "hr_10_full", "ndcg_10_full"} < set(scores)

    def test_other_held_out_items_compete_in_the_full_ranking_alone(self) -> None:
        # z is a's as well, whichever of the two is held out: never a sampled negative
        data = records(table(("a", "y", 5, 2), ("a", "z", 5, 1)))
        scores = ranking_scores(data, by_item(0, 0, 0, 1, 2), USERS, ITEMS, k=1)
        assert (scores["hr_1_full"], scores["hr_1_sampled"]) == (0, 1)

    @pytest.mark.parametrize(("timestamps", "expected"), [((1, 2), 1), ((2, 1), 0)])
    def test_the_latest_record_is_held_out(self, timestamps: tuple, expected: int) -> None:
        data = records(table(*(("a", item, 5, time) for item, time in zip("yz", timestamps, strict=True))))
        for seed in range(4):
            assert ranking_scores(data, by_item(0, 0, 0, 1, 2), USERS, ITEMS, k=1, seed=seed)["hr_1_full"] == expected

    def test_without_timestamps_the_seed_chooses(self) -> None:
        data = records(table(("a", "y", 5), ("a", "z", 5)))
        found = [
            ranking_scores(data, by_item(0, 0, 0, 1, 2), USERS, ITEMS, k=1, seed=seed)["hr_1_full"]
            for seed in [*range(8), *range(8)]
        ]
        assert set(found) == {0, 1} and found[:8] == found[8:]

    def test_validation_is_ranked_without_a_look_at_test(self) -> None:
        # x of a: against y and z, which test has; x of b: likewise. Test's items are no sampled negatives.
        data = records(table(("a", "y", 5), ("b", "z", 5)))
        scores = ranking_scores(data, by_item(0, 0, 1, 2, 0), USERS, ITEMS, split="validation", k=1)
        assert (scores["hr_1_full"], scores["hr_1_sampled"]) == (0, 1 / 2)

    def test_low_ratings_are_no_positives(self) -> None:
        data = records(table(("a", "y", 5), ("b", "z", 2), ("c", "z", 3)))
        scorer = by_item(0, 0, 0, 1, 0)
        for min_rating, expected in ((None, 1 / 3), (2, 1 / 3), (3, 1 / 2), (4, 1)):
            scores = ranking_scores(data, scorer, USERS, ITEMS, k=1, min_rating=min_rating)
            assert scores["hr_1_full"] == pytest.approx(expected)

    def test_a_pair_of_an_earlier_split_is_not_held_out(self) -> None:
        # v is in a's train, and x in a's validation
        data = records(table(("a", "v", 5), ("a", "x", 5), ("a", "y", 5)))
        for seed in range(4):
            assert ranking_scores(data, by_item(9, 0, 9, 1, 0), USERS, ITEMS, k=1, seed=seed)["hr_1_full"] == 1

    @pytest.mark.parametrize("seed", range(3))
    def test_equals_a_slow_reference(self, seed: int) -> None:
        data, users, items = random_records(seed, num_users=12, num_items=20)
        times = np.random.default_rng(seed).permutation(len(data["test"]))
        data["test"] = data["test"].add_column("timestamp", times.tolist())
        rows = sorted(data["test"], key=lambda row: row["timestamp"])
        latest = {int(row["user"][1:]): int(row["item"][1:]) for row in rows}
        # Few values, so that many are equal
        values = np.random.default_rng(seed).integers(0, 4, (12, 20))
        # As many negatives as there are items: none is left to chance
        scores = ranking_scores(data, lambda u, i: values[u, i], users, items, k=3, num_negatives=20)
        sets = {
            name: {(int(u[1:]), int(i[1:])) for u, i in zip(part["user"], part["item"], strict=True)}
            for name, part in data.items()
        }
        hidden = {"full": sets["train"] | sets["validation"], "sampled": set.union(*sets.values())}
        for name, gone in hidden.items():
            hit_ratios, gains = [], []
            for user, held_out in latest.items():
                rivals = [item for item in range(20) if item != held_out and (user, item) not in gone]
                higher = sum(values[user, item] > values[user, held_out] for item in rivals)
                tied = sum(values[user, item] == values[user, held_out] for item in rivals)
                ranks = range(higher + 1, higher + tied + 2)
                hit_ratios.append(np.mean([rank <= 3 for rank in ranks]))
                gains.append(np.mean([1 / math.log2(rank + 1) if rank <= 3 else 0 for rank in ranks]))
            assert scores[f"hr_3_{name}"] == pytest.approx(np.mean(hit_ratios))
            assert scores[f"ndcg_3_{name}"] == pytest.approx(np.mean(gains))

    def test_negatives_are_as_many_as_asked_and_new_to_the_user(self) -> None:
        data, users, items = random_records(0, num_users=30, num_items=60)
        # Equal scores: HR is the chance of 1 in 1 + the number of negatives
        for count in (1, 7, 25):
            scores = ranking_scores(data, by_item(*[0] * 60), users, items, k=1, num_negatives=count)
            assert scores["hr_1_sampled"] == pytest.approx(1 / (1 + count))
        interacted = np.zeros((30, 60))
        for part in data.values():
            interacted[[int(u[1:]) for u in part["user"]], [int(i[1:]) for i in part["item"]]] = 1
        best = ranking_scores(data, lambda u, i: interacted[u, i], users, items, k=1, num_negatives=25)
        assert (best["hr_1_sampled"], best["ndcg_1_sampled"]) == (1, 1)
        assert best["hr_1_full"] < 1

    def test_negatives_are_drawn_evenly_and_by_the_seed(self) -> None:
        interacted = np.zeros((2000, 12), dtype=bool)
        interacted[:, :2] = True
        drawn = ranking_metrics._draw_negatives(interacted, 4, np.random.default_rng(0))
        assert (drawn.sum(axis=1) == 4).all() and not drawn[:, :2].any()
        # Each of ten items four times in ten; the standard deviation of such a mean is 0.011
        np.testing.assert_allclose(drawn[:, 2:].mean(axis=0), 0.4, atol=0.05)
        few = ranking_metrics._draw_negatives(interacted, 11, np.random.default_rng(0))
        assert (few == ~interacted).all()
        again, other = (ranking_metrics._draw_negatives(interacted, 4, np.random.default_rng(s)) for s in (0, 1))
        assert (drawn == again).all() and (drawn != other).any()

    def test_chunks_change_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        data, users, items = random_records(0, num_users=30, num_items=60)
        values = np.random.default_rng(0).random((30, 60))
        whole = ranking_scores(data, lambda u, i: values[u, i], users, items, num_negatives=9)
        monkeypatch.setattr(ranking_metrics, "_CHUNK_SIZE", 200)
        assert ranking_scores(data, lambda u, i: values[u, i], users, items, num_negatives=9) == whole

    def test_baselines(self) -> None:
        data, users, items = random_records(0, num_users=30, num_items=60)
        columns = [
            (list(part["user"]), list(part["item"]), list(part["rating"]))
            for part in (data["train"], data["validation"])
        ]
        names, titles = np.array(users), np.array(items)
        for name, baseline in (("bias", BiasBaseline()), ("mf", MatrixFactorizationBaseline())):
            baseline.fit(*columns[0], validation=columns[1])
            scorer = lambda u, i, b=baseline: b.predict(names[u].tolist(), titles[i].tolist())  # noqa: E731
            scores = ranking_scores(data, scorer, users, items, num_negatives=20, k=4)
            for metric in ("hr_4_full", "ndcg_4_full", "hr_4_sampled", "ndcg_4_sampled"):
                assert scores[metric] == pytest.approx(scores[f"baseline_{name}_{metric}"])
            assert 0 < scores["hr_4_full"] < 1

    def test_max_users(self) -> None:
        data, users, items = random_records(0, num_users=30, num_items=60)
        seen = []

        def scorer(user, item):
            seen.append(set(user.tolist()))
            assert item.min() >= 0 and item.max() < 60
            return np.zeros(len(user))

        ranking_scores(data, scorer, users, items, max_users=5, seed=1)
        ranking_scores(data, scorer, users, items, max_users=5, seed=1)
        ranking_scores(data, scorer, users, items, max_users=5, seed=2)
        assert [len(drawn) for drawn in seen] == [5, 5, 5]
        assert seen[0] == seen[1] != seen[2]

    @pytest.mark.parametrize("options", [{"split": "train"}, {"k": 0}, {"num_negatives": 0}, {"max_users": 0}])
    def test_bad_options(self, options: dict) -> None:
        with pytest.raises(ValueError, match=r'expected split "validation" or "test" and `k`, .* but got split='):
            ranking_scores(records(table(("a", "y", 5))), by_item(*[0] * 5), USERS, ITEMS, **options)

    def test_nothing_to_hold_out(self) -> None:
        with pytest.raises(ValueError, match=r"a record that can be held out, .* min_rating=4\. Lower `min_rating`"):
            ranking_scores(records(table(("a", "y", 3))), by_item(*[0] * 5), USERS, ITEMS, min_rating=4)

    @pytest.mark.parametrize(
        ("row", "message"),
        [
            (("d", "y", 5), r"every user of test in `users`, but got 'd', which is not among these 3\."),
            (("a", "q", 5), r"every item of test in `items`, but got 'q', which is not among these 5\. Pass the ids"),
        ],
    )
    def test_unknown_id(self, row: tuple, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            ranking_scores(records(table(("a", "y", 5), row)), by_item(*[0] * 5), USERS, ITEMS)

    @pytest.mark.parametrize(
        ("scorer", "message"),
        [
            (lambda users, items: np.full(len(users), math.nan), r"for each of 5 pairs, but got shape \(5,\), 5 not"),
            (lambda users, items: np.zeros((len(users), 1)), r"for each of 5 pairs, but got shape \(5, 1\), 0 not"),
        ],
    )
    def test_bad_scores(self, scorer, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            ranking_scores(records(table(("a", "y", 5))), scorer, USERS, ITEMS)


class TestRatingScorer:
    @pytest.mark.parametrize("batch_size", [7, 8192])
    def test_scores_are_the_predicted_ratings(self, batch_size: int) -> None:
        model = spread_clusters(tiny_model()).train()
        users, items = all_pairs(model.config)
        expected = model.predict_rating(users, items).numpy()
        for scored in (model, model.rating_model):
            scores = rating_scorer(scored, batch_size)(users.numpy(), items.numpy())
            np.testing.assert_allclose(scores, expected, atol=1e-5)
        assert model.training

    def test_ranks_by_the_model(self) -> None:
        model = spread_clusters(tiny_model()).eval()
        users, items = [f"u{n}" for n in range(8)], [f"i{n}" for n in range(9)]
        # For each user the item that the model rates highest is the one held out
        best = model.recommend(torch.arange(8), top_k=1).item_id[:, 0].tolist()
        rest = [[item for item in range(9) if item != mine] for mine in best]
        data = {
            "train": table(*((f"u{n}", f"i{mine[n % 8]}", 4) for n, mine in enumerate(rest))),
            "validation": table(*((f"u{n}", f"i{mine[(n + 1) % 8]}", 4) for n, mine in enumerate(rest))),
            "test": table(*((f"u{n}", f"i{item}", 4) for n, item in enumerate(best))),
        }
        scores = ranking_scores(data, rating_scorer(model), users, items, k=1)
        assert (scores["hr_1_full"], scores["ndcg_1_full"], scores["hr_1_sampled"]) == (1, 1, 1)
