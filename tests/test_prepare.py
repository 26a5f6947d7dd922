"""`gavamoe prepare`: from files of reviews to a data set with its card, resumed, refused, pushed and trained on."""

import json
import re

import pytest
from datasets import DatasetDict, load_from_disk
from huggingface_hub import DatasetCard, HfApi

from gavamoe_hf.cli.main import main
from gavamoe_hf.data import DataError, load_records
from gavamoe_hf.prepare import parts as parts_module
from gavamoe_hf.prepare.options import PrepareArguments
from gavamoe_hf.prepare.pipeline import prepare_reviews, push_dataset, read_summary
from gavamoe_hf.training.building import ModelArguments, build_processor
from gavamoe_hf.training.pipeline import DataArguments, read_data

# In a module of its own, so that other processes can import it
EXTRACTOR = '''
import re

def extract(sentences):
    """"the good sound": the two words after each "the"."""
    return [[(noun, word) for word, noun in re.findall(r"the (\\w+) (\\w+)", sentence)] for sentence in sentences]

def broken(sentences):
    raise RuntimeError("interrupted")

def is_english(text):
    return "el " not in text
'''
FEATURES = ("sound", "price", "strap")


@pytest.fixture(autouse=True)
def extractor(tmp_path, monkeypatch):
    (tmp_path / "reviewers_own.py").write_text(EXTRACTOR)
    monkeypatch.syspath_prepend(tmp_path)


def review(user, item, rating=5.0, text=None, **more):
    text = f"Short. I like the good {FEATURES[(user + item) % 3]} of number {user}." if text is None else text
    row = {"reviewerID": f"u{user}", "asin": f"i{item}", "overall": rating, "reviewText": text}
    return {**row, "unixReviewTime": 1000 * user + item, **more}


def grid(num_users=6, num_items=6):
    return [review(user, item, 1 + (user + item) % 5) for user in range(num_users) for item in range(num_items)]


def write(folder, rows, name="reviews.json"):
    path = folder / name
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def arguments(tmp_path, rows, **options):
    defaults = {"extractor": "reviewers_own:extract", "language": "none", "k_core": 2, "num_proc": 1}
    path = write(tmp_path, rows)
    return PrepareArguments(**{"reviews": [str(path)], "output_dir": str(tmp_path / "out"), **defaults, **options})


def rows_of(splits):
    return sorted((row for part in splits.values() for row in part), key=lambda row: (row["user"], row["item"]))


def test_records(tmp_path):
    splits = prepare_reviews(arguments(tmp_path, grid()))
    assert {split: len(part) for split, part in splits.items()} == {"train": 30, "validation": 3, "test": 3}
    rows = rows_of(splits)
    assert rows[7] == {
        "user": "u1",
        "item": "i1",
        "rating": 3.0,
        "timestamp": 1001,
        "feature": "strap",
        "opinion": "good",
        "explanation": "I like the good strap of number 1.",
    }
    assert [(row["user"], row["item"]) for row in rows] == [(f"u{u}", f"i{i}") for u in range(6) for i in range(6)]
    # What the rest of the package reads, and what a user does
    records = load_records(str(tmp_path / "out"))
    assert records["test"]["feature"][0] == [splits["test"]["feature"][0]]
    for name in ("user", "item"):
        assert set(splits["test"][name]) | set(splits["validation"][name]) <= set(splits["train"][name])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        ["README.md", "dataset_dict.json", "prepare.json", "test", "train", "validation"]
    )


def test_every_drop_is_counted_under_one_reason(tmp_path):
    rows = [
        *grid(),
        "{broken",
        review(0, 0, 3, "I like the late sound of it.", unixReviewTime=99),
        review(1, 0, 5, "The day before the good sound came", unixReviewTime=0),
        review(0, 7, 5),
        review(2, 6, 7),
        review(2, 6, text=" "),
        review(3, 6, text="el sonido es the good sound"),
        review(1, 6, text="Too short."),
        review(2, 6, text="Write to a@b.org for the good sound."),
        review(4, 6, text="Nothing to be found in here."),
        review(5, 6, text="I like the good lid of it."),
    ]
    args = arguments(tmp_path, rows, language_filter="reviewers_own:is_english", max_bad_lines=0.1)
    splits = prepare_reviews(args)
    summary = read_summary(args.output_dir)
    assert summary["lines"] == len(rows) == 47
    assert summary["bad_lines"] == {
        "count": 1,
        "first": [{"path": "reviews.json", "number": 37, "problem": "broken JSON"}],
    }
    assert summary["dropped"] == {
        "rating that is not on the scale": 1,
        "no text": 1,
        "another language": 1,
        "earlier review of the same user and item": 2,
        "outside the k-core": 1,
        "no sentence of the right length": 1,
        "only sentences with contact details": 1,
        "no feature with a fitting opinion": 1,
        "only rare features": 1,
    }
    assert summary["records"] == {"train": 30, "validation": 3, "test": 3}
    assert (summary["users"], summary["items"], summary["features"]) == (6, 6, 3)
    # The later review of a pair is kept, wherever it is in the file
    by_pair = {(row["user"], row["item"]): row for row in rows_of(splits)}
    assert by_pair["u0", "i0"]["opinion"] == "late" and by_pair["u1", "i0"]["explanation"].startswith("I like")


