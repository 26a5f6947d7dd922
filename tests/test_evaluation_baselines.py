"""Rating baselines against values worked out by hand."""

import math

import numpy as np
import pandas as pd
import pytest
from datasets import Dataset, DatasetDict
from surprise import SVD, Reader
from surprise import Dataset as SurpriseDataset

from gavamoe_hf.evaluation import (
    BiasBaseline,
    MatrixFactorizationBaseline,
    MeanBaseline,
    baseline_scores,
    baselines,
    rating_errors,
)

USERS, ITEMS, RATINGS = ["a", "a", "b"], ["x", "y", "x"], [5, 3, 4]
TRAIN = {"user": USERS, "item": ITEMS, "rating": RATINGS}
TEST = {"user": ["a", "new"], "item": ["x", "new"], "rating": [5, 2]}


@pytest.mark.parametrize("baseline", [MeanBaseline(), BiasBaseline(), MatrixFactorizationBaseline()])
class TestAllBaselines:
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

    def test_arrays_of_ids(self, baseline) -> None:
        baseline.fit(USERS, ITEMS, RATINGS)
        users, items = ["a", "b", "new", "a", "b"], ["y", "y", "x", "new", "x"]
        expected = baseline.predict(users, items)
        np.testing.assert_array_equal(baseline.predict(np.array(users), np.array(items)), expected)
        np.testing.assert_array_equal(baseline.predict(np.array(users, dtype=object), np.array(items)), expected)
        baseline.fit([7, 7, 3], [0, 9, 0], RATINGS)
        np.testing.assert_array_equal(baseline.predict(np.array([7, 3, 5, 7, 3]), np.array([9, 9, 0, 1, 0])), expected)

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


def planted(num_users: int = 40, num_items: int = 40, seed: int = 0) -> list[tuple[list, list, list]]:
    """Training and validation ratings of two groups of users, each of which likes what the other does not."""
    rng = np.random.default_rng(seed)
    pairs = rng.permutation(num_users * num_items)[:1000]
    users, items = pairs // num_items, pairs % num_items
    ratings = 3 + 2 * (-1) ** (users % 2 + items % 2)
    columns = [column.tolist() for column in (users, items, ratings)]
    return [tuple(column[:800] for column in columns), tuple(column[800:] for column in columns)]


