"""Raw reviews of every source: what is read of them, and what a line that holds none is reported as."""

import csv
import gzip
import json
import random
from datetime import UTC, datetime

import pytest

from gavamoe_hf.data import DataError
from gavamoe_hf.prepare import sources
from gavamoe_hf.prepare.sources import BadLine, Review, ReviewReader, _parse, _review, _seconds

AMAZON_2014 = {
    "reviewerID": "A1",
    "asin": "0001",
    "reviewerName": "J",
    "helpful": [0, 0],
    "reviewText": "Don't wait.",
    "overall": 5.0,
    "summary": "good",
    "unixReviewTime": 1393545600,
}
AMAZON_2018 = {
    "overall": 4.0,
    "verified": True,
    "vote": "3",
    "reviewerID": "A1",
    "asin": "B1",
    "reviewText": "Fine.",
    "unixReviewTime": 1514764800,
}
AMAZON_2023 = {
    "rating": 3.0,
    "title": "So so",
    "text": "It is all right.",
    "asin": "B2-red",
    "parent_asin": "B2",
    "user_id": "AE2",
    "timestamp": 1588687728923,
    "verified_purchase": True,
}
YELP = {
    "review_id": "r",
    "user_id": "u",
    "business_id": "b",
    "stars": 2.0,
    "useful": 0,
    "text": "Slow\n\nservice.",
    "date": "2018-07-07 22:09:11",
}
TRIPADVISOR = {
    "hotel_url": "Hotel_Review-g1-d2-Reviews-X.html",
    "author": "someone",
    "date": "2010-02-01T00:00:00",
    "rating": 4.0,
    "title": "Great",
    "text": "Great beds.",
    "property_dict": {"rooms": 3.0},
}


def write_lines(path, rows, dump=json.dumps):
    path.write_text("".join(dump(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("row", "format", "expected"),
    [
        (AMAZON_2014, "amazon", Review("A1", "0001", 5.0, "Don't wait.", 1393545600)),
        (AMAZON_2018, "amazon", Review("A1", "B1", 4.0, "Fine.", 1514764800)),
        # Milliseconds, and the product without its variants
        (AMAZON_2023, "amazon", Review("AE2", "B2", 3.0, "It is all right.", 1588687728)),
        # 17,719 days after 1970 and 22:09:11
        (YELP, "yelp", Review("u", "b", 2.0, "Slow\n\nservice.", 17719 * 86400 + 22 * 3600 + 9 * 60 + 11)),
        (TRIPADVISOR, "tripadvisor", Review("someone", TRIPADVISOR["hotel_url"], 4.0, "Great beds.", 14641 * 86400)),
        (
            {"user": 7, "item": "i", "rating": "1", "text": "No.", "timestamp": None},
            "jsonl",
            Review("7", "i", 1.0, "No.", None),
        ),
    ],
)
def test_formats(row, format, expected, tmp_path):
    for name in (format, "auto"):
        assert list(ReviewReader([write_lines(tmp_path / "reviews.json", [row])], name)) == [expected]


def test_python_literals_and_gzip(tmp_path):
    # As Amazon's of 2014 are published; by its name, the file would not be compressed
    path = tmp_path / "reviews.json"
    path.write_bytes(gzip.compress("".join(repr(row) + "\n" for row in (AMAZON_2014, AMAZON_2014)).encode()))
    assert list(ReviewReader([str(path)])) == [Review("A1", "0001", 5.0, "Don't wait.", 1393545600)] * 2


def test_literals_run_nothing(tmp_path):
    line = "{'reviewerID': __import__('os').getcwd(), 'asin': 'b', 'overall': 5.0, 'reviewText': 'x'}"
    path = write_lines(tmp_path / "reviews.json", [json.dumps(AMAZON_2014), line], dump=str)
    assert list(ReviewReader([path]))[1] == BadLine("reviews.json", 2, "broken JSON")


@pytest.mark.parametrize(("name", "separator"), [("reviews.csv", ","), ("reviews.tsv.gz", "\t")])
def test_tables(name, separator, tmp_path):
    path = tmp_path / name
    plain = tmp_path / "plain"
    with plain.open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.writer(file, delimiter=separator)
        writer.writerows([["customer", "item", "rating", "text"], ["u", "i", "4", 'two\nlines, "quoted"']])
    path.write_bytes(gzip.compress(plain.read_bytes()) if name.endswith(".gz") else plain.read_bytes())
    mapping = {"user": "customer"}
    assert list(ReviewReader([str(path)], "auto", mapping)) == [Review("u", "i", 4.0, 'two\nlines, "quoted"', None)]
    # Whatever its name, where the format says so
    if separator == ",":
        assert len(list(ReviewReader([str(plain)], "csv", mapping))) == 1


def test_several_files_are_read_as_one_and_as_often_as_asked(tmp_path):
    paths = [write_lines(tmp_path / "a.json", [AMAZON_2018]), write_lines(tmp_path / "b.json", [AMAZON_2023])]
    reader = ReviewReader(paths)
    assert [review.item for review in reader] == [review.item for review in reader] == ["B1", "B2"]


# 25 August 2018, 20:55:02 in UTC
MOMENT = 17768 * 86400 + 20 * 3600 + 55 * 60 + 2
DAY = 17768 * 86400


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("Sat Aug 25 13:55:02 -0700 2018", MOMENT),
        ("Sat, 25 Aug 2018 13:55:02 -0700", MOMENT),
        ("Sat, 25 Aug 2018 20:55:02 GMT", MOMENT),
        ("25 Aug 2018 13:55:02 -0700", MOMENT),
        ("2018-08-25T13:55:02-07:00", MOMENT),
        ("2018-08-25 20:55:02", MOMENT),
        ("08/25/2018 8:55:02 PM", MOMENT),
        ("25.08.2018 20:55:02", MOMENT),
        ("08/25/2018, 20:55", MOMENT - 2),
        ("8/25/18", DAY),
        ("2018/08/25", DAY),
        ("August 25, 2018", DAY),
        ("25 August 2018", DAY),
        ("08 25, 2018", DAY),
        (MOMENT, MOMENT),
        (MOMENT * 1000, MOMENT),
        (MOMENT * 1_000_000, MOMENT),
        (str(MOMENT * 10**9), MOMENT),
        # The year 1 in ms and in words, before 1970, after 2100, and no time at all
        *((value, None) for value in (-62135596799000, "0001-01-01", -5, 0, 4_200_000_000, "2150-01-01", "9" * 400)),
        *((value, None) for value in ("last week", "25/25/2018", "30.02.2018", "1e999", [], None)),
    ],
)
def test_times(value, expected):
    assert _seconds(value) == expected


