"""Every problem of records raises a DataError that says what was expected, found and what to do."""

import json
import logging
import re
from datetime import datetime
from decimal import Decimal

import numpy as np
import pandas as pd
import pytest
from datasets import Dataset, DatasetDict

from gavamoe_hf.data import DataError, load_records
from gavamoe_hf.data.errors import show_names, show_rows, show_value


def make_rows(count=40):
    return [
        {
            "user": f"u{number % 4}",
            "item": f"i{number % 5}",
            "rating": number % 5 + 1,
            "feature": "sound",
            "explanation": f"sentence {number}",
        }
        for number in range(count)
    ]


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def with_values(column, **values):
    """Rows in which row_7="x" puts x in the seventh row."""
    rows = make_rows()
    for name, value in values.items():
        rows[int(name.removeprefix("row_")) - 1][column] = value
    return rows


BAD_VALUES = [
    (
        "rating",
        6,
        r"expected a rating among 1, 2, 3, 4, 5, but got 6 \(not on the scale\) in line 7\. Correct",
    ),
    ("rating", 4.5, r"but got 4\.5 \(not on the scale\) in line 7\."),
    ("rating", "4.5", r"but got '4\.5' \(not on the scale\) in line 7\."),
    ("rating", "good", r"but got 'good' \(not a number\) in line 7\."),
    ("rating", True, r"but got True \(not a number\) in line 7\."),
    ("rating", [5], r"but got \[5\] \(not a number\) in line 7\."),
    ("rating", None, r"but got nothing \(null\) in line 7\."),
    ("rating", float("nan"), r"but got nan in line 7\."),
    ("rating", float("inf"), r"but got inf in line 7\."),
    ("rating", "-inf", r"but got '-inf' in line 7\."),
    (
        "user",
        "",
        r"expected an id \(a non-empty string or a whole number\), but got '' in line 7\. Give these",
    ),
    ("user", None, r"but got nothing \(null\) in line 7\."),
    ("item", "  ", r"but got '  ' in line 7\."),
    ("item", 2.5, r"but got 2\.5 in line 7\."),
    ("item", True, r"but got True in line 7\."),
    ("item", ["a"], r"but got \['a'\] in line 7\."),
    (
        "explanation",
        "",
        r"expected an explanation \(a string that is not empty\), but got '' in line 7\. Write",
    ),
    ("explanation", " \n", r"but got ' \\n' in line 7\."),
    ("explanation", None, r"but got nothing \(null\) in line 7\."),
    ("explanation", 3, r"but got 3 in line 7\."),
    ("explanation", "half \ud800", r"expected text that UTF-8 can hold, but got 'half \\ud800' in line 7\."),
    ("feature", 3, r"expected a word, a list of words such as .* or nothing, but got 3 in line 7\. Correct"),
    ("feature", [3], r"but got \[3\] in line 7\."),
    ("feature", {"a": 1}, r"but got \{'a': 1\} in line 7\."),
    ("feature", ["\ud800"], r"expected text that UTF-8 can hold, but got \['\\ud800'\] in line 7\."),
]


@pytest.mark.parametrize("column, value, message", BAD_VALUES)
def test_bad_value_in_json_lines(tmp_path, column, value, message):
    path = write_lines(tmp_path / "all.jsonl", with_values(column, row_7=value))
    with pytest.raises(DataError, match=rf"all\.jsonl: column '{column}': .*{message}"):
        load_records(path)


@pytest.mark.parametrize(
    "column, value, message",
    [
        ("rating", "", r"but got '' \(not a number\) in row 7\."),
        ("rating", "nan", r"but got 'nan' \(not a number\) in row 7\."),
        ("user", "", r"but got '' in row 7\."),
        ("explanation", " ", r"but got ' ' in row 7\."),
        ("feature", "[sound", None),
        ("feature", "[sound]", r"but got '\[sound\]' in row 7\."),
        ("feature", "[1]", r"but got '\[1\]' in row 7\."),
    ],
)
def test_bad_value_in_csv(tmp_path, column, value, message):
    # Quoted line breaks before it: the data row is what counts, not the line.
    rows = with_values(column, row_7=value)
    rows[2]["feature"] = '"two\nlines"'
    header = ",".join(rows[0])
    lines = [",".join(str(field) for field in row.values()) for row in rows]
    path = tmp_path / "all.csv"
    path.write_text("\n".join([header, *lines]), encoding="utf-8")
    if message is None:
        assert "[sound" in [words[0] for part in load_records(path).values() for words in part["feature"]]
        return
    with pytest.raises(DataError, match=rf"all\.csv: column '{column}': .*{message}"):
        load_records(path)


