"""Text scores of the profile `default` against values worked out by hand and against the libraries themselves."""

import math
import sys

import pytest
from references import library_scores

from gavamoe_hf.evaluation import require_text_metrics, score_profile

PREDICTIONS = [
    "These strings sound great on my guitar.",
    "The Cable is sturdy, and it's cheap!",
    "",
    "a good good good pedal",
]
REFERENCES = [
    "These strings sound really great on my old guitar.",
    "It is a sturdy cable and cheap.",
    "I like this tuner",
    "A very good pedal for the price.",
]


def bleu(predictions, references, order=4):
    return score_profile(predictions, references)[f"bleu_{order}"]


def rouge(predictions, references):
    scores = score_profile(predictions, references)
    return {key: scores[key] for key in ("rouge_1", "rouge_2", "rouge_l")}


def distinct_n(texts, n):
    return score_profile(texts, texts)[f"distinct_{n}"]


def feature_match(predictions, features):
    return score_profile(predictions, predictions, features=features).get("feature_match")


class TestBleu:
    def test_hand_worked_with_brevity_penalty(self) -> None:
        # "the cat sat on mat" against "the cat sat on the mat". Precisions: 5/5, 3/4, 2/3, 1/2.
        # 5 tokens against 6: brevity penalty exp(1 - 6/5) = 0.81873.
        # BLEU-1 = 0.81873 * 1; BLEU-4 = 0.81873 * (1 * 3/4 * 2/3 * 1/2)^(1/4) = 0.81873 * 0.70711.
        penalty = math.exp(-0.2)
        prediction, reference = ["the cat sat on mat"], ["the cat sat on the mat"]
        assert bleu(prediction, reference, order=1) == pytest.approx(100 * penalty)
        assert bleu(prediction, reference) == pytest.approx(100 * penalty * 0.25**0.25)

    def test_repeated_words_are_clipped(self) -> None:
        # "good" occurs once in the reference, so of 4 predicted ones 1 counts: 1/4. Lengths are equal: no
        # penalty.
        assert bleu(["good good good good"], ["a good red pedal"], order=1) == pytest.approx(25.0)

    def test_is_a_corpus_score_and_not_a_mean(self) -> None:
        # Unigrams of both records are pooled: (1 + 0) / (1 + 3) = 25 %; the mean over records would be 50 %.
        assert bleu(["a", "b c d"], ["a", "x y z"], order=1) == pytest.approx(25.0)

    def test_case_and_attached_punctuation_do_not_matter(self) -> None:
        # 13a cuts the full stop off: "good pedal ." on both sides.
        assert bleu(["GOOD Pedal."], ["good pedal ."], order=1) == pytest.approx(100.0)

    def test_empty_prediction_is_scored(self) -> None:
        # 4 of 4 unigrams match, but 4 tokens stand against 4 + 2: exp(1 - 6/4).
        assert bleu(["the cat sat down", ""], ["the cat sat down", "a dog"], order=1) == pytest.approx(
            100 * math.exp(-0.5)
        )
        assert bleu([""], ["a dog"]) == 0.0


class TestRouge:
    def test_hand_worked(self) -> None:
        # 1: "the cat sat" / "the cat is sat down". Unigrams 3 common: P 3/3, R 3/5, F 3/4. Bigrams 1 common
        #    ("the cat"): P 1/2, R 1/4, F 1/3. Longest common subsequence 3: F 3/4.
        # 2: "sat cat the" / "the cat sat". Unigrams F 1. Bigrams 0. Longest common subsequence 1: F 1/3.
        scores = rouge(["the cat sat", "sat cat the"], ["the cat is sat down", "the cat sat"])
        assert scores["rouge_1"] == pytest.approx(100 * (3 / 4 + 1) / 2)
        assert scores["rouge_2"] == pytest.approx(100 * (1 / 3) / 2)
        assert scores["rouge_l"] == pytest.approx(100 * (3 / 4 + 1 / 3) / 2)

    def test_no_stemming(self) -> None:
        assert rouge(["string"], ["strings"])["rouge_1"] == 0.0

    def test_empty_prediction_counts_as_zero(self) -> None:
        # (1 + 0) / 2
        assert rouge(["good", ""], ["Good", "pedal"])["rouge_l"] == pytest.approx(50.0)


class TestDistinct:
    def test_hand_worked_over_the_corpus(self) -> None:
        # Tokens: a b a | A c. Unigrams 5, different {a, b, c} 3. Bigrams (a b), (b a), (a c): 3 of 3.
        assert distinct_n(["a b a", "A c"], 1) == pytest.approx(100 * 3 / 5)
        assert distinct_n(["a b a", "A c"], 2) == pytest.approx(100.0)

    def test_repeated_text(self) -> None:
        # Bigrams (a b), (b c), twice each: 2 of 4.
        assert distinct_n(["a b c", "a b c"], 2) == pytest.approx(50.0)

    def test_no_ngram_reaches_over_the_end_of_a_text(self) -> None:
        # (a b) and (a b). Joined, there would be a third, (b a).
        assert distinct_n(["a b", "a b"], 2) == pytest.approx(50.0)

    def test_punctuation_stays_on_its_word(self) -> None:
        # "strings." and "strings" are 2 tokens of 2.
        assert distinct_n(["strings.  Strings"], 1) == pytest.approx(100.0)

    def test_texts_without_ngrams(self) -> None:
        assert distinct_n(["", "  "], 1) == 0.0
        assert distinct_n(["one", "", "word"], 2) == 0.0