@pytest.mark.parametrize(
    ("dates", "expected"),
    [
        (["01/02/2018", "25/08/2018"], ["2018-02-01", "2018-08-25"]),
        (["01/02/2018", "08/25/2018"], ["2018-01-02", "2018-08-25"]),
        (["01/02/2018", "02/01/2018"], ["2018-01-02", "2018-02-01"]),
        (["01.02.2018", "02.01.2018"], ["2018-02-01", "2018-01-02"]),
    ],
)
def test_day_or_month_first_is_decided_over_the_column(dates, expected, tmp_path, caplog):
    rows = [
        {"user": "u", "item": "i", "rating": 4, "text": "x", "timestamp": date} for date in [*dates[:1] * 200, *dates]
    ]
    found = [review.timestamp for review in ReviewReader([write_lines(tmp_path / "reviews.jsonl", rows)])]
    assert [str(datetime.fromtimestamp(seconds, UTC).date()) for seconds in found[-2:]] == expected
    assert found[0] == found[-2]
    assert ("can be read with the day or the month first" in caplog.text) == ("25" not in dates[1])


def test_bad_lines_are_named_and_the_rest_is_read(tmp_path):
    good = json.dumps(AMAZON_2018).encode()
    lines = [
        good,
        b'{"reviewerID": "A1", "asin"',
        b"[1, 2]",
        b"\xff\xfe",
        json.dumps({**AMAZON_2018, "reviewerID": " "}).encode(),
        json.dumps({**AMAZON_2018, "asin": None}).encode(),
        json.dumps({**AMAZON_2018, "overall": "many"}).encode(),
        json.dumps({**AMAZON_2018, "overall": True}).encode(),
        json.dumps({**AMAZON_2018, "reviewText": "half \ud83d"}).encode(),
        b"",
        json.dumps({**AMAZON_2018, "reviewText": None}).encode(),
    ]
    path = tmp_path / "reviews.json"
    path.write_bytes(b"\n".join(lines))
    *found, last = ReviewReader([str(path)])
    assert found[0].user == "A1"
    assert [(line.number, line.problem) for line in found[1:]] == [
        (2, "broken JSON"),
        (3, "no object but a list"),
        (4, "not UTF-8"),
        (5, "without a user"),
        (6, "without an item"),
        (7, "without a rating"),
        (8, "without a rating"),
        (9, "not UTF-8"),
    ]
    # After an empty line, which is nothing at all: no text is no mistake
    assert last.text == ""


def test_bad_rows_of_tables(tmp_path):
    path = tmp_path / "reviews.csv"
    path.write_bytes(b"user,item,rating,text\nu,i,5,good\nu,i,5\nu,i,5,\xff\nu,i,4,fine\n")
    found = list(ReviewReader([str(path)]))
    assert [entry.problem if isinstance(entry, BadLine) else entry.rating for entry in found] == [
        5.0,
        "a row of 3 fields instead of 4",
        "not UTF-8",
        4.0,
    ]


def test_ids_of_tables_that_were_floats(tmp_path):
    path = tmp_path / "reviews.csv"
    path.write_bytes("user,item,rating,text\n3.0,7,4,a\n3,7.0,4,b\n7.65612E+16,7,4,c\n".encode("utf-16"))
    assert list(ReviewReader([str(path)])) == [
        Review("3", "7", 4.0, "a", None),
        Review("3", "7", 4.0, "b", None),
        BadLine("reviews.csv", 4, "a float as user id, 7.65612E+16, which loses digits"),
    ]


