"""The cluster report: every number by hand on a rating model whose posteriors are set, and the files that it leaves."""

import json
import logging
import math
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset, DatasetDict
from references import tiny_config

from gavamoe_hf import GaVaMoEProcessor, GaVaMoERatingModel
from gavamoe_hf.cli.main import main
from gavamoe_hf.evaluation import cluster_report as reports
from gavamoe_hf.evaluation import predict
from gavamoe_hf.evaluation.cluster_report import (
    TypicalMember,
    cluster_report,
    markdown_report,
    predict_pairs_of,
    write_cluster_report,
)
from gavamoe_hf.training import pipeline

# p(cluster 1) of each user's pairs, whatever the item but I3, which multiplies the odds by 81
PROBABILITY = {"U0": 0.1, "U1": 0.2, "U2": 0.9, "U3": 0.8}
ITEMS = ["I0", "I1", "I2", "I3"]

RECORDS = [
    ("U0", "I0", 1, ["sound"]),
    ("U0", "I1", 2, ["sound", "price"]),
    ("U0", "I2", 3, ["sound", "sound"]),
    ("U0", "I3", 5, ["price"]),
    ("U1", "I0", 2, []),
    ("U1", "I1", 2, ["sound"]),
    ("U1", "I2", 1, []),
    ("U2", "I0", 5, ["price"]),
    ("U2", "I1", 4, ["price"]),
    ("U2", "I3", 5, ["looks"]),
    ("U3", "I0", 4, ["sound"]),
]


def as_dataset(rows):
    names = ("user", "item", "rating", "feature", "explanation")
    return Dataset.from_list([dict(zip(names, (*row, "fine"), strict=True)) for row in rows])


def planted_rating_model(probability, num_clusters=2, odds_of_last_item=81.0):
    """The latent is a user's value plus an item's; the mixture stands at -1, 1 and, if there are more, far away."""
    config = tiny_config(
        num_users=len(probability), num_items=len(ITEMS), num_clusters=num_clusters, latent_size=1, vae_num_layers=1
    )
    model = GaVaMoERatingModel(config).eval()
    with torch.no_grad():
        for layer in model.layers:
            for linear in (layer.attention_output, layer.feed_forward_down):
                linear.weight.zero_()
                linear.bias.zero_()
        model.user_embeddings.weight.zero_()
        model.item_embeddings.weight.zero_()
        # Of N(z; -1, 1) and N(z; 1, 1) with equal weights, the odds are exp(2 z)
        odds = torch.tensor([p / (1 - p) for p in probability.values()])
        model.user_embeddings.weight[:, 0] = odds.log() / 2
        model.item_embeddings.weight[-1, 0] = math.log(odds_of_last_item) / 2
        model.mean_head.weight.zero_()
        model.mean_head.weight[0, 0] = model.mean_head.weight[0, config.vae_embedding_size] = 1.0
        means = [-1.0, 1.0, 1e3, 1e4]
        model.mixture.means.copy_(torch.tensor(means[:num_clusters])[:, None])
    return model


@pytest.fixture(scope="module")
def processor(tokenizer):
    return GaVaMoEProcessor(tokenizer, users=list(PROBABILITY), items=ITEMS)


@pytest.fixture(scope="module")
def rating_model():
    return planted_rating_model(PROBABILITY)


def names(members):
    return [member.name for member in members]