def test_names_of_the_item_are_written_down(tmp_path):
    rows = [{**row, "reviewText": f"{row['reviewText']} I say it is the good film by far."} for row in grid()]
    splits = prepare_reviews(arguments(tmp_path, rows))
    assert read_summary(tmp_path / "out")["item_names"] == ["film"]
    assert {row["feature"] for row in rows_of(splits)} == set(FEATURES)


def test_timestamps_only_where_there_are_any(tmp_path):
    rows = [{key: value for key, value in row.items() if key != "unixReviewTime"} for row in grid()]
    assert "timestamp" not in prepare_reviews(arguments(tmp_path, rows))["train"].column_names


def test_card(tmp_path):
    args = arguments(tmp_path, [*grid(), review(0, 7)], license="cc-by-4.0", language="en", sentiment=False)
    args.language_filter = "reviewers_own:is_english"
    splits = prepare_reviews(args)
    card = DatasetCard.load(tmp_path / "out" / "README.md")
    assert card.data.license == "cc-by-4.0" and card.data.language == ["en"]
    assert card.data.size_categories == ["n<1K"] and "explainable-recommendation" in card.data.tags
    assert "| train | 30 |" in card.text
    assert "| outside the k-core | 1 | 2.7% |" in card.text and "| made a record | 36 | 97.3% |" in card.text
    assert "sound (12), price (12), strap (12)" in card.text and 'load_from_disk(".")' in card.text
    # No file by its whole path
    assert str(tmp_path) not in str(card)
    ratings = [row["rating"] for row in rows_of(splits)]
    assert f"| 5 | {ratings.count(5.0)} |" in card.text


def test_names_from_the_data_are_no_markup_in_the_card(tmp_path):
    (tmp_path / "odd_extractor.py").write_text(
        "def extract(sentences):\n    return [[('<img src=x>|[a](b)', 'good')] for _ in sentences]\n"
    )
    prepare_reviews(arguments(tmp_path, grid(), extractor="odd_extractor:extract"))
    text = (tmp_path / "out" / "README.md").read_text()
    assert "<img" not in text and "](b)" not in text and "img src=x" in text


@pytest.mark.slow
def test_several_processes_give_the_same(tmp_path):
    args = arguments(tmp_path, grid(), chunk_size=10)
    alone = rows_of(prepare_reviews(args))
    args.num_proc, args.overwrite_output_dir = 2, True
    assert rows_of(prepare_reviews(args)) == alone


