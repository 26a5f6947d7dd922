"""Which sentence of a review explains its rating, and what it is about."""

from __future__ import annotations

import html
import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

from ..data.errors import DataError, show_value
from .extraction import Extractor, word_set
from .filters import has_contact_details

# Words that end with a full stop inside a sentence
_ABBREVIATIONS = word_set("mr mrs ms dr st vs etc eg ie approx ft in oz lb lbs no jr sr inc co ltd min max incl")
_LINE = re.compile(r"\s*(?:\n|\r|<br\s*/?>|</?p>)\s*", re.IGNORECASE)
_QUOTES = "\"'\u2019\u201d)]"
_END = re.compile(rf"[.!?\u2026]+[{re.escape(_QUOTES)}]*\s+")
# A full stop that no space follows, as in "affordable.I"
_GLUED = re.compile(r"(?<=[a-z)])([.!?]+)(?=[A-Z])")
_LONGEST_WORD = 200
# So that a sentence of few words has a bounded length too
_LONGEST_MEAN_WORD = 15
_BULLET = re.compile(r"^[\s\-*\u2022\u00b7\u2013\u2014>+~_=.,:;]+")
_FIRST_PERSON = re.compile(r"\b(?:i|i'm|i've|i'd|i'll|im|ive|my|me|mine|we|our|us)\b", re.IGNORECASE)

# What is added to a candidate's score, beside agreement with the rating and how common its feature is
_COMPOUND = 0.25
_FIRST_PERSON_PENALTY = 0.5
_NAME_PENALTY = 0.75
# What stands before a noun that names the item itself: "this [old] ...", "it is a [really good] ..."
_POINTS_AT_ITEM = re.compile(
    r"\b(?:(?:this|these)(?: [\w-]+)?|(?:it|this|they|these)(?:['\u2019](?:s|re)| is| was| are| were)"
    r"(?: (?:also|just|not|still|such|\w+ly))? (?:an?|the|one of the)(?: [\w-]+){0,3}) $"
)
_CHARACTERS_BEFORE = 60
# From this share of its reviews on, a noun is taken for a name of the item; a few reviews more, for rare ones
_NAME_SHARE = 0.2
_NAME_PRIOR = 5

# Why a review gives no record, from the first hurdle to the last: it counts under the last one that any of its
# sentences came to
NO_SENTENCE = "no sentence of the right length"
CONTACT = "only sentences with contact details"
NO_PAIR = "no feature with a fitting opinion"
_CONTACT_FATE = "with contact details"

Judge = Callable[[str], float]


class Candidate(NamedTuple):
    """A sentence that may explain, a feature that it speaks of, the opinion on it, and its score."""

    sentence: str
    feature: str
    opinion: str
    score: float


class FoundSentences(NamedTuple):
    """What a review has: candidates or why there are none, and its sentences by what became of them."""

    candidates: list[Candidate]
    dropped: str | None
    counts: Counter[str]


def clean_text(text: str) -> str:
    """Resolves HTML's character references, and sets a space after a full stop that has none."""

    def open_up(match: re.Match[str]) -> str:
        word = match[0]
        if len(word) > _LONGEST_WORD or not _GLUED.search(word) or has_contact_details(word):
            return word
        return _GLUED.sub(r"\1 ", word)

    return re.sub(r"\S+", open_up, html.unescape(text))


def split_sentences(text: str) -> list[str]:
    """
    Cuts a text at its line breaks, and after a full stop, question or exclamation mark that whitespace follows, unless
    the word before is an abbreviation or an ellipsis goes on in lower case. Bullets are taken off.

    Args:
        text (`str`): A review, cleaned by [`clean_text`].

    Returns:
        `list[str]`: The sentences in order, each on one line.
    """
    sentences = []
    for line in _LINE.split(text):
        start = 0
        for end in _END.finditer(line):
            if not _is_inside(line[start : end.start()], end[0], line[end.end() :]):
                sentences.append(line[start : end.end()])
                start = end.end()
        sentences.append(line[start:])
    plain = (_BULLET.sub("", " ".join(sentence.split())) for sentence in sentences)
    return [sentence for sentence in plain if sentence]


