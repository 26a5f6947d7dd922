"""
Scoring profiles: what a token, a BLEU and a ROUGE is in this package's own scores and in those of the field's papers.

The same output scores differently from one repository to the next, so each score belongs to a named profile and carries
a signature, as sacreBLEU's do. The peers' definitions were read from what PETER (ACL 2021), PEPLER (TOIS 2023), GaVaMoE
and XRec (EMNLP Findings 2024) published beside their papers, and are written anew here.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Literal

import numpy as np

from ..version import __version__

MAX_ORDER = 4

_CONTRACTION = re.compile(r"n't|'(?:s|m|ve|re|d|ll)")
# A run of one mark counts once, but each bracket by itself
_PUNCTUATION = re.compile(r"[()]|,+|:+|;+|\.+|!+|\?+")
_BECOMES = {":": ",", ";": "."}


def whitespace_tokens(text: str) -> list[str]:
    """The text cut at white space, as PETER reads its corpus."""
    return text.split()


def lower_whitespace_tokens(text: str) -> list[str]:
    """The lower-cased text cut at white space."""
    return text.lower().split()


def split_punctuation_tokens(text: str) -> list[str]:
    """
    The tokens of PEPLER and of GaVaMoE's release: contractions ("'s", "'m", "'ve", "'re", "'d", "'ll", "n't") and the
    marks ( ) , : ; . ! ? are tokens of their own, ":" becomes "," and ";" becomes ".", a repeated mark counts once.
    """
    text = _CONTRACTION.sub(lambda found: f" {found[0]}", text)
    return _PUNCTUATION.sub(lambda found: f" {_BECOMES.get(found[0][0], found[0][0])} ", text).split()


@dataclass(frozen=True)
class Profile:
    """
    One way to score explanations.

    Attributes:
        name (`str`): Its name, such as `"peter"`.
        scores (`"libraries"`, `"peers"` or `"bertscore"`): What BLEU and ROUGE are: those of sacrebleu and rouge_score,
            those of the peers' code, or none.
        tokenize (`Callable`): Text to tokens, for the unique sentence ratio and, of the peers, for everything.
        tokens, case (`str`): How `tokenize` is named in signatures.
        reference_words (`int` or `None`): Tokens of a reference that are kept.
        smooth (`"none"` or `"add-1"`): Smoothing of the peers' BLEU: none, or (m + 1) / (t + 1) in every order.
        clip_ratings (`bool`): Whether predicted ratings are clipped to the corpus's range before their errors.
    """

    name: str
    scores: Literal["libraries", "peers", "bertscore"]
    tokenize: Callable[[str], list[str]]
    tokens: str
    case: Literal["lower", "mixed"] = "mixed"
    reference_words: int | None = None
    smooth: Literal["none", "add-1"] = "none"
    clip_ratings: bool = True

    def signature(self, metric: str, **details: object) -> str:
        """What a score depends on, as `key:value` joined by `|`."""
        fields = {"profile": self.name, "metric": metric, **details, "version": __version__}
        return "|".join(f"{name}:{value}" for name, value in fields.items())

    def text_signatures(self) -> dict[str, str]:
        """Signatures of BLEU and ROUGE, by their keys."""
        if self.scores == "bertscore":
            return {}
        signatures = {}
        for order in (1, MAX_ORDER):
            details = {"tok": self.tokens, "case": self.case, "ref": self._reference(), "smooth": self.smooth}
            if self.scores == "libraries":
                details = {"nrefs": 1, "case": "lc", "eff": "no", "tok": "13a", "smooth": "exp"}
                details["sacrebleu"] = version("sacrebleu")
            signatures[f"bleu_{order}"] = self.signature(f"bleu_{order}", **details)
        for name in ("rouge_1", "rouge_2", "rouge_l"):
            details = {"tok": self.tokens, "case": self.case, "ref": self._reference()}
            details["f"] = "b=p/r" if name == "rouge_l" else "f1-of-sets"
            if self.scores == "libraries":
                details = {"tok": "rouge_score", "case": "lower", "stem": "no", "f": "f1"}
                details["rouge_score"] = version("rouge_score")
            signatures[name] = self.signature(name, **details)
        return signatures

    def _reference(self) -> str:
        return "full" if self.reference_words is None else f"{self.reference_words}w"


PROFILES = {
    profile.name: profile
    for profile in (
        Profile("default", "libraries", lower_whitespace_tokens, "whitespace", case="lower", clip_ratings=False),
        Profile("peter", "peers", whitespace_tokens, "whitespace", reference_words=15),
        Profile("pepler", "peers", split_punctuation_tokens, "split-punctuation"),
        Profile("gavamoe-released", "peers", split_punctuation_tokens, "split-punctuation", smooth="add-1"),
        Profile("xrec", "bertscore", whitespace_tokens, "whitespace"),
    )
}


def get_profile(name: str) -> Profile:
    """The profile of that name; `ValueError` where there is none."""
    if name not in PROFILES:
        raise ValueError(f"Expected a profile among {', '.join(PROFILES)}, but got {name!r}.")
    return PROFILES[name]


def ngram_counts(tokens: Sequence[str]) -> list[Counter[tuple[str, ...]]]:
    """How often each n-gram occurs, for n from 1 to 4."""
    return [Counter(zip(*(tokens[start:] for start in range(n)), strict=False)) for n in range(1, MAX_ORDER + 1)]


def bleu_counts(predicted: Sequence[Counter], reference: Sequence[Counter]) -> list[int]:
    """
    What corpus BLEU needs of one pair.

    Args:
        predicted, reference (`Sequence[Counter]`): Their n-grams, from [`ngram_counts`].

    Returns:
        `list[int]` of length 10: matches of orders 1 to 4, each clipped to its count in the reference; n-grams of the
        prediction of orders 1 to 4; length of the prediction; length of the reference.
    """
    matches = [
        sum(min(count, wanted[ngram]) for ngram, count in found.items() if ngram in wanted)
        for found, wanted in zip(predicted, reference, strict=True)
    ]
    possible = [found.total() for found in predicted]
    return [*matches, *possible, possible[0], reference[0].total()]


def corpus_bleu(counts: np.ndarray, order: int, smooth: str = "none") -> np.ndarray:
    """
    The peers' corpus BLEU of one reference a prediction: the geometric mean of clipped matches over possible n-grams,
    0 where an order is 0, times exp(1 - reference / prediction) where the predictions are shorter.

    Args:
        counts (`np.ndarray` of shape `(..., 10)`): Sums of [`bleu_counts`] over the records.
        order (`int`): Longest n-gram, 1 to 4.
        smooth (`str`, *optional*, defaults to `"none"`): `"add-1"` makes every order (m + 1) / (t + 1).

    Returns:
        `np.ndarray` of shape `(...,)`: in percent. Predictions without a token score 0 under either smoothing.
    """
    matches, possible = counts[..., :order].astype(float), counts[..., MAX_ORDER : MAX_ORDER + order].astype(float)
    predicted, reference = counts[..., -2].astype(float), counts[..., -1].astype(float)
    if smooth == "add-1":
        matches, possible = matches + 1, possible + 1
    with np.errstate(divide="ignore", invalid="ignore"):
        precisions = np.where(possible > 0, matches / possible, 0.0)
        mean = np.where((precisions > 0).all(axis=-1), np.exp(np.log(precisions).mean(axis=-1)), 0.0)
        penalty = np.where(predicted < reference, np.exp(1 - reference / predicted), 1.0)
    return np.where(predicted > 0, 100.0 * mean * penalty, 0.0)


def set_rouge(predicted: Counter, reference: Counter) -> float:
    """The peers' ROUGE-N of one pair: over sets of n-grams, F = 2PR / (P + R + 1e-8), from 0 to 1."""
    common = len(predicted.keys() & reference.keys())
    precision, recall = common / max(len(predicted), 1), common / max(len(reference), 1)
    return 2 * precision * recall / (precision + recall + 1e-8)


def peer_rouge_l(predicted: Sequence[str], reference: Sequence[str]) -> float:
    """
    The peers' ROUGE-L of one pair: P and R from the longest common subsequence of tokens, b = P / (R + 1e-12) and
    F = (1 + b^2) R P / (R + b^2 P + 1e-12), from 0 to 1. It is not F1: P = 1/3 and R = 1 give 0.357, F1 would be 0.5.
    """
    common = longest_common_subsequence(predicted, reference)
    precision, recall = common / max(len(predicted), 1), common / max(len(reference), 1)
    squared = (precision / (recall + 1e-12)) ** 2
    return (1 + squared) * recall * precision / (recall + squared * precision + 1e-12)


def longest_common_subsequence(left: Sequence[str], right: Sequence[str]) -> int:
    """Length of the longest common subsequence, a row of the usual table at a time as the bits of one integer (Hyyrö
    2004): a zero bit is a step up of the row."""
    places: dict[str, int] = {}
    for place, token in enumerate(left):
        places[token] = places.get(token, 0) | 1 << place
    row = everywhere = (1 << len(left)) - 1
    for token in right:
        matched = row & places.get(token, 0)
        row = (row + matched | row - matched) & everywhere
    return len(left) - row.bit_count()
