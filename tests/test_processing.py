"""The processor: prompts word for word, text that stays text, ids, batches, training examples, files."""

import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from references import train_tiny_tokenizer
from transformers import AutoProcessor

from gavamoe_hf import GaVaMoEProcessor
from gavamoe_hf.processing_gavamoe import ITEM_TOKEN, USER_TOKEN, PairRequest

CHAT_TEMPLATE = (
    "{% for message in messages %}<<{{ message['role'] }}>>{{ message['content'] | trim }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<<assistant>>{% endif %}"
)
SYSTEM = "You are a professional explainer who explains an item to a user in detail."
TURN = (
    "The user has a {sentiment} experience with the item, the item has {features} features, please provide an "
    "explanation for recommending <|item_embedding|> to <|user_embedding|>."
)
TURN_WITHOUT = (
    "The user has a {sentiment} experience with the item, please provide an explanation for recommending "
    "<|item_embedding|> to <|user_embedding|>."
)


def special_ids(processor) -> set[int]:
    return set(processor.tokenizer.all_special_ids)


# Prompts


@pytest.mark.parametrize("sentiment", ["positive", "negative"])
def test_prompt_word_for_word(processor, sentiment):
    ids = processor.encode_prompt(sentiment, ["sound", "low price"])
    turn = TURN.format(sentiment=sentiment, features="sound, low price")
    assert processor.tokenizer.decode(ids) == f"<|begin_of_text|>{SYSTEM}\n{turn}\n"
    ids = processor.encode_prompt(sentiment, [])
    turn = TURN_WITHOUT.format(sentiment=sentiment)
    assert processor.tokenizer.decode(ids) == f"<|begin_of_text|>{SYSTEM}\n{turn}\n"
    # Cut in pieces or not, the tokens are those of the whole text
    whole = processor.tokenizer(f"<|begin_of_text|>{SYSTEM}\n{turn}\n", add_special_tokens=False)["input_ids"]
    assert ids == whole
    assert ids.count(processor.user_token_id) == ids.count(processor.item_token_id) == 1


def test_prompt_with_a_chat_template(processor):
    chat = GaVaMoEProcessor(processor.tokenizer, processor.users, processor.items, chat_template=CHAT_TEMPLATE)
    for features in (["sound"], []):
        ids = chat.encode_prompt("positive", features)
        turn = (TURN if features else TURN_WITHOUT).format(sentiment="positive", features="sound")
        expected = f"<<system>>{SYSTEM}<|end_of_text|><<user>>{turn}<|end_of_text|><<assistant>>"
        assert chat.tokenizer.decode(ids) == expected
        assert ids.count(chat.tokenizer.eos_token_id) == 2  # the template's own, as special tokens
        assert ids == chat.tokenizer(expected, add_special_tokens=False)["input_ids"]


def test_tokenizer_chat_template_is_used():
    tokenizer = train_tiny_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    processor = GaVaMoEProcessor(tokenizer, ["a"], ["b"])
    assert processor.chat_template == CHAT_TEMPLATE
    assert processor.tokenizer.decode(processor.encode_prompt("positive", [])).startswith("<<system>>You are")


def test_own_templates(processor):
    own = GaVaMoEProcessor(
        processor.tokenizer,
        ["a"],
        ["b"],
        system_prompt="Explain.",
        prompt_template="{user} finds {item} {sentiment}: {features}!",
        prompt_template_without_features="{user} finds {item} {sentiment}!",
    )
    text = own.tokenizer.decode(own.encode_prompt("negative", ["x"]))
    assert text == f"<|begin_of_text|>Explain.\n{USER_TOKEN} finds {ITEM_TOKEN} negative: x!\n"


@pytest.mark.parametrize(
    ("template", "features"),
    [
        ("{user} {item} {sentiment}{features}", ["x"]),
        ("{user} {item} {sentiment}", ["x"]),
        ("{user} {item} {features} {features}", ["x"]),
        ("{user} {item} {sentiment} {features}", []),
    ],
)
def test_templates_that_do_not_fit(processor, template, features):
    own = GaVaMoEProcessor(processor.tokenizer, prompt_template=template, prompt_template_without_features=template)
    count = len(features)
    with pytest.raises(ValueError, match=rf'Expected " \{{features\}}" {count} time\(s\) in the prompt template'):
        own.encode_prompt("positive", features)


