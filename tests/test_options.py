"""Every option that transformers and TRL document: as on a Llama, or refused by name, and in the table of the docs."""

import inspect
import re
from pathlib import Path

import pytest
import torch
from references import ITEM, PAD, USER, mixed_pairs, random_prompts, spread_clusters, tiny_model
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