def test_rows_that_share_a_problem_are_counted(tmp_path):
    rows = with_values("rating", row_2=6, row_5=None, row_9=0)
    with pytest.raises(
        DataError, match=r"6 .* in line 2, nothing \(null\) in line 5, 0 .* in line 9 \(3 lines in all\)"
    ):
        load_records(write_lines(tmp_path / "all.jsonl", rows))
    rows = [{**row, "rating": 9.5} for row in rows]
    with pytest.raises(DataError, match=r"in line 1, .* in line 2, .* in line 3 \(the first 3 of 40 lines\)\. "):
        load_records(write_lines(tmp_path / "all.jsonl", rows))


def test_line_numbers_count_blank_lines(tmp_path):
    path = write_lines(tmp_path / "all.jsonl", with_values("rating", row_3=6))
    path.write_text("\n\n" + path.read_text())
    with pytest.raises(DataError, match=r"in line 5\."):
        load_records(path)


def test_rows_of_a_json_array_are_counted(tmp_path):
    path = tmp_path / "all.json"
    path.write_text(json.dumps(with_values("rating", row_3=6), indent=1))
    with pytest.raises(DataError, match=r"in row 3\."):
        load_records(path)


def test_bad_value_in_a_dataset_names_the_split_and_the_mapped_column():
    good = Dataset.from_list(make_rows())
    bad = Dataset.from_list(with_values("rating", row_7=6))
    with pytest.raises(DataError, match=r"^the Dataset: column 'rating': .* in row 7\."):
        load_records(bad)
    source = DatasetDict({"train": good, "validation": bad, "test": good}).rename_column("rating", "stars")
    with pytest.raises(DataError, match=r"split 'validation' of the DatasetDict: column 'stars': .* in row 7\."):
        load_records(source, column_mapping={"rating": "stars"})


def test_long_values_are_cut(tmp_path):
    rows = with_values("rating", row_7="x" * 500)
    with pytest.raises(DataError, match=r"'x{56}\.\.\. \(not a number\)"):
        load_records(write_lines(tmp_path / "all.jsonl", rows))


@pytest.mark.parametrize(
    "theirs, message",
    [
        (
            {"user": "reviewerID"},
            r"columns 'user', but .*'reviewerID'.*column_mapping=\{'user': 'reviewerID'\}\?",
        ),
        (
            {"user": "User", "rating": "overall"},
            r"'user', 'rating', .*\{'user': 'User', 'rating': 'overall'\}\?",
        ),
        ({"explanation": "explanatoin"}, r"\{'explanation': 'explanatoin'\}\?"),
        (
            {"item": "zzz"},
            r"columns 'item', .*Rename the columns, or say which they are with column_mapping=",
        ),
    ],
)
@pytest.mark.parametrize("form", ["lines", "csv", "parquet", "dataset"])
def test_missing_columns_suggest_the_closest(tmp_path, form, theirs, message):
    dataset = Dataset.from_list(make_rows()).rename_columns(theirs)
    path = tmp_path / f"all.{form}"
    if form == "lines":
        path = write_lines(path.with_suffix(".jsonl"), dataset)
    elif form != "dataset":
        getattr(dataset, f"to_{form}")(path)
    with pytest.raises(DataError, match=message):
        load_records(dataset if form == "dataset" else path)


def test_mapped_column_that_is_missing():
    dataset = Dataset.from_list(make_rows()).rename_columns({"user": "reviewerID", "feature": "aspect"})
    message = r"'reviewer_id \(for user\)', .*Did you mean column_mapping=\{'user': 'reviewerID'\}\?"
    with pytest.raises(DataError, match=message):
        load_records(dataset, column_mapping={"user": "reviewer_id"})
    # An optional column that was asked for must exist.
    with pytest.raises(DataError, match=r"'words \(for feature\)'.*\{'feature': 'aspect'\}"):
        load_records(dataset, column_mapping={"user": "reviewerID", "feature": "words"})
    with pytest.raises(DataError, match=r"'fold \(for split\)'"):
        load_records(dataset, column_mapping={"user": "reviewerID", "split": "fold"})


