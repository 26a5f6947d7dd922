"""Explanations for a file of pairs: rows, order, batches, what a killed run leaves, and what bad input gets."""

import csv
import json
import multiprocessing
import os
import signal
from dataclasses import asdict
from types import SimpleNamespace

import pytest
from references import tiny_run

import gavamoe_hf.batch_explain as batch_explain
from gavamoe_hf.batch_explain import check_pairs, explain_file, read_pairs
from gavamoe_hf.cli.main import main
from gavamoe_hf.data import DataError
from gavamoe_hf.processing_gavamoe import GaVaMoEProcessor
from gavamoe_hf.training.pipeline import save_checkpoint

FIXED = {"max_new_tokens": 5, "batch_size": 2}


@pytest.fixture(scope="module")
def run():
    model, processor = tiny_run()
    return model.eval(), processor


@pytest.fixture(scope="module")
def rows(run) -> list[dict]:
    """37 pairs: two windows of eight batches of two, and a part of a third. Prompts of many lengths, ratings or not."""
    _, processor = run
    words = [["tone"], ["a very long feature of many words"], [], None, ["tone", "price"]]
    return [
        {
            "user": processor.users[number % 12],
            "item": processor.items[number * 7 % 10],
            "rating": [1, None, 5.0][number % 3],
            "features": words[number * 3 % 5],
        }
        for number in range(37)
    ]


@pytest.fixture
def pairs(rows, tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


class Killed(BaseException):
    """Stands for a signal: nothing in the code catches it."""


def watch(monkeypatch, model, stop_after: int | None = None) -> list[dict]:
    """What `model.explain` is asked for, batch by batch; it is killed after so many batches."""
    asked, explain = [], model.explain

    def watched(processor, **columns):
        if len(asked) == stop_after:
            raise Killed
        asked.append(columns)
        return explain(processor, **columns)

    monkeypatch.setattr(model, "explain", watched)
    return asked


# Rows


def test_rows_are_those_of_explain_in_the_order_of_the_file(run, rows, pairs, tmp_path):
    model, processor = run
    explain_file(model, processor, pairs, tmp_path / "out.jsonl", **FIXED)
    written = read(tmp_path / "out.jsonl")
    assert [row["line"] for row in written] == list(range(1, 38))
    for asked, row in zip(rows, written, strict=True):
        (alone,) = model.explain(processor, **asked, do_sample=False, max_new_tokens=5)
        expected = asdict(alone)
        assert list(row) == ["line", *expected, "unknown"]
        for key in ("user", "item", "explanation", "features", "cluster"):
            assert row[key] == expected[key]
        for key in ("rating", "predicted_rating", "cluster_posterior"):
            assert row[key] == pytest.approx(expected[key], abs=1e-5)
        assert row["unknown"] == []
    assert len({row["explanation"] for row in written}) > 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "pairs.jsonl"]


def test_batches_hold_prompts_of_one_sentiment_and_length(run, pairs, rows, tmp_path, monkeypatch):
    model, processor = run
    asked = watch(monkeypatch, model)
    explain_file(model, processor, pairs, tmp_path / "out.jsonl", **FIXED)
    assert [len(columns["user"]) for columns in asked] == [2] * 18 + [1]

    def key(rating, features):
        sentiment = "" if rating is None else processor.sentiment(rating)
        return sentiment, len(processor.encode_prompt(sentiment or "positive", features))

    keys = [
        [key(rating, features) for rating, features in zip(columns["rating"], columns["features"], strict=True)]
        for columns in asked
        if None not in columns["features"]
    ]
    assert keys and all(batch == sorted(batch) for batch in keys)
    # Sorted within a window: far fewer batches mix sentiments than in the order of the file
    mixed = [len({rating for rating in columns["rating"]}) > 1 for columns in asked]
    assert sum(mixed) <= 6
    assert sum(first["rating"] != second["rating"] for first, second in zip(rows[:-1:2], rows[1::2], strict=True)) == 18


