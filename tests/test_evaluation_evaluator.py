"""Files scored end to end: the scores of `gavamoe train`, several profiles, a comparison, and the evaluate module."""

import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import evaluate
import numpy as np
import pytest
from huggingface_hub import RepoCard
from references import MUSICAL_INSTRUMENTS, library_scores

from gavamoe_hf.evaluation import (
    METRICS_MODULE,
    EvaluationOptions,
    evaluate_predictions,
    rating_errors,
    score_profile,
)
from gavamoe_hf.evaluation.bootstrap import resample_weights
from gavamoe_hf.evaluation.evaluator import markdown_table, score_predictions, write_evaluation
from gavamoe_hf.evaluation.prediction_files import Corpus

DATA = MUSICAL_INSTRUMENTS / "peer_predictions"

TEXTS = [
    (
        "These strings sound great on my guitar.",
        "These strings sound really great on my guitar.",
        ["strings"],
        5,
        4.6,
    ),
    ("The Cable is sturdy, and it's cheap!", "It is a sturdy cable and cheap.", ["cable", "price"], 4, 5.2),
    ("", "I like this tuner", ["tuner"], 3, 2.9),
    ("a good good good pedal", "A very good pedal for the price.", [], 1, 3.3),
    ("a good good good pedal", "This pedal is a good one.", ["pedal"], 2, 2.0),
]
KEYS = ("prediction", "reference", "feature", "rating", "predicted_rating")
TEXT_KEYS = {"bleu_1", "bleu_4", "rouge_1", "rouge_2", "rouge_l", "unique_sentence_ratio"}
FEATURE_KEYS = {"feature_match", "feature_coverage", "feature_diversity"}


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def rows() -> list[dict]:
    return [
        {"user": f"u{number}", "item": "i", **dict(zip(KEYS, row, strict=True))} for number, row in enumerate(TEXTS)
    ]


@pytest.fixture
def predictions(tmp_path: Path) -> Path:
    return write(tmp_path / "predictions.jsonl", rows())


def test_default_equals_the_libraries(predictions: Path) -> None:
    texts, references, features, ratings, predicted = (list(column) for column in zip(*TEXTS, strict=True))
    expected = {**rating_errors(predicted, ratings), **library_scores(texts, references, features)}
    result = evaluate_predictions(predictions)
    assert {key: result[key] for key in expected} == pytest.approx(expected, rel=1e-12)
    assert result["profile"] == "default" and result["protocol"] is None and result["num_records"] == 5
    assert set(result["signatures"]) == set(result["confidence_95"]) == {*expected, *FEATURE_KEYS}
    assert result["confidence_method"]["bleu_4"] == "bootstrap"
    assert result["confidence_method"]["distinct_2"] == "jackknife"


def test_profiles_side_by_side(predictions: Path) -> None:
    options = EvaluationOptions(profiles=["peter", "default", "gavamoe-released"], num_resamples=20)
    result = evaluate_predictions(predictions, options, protocol="given")
    assert result["profile"] == "peter" and set(result["profiles"]) == {"default", "gavamoe-released"}
    for name, block in {"peter": result, **result["profiles"]}.items():
        alone = evaluate_predictions(
            predictions, EvaluationOptions(profiles=[name], num_resamples=20), protocol="given"
        )
        assert {key: block[key] for key in alone} == alone
        assert TEXT_KEYS | FEATURE_KEYS | {"rating_rmse", "rating_mae"} <= set(block["signatures"])
    # The one above 5 is clipped to the file's range
    assert result["rating_mae"] < result["profiles"]["default"]["rating_mae"]


def test_without_optional_keys(tmp_path: Path) -> None:
    plain = [{key: row[key] for key in ("user", "item", "reference", "prediction")} for row in rows()]
    result = evaluate_predictions(write(tmp_path / "p.jsonl", plain))
    assert set(result["signatures"]) == TEXT_KEYS | {"distinct_1", "distinct_2"}