def test_interrupted_run_goes_on(tmp_path, monkeypatch):
    args = arguments(tmp_path, grid(), chunk_size=10)
    expected = prepare_reviews(args)
    args.output_dir = str(tmp_path / "resumed")
    looked_at = []
    find = parts_module.find_candidates

    def interrupted(texts, *more):
        if len(looked_at) == 2:
            raise KeyboardInterrupt
        looked_at.append(len(texts))
        return find(texts, *more)

    monkeypatch.setattr(parts_module, "find_candidates", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare_reviews(args)
    folder = tmp_path / "resumed" / "parts"
    assert sorted(path.name for path in folder.iterdir()) == ["000000.json", "000001.json", "run.json"]
    # Half a file that a kill left is no part
    (folder / "000002.json.part").write_text("{")
    # What shapes the parts has to be the same; what is chosen of them may change
    with pytest.raises(FileExistsError, match=r"unfinished run that differs in max_words\. .*--overwrite_output_dir"):
        prepare_reviews(PrepareArguments(**{**vars(args), "max_words": 9}))
    other = write(tmp_path, grid()[1:], "other.json")
    with pytest.raises(FileExistsError, match=r"differs in reviews\."):
        prepare_reviews(PrepareArguments(**{**vars(args), "reviews": [str(other)]}))
    done = []
    monkeypatch.setattr(
        parts_module, "find_candidates", lambda texts, *more: done.append(len(texts)) or find(texts, *more)
    )
    args.min_feature_count = 2
    resumed = prepare_reviews(args)
    assert looked_at == [10, 10] and done == [10, 6]
    for split in expected:
        assert resumed[split].to_list() == expected[split].to_list()
    assert not folder.exists()


def test_failure_of_the_users_function_is_not_lost(tmp_path):
    args = arguments(tmp_path, grid(), extractor="reviewers_own:broken", chunk_size=10, num_proc=2)
    with pytest.raises(RuntimeError, match="interrupted"):
        prepare_reviews(args)


def test_output_folder_is_not_replaced_unasked(tmp_path):
    args = arguments(tmp_path, grid())
    prepare_reviews(args)
    with pytest.raises(
        FileExistsError, match=r"already holds dataset_dict\.json, README\.md, .*--overwrite_output_dir"
    ):
        prepare_reviews(args)
    kept = tmp_path / "out" / "notes.txt"
    kept.write_text("mine")
    args.overwrite_output_dir, args.k_core = True, 7
    with pytest.raises(DataError, match="all were dropped"):
        prepare_reviews(args)
    assert len(load_from_disk(args.output_dir)["train"]) == 30
    args.k_core = 0
    prepare_reviews(args)
    assert kept.read_text() == "mine" and read_summary(args.output_dir)["options"]["k_core"] == 0
    # Somebody's README is not a run's
    folder = tmp_path / "repository"
    folder.mkdir()
    (folder / "README.md").write_text("mine")
    args.overwrite_output_dir, args.output_dir = False, str(folder)
    with pytest.raises(FileExistsError, match=r"already holds README\.md"):
        prepare_reviews(args)
    args.output_dir = str(kept)
    with pytest.raises(FileExistsError, match="as a folder"):
        prepare_reviews(args)


def test_too_many_bad_lines(tmp_path):
    args = arguments(tmp_path, [*grid(), "{broken", "[]", '{"asin": "x"}'])
    expected = (
        r"at least 99% of the lines, but 3 of 39 hold none: reviews\.json: broken JSON in line 37, no object .*line 38"
    )
    with pytest.raises(DataError, match=expected):
        prepare_reviews(args)
    assert not (tmp_path / "out").exists()
    args.max_bad_lines = 0.08
    assert len(prepare_reviews(args)["train"]) == 30


def test_the_latest_review_stays_where_times_are_dates(tmp_path):
    rows = []
    for row in grid():
        rows.append({**row, "unixReviewTime": "Sat Aug 25 13:55:02 -0700 2018"})
        rows.append({**row, "overall": 6 - row["overall"], "unixReviewTime": "Sun Aug 25 13:55:02 -0700 2013"})
    rows = rows_of(prepare_reviews(arguments(tmp_path, rows)))
    assert [row["rating"] for row in rows] == [row["overall"] for row in grid()]
    assert {row["timestamp"] for row in rows} == {1535230502}


def test_times_that_cannot_be_read_are_counted_and_named(tmp_path, caplog):
    rows = [{**row, "unixReviewTime": -62135596799000 if row["asin"] == "i1" else "in May"} for row in grid()]
    splits = prepare_reviews(arguments(tmp_path, rows))
    assert "36 of 36 reviews have a timestamp that can't be read" in caplog.text
    assert "reviews.json: 'in May' in line 1, -62135596799000 in line 2, " in caplog.text
    assert read_summary(tmp_path / "out")["bad_times"] == 36
    assert "36 reviews have a time that could not be read." in (tmp_path / "out" / "README.md").read_text()
    assert "timestamp" not in splits["train"].column_names


def test_ratings_on_another_scale_are_refused_with_the_option_that_keeps_them(tmp_path, caplog):
    rows = [{**row, "overall": row["overall"] - 0.5 * (row["asin"] == "i1")} for row in grid()]
    with pytest.raises(
        DataError, match=r"but 6 of 36 reviews \(16\.7%\) have .*\(1, 2, 3, 4, 5\): 0\.5, 1\.5"
    ) as caught:
        prepare_reviews(arguments(tmp_path, rows))
    assert not (tmp_path / "out").exists()
    levels, share = re.findall(r"--(?:rating_levels|max_off_scale) ((?:[\d.]+ ?)+)", str(caught.value).rstrip("."))
    assert levels.split() == ["0.5", "1", "1.5", "2", "2.5", "3", "3.5", "4", "4.5", "5"]
    kept = prepare_reviews(arguments(tmp_path, rows, rating_levels=list(map(float, levels.split()))))
    assert len(rows_of(kept)) == 36
    dropped = prepare_reviews(arguments(tmp_path, rows, max_off_scale=float(share), overwrite_output_dir=True))
    assert len(rows_of(dropped)) == 30
    assert "6 of 36 reviews (16.7%) have a rating that is not among rating_levels" in caplog.text


def test_ratings_that_are_no_levels(tmp_path):
    rows = [{**row, "overall": row["overall"] + number / 100} for number, row in enumerate(grid())]
    with pytest.raises(DataError, match=r"0\.\d+ and others\. To keep them, round them to a few levels first; to drop"):
        prepare_reviews(arguments(tmp_path, [{**row, "overall": row["overall"] / 10} for row in rows]))


def test_nothing_left_says_why(tmp_path):
    with pytest.raises(DataError, match=r"all were dropped: 36 outside the k-core\. .*--k_core 0"):
        prepare_reviews(arguments(tmp_path, grid(), k_core=7))
    assert not (tmp_path / "out").exists()
    with pytest.raises(DataError, match=r"all were dropped: 36 only rare features"):
        prepare_reviews(arguments(tmp_path, grid(), min_feature_count=13))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"format": "json"}, r"format: expected one of auto, amazon, .*but got 'json'"),
        ({"min_words": 9, "max_words": 8}, r"min_words: expected a number from 1 to max_words, but got 9"),
        ({"k_core": -1}, r"k_core: expected a number of at least 0"),
        ({"max_bad_lines": 2.0}, r"max_bad_lines: expected a share from 0 to 1, but got 2\.0"),
        ({"num_proc": 0}, r"num_proc: expected a number of at least 1"),
        ({"chunk_size": 0}, r"chunk_size: expected"),
        ({"rating_levels": [1.0]}, r"rating_levels: expected at least two"),
        ({"column_mapping": ["user"]}, r"expected ours=theirs, but got 'user'"),
        ({"extractor": "nothing:here"}, r"'nothing:here' gave ModuleNotFoundError"),
        ({"push_to_hub": "a/b/c"}, r"[Rr]epo id"),
    ],
)
def test_bad_options(options, expected, tmp_path):
    with pytest.raises(ValueError, match=expected):
        prepare_reviews(arguments(tmp_path, grid(), **options))
    assert not (tmp_path / "out").exists()


