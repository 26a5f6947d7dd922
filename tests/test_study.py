"""The study: its cells, each trained once however often it is interrupted, and tables worked out by hand."""

import dataclasses
import fcntl
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from references import TINY_MODEL

from gavamoe_hf import load_checkpoint
from gavamoe_hf.evaluation.evaluator import score_predictions
from gavamoe_hf.evaluation.predict import write_json_lines
from gavamoe_hf.evaluation.sparsity import sparsity_thirds
from gavamoe_hf.study import Cell, StudyConfig, cell_states, read_study_data, run_study, write_report
from gavamoe_hf.study import report as report_module
from gavamoe_hf.study import runner as runner_module
from gavamoe_hf.study.peers import compare_with_peer
from gavamoe_hf.study.report import Row, markdown_table, peer_test_table, study_tables, summarize

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "examples" / "reproduce_paper.py"
CONFIGURATIONS = sorted((ROOT / "examples" / "study").glob("*.yaml"))
FULL, BASE = "full_k3_alpha0.1_seed0", "base_k3_alpha0.1_seed0"


def make_config(folder, data, **options) -> StudyConfig:
    train = {
        **TINY_MODEL,
        "dataset": str(data),
        "vocab_size": 500,
        "shared_expert_intermediate_size": 0,
        "rating_bias_epochs": 1,
        "rating_autoencoder_learning_rates": [1e-3],
        "rating_autoencoder_epochs": 1,
        "rating_num_train_epochs": 1,
        "rating_refinement_epochs": 1,
        "num_train_epochs": 2,
        "per_device_train_batch_size": 32,
        "use_cpu": True,
        "disable_tqdm": True,
    }
    values = {"seeds": [0], "ablations": ["base"], "num_clusters": [], "alphas": [], **options}
    return StudyConfig(output_dir=str(folder), train={**train, **values.pop("train", {})}, **values)


@pytest.fixture(scope="module")
def data_folder(planted, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for split, records in planted.records.items():
        records.to_json(folder / f"{split}.jsonl")
    return folder


@pytest.fixture(scope="module")
def study(data_folder, tmp_path_factory) -> StudyConfig:
    """Two cells, finished."""
    config = make_config(tmp_path_factory.mktemp("study") / "out", data_folder)
    assert run_study(config, read_study_data(config)) == {}
    return config


@pytest.fixture
def fake_training(monkeypatch):
    """Cells that finish at once; the list of what was run."""
    ran = []

    def train(config, data, cell):
        ran.append(f"rating {cell.rating_name}")

    def run(config, data, cell):
        ran.append(cell.name)
        write_metrics(config, cell, {})

    monkeypatch.setattr(runner_module, "_train_shared_rating_model", train)
    monkeypatch.setattr(runner_module, "_run_cell", run)
    return ran


def write_metrics(config, cell, scores, num_parameters=1_000_000):
    folder = config.folder / "cells" / cell.name
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps({"num_parameters": num_parameters, "scores": scores}))


# Sparsity


def test_thirds_go_from_frequent_users_to_rare_ones():
    train = ["a"] * 5 + ["b"] * 3 + ["c"] * 3 + ["d"]
    #        0    1    2    3    4    5    6    7
    test = ["d", "b", "a", "c", "b", "a", "x", "c"]
    # a, a | b, b | c, c | d, x; of eight the first two parts have one more; b comes before c in the test split
    assert sparsity_thirds(train, test) == {"ds1": [1, 2, 5], "ds2": [3, 4, 7], "ds3": [0, 6]}


def test_a_cut_through_a_user_keeps_the_order_of_the_records():
    assert sparsity_thirds(["a", "a", "b"], ["b", "a", "a", "a", "a", "b"]) == {
        "ds1": [1, 2],
        "ds2": [3, 4],
        "ds3": [0, 5],
    }
    assert sparsity_thirds([], ["a"]) == {"ds1": [0], "ds2": [], "ds3": []}


# Configuration


