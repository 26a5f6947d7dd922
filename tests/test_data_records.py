"""load_records: every kind of source gives the same splits, columns, types and order."""

import json
import logging

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict, IterableDataset, List, Value
from references import MUSICAL_INSTRUMENTS

from gavamoe_hf.data import DataError, load_records

COLUMNS = ["user", "item", "rating", "feature", "explanation"]


def make_rows(count=40, offset=0):
    """Records of 4 users and 5 items, in which every user and item occurs often."""
    return [
        {
            "user": f"u{number % 4}",
            "item": f"i{number % 5}",
            "rating": number % 5 + 1,
            "feature": ["sound", "price"][number % 2],
            "explanation": f"sentence {number + offset}",
        }
        for number in range(count)
    ]


SPLIT_ROWS = {"train": make_rows(20), "validation": make_rows(4, 100), "test": make_rows(3, 200)}


def write(path, rows):
    if path.suffix == ".csv":
        pd.DataFrame(rows).to_csv(path, index=False)
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def clean(rows):
    """What load_records makes of rows from make_rows."""
    return [{**row, "rating": float(row["rating"]), "feature": [row["feature"]]} for row in rows]


def rows_of(records):
    return {split: part.to_list() for split, part in records.items()}


EXPECTED = {split: clean(rows) for split, rows in SPLIT_ROWS.items()}


def folder_of(tmp_path, suffix, names=("train", "validation", "test")):
    for split, name in zip(SPLIT_ROWS, names, strict=True):
        write(tmp_path / f"{name}{suffix}", SPLIT_ROWS[split])
    return tmp_path


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_folder(tmp_path, suffix):
    records = load_records(folder_of(tmp_path, suffix))
    assert rows_of(records) == EXPECTED
    for part in records.values():
        assert part.column_names == COLUMNS
        assert part.features["rating"] == Value("float64")
        assert part.features["feature"] == List(Value("string"))
        assert all(part.features[name] == Value("string") for name in ("user", "item", "explanation"))


@pytest.mark.parametrize("name", ["valid", "val", "dev", "Validation"])
def test_folder_leaves_other_files_alone(tmp_path, name):
    folder = folder_of(tmp_path, ".jsonl", ("train", name, "test"))
    (folder / "notes.txt").write_text("not records")
    (folder / "train.jsonl.gz").write_bytes(b"\x00")
    (folder / "broken.jsonl").write_text("{")
    (folder / "peers").mkdir()
    (folder / "peers" / "train.jsonl").write_text("{")
    assert rows_of(load_records(str(folder))) == EXPECTED


@pytest.mark.parametrize("kind", [dict, DatasetDict])
def test_dicts_of_datasets(kind):
    source = kind({split: Dataset.from_list(rows) for split, rows in SPLIT_ROWS.items()})
    assert rows_of(load_records(source)) == EXPECTED


def test_dict_takes_aliases_and_leaves_other_splits_alone():
    source = {split: Dataset.from_list(rows) for split, rows in SPLIT_ROWS.items()}
    source["dev"] = source.pop("validation")
    source["unsupervised"] = Dataset.from_dict({"text": ["?"]})
    assert rows_of(load_records(source)) == EXPECTED


def test_saved_to_disk(tmp_path):
    DatasetDict({split: Dataset.from_list(rows) for split, rows in SPLIT_ROWS.items()}).save_to_disk(tmp_path / "many")
    assert rows_of(load_records(tmp_path / "many")) == EXPECTED
    Dataset.from_list(make_rows()).save_to_disk(tmp_path / "one")
    assert rows_of(load_records(tmp_path / "one")) == rows_of(load_records(Dataset.from_list(make_rows())))


def test_hub_id(monkeypatch):
    asked = []

    def load_dataset(name):
        asked.append(name)
        return DatasetDict({split: Dataset.from_list(rows) for split, rows in SPLIT_ROWS.items()})

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert rows_of(load_records("someone/reviews")) == EXPECTED
    assert asked == ["someone/reviews"]