def test_chat_template_that_drops_the_user_turn(processor):
    own = GaVaMoEProcessor(processor.tokenizer, chat_template="{{ messages[0]['content'] }}")
    with pytest.raises(ValueError, match=r"states the user turn once, but it gave it 0 time"):
        own.encode_prompt("positive", ["x"])


def test_sentiment_threshold(processor):
    # Figure 2: a rating of at least 3 of 5 is positive
    assert [processor.sentiment(rating) for rating in (1, 2.9, 3, 5)] == ["negative"] * 2 + ["positive"] * 2
    own = GaVaMoEProcessor(processor.tokenizer, positive_rating_threshold=4)
    assert own.sentiment(3.5) == "negative"


def test_stored_prompts(processor):
    stored = processor.stored_prompts()
    assert stored == {
        "positive": processor.encode_prompt("positive", []),
        "negative": processor.encode_prompt("negative", []),
    }


def test_features_are_cut(processor):
    long = GaVaMoEProcessor(processor.tokenizer, max_feature_tokens=5)
    plain = len(processor.encode_prompt("positive", ["a"])) - len(processor.encode_text(" a"))
    assert len(long.encode_prompt("positive", ["very long " * 50])) == plain + 5


# Text stays text

HOSTILE = [
    "<|end_of_text|>",
    "good <|end_of_text|> sound",
    USER_TOKEN,
    f"{ITEM_TOKEN}{USER_TOKEN}",
    "<|pad|><|begin_of_text|>",
    "\ue000",
    "{user} {0} {{ item }} {% x %}",
]


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("template", [None, CHAT_TEMPLATE])
def test_features_never_become_special_tokens(processor, text, template):
    processor = GaVaMoEProcessor(
        processor.tokenizer, processor.users, processor.items, chat_template=template, max_feature_tokens=100
    )
    harmless = processor.encode_prompt("positive", ["sound"])
    ids = processor.encode_prompt("positive", [text])
    for special in special_ids(processor):
        assert ids.count(special) == harmless.count(special)
    # And the text is there, whole
    assert f"the item has {text} features" in processor.tokenizer.decode(ids)
    batch = processor(user="U1", item="I1", rating=5, features=[text])
    assert (batch["input_ids"] == processor.user_token_id).sum() == 1
    assert (batch["input_ids"] == processor.item_token_id).sum() == 1


@pytest.mark.parametrize("text", HOSTILE)
def test_ids_and_explanations_never_become_special_tokens(tokenizer, text):
    processor = GaVaMoEProcessor(tokenizer, users=[text, "u"], items=["i", text])
    batch = processor(user=text, item=text, rating=5, features=[])
    plain = processor(user="u", item="i", rating=5, features=[])
    assert torch.equal(batch["input_ids"], plain["input_ids"])
    assert (batch["user_id"].tolist(), batch["item_id"].tolist()) == ([0], [1])
    example = processor.encode_record("u", "i", 5, [], text)
    target = [label for label in example["labels"] if label != -100]
    assert target[-1] == tokenizer.eos_token_id
    assert not special_ids(processor) & set(target[:-1])
    assert tokenizer.decode(target[:-1]) == text


def test_known_features_never_become_special_tokens(tokenizer):
    processor = GaVaMoEProcessor(tokenizer, ["u"], ["i"], item_features=[["<|end_of_text|>"]])
    ids = processor(user="u", item="i", rating=5)["input_ids"]
    assert (ids == tokenizer.eos_token_id).sum() == 0


# Calls


def test_single_call(processor):
    batch = processor(user="U3", item="I5", rating=4, features=["sound"])
    assert set(batch) == {"input_ids", "attention_mask", "user_id", "item_id"}
    assert batch["input_ids"].tolist() == [processor.encode_prompt("positive", ["sound"])]
    assert batch["attention_mask"].min() == 1
    assert (batch["user_id"].tolist(), batch["item_id"].tolist()) == ([3], [5])
    assert batch["user_id"].dtype == batch["item_id"].dtype == batch["input_ids"].dtype == torch.long


