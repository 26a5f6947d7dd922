"""What each record adds to a profile's scores, kept as numbers: enough to score any resample without the texts."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from scipy.sparse import csr_matrix

from .bert_scores import BERTSCORE_KEYS, BertScorer
from .feature_metrics import FeatureFinder
from .prediction_files import Corpus, PredictionRecord
from .profiles import (
    MAX_ORDER,
    Profile,
    bleu_counts,
    corpus_bleu,
    ngram_counts,
    peer_rouge_l,
    set_rouge,
)
from .sentiment import Sentiment, agreement_counts
from .text_metrics import _require, _words

# Pairs that wait for BERTScore
_BUFFERED = 256

_BLEU = tuple(f"bleu_{index}" for index in range(2 * MAX_ORDER + 2))
_ROUGE = ("rouge_1", "rouge_2", "rouge_l")


@dataclass(frozen=True)
class Coverage:
    """
    A score that counts different things: n-grams, sentences or features.

    Attributes:
        different (`int`): How many there are.
        only_here (`np.ndarray` of shape `(num_records,)`): How many occur in that record and no other.
        counted (`np.ndarray` of shape `(num_records,)` or `None`): What the record adds to the denominator.
        total (`float`): The denominator.
        scale (`float`): 100 for a score in percent.
    """

    different: int
    only_here: np.ndarray
    counted: np.ndarray | None
    total: float
    scale: float = 1.0

    def score(self) -> float:
        """The score of all records."""
        return self.scale * self.different / self.total if self.total else 0.0

    def without_each(self) -> np.ndarray:
        """The score of all records but one, for each."""
        totals = np.full(len(self.only_here), float(self.total))
        if self.counted is not None:
            totals -= self.counted
        scores = np.zeros(len(totals))
        return np.divide(self.scale * (self.different - self.only_here), totals, out=scores, where=totals > 0)


@dataclass
class ProfileStatistics:
    """
    The statistics of all records under one profile.

    Attributes:
        profile ([`Profile`]): The profile.
        num_records (`int`): How many records there are.
        columns (`dict[str, int]`): Place of each additive statistic in `rows`.
        rows (`np.ndarray` of shape `(num_records, num_columns)`): The additive statistics.
        coverages (`dict[str, Coverage]`): The scores that count different things, by key.
        named (`csr_matrix` of shape `(num_records, num_features)` or `None`): The features that each output names.
        signatures (`dict[str, str]`): The signature of every score, by key; their order is that of the scores.
    """

    profile: Profile
    num_records: int
    columns: dict[str, int]
    rows: np.ndarray
    coverages: dict[str, Coverage]
    named: csr_matrix | None
    signatures: dict[str, str]

    def scores(self) -> dict[str, float]:
        """Every score of the records as they are, by key."""
        found = {key: value[0] for key, value in self.resampled(np.ones((1, self.num_records))).items()}
        found |= {key: coverage.score() for key, coverage in self.coverages.items()}
        return {key: float(found[key]) for key in self.signatures if key in found and np.isfinite(found[key])}

    def resampled(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        """
        The scores but for `coverages`, of resamples.

        Args:
            weights (`np.ndarray` of shape `(num_resamples, num_records)`): How often each resample holds each record.

        Returns:
            `dict[str, np.ndarray]`: arrays of shape `(num_resamples,)` by key, not a number where a resample has
            nothing to score.
        """
        sums = weights @ self.rows
        column = {name: sums[:, place] for name, place in self.columns.items()}
        count = weights.sum(axis=1)
        scores = self._texts(sums, column, count)
        with np.errstate(invalid="ignore", divide="ignore"):
            if "squared_error" in column:
                scores["rating_rmse"] = np.sqrt(column["squared_error"] / count)
                scores["rating_mae"] = column["absolute_error"] / count
            if "has_feature" in column:
                scores["feature_match"] = column["names_feature"] / column["has_feature"]
            if "expresses" in column:
                scores["sentiment_agreement"] = column["agrees"] / column["expresses"]
                scores["sentiment_neutral"] = 1 - column["expresses"] / count
            for key in BERTSCORE_KEYS:
                if key in column:
                    mean = scores[key] = column[key] / count
                    variance = column[f"{key}_squared"] / count - mean**2
                    scores[f"{key}_std"] = np.sqrt(np.maximum(variance, 0))
            if self.named is not None and self.num_records > 1:
                scores["feature_diversity"] = self._diversity(weights, count)
        return {key: values for key, values in scores.items() if key in self.signatures}

    def _texts(self, sums: np.ndarray, column: dict[str, np.ndarray], count: np.ndarray) -> dict[str, np.ndarray]:
        if self.profile.scores == "bertscore":
            return {}
        first = self.columns[_BLEU[0]]
        counts = sums[:, first : first + len(_BLEU)]
        score = _sacrebleu if self.profile.scores == "libraries" else corpus_bleu
        scores = {f"bleu_{order}": score(counts, order, self.profile.smooth) for order in (1, MAX_ORDER)}
        return scores | {name: 100 * column[name] / count for name in _ROUGE}

    def _diversity(self, weights: np.ndarray, count: np.ndarray) -> np.ndarray:
        # Pairs of a record with its own copy are no pairs of outputs: a resample would share more features than any
        # sample of different records
        named = (self.named.T @ weights.T).T  # [num_resamples, num_features]
        own_pairs = weights * (weights - 1) / 2
        shared = (named * (named - 1) / 2).sum(axis=1) - own_pairs @ np.asarray(self.named.sum(axis=1)).ravel()
        return shared / (count * (count - 1) / 2 - own_pairs.sum(axis=1))


def _sacrebleu(counts: np.ndarray, order: int, _: str) -> np.ndarray:
    """sacrebleu's own score from the sums of [`bleu_counts`], with its default smoothing."""
    from sacrebleu.metrics import BLEU

    scores = []
    for row in np.rint(counts).astype(int).tolist():
        matches, possible = row[:order], row[MAX_ORDER : MAX_ORDER + order]
        smooth = {"smooth_method": "exp", "max_ngram_order": order}
        scores.append(BLEU.compute_bleu(matches, possible, row[-2], row[-1], **smooth).score)
    return np.array(scores)


