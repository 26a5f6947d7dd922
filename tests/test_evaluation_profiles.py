"""Each profile's scores against values worked out by hand from its definition, and its fast paths against slow ones."""

import itertools
import math
import random

import pytest

from gavamoe_hf.evaluation import (
    EvaluationOptions,
    feature_coverage,
    feature_diversity,
    score_profile,
    sentiment_agreement,
)
from gavamoe_hf.evaluation.profiles import (
    PROFILES,
    longest_common_subsequence,
    peer_rouge_l,
    split_punctuation_tokens,
)

# Repeated words, an empty output, words left out, ties for the longest common subsequence, case, a word too many
PAIRS = [
    ("a a a b", "a b"),
    ("", "good pedal"),
    ("the cat sat", "the cat is sat down"),
    ("b a b a", "a b a b"),
    ("Good pedal", "good pedal"),
    ("one two three four five", "one two three four"),
]
# Clipped matches / n-grams of the outputs, pair by pair:
#   1: 2/4 + 0/0 + 3/3 + 4/4 + 1/2 + 4/5 = 14/18     ("a" counts once of three; "Good" is not "good")
#   2: 1/3 + 0/0 + 1/2 + 2/3 + 0/1 + 3/4 = 7/13      (b a, a b, b a against a b, b a, a b: 2)
#   3: 0/2 + 0/0 + 0/1 + 2/2 + 0/0 + 2/3 = 4/8
#   4: 0/1 + 0/0 + 0/0 + 0/1 + 0/0 + 1/2 = 1/4
# Lengths 4 + 0 + 3 + 4 + 2 + 5 = 18 against 2 + 2 + 5 + 4 + 2 + 4 = 19: penalty exp(1 - 19/18).
PRECISIONS = [14 / 18, 7 / 13, 4 / 8, 1 / 4]
SMOOTHED = [15 / 19, 8 / 14, 5 / 9, 2 / 5]
PENALTY = math.exp(-1 / 18)
# Sets of unigrams: {a b} = {a b} 1; empty 0; 3 of 3 and of 5: 3/4; {a b} = {a b} 1; 1 of 2 and of 2: 1/2; 4 of 5 and
# of 4: 8/9. Sets of bigrams: {aa ab} {ab} 1 of 2 and of 1: 2/3; 0; 1 of 2 and of 4: 1/3; {ba ab} = {ab ba} 1; 0; 3 of 4
# and of 3: 6/7.
ROUGE_1 = (1 + 0 + 3 / 4 + 1 + 1 / 2 + 8 / 9) / 6
ROUGE_2 = (2 / 3 + 0 + 1 / 3 + 1 + 0 + 6 / 7) / 6
# Longest common subsequences 2, 0, 3, 3 ("a b a" or "b a b"), 1, 4. F = (1 + b^2) R P / (R + b^2 P), b = P / R:
#   1: P 1/2, R 1, b^2 1/4:      5/4 * 1/2 / (1 + 1/8) = 5/9
#   3: P 1, R 3/5, b^2 25/9:     34/9 * 3/5 / (3/5 + 25/9) = 51/76
#   4: P = R = 3/4: 3/4          5: P = R = 1/2: 1/2
#   6: P 4/5, R 1, b^2 16/25:    41/25 * 4/5 / (1 + 64/125) = 164/189
ROUGE_L = (5 / 9 + 0 + 51 / 76 + 3 / 4 + 1 / 2 + 164 / 189) / 6

# What only the split of contractions and punctuation makes equal
PUNCTUATED = [
    ("It's great!!", "It 's great!"),  # It 's great !       | the same
    ("", "fine."),  #                    nothing             | fine .
    ("don't: buy", "do n't , buy"),  #   do n't , buy        | the same
    ("good; good; good", "good."),  #    good . good . good  | good .
    ("(nice) one", "nice one"),  #       ( nice ) one        | nice one
]
# Matches: 1: 4/4 + 0/0 + 4/4 + 2/5 + 2/4 = 12/17;  2: 3/3 + 0/0 + 3/3 + 1/4 + 0/3 = 7/13;
#          3: 2/2 + 0/0 + 2/2 + 0/3 + 0/2 = 4/9;    4: 1/1 + 0/0 + 1/1 + 0/2 + 0/1 = 2/5.
# Lengths 17 against 4 + 2 + 4 + 2 + 2 = 14: no penalty.
PUNCTUATED_PRECISIONS = [12 / 17, 7 / 13, 4 / 9, 2 / 5]
PUNCTUATED_SMOOTHED = [13 / 18, 8 / 14, 5 / 10, 3 / 6]
# Sets of unigrams 1, 0, 1, {good .} 1, 2 of 4 and of 2: 2/3; of bigrams 1, 0, 1, 1 of 2 and of 1: 2/3, 0.
PUNCTUATED_ROUGE_1 = (1 + 0 + 1 + 1 + 2 / 3) / 5
PUNCTUATED_ROUGE_2 = (1 + 0 + 1 + 2 / 3 + 0) / 5
# 4: common 2, P 2/5, R 1, b^2 4/25: 29/25 * 2/5 / (1 + 8/125) = 58/133.  5: P 1/2, R 1: 5/9, as above.
PUNCTUATED_ROUGE_L = (1 + 0 + 1 + 58 / 133 + 5 / 9) / 5


