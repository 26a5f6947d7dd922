"""A dense Llama becomes a GaVaMoE: what stays, what is new, what is refused."""

import pytest
import torch
from references import random_prompts
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from gavamoe_hf.upcycling import upcycle_llama

SIZES = {
    "num_users": 8,
    "num_items": 9,
    "vae_embedding_size": 16,
    "vae_num_heads": 2,
    "vae_intermediate_size": 24,
    "vae_decoder_hidden_size": 12,
    "latent_size": 4,
    "num_local_experts": 4,
    "moe_intermediate_size": 16,
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


def upcycle(base, vocab_size=64, expert_init="residual", **overrides):
    placeholders = {"user_token_id": vocab_size - 2, "item_token_id": vocab_size - 1}
    return upcycle_llama(base, vocab_size, expert_init, **{**SIZES, **placeholders, **overrides}).eval()


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("options", [{}, {"tie_word_embeddings": True}, {"mlp_bias": True, "attention_bias": True}])
def test_residual_equals_its_base(top_k, options):
    base = make_llama(**options)
    model = upcycle(base, num_experts_per_tok=top_k, inject_pair_embeddings=False)
    input_ids, mask = random_prompts([9, 7, 4])
    input_ids = input_ids.clamp(max=61)
    expected = base(input_ids, attention_mask=mask).logits
    assert model.config.shared_expert_intermediate_size == 48
    for gate in range(3):
        logits = model(input_ids, attention_mask=mask, gate_index=torch.full((3,), gate)).logits
        torch.testing.assert_close(logits[..., :62], expected, rtol=1e-6, atol=1e-6)
    assert expected.std() > 0.5


def test_residual_experts_learn():
    # The down projection is zero, not the rest: it has a gradient on the first step, and the others on the second
    model = upcycle(make_llama())
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


def test_dense_ablation_keeps_the_base():
    base = make_llama()
    for expert_init in ("residual", "random"):
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
    # A base that has spare rows, as many do, keeps its size
    assert upcycle(make_llama(vocab_size=80), user_token_id=62).config.vocab_size == 80


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


def test_dtype_is_kept(tmp_path):
    model = upcycle(make_llama().to(torch.bfloat16))
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if ".rating_model." in name else torch.bfloat16), name
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.dtype == torch.bfloat16 and loaded.rating_model.dtype == torch.float32
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


def test_settings_of_the_base_are_kept():
    base = make_llama()
    base.generation_config.max_length = 77
    model = upcycle(base, num_clusters=5)
    assert model.config.rope_parameters == base.config.rope_parameters
    assert model.config.rms_norm_eps == 1e-5
    assert (model.config.model_type, model.config.num_clusters) == ("gavamoe", 5)
    assert model.generation_config.max_length == 77
    before = {name: value.clone() for name, value in base.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert all(torch.equal(before[name], value) for name, value in base.state_dict().items())


def test_refusals():
    mistral = MistralForCausalLM(
        MistralConfig(vocab_size=62, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
    )
    with pytest.raises(ValueError, match=r'Expected a Llama .* but got model_type "mistral"'):
        upcycle(mistral)
    with pytest.raises(ValueError, match=r"among \['residual', 'random'\], but got 'partition'"):
        upcycle(make_llama(), expert_init="partition")


def test_placeholders_are_new_tokens():
    model = upcycle(make_llama())
    prompt = torch.tensor([[5, 62, 9, 63]])
    tokens = model.generate(prompt, user_id=1, item_id=2, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert tokens.shape == (1, 7)
