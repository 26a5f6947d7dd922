"""Router and experts against loops, every implementation, and the cases in which the parent's numbers return."""

import copy

import pytest
import torch
from references import (
    ITEM,
    USER,
    mixed_pairs,
    naive_experts,
    naive_router,
    random_prompts,
    tiny_config,
    tiny_model,
)
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from gavamoe_hf.modeling_gavamoe import GaVaMoEExperts, GaVaMoEMultiGateRouter, GaVaMoESparseMoeBlock

IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")


def filled(module: torch.nn.Module, std: float = 0.5) -> torch.nn.Module:
    torch.manual_seed(1)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return module


# A single token is scored with all gates at once
@pytest.mark.parametrize("num_tokens", [1, 3])
@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_router_against_loop(normalise, top_k, num_tokens):
    router = filled(GaVaMoEMultiGateRouter(tiny_config(num_experts_per_tok=top_k, norm_topk_prob=normalise)))
    hidden, gates = torch.randn(5, num_tokens, 32), torch.tensor([2, 0, 1, 2, 0])
    logits, weights, experts = router(hidden, gates)
    slow_logits, slow_weights, slow_experts = naive_router(hidden, router.weight, gates, top_k, normalise)
    torch.testing.assert_close(logits, slow_logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(weights, slow_weights, rtol=1e-5, atol=1e-6)
    assert torch.equal(experts, slow_experts)
    if normalise:
        torch.testing.assert_close(weights.sum(dim=-1), torch.ones(5 * num_tokens))
    elif top_k < 4:
        assert (weights.sum(dim=-1) < 1).all()
    # Samples 0 and 3 share a gate, 0 and 1 do not: the same hidden states are scored alike, or not
    same, _, _ = router(hidden[:1].expand(5, -1, -1), gates)
    same = same.view(5, num_tokens, 4)
    assert torch.equal(same[0], same[3]) and not torch.allclose(same[0], same[1])


def test_router_weights_by_hand():
    # Gate 1 scores the experts by x_0 * (0, log 2, log 3, log 4): at x_0 = 1 the shares are 1, 2, 3, 4 of 10.
    # The top two are 0.4 and 0.3; rescaled, 4/7 and 3/7
    for normalise, expected in ((True, [4 / 7, 3 / 7]), (False, [0.4, 0.3])):
        router = GaVaMoEMultiGateRouter(tiny_config(norm_topk_prob=normalise))
        with torch.no_grad():
            router.weight.zero_()
            router.weight[1, :, 0] = torch.tensor([1.0, 2, 3, 4]).log()
        hidden = torch.zeros(1, 1, 32)
        hidden[..., 0] = 1
        _, weights, experts = router(hidden, torch.tensor([1]))
        torch.testing.assert_close(weights, torch.tensor([expected]))
        assert experts.tolist() == [[3, 2]]


@pytest.mark.parametrize("num_tokens", [1, 3])
def test_router_gradients_stay_with_the_gates_used(num_tokens):
    router = filled(GaVaMoEMultiGateRouter(tiny_config(norm_topk_prob=False)))
    _, weights, _ = router(torch.randn(2, num_tokens, 32), torch.tensor([0, 2]))
    weights.square().sum().backward()
    assert router.weight.grad[0].abs().amax(dim=-1).min() > 0
    assert router.weight.grad[2].abs().amax(dim=-1).min() > 0
    assert router.weight.grad[1].abs().max() == 0


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_experts_against_loop(implementation):
    config = tiny_config()
    config._experts_implementation = implementation
    experts = filled(GaVaMoEExperts(config), std=0.3)
    hidden = torch.randn(7, 32, requires_grad=True)
    # Expert 3 has no token
    index = torch.tensor([[0, 1], [1, 0], [2, 1], [0, 2], [2, 0], [1, 2], [0, 1]])
    weights = torch.rand(7, 2, requires_grad=True)
    inputs = [hidden, weights, experts.gate_up_proj, experts.down_proj]
    fast = experts(hidden, index, weights)
    slow = naive_experts(hidden, experts.gate_up_proj, experts.down_proj, index, weights)
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-5)
    direction = torch.randn_like(fast)
    fast_grads = torch.autograd.grad((fast * direction).sum(), inputs)
    slow_grads = torch.autograd.grad((slow * direction).sum(), inputs)
    for quick, loop in zip(fast_grads, slow_grads, strict=True):
        torch.testing.assert_close(quick, loop, rtol=1e-4, atol=1e-5)
    assert fast_grads[2][3].abs().max() == 0 and fast_grads[2][0].abs().max() > 0