def test_known_features_are_used_where_none_are_given(processor):
    prompt = processor.encode_prompt
    assert processor("U1", "I0", 5)["input_ids"].tolist() == [prompt("positive", ["sound"])]
    assert processor("U1", "I0", 5, features=[])["input_ids"].tolist() == [prompt("positive", [])]
    assert processor("U1", "I0", 5, features=["x"])["input_ids"].tolist() == [prompt("positive", ["x"])]
    assert processor("U1", "I2", 5)["input_ids"].tolist() == [prompt("positive", [])]
    processor.num_prompt_features = 2
    assert processor("U1", "I0", 5)["input_ids"].tolist() == [prompt("positive", ["sound", "price"])]
    # Some given, some known, in one batch
    pairs = processor.normalize_pairs(["U1"] * 3, ["I0", "I1", "I0"], None, [None, ["x", "y"], []])
    assert [pair.features for pair in pairs] == [["sound", "price"], ["x", "y"], []]


def test_batch_is_padded_on_the_left(processor):
    batch = processor(user=["U1", "U2"], item=["I0", "I1"], rating=[1, 5], features=[["sound"], []])
    long, short = processor.encode_prompt("negative", ["sound"]), processor.encode_prompt("positive", [])
    pad = len(long) - len(short)
    assert pad > 0
    assert batch["input_ids"].tolist() == [long, [processor.tokenizer.pad_token_id] * pad + short]
    assert batch["attention_mask"].tolist() == [[1] * len(long), [0] * pad + [1] * len(short)]


def test_padding_without_a_pad_token():
    tokenizer = train_tiny_tokenizer()
    tokenizer.pad_token = None
    batch = GaVaMoEProcessor(tokenizer, ["u"], ["i"])("u", ["i", "i"], 5, [["sound"], []])
    assert batch["input_ids"][1, 0] == tokenizer.eos_token_id and batch["attention_mask"][1, 0] == 0


def test_batch_forms(processor):
    def pairs(*args, **kwargs):
        return [(p.user, p.item, p.rating, p.features) for p in processor.normalize_pairs(*args, **kwargs)]

    assert processor.normalize_pairs("U1", "I2", 4, "x") == [PairRequest("U1", "I2", 4.0, ["x"])]
    assert pairs("U1", ["I2", "I3"], 2, [["x"], []]) == [("U1", "I2", 2.0, ["x"]), ("U1", "I3", 2.0, [])]
    assert pairs(["U1", "U2"], "I2", [1, None]) == [("U1", "I2", 1.0, []), ("U2", "I2", None, [])]
    assert pairs(("U1", "U2"), ("I2", "I3"), features="x") == [("U1", "I2", None, ["x"]), ("U2", "I3", None, ["x"])]
    assert pairs(["U1"], ["I2", "I3"]) == [("U1", "I2", None, []), ("U1", "I3", None, [])]
    assert pairs(["U1", "U2"], ["I2", "I3"], torch.tensor([1, 5]), ["x", "y"]) == [
        ("U1", "I2", 1.0, ["x"]),
        ("U2", "I3", 5.0, ["y"]),
    ]


def test_missing_ratings_give_both_prompts(processor):
    batch = processor(user=["U1", "U2"], item="I2", rating=[None, 1], features=[["sound"], []])
    positive, negative = (processor.encode_prompt(s, ["sound"]) for s in ("positive", "negative"))
    rated = processor.encode_prompt("negative", [])
    width = max(len(positive), len(negative))
    assert batch["input_ids"][0, -len(positive) :].tolist() == positive
    assert batch["input_ids"][1, -len(rated) :].tolist() == rated
    assert batch["negative_input_ids"][0, -len(negative) :].tolist() == negative
    assert batch["negative_attention_mask"][0].sum() == len(negative)
    assert batch["negative_input_ids"][1].tolist() == [-1] * width
    assert all(batch[name].shape == (2, width) for name in batch if "input_ids" in name or "mask" in name)


def test_unknown_ids(processor):
    named = GaVaMoEProcessor(processor.tokenizer, users=["A2IBPI20UZIR0U", "A14VAT5EAX3D9S"], items=["x"])
    message = r"The user 'A2IBPI20UZIR0X' is not among the 2 known users\. Close to it: 'A2IBPI20UZIR0U'\. Pass user="
    with pytest.raises(ValueError, match=message):
        named("A2IBPI20UZIR0X", "x", 5)
    with pytest.raises(ValueError, match=r"The item 'piano' is not among the 9 known items\. Pass item=None to"):
        processor("U1", ["I0", "piano"], 5)
    with pytest.raises(ValueError, match="The user '0' is not among"):
        processor(0, "I0", 5)


