"""What is left out: sparse users and items, repeated pairs, other languages, sentences with contact details."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from itertools import islice

import numpy as np

from ..data.errors import DataError

LanguageFilter = Callable[[str], bool]

# Those that a review may be taken for besides its own; all in scripts that have words
_LANGUAGES = ("da", "de", "en", "es", "fi", "fr", "id", "it", "nb", "nl", "pl", "pt", "ro", "ru", "sv", "tr")
_WORD = re.compile(r"[^\W\d_]+")
# A text of fewer words may have no stop word at all
_LONG_TEXT = 10
_LEAST_STOP_WORDS = 0.1
_WORDS_READ = 100
_CHARACTERS_READ = 1000

# Each pattern starts at one character and goes a bounded way, so that no text makes them slow
_EMAIL = re.compile(
    r"[\w.+-]\s?(?:@|[(\[{]\s?at\s?[)\]}])\s?[\w-]{1,80}\s?(?:\.|[(\[{]\s?dot\s?[)\]}]|\bdot\b)\s?\w", re.IGNORECASE
)
# Top-level domains that are no English word: a full stop without a space after it makes none. Reviews on Amazon have
# "[...]" where a link was taken out, and "[[ASIN:...]]" where one is.
_LINK = re.compile(
    r"://|\bwww\.|\w\.(?:com|net|org|edu|gov|info|biz|io|tv|co\.[a-z]{2}|de|fr|es|ca|eu|ru|cn|jp)\b"
    r"|\w\.[a-z]{2,12}/\w|\[\.{3}\]|\[\[",
    re.IGNORECASE,
)
# Anything that could be dialled: a sentence lost for a long serial number does no harm
_NUMBER = re.compile(r"\d(?:[\s().\-/]{0,3}\d){6}")
# 1-800-FLOWERS
_FREE_NUMBER = re.compile(r"\b8(?:00|33|44|55|66|77|88)[).\s-]{1,2}(?=[A-Z\d-]{7})[\d-]{0,7}[A-Z]")
_CONTACT = (_EMAIL, _LINK, _NUMBER, _FREE_NUMBER)


def has_contact_details(text: str) -> bool:
    """
    Whether a text holds what looks like an email address, a phone number or a link.

    Compatibility forms, such as full-width letters, count as what they stand for, characters without a shape as
    nothing. It errs on the safe side: seven digits in a row are taken for a phone number.
    """
    plain = "".join(c for c in unicodedata.normalize("NFKC", text) if unicodedata.category(c) != "Cf")
    return any(pattern.search(plain) for pattern in _CONTACT)


def k_core(users: np.ndarray, items: np.ndarray, k: int) -> np.ndarray:
    """
    The k-core: drops users and items with fewer than `k` reviews until all that are left have as many.

    Args:
        users (`np.ndarray` of `int` `(num_reviews,)`): The number of each review's user, counted from 0.
        items (`np.ndarray` of `int` `(num_reviews,)`): The same of its item.
        k (`int`): Fewest reviews; 0 or 1 keeps all.

    Returns:
        `np.ndarray` of `bool` `(num_reviews,)`: Whether each review is kept.
    """
    kept = np.arange(len(users))
    while True:
        enough = np.ones(len(kept), dtype=bool)
        for codes in (users[kept], items[kept]):
            enough &= np.bincount(codes)[codes] >= k if len(codes) else True
        if enough.all():
            mask = np.zeros(len(users), dtype=bool)
            mask[kept] = True
            return mask
        kept = kept[enough]


def last_of_each_pair(users: np.ndarray, items: np.ndarray, timestamps: np.ndarray) -> np.ndarray:
    """
    Of several reviews by a user of an item, marks the latest; of those at the same time the last one.

    Args:
        users, items: as in [`k_core`].
        timestamps (`np.ndarray` of `int` `(num_reviews,)`): When each was written; any one value where unknown.

    Returns:
        `np.ndarray` of `bool` `(num_reviews,)`: Whether each review is kept.
    """
    # Stable, and its last key counts most
    order = np.lexsort((timestamps, items, users))
    is_last = np.ones(len(order), dtype=bool)
    same = (users[order][1:] == users[order][:-1]) & (items[order][1:] == items[order][:-1])
    is_last[:-1] = ~same
    mask = np.zeros(len(order), dtype=bool)
    mask[order[is_last]] = True
    return mask


def language_filter(language: str) -> LanguageFilter:
    """
    A judge of whether a text is in a language, by the stop words among its first hundred words (spaCy's lists, no
    model and no network): none of 15 others has two more of them than the language, and these are a tenth of a text of
    ten words or more. A short text that has no stop word of any language passes.

    Args:
        language (`str`): Two-letter code that spaCy knows, such as `"en"`.

    Raises:
        DataError: spaCy has no such language, or no stop words of it.
        ImportError: spaCy is missing; the message says how to install it.
    """
    languages: dict[str, list[str]] = {}
    for code in dict.fromkeys((*_LANGUAGES, language)):
        for word in _stop_words(code):
            languages.setdefault(word, []).append(code)
    if not any(language in codes for codes in languages.values()):
        raise DataError(
            f"expected a language that spaCy has stop words of, but got {language!r}. Pass --language none, or a "
            "function of your own with --language_filter."
        )

    def is_in_language(text: str) -> bool:
        words = [match[0] for match in islice(_WORD.finditer(text[:_CHARACTERS_READ].lower()), _WORDS_READ)]
        counts = Counter(code for word in words for code in languages.get(word, ()))
        if len(words) >= _LONG_TEXT and counts[language] < _LEAST_STOP_WORDS * len(words):
            return False
        # One more is chance: "fine" is Italian too
        return max(counts.values(), default=0) <= counts[language] + 1

    return is_in_language


def _stop_words(code: str) -> set[str]:
    from .extraction import import_spacy

    spacy = import_spacy()
    try:
        return spacy.util.get_lang_class(code).Defaults.stop_words
    except ImportError as error:
        raise DataError(
            f"expected the code of a language that spaCy knows, such as 'en', but got {code!r}. Pass --language none "
            "to keep all languages."
        ) from error