def test_hub_id_that_neither_exists_here_nor_there(monkeypatch, tmp_path):
    def load_dataset(name):
        raise ConnectionError("no network")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    monkeypatch.chdir(tmp_path)
    message = (
        r"nothing exists at .*someone/reviews and datasets.load_dataset\('someone/reviews'\) failed with "
        r"ConnectionError: no network\. Correct the path"
    )
    with pytest.raises(DataError, match=message):
        load_records("someone/reviews")


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_single_file_is_split_at_random(tmp_path, suffix):
    rows = make_rows()
    path = write(tmp_path / f"all{suffix}", rows)
    records = load_records(path, split_seed=3)
    assert {split: len(part) for split, part in records.items()} == {"train": 32, "validation": 4, "test": 4}
    assert rows_of(records) == rows_of(load_records(Dataset.from_list(rows), split_seed=3))
    assert rows_of(records) != rows_of(load_records(path, split_seed=4))
    everything = [row for part in records.values() for row in part]
    position = {row["explanation"]: number for number, row in enumerate(rows)}
    assert sorted(everything, key=lambda row: position[row["explanation"]]) == clean(rows)
    for part in records.values():
        positions = [position[text] for text in part["explanation"]]
        assert positions == sorted(positions)


@pytest.mark.parametrize("source", ["file", "dataset", "dict", "folder"])
def test_only_train_is_split_at_random(tmp_path, source):
    rows = make_rows()
    dataset = Dataset.from_list(rows)
    path = write(tmp_path / "train.jsonl", rows)
    given = {"file": path, "dataset": dataset, "dict": {"train": dataset}, "folder": tmp_path}[source]
    assert rows_of(load_records(given)) == rows_of(load_records(dataset))


def test_split_column(tmp_path):
    aliases = {"train": "train", "validation": "Val", "test": " test "}
    rows = [{**row, "split": aliases[split]} for split in ("test", "train", "validation") for row in SPLIT_ROWS[split]]
    assert rows_of(load_records(write(tmp_path / "all.csv", rows))) == EXPECTED
    assert rows_of(load_records(Dataset.from_list(rows))) == EXPECTED
    renamed = Dataset.from_list(rows).rename_column("split", "fold")
    assert rows_of(load_records(renamed, column_mapping={"split": "fold"})) == EXPECTED


def test_split_column_is_ignored_where_there_are_splits():
    source = {
        split: Dataset.from_list([{**row, "split": "nonsense"} for row in rows]) for split, rows in SPLIT_ROWS.items()
    }
    assert rows_of(load_records(source)) == EXPECTED


@pytest.mark.parametrize("missing, given", [("validation", "test"), ("test", "validation")])
def test_missing_split_is_cut_out_of_train(caplog, missing, given):
    rows = make_rows(45)
    source = {"train": Dataset.from_list(rows), given: Dataset.from_list(SPLIT_ROWS[given])}
    with caplog.at_level(logging.WARNING):
        records = load_records(source)
    assert f"there is no split '{missing}': cutting 5 of the 45 records of train out" in caplog.text
    assert len(records["train"]) == 40 and len(records[missing]) == 5
    assert records[given].to_list() == EXPECTED[given]
    texts = {*records["train"]["explanation"], *records[missing]["explanation"]}
    assert texts == {row["explanation"] for row in rows}
    for name in ("user", "item"):
        for split in (missing, given):
            assert set(records[split][name]) <= set(records["train"][name])


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_column_mapping(tmp_path, suffix):
    theirs = {"user": "reviewerID", "item": "asin", "rating": "overall", "explanation": "text"}
    rows = [{theirs.get(name, name): value for name, value in row.items()} for row in make_rows()]
    # Columns of our names that stand for something else are not read.
    rows = [{**row, "user": "wrong", "extra": 1} for row in rows]
    records = load_records(write(tmp_path / f"all{suffix}", rows), column_mapping=theirs)
    assert rows_of(records) == rows_of(load_records(Dataset.from_list(make_rows())))


def test_column_mapping_can_take_the_place_of_an_optional_column():
    rows = [{**row, "explanation": "wrong", "feature": row["explanation"]} for row in make_rows()]
    records = load_records(Dataset.from_list(rows), column_mapping={"explanation": "feature"})
    assert records["train"][0]["explanation"].startswith("sentence")
    assert records["train"][0]["feature"] == []


@pytest.mark.parametrize(
    "value, expected",
    [
        ("sound", ["sound"]),
        (" sound ", ["sound"]),
        (["sound", "price"], ["sound", "price"]),
        (["sound", " ", None], ["sound"]),
        ([], []),
        ("", []),
        (None, []),
        (float("nan"), []),
    ],
)
def test_feature_forms(tmp_path, value, expected):
    rows = [{**row, "feature": value} for row in make_rows()]
    records = load_records(write(tmp_path / "all.jsonl", rows))
    assert all(words == expected for part in records.values() for words in part["feature"])


