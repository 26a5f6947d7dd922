"""Rating baselines against values worked out by hand."""

import math

import numpy as np
import pytest
from datasets import Dataset, DatasetDict

from gavamoe_hf.evaluation import BiasBaseline, MeanBaseline, baseline_scores

USERS, ITEMS, RATINGS = ["a", "a", "b"], ["x", "y", "x"], [5, 3, 4]
TRAIN = {"user": USERS, "item": ITEMS, "rating": RATINGS}
TEST = {"user": ["a", "new"], "item": ["x", "new"], "rating": [5, 2]}


@pytest.mark.parametrize("baseline", [MeanBaseline(), BiasBaseline()])
class TestBothBaselines:
    def test_fit_returns_itself(self, baseline) -> None:
        assert baseline.fit(USERS, ITEMS, RATINGS) is baseline
        assert baseline.mean_ == pytest.approx(4.0)

    def test_unknown_ids_get_the_mean(self, baseline) -> None:
        baseline.fit(USERS, ITEMS, RATINGS)
        np.testing.assert_allclose(baseline.predict(["new", "other"], ["new", "other"]), [4.0, 4.0])

    def test_no_pairs(self, baseline) -> None:
        assert baseline.fit(USERS, ITEMS, RATINGS).predict([], []).shape == (0,)

    def test_predict_before_fit(self, baseline) -> None:
        fresh = type(baseline)()
        with pytest.raises(RuntimeError, match=r"expected a fitted \w+Baseline, .* Call `fit` before `predict`"):
            fresh.predict(["a"], ["x"])

    @pytest.mark.parametrize(
        ("triples", "message"),
        [
            ((["a"], ["x", "y"], [1]), r"one item for each user, but got 1 users and 2 items\. Pass both"),
            ((["a", "b"], ["x", "y"], [1]), r"but got ratings of shape \(1,\) for 2 pairs\. Pass the three"),
            (([], [], []), r"at least one \(user, item\) pair, but got ratings of shape \(0,\) for 0 pairs"),
            (
                (["a"], ["x"], [math.nan]),
                r"expected finite ratings, but got 1 that are NaN or infinite\. Drop",
            ),
        ],
    )
    def test_fit_errors(self, baseline, triples, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            baseline.fit(*triples)

    def test_predict_lengths_differ(self, baseline) -> None:
        with pytest.raises(ValueError, match="but got 1 users and 2 items"):
            baseline.fit(USERS, ITEMS, RATINGS).predict(["a"], ["x", "y"])


def test_mean_baseline_predicts_the_mean_for_every_pair() -> None:
    predicted = MeanBaseline().fit(USERS, ITEMS, RATINGS).predict(["a", "b"], ["x", "y"])
    np.testing.assert_allclose(predicted, [4.0, 4.0])


class TestBiasBaseline:
    def test_hand_worked(self) -> None:
        # Mean 4. Items: x (1 + 0) / (2 + 1) = 1/3, y -1 / (1 + 1) = -1/2.
        # Users: a ((5 - 4 - 1/3) + (3 - 4 + 1/2)) / (2 + 1) = 1/18, b (4 - 4 - 1/3) / (1 + 1) = -1/6.
        baseline = BiasBaseline(reg_item=1.0, reg_user=1.0).fit(USERS, ITEMS, RATINGS)
        predicted = baseline.predict(["a", "b", "new", "b"], ["x", "y", "x", "new"])
        np.testing.assert_allclose(predicted, [4 + 1 / 18 + 1 / 3, 4 - 1 / 6 - 1 / 2, 4 + 1 / 3, 4 - 1 / 6])

    def test_the_two_shrinkages_are_not_mixed_up(self) -> None:
        # reg_item 3: x 1 / (2 + 3) = 1/5, y -1 / (1 + 3) = -1/4. reg_user 0: b -(1/5) / 1, so (b, x) is 4
        # again.
        predicted = (
            BiasBaseline(reg_item=3.0, reg_user=0.0).fit(USERS, ITEMS, RATINGS).predict(["b", "new"], ["x", "y"])
        )
        np.testing.assert_allclose(predicted, [4.0, 4 - 1 / 4])

    def test_strong_shrinkage_is_the_mean(self) -> None:
        baseline = BiasBaseline(reg_item=1e9, reg_user=1e9).fit(USERS, ITEMS, RATINGS)
        np.testing.assert_allclose(baseline.predict(USERS, ITEMS), [4.0, 4.0, 4.0], atol=1e-6)

    def test_repeated_pairs_count_each_time(self) -> None:
        # Mean (5 + 5 + 2) / 3 = 4; item x (1 + 1) / (2 + 2) = 1/2; user a (1/2 + 1/2) / (2 + 2) = 1/4.
        baseline = BiasBaseline(reg_item=2.0, reg_user=2.0).fit(["a", "a", "b"], ["x", "x", "y"], [5, 5, 2])
        np.testing.assert_allclose(baseline.predict(["a"], ["x"]), [4 + 1 / 2 + 1 / 4])

    def test_ids_of_any_kind(self) -> None:
        strings = BiasBaseline().fit(USERS, ITEMS, RATINGS).predict(["a"], ["y"])
        numbers = BiasBaseline().fit([7, 7, 3], np.array([0, 9, 0]), RATINGS).predict([7], np.array([9]))
        np.testing.assert_allclose(numbers, strings)

    def test_default_shrinkage_without_a_validation_split(self) -> None:
        baseline = BiasBaseline().fit(USERS, ITEMS, RATINGS)
        assert (baseline.reg_item_, baseline.reg_user_) == (10.0, 10.0)

    @pytest.mark.parametrize(
        ("validation_ratings", "chosen"),
        [
            ([5, 4, 4, 3], 0.0),  # the training ratings again: without shrinkage they are met exactly
            ([4, 4, 4, 4], 1000.0),  # the mean everywhere: the strongest shrinkage is closest
        ],
    )
    def test_shrinkage_is_chosen_on_the_validation_split(self, validation_ratings: list[int], chosen: float) -> None:
        # Mean 4; unshrunken biases: x 1/2, y -1/2, a 1/2, b -1/2.
        users, items, ratings = ["a", "a", "b", "b"], ["x", "y", "x", "y"], [5, 4, 4, 3]
        baseline = BiasBaseline(grid=(0.0, 1000.0))
        baseline.fit(users, items, ratings, validation=(users, items, validation_ratings))
        assert (baseline.reg_item_, baseline.reg_user_) == (chosen, chosen)
        # The biases in use are those of the choice, not those tried last.
        expected = BiasBaseline(chosen, chosen).fit(users, items, ratings).predict(users, items)
        np.testing.assert_allclose(baseline.predict(users, items), expected)

    def test_ties_keep_the_strongest_shrinkage(self) -> None:
        # Unknown ids get the mean whatever the shrinkage is: every choice has the same RMSE.
        baseline = BiasBaseline(grid=(1.0, 5.0, 2.0)).fit(USERS, ITEMS, RATINGS, validation=(["new"], ["new"], [4]))
        assert (baseline.reg_item_, baseline.reg_user_) == (5.0, 5.0)

    @pytest.mark.parametrize("arguments", [{"reg_item": -1.0}, {"grid": ()}, {"grid": (1.0, -2.0)}])
    def test_bad_shrinkage(self, arguments: dict) -> None:
        with pytest.raises(ValueError, match=r"expected shrinkages of at least 0 and a grid of at least one, but got"):
            BiasBaseline(**arguments)


class TestBaselineScores:
    def test_hand_worked(self) -> None:
        # Mean 4: errors -1 and 2. RMSE sqrt(5/2), MAE 3/2.
        # Bias with 10 and 10: x 1 / (2 + 10) = 1/12, y -1 / (1 + 10) = -1/11;
        # a ((1 - 1/12) + (-1 + 1/11)) / (2 + 10) = (1/11 - 1/12) / 12 = 1/1584. Errors 1/12 + 1/1584 - 1 and
        # 2.
        error = 1 - 1 / 12 - 1 / 1584
        assert baseline_scores(TRAIN, None, TEST) == {
            "baseline_mean_rmse": pytest.approx(math.sqrt(5 / 2)),
            "baseline_mean_mae": pytest.approx(3 / 2),
            "baseline_bias_rmse": pytest.approx(math.sqrt((error**2 + 4) / 2)),
            "baseline_bias_mae": pytest.approx((error + 2) / 2),
        }

    def test_datasets_and_mappings_agree(self) -> None:
        tables = [Dataset.from_dict(columns) for columns in (TRAIN, TRAIN, TEST)]
        assert baseline_scores(*tables) == baseline_scores(TRAIN, TRAIN, TEST)

    def test_validation_changes_the_bias_baseline_alone(self) -> None:
        without, tuned = baseline_scores(TRAIN, None, TEST), baseline_scores(TRAIN, TRAIN, TEST)
        assert without["baseline_mean_rmse"] == tuned["baseline_mean_rmse"]
        assert without["baseline_bias_rmse"] != tuned["baseline_bias_rmse"]

    def test_missing_column(self) -> None:
        with pytest.raises(ValueError, match=r"columns user, item, rating, but got the columns user, item\. Rename"):
            baseline_scores(TRAIN, None, {"user": ["a"], "item": ["x"]})

    def test_list_of_records(self) -> None:
        with pytest.raises(ValueError, match=r"`train` to be a Dataset .* but got list\. .*`Dataset.from_list`"):
            baseline_scores([{"user": "a", "item": "x", "rating": 5}], None, TEST)

    def test_dataset_dict(self) -> None:
        whole = DatasetDict({"train": Dataset.from_dict(TRAIN), "test": Dataset.from_dict(TEST)})
        with pytest.raises(
            ValueError, match=r'got a DatasetDict of train, test\. Did you mean `train=dataset\["train"'
        ):
            baseline_scores(whole, None, TEST)