class TestMatrixFactorizationBaseline:
    def test_predictions_are_those_of_surprise(self) -> None:
        (users, items, ratings), (new_users, new_items, _) = planted()
        baseline = MatrixFactorizationBaseline(num_factors=3, reg=0.05, learning_rate=0.02, seed=5)
        predicted = baseline.fit(users, items, ratings).predict([*new_users, -5, 3], [*new_items, 3, -5])
        scale = np.std(ratings)
        frame = pd.DataFrame({"user": users, "item": items, "rating": np.array(ratings) / scale})
        svd = SVD(n_factors=3, reg_all=0.05, lr_all=0.02, random_state=5)
        svd.fit(SurpriseDataset.load_from_df(frame, Reader()).build_full_trainset())
        pairs = zip([*new_users, -5, 3], [*new_items, 3, -5], strict=True)
        expected = [svd.predict(user, item, clip=False).est * scale for user, item in pairs]
        np.testing.assert_allclose(predicted, expected)
        assert predicted.std() > 0.1

    def test_finds_who_likes_what(self) -> None:
        train, validation = planted()
        errors = {}
        for baseline in (BiasBaseline(), MatrixFactorizationBaseline()):
            predicted = baseline.fit(*train, validation=validation).predict(*validation[:2])
            errors[type(baseline)] = rating_errors(predicted, validation[2])["rating_rmse"]
        # No bias can tell the groups' ratings of 1 and 5 apart
        assert errors[BiasBaseline] > 1.9 and errors[MatrixFactorizationBaseline] < 0.3

    def test_options_are_chosen_on_the_validation_split(self) -> None:
        train, validation = planted()
        grid = {"num_factors": (1, 4), "reg": (0.0, 0.5), "learning_rate": (0.001, 0.05)}
        errors = {}
        for options in [(f, reg, rate) for f in (1, 4) for reg in (0.0, 0.5) for rate in (0.001, 0.05)]:
            predicted = MatrixFactorizationBaseline(*options).fit(*train).predict(*validation[:2])
            errors[options] = rating_errors(predicted, validation[2])["rating_rmse"]
        baseline = MatrixFactorizationBaseline(grid=grid).fit(*train, validation=validation)
        assert (baseline.num_factors_, baseline.reg_, baseline.learning_rate_) == min(errors, key=errors.get)
        predicted = baseline.predict(*validation[:2])
        assert rating_errors(predicted, validation[2])["rating_rmse"] == pytest.approx(min(errors.values()))
        assert len({round(error, 6) for error in errors.values()}) == 8

    def test_any_rating_scale(self) -> None:
        (users, items, ratings), _ = planted()
        stars = MatrixFactorizationBaseline().fit(users, items, ratings).predict(users, items)
        percent = MatrixFactorizationBaseline().fit(users, items, [25 * r - 25 for r in ratings]).predict(users, items)
        np.testing.assert_allclose(percent, 25 * stars - 25, atol=1e-8)

    def test_equal_ratings(self) -> None:
        predicted = MatrixFactorizationBaseline().fit(USERS, ITEMS, [4, 4, 4]).predict(USERS, ITEMS)
        # Without a spread to divide by: near, since the initial factors are small, and above all finite
        np.testing.assert_allclose(predicted, 4.0, atol=0.2)

    def test_the_seed_is_what_chance_there_is(self) -> None:
        (users, items, ratings), _ = planted()
        first, again, other = (
            MatrixFactorizationBaseline(seed=seed).fit(users, items, ratings).predict(users, items)
            for seed in (0, 0, 1)
        )
        np.testing.assert_array_equal(first, again)
        assert np.abs(first - other).max() > 1e-6

    def test_without_surprise(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(baselines, "find_spec", lambda name: None)
        with pytest.raises(ImportError, match=r'could not import surprise\. Install it with `pip install "\.\['):
            MatrixFactorizationBaseline().fit(USERS, ITEMS, RATINGS)

    @pytest.mark.parametrize("options", [{"num_factors": 0}, {"reg": -1.0}, {"learning_rate": 0.0}])
    def test_bad_options(self, options: dict) -> None:
        message = "expected at least 1 factor, a regularisation of at least 0 and a positive learning rate, but got"
        grid = {"num_factors": (1,), "reg": (0.0,), "learning_rate": (0.1,)}
        for arguments in (options, {"grid": {**grid, **{name: (value,) for name, value in options.items()}}}):
            with pytest.raises(ValueError, match=message):
                MatrixFactorizationBaseline(**arguments)

    @pytest.mark.parametrize("grid", [{"reg": (0.1,)}, {"num_factors": (), "reg": (0.1,), "learning_rate": (0.1,)}])
    def test_bad_grid(self, grid: dict) -> None:
        with pytest.raises(ValueError, match="expected a grid with values of num_factors, reg, learning_rate, but got"):
            MatrixFactorizationBaseline(grid=grid)


class TestBaselineScores:
    def test_hand_worked(self) -> None:
        # Mean 4: errors -1 and 2. RMSE sqrt(5/2), MAE 3/2.
        # Bias with 10 and 10: x 1 / (2 + 10) = 1/12, y -1 / (1 + 10) = -1/11;
        # a ((1 - 1/12) + (-1 + 1/11)) / (2 + 10) = (1/11 - 1/12) / 12 = 1/1584. Errors 1/12 + 1/1584 - 1 and
        # 2.
        error = 1 - 1 / 12 - 1 / 1584
        factorization = MatrixFactorizationBaseline().fit(USERS, ITEMS, RATINGS).predict(["a"], ["x"])[0]
        assert baseline_scores(TRAIN, None, TEST) == {
            "baseline_mean_rmse": pytest.approx(math.sqrt(5 / 2)),
            "baseline_mean_mae": pytest.approx(3 / 2),
            "baseline_bias_rmse": pytest.approx(math.sqrt((error**2 + 4) / 2)),
            "baseline_bias_mae": pytest.approx((error + 2) / 2),
            "baseline_mf_rmse": pytest.approx(math.sqrt(((5 - factorization) ** 2 + 4) / 2)),
            "baseline_mf_mae": pytest.approx((5 - factorization + 2) / 2),
        }

    def test_datasets_and_mappings_agree(self) -> None:
        tables = [Dataset.from_dict(columns) for columns in (TRAIN, TRAIN, TEST)]
        assert baseline_scores(*tables) == baseline_scores(TRAIN, TRAIN, TEST)

    def test_validation_changes_the_baselines_with_options_alone(self) -> None:
        without, tuned = baseline_scores(TRAIN, None, TEST), baseline_scores(TRAIN, TRAIN, TEST)
        assert without["baseline_mean_rmse"] == tuned["baseline_mean_rmse"]
        assert without["baseline_bias_rmse"] != tuned["baseline_bias_rmse"]
        assert without["baseline_mf_rmse"] != tuned["baseline_mf_rmse"]

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