@dataclass
class StatisticsCollector:
    """
    Takes one record at a time and keeps its statistics.

    Args:
        profile ([`Profile`]): The profile.
        corpus ([`Corpus`]): Features and range of ratings.
        present (`frozenset[str]`): The optional keys that every record has.
        bert_scorer ([`BertScorer`], *optional*): Scores the texts too, where given.
        sentiment (`Callable[[str], float]`, *optional*): Judges the texts too, where given.
        positive_threshold (`float`, *optional*, defaults to 3.0): A rating from here on is positive.

    Raises:
        `ImportError`: If sacrebleu or rouge_score is needed and missing.
    """

    profile: Profile
    corpus: Corpus
    present: frozenset[str]
    bert_scorer: BertScorer | None = None
    sentiment: Sentiment | None = None
    positive_threshold: float = 3.0
    _rows: array = field(default_factory=lambda: array("d"), init=False)
    _tokens: array = field(default_factory=lambda: array("i"), init=False)
    _lengths: array = field(default_factory=lambda: array("i"), init=False)
    _sentences: array = field(default_factory=lambda: array("i"), init=False)
    _features: array = field(default_factory=lambda: array("i"), init=False)
    _feature_counts: array = field(default_factory=lambda: array("i"), init=False)
    _vocabulary: dict[str, int] = field(default_factory=dict, init=False)
    _known_sentences: dict[bytes, int] = field(default_factory=dict, init=False)
    _waiting: list[tuple[str, str]] = field(default_factory=list, init=False)
    _bert_scores: list[np.ndarray] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self._score_pair = _pair_scorer(self.profile)
        is_bertscore = self.profile.scores == "bertscore"
        self._rated = {"rating", "predicted_rating"} <= self.present and not is_bertscore
        self._is_default = self.profile.scores == "libraries"
        self._finder = None
        if "feature" in self.present and self.corpus.features and not is_bertscore:
            tokenize = _words if self._is_default else self.profile.tokenize
            self._finder = FeatureFinder(sorted(self.corpus.features), tokenize)
            if not len(self._finder):
                self._finder = None
        names = [] if is_bertscore else [*_BLEU, *_ROUGE]
        names += ["squared_error", "absolute_error"] if self._rated else []
        names += ["has_feature", "names_feature"] if self._finder else []
        names += ["agrees", "expresses"] if self.sentiment else []
        self._names = names

    def add(self, record: PredictionRecord) -> None:
        """Keeps the statistics of a record."""
        row = self._score_pair(record.prediction, record.reference)
        if self._rated:
            predicted = record.predicted_rating
            if self.profile.clip_ratings:
                lowest, highest = self.corpus.rating_range
                predicted = min(max(predicted, lowest), highest)
            error = predicted - record.rating
            row += [error**2, abs(error)]
        if self._finder is not None:
            found = self._finder.find(record.prediction)
            given = self._finder.numbers(record.features)
            self._features.extend(sorted(found))
            self._feature_counts.append(len(found))
            row += [bool(given), bool(given & found)]
        if self.sentiment is not None:
            row += agreement_counts(self.sentiment(record.prediction), record.rating, self.positive_threshold)
        self._rows.extend(row)
        self._keep_tokens(self.profile.tokenize(record.prediction))
        if self.bert_scorer is not None:
            self._waiting.append((record.prediction, record.reference))
            if len(self._waiting) == _BUFFERED:
                self._score_waiting()

    def finish(self) -> ProfileStatistics:
        """The statistics of all records that were added."""
        num_records = len(self._sentences)
        names, rows = list(self._names), np.asarray(self._rows).reshape(num_records, len(self._names))
        if self.bert_scorer is not None:
            self._score_waiting()
            texts = np.concatenate(self._bert_scores)
            rows = np.hstack([rows, texts, texts**2])
            names += [*BERTSCORE_KEYS, *(f"{key}_squared" for key in BERTSCORE_KEYS)]
        named, coverages = None, self._coverages(num_records)
        if self._finder is not None:
            features, ends = _whole_numbers(self._features), np.cumsum(_whole_numbers(self._feature_counts))
            shape = num_records, len(self._finder)
            named = csr_matrix((np.ones(len(features)), features, np.concatenate([[0], ends])), shape=shape)
            different, only_here, _ = _count(features, _records_of(self._feature_counts), num_records)
            coverages["feature_coverage"] = Coverage(different, only_here, None, len(self._finder))
        columns = {name: place for place, name in enumerate(names)}
        return ProfileStatistics(
            self.profile, num_records, columns, rows, coverages, named, self._signatures(num_records)
        )

    def _keep_tokens(self, tokens: list[str]) -> None:
        numbers = array("i", [self._vocabulary.setdefault(token, len(self._vocabulary)) for token in tokens])
        if self._is_default:
            self._tokens.extend(numbers)
            self._lengths.append(len(numbers))
        # A digest, so that a sentence takes as little as a number
        digest = hashlib.blake2b(numbers.tobytes(), digest_size=16).digest()
        self._sentences.append(self._known_sentences.setdefault(digest, len(self._known_sentences)))

    def _score_waiting(self) -> None:
        if self._waiting:
            self._bert_scores.append(self.bert_scorer.score(*map(list, zip(*self._waiting, strict=True))))
            self._waiting.clear()

    def _coverages(self, num_records: int) -> dict[str, Coverage]:
        coverages = {}
        if self._is_default:
            tokens, records = _whole_numbers(self._tokens), _records_of(self._lengths)
            inside = records[1:] == records[:-1]  # a bigram does not reach over the end of a text
            bigrams = (tokens[:-1] << 32 | tokens[1:])[inside]
            for n, codes, where in ((1, tokens, records), (2, bigrams, records[1:][inside])):
                different, only_here, counted = _count(codes, where, num_records)
                coverages[f"distinct_{n}"] = Coverage(different, only_here, counted, len(codes), scale=100.0)
        each = np.arange(num_records)
        different, only_here, counted = _count(_whole_numbers(self._sentences), each, num_records)
        coverages["unique_sentence_ratio"] = Coverage(different, only_here, counted, num_records)
        return coverages

    def _signatures(self, num_records: int) -> dict[str, str]:
        profile, signatures = self.profile, {}
        clip = "no"
        if self._rated:
            if profile.clip_ratings:
                clip = "file:" if self.corpus.is_file_range else ""
                clip += "-".join(f"{bound:g}" for bound in self.corpus.rating_range)
            signatures = {key: profile.signature(key, clip=clip) for key in ("rating_rmse", "rating_mae")}
        signatures |= profile.text_signatures()
        tokens = {"tok": profile.tokens, "case": profile.case}
        if self._is_default:
            signatures |= {key: profile.signature(key, **tokens) for key in ("distinct_1", "distinct_2")}
        signatures["unique_sentence_ratio"] = profile.signature("unique_sentence_ratio", **tokens)
        if self._finder is not None:
            tokens = {"tok": "words", "case": "lower"} if self._is_default else tokens
            signatures["feature_match"] = profile.signature("feature_match", **tokens)
            tokens["features"] = f"{'file' if self.corpus.is_file else 'corpus'}-{len(self._finder)}"
            signatures["feature_coverage"] = profile.signature("feature_coverage", **tokens)
            if num_records > 1:
                signatures["feature_diversity"] = profile.signature("feature_diversity", **tokens)
        if self.bert_scorer is not None:
            keys = list(BERTSCORE_KEYS)
            if profile.scores == "bertscore":
                keys += [f"{key}_std" for key in BERTSCORE_KEYS]
            signatures |= {key: profile.signature(key, **self.bert_scorer.details) for key in keys}
        if self.sentiment is not None:
            judge = getattr(self.sentiment, "signature", getattr(self.sentiment, "__name__", "custom"))
            details = {"sentiment": judge, "threshold": f"{self.positive_threshold:g}"}
            for key in ("sentiment_agreement", "sentiment_neutral"):
                signatures[key] = profile.signature(key, **details)
        return signatures


