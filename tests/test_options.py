"""Every option that transformers and TRL document: as on a Llama, or refused by name, and in the table of the docs."""

import copy
import inspect
import re
from dataclasses import MISSING, fields
from pathlib import Path

import pytest
import torch
from references import ITEM, PAD, USER, mixed_pairs, random_prompts, sft_arguments, spread_clusters, tiny_model
from safetensors.torch import load_file
from transformers import (
    CompileConfig,
    GenerationConfig,
    GenerationMixin,
    LlamaConfig,
    LlamaForCausalLM,
    StoppingCriteriaList,
    WatermarkingConfig,
)
from transformers.generation import MaxLengthCriteria
from trl import SFTConfig, SFTTrainer

from gavamoe_hf.training.sft_config import REFUSED_OPTIONS, GaVaMoESFTConfig
from gavamoe_hf.training.sft_trainer import GaVaMoESFTTrainer, tokenize_records

TABLE = (Path(__file__).parent.parent / "docs" / "options.md").read_text(encoding="utf-8")

SAMPLED = {"do_sample": True}
BEAMS = {"num_beams": 3}
STATIC = {"cache_implementation": "static"}
OUTPUTS = {"return_dict_in_generate": True}
# Values that change what a random model says, and what each needs beside it
GENERATION = {
    "max_length": {"max_length": 14, "max_new_tokens": None},
    "max_new_tokens": {"max_new_tokens": 3},
    "min_length": {"min_length": 15},
    "min_new_tokens": {"min_new_tokens": 6},
    "max_time": {"max_time": 60.0},
    "eos_token_id": {"eos_token_id": 40},
    "do_sample": SAMPLED,
    "temperature": SAMPLED | {"temperature": 0.7},
    "top_k": SAMPLED | {"top_k": 3},
    "top_p": SAMPLED | {"top_p": 0.5},
    "min_p": SAMPLED | {"min_p": 0.2},
    "top_h": SAMPLED | {"top_h": 0.4},
    "typical_p": SAMPLED | {"typical_p": 0.5},
    "epsilon_cutoff": SAMPLED | {"epsilon_cutoff": 0.01},
    "eta_cutoff": SAMPLED | {"eta_cutoff": 0.01},
    "renormalize_logits": SAMPLED | {"renormalize_logits": True},
    "remove_invalid_values": {"remove_invalid_values": True},
    "num_beams": BEAMS,
    "early_stopping": BEAMS | {"early_stopping": True},
    "length_penalty": BEAMS | {"length_penalty": 2.0},
    "num_return_sequences": SAMPLED | {"num_return_sequences": 2},
    "repetition_penalty": {"repetition_penalty": 1.5},
    "encoder_repetition_penalty": {"encoder_repetition_penalty": 1.5},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 2},
    "encoder_no_repeat_ngram_size": {"encoder_no_repeat_ngram_size": 2},
    "bad_words_ids": {"bad_words_ids": [[7], [11, 12]]},
    "sequence_bias": {"sequence_bias": [[[11], 5.0]]},
    "exponential_decay_length_penalty": {"exponential_decay_length_penalty": (2, 1.5)},
    "forced_bos_token_id": {"forced_bos_token_id": 9},
    "forced_eos_token_id": {"forced_eos_token_id": 9},
    "suppress_tokens": {"suppress_tokens": list(range(10, 40))},
    "begin_suppress_tokens": {"begin_suppress_tokens": list(range(10, 40))},
    "watermarking_config": {"watermarking_config": WatermarkingConfig(bias=4.0)},
    "guidance_scale": {"guidance_scale": 1.5},
    "guidance_scale in beams": BEAMS | {"guidance_scale": 1.5},
    "negative_prompt_ids": {"guidance_scale": 1.5, "negative_prompt_ids": torch.full((6, 3), 8)},
    "use_cache": {"use_cache": False},
    "cache_implementation": STATIC,
    "max_cache_len": STATIC | {"max_cache_len": 64},
    "prefill_chunk_size": {"prefill_chunk_size": 3},
    "compile_config": {"compile_config": CompileConfig()},
    "disable_compile": STATIC | {"disable_compile": True},
    "low_memory": {"low_memory": True},
    **{
        f"output_{name}": OUTPUTS | {f"output_{name}": True}
        for name in ("scores", "logits", "attentions", "hidden_states")
    },
    "prefix_allowed_tokens_fn": {"prefix_allowed_tokens_fn": lambda row, ids: list(range(20, 50))},
    "stopping_criteria": {"stopping_criteria": StoppingCriteriaList([MaxLengthCriteria(11)])},
}
REFUSED_GENERATION = {
    "assistant_model": {"assistant_model": object()},
    "assistant_early_exit": {"assistant_early_exit": 1},
    "token_healing": {"token_healing": True},
    "inputs_embeds": {"inputs_embeds": torch.zeros(1, 4, 32)},
    "custom_generate": {"custom_generate": "somebody/decoding"},
}


