"""LoRA and QLoRA: what is trained, what is refused, and that adapters are the model wherever they are loaded."""

import importlib.util
import json
import shutil

import pytest
import torch
from peft import LoraConfig
from references import TINY_MODEL, guide_snippets, make_trainer, run_without_package, sft_arguments, tiny_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from gavamoe_hf import GaVaMoEForCausalLM, load_checkpoint
from gavamoe_hf.cli.main import main
from gavamoe_hf.loading import load_adapter
from gavamoe_hf.training.building import ModelArguments, build_model
from gavamoe_hf.training.lora import (
    EXPERT_PARAMETERS,
    LoraArguments,
    check_widths,
    lora_config,
    quantization_config,
)


def config_of(tiny, folder, *, trainable_parts=None, **options):
    arguments = LoraArguments(use_peft=True, **options)
    return lora_config(arguments, sft_arguments(folder, trainable_parts=trainable_parts), tiny[1].config)


def adapted(tiny, planted, folder, *, trainable_parts=None, lora=None, **options):
    peft_config = config_of(tiny, folder, trainable_parts=trainable_parts, **(lora or {}))
    return make_trainer(tiny, planted, folder, peft_config, trainable_parts=trainable_parts, **options)


def logits_of(model, trainer):
    batch = next(iter(trainer.get_eval_dataloader()))
    batch.pop("labels")
    with torch.no_grad():
        return model.eval()(**batch).logits


# What is trained


def test_the_preset_and_the_papers(tiny, tmp_path):
    config = config_of(tiny, tmp_path)
    assert (config.r, config.lora_alpha, config.lora_dropout) == (8, 16, 0.0)
    assert set(config.target_modules) == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert set(config.target_parameters) == set(EXPERT_PARAMETERS)
    assert set(config.modules_to_save) == {"rating_model", "user_projection", "item_projection", "mlp.gate"}
    parts = ["rating_model", "projections", "gates", "experts"]
    config = config_of(tiny, tmp_path, trainable_parts=parts, lora_dropout=0.1)
    assert config.target_parameters is None and "mlp.experts" in config.modules_to_save
    tiny[1].config.num_local_experts, tiny[1].config.inject_pair_embeddings = 0, False
    config = config_of(tiny, tmp_path)
    assert config.target_parameters is None and set(config.modules_to_save) == {"rating_model"}
    assert lora_config(LoraArguments(), sft_arguments(tmp_path), tiny[1].config) is None


def test_one_step_moves_adapters_and_what_is_trained_in_full(tiny, planted, tmp_path):
    trainer = adapted(tiny, planted, tmp_path, max_steps=2, warmup_steps=0, per_device_train_batch_size=32)
    parameters = dict(trainer.model.named_parameters())
    before = {name: value.detach().clone() for name, value in parameters.items()}
    trainer.train()
    moved = {name for name, value in parameters.items() if not torch.equal(value, before[name])}
    full = {name for name in parameters if ".modules_to_save." in name and "population" not in name}
    lora = {name for name in parameters if ".lora_" in name}
    assert moved == full | lora
    # A and B of four projections and of two expert parameters, in two layers
    assert len(lora) == 2 * 2 * (4 + 2)
    assert {name.split(".layers.0.")[1].split(".")[0] for name in lora if ".layers.0." in name} == {"self_attn", "mlp"}
    assert any(".mlp.gate." in name for name in full) and any(".user_projection." in name for name in full)


def test_experts_that_would_stay_frozen_are_refused(tiny, planted, tmp_path):
    attention = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], modules_to_save=["mlp.gate"])
    with pytest.raises(ValueError, match=r"Expected experts that are trained, but .* all of them are frozen"):
        make_trainer(tiny, planted, tmp_path, attention)


def test_experts_are_frozen_on_purpose(tiny, planted, tmp_path):
    parts = ["gates", "rating_model"]
    trainer = adapted(tiny, planted, tmp_path, trainable_parts=parts, lora={"lora_target_parameters": []})
    assert not any(value.requires_grad for name, value in trainer.model.named_parameters() if ".experts." in name)