def _pair_scorer(profile: Profile) -> Callable[[str, str], list[float]]:
    """What a prediction and its reference add to BLEU and ROUGE, in the order of the columns."""
    if profile.scores == "bertscore":
        return lambda prediction, reference: []
    if profile.scores == "libraries":
        return _library_scorer()

    def score(prediction: str, reference: str) -> list[float]:
        predicted, wanted = profile.tokenize(prediction), profile.tokenize(reference)[: profile.reference_words]
        predicted_ngrams, wanted_ngrams = ngram_counts(predicted), ngram_counts(wanted)
        rouge = [set_rouge(predicted_ngrams[n], wanted_ngrams[n]) for n in (0, 1)]
        return [*bleu_counts(predicted_ngrams, wanted_ngrams), *rouge, peer_rouge_l(predicted, wanted)]

    return score


def _library_scorer() -> Callable[[str, str], list[float]]:
    _require("sacrebleu", "rouge_score")
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics import BLEU

    tokenize = BLEU(tokenize="13a").tokenizer
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=False)

    def score(prediction: str, reference: str) -> list[float]:
        ngrams = [ngram_counts(tokenize(text.lower().rstrip()).split()) for text in (prediction, reference)]
        rouge = scorer.score(reference.lower(), prediction.lower())
        return [*bleu_counts(*ngrams), *(each.fmeasure for each in rouge.values())]

    return score