@pytest.mark.parametrize("text", ["['sound', 'price']", '["sound", "price"]'])
def test_feature_list_in_csv(tmp_path, text):
    rows = [{**row, "feature": text} for row in make_rows()]
    records = load_records(write(tmp_path / "all.csv", rows))
    assert records["train"]["feature"][0] == ["sound", "price"]


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_feature_may_be_absent(tmp_path, suffix):
    rows = [{name: value for name, value in row.items() if name != "feature"} for row in make_rows()]
    records = load_records(write(tmp_path / f"all{suffix}", rows))
    assert records["test"].column_names == COLUMNS
    assert records["test"]["feature"][0] == []


def test_misnamed_feature_warns(caplog):
    dataset = Dataset.from_list(make_rows()).rename_column("feature", "Features")
    with caplog.at_level(logging.WARNING):
        load_records(dataset)
    assert "pass column_mapping={'feature': 'Features'}" in caplog.text


def test_records_that_repeat_others_are_dropped(caplog):
    splits = {split: Dataset.from_list(rows) for split, rows in SPLIT_ROWS.items()}
    rows = SPLIT_ROWS["train"]
    other = {**rows[4], "explanation": "of the same pair, but another text"}
    splits["train"] = Dataset.from_list([*rows, rows[3]])
    splits["test"] = Dataset.from_list([rows[7], *SPLIT_ROWS["test"], other, SPLIT_ROWS["validation"][0]])
    records = load_records(splits)
    assert records["train"].to_list() == clean(rows)
    assert records["validation"].to_list() == clean(SPLIT_ROWS["validation"])
    assert records["test"].to_list() == clean([*SPLIT_ROWS["test"], other])
    for dropped in ("dropping 1 of 21 records of train", "dropping 2 of 6 records of test"):
        assert f"{dropped} that repeat an earlier one, of train before the others" in caplog.text
    # Those of the fixture's held-out splits, and the one more
    assert "8 records of validation and test are of pairs of user and item that train has with another" in caplog.text
    assert load_records({**splits, "test": Dataset.from_list(rows[:2])})["test"].to_list() == clean(rows[:2])
    assert "keeping all 2 of 2 records of test that repeat an earlier one" in caplog.text


def test_repeated_records_do_not_leak_by_a_random_split(caplog):
    records = load_records(Dataset.from_list(make_rows() * 3))
    texts = [text for part in records.values() for text in part["explanation"]]
    assert len(texts) == len(set(texts)) == 40
    assert "dropping 80 of 120 records of train" in caplog.text


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
@pytest.mark.parametrize("number", [int, float])
def test_ids_that_are_numbers_become_strings(tmp_path, suffix, number):
    rows = [{**row, "user": number(row["user"][1:]), "item": number(row["item"][1:])} for row in make_rows()]
    records = load_records(write(tmp_path / f"all{suffix}", rows))
    assert set(records["train"]["user"]) == {"0", "1", "2", "3"}
    assert set(records["train"]["item"]) == {"0", "1", "2", "3", "4"}


def test_ids_of_both_types_are_the_same(tmp_path):
    rows = make_rows()
    for number, row in enumerate(rows):
        row["user"] = int(row["user"][1:]) if number % 8 < 4 else row["user"][1:]
    records = load_records(write(tmp_path / "all.jsonl", rows))
    assert set(records["train"]["user"]) == {"0", "1", "2", "3"}


def test_csv_keeps_ids_that_only_look_like_decimals(tmp_path):
    rows = [{**row, "user": "1.0" if number % 2 else "v1"} for number, row in enumerate(make_rows())]
    assert set(load_records(write(tmp_path / "all.csv", rows))["train"]["user"]) == {"1.0", "v1"}


@pytest.mark.parametrize("convert", [int, float, str, lambda rating: f" {rating}.0 "])
def test_ratings_may_be_numeric_strings(tmp_path, convert):
    rows = [{**row, "rating": convert(row["rating"])} for row in make_rows()]
    records = load_records(write(tmp_path / "all.jsonl", rows))
    assert rows_of(records) == rows_of(load_records(Dataset.from_list(make_rows())))


def test_rating_levels_of_another_scale():
    rows = [{**row, "rating": row["rating"] / 10} for row in make_rows()]
    table = pa.Table.from_pylist(rows)
    table = table.set_column(table.column_names.index("rating"), "rating", table["rating"].cast(pa.float32()))
    records = load_records(Dataset(table), rating_levels=(0.5, 0.1, 0.2, 0.4, 0.3))
    # float32 cannot hold 0.1: the level itself is stored.
    assert set(records["train"]["rating"]) == {0.1, 0.2, 0.3, 0.4, 0.5}