def test_each_cell_occurs_once_however_many_tables_it_stands_in():
    config = StudyConfig(
        "out",
        {"dataset": "x"},
        seeds=[4, 7],
        ablations=["no_multi_gating", "base"],
        num_clusters=[2, 3],
        alphas=[0, 0.1],
    )
    of_a_seed = ["full_k3_alpha0.1", "no_multi_gating_k1_alpha0.1", "base_k3_alpha0.1", "full_k2_alpha0.1"]
    of_a_seed.append("full_k3_alpha0")
    assert [cell.name for cell in config.cells()] == [f"{name}_seed{seed}" for seed in (4, 7) for name in of_a_seed]
    assert {cell.rating_name for cell in config.cells() if cell.seed == 4} == {"k1_seed4", "k2_seed4", "k3_seed4"}
    other = StudyConfig("out", {"dataset": "x", "num_clusters": "4", "alpha": 0.5}, seeds=[0], ablations=[], alphas=[])
    assert [cell.name for cell in other.cells()][:2] == ["full_k4_alpha0.5_seed0", "full_k2_alpha0.5_seed0"]


def test_cells_differ_in_nothing_but_what_they_compare(tmp_path):
    # As PyYAML reads 1e-3
    config = make_config(tmp_path, "x", train={"learning_rate": "1e-3"})
    full = config.arguments(config.main_cell(3), tmp_path)
    for ablation in ("no_multi_gating", "no_fine_grained_experts", "base"):
        other = config.arguments(config.ablation_cell(3, ablation), tmp_path)
        changed = {
            option.name
            for one, two in zip(full, other, strict=True)
            for option in dataclasses.fields(one)
            if getattr(one, option.name) != getattr(two, option.name) and not option.name.startswith("_")
        }
        expected = {"ablation", "num_clusters"} if ablation == "no_multi_gating" else {"ablation"}
        assert changed - {"accelerator_config", "logging_dir"} == expected
    _, model_args, _, sft_args, _ = full
    assert (sft_args.learning_rate, sft_args.seed, sft_args.alpha, model_args.num_clusters) == (1e-3, 3, 0.1, "3")
    # Neither in the file nor the trainer's own default, but that of `gavamoe train` from scratch
    assert sft_args.weight_decay == 0.1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"ablation": []}, "expected a key of output_dir, train, .*, but got 'ablation'"),
        ({"output_dir": None}, "but output_dir is missing"),
        ({"train": {"hidden_size": 32}}, "Expected `train` as options of `gavamoe train` with at least `dataset`"),
        (
            {"train": {"dataset": "x", "hiden_size": 32}},
            "expected an option of `gavamoe train`.*, but got 'hiden_size'",
        ),
        ({"train": {"dataset": "x", "seed": 1}}, "that cells may share, but got 'seed'"),
        ({"train": {"dataset": "x", "num_clusters": "auto"}}, "`train: num_clusters` as a number, but got 'auto'"),
        ({"seeds": 3}, "Expected `seeds` as a list, but got 3"),
        ({"seeds": []}, "at least one of `seeds`"),
        ({"alphas": ["0.1"]}, "Expected `alphas` as a list of numbers, but got '0.1'"),
        ({"ablations": ["none"]}, "ablations: expected one of no_multi_gating, .*, but got 'none'"),
        ({"protocols": ["gold"]}, "protocols: expected one of given, predicted, but got 'gold'"),
        ({"peers": {"A": {"predictions": "a"}}}, "Expected peer 'A' with `predictions` and `protocol` alone"),
        ({"paper_dataset": "books"}, "paper_dataset: expected one of amazon, tripadvisor, yelp, but got 'books'"),
    ],
)
def test_refuses_configurations_that_no_study_can_be_made_of(tmp_path, values, message):
    whole = {"output_dir": "out", "train": {"dataset": "x"}, **values}
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump({name: value for name, value in whole.items() if value is not None}))
    with pytest.raises(ValueError, match=message):
        StudyConfig.from_yaml(path)


def test_refuses_a_file_that_is_no_configuration(tmp_path):
    path = tmp_path / "study.yaml"
    for text, message in (("[1", "expected YAML"), ("text", "expected a mapping of keys to values, but got str")):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            StudyConfig.from_yaml(path)