def test_one_record(tmp_path: Path) -> None:
    result = evaluate_predictions(write(tmp_path / "p.jsonl", rows()[:1]), EvaluationOptions(num_resamples=5))
    # One record says nothing of how much another would differ
    assert set(result["confidence_95"]) == set(result["signatures"]) and "feature_diversity" not in result
    assert set(result["confidence_95"].values()) == {None}
    assert f"| bleu_1 | {result['bleu_1']:.4f} |  |\n" in markdown_table(result)


def test_score_that_no_resample_has(tmp_path: Path) -> None:
    # The only resample of the two records draws one of them twice: there is no pair of different outputs in it
    seed = next(seed for seed in range(9) if np.concatenate(list(resample_weights(2, 1, seed))).max() == 2)
    path = write(tmp_path / "p.jsonl", rows()[:2])
    result = evaluate_predictions(path, EvaluationOptions(num_resamples=1, seed=seed), compare=path)
    assert result["feature_diversity"] == 0 and result["confidence_95"]["feature_diversity"] is None
    assert result["comparison"]["tests"]["feature_diversity"]["confidence_95"] is None
    json.dumps(result, allow_nan=False)
    # With many resamples, those that have the score all have the same
    assert evaluate_predictions(path)["confidence_95"]["feature_diversity"] is None


def test_comparison(predictions: Path, tmp_path: Path) -> None:
    other = write(tmp_path / "other.jsonl", [{**row, "prediction": row["reference"]} for row in rows()])
    result = evaluate_predictions(predictions, compare=other)
    comparison = result["comparison"]
    assert comparison["compared_with"] == str(other)
    assert comparison["scores"]["bleu_4"] == pytest.approx(100)
    assert comparison["tests"]["bleu_4"]["difference"] == pytest.approx(result["bleu_4"] - 100)
    assert comparison["tests"]["rating_mae"]["p_value"] == 1
    assert evaluate_predictions(predictions, compare=predictions)["comparison"]["tests"]["bleu_1"]["p_value"] == 1


def test_comparison_with_other_records(predictions: Path, tmp_path: Path) -> None:
    other = write(tmp_path / "other.jsonl", rows()[:4])
    with pytest.raises(ValueError, match=r"other\.jsonl ends before line 5"):
        evaluate_predictions(predictions, compare=other)


