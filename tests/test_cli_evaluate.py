"""`gavamoe evaluate`: a predictions file, a checkpoint under both protocols, resuming, and what bad input gets."""

import json
import os
from pathlib import Path

import pytest
from references import library_scores, tiny_run

from gavamoe_hf.cli.main import main
from gavamoe_hf.data import SyntheticConfig, write_synthetic
from gavamoe_hf.evaluation import predict as prediction
from gavamoe_hf.training.pipeline import save_checkpoint

ROWS = [
    {"user": "u1", "item": "i1", "reference": "good strings", "prediction": "the strings are good", "rating": 5},
    {"user": "u2", "item": "i1", "reference": "a weak cable", "prediction": "", "rating": 1},
]


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def predictions(tmp_path: Path) -> Path:
    return write(tmp_path / "predictions.jsonl", ROWS)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    model, processor = tiny_run()
    folder = tmp_path_factory.mktemp("run") / "checkpoint"
    folder.mkdir()
    save_checkpoint(model, processor, folder)
    return folder


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_synthetic(folder, SyntheticConfig(num_users=12, num_items=10, records_per_user=6))
    return folder


def model_options(checkpoint: Path, dataset: Path, output: Path, *more: str) -> list[str]:
    options = ["--model", checkpoint, "--dataset", dataset, "--output_dir", output, "--bootstrap_samples", 10]
    return ["evaluate", *map(str, options), "--max_new_tokens", "5", "--batch_size", "4", *more]


class TestPredictions:
    def test_leaves_metrics(self, predictions: Path, tmp_path: Path, capsys) -> None:
        assert main(["evaluate", "--predictions", str(predictions), "--output_dir", str(tmp_path / "out")]) == 0
        metrics = json.loads((tmp_path / "out" / "metrics.json").read_text(encoding="utf-8"))
        expected = library_scores([row["prediction"] for row in ROWS], [row["reference"] for row in ROWS])
        assert {key: metrics[key] for key in expected} == pytest.approx(expected)
        assert metrics["bootstrap"] == {"resamples": 1000, "seed": 0}
        assert (tmp_path / "out" / "metrics.md").read_text(encoding="utf-8") == capsys.readouterr().out
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["metrics.json", "metrics.md"]

    def test_profiles_protocol_and_comparison(self, predictions: Path, tmp_path: Path) -> None:
        other = write(tmp_path / "other.jsonl", [{**row, "prediction": row["reference"]} for row in ROWS])
        options = [
            "--predictions",
            str(predictions),
            "--output_dir",
            str(tmp_path / "out"),
            "--bootstrap_samples",
            "20",
        ]
        options += ["--profile", "pepler", "default", "--protocol", "predicted", "--compare", str(other), "--seed", "3"]
        options += ["--compare_protocol", "given"]
        assert main(["evaluate", *options]) == 0
        metrics = json.loads((tmp_path / "out" / "metrics.json").read_text(encoding="utf-8"))
        assert metrics["profile"] == "pepler" and metrics["protocol"] == "predicted"
        assert metrics["profiles"]["default"]["comparison"]["scores"]["rouge_1"] == 100
        assert metrics["comparison"]["protocol"] == "given" and "num_dropped" not in metrics
        assert metrics["bootstrap"] == {"resamples": 20, "seed": 3}

    def test_sentiment(self, predictions: Path, tmp_path: Path) -> None:
        pytest.importorskip("vaderSentiment")
        options = ["--predictions", str(predictions), "--output_dir", str(tmp_path), "--sentiment"]
        assert main(["evaluate", *options, "--positive_rating_threshold", "6"]) == 0
        metrics = json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))
        # "good" against a rating that is below the threshold; the empty text is neutral
        assert (metrics["sentiment_agreement"], metrics["sentiment_neutral"]) == (0, 0.5)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--profile", "petr"], "Expected a profile among default, peter"),
            (["--protocol", "both"], "Expected one protocol with --predictions"),
            (["--model", "somewhere"], "Expected either --model or --predictions"),
            (["--bootstrap_samples", "0"], "Expected at least one resample"),
            (["--compare", "nothing.jsonl"], "nothing.jsonl"),
            (["--compare_protocol", "given"], "Expected a file to compare with --compare_protocol"),
            (["--dataset", "synthetic"], "expected the user 'user_"),
        ],
    )
    def test_bad_options(self, options: list[str], message: str, predictions: Path, tmp_path: Path, capsys) -> None:
        output = tmp_path / "out"
        assert main(["evaluate", "--predictions", str(predictions), "--output_dir", str(output), *options]) == 1
        assert message in capsys.readouterr().err
        assert not output.exists()

    def test_bad_line(self, tmp_path: Path, capsys) -> None:
        path = write(tmp_path / "p.jsonl", [ROWS[0], {**ROWS[1], "rating": float("nan")}])
        assert main(["evaluate", "--predictions", str(path), "--output_dir", str(tmp_path / "out")]) == 1
        assert "p.jsonl, line 2: expected 'rating' as a finite number, but got nan" in capsys.readouterr().err

    def test_metrics_of_a_training_run_are_kept(self, predictions: Path, tmp_path: Path, capsys) -> None:
        options = ["evaluate", "--predictions", str(predictions), "--output_dir", str(tmp_path)]
        content = '{"bleu_1": 1.0, "profile": "default", "signatures": {"bleu_1": "profile:default"}}'
        (tmp_path / "metrics.json").write_text(content, encoding="utf-8")
        assert main(options) == 1
        assert "metrics.json is not from `gavamoe evaluate`" in capsys.readouterr().err
        assert main([*options, "--overwrite_output_dir"]) == 0
        assert main(options) == 0