@pytest.mark.parametrize("path", CONFIGURATIONS, ids=lambda path: path.stem)
def test_configurations_that_are_shipped_are_whole(path, tmp_path):
    config = StudyConfig.from_yaml(path)
    variants = {cell.ablation for cell in config.cells()}
    assert variants == {"none", "no_multi_gating", "no_fine_grained_experts", "base"}
    assert {2, 3, 4, 5} <= {cell.num_clusters for cell in config.cells()}
    assert len({cell.alpha for cell in config.cells()}) >= 3
    config.train["use_cpu"] = True  # bf16 is refused without an accelerator
    data_args, _, _, sft_args, _ = config.arguments(config.cells()[1], tmp_path)
    assert data_args.dataset == config.train["dataset"] and sft_args.seed == config.seeds[0]


# A study of two cells


def test_finished_cells_leave_scores_and_predictions_and_no_weights(study, planted):
    assert cell_states(study) == {FULL: "done", BASE: "done"}
    test = planted.records["test"]
    for name in (FULL, BASE):
        folder = study.folder / "cells" / name
        files = ["metrics.json", "predictions_given.jsonl", "predictions_predicted.jsonl", "training_log.json"]
        assert sorted(path.name for path in folder.iterdir()) == files
        metrics = json.loads((folder / "metrics.json").read_text())
        thirds = sparsity_thirds(planted.records["train"]["user"], test["user"])
        for protocol in ("given", "predicted"):
            lines = (folder / f"predictions_{protocol}.jsonl").read_text().splitlines()
            rows = [json.loads(line) for line in lines]
            assert [row["user"] for row in rows] == list(test["user"])
            thirds_rows = [rows[row] for row in thirds["ds3"]]
            for part, part_rows in (("all", rows), ("ds3", thirds_rows)):
                expected = score_predictions(part_rows, protocol)
                expected = {key: expected[key] for key in expected["signatures"]}
                assert metrics["scores"][protocol][part] == pytest.approx(expected)
    assert not list(study.folder.rglob("checkpoints"))


def test_cells_of_a_seed_and_k_share_the_rating_model(study):
    assert [path.name for path in (study.folder / "rating_models").iterdir()] == ["k3_seed0"]
    predicted = []
    for name in (FULL, BASE):
        lines = (study.folder / "cells" / name / "predictions_given.jsonl").read_text().splitlines()
        predicted.append([json.loads(line)["predicted_rating"] for line in lines])
    # Stage 2 moves the rating model by less than a hundredth of a star here
    assert predicted[0] == pytest.approx(predicted[1], abs=0.01)


def test_a_second_run_trains_nothing(study, monkeypatch):
    for name in ("train_rating_model", "train_explanations", "predict_records"):
        monkeypatch.setattr(runner_module, name, None)
    before = {path: path.stat().st_mtime_ns for path in study.folder.rglob("*.json")}
    assert run_study(study, read_study_data(study)) == {}
    assert {path: path.stat().st_mtime_ns for path in study.folder.rglob("*.json")} == before


def test_a_peer_is_scored_as_the_models_are(study, tmp_path, data_folder):
    config = dataclasses.replace(study, output_dir=study.output_dir)
    predictions = study.folder / "cells" / BASE / "predictions_given.jsonl"
    config.peers = {"Peer": {"predictions": str(predictions), "protocol": "given"}}
    tables = write_report(config, read_study_data(config))
    peer = {row.part: row.scores for row in tables["sparsity"] if row.label == "Peer"}
    base = {row.part: row.scores for row in tables["sparsity"] if (row.label, row.protocol) == ("plain Llama", "given")}
    assert set(peer) == {"ds1", "ds2", "ds3"} and peer == base
    text = (study.folder / "study.md").read_text()
    assert "| Peer | given |" in text and "Not finished" not in text
    saved = json.loads((study.folder / "study.json").read_text())
    assert saved["cells"] == {"finished": 2, "missing": []}
    assert [row["label"] for row in saved["tables"]["main"]] == ["GaVaMoE", "GaVaMoE", "Peer"]

    rows = [json.loads(line) for line in predictions.read_text().splitlines()]
    for changed, message in (
        (rows[:-1], rf"expected the {len(rows)} records of the test split, but got {len(rows) - 1} lines"),
        ([*rows[:2], rows[3], rows[2], *rows[4:]], r"in line 3, but got .* Is it of another split\?"),
    ):
        path = tmp_path / "peer.jsonl"
        write_json_lines(path, changed)
        config.peers = {"Peer": {"predictions": str(path), "protocol": "given"}}
        with pytest.raises(ValueError, match=message):
            write_report(config, read_study_data(config))
    path.write_text("{\n")
    with pytest.raises(ValueError, match="expected one JSON object a line, but line 1"):
        write_report(config, read_study_data(config))