def test_unique_sentence_ratio() -> None:
    # "A  b" and "a b" are one; "c" and the empty text are two more: 3 of 4.
    for texts, share in ((["A  b", "a b", "c", ""], 3 / 4), (["x", "x", "x", "x"], 1 / 4)):
        assert score_profile(texts, texts)["unique_sentence_ratio"] == pytest.approx(share)


class TestFeatureMatch:
    def test_hand_worked(self) -> None:
        predictions = ["Good strings.", "the string is fine", "my strings", "no match", "", "anything"]
        features = [["strings"], ["strings"], ["String"], ["sound", "Match"], ["tone"], []]
        # yes, no ("string"), no ("strings"), yes (the second one), no (empty output); the last has none: 2 of
        # 5.
        assert feature_match(predictions, features) == pytest.approx(2 / 5)

    def test_features_of_several_words(self) -> None:
        predictions = ["great sound quality!", "the sound has quality", "quality sound", "noise"]
        # In order and adjacent in the first alone: 1 of 4.
        assert feature_match(predictions, [["Sound quality"]] * 4) == pytest.approx(1 / 4)

    def test_repeated_match_counts_once(self) -> None:
        assert feature_match(["pick pick pick", "cable"], [["pick", "pick"], ["pick"]]) == pytest.approx(1 / 2)

    def test_feature_made_of_symbols(self) -> None:
        assert feature_match(["learn C++ now", "learn C now"], [["c++"], ["c++"]]) == pytest.approx(1 / 2)

    def test_none_where_nobody_has_a_feature(self) -> None:
        assert feature_match(["a", "b"], [[], [" "]]) is None

    def test_bare_string_as_features(self) -> None:
        with pytest.raises(ValueError, match=r"a list of features for each prediction, but got 'tone'\. Wrap it"):
            feature_match(["a", "b"], [["a"], "tone"])

    def test_lengths_differ(self) -> None:
        with pytest.raises(ValueError, match=r"one feature for each prediction, but got 2 predictions and 1"):
            feature_match(["a", "b"], [["a"]])


class TestAll:
    def test_equal_the_libraries(self) -> None:
        features = [["strings"], ["cable"], ["tuner"], []]
        expected = library_scores(PREDICTIONS, REFERENCES, features)
        scores = score_profile(PREDICTIONS, REFERENCES, features=features)
        assert len(expected) == 9
        assert {key: scores[key] for key in expected} == pytest.approx(expected, rel=1e-12)
        assert scores["unique_sentence_ratio"] == 1.0
        assert scores["feature_match"] == pytest.approx(2 / 3)

    @pytest.mark.parametrize("features", [None, [[]]])
    def test_feature_match_is_absent_without_features(self, features: list[list[str]] | None) -> None:
        assert "feature_match" not in score_profile(["a pedal"], ["a pedal"], features=features)

    def test_all_empty_predictions(self) -> None:
        scores = score_profile(["", ""], ["a pedal", "a cable"], features=[["pedal"], ["cable"]])
        scores.pop("signatures")
        assert scores.pop("unique_sentence_ratio") == 0.5
        assert set(scores.values()) == {0.0}


class TestPairErrors:
    def test_lengths_differ(self) -> None:
        with pytest.raises(ValueError, match=r"one reference for each prediction, but got 2 .* 1 .*Pass both"):
            score_profile(["a", "b"], ["a"])

    def test_nothing_to_score(self) -> None:
        with pytest.raises(ValueError, match=r"at least one text in `predictions`, but got none\. Check"):
            score_profile([], [])

    def test_one_string(self) -> None:
        with pytest.raises(ValueError, match=r"`predictions` to be a list of strings, but got one string\. Wrap"):
            score_profile("abc", ["a", "b", "c"])

    def test_not_a_string(self) -> None:
        with pytest.raises(ValueError, match=r"strings in `references`, but got NoneType at position 1\. Pass"):
            score_profile(["a", "b"], ["a", None])


class TestMissingPackages:
    def test_installed(self) -> None:
        assert require_text_metrics() is None

    @pytest.mark.parametrize("package", ["sacrebleu", "rouge_score"])
    def test_names_the_extra(self, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, package, None)  # what Python does for a module that must not be imported
        message = rf'could not import {package}\. Install it with `pip install "\.\[metrics\]"`'
        with pytest.raises(ImportError, match=message):
            require_text_metrics()
        with pytest.raises(ImportError, match=message):
            score_profile(["a"], ["a"])
