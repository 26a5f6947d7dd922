"""One writer at a time, and going on only with what is of the same run: train, explain, evaluate and prepare."""

import json
import math
import os
import shutil
import subprocess
import sys

import pytest
from datasets import DatasetDict
from references import tiny_run

from gavamoe_hf.cli.main import main
from gavamoe_hf.evaluation.predict import to_json, write_json, write_json_lines
from gavamoe_hf.files import checkpoint_identity, differences, one_writer, records_digest
from gavamoe_hf.training.pipeline import save_checkpoint

TINY = """
    --use_cpu --hidden_size 32 --num_hidden_layers 1 --num_attention_heads 2 --num_experts 4 --vocab_size 400
    --moe_intermediate_size 16 --shared_expert_intermediate_size 0 --vae_embedding_size 16 --latent_size 8
    --num_clusters 2 --rating_bias_epochs 1 --rating_autoencoder_epochs 1 --rating_num_train_epochs 1
    --rating_refinement_epochs 1 --num_train_epochs 1 --disable_tqdm true
""".split()  # noqa: SIM905


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files") / "checkpoint"
    folder.mkdir()
    save_checkpoint(*tiny_run(), folder)
    return folder


@pytest.fixture(scope="module")
def records(planted, tmp_path_factory):
    folder = tmp_path_factory.mktemp("records")
    for split, part in planted.records.items():
        part.to_json(folder / f"{split}.jsonl")
    return folder


def options_of(command, checkpoint, records, tmp_path):
    """A command that writes, and where it does."""
    pairs = tmp_path / "pairs.csv"
    pairs.write_text("user,item\nuser_001,item_002\nuser_003,item_004\n")
    output = tmp_path / ("explained.jsonl" if command == "explain" else command)
    return output, {
        "train": ["train", "--dataset", str(records), "--output_dir", str(output), *TINY],
        "explain": ["explain", "--model", str(checkpoint), "--pairs", str(pairs), "--output", str(output)],
        "evaluate": ["evaluate", "--model", str(checkpoint), "--dataset", str(records), "--output_dir", str(output)],
        "prepare": ["prepare", "--reviews", str(records / "test.jsonl"), "--output_dir", str(output)],
    }[command]


