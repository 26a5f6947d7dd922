"""`--dry_run`: what it says is so, and it leaves nothing."""

import re

import pytest
import torch
from references import TINY_MODEL, make_trainer, sft_arguments

from gavamoe_hf.cli.main import main
from gavamoe_hf.training.building import ModelArguments, build_model, build_processor
from gavamoe_hf.training.dry_run import memory_estimate
from gavamoe_hf.upcycling_gavamoe import count_parameters

COMMAND = "train --dataset synthetic --use_cpu true --dry_run --disable_tqdm true --per_device_train_batch_size 2"
SIZES = "--hidden_size 32 --num_hidden_layers 2 --num_attention_heads 2 --moe_intermediate_size 16 --num_experts 4"


def dry_run(capsys, output_dir, *options):
    assert main([*COMMAND.split(), *SIZES.split(), "--output_dir", str(output_dir), *options]) == 0
    assert not output_dir.exists()
    return capsys.readouterr().out


def numbers(text, name):
    return [int(number.replace(",", "")) for number in re.findall(rf"{name} +([\d,]+)", text)]


def test_parameters_and_the_first_batch(capsys, tmp_path):
    from gavamoe_hf.training.pipeline import DataArguments, read_data

    text = dry_run(capsys, tmp_path / "run", "--shared_expert_intermediate_size", "24")
    train = read_data(DataArguments(dataset="synthetic"))[0]["train"]
    arguments = ModelArguments(**TINY_MODEL, shared_expert_intermediate_size=24)
    model = build_model(build_processor(train, arguments), arguments)
    counts = count_parameters(model)
    assert numbers(text, "total")[0] == counts["total"] == sum(value.numel() for value in model.parameters())
    assert numbers(text, "trainable") == [counts["total"]] and numbers(text, "active") == [counts["active"]]
    for record in train.select(range(2)):
        assert f"['{record['explanation']}<|end_of_text|>']" in text.replace('"', "'")
        sentiment = "positive" if record["rating"] >= 3 else "negative"
        assert f"has a {sentiment} experience with the item, the item has {record['feature'][0]} features" in text
        assert f"rating {record['rating']:g}" in text
    assert train[2]["explanation"] not in text


def test_lora_counts_what_is_trained(capsys, tmp_path):
    text = dry_run(capsys, tmp_path / "run", "--use_peft", "--lora_r", "2", "--trainable_parts", "gates")
    # Two layers: A and B of four 32 x 32 projections; of 4 experts' 32 x 32 and 32 x 16; gates of 3 x 4 x 32
    attention, experts, gates = 4 * 2 * (32 + 32), 4 * 2 * ((32 + 32) + (32 + 16)), 3 * 4 * 32
    assert numbers(text, "trainable") == [2 * (attention + experts + gates)]


def test_bad_input_is_found(tmp_path, capsys):
    options = [*COMMAND.split(), *SIZES.split(), "--output_dir", str(tmp_path)]
    assert main([*options, "--use_peft", "--lora_dropout", "0.1"]) == 1
    assert "Expected --lora_dropout 0" in capsys.readouterr().err
    assert main([*options, "--max_length", "5"]) == 1
    assert "The prompt alone takes" in capsys.readouterr().err
    (tmp_path / "run.json").touch()
    assert main(options) == 1
    assert "already holds a run" in capsys.readouterr().err


@pytest.mark.parametrize("options", [{}, {"shared_expert_intermediate_size": 64}, {"ablation": "base"}])
def test_memory_is_about_what_autograd_keeps(planted, tmp_path, options):
    sizes = {**TINY_MODEL, "hidden_size": 64, "num_hidden_layers": 6}
    arguments = ModelArguments(**sizes, vocab_size=600, **options)
    processor = build_processor(planted.records["train"], arguments)
    model = build_model(processor, arguments)
    trainer = make_trainer((processor, model), planted, tmp_path)
    batch = next(iter(trainer.get_train_dataloader()))
    kept = {}
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        kept[checkpointing] = bytes_kept(lambda: trainer.compute_loss(model.train(), dict(batch)), model)
    # While a layer is computed again, its activations are there, too
    kept[True] += (kept[False] - kept[True]) / 6
    num_tokens, num_scored = batch["input_ids"].shape[1], (batch["labels"] != -100).sum().item() / len(batch["labels"])
    for checkpointing, measured in kept.items():
        args = sft_arguments(tmp_path, activation_checkpointing=checkpointing)
        estimate = memory_estimate(model, model.config, args, num_tokens, num_scored)
        assert 0.75 < (estimate["activations"] + estimate["logits"]) / measured < 1.33, checkpointing
        assert estimate["weights"] == sum(value.numel() * 4 for value in model.parameters())
        assert estimate["optimizer"] == 2 * estimate["gradients"] == 2 * estimate["weights"]


def bytes_kept(forward, model):
    """What autograd keeps of a forward pass for the backward pass, besides the parameters."""
    parameters = {value.untyped_storage().data_ptr() for value in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            # The tensor too, lest its memory be used again
            kept[storage.data_ptr()] = storage.nbytes(), tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = forward()
    assert loss.requires_grad
    return sum(size for size, _ in kept.values())
