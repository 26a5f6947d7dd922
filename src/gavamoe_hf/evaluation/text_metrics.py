"""
Metrics of generated explanations: quality, personalisation and consistency (section 4.1 of arXiv 2410.11841),
with the unique sentence ratio and the feature matching ratio of NETE and PETER.

BLEU and ROUGE come from sacrebleu and rouge_score, an optional extra that is imported on use. The rest needs
nothing. All metrics lower-case their texts first.
"""

import re
from collections.abc import Sequence
from importlib.util import find_spec

_METRIC_PACKAGES = ("sacrebleu", "rouge_score")

# Runs of word characters, and every other visible character alone: "strings." holds the word "strings", which
# it would not if words were cut at white space.
_WORD_OR_SYMBOL = re.compile(r"\w+|[^\w\s]")


def require_text_metrics() -> None:
    """
    Check that the packages of [`bleu`] and [`rouge`] are installed, so that a run fails before it generates.

    Raises:
        `ImportError`: If sacrebleu or rouge_score is missing; the message says how to install them.
    """
    _require(*_METRIC_PACKAGES)


def _require(*packages: str) -> None:
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise ImportError(
            f"expected the text metrics' packages {', '.join(packages)}, but could not import "
            f"{', '.join(missing)}. "
            'Install them with `pip install "gavamoe-hf[metrics]"`.'
        )


def _check_texts(texts: Sequence[str], name: str) -> None:
    """Refuse what is not a non-empty sequence of strings: a bare string would be scored letter by letter."""
    if isinstance(texts, str):
        raise ValueError(f"expected `{name}` to be a list of strings, but got one string. Wrap it in a list.")
    if len(texts) == 0:
        raise ValueError(f"expected at least one text in `{name}`, but got none. Check that the split is not empty.")
    for position, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(
                f"expected strings in `{name}`, but got {type(text).__name__} at position {position}. "
                "Pass an empty string where nothing was generated."
            )


def _check_pairs(predictions: Sequence[str], references: Sequence[str]) -> None:
    """Refuse predictions and references that do not pair up one to one."""
    _check_texts(predictions, "predictions")
    _check_texts(references, "references")
    if len(predictions) != len(references):
        raise ValueError(
            f"expected one reference for each prediction, but got {len(predictions)} predictions and "
            f"{len(references)} references. Pass both in the order of the same records."
        )


def bleu(predictions: Sequence[str], references: Sequence[str], order: int = 4) -> float:
    """
    Corpus BLEU by sacrebleu, lower-cased, on 13a tokens, with one reference for each prediction.

    Args:
        predictions (`Sequence[str]`):
            Generated explanations. An empty one counts as a text of no tokens.
        references (`Sequence[str]`):
            True explanations, in the same order.
        order (`int`, *optional*, defaults to 4):
            Longest n-gram: 1 for BLEU-1, 4 for BLEU-4.

    Returns:
        `float`: BLEU in percent. It is 0 where predictions have no n-gram of length `order` at all; a
        precision of zero is smoothed as sacrebleu does by default (exponential decay).

    Raises:
        `ImportError`: If sacrebleu is missing.
        `ValueError`: If the lengths differ, if there is no text, or if `order` is less than 1.
    """
    _check_pairs(predictions, references)
    if order < 1:
        raise ValueError(
            f"expected an n-gram `order` of at least 1, but got {order}. Use 1 for BLEU-1 or 4 for BLEU-4."
        )
    _require("sacrebleu")
    from sacrebleu.metrics import BLEU

    scorer = BLEU(lowercase=True, tokenize="13a", smooth_method="exp", max_ngram_order=order)
    return float(scorer.corpus_score(list(predictions), [list(references)]).score)


def rouge(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """
    ROUGE-1, ROUGE-2 and ROUGE-L by rouge_score: F1 without stemming, averaged over the records.

    Args:
        predictions (`Sequence[str]`):
            Generated explanations. An empty one scores 0.
        references (`Sequence[str]`):
            True explanations, in the same order.

    Returns:
        `dict[str, float]`: `rouge_1`, `rouge_2` and `rouge_l`, in percent. rouge_score keeps the characters
        a-z and 0-9 alone, so texts in other scripts score 0.

    Raises:
        `ImportError`: If rouge_score is missing.
        `ValueError`: If the lengths differ or if there is no text.
    """
    _check_pairs(predictions, references)
    _require("rouge_score")
    from rouge_score.rouge_scorer import RougeScorer

    names = {"rouge1": "rouge_1", "rouge2": "rouge_2", "rougeL": "rouge_l"}
    scorer = RougeScorer(list(names), use_stemmer=False)
    totals = dict.fromkeys(names, 0.0)
    for prediction, reference in zip(predictions, references, strict=True):
        scores = scorer.score(reference.lower(), prediction.lower())
        for name in names:
            totals[name] += scores[name].fmeasure
    return {key: 100.0 * totals[name] / len(predictions) for name, key in names.items()}


def distinct_n(texts: Sequence[str], n: int) -> float:
    """
    Distinct-n of a corpus: different n-grams over all n-grams of all texts together.

    Tokens are the lower-cased text cut at white space, punctuation left on its word ("strings." differs from
    "strings"). This is the tokenisation behind the figures that are known for PETER and PETER+ on the musical
    instruments reviews; with punctuation cut off their Distinct-2 is 0.2 to 0.5 points lower. N-grams never
    reach over the end of a text.

    Args:
        texts (`Sequence[str]`):
            Generated explanations.
        n (`int`):
            Length of the n-grams.

    Returns:
        `float`: Distinct-n in percent, higher is more diverse; 0 where no text has `n` tokens. It falls as
        the number of texts grows, so compare sets of one size only.

    Raises:
        `ValueError`: If there is no text or if `n` is less than 1.
    """
    _check_texts(texts, "texts")
    if n < 1:
        raise ValueError(
            f"expected an n-gram length `n` of at least 1, but got {n}. Use 1 for Distinct-1 or 2 for Distinct-2."
        )
    total = 0
    unique: set[tuple[str, ...]] = set()
    for text in texts:
        tokens = text.lower().split()
        ngrams = [tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1)]
        total += len(ngrams)
        unique.update(ngrams)
    return 100.0 * len(unique) / total if total else 0.0