def test_every_number_by_hand(rating_model, processor):
    # U0's pair with I3 has odds 81 / 9, so that its cluster is 1; all other pairs are in their user's
    first, second = cluster_report(rating_model, processor, as_dataset(RECORDS), min_count=2)
    assert (first.cluster, first.num_pairs, first.num_users) == (0, 6, 2)
    assert (second.cluster, second.num_pairs, second.num_users) == (1, 5, 2)
    assert (first.share, second.share) == (6 / 11, 5 / 11)
    assert first.mean_rating == pytest.approx((1 + 2 + 3 + 2 + 2 + 1) / 6)
    assert second.mean_rating == pytest.approx((5 + 5 + 4 + 5 + 4) / 5)
    # U0 has 3 of 4 pairs in cluster 0, U1 all; U3 has a single pair, which says nothing
    assert first.user_stability == pytest.approx((0.75 + 1) / 2)
    assert second.user_stability == 1.0
    # U0: (0.9 + 0.9 + 0.9 + 0.1) / 4; U2: (0.9 + 0.9 + 729 / 730) / 3
    assert first.typical_users == [
        TypicalMember("U1", 0.8, 3, pytest.approx(5 / 3)),
        TypicalMember("U0", 0.7, 3, pytest.approx(2.0)),
    ]
    assert second.typical_users == [TypicalMember("U2", round((1.8 + 729 / 730) / 3, 3), 3, pytest.approx(14 / 3))]
    # Lift of I2 in cluster 0: (2 + 5 * 6/11) / ((2 + 5) * 6/11) = 52 / 42. I0 has 2 in each: below 1 in cluster 0
    # Of I2's 2 records 12/11 are expected there, give or take sqrt(2 * 6/11 * 5/11)
    assert first.typical_items == [
        TypicalMember("I2", round(52 / 42, 3), 2, 2.0, pytest.approx(10 / 60**0.5)),
        TypicalMember("I1", round(52 / 48, 3), 2, 2.0, pytest.approx(4 / 90**0.5)),
    ]
    assert second.typical_items == [
        TypicalMember("I3", round(47 / 35, 3), 2, 5.0, pytest.approx(12 / 60**0.5)),
        TypicalMember("I0", round(47 / 45, 3), 2, 4.5, pytest.approx(2 / 120**0.5)),
    ]
    # Features occur 5 times in each cluster (twice in one record counts once). sound: 4 and 1; price: 1 and 3
    assert first.typical_features == [TypicalMember("sound", 1.3, 4, 2.0, pytest.approx(1.5 / 1.25**0.5))]
    # looks has too few
    assert second.typical_features == [TypicalMember("price", 1.222, 3, pytest.approx(14 / 3), pytest.approx(1.0))]


def test_fewest_records_and_length_of_lists(rating_model, processor):
    records = as_dataset(RECORDS)
    _, second = cluster_report(rating_model, processor, records, min_count=1)
    assert names(second.typical_users) == ["U2", "U3"]
    assert set(names(second.typical_features)) == {"price", "looks"}
    _, second = cluster_report(rating_model, processor, records, min_count=4)
    assert second.typical_users == second.typical_items == second.typical_features == []
    first, _ = cluster_report(rating_model, processor, records, min_count=1, top_n=1)
    assert names(first.typical_users) == ["U1"] and names(first.typical_items) == ["I2"]
    for wrong in ({"top_n": 0}, {"min_count": 0}):
        with pytest.raises(ValueError, match="Expected `top_n` and `min_count` of at least 1, but got"):
            cluster_report(rating_model, processor, records, **wrong)


def test_equal_scores_go_by_count_then_id(tokenizer):
    # Posteriors that differ in the fourth decimal only
    probability = {"b": 0.99991, "a": 0.99990, "c": 0.99992, "d": 0.99993}
    processor = GaVaMoEProcessor(tokenizer, users=list(probability), items=ITEMS)
    model = planted_rating_model(probability)
    rows = [(user, item, 3, []) for user in "bacd" for item in ITEMS[: 3 if user == "c" else 2]]
    _, second = cluster_report(model, processor, as_dataset(rows), min_count=2)
    assert names(second.typical_users) == ["c", "a", "b", "d"]


def test_a_user_of_two_clusters_equally_is_in_the_one_of_the_higher_posterior(rating_model, processor):
    # U1: posterior of cluster 1 is 0.2 and 81 / 85: 0.58 on average. U0: 0.1 and 0.9: 0.5, so the lower index
    rows = [("U1", "I0", 3, []), ("U1", "I3", 3, []), ("U2", "I0", 3, [])]
    first, second = cluster_report(rating_model, processor, as_dataset(rows), min_count=1)
    assert (first.num_users, second.num_users) == (0, 2)
    assert first.user_stability is None and second.user_stability == 0.5
    assert first.typical_users == [] and names(second.typical_users) == ["U2", "U1"]