def test_whole_numbers_as_tables_write_them(tokenizer):
    processor = GaVaMoEProcessor(tokenizer, users=["3", "v1", "1234567890123456"], items=["7.0", "7"])
    assert [processor.user_index(raw) for raw in (3, 3.0, "3.0", "v1")] == [0, 0, 0, 1]
    assert [processor.item_index(raw) for raw in (7, 7.0, "7")] == [1, 0, 1]
    for raw in ("v1.0", "3.00", "1234567890123456.0"):
        with pytest.raises(ValueError, match="is not among the 3 known users"):
            processor.user_index(raw)
    with pytest.raises(ValueError, match=r"Expected new user ids, but '3\.0' is known already, with index 0"):
        processor.add_ids("user", ["3.0"])


def test_none_is_the_population(processor):
    batch = processor(user=[None, "U1"], item=["I0", None], rating=5)
    assert (batch["user_id"].tolist(), batch["item_id"].tolist()) == ([-1, 1], [0, -1])
    assert processor.normalize_pairs(None, None) == [PairRequest(None, None, None, [])]
    # Numbers are ids too
    numbers = GaVaMoEProcessor(processor.tokenizer, users=["7"], items=["42"])
    assert numbers(7, 42, 5)["item_id"].tolist() == [0]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"rating": [1, 2]}, r"for each pair, but got \{'user': 3, 'item': 3, 'rating': 2, 'features': 3\}"),
        ({"features": [["x"]]}, r"for each pair, but got .*'features': 1\}"),
        ({"item": ["I0", "I1"]}, r"for each pair, but got \{'user': 3, 'item': 2"),
        ({"user": [], "item": []}, r"for each pair, but got \{'user': 0"),
        ({"rating": "good"}, r"`rating` as a finite number, but got 'good'"),
        ({"rating": float("nan")}, r"`rating` as a finite number, but got nan"),
        ({"rating": float("inf")}, r"`rating` as a finite number, but got inf"),
        ({"rating": 10**400}, r"`rating` as a finite number, but got 1000"),
        ({"features": [["x"], [None], []]}, r"`features` of a pair as a list of strings, but got \[None\]"),
        ({"features": [["x"], 3, []]}, r"`features` of a pair as a list of strings, but got 3"),
        ({"features": [["x"], ["half \ud800"], []]}, r"text that UTF-8 can hold, but got ' half"),
        ({"return_tensors": "np"}, r"Expected return_tensors=\"pt\", but got 'np'"),
    ],
    ids=str,
)
def test_refusals(processor, kwargs, message):
    with pytest.raises(ValueError, match=message):
        processor(**{"user": ["U0", "U1", "U2"], "item": ["I0", "I1", "I2"], **kwargs})


def test_construction_refusals(tokenizer):
    with pytest.raises(ValueError, match=r"features for each of the 2 items, but got 1 lists"):
        GaVaMoEProcessor(tokenizer, items=["a", "b"], item_features=[["x"]])
    with pytest.raises(ValueError, match=r"Expected distinct user ids, but got 1 repeated"):
        GaVaMoEProcessor(tokenizer, users=["a", "a"])
    with pytest.raises(ValueError, match=r"Expected distinct item ids, but got 2 repeated"):
        GaVaMoEProcessor(tokenizer, items=["a", "a", "a"])


# Placeholder tokens


def test_add_placeholder_tokens():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "</s>": 2}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="[UNK]", eos_token="</s>", additional_special_tokens=["<mark>"]
    )
    with pytest.raises(ValueError, match=r"have the placeholder '<\|user_embedding\|>', but it does not"):
        _ = GaVaMoEProcessor(tokenizer).user_token_id
    assert GaVaMoEProcessor.add_placeholder_tokens(tokenizer) == 2
    processor = GaVaMoEProcessor(tokenizer)
    assert (processor.user_token_id, processor.item_token_id, len(tokenizer)) == (4, 5, 6)
    # Those of the base stay special
    assert set(tokenizer.all_special_tokens) == {"[UNK]", "</s>", "<mark>", USER_TOKEN, ITEM_TOKEN}
    assert tokenizer(f"a {ITEM_TOKEN} a", add_special_tokens=False)["input_ids"] == [1, 5, 1]
    with pytest.raises(ValueError, match=r"without the placeholder tokens, but it already has"):
        GaVaMoEProcessor.add_placeholder_tokens(tokenizer)


# Training examples


