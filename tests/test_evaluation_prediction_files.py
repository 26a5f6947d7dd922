"""Predictions files: what is read from them, and what is said of those that cannot be scored."""

import json
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict

from gavamoe_hf.data import DataError
from gavamoe_hf.evaluation.prediction_files import Corpus, check_predictions, check_same_records, read_predictions

ROW = {"user": "u1", "item": "i1", "reference": "good strings", "prediction": "fine strings"}
FULL = {**ROW, "feature": "strings", "rating": 4, "predicted_rating": 3.5}


def write(path: Path, *rows: dict | str) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def corpus() -> Corpus:
    def part(users: list[str], features: list[list[str]], ratings: list[float]) -> Dataset:
        texts = [f"text {number}" for number in range(len(users))]
        columns = {"user": users, "item": ["i"] * len(users), "rating": ratings}
        return Dataset.from_dict({**columns, "feature": features, "explanation": texts})

    train = part(["a", "b"], [["tone"], ["price", "sound"]], [2.0, 5.0])
    return Corpus.from_records(DatasetDict(train=train, test=part(["a", "b"], [["sound"], []], [3.0, 3.0])), "test")


def predicted(corpus: Corpus, **changes) -> list[dict]:
    rows = corpus.records.to_list()
    return [
        {"user": row["user"], "item": row["item"], "reference": row["explanation"], "prediction": "x", **changes}
        for row in rows
    ]


def test_reads_what_predictions_hold(tmp_path: Path) -> None:
    rows = [FULL, "", {**FULL, "user": 7, "feature": ["a", " b ", ""]}, {**FULL, "feature": None, "other": 1}]
    records = list(read_predictions(write(tmp_path / "p.jsonl", *rows)))
    assert [record.line for record in records] == [1, 3, 4]
    assert [record.features for record in records] == [("strings",), ("a", "b"), ()]
    assert records[1].user == "7" and records[0].rating == 4.0 and records[0].predicted_rating == 3.5
    assert next(read_predictions(write(tmp_path / "q.jsonl", ROW))).features is None


def test_utf_16_and_ids_that_are_numbers(tmp_path: Path) -> None:
    row = {"user": 3.0, "item": 7, "reference": "a \u2028 b", "prediction": ""}
    path = tmp_path / "predictions.jsonl"
    path.write_bytes((json.dumps(row, ensure_ascii=False) + "\n").encode("utf-16"))
    assert [(record.user, record.item, record.reference) for record in read_predictions(path)] == [
        ("3", "7", "a \u2028 b")
    ]
    for bad in (76561197970982479.0, 3.5, [3]):
        with pytest.raises(DataError, match=r"line 1: expected 'user' as a string or a whole number, but got"):
            list(read_predictions(write(tmp_path / "bad.jsonl", {**row, "user": bad})))