def test_implementations_agree_in_the_whole_model(model):
    users, items = mixed_pairs(model, 6)
    input_ids, mask = random_prompts([9, 7, 8, 9, 5, 6])
    labels = input_ids.masked_fill(mask == 0, -100)
    logits, gradients = {}, {}
    for implementation in IMPLEMENTATIONS:
        copied = copy.deepcopy(model)
        copied.set_experts_implementation(implementation)
        assert copied.model.layers[0].mlp.experts.config._experts_implementation == implementation
        output = copied(input_ids, attention_mask=mask, labels=labels, user_id=users, item_id=items)
        output.loss.backward()
        logits[implementation] = output.logits
        gradients[implementation] = {n: p.grad for n, p in copied.named_parameters() if p.grad is not None}
    for implementation in IMPLEMENTATIONS[1:]:
        torch.testing.assert_close(logits[implementation], logits["eager"], rtol=1e-4, atol=1e-4)
        assert gradients[implementation].keys() == gradients["eager"].keys()
        for name, gradient in gradients["eager"].items():
            torch.testing.assert_close(gradients[implementation][name], gradient, rtol=1e-3, atol=1e-4)


def test_gates_matter_and_are_per_sample(model):
    input_ids, _ = random_prompts([8])
    per_gate = [
        model(input_ids, user_id=torch.tensor([1]), item_id=torch.tensor([2]), gate_index=torch.tensor([gate])).logits
        for gate in range(3)
    ]
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert (per_gate[first] - per_gate[second]).abs().max() > 0.1
    users, items = torch.tensor([1, 1, 1, 1]), torch.tensor([2, 2, 2, 2])
    gates = torch.tensor([2, 0, 1, 0])
    together = model(input_ids.expand(4, -1), user_id=users, item_id=items, gate_index=gates).logits
    for row, gate in enumerate(gates):
        torch.testing.assert_close(together[row], per_gate[gate][0], rtol=1e-4, atol=1e-4)


def test_gate_is_the_most_probable_cluster(model):
    users, items = mixed_pairs(model)
    input_ids, mask = random_prompts([8] * 64)
    output = model(input_ids, attention_mask=mask, user_id=users, item_id=items)
    assert torch.equal(output.gate_index, model.cluster_posterior(users, items).argmax(dim=-1))
    assert output.gate_index.unique().tolist() == [0, 1, 2]
    given = model(input_ids, attention_mask=mask, user_id=users, item_id=items, gate_index=output.gate_index)
    assert torch.equal(given.logits, output.logits)


# The parent's numbers


@pytest.mark.parametrize("top_k", [1, 2])
def test_one_gate_is_mixtral(top_k):
    config = tiny_config(num_clusters=1, num_experts_per_tok=top_k)
    block = filled(GaVaMoESparseMoeBlock(config), std=0.3)
    mixtral_config = MixtralConfig(hidden_size=32, intermediate_size=16, num_local_experts=4, num_experts_per_tok=top_k)
    mixtral_config._experts_implementation = "eager"
    mixtral = MixtralSparseMoeBlock(mixtral_config)
    with torch.no_grad():
        mixtral.gate.weight.copy_(block.gate.weight[0])
        mixtral.experts.gate_up_proj.copy_(block.experts.gate_up_proj)
        mixtral.experts.down_proj.copy_(block.experts.down_proj)
    hidden = torch.randn(3, 5, 32)
    ours, theirs = block(hidden, torch.zeros(3, dtype=torch.long)), mixtral(hidden)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert theirs.abs().mean() > 0.1


def test_one_expert_is_the_dense_layer():
    config = tiny_config(num_local_experts=1, num_experts_per_tok=1)
    block = filled(GaVaMoESparseMoeBlock(config), std=0.3)
    dense_config = LlamaConfig(hidden_size=32, intermediate_size=16)
    dense = LlamaMLP(dense_config)
    with torch.no_grad():
        dense.gate_proj.weight.copy_(block.experts.gate_up_proj[0, :16])
        dense.up_proj.weight.copy_(block.experts.gate_up_proj[0, 16:])
        dense.down_proj.weight.copy_(block.experts.down_proj[0])
    hidden = torch.randn(3, 5, 32)
    # One expert's share is softmax of one logit, 1, under every gate
    torch.testing.assert_close(block(hidden, torch.tensor([0, 1, 2])), dense(hidden), rtol=1e-5, atol=1e-5)