class TestModel:
    def test_both_protocols(self, checkpoint: Path, dataset: Path, tmp_path: Path) -> None:
        more = ["--protocol", "both", "--profile", "default", "peter"]
        assert main(model_options(checkpoint, dataset, tmp_path, *more)) == 0
        records = read(dataset / "test.jsonl")
        for protocol in ("given", "predicted"):
            rows = read(tmp_path / f"predictions_{protocol}.jsonl")
            assert [(row["user"], row["reference"]) for row in rows] == [
                (record["user"], record["explanation"]) for record in records
            ]
        metrics = json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))
        assert metrics["protocol"] == "given" and metrics["num_records"] == len(records)
        assert metrics["protocols"]["predicted"]["protocol"] == "predicted"
        assert metrics["protocols"]["predicted"]["profiles"]["peter"]["protocol"] == "predicted"
        assert "features:corpus-" in metrics["signatures"]["feature_coverage"]
        table = (tmp_path / "metrics.md").read_text(encoding="utf-8")
        assert table.count("## Profile") == 4

    @pytest.mark.parametrize("temperature", ["0", "0.7"])
    def test_goes_on_where_it_was_cut_off(self, temperature, checkpoint, dataset, tmp_path, monkeypatch) -> None:
        more = ["--temperature", temperature, "--seed", "5"]
        assert main(model_options(checkpoint, dataset, tmp_path / "whole", *more)) == 0
        whole = (tmp_path / "whole" / "predictions_given.jsonl").read_text(encoding="utf-8")

        starts, iterate = [], prediction.iterate_predictions

        def cut_off(*args, **kwargs):
            for number, row in enumerate(iterate(*args, **kwargs)):
                if number == 6:
                    raise KeyboardInterrupt
                yield row

        def watched(model, processor, records, protocol, batch_size, first, *args, **kwargs):
            starts.append(first)
            return iterate(model, processor, records, protocol, batch_size, first, *args, **kwargs)

        monkeypatch.setattr(prediction, "iterate_predictions", cut_off)
        assert main(model_options(checkpoint, dataset, tmp_path / "cut", *more)) == 130
        assert not (tmp_path / "cut" / "predictions_given.jsonl").exists()
        monkeypatch.setattr(prediction, "iterate_predictions", watched)
        assert main(model_options(checkpoint, dataset, tmp_path / "cut", *more)) == 0
        assert starts == [4]  # six rows were written, in batches of four
        assert (tmp_path / "cut" / "predictions_given.jsonl").read_text(encoding="utf-8") == whole
        # A third time, the predictions are there
        assert main(model_options(checkpoint, dataset, tmp_path / "cut", *more)) == 0
        assert starts == [4]

    def test_other_options_are_refused(self, checkpoint: Path, dataset: Path, tmp_path: Path, capsys) -> None:
        assert main(model_options(checkpoint, dataset, tmp_path)) == 0
        kept = (tmp_path / "predictions_given.jsonl").read_bytes()
        more = ["--max_new_tokens", "1"]
        assert main(model_options(checkpoint, dataset, tmp_path, *more)) == 1
        assert "holds predictions of another model, data or options" in capsys.readouterr().err
        assert (tmp_path / "predictions_given.jsonl").read_bytes() == kept
        assert main(model_options(checkpoint, dataset, tmp_path, *more, "--overwrite_output_dir")) == 0
        assert (tmp_path / "predictions_given.jsonl").read_bytes() != kept

    def test_retrained_in_place_is_another_model(self, checkpoint: Path, dataset: Path, tmp_path: Path, capsys) -> None:
        assert main(model_options(checkpoint, dataset, tmp_path)) == 0
        (weights,) = checkpoint.glob("*.safetensors")
        os.utime(weights)
        assert main(model_options(checkpoint, dataset, tmp_path)) == 1
        assert "of another model" in capsys.readouterr().err

    @pytest.mark.parametrize("is_one_file", [False, True])
    def test_records_of_unknown_users(self, is_one_file, checkpoint, dataset, tmp_path, capsys) -> None:
        """They are left out, counted, and left out again where the predictions are scored anew."""
        parts = {split: read(dataset / f"{split}.jsonl") for split in ("train", "validation", "test")}
        known, strange = len(parts["test"]), {**parts["test"][0], "user": "nobody"}
        parts["test"] = [strange, *parts["test"], strange]
        data = tmp_path / "data"
        data.mkdir()
        for split, rows in parts.items():
            if not is_one_file:
                write(data / f"{split}.jsonl", rows)
        if is_one_file:
            data = write(data / "all.jsonl", [{**row, "part": split} for split in parts for row in parts[split]])
        mapping = ["--column_mapping", "split=part"] if is_one_file else []
        assert main(model_options(checkpoint, data, tmp_path / "out", *mapping)) == 0
        metrics = json.loads((tmp_path / "out" / "metrics.json").read_text(encoding="utf-8"))
        assert (metrics["num_records"], metrics["num_dropped"]) == (known, 2)
        again = ["evaluate", "--predictions", str(tmp_path / "out" / "predictions_given.jsonl"), "--dataset", str(data)]
        again += ["--output_dir", str(tmp_path / "again"), "--bootstrap_samples", "10", "--protocol", "given", *mapping]
        assert main(again) == 1
        assert "Pass unknown_held_out='drop'" in capsys.readouterr().err
        assert main([*again, "--unknown_held_out", "drop"]) == 0
        assert json.loads((tmp_path / "again" / "metrics.json").read_text(encoding="utf-8")) == metrics
        assert main(model_options(checkpoint, data, tmp_path / "x", "--unknown_held_out", "error", *mapping)) == 1

    def test_no_records_are_dropped(self, checkpoint, dataset, tmp_path) -> None:
        everything = [row for split in ("train", "validation", "test") for row in read(dataset / f"{split}.jsonl")]
        data = write(tmp_path / "all.jsonl", everything)
        assert main(model_options(checkpoint, data, tmp_path / "out")) == 0
        assert json.loads((tmp_path / "out" / "metrics.json").read_text(encoding="utf-8"))["num_dropped"] == 0

    def test_sentiment_of_a_comparison_is_checked_first(self, checkpoint, dataset, tmp_path, capsys) -> None:
        pytest.importorskip("vaderSentiment")
        rows = [
            {"user": row["user"], "item": row["item"], "reference": row["explanation"], "prediction": "x"}
            for row in read(dataset / "test.jsonl")
        ]
        more = ["--sentiment", "--compare", str(write(tmp_path / "other.jsonl", rows))]
        assert main(model_options(checkpoint, dataset, tmp_path / "out", *more)) == 1
        assert "other.jsonl: expected 'rating' in every line" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()

    def test_needs_data(self, checkpoint: Path, tmp_path: Path, capsys) -> None:
        assert main(["evaluate", "--model", str(checkpoint), "--output_dir", str(tmp_path)]) == 1
        assert "Pass --dataset" in capsys.readouterr().err

    def test_comparison_is_checked_before_anything_is_generated(self, checkpoint, dataset, tmp_path, capsys) -> None:
        other = write(tmp_path / "other.jsonl", ROWS)
        output = tmp_path / "out"
        assert main(model_options(checkpoint, dataset, output, "--compare", str(other))) == 1
        assert "other.jsonl, line 1: expected the user" in capsys.readouterr().err
        assert not output.exists()


def test_help(capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["evaluate", "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    for option in ("--predictions", "--profile", "--protocol", "--compare", "--bertscore_model", "--sentiment"):
        assert option in text