def test_line_separators_inside_strings(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps({**ROW, "prediction": "a\u2028b"}, ensure_ascii=False).encode())
    assert next(read_predictions(path)).prediction == "a\u2028b"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", r"line 2: expected a JSON object, but got broken JSON"),
        ("[1]", r"line 2: expected a JSON object, but got \[1\]"),
        ({**ROW, "prediction": None}, r"line 2: .* but prediction is missing or null\. Write an empty string"),
        ({"user": "u", "item": "i"}, r"line 2: .* but reference, prediction is missing"),
        ({**ROW, "reference": 3}, r"line 2: expected 'reference' as a string, but got 3"),
        ({**ROW, "rating": float("nan")}, r"line 2: expected 'rating' as a finite number, but got nan"),
        (
            {**ROW, "predicted_rating": float("inf")},
            r"expected 'predicted_rating' as a finite number, but got inf",
        ),
        ({**ROW, "rating": 10**400}, r"line 2: expected 'rating' as a finite number, but got 1000"),
        ({**ROW, "rating": "5"}, r"line 2: expected 'rating' as a finite number, but got '5'"),
        ({**ROW, "rating": True}, r"line 2: expected 'rating' as a finite number, but got True"),
        ({**ROW, "feature": {"a": 1}}, r"line 2: expected 'feature' as a string, a list of strings or null"),
        ({**ROW, "feature": ["a", 2]}, r"line 2: expected 'feature' as a string, a list of strings or null"),
        (
            FULL,
            r"line 2: expected the same keys .* but this one has 'feature' and those before it have not",
        ),
    ],
)
def test_bad_lines_are_named(row, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        check_predictions(write(tmp_path / "p.jsonl", ROW, row))


def test_a_key_that_later_lines_lack(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", {**ROW, "rating": 4}, {**ROW, "rating": None})
    with pytest.raises(DataError, match="this one has not 'rating' and those before it have"):
        check_predictions(path)


def test_nothing_in_the_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"p\.jsonl: expected at least one prediction, but got none"):
        check_predictions(write(tmp_path / "p.jsonl", ""))


def test_what_a_file_tells_of_its_corpus(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", FULL, {**FULL, "feature": ["tone"], "rating": 2})
    summary, found = check_predictions(path)
    assert summary.num_records == 2 and summary.present == {"feature", "rating", "predicted_rating"}
    assert found.features == {"strings", "tone"} and found.rating_range == (2, 4)
    assert found.is_file and found.is_file_range


def test_the_corpus_of_a_data_set(corpus: Corpus, tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", *predicted(corpus, rating=3))
    _, found = check_predictions(path, corpus)
    assert found.features == {"tone", "price", "sound"} and found.rating_range == (2, 5)
    assert not found.is_file and not found.is_file_range


def test_other_ratings_or_features_than_the_split(corpus: Corpus, tmp_path: Path) -> None:
    rows = predicted(corpus, rating=3.0)
    for row, features in zip(rows, (["sound", " sound "], None), strict=True):
        row["feature"] = features
    check_predictions(write(tmp_path / "p.jsonl", *rows), corpus)
    rows[1]["feature"] = ["price"]
    with pytest.raises(DataError, match=r"line 2: expected the feature \[\] of the split's .* got \['price'\]"):
        check_predictions(write(tmp_path / "p.jsonl", *rows), corpus)
    rows[0]["rating"] = 2
    with pytest.raises(DataError, match=r"line 1: expected the rating 3\.0 of the split's record, but got 2\.0"):
        check_predictions(write(tmp_path / "p.jsonl", *rows), corpus)


def test_fewer_and_more_than_the_split(corpus: Corpus, tmp_path: Path) -> None:
    rows = predicted(corpus)
    with pytest.raises(DataError, match=r"expected 2 predictions, one for each record of the split, but got 1\."):
        check_predictions(write(tmp_path / "p.jsonl", rows[0]), corpus)
    with pytest.raises(DataError, match=r"line 3: expected 2 predictions, .* but got more"):
        check_predictions(write(tmp_path / "p.jsonl", *rows, rows[0]), corpus)


def test_other_records_than_the_split(corpus: Corpus, tmp_path: Path) -> None:
    rows = predicted(corpus)
    with pytest.raises(DataError, match=r"line 1: expected the user 'a' of the split's record .* but got 'b'"):
        check_predictions(write(tmp_path / "p.jsonl", *reversed(rows)), corpus)
    rows[1]["reference"] = "text"
    with pytest.raises(DataError, match=r"line 2: expected the reference 'text 1' .* with whole references"):
        check_predictions(write(tmp_path / "p.jsonl", *rows), corpus)


def test_unknown_feature(corpus: Corpus, tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", *predicted(corpus, feature="colour"))
    with pytest.raises(DataError, match="line 1: expected a feature of the data set, but got 'colour'"):
        check_predictions(path, corpus)


class TestSameRecords:
    def test_the_same(self, tmp_path: Path) -> None:
        left = write(tmp_path / "a.jsonl", FULL, {**FULL, "user": "u2"})
        right = write(tmp_path / "b.jsonl", {**ROW, "prediction": "x"}, "", {**ROW, "user": "u2"})
        check_same_records(left, right)

    @pytest.mark.parametrize("key", ["user", "item", "reference", "feature", "rating"])
    def test_another_record(self, key: str, tmp_path: Path) -> None:
        left = write(tmp_path / "a.jsonl", FULL, FULL)
        right = write(tmp_path / "b.jsonl", FULL, {**FULL, key: 2 if key == "rating" else "other"})
        with pytest.raises(DataError, match=rf"same records to compare, but .*a\.jsonl, line 2 has the {key}"):
            check_same_records(left, right)

    @pytest.mark.parametrize("swap", [False, True])
    def test_another_length(self, swap: bool, tmp_path: Path) -> None:
        paths = write(tmp_path / "long.jsonl", FULL, FULL), write(tmp_path / "short.jsonl", FULL)
        with pytest.raises(DataError, match=r"short\.jsonl ends before line 2 of .*long\.jsonl"):
            check_same_records(*(reversed(paths) if swap else paths))
