"""What all metrics of texts share: their packages, checks, and how words are found."""

import re
from collections.abc import Sequence
from importlib.util import find_spec

from ..version import install_hint

_METRIC_PACKAGES = ("sacrebleu", "rouge_score")

# Runs of word characters, and every other visible character alone: "strings." holds the word "strings", which
# it would not if words were cut at white space.
_WORD_OR_SYMBOL = re.compile(r"\w+|[^\w\s]")


def require_text_metrics() -> None:
    """
    Check that the packages of BLEU and ROUGE are installed, so that a run fails before it generates.

    Raises:
        `ImportError`: If sacrebleu or rouge_score is missing; the message says how to install them.
    """
    _require(*_METRIC_PACKAGES)


def _require(*packages: str) -> None:
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise ImportError(
            f"expected the text metrics' packages {', '.join(packages)}, but could not import "
            f"{', '.join(missing)}. " + install_hint("metrics")
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


def _words(text: str) -> list[str]:
    return _WORD_OR_SYMBOL.findall(text.lower())
