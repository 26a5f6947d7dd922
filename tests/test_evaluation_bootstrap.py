"""Intervals and tests: the same seed gives the same, they cover what they claim, and agree with scoring anew."""

import dataclasses
import random

import numpy as np
import pytest

from gavamoe_hf.evaluation.bootstrap import confidence_intervals, paired_test, resample_scores, resample_weights
from gavamoe_hf.evaluation.evaluator import EvaluationOptions, collect_statistics
from gavamoe_hf.evaluation.prediction_files import Corpus, PredictionRecord
from gavamoe_hf.evaluation.profiles import PROFILES
from gavamoe_hf.evaluation.record_statistics import Coverage, ProfileStatistics, _count

WORDS = [f"w{number}" for number in range(30)]
PRESENT = frozenset({"feature", "rating", "predicted_rating"})


def random_records(num_records: int, seed: int, share_kept: float = 0.5) -> list[PredictionRecord]:
    """Predictions that keep a share of their reference's words; all else does not depend on the share."""
    texts, changes = random.Random(seed), random.Random(seed + 1)
    records = []
    for line in range(1, num_records + 1):
        reference = texts.choices(WORDS, weights=range(30, 0, -1), k=texts.randrange(3, 9))
        rating, feature = texts.randrange(1, 6), texts.choice(WORDS)
        kept = [word if changes.random() < share_kept else changes.choice(WORDS) for word in reference]
        error = changes.gauss(0, 2 - share_kept)
        texts_of = {"reference": " ".join(reference), "prediction": " ".join(kept)}
        records.append(
            PredictionRecord(
                line, "u", "i", **texts_of, features=(feature,), rating=rating, predicted_rating=rating + error
            )
        )
    return records


def statistics(records: list[PredictionRecord], profile: str = "default") -> ProfileStatistics:
    corpus = Corpus(set(WORDS), (1, 5))
    return collect_statistics(records, EvaluationOptions(profiles=[profile]), corpus, PRESENT)[0]


@pytest.mark.parametrize("profile", ["default", "peter", "gavamoe-released"])
def test_weights_score_as_copies_of_records_do(profile: str) -> None:
    records = random_records(12, seed=3)
    weights = np.array([[2, 0, 1, 3, 0, 1, 0, 1, 2, 0, 1, 1]], dtype=float)
    copies = [record for record, times in zip(records, weights[0].astype(int), strict=True) for _ in range(times)]
    resampled, anew = statistics(records, profile).resampled(weights), statistics(copies, profile).scores()
    assert {"rating_rmse", "bleu_4", "rouge_l", "feature_match"} <= set(resampled)
    for key in set(resampled) - {"feature_diversity"}:
        assert resampled[key][0] == pytest.approx(anew[key]), key


def test_diversity_of_a_resample_leaves_out_pairs_of_copies() -> None:
    records = random_records(8, seed=1)
    weights = np.array([[2, 0, 1, 0, 3, 1, 1, 0]], dtype=float)
    chosen = [row for row, times in enumerate(weights[0].astype(int)) for _ in range(times)]
    named = [set(record.prediction.split()) for record in records]
    pairs = [(i, j) for place, i in enumerate(chosen) for j in chosen[place + 1 :] if i != j]
    expected = sum(len(named[i] & named[j]) for i, j in pairs) / len(pairs)
    assert statistics(records).resampled(weights)["feature_diversity"][0] == pytest.approx(expected)


def test_jackknife_scores_equal_scoring_anew() -> None:
    records = random_records(15, seed=5)
    records[4] = records[2]
    found = statistics(records).coverages
    assert set(found) == {"distinct_1", "distinct_2", "unique_sentence_ratio", "feature_coverage"}
    for left_out in range(15):
        anew = statistics(records[:left_out] + records[left_out + 1 :]).scores()
        for key, coverage in found.items():
            assert coverage.without_each()[left_out] == pytest.approx(anew[key]), key


