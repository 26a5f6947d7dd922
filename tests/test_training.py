"""Stage 2 and whole runs: what they learn and log, what moves, and that a killed run goes on as if it had not been."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from references import TINY_MODEL, make_trainer, sft_arguments

from gavamoe_hf.training.building import ModelArguments, build_model, build_processor
from gavamoe_hf.training.progress import log_line
from gavamoe_hf.training.sft_trainer import GaVaMoESFTTrainer, tokenize_records

# Models from scratch


def test_models_from_scratch_start_by_repeating_what_they_attend_to(planted):
    processor = build_processor(planted.records["train"], ModelArguments(vocab_size=1000))
    model = build_model(processor, ModelArguments(**TINY_MODEL, vocab_size=1000))
    for layer in model.model.layers:
        assert torch.equal(layer.self_attn.o_proj.weight, layer.self_attn.v_proj.weight.T)
    features = {name for names in planted.records["train"]["feature"] for name in names}
    # However rare, in the prompt and in the explanation alike
    for word in (*features, "positive", "negative"):
        assert len(processor.encode_text(f" {word}")) == 1, word
    prompt = processor.encode_prompt("positive", ["tone"])
    assert processor.encode_text(" positive")[0] in prompt and processor.encode_text(" tone")[0] in prompt


# Stage 2


def test_examples_mask_the_prompt_and_keep_the_pair(tiny, planted):
    processor, _ = tiny
    records = planted.records["train"].select(range(50))
    examples = tokenize_records(records, processor, feature_dropout=0.3, seed=1)
    dropped = 0
    for record, example in zip(records, examples, strict=True):
        scored = [token for token in example["labels"] if token != -100]
        assert processor.decode(scored[:-1]) == record["explanation"]
        assert scored[-1] == processor.tokenizer.eos_token_id
        assert example["input_ids"][-len(scored) :] == scored
        assert processor.users[example["user_id"]] == record["user"]
        assert processor.items[example["item_id"]] == record["item"]
        prompt = processor.decode(example["input_ids"][: -len(scored)])
        assert ("positive" in prompt) == (record["rating"] >= 3)
        dropped += f"has {record['feature'][0]} features" not in prompt
    assert 5 <= dropped <= 25
    with pytest.raises(ValueError, match="'explanation'"):
        tokenize_records(records.remove_columns("explanation"), processor)


def test_loss_is_equation_13_on_explanation_tokens_alone(tiny, planted, tmp_path, monkeypatch):
    trainer = make_trainer(tiny, planted, tmp_path, alpha=0.3, beta=0.2)
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
    batch = next(iter(trainer.get_train_dataloader()))
    assert set(batch) == {"input_ids", "attention_mask", "labels", "user_id", "item_id", "rating"}
    model = trainer.model.train()
    loss = trainer.compute_loss(model, dict(batch))
    gradient = torch.autograd.grad(loss, model.model.layers[0].mlp.experts.down_proj)[0]
    # Slow reference: logits of every position, one label after the other
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    outputs = model(**inputs, output_router_logits=True)
    terms = [
        -outputs.logits[row, position - 1].log_softmax(dim=-1)[label]
        for row, labels in enumerate(batch["labels"])
        for position, label in enumerate(labels)
        if label != -100
    ]
    nll = torch.stack(terms).mean()
    pairs = model.rating_model.predict(batch["user_id"], batch["item_id"])
    elbo = outputs.reconstruction_loss + 0.2 * outputs.kl_loss
    assert torch.allclose(
        outputs.reconstruction_loss, F.cross_entropy(pairs.rating_logits, batch["rating"].long() - 1), atol=1e-6
    )
    expected = 0.3 * elbo + 0.7 * (nll + 0.001 * outputs.aux_loss)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    reference = torch.autograd.grad(expected, model.model.layers[0].mlp.experts.down_proj)[0]
    assert torch.allclose(gradient, reference, atol=1e-6)
    model_loss = model(**batch, output_router_logits=True).loss
    assert model_loss.item() == pytest.approx(loss.item(), abs=1e-5)


def test_gradient_accumulation_equals_one_large_batch(tiny, planted, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
    _, model = tiny
    start = {name: value.clone() for name, value in model.state_dict().items()}
    finals = []
    for size, steps in ((16, 1), (4, 4)):
        model.load_state_dict(start)
        options = dict(per_device_train_batch_size=size, gradient_accumulation_steps=steps, max_steps=1)
        # No load-balancing term: it is not a mean over samples
        trainer = make_trainer(
            tiny, planted, tmp_path / str(size), **options, optim="sgd", router_aux_loss_coef=0.0, max_grad_norm=0
        )
        trainer.train()
        finals.append({name: value.clone() for name, value in model.state_dict().items()})
    for name, value in finals[0].items():
        assert torch.allclose(value, finals[1][name], atol=2e-6), name


def test_one_step_moves_every_trained_parameter_and_no_other(tiny, planted, tmp_path):
    _, model = tiny
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    trainer = make_trainer(tiny, planted, tmp_path, max_steps=1, per_device_train_batch_size=32, warmup_steps=0)
    trainer.train()
    moved = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    # The population embeddings only move where an id is dropped, which is switched off here
    assert set(before) - moved == {"model.rating_model.population_user", "model.rating_model.population_item"}


def test_trainable_parts_freeze_the_rest(tiny, planted, tmp_path):
    _, model = tiny
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    trainer = make_trainer(tiny, planted, tmp_path, max_steps=1, trainable_parts=["gates", "projections"])
    trainer.train()
    moved = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert moved and all(".mlp.gate." in name or "_projection." in name for name in moved)
    with pytest.raises(ValueError, match="Expected `trainable_parts` among"):
        sft_arguments(tmp_path, trainable_parts=["head"])


def test_rating_model_has_a_learning_rate_of_its_own(tiny, planted, tmp_path):
    trainer = make_trainer(tiny, planted, tmp_path, rating_learning_rate_scale=0.25)
    optimizer = trainer.create_optimizer()
    rating = {id(parameter) for parameter in trainer.model.rating_model.parameters()}
    for group in optimizer.param_groups:
        expected = 0.25e-3 if id(group["params"][0]) in rating else 1e-3
        assert group["lr"] == pytest.approx(expected)
        assert len({id(parameter) in rating for parameter in group["params"]}) == 1


def test_logs_every_loss_term_and_exact_validation_nll(tiny, planted, tmp_path):
    trainer = make_trainer(tiny, planted, tmp_path, per_device_eval_batch_size=3)
    trainer.train()
    terms = {"nll", "elbo", "reconstruction_loss", "kl_loss", "aux_loss", "entropy", "mean_token_accuracy"}
    logs = trainer.state.log_history
    train_log = next(entry for entry in logs if "loss" in entry)
    assert terms | {"num_tokens"} <= set(train_log)
    metrics = trainer.evaluate()
    assert {f"eval_{term}" for term in terms} <= set(metrics)
    # Slow reference: one record at a time, summed over tokens
    total = count = 0.0
    trainer.model.eval()
    for example in trainer.eval_dataset:
        batch = trainer.data_collator([example])
        outputs = trainer.model(**{name: value for name, value in batch.items() if name != "rating"})
        labels = (batch["labels"] != -100).sum().item()
        total, count = total + outputs.nll_loss.item() * labels, count + labels
    assert metrics["eval_nll"] == pytest.approx(total / count, rel=1e-5)
    assert trainer.model.config.output_router_logits is False


def test_gradient_checkpointing_gives_the_same_step(tiny, planted, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
    _, model = tiny
    start = {name: value.clone() for name, value in model.state_dict().items()}
    finals = []
    for checkpointing in (False, True):
        model.load_state_dict(start)
        make_trainer(
            tiny,
            planted,
            tmp_path / str(checkpointing),
            max_steps=1,
            activation_checkpointing=checkpointing,
            optim="sgd",
        ).train()
        finals.append({name: value.clone() for name, value in model.state_dict().items()})
    for name, value in finals[0].items():
        assert torch.allclose(value, finals[1][name], atol=1e-6), name


def test_checkpoints_hold_model_and_processor(tiny, planted, tmp_path):
    from gavamoe_hf import load_checkpoint

    every_two = dict(save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2)
    trainer = make_trainer(tiny, planted, tmp_path, max_steps=2, **every_two)
    trainer.train()
    model, processor = load_checkpoint(str(tmp_path / "checkpoint-2"))
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    assert processor.users == tiny[0].users and processor.item_features == tiny[0].item_features


def test_refuses_what_cannot_work(tiny, planted, tmp_path):
    _, model = tiny
    with pytest.raises(TypeError, match="Expected `processor` as a GaVaMoEProcessor, but got NoneType"):
        GaVaMoESFTTrainer(model, sft_arguments(tmp_path), train_dataset=planted.records["train"])
    with pytest.raises(ValueError, match="needs its own gate"):
        sft_arguments(tmp_path, packing=True)
    with pytest.raises(ValueError, match="The prompt alone takes"):
        make_trainer(tiny, planted, tmp_path, max_length=8)
    stranger = Dataset.from_list([{**planted.records["train"][0], "user": "nobody"}])
    with pytest.raises(ValueError, match="'nobody' is not among the 30 known users"):
        tokenize_records(stranger, tiny[0])


# Ablations


def count(model, part=""):
    return sum(value.numel() for name, value in model.named_parameters() if part in name)


def test_ablations_keep_parameters_equal(planted):
    arguments = ModelArguments(**TINY_MODEL, vocab_size=400)
    processor = build_processor(planted.records["train"], arguments)
    models = {}
    for ablation in ("none", "no_multi_gating", "no_fine_grained_experts", "base"):
        arguments.ablation = ablation
        models[ablation] = build_model(processor, arguments)
    full = models["none"]
    assert models["no_multi_gating"].config.num_clusters == 1
    assert count(models["no_multi_gating"], ".experts.") == count(full, ".experts.")
    coarse = models["no_fine_grained_experts"].config
    assert (coarse.num_experts, coarse.num_experts_per_tok, coarse.moe_intermediate_size) == (2, 1, 32)
    assert count(models["no_fine_grained_experts"], ".experts.") == count(full, ".experts.")
    # 4 experts of 16 in each of 2 layers: 2 * 3 * 32 * 64 weights, dense or not
    assert count(models["base"], ".mlp.") == count(full, ".experts.") == 2 * 3 * 32 * 64


def test_the_plain_llama_trains_without_experts(planted, tmp_path):
    arguments = ModelArguments(**TINY_MODEL, vocab_size=400, ablation="base")
    processor = build_processor(planted.records["train"], arguments)
    trainer = make_trainer((processor, build_model(processor, arguments)), planted, tmp_path, max_steps=2)
    trainer.train()
    log = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert log["loss"] == pytest.approx(0.9 * log["nll"] + 0.1 * log["elbo"], rel=1e-5) and "aux_loss" not in log


# Kill and resume


def test_a_half_written_checkpoint_is_passed_over(tmp_path):
    from gavamoe_hf.training.resume import last_complete_checkpoint

    assert last_complete_checkpoint(tmp_path / "nothing") is None
    for step in (9, 20, 100, 150):
        (tmp_path / f"checkpoint-{step}").mkdir()
    for step, state in ((9, "{}"), (20, "{}"), (150, '{"global_step": 15')):
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-20")


COMMAND = (
    "train --dataset {data} --output_dir {output} --use_cpu true --hidden_size 32 --num_hidden_layers 1 "
    "--num_attention_heads 2 --moe_intermediate_size 16 --num_experts 4 --vocab_size 500 "
    "--rating_autoencoder_learning_rates 1e-3 --rating_autoencoder_epochs 1 --rating_num_train_epochs 1 "
    "--num_train_epochs 3 --per_device_train_batch_size 16 --learning_rate 1e-3 --logging_steps 1 "
    "--save_strategy steps --save_steps 3 --eval_strategy steps --eval_steps 3 --disable_tqdm true"
)


def start_run(data, output, *extra):
    command = COMMAND.format(data=data, output=output).split()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    launcher = "import sys; from gavamoe_hf.cli.main import main; sys.exit(main(sys.argv[1:]))"
    return subprocess.Popen(
        [sys.executable, "-c", launcher, *command, *extra],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def losses(output):
    log = json.loads((Path(output) / "training_log.json").read_text())
    return {entry["step"]: entry["loss"] for entry in log if "loss" in entry}


@pytest.mark.slow
def test_killed_run_resumes_to_the_same_losses(planted, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for split, records in planted.records.items():
        records.to_json(data / f"{split}.jsonl")
    whole = start_run(data, tmp_path / "whole")
    output, _ = whole.communicate(timeout=400)
    assert whole.returncode == 0, output

    killed = start_run(data, tmp_path / "killed")
    checkpoints = tmp_path / "killed" / "checkpoints" / "explanation"
    deadline = time.time() + 400
    while not list(checkpoints.glob("checkpoint-*/trainer_state.json")):
        assert killed.poll() is None and time.time() < deadline, killed.communicate()[0]
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert not (tmp_path / "killed" / "metrics.json").exists()

    refused = start_run(data, tmp_path / "killed")
    output, _ = refused.communicate(timeout=400)
    assert refused.returncode == 1
    assert "already holds a run" in output and "--resume_from_checkpoint" in output

    resumed = start_run(data, tmp_path / "killed", "--resume_from_checkpoint", "true")
    output, _ = resumed.communicate(timeout=400)
    assert resumed.returncode == 0, output
    expected, found = losses(tmp_path / "whole"), losses(tmp_path / "killed")
    assert set(found) == set(expected) and len(expected) == 36
    for step, loss in expected.items():
        assert found[step] == pytest.approx(loss, abs=1e-5), step
    metrics = [json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("whole", "killed")]
    assert metrics[0]["signatures"] == metrics[1]["signatures"]
    scores = [{key: value for key, value in each.items() if isinstance(value, float)} for each in metrics]
    assert scores[0] == pytest.approx(scores[1], abs=1e-5)


@pytest.mark.parametrize("disable_tqdm", [True, False])
def test_logging_steps_are_lines_to_read(tiny, planted, tmp_path, capsys, disable_tqdm):
    options = {"max_steps": 2, "logging_steps": 1, "disable_tqdm": disable_tqdm}
    make_trainer(tiny, planted, tmp_path, **options).train()
    out = "".join(capsys.readouterr())
    lines = re.findall(r"^step [12]/2, epoch \S+: loss \S+, .*nll \S+", out, re.MULTILINE)
    assert len(lines) == 2 and "{'loss'" not in out
    assert log_line(
        {"loss": 5.37612, "learning_rate": 1e-4, "epoch": 0.5, "phase": "elbo", "eval_runtime": 3}, 3, 9
    ) == ("elbo step 3/9, epoch 0.50: loss 5.376, learning_rate 0.0001")