def test_models_are_tested_against_a_peer_on_the_same_records(study, tmp_path):
    data = read_study_data(study)
    own = study.folder / "cells" / FULL / "predictions_given.jsonl"
    rows = [json.loads(line) for line in own.read_text().splitlines()]
    write_json_lines(tmp_path / "peer.jsonl", [{**row, "prediction": row["reference"]} for row in rows])
    config = dataclasses.replace(
        study,
        peers={
            "Same": {"predictions": str(own), "protocol": "given"},
            "Truth": {"predictions": str(tmp_path / "peer.jsonl"), "protocol": "given"},
        },
    )
    same, truth = (compare_with_peer(config, data, name)[0] for name in ("Same", "Truth"))
    assert {test["difference"] for test in same.values()} == {0.0}
    given = json.loads((study.folder / "cells" / FULL / "metrics.json").read_text())["scores"]["given"]["all"]
    assert truth["rouge_l"]["difference"] == pytest.approx(given["rouge_l"] - 100.0)
    assert truth["rouge_l"]["p_value"] < 0.05 and truth["rouge_l"]["confidence_95"][1] < 0
    assert truth["rating_rmse"]["difference"] == 0.0

    write_report(config, data)
    assert "### GaVaMoE less Truth, given" in (study.folder / "study.md").read_text()
    saved = json.loads((study.folder / "study.json").read_text())["peer_tests"]
    assert saved["Truth"]["0"]["rouge_l"]["difference"] == truth["rouge_l"]["difference"]
    assert compare_with_peer(dataclasses.replace(config, protocols=["predicted"]), data, "Same") == {}


def test_paired_tests_as_a_table():
    def test(difference, interval, p):
        return {"difference": difference, "confidence_95": interval, "p_value": p}

    tests = {
        0: {"bleu_4": test(0.514, (0.1, 0.9), 0.0001), "rating_rmse": test(-0.0194, (-0.03, 0.01), 0.25)},
        2: {"bleu_4": test(-0.2, None, None)},
    }
    assert peer_test_table("Peer", "given", tests)[1:2] == ["### GaVaMoE less Peer, given"]
    assert peer_test_table("Peer", "given", tests)[5:] == [
        "| metric | seed 0 | seed 2 |",
        "|---|---|---|",
        "| RMSE, stars | -0.019 (-0.030 to +0.010), p 0.250 |  |",
        "| BLEU-4, % | +0.51 (+0.10 to +0.90), p < 0.001 | -0.20 |",
    ]
    assert peer_test_table("Peer", "given", {}) == []


def test_other_options_or_data_are_refused(study, planted, tmp_path):
    data = read_study_data(study)
    other = dataclasses.replace(study, train={**study.train, "num_train_epochs": 9})
    with pytest.raises(ValueError, match="num_train_epochs was 2, now 9"):
        run_study(other, data)
    # More cells are the same study, and so is other data in name alone
    run_study(
        dataclasses.replace(study, alphas=[0.4], train={**study.train, "dataset": "moved"}), data, only="alpha0.1"
    )
    with pytest.raises(ValueError, match=r"fit a cell such as full_k3_alpha0\.1_seed0, but 'seed9' fits none"):
        run_study(study, data, only="seed9")
    folder = tmp_path / "data"
    folder.mkdir()
    for split, records in planted.records.items():
        records.select(range(len(records) - (split == "test"))).to_json(folder / f"{split}.jsonl")
    other = dataclasses.replace(study, train={**study.train, "dataset": str(folder)})
    with pytest.raises(ValueError, match="sha256 was"):
        run_study(other, read_study_data(other))