def test_refused_options(tiny, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"Expected `lora_dropout` 0 with the experts' parameters .* got 0.1"):
        config_of(tiny, tmp_path, lora_dropout=0.1)
    with pytest.raises(ValueError, match=r"both of them or, .* but got \['mlp.experts.gate_up_proj'\]"):
        config_of(tiny, tmp_path, lora_target_parameters=["mlp.experts.gate_up_proj"])
    with pytest.raises(ValueError, match='without "attention", which LoRA adapts'):
        config_of(tiny, tmp_path, trainable_parts=["attention", "experts"])
    with pytest.raises(ValueError, match="pass `use_peft` with it"):
        LoraArguments(load_in_4bit=True)
    monkeypatch.setattr("gavamoe_hf.training.lora.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"Install it with `pip install \"\.\[quantization\]\"`"):
        LoraArguments(use_peft=True, load_in_4bit=True)


def test_what_is_trained_is_in_32_bits(tiny, planted, tmp_path):
    processor, model = tiny
    parts = ["rating_model", "projections", "gates", "experts"]
    for bf16 in (True, False):
        half = build_model(processor, model_arguments())
        half.load_state_dict(model.state_dict())
        half.to(torch.bfloat16).rating_model.float()
        trainer = adapted(
            (processor, half), planted, tmp_path, trainable_parts=parts, bf16=bf16, max_steps=2, logging_steps=1
        )
        trained = {name: value for name, value in trainer.model.named_parameters() if value.requires_grad}
        wide = {name for name, value in trained.items() if value.dtype == torch.float32}
        in_full = {name for name in trained if ".modules_to_save." in name and ".rating_model." not in name}
        assert any(".mlp.experts." in name for name in in_full)
        # Without autocast, the language model needs one precision
        assert wide == set(trained) - (set() if bf16 else in_full)
        if bf16:
            before = {name: value.detach().clone() for name, value in trained.items()}
            trainer.train()
            assert all(not torch.equal(trained[name], before[name]) for name in in_full)


# Resuming


def losses(trainer):
    return {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}


def test_resumed_adapters_go_on_as_if_uninterrupted(tiny, planted, tmp_path):
    every_two = dict(save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2, num_train_epochs=2)
    start = {name: value.clone() for name, value in tiny[1].state_dict().items()}
    whole = adapted(tiny, planted, tmp_path / "whole", **every_two, save_total_limit=None)
    whole.train()
    expected = losses(whole)
    assert len(expected) == 8

    def again():
        model = GaVaMoEForCausalLM(tiny[1].config)
        model.load_state_dict(start)
        return tiny[0], model

    resumed = adapted(again(), planted, tmp_path / "resumed", **every_two)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    found = losses(resumed)
    assert set(found) == set(expected)
    for step, loss in expected.items():
        assert found[step] == pytest.approx(loss, abs=1e-6), step
    torch.testing.assert_close(logits_of(resumed.model, whole), logits_of(whole.model, whole))


def test_checkpoints_of_another_model_are_refused(tiny, planted, tmp_path):
    processor, _ = tiny
    options = dict(max_steps=1, save_strategy="steps", save_steps=1, eval_strategy="no", load_best_model_at_end=False)
    make_trainer(tiny, planted, tmp_path / "full", **options).train()
    adapted((processor, build_model(processor, model_arguments())), planted, tmp_path / "lora", **options).train()
    for changed, found in (
        ({"num_clusters": "2"}, r"mlp.gate.weight to be \(2, 4, 32\) \(clusters, experts, .* it is \(3, 4, 32\)"),
        ({"num_experts": 6}, r"mlp.gate.weight to be \(3, 6, 32\) .* it is \(3, 4, 32\)"),
        ({"moe_intermediate_size": 8}, r"experts.* it is \(4, "),
    ):
        other = processor, build_model(processor, model_arguments(**changed))
        with pytest.raises(ValueError, match=found):
            trainer = make_trainer(other, planted, tmp_path / "again", **options)
            trainer.train(resume_from_checkpoint=str(tmp_path / "full" / "checkpoint-1"))
        other = processor, build_model(processor, model_arguments(**changed))
        if "moe_intermediate_size" not in changed:
            with pytest.raises(ValueError, match=found):
                trainer = adapted(other, planted, tmp_path / "again", **options)
                trainer.train(resume_from_checkpoint=str(tmp_path / "lora" / "checkpoint-1"))
    trainer = adapted(
        (processor, build_model(processor, model_arguments())), planted, tmp_path / "r", lora={"lora_r": 2}, **options
    )
    with pytest.raises(ValueError, match=r"lora_A.weight to be \(8, 32\), .* it is \(32, 32\)"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "lora" / "checkpoint-1"))
    weights = tmp_path / "full" / "checkpoint-1" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    trainer = make_trainer((processor, build_model(processor, model_arguments())), planted, tmp_path / "a", **options)
    with pytest.raises(ValueError, match=r"model.safetensors is truncated"):
        trainer.train(resume_from_checkpoint=str(weights.parent))


