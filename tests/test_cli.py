"""The `gavamoe` command: options, messages, and what bad input gets before anything is trained."""

import json
import re
import subprocess
import sys

import pytest
from datasets import Dataset
from references import TINY_MODEL, tiny_run

from gavamoe_hf import GaVaMoEProcessor
from gavamoe_hf.cli.arguments import CommandParser
from gavamoe_hf.cli.main import main
from gavamoe_hf.data import load_records
from gavamoe_hf.training.building import ModelArguments, build_model, build_processor
from gavamoe_hf.training.lora import LoraArguments
from gavamoe_hf.training.pipeline import DataArguments, RatingArguments, save_checkpoint
from gavamoe_hf.training.sft_config import GaVaMoESFTConfig
from gavamoe_hf.training.summary import run_summary


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
    defaults = {"seed": 42, "learning_rate": 3e-5}
    same = described(learning_rate=1e-3, resume_from_checkpoint="true", disable_tqdm=True)
    _check_same_run(tmp_path, same, defaults)
    with pytest.raises(ValueError, match=r"learning_rate was 0\.001, now 0\.002"):
        _check_same_run(tmp_path, described(learning_rate=2e-3), defaults)
    # What is not described has its default
    with pytest.raises(ValueError, match=r"learning_rate was 0\.001, now 3e-05"):
        _check_same_run(tmp_path, described(), defaults)


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("explain", ["--user", "-0G7kq_A", "--item", "item_005"]),
        ("explain", ["--user", "user_003", "--item", "--0G7"]),
        ("explain", ["--user=-0G7kq_A", "--item=item_005"]),
        ("recommend", ["--user", "-hello", "--top_k", "1"]),
        ("recommend", ["--user", "user_003", "--exclude", "item_001", "-0G7kq_A"]),
    ],
)
def test_ids_that_begin_with_a_dash(checkpoint, capsys, command, options):
    """As many of Yelp's and of YouTube's do."""
    assert main([command, "--model", str(checkpoint), *options]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    dashed = next(part.split("=")[-1] for part in options if re.match(r"(--\w+=)?-(0|h|-0)", part))
    assert f"{dashed!r} is not among the" in error and "None" not in error


def test_wrong_options_are_told_shortly(checkpoint, capsys):
    """What is missing or not known, and the nearest that is, instead of pages of usage."""
    for argv, message in (
        (["explain", "--user", "a"], "the following arguments are required: --model"),
        (["explain", "--model", "m", "--usr", "a"], "unknown option --usr. Did you mean --user?"),
        (["recommend", "--model", "m", "--exclude", "a", "--topk", "3"], "Did you mean --top_k?"),
        (["train", "--output_dir", "out"], "the following arguments are required: --dataset"),
        (["train", "--dataset", "d", "--output_dir", "o", "--learningrate", "1"], "Did you mean --learning_rate?"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(argv)
        error = capsys.readouterr().err
        assert stopped.value.code == 2 and message in error and len(error.splitlines()) == 2
    assert main(["explian"]) == 2
    assert "Did you mean explain?" in capsys.readouterr().err


@pytest.fixture
def parsed(tmp_path):
    """What `gavamoe train` reads of a YAML file."""

    def parse(text, *options):
        (tmp_path / "train.yaml").write_text("dataset: reviews.csv\noutput_dir: out\nbf16: false\n" + text)
        groups = (DataArguments, ModelArguments, RatingArguments, GaVaMoESFTConfig, LoraArguments)
        arguments = CommandParser(groups).parse(["--config", str(tmp_path / "train.yaml"), *options])
        return {name: value for group in arguments for name, value in vars(group).items()}

    return parse


def test_yaml_means_what_it_says(parsed):
    values = parsed("eval_strategy: no\nsave_strategy: no\nload_best_model_at_end: no\nlearning_rate: 1e-3\n")
    assert values["eval_strategy"] == values["save_strategy"] == "no" and values["load_best_model_at_end"] is False
    assert values["learning_rate"] == 1e-3 and values["use_cpu"] is False
    values = parsed("trainable_parts: experts\nlanguage: [en, no]\ncolumn_mapping: {user: reviewerID, item: asin}\n")
    assert values["trainable_parts"] == ["experts"] and values["language"] == ["en", "no"]
    assert values["column_mapping"] == ["user=reviewerID", "item=asin"]
    values = parsed("num_clusters: 4\nrun_name: 2024-01-01\nseed: 0x10\nsave_total_limit: null\nbase_model: ~\n")
    assert (values["num_clusters"], values["run_name"], values["seed"]) == ("4", "2024-01-01", 16)
    assert values["save_total_limit"] is None and values["base_model"] is None
    assert parsed("learning_rate: 1e-3\n", "--learning_rate", "0.5")["learning_rate"] == 0.5
    for text, message in (
        ("learningrate: 1\n", r"train.yaml: unknown option 'learningrate'. Did you mean --learning_rate\?"),
        ("ablation: full\n", "train.yaml: expected ablation among .*'none'.*, but got 'full'"),
        ("[a\n", "expected YAML"),
    ):
        with pytest.raises(ValueError, match=message):
            parsed(text)


def test_python_phrases_become_options(checkpoint, capsys):
    options = ["--user", "user_003", "--item", "item_002", "--rating", "9"]
    assert main(["explain", "--model", str(checkpoint), *options]) == 1
    assert "ratings from 1 to 5" in capsys.readouterr().err
    assert main(["recommend", "--model", str(checkpoint), "--user", "user_003", "--top_k", "0"]) == 1
    assert "Expected --top_k as an int" in capsys.readouterr().err


def test_an_interrupted_command_says_how_it_goes_on(tmp_path, monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("gavamoe_hf.training.pipeline.run_training", interrupt)
    assert main(train_options(tmp_path / "run")) == 130
    error = capsys.readouterr().err
    assert error.strip() == (
        "gavamoe train: interrupted. Go on with the same options and --resume_from_checkpoint true."
    )


def test_what_a_run_says_at_its_end(tmp_path):
    metrics = {"profile": "default", "rating_rmse": 0.8974, "rating_mae": 0.65, "bleu_4": 2.5, "hr_10_full": 0.032}
    metrics |= {"baseline_mean_rmse": 0.927, "baseline_bias_rmse": 0.8969, "baseline_mf_rmse": 0.8971}
    metrics |= {"baseline_mean_mae": 0.7, "baseline_popularity_hr_10_full": 0.099}
    row = {"user": "-u 1", "item": "i", "rating": 4.0, "predicted_rating": 4.26, "prediction": "A fine strap."}
    text = run_summary(tmp_path / "a run", metrics, [row] * 5)
    assert "rating_rmse    0.8974      0.9270                  0.8969      0.8971" in text
    assert (
        "Ratings: RMSE 0.897 stars, better than the mean rating (0.927), but no better than user and item biases "
        "(0.897) and matrix factorisation (0.897)."
    ) in text
    assert (
        "Lists: a liked item is among the first 10 for 3.2% of the users, no better than popularity (0.099). Rank by "
        "popularity, and let the model explain."
    ) in text
    assert text.count("A fine strap.") == 3 and "-u 1, i, rated 4, predicted 4.3" in text
    assert f"gavamoe explain --model '{tmp_path}/a run' --user='-u 1' --item=i" in text
    better = run_summary(tmp_path, {"hr_10_full": 0.2, "baseline_popularity_hr_10_full": 0.1}, [])
    assert "better than popularity (0.100)." in better and "Rank by" not in better and "Next" not in better


def test_titles_are_shown_beside_the_ids(tmp_path, capsys, planted):
    train = planted.records["train"]
    # The first that is not empty; a mark of the prompt stays text; one item has none
    names = {item: f"The <|user_embedding|>\n of {item}" for item in sorted(set(train["item"]))[1:]}
    rows = [row | {"name": names.get(row["item"], "") if number % 2 else None} for number, row in enumerate(train)]
    records = load_records(Dataset.from_list(rows), column_mapping={"item_title": "name"})
    assert set(records["train"].column_names) == {*train.column_names, "item_title"}
    arguments = ModelArguments(**TINY_MODEL, vocab_size=600)
    processor = build_processor(records["train"], arguments)
    assert processor.item_titles[:2] == ["", f"The <|user_embedding|> of {processor.items[1]}"]
    build_model(processor, arguments).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert GaVaMoEProcessor.from_pretrained(tmp_path).item_titles == processor.item_titles
    pair = ["--model", str(tmp_path), "--user", processor.users[0]]
    assert main(["recommend", *pair, "--top_k", str(len(processor.items)), "--include_known"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum("The <|user_embedding|> of" in line for line in lines) == len(lines) - 1
    assert main(["explain", *pair, "--item", processor.items[1], "--max_new_tokens", "2"]) == 0
    assert capsys.readouterr().out.startswith(f"{processor.items[1]}, The <|user_embedding|> of {processor.items[1]}\n")
    processor.add_ids("item", ["new"])
    assert processor.item_title("new") == "" and processor.item_title(processor.items[0]) == ""
    with pytest.raises(ValueError, match="item_titles"):
        GaVaMoEProcessor(processor.tokenizer, items=["a"], item_titles=[])