def test_json_lines_keep_line_separators_blank_lines_and_byte_order_marks(tmp_path):
    rows = make_rows()
    rows[0]["explanation"] = "first\u2028second\x85third"
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    path = tmp_path / "train.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n\r\n".join(lines).encode())
    write(tmp_path / "test.jsonl", SPLIT_ROWS["test"])
    write(tmp_path / "dev.jsonl", SPLIT_ROWS["validation"])
    assert load_records(tmp_path)["train"].to_list() == clean(rows)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-8-sig"])
@pytest.mark.parametrize("suffix", [".csv", ".json", ".jsonl"])
def test_other_unicode(encoding, suffix, tmp_path):
    rows = make_rows()
    rows[0]["explanation"] = "tr\xe8s bon \u2028 \U0001f3b8"
    path = write(tmp_path / f"all{suffix}", rows)
    expected = rows_of(load_records(path))
    path.write_bytes(path.read_bytes().decode().encode(encoding))
    assert rows_of(load_records(path)) == expected


def test_csv_keeps_commas_quotes_and_line_breaks(tmp_path):
    rows = make_rows()
    rows[0]["explanation"] = 'He said "loud, clear"\nand left.'
    folder = folder_of(tmp_path, ".csv")
    pd.DataFrame(rows).to_csv(folder / "train.csv", index=False, encoding="utf-8-sig")
    assert load_records(folder)["train"].to_list() == clean(rows)


def test_selected_and_formatted_dataset_is_read_as_it_looks():
    dataset = Dataset.from_list(make_rows(80)).select(range(79, 39, -1)).with_format("numpy")
    plain = Dataset.from_list(make_rows(80)[:39:-1])
    assert rows_of(load_records(dataset)) == rows_of(load_records(plain))


def test_unknown_held_out_can_be_dropped(caplog):
    source = {split: Dataset.from_list(rows) for split, rows in SPLIT_ROWS.items()}
    strange = [{**make_rows(1)[0], "user": "stranger"}, {**make_rows(1)[0], "item": "thing"}]
    source["test"] = Dataset.from_list(strange + SPLIT_ROWS["test"])
    with caplog.at_level(logging.WARNING):
        records = load_records(source, unknown_held_out="drop")
    assert rows_of(records) == EXPECTED
    message = "2 of 5 records of test have 1 user ('stranger'), 1 item ('thing') that train doesn't have"
    assert message in caplog.text


def test_contradicting_ratings_warn(caplog):
    train = make_rows(20)
    source = {
        "train": Dataset.from_list(train),
        # The same rating again is no contradiction, nor is one within a split.
        "validation": Dataset.from_list([train[0]]),
        "test": Dataset.from_list([{**train[1], "rating": 5}, {**train[2], "rating": 1}]),
    }
    with caplog.at_level(logging.WARNING):
        load_records(source)
    message = "2 pairs of user and item (4 records) have different ratings in different splits, such as user 'u1'"
    assert message in caplog.text


def test_no_warning_without_contradictions(caplog):
    *train, validation, test = make_rows(20)
    train.append({**train[3], "rating": 1})
    rows = {"train": train, "validation": [validation], "test": [test]}
    source = {name: Dataset.from_list(rows[name]) for name in SPLIT_ROWS}
    with caplog.at_level(logging.WARNING):
        load_records(source)
    assert caplog.text == ""


def test_iterable_dataset_is_refused():
    rows = IterableDataset.from_generator(lambda: iter(make_rows()))
    with pytest.raises(DataError, match=r"dict of Datasets, but got .* IterableDataset\. Make it a Dataset"):
        load_records(rows)
    with pytest.raises(DataError, match=r"split 'train' of the dict: expected a Dataset, but got a value of type Iter"):
        load_records({"train": rows})


@pytest.mark.skipif(not MUSICAL_INSTRUMENTS.is_dir(), reason="the real data is not on this machine")
def test_musical_instruments():
    records = load_records(MUSICAL_INSTRUMENTS)
    assert [len(part) for part in records.values()] == [6573, 821, 821]
    with (MUSICAL_INSTRUMENTS / "test.jsonl").open(encoding="utf-8") as file:
        lines = [json.loads(line) for line in file]
    assert records["test"].to_list() == clean([{name: line[name] for name in COLUMNS} for line in lines])