def model_arguments(**options):
    return ModelArguments(**{**TINY_MODEL, "vae_dropout": 0.0, "vae_id_dropout": 0.0, "vocab_size": 600, **options})


# Adapters on disk

PLAIN_PEFT = """
import sys
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoProcessor

folder = pathlib.Path(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(folder / "base_model", trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder / "adapter", trust_remote_code=True)
model = PeftModel.from_pretrained(model, folder / "adapter").eval()
batch = torch.load(folder / "batch.pt", weights_only=True)
with torch.no_grad():
    adapted = model(**batch).logits
    merged = model.merge_and_unload()
    torch.save({"adapted": adapted, "merged": merged(**batch).logits}, folder / "logits.pt")
print(merged.explain(processor, user=processor.users[3], item=processor.items[2], max_new_tokens=3)[0].cluster)
"""


@pytest.mark.slow
def test_adapters_load_in_a_fresh_process_without_the_package(tiny, planted, tmp_path):
    processor, model = tiny
    for saved in (model, processor):
        saved.save_pretrained(tmp_path / "base_model")
    model.name_or_path = "moved/since"
    trainer = adapted(tiny, planted, tmp_path / "run", max_steps=4)
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    expected = logits_of(trainer.model, trainer)
    batch = next(iter(trainer.get_eval_dataloader()))
    batch.pop("labels")
    torch.save(dict(batch), tmp_path / "batch.pt")
    # The ids' tables travel with the adapter
    assert "rating_model.user_embeddings.weight" in " ".join(load_names(tmp_path / "adapter"))
    run_without_package(PLAIN_PEFT, tmp_path, modules=tmp_path, cwd=tmp_path)
    guide, _ = guide_snippets("pretrained-llama.md")
    run_without_package(guide.replace("outputs/from_base", str(tmp_path)), modules=tmp_path, cwd=tmp_path)
    logits = torch.load(tmp_path / "logits.pt", weights_only=True)
    torch.testing.assert_close(logits["adapted"], expected)
    torch.testing.assert_close(logits["merged"], expected, rtol=1e-4, atol=1e-4)

    merged, loaded = load_checkpoint(tmp_path / "adapter")
    assert type(merged) is GaVaMoEForCausalLM and not merged.training and loaded.users == processor.users
    torch.testing.assert_close(logits_of(merged, trainer), expected, rtol=1e-4, atol=1e-4)
    # Merged weights are the model's like any others
    merged.save_pretrained(tmp_path / "merged")
    again = GaVaMoEForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(logits_of(again, trainer), logits_of(merged, trainer))

    alone = shutil.copytree(tmp_path / "adapter", tmp_path / "elsewhere" / "adapter")
    with pytest.raises(FileNotFoundError, match=r"Expected the base model of the adapter .* at 'moved/since'"):
        load_adapter(alone)
    torch.testing.assert_close(logits_of(load_adapter(alone, tmp_path / "base_model"), trainer), expected)
    (alone / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks adapter_model.safetensors"):
        load_checkpoint(alone)


def load_names(folder):
    from safetensors import safe_open

    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        return list(file.keys())


# Runs


@pytest.fixture(scope="module")
def base(planted, tmp_path_factory):
    """A tiny Llama with a tokenizer, and the records as files."""
    folder = tmp_path_factory.mktemp("llama")
    words = sorted({word for text in planted.records["train"]["explanation"] for word in text.split()})
    vocab = {word: index for index, word in enumerate(["<unk>", "<end>", *words])}
    backend = Tokenizer(WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="<end>")
    tokenizer.save_pretrained(folder / "base")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        dtype=torch.bfloat16,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "base")
    (folder / "data").mkdir()
    for split, records in planted.records.items():
        records.to_json(folder / "data" / f"{split}.jsonl")
    return folder