@pytest.mark.parametrize(
    "mapping, message",
    [
        (
            {"reviewerID": "user"},
            r"keys among user, .*, but got 'reviewerID'.*Did you swap keys and values\?",
        ),
        ({"stars": "x"}, r"keys among user, item, rating, feature, explanation, item_title, split, but got 'stars'\."),
        ({"stars": []}, r"keys among user, .*, but got 'stars'\."),
        ({"user": 3}, r"one column name for each key, but got 3 for 'user'\. Pass a string"),
        ({"user": "item"}, r"a different column for each name, but got 'item' more than once"),
    ],
)
def test_bad_column_mapping(mapping, message):
    with pytest.raises(DataError, match=message):
        load_records(Dataset.from_list(make_rows()), column_mapping=mapping)


@pytest.mark.parametrize("levels", [(), (3,), (1, float("nan")), (1, 10**400), ("a", "b"), 5])
def test_bad_rating_levels(levels):
    with pytest.raises(DataError, match=r"expected rating_levels with at least two .*Pass \(1, 2, 3, 4, 5\)"):
        load_records(Dataset.from_list(make_rows()), rating_levels=levels)


def test_bad_options():
    dataset = Dataset.from_list(make_rows())
    with pytest.raises(DataError, match=r"unknown_held_out 'error' or 'drop', but got 'ignore'\. Pass 'error'"):
        load_records(dataset, unknown_held_out="ignore")
    with pytest.raises(DataError, match=r"expected a seed that is a whole number .* but got -1\. Pass 0"):
        load_records(dataset, split_seed=-1)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_empty_file(tmp_path, suffix):
    path = tmp_path / f"train{suffix}"
    path.touch()
    with pytest.raises(DataError, match=rf"train\{suffix}: expected records, but the file is empty\. Write it"):
        load_records(path)