def _whole_numbers(values: array) -> np.ndarray:
    return np.frombuffer(values, dtype=np.int32).astype(np.int64) if values else np.zeros(0, dtype=np.int64)


def _records_of(lengths: array) -> np.ndarray:
    """The record of each entry of a flat list, from the records' lengths."""
    return np.repeat(np.arange(len(lengths), dtype=np.int32), _whole_numbers(lengths))


def _count(codes: np.ndarray, records: np.ndarray, num_records: int) -> tuple[int, np.ndarray, np.ndarray]:
    """
    How many different codes there are, how many each record has that no other has, and how many it has at all.

    Args:
        codes (`np.ndarray` of shape `(num_codes,)`): The things that are counted.
        records (`np.ndarray` of shape `(num_codes,)`): The record of each, ascending.
        num_records (`int`): How many records there are.
    """
    order = np.argsort(codes, kind="stable")  # the records of one code stay ascending
    codes, ordered = codes[order], records[order]
    starts = np.flatnonzero(np.diff(codes, prepend=codes[0] - 1)) if len(codes) else np.zeros(0, dtype=np.int64)
    first, last = ordered[starts], ordered[np.append(starts[1:], len(codes))[: len(starts)] - 1]
    only_here = np.bincount(first[first == last], minlength=num_records)
    return len(starts), only_here, np.bincount(records, minlength=num_records)