def run(base, output_dir, *options):
    command = (
        f"train --dataset {base / 'data'} --base_model {base / 'base'} --output_dir {output_dir} --use_cpu true "
        "--num_experts 4 --moe_intermediate_size 16 --vae_embedding_size 16 --latent_size 4 --learning_rate 1e-2 "
        "--rating_bias_epochs 1 --rating_autoencoder_epochs 1 --rating_num_train_epochs 1 "
        "--rating_refinement_epochs 1 --num_train_epochs 1 --per_device_train_batch_size 16 --disable_tqdm true"
    )
    return main([*command.split(), *options])


def check_interactions(base, model, processor):
    """The model knows its training pairs, and no others."""
    records = map(json.loads, (base / "data" / "train.jsonl").read_text().splitlines())
    pairs = {(processor.user_index(row["user"]), processor.item_index(row["item"])) for row in records}
    users, items = model.rating_model.interactions()
    assert list(zip(users.tolist(), items.tolist(), strict=True)) == sorted(pairs)
    assert model.config.num_interactions == len(pairs)


def test_a_run_leaves_adapter_base_and_the_two_merged(base, tmp_path, capsys):
    assert run(base, tmp_path / "run", "--use_peft", "--alpha", "0.3", "--beta", "0.2") == 0
    folder = tmp_path / "run"
    model, processor = load_checkpoint(folder)
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16" == str(model.dtype).split(".")[1]
    assert model.rating_model.user_embeddings.weight.dtype == torch.float32
    check_interactions(base, model, processor)
    merged, _ = load_checkpoint(folder / "adapter")
    start, _ = load_checkpoint(folder / "base_model")
    for name, value in model.state_dict().items():
        assert torch.equal(merged.state_dict()[name], value), name
    changed = {name for name, value in model.state_dict().items() if not torch.equal(start.state_dict()[name], value)}
    assert any(".mlp.experts.down_proj" in name for name in changed)
    assert any(".q_proj" in name for name in changed) and not any(".shared_expert." in name for name in changed)
    # What the metrics say is of the model that was saved
    row = json.loads((folder / "predictions_test.jsonl").read_text().splitlines()[0])
    rated = model.predict_rating(processor.users.index(row["user"]), processor.items.index(row["item"]))
    assert rated.item() == pytest.approx(row["predicted_rating"], abs=1e-5)
    assert model.config.alpha == pytest.approx(0.3) and model.config.beta == pytest.approx(0.2)
    # What stage 2 had left to do is done again, from the same base
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    (folder / "model.safetensors").unlink()
    options = ("--use_peft", "--alpha", "0.3", "--beta", "0.2", "--resume_from_checkpoint", "true")
    assert run(base, folder, *options) == 0
    for name, value in load_checkpoint(folder)[0].state_dict().items():
        assert torch.equal(value, kept[name]), name
    assert run(base, folder, *options, "--lora_r", "4") == 1
    assert "lora_r was 8, now 4" in capsys.readouterr().err


def test_what_stage_2_would_refuse_is_found_before_stage_1(base, tmp_path, capsys):
    for options, message in (
        (("--max_length", "5"), "The prompt alone takes"),
        (("--use_peft", "--lora_target_modules", "query"), "query"),
        (("--use_peft", "--trainable_parts", "attention"), "which LoRA adapts"),
        (("--resume_from_checkpoint", "checkpoint-7"), "as true or false, but got 'checkpoint-7'"),
    ):
        assert run(base, tmp_path / "run", *options) == 1
        assert message in capsys.readouterr().err
        assert not (tmp_path / "run").exists()