def test_encode_record(processor):
    example = processor.encode_record("U2", "I3", 2, ["strings"], "  The strings feel cheap. ")
    prompt = processor.encode_prompt("negative", ["strings"])
    target = [*processor.encode_text("The strings feel cheap."), processor.tokenizer.eos_token_id]
    assert example["input_ids"] == prompt + target
    assert example["labels"] == [-100] * len(prompt) + target
    assert (example["user_id"], example["item_id"], example["rating"]) == (2, 3, 2.0)
    assert type(example["rating"]) is float
    # A record without features names none, whatever the item is known by
    assert processor.encode_record("U2", "I0", 5, [], "x")["input_ids"][:-2] == processor.encode_prompt("positive", [])


def test_encode_record_is_cut(processor):
    whole = processor.encode_record("U2", "I3", 5, [], "The sound is great.")
    length = len(whole["input_ids"])
    prompt = whole["labels"].count(-100)
    assert processor.encode_record("U2", "I3", 5, [], "The sound is great.", max_length=length) == whole
    cut = processor.encode_record("U2", "I3", 5, [], "The sound is great.", max_length=length - 2)
    assert cut["input_ids"] == whole["input_ids"][:-2] and cut["labels"] == whole["labels"][:-2]
    assert processor.encode_record("U2", "I3", 5, [], "x", max_length=prompt + 1)["labels"][:-1] == [-100] * prompt
    with pytest.raises(ValueError, match=rf"The prompt alone takes {prompt} tokens, but `max_length` is {prompt}\."):
        processor.encode_record("U2", "I3", 5, [], "x", max_length=prompt)


# Decoding and files


def test_decode(processor):
    tokens = torch.tensor([processor.encode_record("U2", "I3", 5, ["x"], "The sound is gréat ☂.")["input_ids"]])
    prompt = len(processor.encode_prompt("positive", ["x"]))
    assert processor.batch_decode(tokens[:, prompt:], skip_special_tokens=True) == ["The sound is gréat ☂."]
    assert processor.decode(tokens[0, prompt:]).endswith("☂.<|end_of_text|>")
    assert "<|" not in processor.decode(tokens[0], skip_special_tokens=True)


@pytest.mark.parametrize("template", [None, CHAT_TEMPLATE])
def test_round_trip(tokenizer, tmp_path, template):
    processor = GaVaMoEProcessor(
        tokenizer,
        users=["U0", "<|end_of_text|>", "ü"],
        items=["I0", "I1"],
        item_features=[["sound", "low price"], []],
        positive_rating_threshold=3.5,
        num_prompt_features=2,
        max_feature_tokens=7,
        system_prompt="Explain.",
        chat_template=template,
    )
    expected = processor.to_dict()
    processor.save_pretrained(tmp_path)
    for loaded in (GaVaMoEProcessor.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)):
        assert type(loaded) is GaVaMoEProcessor
        assert loaded.to_dict() == expected
        assert (loaded.users, loaded.items, loaded.item_features) == (
            processor.users,
            processor.items,
            processor.item_features,
        )
        assert (loaded.positive_rating_threshold, loaded.num_prompt_features, loaded.max_feature_tokens) == (3.5, 2, 7)
        assert (loaded.system_prompt, loaded.chat_template) == ("Explain.", template)
        assert loaded.tokenizer.get_vocab() == tokenizer.get_vocab()
        for pair in ({"user": "ü", "item": "I0"}, {"user": None, "item": "I1", "rating": 3}):
            ours, theirs = loaded(**pair), processor(**pair)
            assert set(ours) == set(theirs)
            assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    # A second trip as well
    loaded.save_pretrained(tmp_path / "again")
    assert GaVaMoEProcessor.from_pretrained(tmp_path / "again").to_dict() == expected


def test_two_threads_at_once(processor):
    # The tokenizer keeps whether text may turn into special tokens as a state of its own: one thread that renders
    # prompts, which need theirs, must not change what another's text becomes
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    expected = processor.encode_text(HOSTILE[1]), processor._render("positive", True)

    def work(number):
        return processor.encode_text(HOSTILE[1]) if number % 2 else processor._render("positive", True)

    try:
        with ThreadPoolExecutor(4) as pool:
            results = list(pool.map(work, range(2000)))
    finally:
        sys.setswitchinterval(interval)
    assert all(result == expected[0] for result in results[1::2])
    assert all(result == expected[1] for result in results[::2])