def _is_inside(before: str, end: str, after: str) -> bool:
    """Whether what looks like a sentence's end is none."""
    if end.startswith(("..", "\u2026")):
        return after[:1].islower()
    word = before.split()[-1].lower().lstrip("(\"'") if before.strip() else ""
    return end.startswith(".") and (word in _ABBREVIATIONS or re.fullmatch(r"[a-z](\.[a-z])+", word) is not None)


def side_of(rating: float, levels: Sequence[float]) -> int:
    """1 for a rating above the middle of the scale, -1 below, 0 in the middle."""
    middle = (min(levels) + max(levels)) / 2
    return (rating > middle) - (rating < middle)


def find_candidates(
    texts: Sequence[str],
    sides: Sequence[int],
    extract: Extractor,
    judge: Judge | None = None,
    min_words: int = 4,
    max_words: int = 30,
    max_characters: int = 5000,
) -> list[FoundSentences]:
    """
    Finds the sentences of each review that may explain its rating.

    A sentence has to be of the right length, no question, and without contact details; each feature with an opinion in
    it makes a candidate. Its score, to which [`choose_candidate`] adds how common the feature is, from 0 to 1:

    - the sentiments of the sentence and of the opinion, each 1 where it agrees with the rating, -1 where it contradicts
      it, 0 where it is neutral; where both contradict it, there is no candidate. For a rating in the middle of the
      scale, 0.5 where the opinion has a sentiment at all;
    - 0.25 for a feature of several words;
    - -0.5 for a sentence in the first person, which explains the writer rather than the item.

    Args:
        texts (`Sequence[str]`): The reviews.
        sides (`Sequence[int]`): Of each rating, as from [`side_of`].
        extract (`Callable`): Sentences to the (feature, opinion) pairs of each.
        judge (`Callable[[str], float]`, *optional*): Sentiment of a text: above, below or at 0.
        min_words, max_words (`int`, *optional*, defaults to 4 and 30):
            Length of a sentence, in words between spaces, of at most fifteen characters on average.
        max_characters (`int`, *optional*, defaults to 5000): Nothing after this many characters of a review is read.

    Returns:
        `list[FoundSentences]`: one for each review, in order.

    Raises:
        DataError: `extract` does not return a list of (feature, opinion) pairs for each sentence.
    """
    kept: list[list[str]] = []
    all_counts: list[Counter[str]] = []
    for text in texts:
        counts: Counter[str] = Counter()
        sentences = split_sentences(clean_text(text[:max_characters]))
        if len(text) > max_characters:
            # Cut in its midst, most likely
            sentences = sentences[:-1]
        fates = {sentence: _fate(sentence, min_words, max_words) for sentence in sentences}
        counts.update(fate for fate in fates.values() if fate is not None)
        kept.append([sentence for sentence, fate in fates.items() if fate is None])
        all_counts.append(counts)
    pairs = iter(_extract(extract, [sentence for sentences in kept for sentence in sentences]))
    found = []
    for sentences, side, counts in zip(kept, sides, all_counts, strict=True):
        candidates = []
        for sentence in sentences:
            of_sentence = next(pairs)
            counts["with a feature" if of_sentence else "without a feature"] += 1
            candidates += _candidates(sentence, of_sentence, side, judge)
        dropped = None
        if not candidates:
            dropped = NO_PAIR if sentences else CONTACT if counts[_CONTACT_FATE] else NO_SENTENCE
        found.append(FoundSentences(candidates, dropped, counts))
    return found


def _fate(sentence: str, min_words: int, max_words: int) -> str | None:
    """Why a sentence is left out, or `None` where it is not."""
    num_words = len(sentence.split())
    if num_words < min_words:
        return "too short"
    if num_words > max_words or len(sentence) > _LONGEST_MEAN_WORD * max_words:
        return "too long"
    if has_contact_details(sentence):
        return _CONTACT_FATE
    return "question" if sentence.rstrip(_QUOTES).endswith("?") else None