def test_full_training_is_in_32_bits_unless_asked(base, tmp_path):
    assert run(base, tmp_path / "full") == 0
    model, processor = load_checkpoint(tmp_path / "full")
    assert model.dtype == torch.float32
    check_interactions(base, model, processor)
    assert not (tmp_path / "full" / "adapter").exists()
    assert run(base, tmp_path / "half", "--dtype", "auto") == 0
    assert load_checkpoint(tmp_path / "half")[0].dtype == torch.bfloat16


@pytest.mark.processor
@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs the extra quantization")
def test_qlora(base, tmp_path, monkeypatch, is_packed):
    """On processors with AVX512-BF16 bitsandbytes packs weights another way, which it finds out by itself."""
    modules = importlib.import_module("bitsandbytes.nn.modules")
    if is_packed and not modules.has_avx512bf16():
        pytest.skip("this processor lacks AVX512-BF16")
    monkeypatch.setattr(modules, "has_avx512bf16", lambda: is_packed)
    arguments = LoraArguments(use_peft=True, load_in_4bit=True, bnb_4bit_quant_type="fp4")
    quantization = quantization_config(arguments, ["mlp.gate"], torch.bfloat16)
    assert quantization.bnb_4bit_quant_type == "fp4" and quantization.bnb_4bit_compute_dtype == torch.bfloat16
    assert run(base, tmp_path, "--use_peft", "--load_in_4bit") == 0
    model, _ = load_checkpoint(tmp_path)
    start, _ = load_checkpoint(tmp_path / "base_model")
    state, before = model.state_dict(), start.state_dict()
    assert set(state) == set(before)
    # Merged into the weights as they were before they were quantised
    assert all(value.dtype == before[name].dtype for name, value in state.items())
    frozen = "model.layers.0.mlp.shared_expert.up_proj.weight"
    assert torch.equal(state[frozen], before[frozen])
    assert not torch.equal(
        state["model.layers.0.self_attn.q_proj.weight"], before["model.layers.0.self_attn.q_proj.weight"]
    )


def test_layers_that_bitsandbytes_cannot_pack_everywhere():
    """64 inputs and 32 outputs at once: on processors with AVX512-BF16 others fail, when they are first run."""
    sizes = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    check_widths(tiny_model(**sizes, shared_expert_intermediate_size=64))
    for narrow, message in (
        (tiny_model(**sizes, shared_expert_intermediate_size=48), r"0\.mlp\.shared_expert\.gate_proj has 64 and 48"),
        (tiny_model(), r"model\.layers\.0\.self_attn\.q_proj has 32 and 32\. Leave"),
    ):
        with pytest.raises(ValueError, match=message):
            check_widths(narrow)


def test_narrow_models_are_refused_before_stage_1(base, tmp_path, capsys):
    pytest.importorskip("bitsandbytes", reason="needs the extra quantization")
    config = LlamaConfig.from_pretrained(base / "base", hidden_size=32, head_dim=8)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "narrow")
    AutoTokenizer.from_pretrained(base / "base").save_pretrained(tmp_path / "narrow")
    options = ["--use_peft", "--load_in_4bit", "--base_model", str(tmp_path / "narrow")]
    assert run(base, tmp_path / "run", *options) == 1
    assert "of 32 outputs for --load_in_4bit, but" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_qlora_keeps_the_rating_model_exact(tiny, planted, tmp_path):
    pytest.importorskip("bitsandbytes", reason="needs the extra quantization")
    processor, model = tiny
    model.save_pretrained(tmp_path / "base_model")
    quantization = quantization_config(
        LoraArguments(use_peft=True, load_in_4bit=True), ["user_projection", "item_projection"], torch.float32
    )
    quantised = GaVaMoEForCausalLM.from_pretrained(
        tmp_path / "base_model", quantization_config=quantization, device_map={"": "cpu"}
    )
    assert quantised.model.layers[0].self_attn.q_proj.weight.dtype == torch.uint8
    trainer = adapted((processor, quantised), planted, tmp_path / "run", max_steps=1)
    state = trainer.model.base_model.model.rating_model.state_dict()
    for name, value in model.rating_model.state_dict().items():
        assert value.dtype == torch.float32
        saved = next(state[key] for key in state if key.endswith(name) and "original_module" not in key)
        assert torch.equal(saved, value), name