def names_of(heading: str) -> dict[str, str]:
    """The options in the table below a heading, and what is said of each."""
    section = TABLE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    rows = [line.split("|")[1:3] for line in section.splitlines() if line.startswith("| `")]
    return {name: said for names, said in rows for name in re.findall(r"`(\w+)`", names)}


@pytest.fixture(scope="module")
def llama_and_dense():
    """A Llama and this package's model of dense layers, without pair embeddings, on the same weights."""
    dense = tiny_model(num_local_experts=0, inject_pair_embeddings=False).eval()
    fields = LlamaConfig().to_dict()
    llama = LlamaForCausalLM(
        LlamaConfig(**{name: value for name, value in dense.config.to_dict().items() if name in fields})
    )
    missing, _ = llama.load_state_dict(dense.state_dict(), strict=False)
    assert not missing
    return llama.eval(), dense


def continuations(model, options, **pair):
    input_ids, mask = random_prompts([5, 7, 9, 9, 8, 6])
    torch.manual_seed(1)
    fixed = {"do_sample": False, "max_new_tokens": 6, "pad_token_id": PAD}
    outputs = model.generate(input_ids=input_ids, attention_mask=mask, **pair, **{**fixed, **options})
    return outputs if isinstance(outputs, torch.Tensor) else outputs.sequences


@pytest.mark.parametrize("name", GENERATION)
def test_generation_options_work_as_on_a_llama(llama_and_dense, name):
    llama, dense = llama_and_dense
    options = GENERATION[name]
    # The one difference: placeholders are never generated
    of_llama = {**options, "suppress_tokens": [USER, ITEM, *options.get("suppress_tokens", [])]}
    expected = continuations(llama, of_llama)
    found = continuations(dense, options, user_id=torch.arange(6), item_id=torch.arange(6))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ["prefill_chunk_size", "use_cache", "cache_implementation", "guidance_scale"])
def test_generation_options_belong_to_the_pair(name):
    """With gates and pair embeddings: a row in a batch says what it says alone, under options that split the work."""
    model = spread_clusters(tiny_model()).eval()
    users, items = mixed_pairs(model, 6)
    together = continuations(model, GENERATION[name], user_id=users, item_id=items)
    input_ids, mask = random_prompts([5, 7, 9, 9, 8, 6])
    for row in range(6):
        prompt = input_ids[row][mask[row].bool()][None]
        fixed = {"do_sample": False, "max_new_tokens": 6, "pad_token_id": PAD, **GENERATION[name]}
        alone = model.generate(input_ids=prompt, user_id=users[row], item_id=items[row], **fixed)
        assert together[row, input_ids.shape[1] :].tolist()[: alone.shape[1] - prompt.shape[1]] == (
            alone[0, prompt.shape[1] :].tolist()
        )


def test_a_kept_cache_goes_on_as_the_whole_sequence():
    model = spread_clusters(tiny_model()).eval()
    users, items = mixed_pairs(model, 4)
    input_ids, _ = random_prompts([7] * 4)
    pair = {"user_id": users, "item_id": items, "do_sample": False}
    options = {"max_new_tokens": 5, "eos_token_id": None, "pad_token_id": PAD}
    first = model.generate(input_ids=input_ids, **pair, **options, return_dict_in_generate=True)
    more = torch.cat([first.sequences, torch.full((4, 2), 16)], dim=1)
    expected = model.generate(input_ids=more, **pair, **options)
    found = model.generate(input_ids=more, **pair, **options, past_key_values=first.past_key_values)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", REFUSED_GENERATION)
def test_refused_generation_options_are_named(name):
    model = tiny_model().eval()
    with pytest.raises(ValueError, match=f"`{name}` does not work with `user_id` and `item_id`: "):
        model.generate(user_id=1, item_id=2, **REFUSED_GENERATION[name])
    generation_config = GenerationConfig.from_model_config(model.config)
    if name in generation_config.to_dict():
        setattr(generation_config, name, REFUSED_GENERATION[name][name])
        with pytest.raises(ValueError, match=f"`{name}` does not work"):
            model.generate(user_id=1, item_id=2, generation_config=generation_config)