def test_weights_are_counts_and_do_not_depend_on_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    at_once = np.concatenate(list(resample_weights(7, 20, seed=1)))
    monkeypatch.setattr("gavamoe_hf.evaluation.bootstrap._WEIGHTS_AT_ONCE", 21)
    chunks = list(resample_weights(7, 20, seed=1))
    assert [len(chunk) for chunk in chunks] == [3] * 6 + [2]
    assert np.array_equal(np.concatenate(chunks), at_once)
    assert (at_once.sum(axis=1) == 7).all() and len({tuple(row) for row in at_once}) == 20
    assert not np.array_equal(np.concatenate(list(resample_weights(7, 20, seed=2))), at_once)


def test_the_same_seed_gives_the_same_intervals() -> None:
    scored = statistics(random_records(40, seed=0))
    first, again, other = (confidence_intervals(scored, resample_scores([scored], 50, seed)[0]) for seed in (0, 0, 1))
    assert first == again != other
    assert set(first) == set(scored.scores())
    # All outputs are different, and each feature is named by several
    assert {key for key in first if first[key] is None} == {"unique_sentence_ratio", "feature_coverage"}
    for key, value in scored.scores().items():
        if first[key] is not None:
            lower, upper = first[key]
            assert lower <= value <= upper, key


def test_no_interval_where_nothing_varies() -> None:
    # Outputs that are all different, and name the same feature
    different = [PredictionRecord(line, "u", "i", "a", f"x{line} w1", ("w1",), 3.0, 3.0) for line in range(1, 9)]
    scored = statistics(different)
    found = confidence_intervals(scored, resample_scores([scored], 50)[0])
    assert scored.scores()["unique_sentence_ratio"] == scored.scores()["feature_match"] == 1
    for key in ("unique_sentence_ratio", "feature_coverage", "feature_match", "rating_mae"):
        assert found[key] is None, key
    assert found["distinct_1"] is None  # one new token of two in each: no record changes the share
    # One of them twice: the ratio is another without either
    scored = statistics([*different, different[0]])
    assert confidence_intervals(scored, resample_scores([scored], 50)[0])["unique_sentence_ratio"][0] < 8 / 9


def test_feature_in_one_record_alone() -> None:
    records = random_records(3, seed=0)
    for place in (1, 2):
        records[place] = dataclasses.replace(records[place], features=())
    scored = statistics(records)
    seed = next(seed for seed in range(99) if not np.concatenate(list(resample_weights(3, 1, seed)))[0, 0])
    assert scored.scores()["feature_match"] in (0, 1)
    for num_resamples, seed_ in ((1, seed), (200, 0)):
        resampled = resample_scores([scored], num_resamples, seed_)
        assert confidence_intervals(scored, resampled[0])["feature_match"] is None


def test_bootstrap_covers_the_mean() -> None:
    generator, covered = np.random.default_rng(0), 0
    for seed in range(200):
        errors = generator.exponential(size=100)  # of mean 1
        rows = np.stack([errors**2, errors], axis=1)
        columns = {"squared_error": 0, "absolute_error": 1}
        drawn = ProfileStatistics(PROFILES["xrec"], 100, columns, rows, {}, None, {"rating_mae": "", "rating_rmse": ""})
        lower, upper = confidence_intervals(drawn, resample_scores([drawn], 300, seed)[0])["rating_mae"]
        covered += lower <= 1 <= upper
    # 95 % in the limit; skewed samples of 100 fall a little short
    assert 0.88 <= covered / 200 <= 0.99