@pytest.mark.parametrize("command", ["train", "explain", "evaluate", "prepare"])
def test_a_second_writer_is_refused_at_once(checkpoint, records, tmp_path, capsys, command):
    output, argv = options_of(command, checkpoint, records, tmp_path)
    # Of another process, which is killed in the end
    script = (
        "import pathlib, sys, time; from gavamoe_hf.files import one_writer\n"
        "with one_writer(pathlib.Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", script, str(output)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        assert main(argv) == 1
        error = capsys.readouterr().err.splitlines()[-1]
        assert f"{output} is being written by another process" in error and f"delete {output}.lock" in error
        assert not output.exists() or not any(output.iterdir())
    finally:
        holder.kill()
        holder.wait()
    # Nothing has to be cleaned up after it
    with one_writer(output):
        pass
    assert not os.path.exists(f"{output}.lock")


def test_explain_goes_on_only_with_the_same_checkpoint(checkpoint, records, tmp_path, capsys, monkeypatch):
    copy = shutil.copytree(checkpoint, tmp_path / "checkpoint")
    output, argv = options_of("explain", copy, records, tmp_path)

    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("gavamoe_hf.batch_explain._rows", stop)
        assert main([*argv, "--batch_size", "2"]) == 130
    assert main([*argv, "--batch_size", "3"]) == 1
    assert "batch_size was 2, now 3" in capsys.readouterr().err
    assert main([*argv, "--batch_size", "2", "--temperature", "0.5"]) == 1
    assert "temperature was not given, now 0.5" in capsys.readouterr().err
    config = json.loads((copy / "processor_config.json").read_text())
    config["item_features"][2] = ["another"]
    (copy / "processor_config.json").write_text(json.dumps(config))
    assert main([*argv, "--batch_size", "2"]) == 1
    assert "checkpoint_files was" in capsys.readouterr().err
    shutil.copy(checkpoint / "processor_config.json", copy / "processor_config.json")
    assert main([*argv, "--batch_size", "2"]) == 0
    assert len(output.read_text().splitlines()) == 2


def test_train_goes_on_only_with_the_same_records(records, tmp_path, capsys, monkeypatch):
    output, argv = options_of("train", None, records, tmp_path)

    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("gavamoe_hf.training.pipeline.train_rating_model", stop)
        assert main(argv) == 130
    changed = tmp_path / "changed"
    shutil.copytree(records, changed)
    rows = [json.loads(line) for line in (changed / "train.jsonl").read_text().splitlines()]
    first = rows[0]["user"]
    resume = [*argv, "--resume_from_checkpoint", "true"]
    for change in ("renamed", "rated"):
        for row, old in zip(rows, (records / "train.jsonl").read_text().splitlines(), strict=True):
            row.update(json.loads(old))
            if change == "renamed":
                row["user"] = "aaa" if row["user"] == first else row["user"]
            else:
                row["rating"] = 6.0 - row["rating"]
        kept = [row for row in rows if row["user"] != first] if change == "renamed" else rows
        (changed / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
        argument = [str(changed) if part == str(records) else part for part in resume]
        capsys.readouterr()
        assert main([*argument, "--unknown_held_out", "drop"]) == 1
        error = capsys.readouterr().err
        assert "the records of the run" in error and "have changed" in error
    # Said explicitly, a default is what it was
    assert main([*resume, "--seed", "43"]) == 1
    assert "seed was 42, now 43" in capsys.readouterr().err
    assert main([*resume, "--seed", "42"]) == 0
    assert (output / "metrics.json").is_file()


def test_a_test_split_with_nothing_to_rank_ends_well(planted, tmp_path, caplog):
    """No record of it was liked: the run ends with its other scores."""
    test = planted.records["test"]
    disliked = test.filter(lambda record: record["rating"] < 3)
    assert 1 < len(disliked) < len(test)
    for split, part in DatasetDict({**planted.records, "test": disliked.select(range(2))}).items():
        part.to_json(tmp_path / "records" / f"{split}.jsonl")
    assert main(["train", "--dataset", str(tmp_path / "records"), "--output_dir", str(tmp_path / "run"), *TINY]) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert "rating_rmse" in metrics and "hr_10_full" not in metrics
    assert "There are no scores of the ranking" in caplog.text
    assert (tmp_path / "run" / "README.md").is_file()


def test_digests_and_differences(planted, checkpoint, tmp_path):
    records = planted.records
    again = DatasetDict({name: split.select(range(len(split))) for name, split in records.items()})
    other = DatasetDict({**again, "test": again["test"].select(range(len(again["test"]) - 1))})
    assert records_digest(records) == records_digest(again) != records_digest(other)
    assert differences({"a": 1, "b": 2}, {"a": 1, "c": 3}) == "b was 2, now not given, c was not given, now 3"
    assert differences({"a": 1}, {"a": 1}) == ""
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    assert checkpoint_identity(copy) == checkpoint_identity(checkpoint)
    os.utime(copy / "model.safetensors", ns=(1, 1))
    assert checkpoint_identity(copy) != checkpoint_identity(checkpoint)


def test_json_has_no_nan(tmp_path):
    value = {"a": math.nan, "b": [1.5, math.inf, (2, -math.inf)], "c": "NaN"}
    assert to_json(value) == '{"a": null, "b": [1.5, null, [2, null]], "c": "NaN"}'
    write_json(tmp_path / "a.json", value)
    write_json_lines(tmp_path / "a.jsonl", [value, value])
    for text in ((tmp_path / "a.json").read_text(), *(tmp_path / "a.jsonl").read_text().splitlines()):
        assert json.loads(text, parse_constant=pytest.fail)["a"] is None
