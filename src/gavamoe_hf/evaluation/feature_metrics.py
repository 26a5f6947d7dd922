"""Features in explanations: which are named, how many of all (FCR), and how many two explanations share (DIV)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from .text_metrics import _check_texts, _words


class FeatureFinder:
    """
    Finds the features of a set in texts, as whole tokens in order.

    Args:
        features (`Iterable[str]`): The features, each of one or more words. Blank ones are left out, and those with
            the same tokens are one.
        tokenize (`Callable`, *optional*): Text to tokens; by default runs of letters and digits, lower-cased, and
            every other visible character alone, as in [`feature_match`].
    """

    def __init__(self, features: Iterable[str], tokenize: Callable[[str], list[str]] = _words):
        self._tokenize = tokenize
        self._numbers: dict[tuple[str, ...], int] = {}
        # By first token: a text looks up each of its tokens once, however large the set is
        self._widths: dict[str, set[int]] = {}
        for feature in features:
            tokens = tuple(tokenize(feature))
            if tokens and tokens not in self._numbers:
                self._numbers[tokens] = len(self._numbers)
                self._widths.setdefault(tokens[0], set()).add(len(tokens))

    def __len__(self) -> int:
        return len(self._numbers)

    def find(self, text: str) -> set[int]:
        """Numbers of the features that the text names."""
        tokens = self._tokenize(text)
        found = set()
        for start, token in enumerate(tokens):
            for width in self._widths.get(token, ()):
                number = self._numbers.get(tuple(tokens[start : start + width]))
                if number is not None:
                    found.add(number)
        return found

    def numbers(self, features: Iterable[str]) -> set[int]:
        """Numbers of features of the set; blank ones have none."""
        tokens = (tuple(self._tokenize(feature)) for feature in features)
        return {self._numbers[each] for each in tokens if each}


def feature_coverage(predictions: Sequence[str], feature_set: Iterable[str]) -> float:
    """
    Share of a corpus's features that any output names (feature coverage ratio, FCR, of NETE and PETER).

    Args:
        predictions (`Sequence[str]`): Generated explanations.
        feature_set (`Iterable[str]`): All features of the corpus. They match as in [`feature_match`].

    Returns:
        `float`: From 0 to 1.

    Raises:
        `ValueError`: If there is no text or no feature.
    """
    _check_texts(predictions, "predictions")
    finder = FeatureFinder(feature_set)
    if not len(finder):
        raise ValueError("expected at least one feature in `feature_set`, but got none. Pass those of the corpus.")
    return len(set().union(*(finder.find(text) for text in predictions))) / len(finder)


def feature_diversity(predictions: Sequence[str], feature_set: Iterable[str]) -> float:
    """
    Mean number of features that two outputs share (DIV of NETE and PETER), over all unordered pairs; lower is better.

    It is the sum over features of C(n_f, 2), with n_f the outputs that name f, divided by C(N, 2): the same number as
    from the pairs themselves, without visiting them.

    Args:
        predictions (`Sequence[str]`): Generated explanations, at least two.
        feature_set (`Iterable[str]`): All features of the corpus. They match as in [`feature_match`].

    Returns:
        `float`: At least 0.

    Raises:
        `ValueError`: If there are fewer than two texts, or no feature.
    """
    _check_texts(predictions, "predictions")
    finder = FeatureFinder(feature_set)
    if not len(finder) or len(predictions) < 2:
        raise ValueError(
            f"expected at least two texts and one feature, but got {len(predictions)} and {len(finder)}. "
            "DIV is a mean over pairs of outputs."
        )
    counts = np.zeros(len(finder), dtype=np.int64)
    for text in predictions:
        counts[list(finder.find(text))] += 1
    pairs = len(predictions) * (len(predictions) - 1) // 2
    return float((counts * (counts - 1) // 2).sum() / pairs)
