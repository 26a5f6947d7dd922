"""The `gavamoe` command: options, messages, and what bad input gets before anything is trained."""

import json
import subprocess
import sys

import pytest
from references import tiny_run

from gavamoe_hf.cli.main import main
from gavamoe_hf.training.pipeline import save_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    model, processor = tiny_run()
    folder = tmp_path_factory.mktemp("run") / "checkpoint"
    folder.mkdir()
    save_checkpoint(model, processor, folder)
    return folder


def train_options(output, dataset="synthetic"):
    return ["train", "--dataset", str(dataset), "--output_dir", str(output), "--use_cpu"]


def test_usage(capsys):
    assert main(["--help"]) == 0
    assert "gavamoe COMMAND" in capsys.readouterr().out
    assert main([]) == 2
    assert main(["fly"]) == 2
    error = capsys.readouterr().err
    assert (
        "expected a command among prepare, train, explain, " in error
        and "clusters" in error
        and "but got 'fly'" in error
    )
    assert main(["--version"]) == 0


@pytest.mark.parametrize("command", ["train", "explain", "clusters"])
def test_every_option_has_help(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    expected = {
        "train": ["--alpha", "--num_clusters", "--rating_autoencoder_learning_rates", "--ablation", "--base_model"],
        "explain": ["--model", "--user", "--item", "--rating", "--features"],
        "clusters": ["--model", "--dataset", "--split", "--output_dir", "--no_plot"],
    }
    for option in expected[command]:
        assert option in text


def test_explain_prints_the_explanation(checkpoint, capsys):
    assert main(["explain", "--model", str(checkpoint), "--user", "user_003", "--item", "item_002", "--json"]) == 0
    explained = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert explained["user"] == "user_003" and explained["item"] == "item_002"
    assert 1 <= explained["predicted_rating"] <= 5
    assert sum(explained["cluster_posterior"]) == pytest.approx(1, abs=1e-5)
    options = ["--user", "user_003", "--item", "item_002", "--rating", "1", "--features", "tone"]
    assert main(["explain", "--model", str(checkpoint), *options]) == 0
    assert "features: tone" in capsys.readouterr().out


def test_explain_names_what_is_wrong(checkpoint, tmp_path, capsys):
    options = ["--user", "user_999", "--item", "item_002"]
    assert main(["explain", "--model", str(checkpoint), *options]) == 1
    assert "The user 'user_999' is not among the 12 known users" in capsys.readouterr().err
    assert main(["explain", "--model", str(tmp_path / "nothing"), *options]) == 1
    assert "there is no folder" in capsys.readouterr().err


def test_train_refuses_bad_data_before_it_touches_the_folder(tmp_path, capsys):
    data = tmp_path / "records.jsonl"
    data.write_text('{"user": "a", "item": "b", "rating": 9, "explanation": "fine"}\n')
    output = tmp_path / "run"
    assert main(train_options(output, data)) == 1
    message = capsys.readouterr().err
    assert "records.jsonl" in message and "rating" in message and "9" in message
    assert not output.exists()


def test_train_keeps_an_earlier_run(checkpoint, capsys):
    before = sorted(path.name for path in checkpoint.iterdir())
    assert main(train_options(checkpoint)) == 1
    assert "--overwrite_output_dir" in capsys.readouterr().err
    assert sorted(path.name for path in checkpoint.iterdir()) == before


def test_train_resumes_only_what_is_there(tmp_path, capsys):
    assert main([*train_options(tmp_path / "none"), "--resume_from_checkpoint", "true"]) == 1
    assert "Expected a run to resume" in capsys.readouterr().err


def test_overwriting_needs_good_data_first(checkpoint, tmp_path, capsys):
    broken = tmp_path / "broken.jsonl"
    broken.write_text("{")
    assert main([*train_options(checkpoint, broken), "--overwrite_output_dir"]) == 1
    assert (checkpoint / "model.safetensors").is_file()
    assert "broken.jsonl" in capsys.readouterr().err


def test_options_can_come_from_yaml(tmp_path, capsys):
    config = tmp_path / "run.yaml"
    config.write_text(f"dataset: {tmp_path / 'missing.csv'}\noutput_dir: {tmp_path / 'run'}\nuse_cpu: true\n")
    assert main(["train", "--config", str(config)]) == 1
    assert "missing.csv" in capsys.readouterr().err


def test_column_mapping_is_checked(tmp_path, capsys):
    assert main([*train_options(tmp_path / "run", tmp_path), "--column_mapping", "user"]) == 1
    assert "Expected --column_mapping as ours=theirs, but got 'user'" in capsys.readouterr().err


def test_command_is_installed():
    result = subprocess.run([sys.executable, "-m", "gavamoe_hf.cli.main"], capture_output=True, text=True, timeout=120)
    assert result.returncode == 2 and "gavamoe COMMAND" in result.stdout


def test_a_run_resumes_with_its_own_options_only(tmp_path):
    from gavamoe_hf.training import DataArguments, GaVaMoESFTConfig, ModelArguments, RatingArguments
    from gavamoe_hf.training.pipeline import _check_same_run, _described

    def described(**options):
        sft = GaVaMoESFTConfig(output_dir=str(tmp_path), use_cpu=True, **options)
        return _described(DataArguments("synthetic"), ModelArguments(), RatingArguments(), sft)

    (tmp_path / "run.json").write_text(json.dumps(described(learning_rate=1e-3)))
    _check_same_run(tmp_path, described(learning_rate=1e-3, resume_from_checkpoint="true", disable_tqdm=True))
    with pytest.raises(ValueError, match=r"learning_rate was 0\.001, now 0\.002"):
        _check_same_run(tmp_path, described(learning_rate=2e-3))