def test_csv(run, rows, pairs, tmp_path):
    model, processor = run
    table = tmp_path / "pairs.csv"
    with open(table, "w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file)
        writer.writerow(["note", "item", "user", "rating", "features"])
        for number, row in enumerate(rows):
            features = "" if row["features"] is None else json.dumps(row["features"])
            writer.writerow([number, row["item"], row["user"], row["rating"], features])
    explain_file(model, processor, table, tmp_path / "table.jsonl", **FIXED)
    explain_file(model, processor, pairs, tmp_path / "lines.jsonl", **FIXED)
    # The header is the first line
    lines = [{**row, "line": row["line"] + 1} for row in read(tmp_path / "lines.jsonl")]
    assert read(tmp_path / "table.jsonl") == lines


def test_ids_as_a_table_writes_whole_numbers(tokenizer, tmp_path):
    processor = GaVaMoEProcessor(tokenizer, users=["3", "4", "4.0", "v.0"], items=["101"])
    path = tmp_path / "pairs.csv"
    # Beside the empty cell, pandas writes 3.0 for 3
    path.write_bytes("user,item\n3.0,101\n,101\n4.0,101.0\nv,101\n5.0,101\n".encode("utf-16"))
    lines = tmp_path / "pairs.jsonl"
    lines.write_text('{"user": 3.0, "item": 101}\n{"user": "3.0", "item": 101.0}\n')
    found = [(batch_explain._look_up(processor, pair), pair.user, pair.item) for _, pair in read_pairs(path)]
    assert found == [
        ([], "3", "101"),
        (["user"], None, "101"),
        ([], "4.0", "101"),
        (["user"], "v", "101"),
        (["user"], "5.0", "101"),
    ]
    assert [(batch_explain._look_up(processor, pair), pair.user) for _, pair in read_pairs(lines)] == [([], "3")] * 2
    lines.write_text('{"user": 7.656119797098248e+16, "item": 101}\n')
    with pytest.raises(DataError, match=r"the user 7\.6\S+ \(a float, which loses digits\) in line 1"):
        check_pairs(lines, processor, "population")


def test_features_as_records_have_them(tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_text("user,item,feature\na,b,tone\na,b,\"['tone', 'price']\"\na,b,[]\na,b,\n\n")
    assert [(line, pair.features) for line, pair in read_pairs(path)] == [
        (2, ["tone"]),
        (3, ["tone", "price"]),
        (4, []),
        (5, None),
    ]


def test_memory_does_not_grow_with_the_file(run, tmp_path, monkeypatch):
    model, processor = run
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"user": "user_000", "item": "item_000", "rating": 5}\n' * 64)
    rows_read, ahead, written = [], [], 0
    read_lazily = batch_explain.read_pairs

    def counted(path):
        for row in read_lazily(path):
            rows_read.append(row)
            yield row

    check_pairs(path, processor)
    monkeypatch.setattr(batch_explain, "check_pairs", lambda *_: 64)
    monkeypatch.setattr(batch_explain, "read_pairs", counted)
    explain = model.explain

    def watched(*args, **columns):
        nonlocal written
        ahead.append(len(rows_read) - written)
        written += 2
        return explain(*args, **columns)

    monkeypatch.setattr(model, "explain", watched)
    explain_file(model, processor, path, tmp_path / "out.jsonl", **FIXED)
    assert len(rows_read) == 64 and max(ahead) == 16


# Killed runs


@pytest.mark.parametrize("temperature", [None, 0.7])
def test_goes_on_where_it_was_killed(run, pairs, tmp_path, temperature, monkeypatch):
    model, processor = run
    options = FIXED if temperature is None else {**FIXED, "do_sample": True, "temperature": temperature, "seed": 3}
    explain_file(model, processor, pairs, tmp_path / "whole.jsonl", **options)
    output, part = tmp_path / "out.jsonl", tmp_path / "out.jsonl.part"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        watch(patch, model, stop_after=11)
        explain_file(model, processor, pairs, output, **options)
    assert not output.exists() and part.exists()
    with monkeypatch.context() as patch:
        asked = watch(patch, model)
        explain_file(model, processor, pairs, output, **options)
    # Of the 19 batches, the 11 that were written are not explained again
    assert len(asked) == 8
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not part.exists()


def test_wherever_it_was_killed_nothing_is_lost_or_doubled(run, pairs, tmp_path, monkeypatch):
    model, processor = run
    output, part = tmp_path / "out.jsonl", tmp_path / "out.jsonl.part"
    kept = []
    with monkeypatch.context() as patch:
        patch.setattr(batch_explain, "_write_in_order", lambda part, *_: kept.append(part.read_bytes()))
        explain_file(model, processor, pairs, output, **FIXED)
    (whole,) = kept
    explain_file(model, processor, pairs, output, **FIXED)
    expected = output.read_bytes()
    ends = [position + 1 for position, byte in enumerate(whole) if byte == ord("\n")]
    assert len(ends) == 38
    # In the header and after it, in the first and the third row, after whole batches, in and after the last row
    cuts = [0, 5, ends[0], ends[0] + 9, ends[2] + 1, ends[2], ends[16], ends[17], ends[36] - 3, ends[36], len(whole)]
    for cut in cuts:
        output.unlink()
        part.write_bytes(whole[:cut])
        with monkeypatch.context() as patch:
            asked = watch(patch, model)
            explain_file(model, processor, pairs, output, **FIXED)
        whole_batches = max(sum(end <= cut for end in ends) - 1, 0) // 2
        assert len(asked) == 19 - whole_batches, cut
        assert output.read_bytes() == expected, cut
    # Killed between the renaming and the removal of the part
    part.write_bytes(whole)
    explain_file(model, processor, pairs, output, **FIXED)
    assert output.read_bytes() == expected and not part.exists()


def killed_by_signal(model, processor, pairs, output):
    explain, batches = model.explain, []

    def explain_then_die(*args, **kwargs):
        batches.append(1)
        if len(batches) == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return explain(*args, **kwargs)

    model.explain = explain_then_die
    explain_file(model, processor, pairs, output, **FIXED)


def test_batches_of_a_process_that_is_killed_are_on_disk(run, pairs, tmp_path, monkeypatch):
    model, processor = run
    output = tmp_path / "out.jsonl"
    process = multiprocessing.get_context("fork").Process(
        target=killed_by_signal, args=(model, processor, pairs, output)
    )
    process.start()
    process.join(timeout=120)
    assert process.exitcode == -signal.SIGKILL
    assert not output.exists()
    asked = watch(monkeypatch, model)
    explain_file(model, processor, pairs, output, **FIXED)
    assert len(asked) == 19 - 3
    assert [row["line"] for row in read(output)] == list(range(1, 38))


def test_rows_of_another_run_are_not_mixed(run, pairs, tmp_path, monkeypatch):
    model, processor = run
    output, part = tmp_path / "out.jsonl", tmp_path / "out.jsonl.part"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        watch(patch, model, stop_after=3)
        explain_file(model, processor, pairs, output, **FIXED, identity={"model": "a"})
    begun = part.read_bytes()
    with pytest.raises(FileExistsError, match=r"begun with other options or pairs: max_new_tokens was 5, now 4"):
        explain_file(model, processor, pairs, output, batch_size=2, max_new_tokens=4, identity={"model": "a"})
    with pytest.raises(FileExistsError, match=r"model was 'a', now 'b'.*--overwrite_output to start again"):
        explain_file(model, processor, pairs, output, **FIXED, identity={"model": "b"})
    pairs.write_text(pairs.read_text() + '{"user": "user_000", "item": "item_000"}\n')
    with pytest.raises(FileExistsError, match=r"pairs was"):
        explain_file(model, processor, pairs, output, **FIXED, identity={"model": "a"})
    assert part.read_bytes() == begun
    asked = watch(monkeypatch, model)
    explain_file(model, processor, pairs, output, **FIXED, overwrite=True)
    assert len(asked) == 19 and len(read(output)) == 38


def test_a_finished_output_is_kept(run, pairs, tmp_path):
    model, processor = run
    output = tmp_path / "out.jsonl"
    output.write_text("mine\n")
    with pytest.raises(FileExistsError, match=r"is there already. Pass another --output, or --overwrite_output"):
        explain_file(model, processor, pairs, output, **FIXED)
    assert output.read_text() == "mine\n"
    explain_file(model, processor, pairs, output, **FIXED, overwrite=True)
    assert len(read(output)) == 37


# Bad input


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.jsonl", '{"user": "user_000"}', r"'item' among 'user' in line 1\. Correct them"),
        (
            "p.jsonl",
            '\n{"user": "user_000", "item"\n[1]\n',
            r"broken JSON .* in line 2, \[1\], which .* in line 3",
        ),
        ("p.jsonl", '{"user": true, "item": "item_000"}', r"the user True in line 1"),
        ("p.jsonl", '{"user": "user_000", "item": "item_000", "rating": "good"}', r"the rating 'good' in line 1"),
        ("p.jsonl", '{"user": "user_000", "item": "item_000", "rating": NaN}', r"the rating nan in line 1"),
        ("p.jsonl", '{"user": "user_000", "item": "item_000", "features": 3}', r"the features 3 in line 1"),
        (
            "p.csv",
            "user,item,rating\nuser_000,item_000,4.5\nuser_000,item_000,0\nuser_000,item_000,1e30\n",
            r"the rating 0 \(not from 1 to 5\) in line 3, the rating 1e\+30 \(not from 1 to 5\) in line 4 \(2 lines",
        ),
        ("p.jsonl", '{"user": "user_000", "item": "\\ud800"}', r"half of a surrogate pair in line 1"),
        (
            "p.jsonl",
            '{"user": "user_00", "item": "item_000"}',
            r"knows, but got the user 'user_00' in line 1\..*popu",
        ),
        (
            "p.jsonl",
            '{"user": null, "item": 7}\n' * 5,
            r"the user nothing .* and the item '7' in line 1, .* of 5 lines",
        ),
        ("p.csv", "user,item\nuser_000\n", r"1 fields where the header has 2 in line 2"),
        ("p.csv", "user,items\nuser_000,item_000\n", r"no 'item' among 'user', 'items' in line 2"),
        ("p.csv", 'user,item\nuser_000,"item\n', r"expected UTF-8 text as \.csv, but got"),
        ("p.csv", "user,item\n", r"at least one pair, but got none"),
        ("p.txt", "user item\n", r"one of the suffixes \.csv, \.jsonl, \.json, but got '\.txt'"),
    ],
)
def test_refuses_before_anything_is_explained(run, name, text, message, tmp_path):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        explain_file(SimpleNamespace(config=run[0].config), run[1], path, tmp_path / "out.jsonl")
    assert sorted(tmp_path.iterdir()) == [path]


