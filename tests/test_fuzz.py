"""Whatever comes in, what comes out is a result or an error that says what was expected: inputs drawn by hypothesis."""

import copy
import json
import os
import pickle
import re
import resource
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from references import spread_clusters, tiny_model

from gavamoe_hf import GaVaMoEProcessor, load_checkpoint
from gavamoe_hf.data import DataError, load_records
from gavamoe_hf.data.published import read_published
from gavamoe_hf.evaluation.human_scores import score_study, write_scores
from gavamoe_hf.evaluation.human_study import draw_study
from gavamoe_hf.evaluation.prediction_files import check_predictions
from gavamoe_hf.processing_gavamoe import ITEM_TOKEN, USER_TOKEN

# What callers are told to expect; anything else is a crash
DOCUMENTED = (ValueError, LookupError, OSError, TypeError)
# Errors that say something say one of these
CLEAR = re.compile(
    "[Ee]xpected|must |should |is not among|lacks|is not valid|is not an index|is truncated|has no readable|alone takes"
)
LONG = 3000


def fuzz(max_examples: int):
    """The same inputs in every run, fixtures shared between them."""
    ignored = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(
        max_examples=max_examples, derandomize=True, deadline=None, database=None, suppress_health_check=ignored
    )


@contextmanager
def only_clear_errors(kinds: type[Exception] | tuple[type[Exception], ...] = DOCUMENTED):
    """Errors are of documented kinds, and clear."""
    try:
        yield
    except kinds as error:
        assert CLEAR.search(str(error)), f"{type(error).__name__}: {error}"