def scored(profile: str, pairs: list[tuple[str, str]], **columns) -> dict:
    predictions, references = (list(texts) for texts in zip(*pairs, strict=True))
    return score_profile(predictions, references, EvaluationOptions(profiles=[profile]), **columns)


def geometric_mean(values: list[float]) -> float:
    return math.prod(values) ** (1 / len(values))


class TestTokens:
    def test_contractions_and_punctuation(self) -> None:
        text = "I'm sure they've said: \"we'll see\"... (don't worry);; right?! it's he'd, you're"
        assert " ".join(split_punctuation_tokens(text)) == (
            "I 'm sure they 've said , \"we 'll see\" . ( do n't worry ) . right ? ! it 's he 'd , you 're"
        )

    def test_case_is_kept(self) -> None:
        assert split_punctuation_tokens("Good STUFF!") == ["Good", "STUFF", "!"]

    def test_peter_cuts_references_and_not_predictions(self) -> None:
        # 17 words, of which 15 are left: 15 of 17 unigrams match, and the output is longer.
        text = " ".join(f"w{number}" for number in range(17))
        assert scored("peter", [(text, text)])["bleu_1"] == pytest.approx(100 * 15 / 17)
        assert scored("pepler", [(text, text)])["bleu_1"] == pytest.approx(100)
        # P 15/17, R 1
        assert scored("peter", [(text, text)])["rouge_1"] == pytest.approx(100 * 30 / 32)


class TestBleu:
    @pytest.mark.parametrize("profile", ["peter", "pepler"])
    def test_not_smoothed(self, profile: str) -> None:
        scores = scored(profile, PAIRS)
        assert scores["bleu_1"] == pytest.approx(100 * PENALTY * 14 / 18)
        assert scores["bleu_4"] == pytest.approx(100 * PENALTY * geometric_mean(PRECISIONS))

    def test_smoothed_in_every_order(self) -> None:
        scores = scored("gavamoe-released", PAIRS)
        assert scores["bleu_1"] == pytest.approx(100 * PENALTY * 15 / 19)
        assert scores["bleu_4"] == pytest.approx(100 * PENALTY * geometric_mean(SMOOTHED))

    @pytest.mark.parametrize(
        ("profile", "precisions"), [("pepler", PUNCTUATED_PRECISIONS), ("gavamoe-released", PUNCTUATED_SMOOTHED)]
    )
    def test_punctuation(self, profile: str, precisions: list[float]) -> None:
        scores = scored(profile, PUNCTUATED)
        assert scores["bleu_1"] == pytest.approx(100 * precisions[0])
        assert scores["bleu_4"] == pytest.approx(100 * geometric_mean(precisions))

    def test_zero_where_an_order_is_zero(self) -> None:
        # Without the last pair no 4-gram matches. Smoothed: (10+1)/(13+1), (4+1)/(9+1), (2+1)/(5+1), (0+1)/(2+1);
        # 13 tokens against 15.
        assert scored("peter", PAIRS[:-1])["bleu_4"] == 0
        expected = math.exp(1 - 15 / 13) * geometric_mean([11 / 14, 5 / 10, 3 / 6, 1 / 3])
        assert scored("gavamoe-released", PAIRS[:-1])["bleu_4"] == pytest.approx(100 * expected)

    @pytest.mark.parametrize("profile", ["default", "peter", "pepler", "gavamoe-released"])
    def test_only_empty_outputs(self, profile: str) -> None:
        scores = scored(profile, [("", "good"), ("  ", "fine")])
        assert {scores[key] for key in ("bleu_1", "bleu_4", "rouge_1", "rouge_2", "rouge_l")} == {0}
        assert scores["unique_sentence_ratio"] == 1 / 2
        assert scored(profile, [("", "")])["bleu_4"] == 0