def _extract(extract: Extractor, sentences: list[str]) -> list[list[tuple[str, str]]]:
    """What the extractor returns, checked, because it may be the user's."""
    found = list(extract(sentences)) if sentences else []
    if len(found) != len(sentences):
        raise DataError(
            f"extractor: expected a list for each of {len(sentences)} sentences, but got {len(found)}. Return an empty "
            "list for a sentence without a feature."
        )
    for pairs in found:
        for pair in pairs:
            if len(pair) != 2 or not all(isinstance(part, str) and part.strip() for part in pair):
                raise DataError(
                    f"extractor: expected (feature, opinion) pairs of two strings, but got {show_value(pair)}. Correct "
                    "the function."
                )
    return found


def _candidates(sentence: str, pairs: Sequence[tuple[str, str]], side: int, judge: Judge | None) -> list[Candidate]:
    if not pairs:
        return []
    of_sentence = _agreement(judge(sentence), side) if judge is not None and side else 0.0
    in_first_person = _FIRST_PERSON.search(sentence) is not None
    candidates = []
    for feature, opinion in dict.fromkeys(pairs):
        of_opinion = _agreement(judge(opinion), side) if judge is not None else 0.0
        if of_sentence < 0 and of_opinion < 0:
            continue
        score = of_sentence + of_opinion - _FIRST_PERSON_PENALTY * in_first_person
        score += _COMPOUND * (len(feature.split()) > 1)
        candidates.append(Candidate(sentence, feature, opinion, score))
    return candidates


def _agreement(sentiment: float, side: int) -> float:
    sign = (sentiment > 0) - (sentiment < 0)
    return float(sign * side) if side else abs(sign) / 2


def points_at_item(sentence: str, feature: str) -> bool:
    """Whether an English sentence has a feature as what the item is: "this film ...", "it is a good film"."""
    before, found, _ = sentence.lower().partition(feature)
    return bool(found) and _POINTS_AT_ITEM.search(before[-_CHARACTERS_BEFORE:]) is not None


def item_names(feature_counts: Mapping[str, int], pointing_counts: Mapping[str, int]) -> frozenset[str]:
    """
    The features that are names of the item rather than sides of it, such as "film" in reviews of films: of the reviews
    that have one in a candidate, a fifth say "this film" or "it is a film". How many items share a noun would not tell:
    as many restaurants share "food" and "service".

    Args:
        feature_counts (`Mapping[str, int]`): In how many reviews each feature is in a candidate.
        pointing_counts (`Mapping[str, int]`): In how many of them so that [`points_at_item`].
    """
    return frozenset(
        feature
        for feature, count in pointing_counts.items()
        if count >= _NAME_SHARE * (feature_counts[feature] + _NAME_PRIOR)
    )


def choose_candidate(
    candidates: Sequence[Candidate],
    feature_counts: Mapping[str, int],
    min_feature_count: int,
    names: Collection[str] = (),
) -> Candidate | None:
    """
    The candidate with the highest score, among those whose feature enough reviews speak of; the first of equals.

    Args:
        candidates (`Sequence[Candidate]`): Of one review.
        feature_counts (`Mapping[str, int]`): In how many reviews each feature is in a candidate.
        min_feature_count (`int`): Fewest such reviews.
        names (`Collection[str]`, *optional*): Features that name the item itself, from [`item_names`].

    Returns:
        [`Candidate`] or `None`: with how common its feature is added to its score, on a logarithmic scale from 0 to 1,
        and 0.75 taken off where the feature is one of `names`.
    """
    most = math.log1p(max(feature_counts.values(), default=1))
    best = None
    for candidate in candidates:
        count = feature_counts[candidate.feature]
        if count < min_feature_count:
            continue
        score = candidate.score + math.log1p(count) / most - _NAME_PENALTY * (candidate.feature in names)
        if best is None or score > best.score:
            best = candidate._replace(score=score)
    return best