def test_the_table_names_every_generation_option():
    table = names_of("Generation")
    fields = {name for name in GenerationConfig().to_dict() if not name.startswith("_")} - {"transformers_version"}
    arguments = set(inspect.signature(GenerationMixin.generate).parameters) - {"self", "inputs", "kwargs"}
    assert fields | arguments <= set(table)
    assert set(REFUSED_GENERATION) == {name for name, said in table.items() if said.strip().startswith("refused")}
    tested = {name for options in GENERATION.values() for name in options}
    as_on_a_llama = {name for name, said in table.items() if said.strip().startswith("as on a Llama")}
    # Of the others, some are in every test of generation, and some are kept in tests/test_generation.py
    elsewhere = {"pad_token_id", "bos_token_id", "past_key_values", "cache_config", "logits_processor", "streamer"}
    elsewhere |= {
        "generation_config",
        "synced_gpus",
        "stop_strings",
        "prompt_lookup_num_tokens",
        "return_dict_in_generate",
    }
    elsewhere |= {"max_matching_ngram_size", "negative_prompt_attention_mask"}
    assert as_on_a_llama - tested <= elsewhere


# Values that are not the default, of what is refused when the config is made
REFUSED_CONFIG = {
    "packing": True,
    "eval_packing": True,
    "padding_free": True,
    "completion_only_loss": False,
    "assistant_only_loss": True,
    "loss_type": "dft",
    "label_smoothing_factor": 0.6,
    "use_liger_kernel": True,
    "chat_template_path": "template.jinja",
    "dataset_text_field": "review",
    "truncation_mode": "keep_end",
    "eos_token": "</s>",
    "pad_token": "<pad>",
    "model_init_kwargs": {"dtype": "bfloat16"},
}
REFUSED_ARGUMENTS = {
    "compute_loss_func": lambda outputs, labels, num_items_in_batch=None: 0,
    "formatting_func": lambda record: "x",
    "quantization_config": object(),
}


def test_the_table_names_every_training_option():
    table = names_of("Training")
    own = {option.name for option in fields(GaVaMoESFTConfig)} - {option.name for option in fields(SFTConfig)}
    arguments = set(inspect.signature(SFTTrainer.__init__).parameters) - {"self", "model", "args"}
    assert {option.name for option in fields(SFTConfig)} | arguments <= set(table)
    assert not own & set(table)
    refused = {name for name, said in table.items() if said.strip().startswith("refused")}
    assert refused == set(REFUSED_CONFIG) | set(REFUSED_ARGUMENTS)
    assert set(REFUSED_CONFIG) == set(REFUSED_OPTIONS)


@pytest.mark.parametrize("name", REFUSED_CONFIG)
def test_options_that_would_do_nothing_are_refused_in_the_config(tmp_path, name):
    with pytest.raises(ValueError, match=rf"^`{name}` is .*, but .* Leave it out"):
        sft_arguments(tmp_path, **{name: REFUSED_CONFIG[name]})
    (default,) = (option.default for option in fields(GaVaMoESFTConfig) if option.name == name)
    sft_arguments(tmp_path, **({} if default is MISSING else {name: default}))


@pytest.mark.parametrize("name", REFUSED_ARGUMENTS)
def test_arguments_that_would_do_nothing_are_refused_at_construction(tiny, planted, tmp_path, name):
    processor, model = tiny
    records = planted.records["train"].select(range(8))
    with pytest.raises(ValueError, match=f"`{name}` would do nothing: "):
        GaVaMoESFTTrainer(
            model, sft_arguments(tmp_path), records, processor=processor, **{name: REFUSED_ARGUMENTS[name]}
        )


@pytest.fixture
def trainer_of(tiny, planted, tmp_path):
    """Makes a trainer of a tiny model on a few records."""
    processor = tiny[0]
    train = planted.records["train"].select(range(16))

    def make(train=train, held_out=None, arguments=None, model=None, **options):
        fixed = {"max_steps": 2, "eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False}
        args = sft_arguments(tmp_path, **{**fixed, **(arguments or {})})
        model = copy.deepcopy(tiny[1]) if model is None else model
        return GaVaMoESFTTrainer(model, args, train, held_out, processor=processor, **options)

    return make


@pytest.mark.parametrize("way", ["optimizers", "optimizer_cls_and_kwargs"])
@pytest.mark.parametrize("rate", [0.0, 1e-2])
def test_a_given_optimizer_is_used(trainer_of, tiny, way, rate):
    """A learning rate of 0 moves nothing, another one does; of a class alone, the rating model has a tenth."""
    model = copy.deepcopy(tiny[1])
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    given = {
        "optimizers": (optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)),
        "optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": rate}),
    }
    trainer = trainer_of(model=model, **{way: given[way]})
    before = model.lm_head.weight.clone()
    trainer.train()
    assert torch.equal(model.lm_head.weight, before) == (rate == 0)
    rates = {group["initial_lr"] for group in trainer.optimizer.param_groups}
    assert rates == ({rate} if way == "optimizers" else {rate, 0.1 * rate})