class TestRouge:
    @pytest.mark.parametrize("profile", ["peter", "pepler", "gavamoe-released"])
    def test_hand_worked(self, profile: str) -> None:
        scores = scored(profile, PAIRS)
        # The definition's 1e-8 is in the denominator too
        assert scores["rouge_1"] == pytest.approx(100 * ROUGE_1, rel=1e-7)
        assert scores["rouge_2"] == pytest.approx(100 * ROUGE_2, rel=1e-7)
        assert scores["rouge_l"] == pytest.approx(100 * ROUGE_L)

    @pytest.mark.parametrize("profile", ["pepler", "gavamoe-released"])
    def test_punctuation(self, profile: str) -> None:
        scores = scored(profile, PUNCTUATED)
        assert scores["rouge_1"] == pytest.approx(100 * PUNCTUATED_ROUGE_1, rel=1e-7)
        assert scores["rouge_2"] == pytest.approx(100 * PUNCTUATED_ROUGE_2, rel=1e-7)
        assert scores["rouge_l"] == pytest.approx(100 * PUNCTUATED_ROUGE_L)

    def test_epsilon_of_the_definition(self) -> None:
        # P = R = 1: 2 / (2 + 1e-8)
        assert scored("peter", [("a", "a")])["rouge_1"] == pytest.approx(200 / (2 + 1e-8), rel=1e-12)

    def test_rouge_l_is_not_f1(self) -> None:
        assert round(peer_rouge_l(["a", "x", "y"], ["a"]), 3) == 0.357

    def test_longest_common_subsequence_equals_the_table(self) -> None:
        generator = random.Random(0)
        for _ in range(300):
            left, right = ([generator.choice("abc") for _ in range(generator.randrange(9))] for _ in range(2))
            table = [[0] * (len(right) + 1) for _ in range(len(left) + 1)]
            for row, column in itertools.product(range(len(left)), range(len(right))):
                table[row + 1][column + 1] = (
                    table[row][column] + 1
                    if left[row] == right[column]
                    else max(table[row][column + 1], table[row + 1][column])
                )
            assert longest_common_subsequence(left, right) == table[-1][-1]


class TestFeatures:
    PREDICTIONS = ("great tone and sound", "the tone is Sound", "", "battery life is fine , tone too")
    FEATURES = (["tone"], ["sound"], ["tone"], ["battery life"])
    SET = ("tone", "sound", "battery life", "price", "life")

    def scored(self, profile: str) -> dict:
        pairs = [(text, "x") for text in self.PREDICTIONS]
        return scored(profile, pairs, features=self.FEATURES, feature_set=self.SET)

    def test_peers(self) -> None:
        scores = self.scored("peter")
        # Named: {tone sound}, {tone} ("Sound" is not "sound"), {}, {battery life, life, tone}. Given: yes, no, no, yes.
        assert scores["feature_match"] == 2 / 4
        assert scores["feature_coverage"] == 4 / 5
        # Pairs: 1-2, 1-4 and 2-4 share the tone, the other three nothing
        assert scores["feature_diversity"] == 3 / 6

    def test_default_lower_cases(self) -> None:
        scores = self.scored("default")
        # The second names the sound too: a match, and shared with the first
        assert scores["feature_match"] == 3 / 4
        assert scores["feature_coverage"] == feature_coverage(self.PREDICTIONS, self.SET) == 4 / 5
        assert scores["feature_diversity"] == feature_diversity(self.PREDICTIONS, self.SET) == 4 / 6

    @pytest.mark.parametrize("num_outputs", [2, 3, 40])
    def test_diversity_equals_its_definition(self, num_outputs: int) -> None:
        generator = random.Random(num_outputs)
        features = [f"f{number}" for number in range(12)]
        texts = [
            " ".join(generator.choices([*features, "x", "y"], k=generator.randrange(9))) for _ in range(num_outputs)
        ]
        named = [set(text.split()) & set(features) for text in texts]
        pairs = list(itertools.combinations(named, 2))
        expected = sum(len(left & right) for left, right in pairs) / len(pairs)
        assert feature_diversity(texts, features) == pytest.approx(expected)
        scores = scored("peter", [(text, "x") for text in texts], features=[["f0"]] * num_outputs, feature_set=features)
        assert scores["feature_diversity"] == pytest.approx(expected)

    def test_one_output_has_no_pairs(self) -> None:
        scores = scored("peter", [("tone", "x")], features=[["tone"]])
        assert "feature_diversity" not in scores and scores["feature_coverage"] == 1

    def test_features_are_stripped_as_in_files(self) -> None:
        scores = scored("peter", [("tone", "x")], features=[[" tone", "", " "]], feature_set=["tone ", "price"])
        assert scores["feature_match"] == 1 and scores["feature_coverage"] == 1 / 2

    def test_unknown_feature(self) -> None:
        with pytest.raises(ValueError, match=r"expected features of `feature_set`, but got 'price'\. Pass those"):
            scored("peter", [("a", "a")], features=[["price"]], feature_set=["tone"])

    def test_nothing_to_count(self) -> None:
        with pytest.raises(ValueError, match=r"at least one feature in `feature_set`, but got none"):
            feature_coverage(["a"], [" "])
        with pytest.raises(ValueError, match=r"at least two texts and one feature, but got 1 and 1"):
            feature_diversity(["a"], ["a"])