def unique_sentence_ratio(texts: Sequence[str]) -> float:
    """
    Share of different texts among all texts (USR of NETE and PETER).

    Args:
        texts (`Sequence[str]`):
            Generated explanations. Two are the same where their lower-cased tokens, cut at white space, are.

    Returns:
        `float`: From `1 / len(texts)` (all the same) to 1 (all different).

    Raises:
        `ValueError`: If there is no text.
    """
    _check_texts(texts, "texts")
    return len({tuple(text.lower().split()) for text in texts}) / len(texts)


def feature_match(predictions: Sequence[str], features: Sequence[Sequence[str]]) -> float | None:
    """
    Share of outputs that name at least one of their given features (feature matching ratio, FMR, of PETER).

    A feature matches as a sequence of whole tokens, lower-cased: "string" is in "a good string." but not
    in "strings are fine".

    Args:
        predictions (`Sequence[str]`):
            Generated explanations.
        features (`Sequence[Sequence[str]]`):
            For each prediction the list of its features, each of one or more words. Records whose list is
            empty or blank are left out.

    Returns:
        `float` or `None`: The share, from 0 to 1; `None` if no record has a feature.

    Raises:
        `ValueError`: If the lengths differ, if there is no text, or if a record's features are a bare string.
    """
    _check_texts(predictions, "predictions")
    if len(features) != len(predictions):
        raise ValueError(
            f"expected one list of features for each prediction, but got {len(predictions)} predictions and "
            f"{len(features)} lists of features. Pass an empty list for a record without features."
        )
    matches = []
    for position, (prediction, given) in enumerate(zip(predictions, features, strict=True)):
        if isinstance(given, str):
            raise ValueError(
                f"expected a list of features for each prediction, but got the string {given!r} at position "
                f"{position}. Wrap it in a list: [{given!r}]."
            )
        wanted = [tokens for feature in given if (tokens := _words(feature))]
        if wanted:
            words = _words(prediction)
            matches.append(any(_contains(words, tokens) for tokens in wanted))
    return sum(matches) / len(matches) if matches else None


def _words(text: str) -> list[str]:
    return _WORD_OR_SYMBOL.findall(text.lower())


def _contains(words: list[str], wanted: list[str]) -> bool:
    width = len(wanted)
    return any(words[start : start + width] == wanted for start in range(len(words) - width + 1))


def score_text(
    predictions: Sequence[str],
    references: Sequence[str],
    features: Sequence[Sequence[str]] | None = None,
) -> dict[str, float]:
    """
    All text metrics of this module, under flat names.

    Args:
        predictions (`Sequence[str]`):
            Generated explanations.
        references (`Sequence[str]`):
            True explanations, in the same order.
        features (`Sequence[Sequence[str]]`, *optional*):
            For each prediction the list of its features.

    Returns:
        `dict[str, float]`: `bleu_1`, `bleu_4`, `rouge_1`, `rouge_2`, `rouge_l`, `distinct_1` and `distinct_2`
        in percent; `unique_sentence_ratio` and `feature_match` from 0 to 1. `feature_match` is absent where
        `features` is not given or no record has one.

    Raises:
        `ImportError`: If sacrebleu or rouge_score is missing.
        `ValueError`: If the lengths differ or if there is no text.

    Example:
        ```python
        >>> from gavamoe_hf.evaluation import score_text

        >>> scores = score_text(["great strings"], ["these strings are great"], features=[["strings"]])
        >>> scores["feature_match"]
        1.0
        ```
    """
    require_text_metrics()
    scores = {f"bleu_{order}": bleu(predictions, references, order=order) for order in (1, 4)}
    scores.update(rouge(predictions, references))
    scores.update({f"distinct_{n}": distinct_n(predictions, n) for n in (1, 2)})
    scores["unique_sentence_ratio"] = unique_sentence_ratio(predictions)
    matched = feature_match(predictions, features) if features is not None else None
    if matched is not None:
        scores["feature_match"] = matched
    return scores