@pytest.mark.parametrize("without", ["rating", "feature", "predicted_rating"])
@pytest.mark.parametrize("swap", [False, True])
def test_comparison_of_files_with_different_keys(
    without: str, swap: bool, predictions: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    less = [{key: value for key, value in row.items() if key != without} for row in rows()]
    paths = [predictions, write(tmp_path / "other.jsonl", less)][:: -1 if swap else 1]
    options = EvaluationOptions(profiles=["peter"], num_resamples=20)
    result = evaluate_predictions(paths[0], options, compare=paths[1])
    left_out = FEATURE_KEYS if without == "feature" else {"rating_rmse", "rating_mae"}
    expected = (TEXT_KEYS | FEATURE_KEYS | {"rating_rmse", "rating_mae"}) - left_out
    assert set(result["signatures"]) == expected
    assert set(result["comparison"]["scores"]) == set(result["comparison"]["tests"]) == expected
    assert f"Scored without {without}, which only one of the two files has" in caplog.text


def test_comparison_of_sentiment_needs_ratings_in_both(predictions: Path, tmp_path: Path) -> None:
    less = write(tmp_path / "other.jsonl", [{**row, "rating": None} for row in rows()])
    with pytest.raises(ValueError, match=r"other\.jsonl: expected 'rating' in every line to compare the sentiment"):
        evaluate_predictions(predictions, EvaluationOptions(sentiment=len), compare=less)


@pytest.mark.parametrize(
    ("protocol", "other", "line"),
    [
        ("given", "given", "`, protocol given.\n"),
        (
            "given",
            "predicted",
            "`, protocol predicted. The protocols differ: so does what the systems were told of the records.\n",
        ),
        (None, "given", "`, protocol given. Whether both systems had the same protocol is not known.\n"),
        ("given", None, "`. Whether both systems had the same protocol is not known.\n"),
    ],
)
def test_protocols_of_a_comparison(protocol: str | None, other: str | None, line: str, predictions: Path) -> None:
    options = EvaluationOptions(num_resamples=5)
    result = evaluate_predictions(predictions, options, None, protocol, predictions, other)
    assert result["protocol"] == protocol and result["comparison"]["protocol"] == other
    assert f"Compared with `{predictions}{line}" in markdown_table(result)


def test_says_where_scores_are_of_the_file_alone(
    predictions: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = EvaluationOptions(profiles=["peter"], num_resamples=5)
    result = evaluate_predictions(predictions, options)
    # cable, pedal, price, strings, tuner; ratings 1 to 5
    assert "|features:file-5|" in result["signatures"]["feature_coverage"]
    assert "|clip:file:1-5|" in result["signatures"]["rating_mae"]
    note = "feature coverage counts the file's own features"
    assert note in markdown_table(result) and f"{predictions}: Without the data set, {note}" in caplog.text
    caplog.clear()
    # Two that match as the same tokens count once, and a blank one not at all
    corpus = Corpus({"cable", "price", "strings", "tuner", "pedal ", "pedal", " "}, (1, 5))
    result = evaluate_predictions(predictions, options, corpus)
    assert "|features:corpus-5|" in result["signatures"]["feature_coverage"]
    assert "|clip:1-5|" in result["signatures"]["rating_mae"]
    assert note not in markdown_table(result) and not caplog.records
    # Nothing that depends on it
    plain = [{key: row[key] for key in ("user", "item", "reference", "prediction")} for row in rows()]
    assert note not in markdown_table(evaluate_predictions(write(tmp_path / "q.jsonl", plain), options))
    assert not caplog.records


def test_table_says_what_is_not_covered(predictions: Path) -> None:
    table = markdown_table(evaluate_predictions(predictions, EvaluationOptions(num_resamples=5)))
    assert "\np-values are not corrected for the number of metrics. Intervals and test cover the draw of" in table


def test_sentiment_needs_ratings(tmp_path: Path) -> None:
    plain = [{key: row[key] for key in ("user", "item", "reference", "prediction")} for row in rows()]
    with pytest.raises(ValueError, match="expected 'rating' in every line to compare the sentiment with"):
        evaluate_predictions(write(tmp_path / "p.jsonl", plain), EvaluationOptions(sentiment=len))


def test_scores_of_a_run() -> None:
    texts, references, features, ratings, predicted = (list(column) for column in zip(*TEXTS, strict=True))
    result = score_predictions(rows(), "given")
    assert (result.pop("profile"), result.pop("protocol")) == ("default", "given")
    signatures = result.pop("signatures")
    expected = {**rating_errors(predicted, ratings), **library_scores(texts, references, features)}
    assert list(signatures) == list(result) == list(expected)
    assert result == pytest.approx(expected, rel=1e-12)
    assert all(f"profile:default|metric:{key}|" in signatures[key] for key in result)
    with pytest.raises(ValueError, match="at least one prediction to score, but got none"):
        score_predictions([], "given")


def test_written_files(predictions: Path, tmp_path: Path) -> None:
    other = write(tmp_path / "other.jsonl", [{**row, "prediction": "a"} for row in rows()])
    options = EvaluationOptions(profiles=["default", "peter"], num_resamples=20)
    result = evaluate_predictions(predictions, options, protocol="predicted", compare=other)
    write_evaluation(result, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "metrics.json").read_text(encoding="utf-8")) == result
    table = (tmp_path / "out" / "metrics.md").read_text(encoding="utf-8")
    assert table == markdown_table(result)
    assert "## Profile default, protocol predicted, 5 records" in table and "## Profile peter" in table
    lines = [line for line in table.splitlines() if line.startswith("| bleu_1 ")]
    lower, upper = result["confidence_95"]["bleu_1"]
    assert lines[0].startswith(f"| bleu_1 | {result['bleu_1']:.4f} | {lower:.4f} to {upper:.4f} | ")
    assert {line.count("|") for line in table.splitlines() if line.startswith("|")} == {8}
    assert result["signatures"]["rouge_l"] in table


def test_texts_are_not_kept(tmp_path: Path) -> None:
    # 20 texts of a megabyte of one word each: what is kept of them is counts
    row = {"user": "u", "item": "i", "reference": "a"}
    path = tmp_path / "p.jsonl"
    with open(path, "w", encoding="utf-8") as file:
        for number in range(20):
            file.write(json.dumps({**row, "prediction": "x" * 1_000_000 + str(number % 2)}) + "\n")
    tracemalloc.start()
    evaluate_predictions(path, EvaluationOptions(profiles=["peter"], num_resamples=5))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 15_000_000


class TestPeers:
    pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="the musical_instruments data is not on this machine")

    def test_known_figures(self) -> None:
        result = evaluate_predictions(DATA / "peter_plus.jsonl", compare=DATA / "peter.jsonl")
        other = result["comparison"]["scores"]
        assert [round(result[key], 2) for key in ("bleu_4", "feature_match")] == [1.95, 0.64]
        assert [round(result[key], 1) for key in ("rouge_l", "distinct_2")] == [18.3, 7.9]
        assert [round(other[key], digits) for key, digits in (("bleu_4", 2), ("rouge_l", 1), ("distinct_2", 1))] == [
            0.90,
            13.6,
            4.0,
        ]
        # The feature in the prompt makes PETER+ better in all of these
        for key in ("bleu_1", "bleu_4", "rouge_l", "distinct_2", "feature_match"):
            test = result["comparison"]["tests"][key]
            assert test["difference"] > 0 and test["confidence_95"][0] > 0 and test["p_value"] < 0.05