@pytest.mark.slow
def test_a_killed_study_goes_on_to_the_same_scores(study, data_folder, tmp_path):
    config = make_config(tmp_path / "killed", data_folder, ablations=[])
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(dataclasses.asdict(config)))
    command = [sys.executable, str(SCRIPT), "--config", str(path), "--num_threads", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(runner_module.__file__).parents[2])}
    killed = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    checkpoints = config.folder / "cells" / FULL / "checkpoints" / "explanation"
    deadline = time.time() + 300
    while not list(checkpoints.glob("checkpoint-*/trainer_state.json")):
        assert killed.poll() is None and time.time() < deadline, killed.communicate()[0]
        time.sleep(0.02)
    assert cell_states(config) == {FULL: "running"}
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert cell_states(config) == {FULL: "begun"}

    stage_one = config.folder / "rating_models" / "k3_seed0" / "rating_model" / "model.safetensors"
    written = stage_one.stat().st_mtime_ns
    assert run_study(config, read_study_data(config)) == {}
    assert stage_one.stat().st_mtime_ns == written
    whole, found = (json.loads((c.folder / "cells" / FULL / "metrics.json").read_text()) for c in (study, config))
    for protocol in ("given", "predicted"):
        for part in ("all", "ds1", "ds2", "ds3"):
            expected = whole["scores"][protocol][part]
            assert found["scores"][protocol][part] == pytest.approx(expected, abs=1e-4), (protocol, part)


def test_keep_checkpoints_keeps_models_that_load(data_folder, tmp_path):
    options = {"ablations": [], "protocols": ["given"], "train": {"num_train_epochs": 1}}
    config = make_config(tmp_path / "out", data_folder, keep_checkpoints=True, **options)
    assert run_study(config, read_study_data(config)) == {}
    model, processor = load_checkpoint(str(config.folder / "cells" / FULL))
    assert model.explain(processor, user=processor.users[0], item=processor.items[0], do_sample=False)[0].explanation
    assert 0 < model.config.num_interactions == len(model.rating_model.interaction_items)
    assert list(json.loads((config.folder / "cells" / FULL / "metrics.json").read_text())["scores"]) == ["given"]


# Cells that fail, are chosen, or are another process's


def test_a_cell_that_fails_leaves_the_others_and_is_tried_again(
    study, data_folder, tmp_path, fake_training, monkeypatch
):
    config, data = make_config(tmp_path, data_folder), read_study_data(study)
    run = runner_module._run_cell

    def fail(config, data, cell):
        if cell.ablation == "none":
            raise RuntimeError("a cluster is empty")
        run(config, data, cell)

    monkeypatch.setattr(runner_module, "_run_cell", fail)
    assert run_study(config, data) == {FULL: "RuntimeError: a cluster is empty"}
    assert cell_states(config) == {FULL: "open", BASE: "done"}
    monkeypatch.setattr(runner_module, "_run_cell", run)
    assert run_study(config, data) == {}
    assert fake_training == ["rating k3_seed0", "rating k3_seed0", BASE, "rating k3_seed0", FULL]


def test_only_and_max_cells_choose(study, data_folder, tmp_path, fake_training):
    config = make_config(tmp_path, data_folder, seeds=[0, 1], num_clusters=[2])
    data = read_study_data(study)
    run_study(config, data, only="seed1", max_cells=2)
    cells = [name for name in fake_training if not name.startswith("rating")]
    assert cells == ["full_k3_alpha0.1_seed1", "base_k3_alpha0.1_seed1"]
    run_study(config, data, only="full.*seed1")
    assert fake_training[-1] == "full_k2_alpha0.1_seed1"
    assert sum(state == "done" for state in cell_states(config).values()) == 3


