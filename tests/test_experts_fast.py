"""The experts implementation for CPUs against the loop over experts: values, gradients, and wherever it is used."""

import copy
import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from references import mixed_pairs, random_prompts, tiny_config, tiny_model
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

import gavamoe_hf.experts_gavamoe as fast
from gavamoe_hf import GaVaMoEForCausalLM
from gavamoe_hf.modeling_gavamoe import GaVaMoEExperts, GaVaMoESparseMoeBlock

# Its paths depend on the instructions that the processor has
pytestmark = pytest.mark.processor

MANY = 100  # tokens, enough for the sorted path with 4 experts


def make_experts(implementation: str = fast.SORTED_MM, dtype: torch.dtype = torch.float32, **overrides):
    config = tiny_config(**overrides)
    config._experts_implementation = implementation
    experts = GaVaMoEExperts(config)
    torch.manual_seed(1)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return experts.to(dtype)


def routed(num_tokens: int, top_k: int, dtype: torch.dtype = torch.float32, experts: tuple[int, ...] = (0, 1, 2)):
    """Hidden states, choices among the experts given, weights, and a direction for the gradient."""
    torch.manual_seed(2)
    choices = torch.rand(num_tokens, len(experts)).argsort(dim=-1)[:, :top_k]
    hidden, direction = torch.randn(num_tokens, 32), torch.randn(num_tokens, 32)
    weights = torch.rand(num_tokens, top_k)
    return (
        hidden.to(dtype).requires_grad_(),
        torch.tensor(experts)[choices],
        weights.to(dtype).requires_grad_(),
        direction.to(dtype),
    )


def answers(experts, hidden, index, weights, direction):
    """The output, and the gradients of hidden states, routing weights, `gate_up_proj` and `down_proj`."""
    output = experts(hidden, index, weights)
    inputs = [hidden, weights, *experts.parameters()]
    return [output, *torch.autograd.grad((output * direction).sum(), inputs)]


def sorted_calls(monkeypatch) -> list[int]:
    """A list that gets an entry whenever the sorted path runs."""
    calls, sort = [], fast._sort_by_expert
    monkeypatch.setattr(fast, "_sort_by_expert", lambda *args: calls.append(1) or sort(*args))
    return calls


@pytest.mark.parametrize("activation", ["silu", "gelu", "linear"])
@pytest.mark.parametrize("num_tokens", [1, 3, MANY])
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_values_and_gradients(num_tokens, top_k, activation, monkeypatch):
    calls = sorted_calls(monkeypatch)
    batch = routed(num_tokens, top_k)  # expert 3 has no token
    found = answers(make_experts(hidden_act=activation), *batch)
    assert len(calls) == (num_tokens * top_k >= 32 * 4)
    expected = answers(make_experts("eager", hidden_act=activation), *batch)
    for quick, slow in zip(found, expected, strict=True):
        torch.testing.assert_close(quick, slow, rtol=1e-5, atol=2e-5)
    assert found[3][3].abs().max() == found[4][3].abs().max() == 0 and found[3].abs().max() > 0