def test_push(tmp_path, monkeypatch):
    """Against stand-ins of the Hub's three calls, which keep the order."""
    calls = []

    def create_repo(self, repo_id, **options):
        calls.append(("create", repo_id, options))
        return type("Url", (str,), {"repo_id": f"me/{repo_id}"})(f"https://hub/datasets/me/{repo_id}")

    def upload_file(self, *, path_or_fileobj, path_in_repo, **options):
        calls.append((path_in_repo, path_or_fileobj.decode(), options))

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_file", upload_file)
    monkeypatch.setattr(
        DatasetDict, "push_to_hub", lambda self, repo_id, **options: calls.append((repo_id, len(self), options))
    )
    splits = prepare_reviews(arguments(tmp_path, grid()))
    assert push_dataset(splits, tmp_path / "out", "reviews", private=True) == "https://hub/datasets/me/reviews"
    create, card, summary, data = calls
    assert create == ("create", "reviews", {"repo_type": "dataset", "private": True, "exist_ok": True})
    assert card[0] == "README.md" and 'load_dataset("me/reviews")' in card[1]
    assert card[2] == {"repo_id": "me/reviews", "repo_type": "dataset"}
    assert summary[0] == "prepare.json" and json.loads(summary[1])["lines"] == 36
    assert data == ("me/reviews", 3, {"private": True})


def command(path, output, *more):
    options = ["--extractor", "reviewers_own:extract", "--language", "none", "--num_proc", "1", "--k_core", "2"]
    return ["prepare", "--reviews", str(path), "--output_dir", str(output), *options, *more]


def test_command(tmp_path, capsys):
    rows = [{"customer": row["reviewerID"], **row} for row in grid()]
    path = write(tmp_path, [{key: value for key, value in row.items() if key != "reviewerID"} for row in rows])
    output = tmp_path / "records"
    assert main(command(path, output)) == 1
    assert "--column_mapping user=" in capsys.readouterr().err
    assert main(command(path, output, "--format", "amazon", "--column_mapping", "user=customer")) == 0
    text = capsys.readouterr().out
    assert re.search(r"lines read +36\n", text) and re.search(r"records +36\n +train +30\n", text)
    assert len(load_from_disk(str(output))["train"]) == 30
    assert main(command(path, output, "--column_mapping", "user=customer")) == 1
    assert "already holds" in capsys.readouterr().err


def test_training_reads_its_records(tmp_path):
    splits = prepare_reviews(arguments(tmp_path, grid()))
    records, _ = read_data(DataArguments(dataset=str(tmp_path / "out")))
    assert {split: len(part) for split, part in records.items()} == {split: len(part) for split, part in splits.items()}
    processor = build_processor(records["train"], ModelArguments(vocab_size=300))
    assert set(processor.users) == {f"u{user}" for user in range(6)}