def hold(config, name):
    """Holds a lock as another process would: the system tells apart who has opened the file, not who runs."""
    folder = config.folder / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / f"{name}.lock", "a")  # noqa: SIM115 the lock lasts as long as the file is open
    fcntl.flock(file, fcntl.LOCK_EX)
    return file


def test_a_cell_of_another_process_is_left_to_it(study, data_folder, tmp_path, fake_training):
    config, data = make_config(tmp_path, data_folder), read_study_data(study)
    with hold(config, FULL):
        assert cell_states(config) == {FULL: "running", BASE: "open"}
        assert run_study(config, data) == {}
        assert fake_training == ["rating k3_seed0", BASE]
    run_study(config, data)
    assert fake_training[-1] == FULL


def test_a_cell_that_was_finished_in_the_meantime_is_not_run_again(
    study, data_folder, tmp_path, fake_training, monkeypatch
):
    config, data = make_config(tmp_path, data_folder, ablations=[]), read_study_data(study)
    is_done, calls = runner_module._is_done, []

    def finish_after_the_look(config, cell):
        calls.append(cell.name)
        if len(calls) > 1:
            return is_done(config, cell)
        write_metrics(config, cell, {})
        return False

    monkeypatch.setattr(runner_module, "_is_done", finish_after_the_look)
    assert run_study(config, data) == {}
    assert fake_training == [] and len(calls) > 1


def test_a_cell_waits_for_a_rating_model_that_is_being_trained(
    study, data_folder, tmp_path, fake_training, monkeypatch
):
    config, data = make_config(tmp_path, data_folder, num_clusters=[2]), read_study_data(study)
    lock = hold(config, "rating_k3_seed0")

    def finish(seconds):
        # Everything that does not need it has been run by now
        assert fake_training == ["rating k2_seed0", "full_k2_alpha0.1_seed0"]
        lock.close()

    monkeypatch.setattr(runner_module.time, "sleep", finish)
    assert run_study(config, data) == {}
    assert set(cell_states(config).values()) == {"done"}