@pytest.mark.parametrize(
    "name, text",
    [("a.jsonl", " \n\n"), ("a.json", "[]"), ("a.csv", "user,item,rating,explanation\n"), ("a.csv", "\n\n")],
)
def test_no_rows(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(DataError, match=rf"{name}: expected at least one record, but got no rows\. Check how"):
        load_records(path)


def test_no_rows_in_a_dataset_or_parquet_file(tmp_path):
    empty = Dataset.from_list(make_rows()).select([])
    with pytest.raises(DataError, match=r"the Dataset: expected at least one record, but got no rows"):
        load_records(empty)
    with pytest.raises(DataError, match=r"split 'test' of the dict: expected at least one record"):
        load_records({"train": Dataset.from_list(make_rows()), "test": empty})
    empty.to_parquet(tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet: expected at least one record"):
        load_records(tmp_path / "a.parquet")


def test_broken_json_lines(tmp_path):
    path = write_lines(tmp_path / "all.jsonl", make_rows())
    lines = path.read_text().splitlines()
    lines[3] = lines[3][:-5]
    lines[5] = "[1, 2]"
    lines[8] = "7"
    path.write_text("\n".join(lines))
    message = (
        r"all\.jsonl: expected one JSON object a line, but got broken JSON \(.*\) in line 4, "
        r"\[1, 2\] in line 6, 7 in line 9 \(3 lines in all\)\. Correct these lines"
    )
    with pytest.raises(DataError, match=message):
        load_records(path)


@pytest.mark.parametrize(
    "text, message",
    [
        ('[{"user": 1},', r"a JSON array of objects, but got broken JSON \(.*\)\. Correct it"),
        ("[1, 2]", r"a JSON array of objects, but got 1 in row 1, 2 in row 2 \(2 rows in all\)\."),
        (
            '{\n"user": [\n1]\n}',
            r"one JSON object a line, but got broken JSON \(.*\) in line 1, .* \(the first 3 of 4 l",
        ),
    ],
)
def test_broken_json_file(tmp_path, text, message):
    path = tmp_path / "all.json"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        load_records(path)


@pytest.mark.parametrize("name", ["all.jsonl", "all.json", "all.csv"])
def test_wrong_encoding(tmp_path, name):
    rows = with_values("explanation", row_7="très bon")
    path = tmp_path / name
    if name == "all.csv":
        text = "user,item,rating,explanation\n" + "".join(
            f"{row['user']},{row['item']},{row['rating']},{row['explanation']}\n" for row in rows
        )
    elif name == "all.json":
        text = "[" + ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "]"
    else:
        text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_bytes(text.encode("latin-1"))
    line = 8 if name == "all.csv" else 7
    with pytest.raises(DataError, match=rf"expected UTF-8, but got the byte 0xe8 in line {line}\. Write the file"):
        load_records(path)


def test_the_advice_for_another_encoding_gives_a_file_that_is_read(tmp_path):
    path, new = tmp_path / "all.csv", tmp_path / "new.csv"
    text = "a \u201cgood\u201d one \u2013 tr\xe8s"
    pd.DataFrame(with_values("explanation", row_7=text)).to_csv(path, index=False, encoding="cp1252")
    with pytest.raises(DataError, match="expected UTF-8") as caught:
        load_records(path)
    command = re.search(r"iconv -f (\S+) -t UTF-8", str(caught.value))
    new.write_text(path.read_bytes().decode(command[1]), encoding="utf-8")
    assert any(text in part["explanation"] for part in load_records(new).values())


def test_utf_16_that_was_cut(tmp_path):
    path = tmp_path / "all.csv"
    pd.DataFrame(make_rows()).to_csv(path, index=False, encoding="utf-16")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"expected UTF-8, or UTF-16 as the file begins, but got truncated data at "):
        load_records(path)


STEAM_IDS = [76561197970982479, 76561197970982471, 76561197970982473, 76561197960265728]


@pytest.mark.parametrize("kind", ["dataset", "parquet", "jsonl", "csv", "csv of other digits", "float32"])
def test_ids_that_lost_digits_as_floats(kind, tmp_path):
    rows = [{**row, "user": float(STEAM_IDS[number % 4])} for number, row in enumerate(make_rows())]
    expected = (
        r"column 'user': expected an id .* of 40 (rows|lines)\)\. Whole numbers from 9,007,199,254,740,992 on lose"
    )
    table = pd.DataFrame(rows)
    path = tmp_path / f"all.{kind[:3]}"
    if kind == "dataset":
        path = Dataset.from_pandas(table)
    elif kind == "parquet":
        table.to_parquet(path := tmp_path / "all.parquet")
    elif kind == "jsonl":
        path = write_lines(tmp_path / "all.jsonl", rows)
    elif kind == "csv":
        # pandas writes 7.656119797098248e+16
        table.to_csv(path, index=False)
    elif kind == "float32":
        # 2**24 + 1 is the first whole number that such a column cannot hold
        path = Dataset.from_pandas(table.assign(user=np.float32(2**24 + 1)))
        expected = r"but got 16777216\.0 in row 1, .* Whole numbers from 16,777,216 on lose digits"
    else:
        # As many digits as a float shows, but no more than it holds; and as a spreadsheet shows long numbers
        table["user"] = ["9007199254740993.0", "7.65612E+16"] * 20
        table.to_csv(path, index=False)
    with pytest.raises(DataError, match=expected):
        load_records(path)


def test_ids_that_floats_and_text_hold(tmp_path):
    rows = [{**row, "user": float(2**53 - 1 - number % 4)} for number, row in enumerate(make_rows())]
    expected = {str(2**53 - 1 - number) for number in range(4)}
    assert set(load_records(Dataset.from_list(rows))["train"]["user"]) == expected
    pd.DataFrame(rows).to_csv(tmp_path / "floats.csv", index=False)
    assert set(load_records(tmp_path / "floats.csv")["train"]["user"]) == expected
    text = pd.DataFrame(rows).assign(user=[STEAM_IDS[number % 4] for number in range(40)])
    text.to_csv(tmp_path / "text.csv", index=False)
    assert set(load_records(tmp_path / "text.csv")["train"]["user"]) == set(map(str, STEAM_IDS))


def test_an_id_that_is_the_word_for_none(caplog, tmp_path):
    rows = with_values("user", row_1="nan", row_5="nan")
    with caplog.at_level(logging.WARNING):
        records = load_records(Dataset.from_list(rows))
    assert "column 'user': 2 rows have an id such as 'nan', which is taken for a name" in caplog.text
    assert "nan" in records["train"]["user"]
    for missing in (float("nan"), None, "", " "):
        with pytest.raises(DataError, match=r"column 'user': expected an id .* in line 1\. Give these rows an id"):
            load_records(write_lines(tmp_path / "all.jsonl", with_values("user", row_1=missing)))


@pytest.mark.parametrize(
    "value", [True, b"a", ["a"], 1.5, Decimal(3), datetime(2018, 8, 25)], ids=lambda value: type(value).__name__
)
def test_ids_of_other_types(value):
    source = Dataset.from_pandas(pd.DataFrame(make_rows()).assign(user=[value] * 40))
    with pytest.raises(
        DataError, match=r"column 'user': expected an id .* of 40 rows\)\. Make the column one of text or"
    ):
        load_records(source)


def test_sources_of_pandas_and_numpy_are_refused_with_the_remedy():
    table = pd.DataFrame(make_rows())
    for source in (table, table["user"], table.to_numpy(), make_rows()):
        expected = (
            rf"got a value of type {type(source).__name__}\. Make it a Dataset first: Dataset.from_list, from_pandas"
        )
        with pytest.raises(DataError, match=expected):
            load_records(source)
        with pytest.raises(DataError, match=rf"'train' of the dict: .* type {type(source).__name__}\. .*from_pandas"):
            load_records({"train": source})


@pytest.mark.parametrize("kind", ["jsonl", "csv", "dataset"])
def test_another_scale_is_named_with_its_option(kind, tmp_path):
    rows = [{**row, "rating": row["rating"] - number % 2 / 2} for number, row in enumerate(make_rows())]
    source = Dataset.from_list(rows)
    if kind == "csv":
        pd.DataFrame(rows).to_csv(source := tmp_path / "all.csv", index=False)
    elif kind == "jsonl":
        source = write_lines(tmp_path / "all.jsonl", rows)
    with pytest.raises(DataError, match=r"50% of the ratings are 0\.5, 1\.5, .*: if that is the scale, pass") as caught:
        load_records(source)
    levels = re.search(r"\(--rating_levels (.*?)\)", str(caught.value))[1].split()
    records = load_records(source, rating_levels=list(map(float, levels)))
    assert sum(len(part) for part in records.values()) == 40


def test_csv_with_a_wrong_number_of_fields(tmp_path):
    path = tmp_path / "all.csv"
    path.write_text("user,item,rating,explanation\na,b,5,fine\n\na,b,5,fine, really\na,b\n")
    message = r"expected 4 fields in every row,.* but got 5 fields in row 2, 2 fields in row 3 \(2 rows"
    with pytest.raises(DataError, match=message):
        load_records(path)


@pytest.mark.parametrize(
    "text, message",
    [
        (
            'user,item,rating,explanation\na,b,5,"open\n',
            r"row 1 \(line 2\) is broken: .*Check its quotation marks",
        ),
        ("user,item,rating,explanation,user\na,b,5,x,y\n", r"each column once in the header, but got 'user'"),
        (
            "user;item;rating;explanation\na;b;5;x\n",
            r"expected commas between the fields, but got the header",
        ),
    ],
)
def test_broken_csv(tmp_path, text, message):
    path = tmp_path / "all.csv"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        load_records(path)


def test_broken_parquet(tmp_path):
    path = tmp_path / "all.parquet"
    path.write_bytes(b"not parquet at all")
    with pytest.raises(DataError, match=r"all\.parquet: expected a Parquet file, but reading it failed with Arrow"):
        load_records(path)


def test_broken_saved_dataset(tmp_path):
    (tmp_path / "dataset_dict.json").write_text("{")
    with pytest.raises(DataError, match=r"expected a data set written by save_to_disk, but .*Save it again"):
        load_records(tmp_path)


def test_unknown_suffix(tmp_path):
    path = tmp_path / "all.jsonl.gz"
    path.write_bytes(b"\x1f\x8b")
    with pytest.raises(DataError, match=r"suffixes \.jsonl, \.json, \.csv, \.parquet, but got '\.gz'\. Convert"):
        load_records(path)


@pytest.mark.parametrize("as_type", [str, lambda path: path])
def test_missing_path(tmp_path, as_type):
    with pytest.raises(DataError, match=r"existing file or folder, but found nothing at .*gone\.jsonl\. Check the"):
        load_records(as_type(tmp_path / "gone.jsonl"))


@pytest.mark.parametrize("name", ["x" * 5000 + ".csv", "a\x00.csv", "~nobody-of-that-name/x.csv"])
def test_path_that_cannot_be(name):
    with pytest.raises(DataError, match="existing file or folder, but found nothing at"):
        load_records(name)


def test_source_of_another_type():
    with pytest.raises(DataError, match=r"expected a path, .* but got a value of type list\. Make it a Dataset"):
        load_records(make_rows())
    with pytest.raises(
        DataError, match=r"split 'train' of the dict: expected a Dataset, but got a value of type list\. Make"
    ):
        load_records({"train": make_rows()})


def test_folder_without_train(tmp_path):
    write_lines(tmp_path / "records.jsonl", make_rows())
    with pytest.raises(DataError, match=r"expected a file train .*, but the folder's files are 'records\.jsonl'\."):
        load_records(tmp_path)


def test_two_files_or_data_sets_for_one_split(tmp_path):
    for name in ("train.jsonl", "val.jsonl", "valid.jsonl"):
        write_lines(tmp_path / name, make_rows())
    with pytest.raises(DataError, match=r"one file for the split 'validation', but got 'val\.jsonl' and 'valid\.js"):
        load_records(tmp_path)
    dataset = Dataset.from_list(make_rows())
    with pytest.raises(DataError, match=r"one data set for the split 'validation', but got 'val' and 'dev'"):
        load_records({"train": dataset, "val": dataset, "dev": dataset})


def test_dict_without_train():
    with pytest.raises(DataError, match=r"the dict: expected a split 'train', but got 'data'\. Pass"):
        load_records({"data": Dataset.from_list(make_rows())})


def test_split_column_with_unknown_values(tmp_path):
    rows = [{**row, "split": "train"} for row in make_rows()]
    rows[4]["split"] = "holdout"
    rows[6]["split"] = None
    message = r"column 'split': expected one of train, .* but got 'holdout' in line 5, nothing \(null\) in line 7"
    with pytest.raises(DataError, match=message):
        load_records(write_lines(tmp_path / "all.jsonl", rows))
    rows = [{**row, "split": "test"} for row in rows]
    with pytest.raises(DataError, match=r"expected rows of the split 'train', but got only 'test'\. Name"):
        load_records(Dataset.from_list(rows))


def test_held_out_ids_that_train_does_not_know():
    train = Dataset.from_list(make_rows())
    strangers = [{**make_rows(1)[0], "user": f"stranger{number}"} for number in range(5)]
    source = {"train": train, "validation": train, "test": Dataset.from_list(make_rows(42)[40:] + strangers)}
    message = (
        r"5 of 7 records of test have 5 users \('stranger0', 'stranger1', 'stranger2' and 2 more\) that "
        r"train doesn't have\. Pass unknown_held_out='drop'"
    )
    with pytest.raises(DataError, match=message):
        load_records(source)
    source["test"] = Dataset.from_list(strangers)
    with pytest.raises(DataError, match=r"at least one record of test .*='drop' leaves none\. Check"):
        load_records(source, unknown_held_out="drop")


def test_train_that_no_split_can_be_cut_from():
    rows = [{**make_rows(1)[0], "user": f"u{number}", "item": f"i{number}"} for number in range(9)]
    with pytest.raises(DataError, match=r"validation and one for test, but of 9 records only 0 can be held out"):
        load_records(Dataset.from_list(rows))
    source = {"train": Dataset.from_list(rows), "test": Dataset.from_list(rows[:1])}
    with pytest.raises(DataError, match=r"a split 'validation', or a train split .*Pass a split 'validation'"):
        load_records(source)


def test_wording():
    assert show_value(None) == "nothing (null)"
    assert show_rows([(3, "6.0")], 1) == "6.0 in row 3"
    assert show_rows([(3, "6.0"), (9, "nan")], 2, "line") == "6.0 in line 3, nan in line 9 (2 lines in all)"
    assert show_names([]) == "none"
    assert show_names(["a", "b", "c"], limit=2) == "'a', 'b' and 1 more"