def test_records_wherever_the_trainer_takes_data(trainer_of, planted):
    validation, test = (planted.records[split].select(range(6)) for split in ("validation", "test"))
    trainer = trainer_of(held_out={"one": validation, "two": test})
    scores = trainer.evaluate()
    assert {"eval_one_nll", "eval_two_nll"} <= set(scores)
    alone = trainer_of(held_out=validation)
    assert alone.evaluate()["eval_nll"] == pytest.approx(scores["eval_one_nll"])
    assert alone.evaluate(test)["eval_nll"] == pytest.approx(scores["eval_two_nll"])
    assert alone.predict(test).metrics["test_loss"] == pytest.approx(alone.evaluate(test)["eval_loss"])
    with pytest.raises(ValueError, match=r"among \['eval_one_nll', 'eval_two_nll'\] with several sets"):
        best = {"load_best_model_at_end": True, "eval_strategy": "epoch", "save_strategy": "epoch"}
        trainer_of(held_out={"one": validation, "two": test}, arguments=best)
    with pytest.raises(TypeError, match=r"got DatasetDict\. Did you mean `records\[\"train\"\]`"):
        trainer_of(planted.records)
    with pytest.raises(TypeError, match="Expected `args` as a GaVaMoESFTConfig, but got SFTConfig"):
        GaVaMoESFTTrainer(
            trainer.model, SFTConfig("out", bf16=False, use_cpu=True), validation, processor=trainer.processor
        )
    with pytest.raises(TypeError, match="Expected `model` as a GaVaMoEForCausalLM, but got 'some/model'"):
        GaVaMoESFTTrainer("some/model", trainer.args, validation, processor=trainer.processor)


def test_a_stream_trains_as_the_same_records_in_order(trainer_of, planted):
    train = planted.records["train"].select(range(16))
    losses = []
    for records in (train, train.to_iterable_dataset()):
        in_order = {"train_sampling_strategy": "sequential", "feature_dropout": 0.0, "logging_steps": 1}
        trainer = trainer_of(records, arguments=in_order)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert len(losses[0]) == 2 and losses[0] == losses[1]
    examples = tokenize_records(train.to_iterable_dataset(), trainer.processor, feature_dropout=0.5)
    lengths = [[len(example["input_ids"]) for example in examples] for _ in range(2)]
    whole = [len(example["input_ids"]) for example in tokenize_records(train, trainer.processor)]
    # The same is dropped each time, and not from all
    assert lengths[0] == lengths[1] and 4 < sum(a < b for a, b in zip(lengths[0], whole, strict=True)) < 12


def test_a_training_that_diverges_ends_and_saves_nothing(trainer_of, tmp_path):
    trainer = trainer_of(arguments={"save_strategy": "steps", "save_steps": 1, "max_steps": 4, "learning_rate": 1e30})
    with pytest.raises(ValueError, match=r"The loss is .* after \d steps: the training has diverged|no longer finite"):
        trainer.train()
    for path in tmp_path.rglob("*.safetensors"):
        assert all(value.isfinite().all() for value in load_file(path).values()), path
    with torch.no_grad():
        trainer.model.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"no longer finite \("):
        trainer.save_model(str(tmp_path / "never"))
    assert not list((tmp_path / "never").glob("*.safetensors"))


def test_metrics_of_whole_sequences(trainer_of, planted):
    """A metric sees the logits and labels that the loss is of."""
    validation = planted.records["validation"].select(range(6))

    def negative_log_likelihood(prediction):
        logits = torch.from_numpy(prediction.predictions)[:, :-1]
        labels = torch.from_numpy(prediction.label_ids)[:, 1:]
        return {"own": torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).item()}

    arguments = {"per_device_eval_batch_size": 6}
    scores = trainer_of(held_out=validation, arguments=arguments, compute_metrics=negative_log_likelihood).evaluate()
    assert scores["eval_own"] == pytest.approx(scores["eval_nll"], rel=1e-5)
    first = trainer_of(
        held_out=validation,
        arguments=arguments,
        compute_metrics=lambda prediction: {"shape": len(prediction.predictions.shape)},
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(dim=-1),
    )
    assert first.predict(validation).metrics["test_shape"] == 2