class TestModule:
    def test_equals_the_function(self) -> None:
        texts, references, features, ratings, predicted = (list(column) for column in zip(*TEXTS, strict=True))
        columns = {"features": features, "ratings": ratings, "predicted_ratings": predicted}
        for name in (None, "pepler"):
            metric = evaluate.load(METRICS_MODULE, name)
            scores = metric.compute(predictions=texts, references=references, **columns)
            options = EvaluationOptions(profiles=[name or "default"])
            assert scores == score_profile(texts, references, options, **columns)

    def test_batches(self) -> None:
        metric = evaluate.load(METRICS_MODULE, "peter")
        metric.add_batch(predictions=["a"], references=["a b"])
        metric.add(prediction="c", reference="c")
        assert metric.compute()["bleu_1"] == pytest.approx(score_profile(["a", "c"], ["a b", "c"])["bleu_1"])

    def test_unknown_configuration(self) -> None:
        with pytest.raises(ValueError, match=r"Expected a configuration among default, .* but got 'petr'"):
            evaluate.load(METRICS_MODULE, "petr")

    def test_fewer_predictions_than_references(self) -> None:
        with pytest.raises(ValueError, match="Mismatch in the number of predictions"):
            evaluate.load(METRICS_MODULE).compute(predictions=["a"], references=["a", "b"])

    def test_loads_in_a_fresh_process_without_a_network(self, tmp_path: Path) -> None:
        script = (
            "import socket, sys\n"
            "def refuse(*_, **__): raise OSError('no network here')\n"
            "socket.socket.connect = socket.getaddrinfo = refuse\n"
            "import evaluate\n"
            "metric = evaluate.load(sys.argv[1], 'gavamoe-released')\n"
            "print(metric.compute(predictions=['a b'], references=['a b'])['bleu_1'])\n"
        )
        environment = {"HF_HOME": str(tmp_path / "home"), "HF_MODULES_CACHE": str(tmp_path / "modules")}
        environment = {**os.environ, **environment, "HF_HUB_OFFLINE": "0"}
        process = subprocess.run(
            [sys.executable, "-c", script, METRICS_MODULE], capture_output=True, text=True, env=environment
        )
        assert process.returncode == 0, process.stderr
        assert float(process.stdout) == 100

    def test_is_a_space_of_evaluate(self) -> None:
        folder = Path(METRICS_MODULE)
        card = RepoCard.load(folder / "README.md")
        assert card.data.sdk == "gradio" and card.data.tags == ["evaluate", "metric"]
        assert (folder / card.data.app_file).is_file()
        assert (folder / "requirements.txt").read_text(encoding="utf-8").split() == ["gavamoe-hf[metrics]"]
        # Its example runs
        code = card.text.split("```python\n")[1].split("```")[0]
        exec(compile(code, "README.md", "exec"), {})