def test_population_answers_for_ids_that_are_not_known(run, tmp_path):
    model, processor = run
    path = tmp_path / "pairs.jsonl"
    ids = [("user_000", "item_000"), ("stranger", "item_000"), ("user_000", "novelty"), (None, "novelty")]
    path.write_text("".join(json.dumps({"user": user, "item": item}) + "\n" for user, item in ids))
    explain_file(model, processor, path, tmp_path / "out.jsonl", **FIXED, unknown="population")
    written = read(tmp_path / "out.jsonl")
    assert [(row["user"], row["item"]) for row in written] == ids
    assert [row["unknown"] for row in written] == [[], ["user"], ["item"], ["user", "item"]]
    asked = [("user_000", "item_000"), (None, "item_000"), ("user_000", None), (None, None)]
    for row, (user, item) in zip(written, asked, strict=True):
        (alone,) = model.explain(processor, user, item, do_sample=False, max_new_tokens=5)
        assert row["explanation"] == alone.explanation
        assert row["predicted_rating"] == pytest.approx(alone.predicted_rating, abs=1e-5)


# The command


@pytest.fixture(scope="module")
def checkpoint(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "checkpoint"
    folder.mkdir()
    save_checkpoint(*run, folder)
    return folder


def test_command(run, checkpoint, pairs, tmp_path, capsys):
    output = tmp_path / "out.jsonl"
    options = ["explain", "--model", str(checkpoint), "--pairs", str(pairs), "--output", str(output)]
    more = ["--batch_size", "2", "--max_new_tokens", "5", "--device", "cpu"]
    assert main([*options, *more]) == 0
    assert "37/37" in capsys.readouterr().err
    explain_file(*run, pairs, tmp_path / "called.jsonl", **FIXED)
    assert output.read_bytes() == (tmp_path / "called.jsonl").read_bytes()
    assert main([*options, *more]) == 1
    assert "out.jsonl is there already" in capsys.readouterr().err
    # Retrained in place is another model: what it has begun is not gone on with
    begun = {"model": str(checkpoint), "weights_modified": [1], "pairs": "?"}
    (tmp_path / "out.jsonl.part").write_text(json.dumps(begun) + "\n")
    assert main([*options, *more]) == 1
    assert "weights_modified was [1], now" in capsys.readouterr().err
    assert main([*options, *more, "--overwrite_output"]) == 0
    pairs.write_text('{"user": "user_0", "item": "item_000"}\n')
    assert main([*options, *more, "--overwrite_output"]) == 1
    assert "the user 'user_0' in line 1" in capsys.readouterr().err
    assert len(read(output)) == 37


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "Pass --user and --item, or --pairs and --output"),
        (["--user", "a"], "Pass --user and --item, or --pairs and --output"),
        (["--pairs", "p.csv"], "--pairs and --output together"),
        (["--pairs", "p.csv", "--output", "o", "--rating", "3"], "one pair or a file of them, but got both"),
        (["--pairs", "p.csv", "--output", "o", "--json"], "one pair or a file of them, but got both"),
        (["--pairs", "p.csv", "--output", "o", "--batch_size", "0"], "--batch_size of at least 1, but got 0"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_command_refuses_options(options, message, capsys):
    assert main(["explain", "--model", "none", *options]) == 1
    assert message in capsys.readouterr().err