@pytest.fixture(scope="module", autouse=True)
def bounded_memory():
    """What would fill the memory fails instead."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + 4 * 2**30, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)


@contextmanager
def folder():
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


SPECIAL = [USER_TOKEN, ITEM_TOKEN, "<|pad|>", "<|begin_of_text|>", "<|end_of_text|>", "<s>", "</s>"]
HOSTILE = [*SPECIAL, "\ue000", "{user}", "{", "\x00", "../../etc/passwd", "/etc/passwd", "\u202e", "a" * LONG, "é" * 99]
# With half surrogates, which no encoding holds
texts = st.lists(st.sampled_from(HOSTILE) | st.text(st.characters(), max_size=8), max_size=4).map("".join)
numbers = st.integers(-10, 20) | st.floats() | st.sampled_from([10**400, -(2**63)])
scalars = st.none() | st.booleans() | numbers | texts
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3), max_leaves=5
)


def mutated(valid):
    """A JSON value with a few of its parts removed, renamed, repeated or replaced."""

    @st.composite
    def draw_mutated(draw):
        root = copy.deepcopy(valid)
        for _ in range(draw(st.integers(1, 3))):
            parent, key = None, None
            node = root
            # Downwards, to a part at random
            while isinstance(node, dict | list) and node and (parent is None or draw(st.booleans())):
                parent, key = node, draw(st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node))))
                node = parent[key]
            if parent is None:
                break
            match draw(st.sampled_from(["remove", "replace", "replace", "add"])):
                case "remove":
                    del parent[key]
                case "replace":
                    parent[key] = draw(values)
                case "add" if isinstance(parent, dict):
                    parent[draw(texts)] = draw(values)
                case "add":
                    parent.append(copy.deepcopy(node))
        return root

    return draw_mutated()


def broken(content: bytes, forbidden: bytes = b""):
    """Bytes with some of them cut off, changed or repeated."""

    @st.composite
    def draw_broken(draw):
        data = bytearray(content)
        byte = st.integers(0, 255).filter(lambda value: value not in forbidden)
        for _ in range(draw(st.integers(1, 4))):
            place = draw(st.integers(0, max(len(data) - 1, 0)))
            match draw(st.sampled_from(["cut", "change", "change", "repeat", "insert"])):
                case "cut":
                    del data[place:]
                case "change" if data:
                    data[place] = draw(byte)
                case "repeat":
                    data[place:place] = data[place : place + 20]
                case "insert":
                    data.insert(place, draw(byte))
        return bytes(data)

    return draw_broken()


def as_json(value) -> bytes:
    return json.dumps(value).encode()


@pytest.fixture(scope="module")
def pair(tokenizer):
    """Model and processor, the latter with ids that look like special tokens and paths."""
    users = ["U0", "U1", USER_TOKEN, "</s>", "../../U4", "/U5", "{user}", "é"]
    processor = GaVaMoEProcessor(
        tokenizer,
        users=users,
        items=["I0", ITEM_TOKEN, *[f"I{n}" for n in range(2, 9)]],
        item_features=[["sound"], ["</s>", USER_TOKEN], *[[] for _ in range(7)]],
    )
    model = tiny_model(vocab_size=len(tokenizer), user_token_id=3, item_token_id=4)
    model.config.stored_prompts = processor.stored_prompts()
    return spread_clusters(model.eval()), processor


def specials_of(processor, ids: list[int]) -> list[int]:
    return [token for token in ids if token in processor.tokenizer.all_special_ids]


def check_prompts(processor, batch):
    """Special tokens stand where the template has them, and nowhere else; lengths are bounded."""
    padding = processor.tokenizer.pad_token_id
    for prompts, masks in (("input_ids", "attention_mask"), ("negative_input_ids", "negative_attention_mask")):
        for ids, mask in zip(batch.get(prompts, []), batch.get(masks, []), strict=True):
            prompt = ids[mask.bool()].tolist()
            if not prompt or prompt[-1] < 0:
                continue
            templates = [processor.encode_prompt("positive", names) for names in ([], ["a"])]
            assert specials_of(processor, prompt) in [specials_of(processor, template) for template in templates]
            assert padding not in prompt
            assert len(prompt) <= max(map(len, templates)) + processor.max_feature_tokens


known_users = st.sampled_from(["U0", USER_TOKEN, "</s>", "../../U4", None])
known_items = st.sampled_from(["I0", ITEM_TOKEN, "I2", None])
feature_lists = st.lists(texts, max_size=3) | st.none() | texts
requests = st.fixed_dictionaries(
    {"user": known_users | values, "item": known_items | values},
    optional={"rating": st.floats() | values, "features": feature_lists | values},
) | st.integers(0, 3).flatmap(
    lambda size: st.fixed_dictionaries(
        {"user": st.lists(known_users, min_size=size, max_size=size), "item": known_items},
        optional={
            "rating": st.lists(st.none() | st.floats(1, 5) | scalars, min_size=size, max_size=size),
            "features": st.lists(feature_lists, min_size=size, max_size=size),
        },
    )
)


@fuzz(150)
@given(request=requests)
def test_prompts(pair, request):
    _, processor = pair
    with only_clear_errors():
        check_prompts(processor, processor(**request))


@fuzz(25)
@given(request=requests)
def test_explanations(pair, request):
    model, processor = pair
    with only_clear_errors():
        explained = model.explain(processor, **request, do_sample=False, max_new_tokens=3)
        assert len(explained) == len(processor.normalize_pairs(**request))
        for each in explained:
            assert len(each.explanation) < 300
            assert not any(token in each.explanation for token in processor.tokenizer.all_special_tokens)


@fuzz(150)
@given(text=texts, features=st.lists(texts, max_size=2))
def test_text_makes_no_special_token(pair, text, features):
    _, processor = pair
    with only_clear_errors():
        assert not specials_of(processor, processor.encode_text(text))
        record = processor.encode_record("U0", "I0", 4, features, text, max_length=250)
        assert len(record["input_ids"]) <= 250
        # Of the explanation's end alone, where it was not cut
        learned = [token for token in record["labels"] if token >= 0]
        assert specials_of(processor, learned) in ([], [processor.tokenizer.eos_token_id])
        assert processor.tokenizer.eos_token_id not in learned[:-1]


# Files


RECORDS = [
    {"user": f"u{row % 3}", "item": f"i{row % 4}", "rating": row % 5 + 1, "feature": ["sound"], "explanation": "fine"}
    for row in range(12)
]
PREDICTIONS = [
    {"user": "u", "item": "i", "reference": "good", "prediction": "bad", "rating": 4, "predicted_rating": 3.5}
    for _ in range(3)
]
CSV = b"user,item,rating,explanation\n" + b"".join(b"u%d,i%d,4,it is fine\n" % (n % 3, n % 2) for n in range(9))


def lines(rows) -> bytes:
    return b"\n".join(map(as_json, rows))


def read(source, **options):
    # Each kind of source has one error of its own
    with only_clear_errors(DataError):
        records = load_records(source, **options)
        assert set(records) == {"train", "validation", "test"}
        for split in records.values():
            assert all(isinstance(user, str) and user.strip() for user in split["user"])
            assert all(1 <= rating <= 5 for rating in split["rating"])


@fuzz(150)
@given(
    content=(mutated(RECORDS).filter(lambda rows: isinstance(rows, list)).map(lines))
    | mutated(RECORDS).map(as_json)
    | broken(lines(RECORDS))
    | st.binary(max_size=60)
    | values.map(as_json),
    suffix=st.sampled_from([".jsonl", ".json"]),
)
def test_json_records(content, suffix):
    with folder() as place:
        (place / f"records{suffix}").write_bytes(content)
        read(place / f"records{suffix}")


@fuzz(100)
@given(content=broken(CSV) | texts.map(lambda text: CSV + text.encode("utf-8", "surrogatepass")) | st.binary())
def test_csv_records(content):
    with folder() as place:
        (place / "records.csv").write_bytes(content)
        read(place / "records.csv")


def parquet() -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(RECORDS), sink)
    return sink.getvalue().to_pybytes()


@fuzz(60)
@given(content=broken(parquet()) | st.binary())
def test_parquet_records(content):
    with folder() as place:
        (place / "records.parquet").write_bytes(content)
        read(place / "records.parquet")


@fuzz(60)
@given(
    name=texts | st.sampled_from(["..", "a/../..", "~nobody/x", "/dev/null", "a\x00b", "x" * 5000, ""]),
    options=st.fixed_dictionaries(
        {},
        optional={
            "column_mapping": st.dictionaries(st.sampled_from(["user", "split", "x"]), values, max_size=2),
            "rating_levels": st.lists(values, max_size=3),
            "unknown_held_out": st.sampled_from(["error", "drop", "x"]),
            "index_folder": texts,
        },
    ),
)
def test_names_of_sources(name, options):
    with folder() as place:
        (place / "train.jsonl").write_bytes(lines(RECORDS))
        # The folder itself with options, and names that lead anywhere
        with only_clear_errors(DataError):
            load_records(place, **options)
        read(name if name.startswith("~") else place / name)


@fuzz(150)
@given(content=mutated(PREDICTIONS).filter(lambda rows: isinstance(rows, list)).map(lines) | broken(lines(PREDICTIONS)))
def test_predictions_files(content):
    with folder() as place:
        (place / "predictions.jsonl").write_bytes(content)
        with only_clear_errors(DataError):
            summary, _ = check_predictions(place / "predictions.jsonl")
            assert summary.num_records > 0


REVIEWS = [
    {"user": f"u{row % 3}", "item": f"i{row % 4}", "rating": 4, "template": ("sound", "good", "good sound", 1)}
    for row in range(6)
]


@fuzz(150)
@given(
    # Without the code that asks for a memo of any size: a pickle can fill the memory, as the docstring says
    content=broken(pickle.dumps(REVIEWS, protocol=2), forbidden=b"r")
    | mutated([{**review, "template": list(review["template"])} for review in REVIEWS]).map(pickle.dumps)
    | values.map(pickle.dumps)
    | st.just(pickle.dumps(os.system)),
    index=st.just(b"0 1 2") | st.binary(max_size=30) | broken(b"0 1 2"),
)
def test_published_pickles(content, index):
    with folder() as place:
        (place / "reviews.pickle").write_bytes(content)
        (place / "train.index").write_bytes(index)
        (place / "validation.index").write_bytes(b"3")
        (place / "test.index").write_bytes(b"4 5")
        with only_clear_errors(DataError):
            parts = read_published(place, {"user", "item", "rating", "feature", "explanation"})
            assert set(parts) == {"train", "validation", "test"}
        read(place)


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("study")
    for name in ("one", "two"):
        rows = [{**row, "user": f"u{n}", "prediction": f"{name} {n}"} for n, row in enumerate(PREDICTIONS)]
        (place / f"{name}.jsonl").write_bytes(lines(rows))
    draw_study({name: place / f"{name}.jsonl" for name in ("one", "two")}, place, num_pairs=2)
    return place


@fuzz(150)
@given(data=st.data())
def test_answers_of_a_study(study, data):
    key = json.loads((study / "key.json").read_text())
    answers = {"study": key["study"], "rater": "R", "answers": {"1A": {"P": 3, "Q": 4.5}, "2B": {"U": 1}}}
    with folder() as place:
        (place / "key.json").write_bytes(as_json(data.draw(st.just(key) | mutated(key))))
        content = mutated(answers).map(as_json) | broken(as_json(answers)) | values.map(as_json)
        (place / "answers.json").write_bytes(data.draw(content))
        with only_clear_errors():
            write_scores(score_study(place / "key.json", [place / "answers.json"], num_resamples=5), place)


# Checkpoints


@pytest.fixture(scope="module")
def checkpoint(pair, tmp_path_factory) -> Path:
    model, processor = pair
    place = tmp_path_factory.mktemp("fuzzed")
    model.save_pretrained(place)
    processor.save_pretrained(place)
    return place


@contextmanager
def checkpoint_with(source: Path, name: str, content: bytes):
    """The folder of a checkpoint with another file in it."""
    with folder() as place:
        for path in source.iterdir():
            (place / path.name).symlink_to(path)
        (place / name).unlink(missing_ok=True)
        (place / name).write_bytes(content)
        yield str(place)


@pytest.mark.parametrize("name", ["config.json", "processor_config.json", "tokenizer_config.json", "tokenizer.json"])
@fuzz(25)
@given(data=st.data())
def test_json_of_a_checkpoint(checkpoint, name, data):
    valid = json.loads((checkpoint / name).read_text())
    content = as_json(data.draw(mutated(valid) | values))
    with checkpoint_with(checkpoint, name, content) as place, only_clear_errors():
        # It explains, or says what is wrong with it
        model, processor = load_checkpoint(place)
        batch = processor(user=None, item=None, rating=4, features=["sound"])
        model.generate(**batch, do_sample=False, max_new_tokens=1)


@fuzz(30)
@given(names=st.lists(texts | st.sampled_from(["../x.safetensors", "/etc/passwd", "model.safetensors"]), min_size=1))
def test_index_of_weights_names_files_of_the_folder(checkpoint, names):
    content = {"metadata": {}, "weight_map": {str(number): name for number, name in enumerate(names)}}
    leads_out = any("/" in name or name in ("", ".", "..") for name in names)
    expected = pytest.raises(ValueError, match="names of files in its folder") if leads_out else only_clear_errors()
    with checkpoint_with(checkpoint, "model.safetensors.index.json", as_json(content)) as place, expected:
        load_checkpoint(place)


# What is written


def contents(place: Path) -> dict[str, bytes]:
    return {str(path.relative_to(place)): path.read_bytes() for path in place.rglob("*") if path.is_file()}


@fuzz(25)
@given(names=st.lists(st.sampled_from(HOSTILE) | st.text(min_size=1), min_size=2, max_size=3, unique=True))
def test_nothing_is_written_outside_the_folder(pair, study, names):
    """Names from the data are no paths, and links in the folder are replaced, not followed."""
    _, processor = pair
    with folder() as place:
        outside, output = place / "outside", place / "output"
        outside.mkdir()
        output.mkdir()
        (outside / "secret").write_text("as it was")
        for name in ("sheet.html", "sheet.html.part", "key.json.part", "human_scores.json", "human_scores.md.part"):
            (output / name).symlink_to(outside / "secret")
        key = draw_study(dict.fromkeys(names, study / "one.jsonl"), output, num_pairs=2)
        answers = {"study": key["study"], "rater": "R" + names[0], "answers": {"1A": {"P": 3}}}
        (place / "answers.json").write_bytes(as_json(answers))
        write_scores(score_study(output / "key.json", [place / "answers.json"], num_resamples=5), output)
        renamed = copy.copy(processor)
        renamed.users = names
        renamed.save_pretrained(str(output))
        assert {path.name for path in place.iterdir()} == {"outside", "output", "answers.json"}
        assert {path.name: path.read_bytes() for path in outside.iterdir()} == {"secret": b"as it was"}
