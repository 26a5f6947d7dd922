"""The card of a checkpoint: what it says of a run, what it never says, that its code runs, and whose edits it keeps."""

import json
import logging
import re
import tomllib
from pathlib import Path

import pytest
import yaml
from datasets import Dataset, DatasetDict
from huggingface_hub import ModelCard, parse_eval_result_entries
from references import run_without_package, tiny_run

from gavamoe_hf import model_card as cards
from gavamoe_hf.cli.main import main as gavamoe
from gavamoe_hf.evaluation import EvaluationOptions, evaluate_predictions
from gavamoe_hf.evaluation.bert_scores import BERTSCORE_KEYS
from gavamoe_hf.model_card import is_unedited_card, model_card, write_model_card
from gavamoe_hf.training import pipeline
from gavamoe_hf.training.sft_config import GaVaMoESFTConfig

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = ROOT / "model_cards" / "quickstart" / "README.md"


def as_dataset(rows):
    return Dataset.from_list(
        [
            {"user": user, "item": item, "rating": float(rating), "feature": features, "explanation": text}
            for user, item, rating, features, text in rows
        ]
    )


# 4 of 5 records of train are of one item, and 10 items are known
RECORDS = DatasetDict(
    train=as_dataset(
        [
            ("secret_anna", "capo", 5, ["grip"], "holds well"),
            ("secret_anna", "capo", 5, ["grip"], "holds very well"),
            ("secret_bob", "capo", 4, [], "fine"),
            ("secret_bob", "capo", 1, ["price"], "not worth the price"),
            ("secret_bob", "strap", 3, [], "a strap is a strap"),
        ]
    ),
    validation=as_dataset([("secret_anna", "strap", 2, ["price"], "too dear")]),
    test=as_dataset([("secret_bob", "strap", 5, [], "one two three"), ("secret_bob", "capo", 5, ["grip"], "four")]),
)
METRICS = {
    "rating_rmse": 0.5,
    "rating_mae": 0.25,
    "bleu_4": 12.3456,
    "unique_sentence_ratio": 0.75,
    "baseline_mean_rmse": 0.625,
    "baseline_mean_mae": 0.125,
    "baseline_mf_rmse": 0.5001,
    "min_cluster_share": 0.25,
    "hr_10_full": 0.25,
    "baseline_popularity_hr_10_full": 0.5,
    "new_metric": 3.14159,
}


@pytest.fixture(scope="module")
def pair():
    return tiny_run()