@pytest.mark.filterwarnings("error")
def test_empty_and_single_clusters(processor):
    records = as_dataset(RECORDS)
    *_, empty = cluster_report(planted_rating_model(PROBABILITY, num_clusters=3), processor, records)
    assert (empty.cluster, empty.num_pairs, empty.share, empty.num_users) == (2, 0, 0.0, 0)
    assert empty.mean_rating is empty.mean_predicted_rating is empty.user_stability is None
    assert empty.typical_users == empty.typical_items == empty.typical_features == []
    (only,) = cluster_report(planted_rating_model(PROBABILITY, num_clusters=1), processor, records, min_count=1)
    assert (only.num_pairs, only.share, only.num_users, only.user_stability) == (11, 1.0, 4, 1.0)
    # All posteriors are 1: the users with the most pairs; nothing is more common than elsewhere
    assert names(only.typical_users) == ["U0", "U1", "U2", "U3"]
    assert only.typical_items == only.typical_features == []


def test_clusters_are_gates_and_predictions_are_means(model, tokenizer):
    processor = GaVaMoEProcessor(
        tokenizer, users=[f"U{number}" for number in range(8)], items=[f"I{number}" for number in range(9)]
    )
    rows = [
        (user, item, 1 + (index * 7) % 5, []) for user in processor.users for index, item in enumerate(["I0", "I4"])
    ]
    report = cluster_report(model, processor, as_dataset(rows))
    assert report == cluster_report(model.rating_model, processor, as_dataset(rows))
    by_gate = [[] for _ in report]
    for user, item, *_ in rows:
        pair = processor.user_index(user), processor.item_index(item)
        by_gate[model.gate_index(*pair).item()].append(model.predict_rating(*pair).item())
    assert min(map(len, by_gate)) > 0
    for summary, predicted in zip(report, by_gate, strict=True):
        assert summary.num_pairs == len(predicted)
        assert summary.mean_predicted_rating == pytest.approx(sum(predicted) / len(predicted), abs=1e-5)


def test_predictions_in_chunks_are_the_same(rating_model, processor, monkeypatch):
    whole = predict_pairs_of(rating_model, processor, as_dataset(RECORDS))
    monkeypatch.setattr(predict, "_BATCH_SIZE", 4)
    chunked = predict_pairs_of(rating_model, processor, as_dataset(RECORDS))
    assert torch.equal(whole.cluster_posterior, chunked.cluster_posterior)
    assert whole.latent_mean.shape == (11, 1) and torch.equal(whole.latent_mean, chunked.latent_mean)


def test_refuses_what_cannot_be_reported(rating_model, processor):
    with pytest.raises(ValueError, match="Expected at least one record"):
        cluster_report(rating_model, processor, as_dataset(RECORDS).select([]))
    stranger = as_dataset([*RECORDS, ("U9", "I0", 3, [])])
    with pytest.raises(ValueError, match="users that the model knows, but 1 are not among its 4, such as 'U9'"):
        cluster_report(rating_model, processor, stranger)
    with pytest.raises(ValueError, match="items that the model knows, but 1 are not among its 4, such as 'I9'"):
        cluster_report(rating_model, processor, as_dataset([("U0", "I9", 3, [])]))
    broken = planted_rating_model(PROBABILITY)
    with torch.no_grad():
        broken.user_embeddings.weight[2, 0] = math.nan
    with pytest.raises(ValueError, match="those of 3 of 11 pairs are NaN"):
        cluster_report(broken, processor, as_dataset(RECORDS))


def table_rows(text):
    return [line for line in text.splitlines() if line.startswith("|")]


