"""What one of several processes does by itself, and whole runs of two processes."""

import json
import os
import subprocess
import sys

import pytest
import torch

from gavamoe_hf import load_checkpoint
from gavamoe_hf.training.launch import in_one_process, wait_for_file


def write_environment(path):
    with open(path, "w", encoding="utf-8") as file:
        json.dump(dict(os.environ), file)


def fail():
    raise ValueError("no preference to learn from")


def test_a_process_of_its_own_knows_no_launcher(tmp_path, monkeypatch):
    launchers = {"WORLD_SIZE": "2", "LOCAL_RANK": "1", "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    for name, value in launchers.items():
        monkeypatch.setenv(name, value)
    before = dict(os.environ)
    in_one_process(write_environment, tmp_path / "environment.json")
    assert dict(os.environ) == before
    wait_for_file(tmp_path / "environment.json")
    seen = json.loads((tmp_path / "environment.json").read_text())
    assert not launchers.keys() & seen.keys() and seen["PATH"] == before["PATH"]


def test_its_failure_is_passed_on():
    with pytest.raises(torch.multiprocessing.ProcessRaisedException, match="no preference to learn from"):
        in_one_process(fail)


@pytest.mark.slow
def test_a_run_of_two_processes(planted, tmp_path):
    (tmp_path / "data").mkdir()
    for split, records in planted.records.items():
        records.to_json(tmp_path / "data" / f"{split}.jsonl")
    command = (
        f"train --dataset {tmp_path / 'data'} --output_dir {tmp_path / 'run'} --use_cpu true --use_peft "
        "--hidden_size 32 --num_hidden_layers 1 --num_attention_heads 2 --moe_intermediate_size 16 --num_experts 4 "
        "--vocab_size 500 --num_clusters auto --rating_bias_epochs 1 --rating_autoencoder_epochs 1 "
        "--rating_num_train_epochs 1 "
        "--rating_refinement_epochs 1 --max_steps 3 --disable_tqdm true --save_strategy no --eval_strategy no "
        "--load_best_model_at_end false"
    )
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    done = subprocess.run(
        [*launcher, "-m", "gavamoe_hf", *command.split()],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    # Scores are one process's
    assert done.stdout.count("bleu_4 ") == 1
    model, processor = load_checkpoint(tmp_path / "run")
    merged, _ = load_checkpoint(tmp_path / "run" / "adapter")
    assert model.config.num_clusters == model.model.layers[0].mlp.gate.weight.shape[0]
    for name, value in model.state_dict().items():
        assert torch.equal(merged.state_dict()[name], value), name
    row = json.loads((tmp_path / "run" / "predictions_test.jsonl").read_text().splitlines()[0])
    rated = model.predict_rating(processor.users.index(row["user"]), processor.items.index(row["item"]))
    assert rated.item() == pytest.approx(row["predicted_rating"], abs=1e-5)
    assert len(json.loads((tmp_path / "run" / "training_log.json").read_text())) > 0