def test_double_precision():
    batch = routed(MANY, 2, torch.float64)
    expected = answers(make_experts("eager", torch.float64), *batch)
    for quick, slow in zip(answers(make_experts(dtype=torch.float64), *batch), expected, strict=True):
        torch.testing.assert_close(quick, slow, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("has_products", [True, False])
@pytest.mark.parametrize("num_tokens", [1, 3, 12, MANY])
def test_half_precision_is_as_exact_as_the_loop(num_tokens, has_products, monkeypatch):
    # Of processors with the instructions and without, whichever this one is
    monkeypatch.setattr(fast, "_has_matrix_products", lambda dtype: has_products or dtype == torch.float32)
    calls = sorted_calls(monkeypatch)
    batch = routed(num_tokens, 2, torch.bfloat16)
    found = answers(make_experts(dtype=torch.bfloat16), *batch)
    assert len(calls) == (num_tokens == MANY or (num_tokens == 12 and not has_products))
    loop = answers(make_experts("eager", torch.bfloat16), *batch)
    exact = answers(
        make_experts("eager", torch.bfloat16).float(),
        *(tensor.detach().float().requires_grad_() if tensor.is_floating_point() else tensor for tensor in batch),
    )
    for quick, slow, right in zip(found, loop, exact, strict=True):
        assert quick.dtype == torch.bfloat16
        assert (quick - right).abs().mean() <= 1.2 * (slow - right).abs().mean()
        torch.testing.assert_close(quick.float(), right, rtol=0.05, atol=0.02 * right.abs().max().item())


def test_half_precision_in_single_is_rounded_once(monkeypatch):
    monkeypatch.setattr(fast, "_has_matrix_products", lambda dtype: dtype == torch.float32)
    hidden, index, weights, _ = routed(MANY, 2, torch.bfloat16)
    found = make_experts(dtype=torch.bfloat16)(hidden, index, weights)
    exact = make_experts("eager", torch.bfloat16).float()(hidden.float(), index, weights.float())
    torch.testing.assert_close(found, exact.bfloat16(), rtol=2**-7, atol=1e-5)


@pytest.mark.parametrize("num_tokens", [1, MANY])
def test_experts_that_are_elsewhere(num_tokens):
    # As under expert parallelism: 4 experts here, everything from 4 on is on other processes
    hidden, index, weights, direction = routed(num_tokens, 2, experts=(0, 3, 4))
    index[:5] = torch.tensor([4, 4])
    index[-1] = torch.tensor([3, 4])
    batch = hidden, index, weights, direction
    found, expected = answers(make_experts(), *batch), answers(make_experts("eager"), *batch)
    for quick, slow in zip(found, expected, strict=True):
        torch.testing.assert_close(quick, slow, rtol=1e-5, atol=2e-5)
    assert found[2][index == 4].abs().max() == 0 and found[2][index == 3].abs().min() > 0


def test_nothing_is_read_before_it_is_written():
    # Uninitialised memory is filled with NaN in this mode
    hidden, index, weights, direction = routed(MANY, 2, experts=(0, 3, 4))
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        found = answers(make_experts(), hidden, index, weights, direction)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(tensor.isfinite().all() for tensor in found)


def test_no_token_at_all():
    experts = make_experts()
    empty = experts(torch.zeros(0, 32), torch.zeros(0, 2, dtype=torch.long), torch.zeros(0, 2))
    assert empty.shape == (0, 32)
    index = torch.full((MANY, 2), 4)
    hidden = torch.randn(MANY, 32, requires_grad=True)
    output = experts(hidden, index, torch.rand(MANY, 2))
    output.sum().backward()
    assert output.abs().max() == 0 and hidden.grad.abs().max() == 0


def test_frozen_experts_get_no_gradient():
    hidden, index, weights, direction = routed(MANY, 2)
    expected = answers(make_experts("eager"), hidden, index, weights, direction)
    for frozen in ({"gate_up_proj"}, {"down_proj"}, {"gate_up_proj", "down_proj"}):
        experts = make_experts()
        for name in frozen:
            getattr(experts, name).requires_grad_(False)
        hidden.grad = None
        (experts(hidden, index, weights) * direction).sum().backward()
        torch.testing.assert_close(hidden.grad, expected[1], rtol=1e-5, atol=2e-5)
        for place, name in ((3, "gate_up_proj"), (4, "down_proj")):
            gradient = getattr(experts, name).grad
            if name in frozen:
                assert gradient is None
            else:
                torch.testing.assert_close(gradient, expected[place], rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("has_products", [True, False])
def test_autocast(has_products, monkeypatch):
    monkeypatch.setattr(fast, "_has_matrix_products", lambda dtype: has_products or dtype == torch.float32)
    batch = routed(MANY, 2)
    with torch.autocast("cpu", torch.bfloat16):
        found = answers(make_experts(), *batch)
        slow = answers(make_experts("eager"), *batch)
    exact = answers(make_experts("eager"), *batch)
    for quick, loop, right in zip(found, slow, exact, strict=True):
        assert quick.dtype == loop.dtype == torch.float32
        torch.testing.assert_close(quick, right, rtol=0.05, atol=0.02 * right.abs().max().item())
        # In half precision where the processor has it, in single where not
        assert (quick - right).abs().mean() > 1e-4 if has_products else torch.allclose(quick, right, 1e-5, 2e-5)


def test_less_is_kept_for_backward_than_by_the_loop():
    hidden, index, weights, _ = routed(MANY, 2)
    kept = {}
    for implementation in (fast.SORTED_MM, "eager", "grouped_mm"):
        experts = make_experts(implementation)
        weight_storages = {parameter.untyped_storage().data_ptr() for parameter in experts.parameters()}
        storages = {}

        def pack(tensor, storages=storages):
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = experts(hidden, index, weights)
        kept[implementation] = sum(size for place, size in storages.items() if place not in weight_storages)
        assert output.requires_grad
    # Hidden states, both projections of each choice, and a few numbers a choice (index, place, weight)
    by_hand = 4 * (MANY * 32 + 2 * MANY * 2 * 16) + 2 * MANY * (3 * 8 + 4)
    assert kept[fast.SORTED_MM] <= by_hand + 64
    assert kept[fast.SORTED_MM] < 0.6 * min(kept["eager"], kept["grouped_mm"])


# In the whole model


def loss_and_gradients(model: GaVaMoEForCausalLM):
    users, items = mixed_pairs(model, 12)
    input_ids, mask = random_prompts([12] * 12)
    output = model(input_ids, attention_mask=mask, labels=input_ids, user_id=users, item_id=items, use_cache=False)
    output.loss.backward()
    return output.loss, {name: value.grad for name, value in model.named_parameters() if value.grad is not None}


def assert_same(found, expected):
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-6)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(model, reentrant, monkeypatch):
    calls = sorted_calls(monkeypatch)
    plain = copy.deepcopy(model).train()
    plain.set_experts_implementation("eager")
    checkpointed = copy.deepcopy(model).train()
    checkpointed.gradient_checkpointing_enable({"use_reentrant": reentrant})
    checkpointed.enable_input_require_grads()
    state = torch.get_rng_state()
    expected = loss_and_gradients(plain)
    torch.set_rng_state(state)
    found = loss_and_gradients(checkpointed)
    assert len(calls) == 4  # two layers, each forward and recomputed
    assert_same(found, expected)


def test_backward_twice():
    hidden, index, weights, direction = routed(MANY, 2)
    experts = make_experts()
    loss = (experts(hidden, index, weights) * direction).sum()
    first = torch.autograd.grad(loss, [hidden, *experts.parameters()], retain_graph=True)
    second = torch.autograd.grad(loss, [hidden, *experts.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("num_tokens", [1, 4, 40])
def test_compiles_without_a_break(num_tokens):
    config = tiny_config()
    config._experts_implementation = fast.SORTED_MM
    block = GaVaMoESparseMoeBlock(config).requires_grad_(False)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    hidden, gates = torch.randn(3, num_tokens, 32), torch.tensor([0, 2, 1])
    torch.testing.assert_close(compiled(hidden, gates), block(hidden, gates), rtol=1e-5, atol=1e-5)


def test_lora_on_the_experts_trains(model, monkeypatch):
    calls = sorted_calls(monkeypatch)
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    lora = LoraConfig(r=2, target_modules=[], target_parameters=parameters, init_lora_weights=False)
    results = {}
    for implementation in (fast.SORTED_MM, "eager"):
        torch.manual_seed(3)
        adapted = get_peft_model(copy.deepcopy(model).eval(), lora)
        adapted.get_base_model().set_experts_implementation(implementation)
        results[implementation] = loss_and_gradients(adapted.get_base_model())
    assert len(calls) == 2
    assert len(results["eager"][1]) == 2 * 2 * 2 and all(".lora_" in name for name in results["eager"][1])
    assert all(gradient.abs().max() > 0 for gradient in results["eager"][1].values())
    assert_same(results[fast.SORTED_MM], results["eager"])


# Which implementation a model uses


def test_the_default_is_not_written_down(tmp_path):
    model = tiny_model()
    assert model.config._experts_implementation == fast.SORTED_MM
    assert model.get_experts_implementation() == {"": fast.SORTED_MM}
    model.save_pretrained(tmp_path)
    assert (tmp_path / "experts_gavamoe.py").is_file()
    assert "sorted_mm" not in (tmp_path / "config.json").read_text()
    assert not any("experts_implementation" in name for name in json.loads((tmp_path / "config.json").read_text()))
    loaded = GaVaMoEForCausalLM.from_pretrained(tmp_path)
    assert loaded.config._experts_implementation == fast.SORTED_MM
    for name in ("eager", "grouped_mm", "batched_mm"):
        loaded = GaVaMoEForCausalLM.from_pretrained(tmp_path, experts_implementation=name)
        assert loaded.model.layers[0].mlp.experts.config._experts_implementation == name
        loaded.set_experts_implementation(fast.SORTED_MM)
        assert loaded.config._experts_implementation == fast.SORTED_MM
    with pytest.raises(ValueError, match='`experts_implementation="fastest"` is not supported'):
        GaVaMoEForCausalLM.from_pretrained(tmp_path, experts_implementation="fastest")


def test_elsewhere_than_on_a_cpu_it_is_grouped_mm(monkeypatch):
    with torch.device("meta"):
        model = tiny_model()
    # So that transformers decodes with batched_mm there, as it does in place of grouped_mm
    assert model.get_experts_implementation() == {"": "grouped_mm"}
    monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS, "grouped_mm", lambda *args: "grouped")
    hidden, index = torch.empty(MANY, 32, device="meta"), torch.empty(MANY, 2, dtype=torch.long, device="meta")
    assert model.model.layers[0].mlp.experts(hidden, index, hidden[:, :2]) == "grouped"