def test_markdown_has_the_numbers(processor):
    report = cluster_report(planted_rating_model(PROBABILITY, 3), processor, as_dataset(RECORDS), min_count=2)
    text = markdown_report(report, "validation")
    assert text.startswith("Clusters of the 11 pairs of the validation split\n")
    rows = table_rows(text)
    assert rows[2].startswith("| 0 | 6 | 54.5% | 2 | 0.88 | 1.83 | ")
    assert rows[4] == "| 2 | 0 | 0.0% | 0 | - | - | - |"
    assert rows[7] == (
        "| 0 | `U1` 0.80 (rated 1.7), `U0` 0.70 (rated 2.0) "
        "| `I2` 1.24 (z 1.3, rated 2.0), `I1` 1.08 (z 0.4, rated 2.0) "
        "| `sound` 1.30 (z 1.3, rated 2.0) |"
    )
    assert rows[9] == "| 2 | - | - | - |"
    assert "`U0`" not in markdown_report(report, top_n=1)


def test_markdown_survives_ids_of_any_text(rating_model, tokenizer):
    users = ["a|b", "`x`\n<b>", "c" * 60, "ok"]
    processor = GaVaMoEProcessor(tokenizer, users=users, items=ITEMS)
    rows = [(user, item, 3, []) for user in users for item in ITEMS[:3]]
    report = cluster_report(rating_model, processor, as_dataset(rows))
    text = markdown_report(report)
    assert r"`a\|b` 0" in text and "`'x' <b>` 0" in text and "`" + "c" * 39 + "…` 0" in text
    for row in table_rows(text)[-2:]:
        assert row.replace(r"\|", "").count("|") == 5
    assert {member.name for summary in report for member in summary.typical_users} == set(users)


def test_writes_both_files_whole(rating_model, processor, tmp_path):
    report = cluster_report(rating_model, processor, as_dataset(RECORDS), min_count=2)
    folder = tmp_path / "new" / "folder"
    for _ in range(2):
        write_cluster_report(report, folder, split="test")
    assert sorted(path.name for path in folder.iterdir()) == ["clusters.json", "clusters.md"]
    written = json.loads((folder / "clusters.json").read_text())
    assert written["split"] == "test"
    for summary, stored in zip(report, written["clusters"], strict=True):
        for kind in ("typical_users", "typical_items", "typical_features"):
            stored[kind] = [TypicalMember(**member) for member in stored[kind]]
        assert reports.ClusterSummary(**stored) == summary
    assert (folder / "clusters.md").read_text() == markdown_report(report, "test")


# The command


@pytest.fixture(scope="module")
def folders(processor, tmp_path_factory):
    """Rating models of two and three clusters, each with its processor, and a data set."""
    root = tmp_path_factory.mktemp("clusters")
    for num_clusters in (2, 3):
        planted_rating_model(PROBABILITY, num_clusters).save_pretrained(root / f"k{num_clusters}")
        processor.save_pretrained(str(root / f"k{num_clusters}"))
    (root / "data").mkdir()
    for split, rows in (("train", RECORDS), ("validation", RECORDS[:2]), ("test", RECORDS[-1:])):
        as_dataset(rows).to_json(root / "data" / f"{split}.jsonl")
    return root


def command(folders, *options, models=("k2",)):
    return main(
        ["clusters", "--model", *(str(folders / name) for name in models), "--dataset", str(folders / "data"), *options]
    )


def test_command_prints_the_report_and_writes_where_told(folders, tmp_path, capsys):
    assert command(folders) == 0
    printed = capsys.readouterr().out
    assert "Clusters of the 11 pairs of the train split" in printed
    assert command(folders, "--output_dir", str(tmp_path), "--no_plot") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clusters.json", "clusters.md"]
    assert (tmp_path / "clusters.md").read_text().strip() in printed
    assert command(folders, "--top_n", "1", "--min_count", "2", "--output_dir", str(tmp_path), "--no_plot") == 0
    written = json.loads((tmp_path / "clusters.json").read_text())
    typical = [written["clusters"][0][f"typical_{kind}"] for kind in ("users", "items", "features")]
    assert [[member["name"] for member in members] for members in typical] == [["U1"], ["I2"], ["sound"]]
    capsys.readouterr()
    assert command(folders, "--split", "validation") == 0
    assert "2 pairs of the validation split" in capsys.readouterr().out