def test_jackknife_covers_where_the_bootstrap_cannot() -> None:
    # Share of different values among 200 draws from a power law: its expectation, and how often an interval holds it
    generator = np.random.default_rng(0)
    probabilities = 1 / np.arange(1, 1001)
    probabilities /= probabilities.sum()
    expected = (1 - (1 - probabilities) ** 200).sum() / 200
    each, covered, resampled_covered = np.arange(200), 0, 0
    for _ in range(200):
        draws = generator.choice(1000, size=200, p=probabilities)
        different, only_here, counted = _count(draws, each, 200)
        drawn = ProfileStatistics(
            PROFILES["xrec"],
            200,
            {},
            np.zeros((200, 0)),
            {"unique_sentence_ratio": Coverage(different, only_here, counted, 200)},
            None,
            {"unique_sentence_ratio": ""},
        )
        lower, upper = confidence_intervals(drawn, {})["unique_sentence_ratio"]
        covered += lower <= expected <= upper
        ratios = [len(set(generator.choice(draws, size=200))) / 200 for _ in range(100)]
        lower, upper = np.percentile(ratios, [2.5, 97.5])
        resampled_covered += lower <= expected <= upper
    assert covered / 200 >= 0.93
    assert resampled_covered / 200 < 0.1


class TestPairedTest:
    @staticmethod
    def compare(left: list[PredictionRecord], right: list[PredictionRecord]) -> dict:
        systems = [statistics(left), statistics(right)]
        return paired_test(*systems, *resample_scores(systems, 400, seed=0))

    def test_identical(self) -> None:
        records = random_records(30, seed=0)
        tests = self.compare(records, list(records))
        assert len(tests) == 13
        for test in tests.values():
            assert test == {"difference": 0.0, "confidence_95": None, "p_value": 1.0}

    def test_clearly_better(self) -> None:
        tests = self.compare(random_records(150, 0, share_kept=0.9), random_records(150, 0, share_kept=0.3))
        for key in ("bleu_1", "rouge_1", "rouge_l"):
            assert tests[key]["difference"] > 0 and tests[key]["confidence_95"][0] > 0
            assert tests[key]["p_value"] == pytest.approx(2 / 401)
        assert tests["rating_rmse"]["difference"] < 0 and tests["rating_rmse"]["confidence_95"][1] < 0

    def test_no_difference_is_seldom_found_where_there_is_none(self) -> None:
        values = []
        for seed in range(40):
            left = random_records(60, seed)
            right = [
                PredictionRecord(1, "u", "i", one.reference, other.prediction, one.features, one.rating, rating)
                for one, other, rating in zip(
                    left,
                    random_records(60, seed),
                    [one.rating + random.Random(seed * 100 + place).gauss(0, 1.5) for place, one in enumerate(left)],
                    strict=True,
                )
            ]
            values.append(self.compare(left, right)["rating_mae"]["p_value"])
        assert sum(value < 0.05 for value in values) <= 6
        assert min(values) < 0.5 < max(values)

    def test_swapped(self) -> None:
        left, right = random_records(50, 0, 0.6), random_records(50, 0, 0.5)
        there, back = self.compare(left, right), self.compare(right, left)
        for key, test in there.items():
            assert back[key]["difference"] == pytest.approx(-test["difference"])
            assert back[key]["p_value"] == pytest.approx(test["p_value"])

    def test_jackknife_without_spread_claims_nothing(self) -> None:
        # All outputs the same against all different: no record's absence changes either ratio by more than its share
        same = [PredictionRecord(line, "u", "i", "a", "x", ("w1",), 3.0, 3.0) for line in range(1, 5)]
        different = [PredictionRecord(line, "u", "i", "a", f"x{line}", ("w1",), 3.0, 3.0) for line in range(1, 5)]
        test = self.compare(same, different)["unique_sentence_ratio"]
        assert test == {"difference": pytest.approx(1 / 4 - 1), "confidence_95": None, "p_value": None}

    def test_one_record_proves_nothing(self) -> None:
        right, wrong = (PredictionRecord(1, "u", "i", "a b", text, ("w1",), 3.0, 3.0) for text in ("a b", "c"))
        test = self.compare([right], [wrong])["rouge_1"]
        assert test == {"difference": pytest.approx(100), "confidence_95": None, "p_value": None}