def test_the_lock_of_a_process_ends_with_it(tmp_path):
    config = make_config(tmp_path, "x", ablations=[])
    launcher = (
        "import sys, time; sys.path[:0] = sys.argv[1:2]\n"
        "import fcntl\n"
        "file = open(sys.argv[2], 'a'); fcntl.flock(file, fcntl.LOCK_EX); print('held', flush=True); time.sleep(300)"
    )
    (tmp_path / "locks").mkdir()
    path = tmp_path / "locks" / f"{FULL}.lock"
    with subprocess.Popen([sys.executable, "-c", launcher, ".", str(path)], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"held\n"
        assert cell_states(config) == {FULL: "running"}
        process.kill()
    assert cell_states(config) == {FULL: "open"}


def test_two_processes_do_no_cell_twice(study, data_folder, tmp_path, monkeypatch):
    """The second starts, and looks for work, in the middle of each of the first one's cells."""
    config, data = make_config(tmp_path, data_folder, num_clusters=[2, 4]), read_study_data(study)
    ran, depth = [], []

    def run(config, data, cell):
        ran.append(cell.name)
        if not depth:
            depth.append(1)
            run_study(config, data, max_cells=1)
            depth.pop()
        write_metrics(config, cell, {})

    monkeypatch.setattr(runner_module, "_train_shared_rating_model", lambda *_: None)
    monkeypatch.setattr(runner_module, "_run_cell", run)
    assert run_study(config, data) == {}
    assert sorted(ran) == sorted(cell.name for cell in config.cells()) and len(ran) == 4


# Tables


def test_summary_is_mean_and_range():
    scores = [{"bleu_4": 1.0, "rating_rmse": 0.9}, {"bleu_4": 4.0}, {"bleu_4": 2.5, "unknown": 1.0}]
    assert summarize(scores) == {"bleu_4": {"mean": 2.5, "min": 1.0, "max": 4.0}}
    assert summarize([]) == {}


def parts(value, **others):
    """Scores under both protocols and all parts, told apart by tenths and hundredths."""
    return {
        protocol: {
            part: {"bleu_4": value + shift + place, **others}
            for part, place in (("all", 0.0), ("ds1", 0.01), ("ds2", 0.02), ("ds3", 0.03))
        }
        for protocol, shift in (("given", 0.0), ("predicted", 0.1))
    }


def means(rows, protocol="given"):
    return {(row.label, row.part): round(row.scores["bleu_4"]["mean"], 6) for row in rows if row.protocol == protocol}


def test_tables_by_hand(tmp_path):
    config = make_config(
        tmp_path, "x", seeds=[0, 1], ablations=["no_multi_gating", "base"], num_clusters=[2, 3], alphas=[0.1, 0.5]
    )
    config.peers = {"Peer": {"predictions": "peer.jsonl", "protocol": "predicted"}}
    config.paper_dataset = "yelp"
    for seed in (0, 1):
        write_metrics(config, config.main_cell(seed), parts(3 + seed), num_parameters=2_500_000)
        write_metrics(config, config.ablation_cell(seed, "no_multi_gating"), parts(5 + seed))
        write_metrics(config, Cell(seed, 2, 0.1), parts(7 + seed))
    write_metrics(config, Cell(1, 3, 0.5), parts(9))  # of one seed alone; `base` has not been run at all
    tables = study_tables(config, {"Peer": parts(1)["given"]})

    assert means(tables["main"]) == {("GaVaMoE", "all"): 3.5}
    assert means(tables["main"], "predicted") == {("GaVaMoE", "all"): 3.6, ("Peer", "all"): 1.0}
    assert means(tables["main"], "paper") == {("XRec (paper)", "all"): 1.601, ("GaVaMoE (paper)", "all"): 1.616}
    assert tables["main"][0].scores["bleu_4"] == {"mean": 3.5, "min": 3.0, "max": 4.0}
    assert means(tables["ablation"]) == {("GaVaMoE", "all"): 3.5, ("no multi-gating", "all"): 5.5}
    assert means(tables["gates"]) == {("2", "all"): 7.5, ("3", "all"): 3.5}
    assert means(tables["alpha"], "predicted") == {("0.1", "all"): 3.6, ("0.5", "all"): 9.1}
    assert [row.seeds for row in tables["alpha"]] == [2, 2, 1, 1]
    expected = {"GaVaMoE": (3.61, 3.62, 3.63), "no multi-gating": (5.61, 5.62, 5.63), "Peer": (1.01, 1.02, 1.03)}
    assert means(tables["sparsity"], "predicted") == {
        (label, f"ds{number}"): value for label, values in expected.items() for number, value in enumerate(values, 1)
    }


def test_markdown_shows_means_ranges_and_the_best_of_each_protocol():
    rows = [
        Row("A", "given", 2, summarize([{"bleu_4": 1.0, "rating_rmse": 0.5}, {"bleu_4": 2.0, "rating_rmse": 0.7}])),
        Row("A", "predicted", 1, summarize([{"bleu_4": 9.0}])),
        Row("B", "given", 1, summarize([{"bleu_4": 1.25, "rating_rmse": 0.55}]), num_parameters=1_250_000),
    ]
    assert markdown_table(rows, "model", ["rating_rmse", "bleu_4", "distinct_1"], with_sizes=True) == [
        "| model | protocol | parameters, M | RMSE, stars | BLEU-4, % |",
        "|---|---|---|---|---|",
        "| A | given |  | 0.600 (0.500 to 0.700) | **1.50** (1.00 to 2.00) |",
        "| B | given | 1.25 | **0.550** | 1.25 |",
        "| A | predicted |  |  | 9.00 |",
    ]
    assert markdown_table([], "model") == ["No cell is finished yet."]


def test_report_of_a_study_that_is_not_finished_says_so(study, planted):
    config = dataclasses.replace(study, paper_dataset="yelp", alphas=[0.5])
    write_report(config, read_study_data(config))
    text = (study.folder / "study.md").read_text()
    assert "Not finished: 1 of 3 cells (full_k3_alpha0.5_seed0)." in text
    assert "The paper's: 27,147, 20,266, 1,293,247 and 7,340." in text
    assert "| GaVaMoE (paper) | paper |" in text and "19.59" in text
    train = list(planted.records["train"]["user"])
    test = list(planted.records["test"]["user"])
    rarest = [train.count(test[row]) for row in sparsity_thirds(train, test)["ds3"]]
    assert f"ds3 {len(rarest)} records of users with {min(rarest)} to {max(rarest)}" in text


# Figures


def test_figures_show_means_with_their_range(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    from gavamoe_hf.study.figures import plot_ablations, plot_lines

    saved = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: (saved.append(figure), Path(path).touch()))
    scores = [summarize([{"bleu_4": low}, {"bleu_4": high}]) for low, high in ((1.0, 2.0), (4.0, 4.0))]
    rows = [Row(label, "given", 2, score) for label, score in zip(("2", "3"), scores, strict=True)]
    plot_lines(rows, {"bleu_4": "BLEU-4 (%)"}, tmp_path / "a.png", "label", "protocol", "Number of gates K")
    axis = saved[0].axes[0]
    (line,) = axis.containers
    points, _, (bars,) = line.lines
    assert points.get_xdata().tolist() == [0, 1] and points.get_ydata().tolist() == [1.5, 4.0]
    assert [segment[:, 1].tolist() for segment in bars.get_segments()] == [[1.0, 2.0], [4.0, 4.0]]
    assert [text.get_text() for text in axis.get_xticklabels()] == ["2", "3"]
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("Number of gates K", "BLEU-4 (%)")

    plot_ablations(rows, {"bleu_4": "BLEU-4 (%)"}, tmp_path / "b.png")
    assert [patch.get_height() for patch in saved[1].axes[0].patches] == [1.5, 4.0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.png"]
    with pytest.raises(ValueError, match="at least one row to draw"):
        plot_ablations([], {"bleu_4": "BLEU-4 (%)"}, tmp_path / "c.png")


def test_report_draws_every_figure(study, data_folder, monkeypatch):
    pytest.importorskip("matplotlib")
    # The rating model of K = 3 is there, so that there is a latent space to draw
    config = dataclasses.replace(study, num_clusters=[3], alphas=[0.1])
    write_report(config, read_study_data(config))
    figures = ["ablation.png", "gates.png", "alpha.png", "sparsity.png", "latent_space.png"]
    text = (study.folder / "study.md").read_text()
    for name in figures:
        assert (study.folder / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        assert f"]({name})" in text

    def fail(*arguments, **options):
        raise ImportError("no matplotlib")

    for name in ("plot_ablations", "plot_lines", "plot_latent_space"):
        monkeypatch.setattr(report_module, name, fail)
    write_report(config, read_study_data(config))
    assert ".png" not in (study.folder / "study.md").read_text()


# The script


def load_script():
    spec = importlib.util.spec_from_file_location("reproduce_paper", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_script_lists_cells_and_reports_failures(study, data_folder, tmp_path, fake_training, monkeypatch, capsys):
    script = load_script()
    path = tmp_path / "study.yaml"
    path.write_text(
        yaml.safe_dump(dataclasses.asdict(dataclasses.replace(study, train={**study.train, "dataset": "x"})))
    )
    options = {"config": str(path), "dataset": str(data_folder)}
    assert script.main(script.ScriptArguments(**options, dry_run=True)) == 0
    assert capsys.readouterr().out.splitlines() == [f"done     {FULL}", f"done     {BASE}", "2 of 2 done"]
    options["output_dir"] = str(tmp_path / "other")
    assert script.main(script.ScriptArguments(**options, dry_run=True, only="base")) == 0
    assert capsys.readouterr().out.splitlines() == [f"open     {BASE}", "0 of 1 done"]
    assert not (tmp_path / "other" / "cells").exists()

    def fail(*_):
        raise RuntimeError("a cluster is empty")

    monkeypatch.setattr(runner_module, "_run_cell", fail)
    assert script.main(script.ScriptArguments(**options, only="base")) == 1
    output = capsys.readouterr()
    assert f"failed: {BASE}: RuntimeError: a cluster is empty" in output.err
    assert "Not finished: 2 of 2 cells" in output.out