def test_command_reports_on_whole_checkpoints(processor, folders, tmp_path, capsys):
    from gavamoe_hf import GaVaMoEForCausalLM
    from gavamoe_hf.training.pipeline import save_checkpoint

    rating_model = planted_rating_model(PROBABILITY)
    model = GaVaMoEForCausalLM(rating_model.config)
    model.rating_model.load_state_dict(rating_model.state_dict())
    save_checkpoint(model, processor, tmp_path)
    assert main(["clusters", "--model", str(tmp_path), "--dataset", str(folders / "data")]) == 0
    assert "| 0 | 6 | 54.5% | 2 | 0.88 | 1.83 |" in capsys.readouterr().out


def test_command_compares_models_in_one_plot(folders, tmp_path, capsys, monkeypatch):
    drawn = {}
    monkeypatch.setattr(
        "gavamoe_hf.plots.plot_latent_space",
        lambda panels, path, seed: drawn.update(panels=panels, path=path, seed=seed),
    )
    options = ["--model", str(folders / "k3"), "--output_dir", str(tmp_path), "--seed", "3"]
    assert command(folders, *options) == 0
    printed = capsys.readouterr().out
    assert printed.index("## k2") < printed.index("## k3")
    for name, count in (("k2", 2), ("k3", 3)):
        assert len(json.loads((tmp_path / name / "clusters.json").read_text())["clusters"]) == count
    assert list(drawn["panels"]) == ["K = 2", "K = 3"]
    assert drawn["path"] == tmp_path / "latent_space.png" and drawn["seed"] == 3
    latents, clusters = drawn["panels"]["K = 2"]
    assert latents.shape == (11, 1) and clusters.tolist() == [0, 0, 0, 1, 0, 0, 0, 1, 1, 1, 1]


def test_command_tells_models_of_one_name_and_k_apart(folders, tmp_path, monkeypatch, capsys):
    panels = {}
    monkeypatch.setattr("gavamoe_hf.plots.plot_latent_space", lambda drawn, path, seed: panels.update(drawn))
    other = shutil.copytree(folders / "k2", tmp_path / "other" / "k2")
    assert command(folders, "--model", str(other), "--output_dir", str(tmp_path / "out")) == 0
    written = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert len(written) == 2 and all(name.endswith("_k2") for name in written)
    assert sorted(panels) == [f"{name}, K = 2" for name in written]
    assert command(folders, "--model", str(folders / "k2")) == 1
    assert "Expected different models" in capsys.readouterr().err


def test_command_says_what_is_wrong(folders, tmp_path, capsys, monkeypatch):
    assert command(folders, models=["k9"]) == 1
    assert "there is no folder" in capsys.readouterr().err
    strange = tmp_path / "strange.jsonl"
    rows = [(user, item, 3, ["sound"]) for user in ("V0", "V1", "V2", "V3", "V4") for item in ITEMS]
    as_dataset(rows).to_json(strange)
    assert main(["clusters", "--model", str(folders / "k2"), "--dataset", str(strange)]) == 1
    assert "Expected records of users that the model knows" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert command(folders, "--output_dir", str(tmp_path / "out")) == 1
    assert 'pip install ".[plots]"' in capsys.readouterr().err
    assert (tmp_path / "out" / "clusters.md").is_file()


# At the end of a run