class TestRatings:
    def test_peers_clip_to_the_range_of_the_corpus(self) -> None:
        pairs = [("a", "a"), ("b", "b")]
        ratings = {"ratings": [5, 2], "predicted_ratings": [6.0, 0.5]}
        # Range 1 to 5: errors 0 and -1. Range of the two ratings, 2 to 5: errors 0 and 0. Unclipped: 1 and -1.5.
        scores = scored("pepler", pairs, **ratings, rating_range=(1, 5))
        assert scores["rating_rmse"] == pytest.approx(math.sqrt(1 / 2))
        assert scores["rating_mae"] == pytest.approx(1 / 2)
        assert "clip:1-5" in scores["signatures"]["rating_mae"]
        assert scored("peter", pairs, **ratings)["rating_mae"] == 0
        assert scored("default", pairs, **ratings)["rating_mae"] == pytest.approx(5 / 4)

    def test_not_a_number(self) -> None:
        with pytest.raises(ValueError, match=r"expected finite ratings in `rating`, but got nan at position 1"):
            scored("peter", [("a", "a")] * 2, ratings=[1, float("nan")], predicted_ratings=[1, 2])

    def test_lengths_differ(self) -> None:
        with pytest.raises(ValueError, match=r"expected one rating for each prediction, but got 2 predictions and 1\."):
            scored("peter", [("a", "a")] * 2, ratings=[1], predicted_ratings=[1, 2])


class TestSentiment:
    @staticmethod
    def judge(text: str) -> float:
        return {"good": 0.9, "bad": -0.2}.get(text, 0.0)

    def test_hand_worked(self) -> None:
        # Agrees, agrees (3 is positive), disagrees, agrees, neutral: 3 of 4 that say something; 1 of 5 does not.
        texts, ratings = ["good", "good", "bad", "bad", ""], [5, 3, 4, 1, 5]
        shares = sentiment_agreement(texts, ratings, sentiment=self.judge)
        assert shares == {"sentiment_agreement": 3 / 4, "sentiment_neutral": pytest.approx(1 / 5)}
        options = EvaluationOptions(sentiment=self.judge)
        scores = score_profile(texts, texts, options, ratings=ratings)
        assert {key: scores[key] for key in shares} == shares
        assert "sentiment:judge|threshold:3" in scores["signatures"]["sentiment_agreement"]

    def test_threshold(self) -> None:
        assert sentiment_agreement(["good"], [3], threshold=3.5, sentiment=self.judge)["sentiment_agreement"] == 0

    def test_only_neutral(self) -> None:
        assert sentiment_agreement(["", "x"], [5, 1], sentiment=self.judge) == {"sentiment_neutral": 1.0}

    def test_needs_ratings(self) -> None:
        with pytest.raises(ValueError, match=r"expected `ratings` to compare the sentiment with"):
            score_profile(["a"], ["a"], EvaluationOptions(sentiment=self.judge))

    def test_vader(self) -> None:
        pytest.importorskip("vaderSentiment")
        texts = ["These strings sound great, I love them.", "Terrible cable, it broke at once.", "It is a cable.", ""]
        assert sentiment_agreement(texts, [5, 1, 5, 5]) == {"sentiment_agreement": 1.0, "sentiment_neutral": 0.5}


class TestProfiles:
    def test_signatures(self) -> None:
        signatures = scored("peter", PAIRS)["signatures"]
        assert signatures["bleu_4"].startswith(
            "profile:peter|metric:bleu_4|tok:whitespace|case:mixed|ref:15w|smooth:none|version:"
        )
        assert "smooth:add-1" in scored("gavamoe-released", PAIRS)["signatures"]["bleu_1"]
        import sacrebleu

        assert f"|sacrebleu:{sacrebleu.__version__}|" in scored("default", PAIRS)["signatures"]["bleu_1"]
        assert "|rouge_score:" in scored("default", PAIRS)["signatures"]["rouge_l"]

    @pytest.mark.parametrize("profile", [name for name in PROFILES if name != "xrec"])
    def test_every_score_has_a_signature_of_its_own(self, profile: str) -> None:
        scores = scored(profile, PAIRS, features=[["a"]] * 6, ratings=[1] * 6, predicted_ratings=[2] * 6)
        signatures = scores.pop("signatures")
        assert list(signatures) == list(scores) and len(set(signatures.values())) == len(scores)
        assert all(f"profile:{profile}|metric:{key}|" in signatures[key] for key in scores)

    def test_unknown(self) -> None:
        with pytest.raises(ValueError, match=r"Expected a profile among default, peter, .*, xrec, but got 'petr'"):
            EvaluationOptions(profiles=["petr"])

    def test_twice(self) -> None:
        with pytest.raises(ValueError, match="Expected `profiles` as a list of different names"):
            EvaluationOptions(profiles=["peter", "peter"])