@pytest.fixture
def card_of(pair, tmp_path):
    """The card of a run in a folder named checkpoint, with hand-made records and scores."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()

    def make(metrics=METRICS, records=RECORDS, training_args=None, **run_options):
        model, processor = pair
        run_options = {"dataset": "data/reviews.csv", **run_options}
        return model_card(model, processor, records, metrics, run_options, folder, training_args)

    make.folder = folder
    return make


def section(card, heading):
    return card.text.split(f"\n## {heading}\n")[1].split("\n## ")[0]


# What it says


def test_data(card_of):
    text = section(card_of(), "Data")
    assert "\nTrained on reviews.csv. Who wrote the texts, and on what terms" in text
    assert "The model knows 12 users and 10 items." in text
    # (2 + 3 + 1 + 4 + 5) / 5 words
    assert (
        "| train | 5 | 2 | 2 | 3.0 | 60% |\n| validation | 1 | 1 | 1 | 2.0 | 100% |\n| test | 2 | 1 | 2 | 2.0 | 50% |"
        in text
    )
    assert (
        "| rating | train | validation | test |\n| --- | --- | --- | --- |\n"
        "| 1 | 20.0% | 0.0% | 0.0% |\n| 2 | 0.0% | 100.0% | 0.0% |\n| 3 | 20.0% | 0.0% | 0.0% |\n"
        "| 4 | 20.0% | 0.0% | 0.0% |\n| 5 | 40.0% | 0.0% | 100.0% |\n"
    ) in text
    assert "The tenth of the items with the most records has 80% of the training records." in card_of().text


def test_metrics(card_of):
    text = section(card_of(), "Metrics")
    assert (
        "Test split, 2 records. Protocol `given`: the prompt states the sentiment\nof the record's own rating" in text
    )
    assert (
        "| metric | in `metrics.json` | value |\n| --- | --- | --- |\n"
        "| RMSE of the predicted rating, stars | `rating_rmse` | 0.500 |\n"
        "| MAE of the predicted rating, stars | `rating_mae` | 0.250 |\n"
        "| BLEU-4, % | `bleu_4` | 12.35 |\n"
        "| different explanations of all explanations, 0 to 1 | `unique_sentence_ratio` | 0.750 |\n"
        "| hit ratio at 10, among all items | `hr_10_full` | 0.250 |\n"
        "| new_metric | `new_metric` | 3.142 |\n\n"
    ) in text


def test_baselines_are_beside_and_the_best_of_each_is_bold(card_of):
    """Also where it is the baseline, and where two are as good as one can see."""
    assert (
        "| metric | this model | mean rating | matrix factorisation | popularity |\n| --- | --- | --- | --- | --- |\n"
        "| RMSE of the predicted rating, stars | **0.500** | 0.625 | **0.500** |  |\n"
        "| MAE of the predicted rating, stars | 0.250 | **0.125** |  |  |\n"
        "| hit ratio at 10, among all items | 0.250 |  |  | **0.500** |\n"
    ) in section(card_of(), "Metrics")


def test_signatures_and_intervals_where_they_are(card_of):
    signature = "nrefs:1|case:lc|tok:13a"
    said = {"profile": "default", "protocol": "predicted", "signatures": {"bleu_4": signature}}
    card = card_of({"bleu_4": 12.0, "rating_mae": 0.5, **said, "confidence_95": {"rating_mae": [0.4, 0.625]}})
    text = section(card, "Metrics")
    assert "Profile `default`. Protocol `predicted`: the prompt states\nthe sentiment of the predicted rating" in text
    assert (
        "| metric | in `metrics.json` | value | 95 % interval | signature |\n| --- | --- | --- | --- | --- |\n"
        "| BLEU-4, % | `bleu_4` | 12.00 |  | nrefs:1\\|case:lc\\|tok:13a |\n"
        "| MAE of the predicted rating, stars | `rating_mae` | 0.500 | 0.400 to 0.625 |  |\n"
    ) in text
    assert "Baselines" not in text
    bleu, mae = card.data.eval_results
    assert bleu.metric_args == {"protocol": "predicted", "profile": "default", "signature": signature}
    assert mae.metric_args == {"protocol": "predicted", "profile": "default"}


def test_result_of_evaluate(card_of, tmp_path):
    rows = [
        {"user": f"u{number}", "item": "i", "reference": "good grip", "prediction": text, "feature": ["grip"]}
        | {"rating": 4, "predicted_rating": 3.5 + number}
        for number, text in enumerate(("good grip", "a grip", "bad"))
    ]
    path = tmp_path / "predictions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = EvaluationOptions(num_resamples=50, sentiment=lambda text: float(text == "bad"))
    metrics = json.loads(json.dumps({**evaluate_predictions(path, options), "num_dropped": 1}))
    card = card_of(metrics)
    text = section(card, "Metrics")
    assert "Test split, 2 records. Profile `default`. Protocol not stated.\n" in text
    # Every row is of a score, and described
    keys = re.findall(r"^\| (.*?) \| `(\w+)` \| .* \|$", text, re.MULTILINE)
    assert [key for _, key in keys] == list(metrics["signatures"])
    assert {key for label, key in keys if label == key} == set() and len(keys) == 15
    assert {result.metric_name for result in card.data.eval_results} == {label for label, _ in keys}
    assert "protocol" not in card.data.eval_results[0].metric_args
    # Without an interval, as the features are of one file and all of them are named
    assert metrics["confidence_95"]["feature_coverage"] is None
    assert "`feature_coverage` | 1.000 |  | profile:default\\|metric:feature_coverage" in text
    assert all(f"{key}{end}" in cards._METRICS for key in BERTSCORE_KEYS for end in ("", "_std"))


def test_without_scores(card_of):
    card = card_of({})
    assert section(card, "Metrics").strip() == "Not measured."
    assert "model-index" not in card.data.to_dict()


def test_metadata_round_trip(card_of):
    card = card_of({"rating_rmse": 0.5, "rouge_l": float("nan"), "bleu_1": 1 / 3, "baseline_mean_rmse": 1.0})
    expected = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["gavamoe", "recommendation", "explainable-recommendation", "mixture-of-experts"],
        "model-index": [
            {
                "name": "checkpoint",
                "results": [
                    {
                        "task": {"type": "text-generation", "name": "Explainable recommendation"},
                        "dataset": {"name": "reviews.csv", "type": "reviews.csv", "split": "test"},
                        "metrics": [
                            {"type": "rmse", "value": 0.5, "name": "RMSE of the predicted rating, stars"},
                            {"type": "bleu", "value": 0.333333, "name": "BLEU-1, %"},
                        ],
                    }
                ],
            }
        ],
    }
    assert card.data.to_dict() == expected
    assert "License: not stated." in card.text
    assert write_model_card(card, card_of.folder)
    loaded = ModelCard.load(card_of.folder / "README.md")
    assert loaded.data.to_dict() == expected and loaded.data.eval_results == card.data.eval_results
    assert loaded.text.startswith(card.text.rstrip())


def test_what_the_run_names_on_the_hub(card_of, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = {"dataset": "someone/reviews", "base_model": "meta/llama", "hub_model_id": "me/explainer"}
    card = card_of(license="apache-2.0", language=["en", "de"], **options)
    data = card.data.to_dict()
    assert (data["datasets"], data["base_model"]) == (["someone/reviews"], "meta/llama")
    assert data["base_model_relation"] == "finetune"
    assert (data["license"], data["language"]) == ("apache-2.0", ["en", "de"])
    assert data["model-index"][0]["name"] == "explainer"
    assert data["model-index"][0]["results"][0]["dataset"]["type"] == "someone/reviews"
    assert "[someone/reviews](https://huggingface.co/datasets/someone/reviews). The data set's card" in card.text
    assert "Base model: [meta/llama](https://huggingface.co/meta/llama)." in card.text
    assert '\npath = "me/explainer"\n' in card.text and "\n# explainer\n" in card.text
    assert "License: apache-2.0." in card.text
    # The same names, but of folders that are there: the readers take these
    for name in ("someone/reviews", "meta/llama"):
        (tmp_path / name).mkdir(parents=True)
    card = card_of(**options)
    assert not {"datasets", "base_model", "base_model_relation"} & set(card.data.to_dict())
    assert "Trained on reviews. " in card.text and "Base model: llama." in card.text


def test_scores_in_the_hubs_own_format(card_of, tmp_path, monkeypatch):
    """Beside `model-index`, of data that is on the Hub alone; those of an earlier run do not stay."""
    monkeypatch.chdir(tmp_path)
    path = card_of.folder / cards.EVAL_RESULTS_FILE
    metrics = {"rating_rmse": 0.5, "bleu_4": 12.5, "protocol": "given", "profile": "default"}
    assert write_model_card(card_of(metrics, dataset="someone/reviews"), card_of.folder)
    entries = parse_eval_result_entries(yaml.safe_load(path.read_text()))
    assert [(entry.dataset_id, entry.task_id, entry.value) for entry in entries] == [
        ("someone/reviews", "rating_rmse", 0.5),
        ("someone/reviews", "bleu_4", 12.5),
    ]
    assert {entry.notes for entry in entries} == {"protocol: given; profile: default"}
    assert write_model_card(card_of(metrics), card_of.folder) and not path.exists()


def test_a_license_of_its_own(card_of):
    card = card_of(license="other", license_name="house", license_link="https://example.com/terms")
    data = card.data.to_dict()
    assert (data["license"], data["license_name"], data["license_link"]) == (
        *("other", "house"),
        "https://example.com/terms",
    )
    assert "License: house (https&#58;//example.com/terms)." in card.text
    for options in ({"license": "other"}, {"license": "mit", "license_name": "house"}, {"license_link": "LICENSE"}):
        with pytest.raises(ValueError, match=r"Expected `license_name`, .* with the license `other`"):
            pipeline.DataArguments(dataset="synthetic", **options)


def test_examples_of_what_it_says(card_of, pair):
    """In the widget, without the user; each text once, and no longer than it is read."""
    said = [("secret", "fine grip"), ("secret", "fine grip"), ("secret", ""), ("secret", "x" * 900), ("secret", "c")]
    rows = [
        {"user": user, "item": "capo", "rating": 4.0, "feature": ["grip"], "prediction": text} for user, text in said
    ]
    rows[3] |= {"feature": [], "rating": 1.0}
    lines = "".join(json.dumps(row) + "\n" for row in [*rows, rows[0]])
    (card_of.folder / "predictions_test.jsonl").write_text(lines)
    widget = card_of().data.to_dict()["widget"]
    assert [example["output"]["text"] for example in widget] == ["fine grip", "x" * 400, "c"]
    assert "a positive experience" in widget[0]["text"] and "grip" in widget[0]["text"]
    assert "a negative experience" in widget[1]["text"] and "recommending capo to the user" in widget[1]["text"]
    assert "secret" not in str(card_of())


def test_training(card_of):
    log = [{"loss": 9.0, "epoch": 0.5}]
    for epoch in range(1, 8):
        # The second epoch is the best
        log.append({"loss": 1 / epoch, "epoch": epoch - 0.1})
        log.append({"eval_loss": 2.0 + epoch, "eval_nll": abs(epoch - 2) + 0.5, "epoch": float(epoch)})
    log.append({"train_runtime": 5400.0, "epoch": 7.0})
    (card_of.folder / "training_log.json").write_text(json.dumps(log))
    args = GaVaMoESFTConfig(str(card_of.folder), use_cpu=True, learning_rate=0.002, alpha=0.25, num_train_epochs=7)
    card = card_of(training_args=args, rating_autoencoder_learning_rates=[0.1, 0.2], lora_r=4, num_clusters="auto")
    text = section(card, "Training")
    assert re.search(
        r"^Hardware: \d+ .*\. Hours of stage 2, from where it was last resumed: 1\.5\.$", text, re.MULTILINE
    )
    assert (
        "| epoch | training loss | validation loss | NLL of a token | token accuracy |\n"
        "| --- | --- | --- | --- | --- |\n"
        "| 2 (kept) | 0.5000 | 4.0000 | 0.5000 | - |\n| 3 | 0.3333 | 5.0000 | 1.5000 | - |\n"
    ) in text
    assert text.count("(kept)") == 1 and text.count(" | - |\n") == 6
    for row in (
        "clusters, which are the gates | 3, chosen by silhouette",
        "experts a layer, used by each token | 4, 2",
        "width of an expert, of the shared one | 16, none",
        "weight of the negative ELBO in stage 2, alpha | 0.25",
        "weight of the KL divergence, beta | 0.01",
        "`learning_rate` | 0.002",
        "`lr_scheduler_type` | linear",
        "`rating_autoencoder_learning_rates` | 0.1, 0.2",
        "`lora_r` | 4",
    ):
        assert f"| {row} |\n" in text
    assert "max_steps" not in text and "Made with gavamoe-hf " in text
    # What run.json says, where it is all that there is
    assert "| `learning_rate` | 0.5 |" in card_of(learning_rate=0.5).text


def test_clusters(card_of):
    def member(name, score):
        return {"name": name, "score": score, "num_pairs": 4, "mean_rating": 4.0, "z_score": 2.0}

    cluster = {"cluster": 0, "num_pairs": 5, "share": 0.625, "num_users": 2, "user_stability": 1.0, "mean_rating": 3.6}
    typical = {
        "typical_users": [member("secret_anna", 0.9)],
        "typical_items": [member(name, 1.5) for name in ("capo", "strap", "reed", "fourth")],
        "typical_features": [],
    }
    empty = {**cluster, "cluster": 1, "share": 0.0, "num_users": 0, "mean_rating": None}
    report = {"split": "train", "clusters": [{**cluster, **typical}, {**empty, **typical, "typical_items": []}]}
    assert "The smallest cluster holds 25.0% of the training pairs." in section(card_of(), "Clusters")
    (card_of.folder / "clusters.json").write_text(json.dumps(report))
    text = section(card_of(), "Clusters")
    assert (
        "| 0 | 62.5% | 2 | 3.60 | capo (1.50), strap (1.50), reed (1.50) | - |\n| 1 | 0.0% | 0 | - | - | - |\n"
    ) in text
    assert "secret" not in text and "smallest cluster" not in text and "latent_space.png" not in text
    (card_of.folder / "latent_space.png").touch()
    assert "](latent_space.png)\n" in section(card_of(), "Clusters")


# What it never says


HOSTILE = (
    "<script>alert(1)</script> | `x` [a](javascript:b) **b** $x$ &lt; \\| www.evil.com https://evil.com _i_\n# h\u202e"
)


def test_markup_is_text():
    text = cards._text(HOSTILE, width=None)
    assert text == (
        "&#60;script&#62;alert(1)&#60;/script&#62; \\| &#96;x&#96; &#91;a&#93;(javascript:b) &#42;&#42;b&#42;&#42; "
        "&#36;x&#36; &#38;lt; &#92;\\| www&#46;evil.com https&#58;//evil.com &#95;i&#95; # h"
    )
    assert cards._text("fender_jazz-bass 4.5 (new)") == "fender_jazz-bass 4.5 (new)"
    assert cards._text("x" * 50) == "x" * 39 + "…"


def test_names_from_data_are_no_markup(card_of, tmp_path):
    clusters = {"cluster": 0, "share": 1.0, "num_users": 1, "mean_rating": 1.0, "typical_features": []}
    clusters["typical_items"] = [{"name": name, "score": 2.0} for name in ("</td><b>", "a|b", "`c`")]
    (card_of.folder / "clusters.json").write_text(json.dumps({"clusters": [clusters]}))
    options = {"dataset": str(tmp_path / "<img src=x>|.csv"), "base_model": "x/`<b>`\n# y", "ablation": "<i>"}
    card = card_of({"bleu_4": 1.0, "<u>": 2.0}, license="mit\n---\n<u>: [x", **options)
    body = re.sub(r"<!--.*?-->", "", str(card))
    assert not re.search(r"<(?!https:)/?[a-z]", body.split("\n---\n", 1)[1].replace("`<u>`", ""))
    assert "| &#60;/td&#62;&#60;b&#62; (2.00), a\\|b (2.00), &#96;c&#96; (2.00) | - |" in card.text
    # Not even where YAML would end
    assert ModelCard(str(card)).data.to_dict() == card.data.to_dict()
    assert card.data.license == "mit\n---\n<u>: [x"
    assert card.data.eval_results[0].dataset_name == "<img src=x>|.csv"


def test_no_paths_tokens_or_users(card_of, pair, tmp_path):
    options = {"dataset": str(tmp_path / "reviews.csv"), "base_model": str(tmp_path / "base")}
    args = GaVaMoESFTConfig(str(card_of.folder), use_cpu=True, hub_token="hf_secret")
    content = str(card_of(training_args=args, hub_token="hf_secret", run_name=str(tmp_path), **options))
    assert "reviews.csv" in content and "Base model: base." in content
    for hidden in (str(tmp_path), "secret", *pair[1].users):
        assert hidden not in content, hidden


# A run


@pytest.fixture(scope="module")
def finished(planted, tmp_path_factory):
    """Folder of a whole run on planted records, with a name that is not that of any module."""
    folder = tmp_path_factory.mktemp("run")
    data = folder / "planted"
    data.mkdir()
    for split, records in planted.records.items():
        records.to_json(data / f"{split}.jsonl")
    planted.truth.to_json(data / "truth.json")
    options = (
        f"train --dataset {data} --output_dir {folder / 'my-run'} --license mit --language en --use_cpu true "
        "--hidden_size 32 --num_hidden_layers 1 --num_attention_heads 2 --moe_intermediate_size 16 --num_experts 4 "
        "--vocab_size 500 --rating_autoencoder_learning_rates 1e-3 --rating_autoencoder_epochs 1 "
        "--rating_num_train_epochs 1 --num_train_epochs 2 --logging_steps 2 --disable_tqdm true"
    )
    assert gavamoe(options.split()) == 0
    return folder / "my-run"


def test_a_run_leaves_its_card(finished, planted):
    path = finished / "README.md"
    card, metrics = ModelCard.load(path), json.loads((finished / "metrics.json").read_text())
    assert is_unedited_card(path)
    assert (card.data.license, card.data.language) == ("mit", ["en"])
    found = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert found["BLEU-4, %"] == pytest.approx(metrics["bleu_4"], abs=1e-6)
    described = {"min_cluster_share", "profile", "protocol", "signatures"}
    scores = {key for key in metrics if not key.startswith("baseline_")} - described
    assert (metrics["profile"], metrics["protocol"]) == ("default", "given")
    assert set(metrics["signatures"]) < scores and len(metrics["signatures"]) >= 11
    bleu = next(result for result in card.data.eval_results if result.metric_name == "BLEU-4, %")
    how = {"protocol": "given", "profile": "default"}
    assert bleu.metric_args == {**how, "signature": metrics["signatures"]["bleu_4"]}
    assert len(found) == len(scores)
    # None of what a run measures is without a description
    assert scores <= set(cards._METRICS)
    for text in ("Trained on planted.", "| train | 1", "| epoch |", "(kept)", "| this model |", "## Citation"):
        assert text in card.text
    shown = set(re.findall(r"\w+", card.text))
    assert not shown & set(planted.records["train"]["user"])
    assert "{{" not in card.text and "{%" not in card.text and "| None" not in card.text


def test_the_snippet_runs_in_the_folder_without_the_package(finished, tmp_path):
    text = (finished / "README.md").read_text(encoding="utf-8")
    (snippet,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    # It is the first section, and names the versions that it needs
    assert text.split("\n## ")[1].startswith("How to use\n")
    needs = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    (floor,) = [need.partition(",")[0] for need in needs if need.startswith("transformers")]
    assert f'`pip install torch "{floor}"`' in text
    output = run_without_package(snippet, modules=tmp_path, cwd=finished)
    assert re.search(r"^predicted rating [1-5]\.\d, cluster [0-2]$", output, re.MULTILINE)


@pytest.fixture
def leave(pair, tmp_path, caplog):
    """`leave_model_card` of a run in `tmp_path`, and what it logs."""

    def run(**metrics):
        caplog.clear()
        args = GaVaMoESFTConfig(str(tmp_path), use_cpu=True)
        with caplog.at_level(logging.WARNING, logger=pipeline.logger.name):
            pipeline.leave_model_card(*pair, RECORDS, metrics, {"dataset": "reviews.csv"}, args)
        return [record.getMessage() for record in caplog.records if record.name == pipeline.logger.name]

    return run


def test_a_card_that_was_edited_is_kept(leave, tmp_path):
    path = tmp_path / "README.md"
    assert leave(bleu_4=1.0) == [] and "| 1.00 |" in path.read_text()
    # As the run left it: replaced
    assert leave(bleu_4=2.0) == [] and "| 2.00 |" in path.read_text()
    made = path.read_text()
    refused = ["Left out README.md: the folder has one that somebody wrote or edited"]
    for edited in (made.replace("# ", "# My ", 1), made + "More.\n", "# Written before the run\n", "", made[:-80]):
        path.write_text(edited)
        assert leave(bleu_4=3.0) == refused
        pipeline._clear(tmp_path)
        assert path.read_text() == edited
    path.write_bytes(b"\xff\xfe")
    assert leave(bleu_4=3.0) == refused and path.read_bytes() == b"\xff\xfe"
    path.write_text(made)
    pipeline._clear(tmp_path)
    assert not path.exists()


def test_a_run_survives_its_card(leave, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("out of ink")

    monkeypatch.setattr(pipeline, "write_model_card", fail)
    assert leave(bleu_4=1.0) == ["Left out README.md: out of ink"]
    (tmp_path / "clusters.json").write_text("{")
    monkeypatch.undo()
    (line,) = leave(bleu_4=1.0)
    assert line.startswith("Left out README.md: ") and not (tmp_path / "README.md").exists()


# The repository


def test_the_template_is_one_and_is_installed():
    assert (ROOT / "model_cards" / "template.md").read_text() == cards.TEMPLATE.read_text()
    package = ROOT / "src" / "gavamoe_hf"
    shipped = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["gavamoe_hf"]
    assert cards.TEMPLATE.name in shipped and all(list(package.glob(name)) for name in shipped)


def test_citation_is_that_of_the_readme():
    pattern = re.compile(r"```bibtex\n.*?```", re.DOTALL)
    assert pattern.findall(cards.TEMPLATE.read_text()) == pattern.findall((ROOT / "README.md").read_text())


def words(text):
    """Lines that are the same whatever was measured."""
    lines = text.split("\n# ", 1)[1].splitlines()[1:]
    return [line for line in lines if line and not line.startswith(("| `", "<!--")) and not re.search(r"\d", line)]


def test_the_shipped_card_is_what_the_code_writes(finished, pair, planted):
    metrics = json.loads((finished / "metrics.json").read_text())
    args = GaVaMoESFTConfig(str(finished), use_cpu=True)
    # matplotlib may not be here, but was there
    (finished / "latent_space.png").touch()
    card = model_card(*pair, planted.records, metrics, {"dataset": "synthetic"}, finished, args)
    shipped = ModelCard.load(SHIPPED)
    assert is_unedited_card(SHIPPED)
    assert words(str(shipped)) == words(str(card))
    assert len(words(str(card))) > 50
    names = [[(r.metric_type, r.metric_name, r.dataset_name) for r in c.data.eval_results] for c in (shipped, card)]
    assert names[0] == names[1]