def test_missing_columns_are_named_with_a_guess(tmp_path):
    path = write_lines(tmp_path / "reviews.jsonl", [{"customer_id": "u", "item": "i", "score": 3, "body": "x"}])
    expected = r"expected the columns 'user', 'rating', 'text', but the columns are .*'body'\. .*" + (
        r"--column_mapping user=customer_id rating=score text=\.\.\."
    )
    with pytest.raises(DataError, match=expected):
        ReviewReader([path])
    # Not needed, but asked for
    path = write_lines(
        tmp_path / "generic.jsonl", [{"user": "u", "item": "i", "rating": 3, "text": "x", "date_added": "x"}]
    )
    with pytest.raises(DataError, match=r"expected the columns 'date', .* --column_mapping timestamp=\.\.\."):
        ReviewReader([path], "auto", {"timestamp": "date"})
    with pytest.raises(DataError, match=r"expected the columns 'business_id', 'stars'"):
        ReviewReader([write_lines(tmp_path / "amazon.json", [AMAZON_2023])], "yelp")
    with pytest.raises(DataError, match=r"expected names among user, item, .*but got 'colour'"):
        ReviewReader([path], "auto", {"colour": "x"})


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(DataError, match=r"nothing\.json: expected a readable file, but after line 0 got FileNotFound"):
        ReviewReader([str(tmp_path / "nothing.json")])
    empty = tmp_path / "empty.json"
    empty.write_bytes(b"")
    with pytest.raises(DataError, match="but the file is empty"):
        ReviewReader([str(empty)])
    with pytest.raises(DataError, match=r"but line 1 is no object but a list"):
        ReviewReader([write_lines(tmp_path / "array.json", [[AMAZON_2014]])])
    whole = gzip.compress(b"".join(json.dumps({**AMAZON_2018, "vote": n}).encode() + b"\n" for n in range(5000)))
    cut = tmp_path / "cut.json.gz"
    cut.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"cut\.json\.gz: expected a readable file, but after line \d+ got EOFError"):
        list(ReviewReader([str(cut)]))


def test_any_line_is_a_row_or_a_problem():
    rng = random.Random(0)
    pieces = [
        *"{}[]()'\":,\\ \t-+_.\x00",
        "\ud800",
        "\u2028",
        "1e999",
        "NaN",
        "None",
        "user",
        "b''",
        "lambda: 0",
        "{**{}}",
    ]
    whole = json.dumps(AMAZON_2014)
    for _ in range(3000):
        text = "".join(rng.choices(pieces, k=rng.randrange(12)))
        at = rng.randrange(len(whole))
        assert isinstance(_parse(text), dict | str)
        assert isinstance(_parse(whole[:at] + text + whole[at + rng.randrange(3) :]), dict | str)


def test_any_row_is_a_review_or_a_problem():
    rng = random.Random(0)
    names = ("user", "item", "rating", "text", "timestamp")
    values = [None, True, 0, -1, 10**400, 1.5, float("nan"), float("inf"), "", " ", "5", "x", "\ud800", [1], {"a": 1}]
    values += ["Sat Aug 25 13:55:02 -0700 2018", "99/99/2018", "1/1/18 25:00", "\x00/1/2018", 7.656e16, "7e+16", "1.0"]
    values += ["2018-07-07", "9999-12-31T23:59:59", "0001-01-01T00:00:00+14:00", "1" * 5000]
    columns = {name: (name,) for name in names}
    read = 0
    for _ in range(5000):
        review = _review({name: rng.choice(values) for name in names}, columns)
        if isinstance(review, str):
            continue
        read += 1
        assert review.user.strip() and review.item.strip() and abs(review.rating) < float("inf")
        assert review.timestamp is None or 0 < review.timestamp < 4_102_444_800
        json.dumps(review).encode()
        (review.user + review.item + review.text).encode()
    assert read > 100


def test_nested_lines_are_only_bad(tmp_path):
    lines = [json.dumps(AMAZON_2014), "[" * 100_000, "(" * 100_000, "-" * 100_000 + "1", "{[]: 1}"]
    path = write_lines(tmp_path / "reviews.json", lines, dump=str)
    assert [isinstance(entry, BadLine) for entry in ReviewReader([path])] == [False, True, True, True, True]


@pytest.mark.parametrize("name", ["reviews.jsonl.gz", "reviews.csv.gz"])
def test_a_line_without_an_end_is_refused_before_it_fills_the_memory(tmp_path, monkeypatch, name):
    """A compressed file of a few hundred KB may hold a line of hundreds of MB."""
    monkeypatch.setattr(sources, "_MAX_LINE_BYTES", 10_000)
    start = b"user,item,rating,text\n" if "csv" in name else b""
    with gzip.open(tmp_path / name, "wb") as file:
        file.write(start + b'{"user": "' + b"a" * 1_000_000)
    with pytest.raises(DataError, match="a line of more than 10,000 bytes"):
        list(sources.ReviewReader([str(tmp_path / name)], "auto", {}))