@pytest.fixture
def finished_run(processor, tmp_path, monkeypatch):
    """`run_training` with everything but its files and the cluster report taken out."""
    rating_model = planted_rating_model(PROBABILITY)
    model = SimpleNamespace(
        rating_model=rating_model,
        set_interactions=rating_model.set_interactions,
        config=rating_model.config,
        dtype=torch.float32,
        parameters=rating_model.parameters,
        to=rating_model.to,
    )
    records = DatasetDict({split: as_dataset(RECORDS) for split in ("train", "validation", "test")})
    monkeypatch.setattr(pipeline, "read_data", lambda args: (records, None))
    monkeypatch.setattr(pipeline, "build_processor", lambda *args: processor)
    monkeypatch.setattr(pipeline, "build_model", lambda *args: model)
    monkeypatch.setattr(pipeline, "untrained_model", lambda *args: None)
    monkeypatch.setattr(pipeline, "prepare_examples", lambda records, *args, **kwargs: records)
    monkeypatch.setattr(pipeline, "train_rating_model", lambda *args: None)
    monkeypatch.setattr(pipeline, "train_explanations", lambda model, *args: model)
    monkeypatch.setattr(pipeline, "save_checkpoint", lambda model, processor, folder: (folder / "config.json").touch())
    row = {"user": "U0", "item": "I0", "rating": 4.0, "feature": [], "prediction": "fine"}
    monkeypatch.setattr(pipeline, "evaluate_run", lambda *args, **kwargs: ({"bleu_4": 1.0}, [row]))

    def run(**options):
        data_args = pipeline.DataArguments("records", **options)
        sft_args = pipeline.GaVaMoESFTConfig(output_dir=str(tmp_path), use_cpu=True)
        return pipeline.run_training(data_args, pipeline.ModelArguments(), pipeline.RatingArguments(), sft_args)

    return run


RUN_FILES = {"config.json", "run.json", "metrics.json", "predictions_test.jsonl"}


def test_a_run_ends_with_the_report(finished_run, tmp_path):
    pytest.importorskip("matplotlib")
    assert finished_run() == {"bleu_4": 1.0}
    found = {path.name for path in tmp_path.iterdir()}
    reports = {"clusters.json", "clusters.md", "latent_space.png", "README.md", ".eval_results"}
    assert found == RUN_FILES | reports
    assert "![t-SNE" in (tmp_path / "README.md").read_text(encoding="utf-8")
    assert json.loads((tmp_path / "clusters.json").read_text())["clusters"][0]["num_pairs"] == 6


def test_a_run_survives_without_matplotlib(finished_run, tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with caplog.at_level(logging.WARNING, logger=pipeline.logger.name):
        assert finished_run() == {"bleu_4": 1.0}
    (line,) = [record.getMessage() for record in caplog.records if record.name == pipeline.logger.name]
    assert line.startswith("Left out latent_space.png: ") and 'pip install ".[plots]"' in line
    reports = {"clusters.json", "clusters.md", "README.md", ".eval_results"}
    assert {path.name for path in tmp_path.iterdir()} == RUN_FILES | reports


@pytest.mark.parametrize("step", ["cluster_report", "plot_latent_space"])
def test_a_run_is_complete_before_its_report_and_survives_it(finished_run, tmp_path, monkeypatch, caplog, step):
    there = set()

    def fail(*args, **kwargs):
        there.update(path.name for path in tmp_path.iterdir())
        raise RuntimeError("out of ink")

    monkeypatch.setattr(pipeline, step, fail)
    assert finished_run() == {"bleu_4": 1.0}
    assert there >= RUN_FILES
    missing = {"cluster_report": "clusters.json and clusters.md", "plot_latent_space": "latent_space.png"}[step]
    assert f"Left out {missing}: out of ink" in caplog.text


def test_overwriting_removes_the_reports(finished_run, tmp_path, monkeypatch):
    reports_of_old = ("clusters.json", "clusters.md", "latent_space.png")
    for name in (*reports_of_old, "run.json"):
        (tmp_path / name).write_text("old")

    def fail(*args, **kwargs):
        raise RuntimeError("stage 1 fails")

    monkeypatch.setattr(pipeline, "train_rating_model", fail)
    with pytest.raises(RuntimeError, match="stage 1 fails"):
        finished_run(overwrite_output_dir=True)
    assert not any((tmp_path / name).exists() for name in reports_of_old)