def test_partitioned_dense_layer_with_all_experts_active():
    # The dense layer's 48 neurons cut into 4 experts of 12. Equal logits give every expert the weight 1/4, so that the
    # sum is 1/4 of the dense output: 4 times it (a down projection 4 times as large) is the dense output
    config = tiny_config(num_experts_per_tok=4, moe_intermediate_size=12)
    block = filled(GaVaMoESparseMoeBlock(config))
    dense = filled(LlamaMLP(config), std=0.3)
    with torch.no_grad():
        block.gate.weight.zero_()
        for expert in range(4):
            neurons = slice(12 * expert, 12 * (expert + 1))
            block.experts.gate_up_proj[expert, :12] = dense.gate_proj.weight[neurons]
            block.experts.gate_up_proj[expert, 12:] = dense.up_proj.weight[neurons]
            block.experts.down_proj[expert] = dense.down_proj.weight[:, neurons]
    hidden = torch.randn(3, 5, 32)
    gates = torch.tensor([0, 1, 2])
    torch.testing.assert_close(4 * block(hidden, gates), dense(hidden), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        block.experts.down_proj.mul_(4)
    torch.testing.assert_close(block(hidden, gates), dense(hidden), rtol=1e-5, atol=1e-5)


def test_shared_expert_is_added():
    config = tiny_config(shared_expert_intermediate_size=20)
    block = filled(GaVaMoESparseMoeBlock(config), std=0.3)
    hidden, gates = torch.randn(2, 3, 32), torch.tensor([0, 2])
    shared = block.shared_expert
    assert shared.gate_proj.weight.shape == (20, 32) and config.intermediate_size == 48
    block.shared_expert = None
    routed = block(hidden, gates)
    block.shared_expert = shared
    torch.testing.assert_close(block(hidden, gates), routed + shared(hidden))


@pytest.mark.parametrize("tied", [False, True])
def test_without_experts_and_injection_it_is_llama(tied):
    ours = tiny_model(
        num_local_experts=0, inject_pair_embeddings=False, tie_word_embeddings=tied, attention_bias=True
    ).eval()
    llama_config = LlamaConfig(
        **{name: getattr(ours.config, name) for name in LlamaConfig().to_dict() if hasattr(ours.config, name)}
    )
    llama = LlamaForCausalLM(llama_config).eval()
    ours_state = ours.state_dict()
    llama.load_state_dict({name: ours_state[name] for name in llama.state_dict()})
    input_ids, mask = random_prompts([9, 7, 4])
    expected = llama(input_ids, attention_mask=mask, labels=input_ids)
    # With and without the ids of a pair, which have nothing to change here
    for extra in ({}, {"user_id": torch.tensor([0, 1, 2]), "item_id": torch.tensor([0, 1, 2])}):
        output = ours(input_ids, attention_mask=mask, labels=input_ids, **extra)
        assert torch.equal(output.logits, expected.logits)
        assert torch.equal(output.loss, expected.loss)
        assert output.router_logits is None
    assert not {USER, ITEM}.isdisjoint(input_ids.flatten().tolist())


def test_routing_report(model):
    users, items = mixed_pairs(model, 6)
    report = model.routing_report(users, items)
    assert torch.equal(report.gate_index, model.gate_index(users, items))
    assert torch.equal(report.predicted_rating, model.predict_rating(users, items))
    assert report.expert_share.shape == (6, 2, 4)
    torch.testing.assert_close(report.expert_share.sum(dim=-1), torch.ones(6, 2))
    # By hand for one pair with padding: count its own tokens' choices alone
    input_ids, mask = random_prompts([5, 9])
    report = model.routing_report(users[:2], items[:2], input_ids, mask)
    alone = model(input_ids[:1, 4:], user_id=users[:1], item_id=items[:1], output_router_logits=True, use_cache=False)
    for layer, logits in enumerate(alone.router_logits):
        chosen = [sorted(range(4), key=lambda expert, row=row: -row[expert])[:2] for row in logits.tolist()]
        by_hand = [sum(expert in pair for pair in chosen) / 10 for expert in range(4)]  # 5 tokens, 2 slots each
        torch.testing.assert_close(report.expert_share[0, layer], torch.tensor(by_hand))


def test_experts_are_switched_after_a_llama_was_asked(model):
    assert LlamaForCausalLM._can_set_experts_implementation() is False
    model = copy.deepcopy(model)
    model.set_experts_implementation("eager")
    assert model.config._experts_implementation == "eager"
