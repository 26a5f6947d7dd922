"""The model's forward pass: injection, refusals, the loss and its terms, gradients, precision, round trips."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from accelerate import cpu_offload
from peft import PromptTuningConfig, get_peft_model
from references import (
    BOS,
    ITEM,
    PAD,
    USER,
    all_pairs,
    mixed_pairs,
    naive_balance,
    random_prompts,
    spread_clusters,
    tiny_config,
    tiny_model,
)
from transformers import AutoModel, AutoModelForCausalLM

from gavamoe_hf import (
    GaVaMoECausalLMOutputWithPast,
    GaVaMoEForCausalLM,
    GaVaMoEModel,
    GaVaMoEModelOutputWithPast,
)

USERS, ITEMS, RATINGS = torch.tensor([0, 3, 7]), torch.tensor([2, 8, -1]), torch.tensor([1.0, 4.0, 5.0])


def training_batch() -> dict[str, torch.Tensor]:
    input_ids, mask = random_prompts([10, 8, 6])
    labels = input_ids.clone()
    labels[:, :6] = -100
    labels[0, 7] = -100
    return {
        "input_ids": input_ids,
        "attention_mask": mask,
        "labels": labels,
        "user_id": USERS,
        "item_id": ITEMS,
        "rating": RATINGS,
    }


# Injection


def test_injection_wherever_the_placeholders_stand(model):
    input_ids = torch.tensor([[USER, ITEM, 9, 10], [11, 9, ITEM, USER], [ITEM, 9, USER, 10]])
    seen = {}
    handle = model.model.layers[0].register_forward_pre_hook(
        lambda _, args, kwargs: seen.update(hidden=args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    model(input_ids, user_id=USERS, item_id=ITEMS)
    handle.remove()
    base = model.model
    for row in range(3):
        for column, token in enumerate(input_ids[row].tolist()):
            if token == USER:
                expected = base.user_projection(model.rating_model.user_embeddings.weight[USERS[row]])
            elif token == ITEM:
                table = model.rating_model.item_embeddings.weight
                vector = model.rating_model.population_item if ITEMS[row] < 0 else table[ITEMS[row]]
                expected = base.item_projection(vector)
            else:
                expected = base.embed_tokens.weight[token]
            torch.testing.assert_close(seen["hidden"][row, column], expected, rtol=1e-5, atol=1e-6)


def test_ids_reach_the_logits_through_the_placeholders(model):
    input_ids, _ = random_prompts([8, 8])
    gates = torch.zeros(2, dtype=torch.long)
    ids = {"item_id": torch.tensor([1, 1]), "gate_index": gates}
    first = model(input_ids, user_id=torch.tensor([0, 0]), **ids).logits
    second = model(input_ids, user_id=torch.tensor([0, 1]), **ids).logits
    torch.testing.assert_close(first[0], second[0])
    assert (first[1] - second[1]).abs().max() > 0.1


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([BOS, 9, ITEM, 10], r"exactly one user placeholder \(token 3\) in each prompt, but row 1 has 0"),
        ([USER, 9, ITEM, USER], r"exactly one user placeholder \(token 3\) in each prompt, but row 1 has 2"),
        ([USER, 9, 10, 11], r"exactly one item placeholder \(token 4\) in each prompt, but row 1 has 0"),
        ([USER, ITEM, ITEM, 9], r"exactly one item placeholder .* has 2\. Build prompts with the checkpoint's proc"),
    ],
)
def test_placeholder_count_is_refused(model, row, message):
    input_ids = torch.tensor([[BOS, USER, ITEM, 9], row])
    with pytest.raises(ValueError, match=message):
        model(input_ids, user_id=USERS[:2], item_id=ITEMS[:2])


def test_placeholder_tokens_not_set():
    model = tiny_model(user_token_id=None, item_token_id=None)
    with pytest.raises(ValueError, match=r"`config\.user_token_id` is not set"):
        model(torch.tensor([[USER, ITEM]]), user_id=USERS[:1], item_id=ITEMS[:1])


def test_refuses_a_sample_without_a_gate(model):
    with pytest.raises(ValueError, match=r"needs a gate, one of 3: pass `user_id` and `item_id`"):
        model(torch.tensor([[USER, ITEM, 9]]))
    with pytest.raises(ValueError, match=r"`user_id` and `item_id` together, but got one of them alone"):
        model(torch.tensor([[USER, ITEM, 9]]), user_id=torch.tensor([0]))
    # With the gate given, or only one to choose, none is missing
    assert model(torch.tensor([[9, 10]]), gate_index=torch.tensor([2])).logits.shape == (1, 2, 64)
    assert tiny_model(num_clusters=1)(torch.tensor([[9, 10]])).logits.shape == (1, 2, 64)


def test_id_out_of_range(model):
    with pytest.raises(IndexError, match=r"`item_id` 9 is out of range: this model knows 0 to 8"):
        model(torch.tensor([[USER, ITEM]]), user_id=torch.tensor([0]), item_id=torch.tensor([9]))


# Loss and outputs


def test_loss_by_hand(model):
    batch = training_batch()
    output = model(**batch, output_router_logits=True)
    # -log p of each labelled token, one at a time, under the logits of the position before it
    terms = []
    for row in range(3):
        for column in range(1, 10):
            label = batch["labels"][row, column].item()
            if label != -100:
                terms.append(-output.logits[row, column - 1].log_softmax(dim=-1)[label])
    assert len(terms) == 3 * 4 - 1
    nll = torch.stack(terms).mean()
    rating = model.rating_model(USERS, ITEMS, RATINGS)
    elbo = rating.reconstruction_loss + 0.01 * rating.kl_loss
    balance = naive_balance(output.router_logits, batch["attention_mask"], top_k=2)
    torch.testing.assert_close(output.nll_loss, nll)
    torch.testing.assert_close(output.elbo_loss, elbo)
    assert output.aux_loss.item() == pytest.approx(balance, rel=1e-5)
    # eq. 13 at alpha = 0.1, with the load-balancing loss beside the explanation's
    torch.testing.assert_close(output.loss, 0.1 * elbo + 0.9 * (nll + 0.001 * balance))
    torch.testing.assert_close(output.reconstruction_loss, rating.reconstruction_loss)
    torch.testing.assert_close(output.kl_loss, rating.kl_loss)
    torch.testing.assert_close(output.rating_logits, rating.rating_logits)


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_loss_weights(model, alpha):
    copied = copy.deepcopy(model)
    copied.config.alpha, copied.config.router_aux_loss_coef = alpha, 0.5
    batch = training_batch()
    output = copied(**batch, output_router_logits=True)
    bracket = output.nll_loss + 0.5 * output.aux_loss
    torch.testing.assert_close(output.loss, alpha * output.elbo_loss + (1 - alpha) * bracket)
    plain = copied(**batch)
    assert plain.aux_loss is None and plain.router_logits is None
    torch.testing.assert_close(plain.loss, alpha * plain.elbo_loss + (1 - alpha) * plain.nll_loss)
    del batch["rating"]
    unrated = copied(**batch, output_router_logits=True)
    assert unrated.elbo_loss is None and unrated.kl_loss is None
    torch.testing.assert_close(unrated.loss, bracket)


def test_elbo_comes_from_the_base_model_in_the_same_pass(model):
    batch = training_batch()
    del batch["labels"]
    output = model.model(**batch, output_router_logits=True)
    assert isinstance(output, GaVaMoEModelOutputWithPast)
    torch.testing.assert_close(output.elbo_loss, model.rating_model(USERS, ITEMS, RATINGS).loss)
    assert output.gate_index.shape == (3,) and len(output.router_logits) == 2


def test_output_fields(model):
    output = model(
        **training_batch(),
        output_router_logits=True,
        output_hidden_states=True,
        output_attentions=True,
        use_cache=True,
    )
    assert isinstance(output, GaVaMoECausalLMOutputWithPast)
    shapes = {name: tuple(output[name].shape) for name in ("loss", "nll_loss", "aux_loss", "elbo_loss", "kl_loss")}
    assert set(shapes.values()) == {()}
    assert output.logits.shape == (3, 10, 64)
    assert output.rating_logits.shape == (3, 5)
    assert output.cluster_posterior.shape == (3, 3)
    assert output.gate_index.shape == (3,) and output.gate_index.dtype == torch.long
    assert [tuple(logits.shape) for logits in output.router_logits] == [(30, 4)] * 2
    assert [tuple(states.shape) for states in output.hidden_states] == [(3, 10, 32)] * 3
    assert output.past_key_values.get_seq_length() == 10
    assert all(output[field.name] is not None for field in dataclasses.fields(output) if field.name != "attentions")
    values = model(**training_batch(), return_dict=False)
    assert isinstance(values, tuple)
    torch.testing.assert_close(values[0], output.loss, rtol=1e-2, atol=1e-2)


def test_attentions_are_returned():
    model = spread_clusters(tiny_model())
    model.set_attn_implementation("eager")
    output = model(**training_batch(), output_attentions=True)
    assert [tuple(attention.shape) for attention in output.attentions] == [(3, 4, 10, 10)] * 2


def test_padding_does_not_change_a_row(model):
    input_ids, mask = random_prompts([10, 6])
    padded = model(input_ids, attention_mask=mask, user_id=USERS[:2], item_id=ITEMS[:2])
    alone = model(input_ids[1:, 4:], user_id=USERS[1:2], item_id=ITEMS[1:2])
    torch.testing.assert_close(padded.logits[1, 4:], alone.logits[0], rtol=1e-4, atol=1e-4)


def test_attention_implementations_agree(model):
    batch = training_batch()
    copied = copy.deepcopy(model)
    copied.set_attn_implementation("eager")
    rows = batch["attention_mask"].bool()
    torch.testing.assert_close(copied(**batch).logits[rows], model(**batch).logits[rows], rtol=1e-4, atol=1e-4)


def test_autocast_keeps_gates_and_elbo(model):
    batch = training_batch()
    plain = model(**batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = model(**batch)
    assert cast.logits.dtype == torch.bfloat16
    assert torch.equal(cast.gate_index, plain.gate_index)
    assert torch.equal(cast.elbo_loss, plain.elbo_loss)


# Gradients


def test_gradient_checkpointing_gives_the_same_gradients(model):
    gradients = []
    for checkpointing in (False, True):
        copied = copy.deepcopy(model).train()
        copied.config.use_cache = False
        calls = []
        copied.model.layers[0].mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        if checkpointing:
            copied.activation_checkpointing_enable()
        torch.manual_seed(4)
        loss = copied(**training_batch(), output_router_logits=True).loss
        loss.backward()
        assert len(calls) == 1 + checkpointing, "the layer is computed again on the way back, or not"
        gradients.append({name: p.grad for name, p in copied.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-6)


def step(model, batch) -> dict[str, torch.Tensor]:
    """Which entries of each parameter one step of plain gradient descent moves."""
    model.set_experts_implementation("eager")  # which knows double precision
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trainable, lr=1e-3)
    seen = []
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(lambda _, __, outputs: seen.append(outputs[2]))
    output = model(**batch, output_router_logits=True)
    output.loss.backward()
    optimizer.step()
    moved = {name: p.detach() != before[name] for name, p in model.named_parameters()}
    # A token counts where the loss sees it: in the last layer, where its logits are labelled; before, unless padding
    labelled = F.pad(batch["labels"][:, 1:] != -100, (0, 1)).flatten()
    counts = [batch["attention_mask"].flatten().bool()] * (len(seen) - 1) + [labelled]
    moved["experts"] = [experts[rows].unique().tolist() for experts, rows in zip(seen, counts, strict=True)]
    moved["gates"] = output.gate_index.unique().tolist()
    return moved


def test_what_one_step_moves():
    # In double precision, where a small step is not rounded away, and without id dropout, which would make it chance
    model = spread_clusters(tiny_model(num_local_experts=12, vae_id_dropout=0.0, attention_bias=True)).double().train()
    batch = training_batch()
    moved = step(model, batch)
    gates, experts = moved.pop("gates"), moved.pop("experts")
    assert 1 < len(gates) < 4
    rows = {  # parameters of which only the rows used move
        "model.embed_tokens.weight": sorted(set(batch["input_ids"].flatten().tolist()) - {USER, ITEM, PAD}),
        "model.rating_model.user_embeddings.weight": [0, 3, 7],
        "model.rating_model.item_embeddings.weight": [2, 8],
    }
    for layer, used in enumerate(experts):
        prefix = f"model.layers.{layer}.mlp."
        rows[prefix + "gate.weight"] = gates
        rows[prefix + "experts.gate_up_proj"] = rows[prefix + "experts.down_proj"] = used
        assert 4 <= len(used) < 12 or layer == 0
    unmoved = {"model.rating_model.population_user"}  # every user is known, one item is not
    size = model.config.vae_embedding_size
    for name, entries in moved.items():
        if name in unmoved:
            assert not entries.any(), name
        elif name in rows:
            by_row = entries.flatten(1).any(dim=1)
            assert by_row.nonzero().flatten().tolist() == rows[name], name
        elif name.endswith("query_key_value.bias"):
            # A constant added to all keys changes no attention weight: its gradient is zero
            assert entries[:size].any() and entries[2 * size :].all(), name
        elif name.endswith("k_proj.bias"):
            continue  # Likewise up to the rotation
        else:
            assert entries.float().mean() > 0.9, name


@pytest.mark.parametrize("id_dropout", [0.0, 0.999])
def test_id_dropout_moves_the_population_instead(id_dropout):
    model = spread_clusters(tiny_model(vae_id_dropout=id_dropout)).double().train()
    moved = step(model, training_batch())
    assert moved["model.rating_model.population_user"].any() == (id_dropout > 0)
    assert moved["model.rating_model.user_embeddings.weight"].any() == (id_dropout == 0)


def test_frozen_rating_model_stays():
    model = spread_clusters(tiny_model()).double().train()
    model.rating_model.requires_grad_(False)
    moved = step(model, training_batch())
    for name in ("gates", "experts"):
        moved.pop(name)
    still = [name for name, entries in moved.items() if not entries.any()]
    assert still == [name for name in moved if ".rating_model." in name]
    assert moved["model.user_projection.weight"].any() and moved["model.item_projection.weight"].any()


def test_gates_learn_from_the_explanations_alone_and_clusters_from_ratings(model):
    copied = copy.deepcopy(model)
    batch = training_batch()
    del batch["rating"]
    copied(**batch).loss.backward()
    # argmax (eq. 9) has no gradient: the mixture and the encoder learn from the ELBO only
    assert all(parameter.grad is None for parameter in copied.rating_model.mixture.parameters())
    assert all(parameter.grad is None for parameter in copied.rating_model.layers.parameters())
    assert copied.rating_model.user_embeddings.weight.grad.abs().sum() > 0
    assert copied.model.layers[0].mlp.gate.weight.grad.abs().sum() > 0


# Precision and files


def test_round_trip_is_bitwise(model, tmp_path):
    model.save_pretrained(tmp_path)
    for loaded in (
        GaVaMoEForCausalLM.from_pretrained(tmp_path),
        AutoModelForCausalLM.from_pretrained(tmp_path),
        AutoModel.from_pretrained(tmp_path),
    ):
        assert type(loaded) is GaVaMoEForCausalLM and not loaded.training
        state = loaded.state_dict()
        assert state.keys() == model.state_dict().keys()
        for name, value in model.state_dict().items():
            assert torch.equal(state[name], value), name
    base = GaVaMoEModel.from_pretrained(tmp_path)
    assert torch.equal(base.rating_model.user_embeddings.weight, model.rating_model.user_embeddings.weight)
    batch = training_batch()
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)


def test_bfloat16_keeps_the_rating_model_in_float32(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = GaVaMoEForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for name, parameter in loaded.named_parameters():
        expected = torch.float32 if ".rating_model." in name else torch.bfloat16
        assert parameter.dtype == expected, name
    for name, value in model.rating_model.state_dict().items():
        assert torch.equal(loaded.rating_model.state_dict()[name], value), name
    users, items = mixed_pairs(model)
    assert torch.equal(loaded.gate_index(users, items), model.gate_index(users, items))
    output = loaded(**training_batch(), output_router_logits=True)
    assert output.logits.dtype == torch.bfloat16 and output.loss.isfinite()
    output.loss.backward()
    tokens = loaded.generate(user_id=[1, 2], item_id=[3, 4], max_new_tokens=3, min_new_tokens=3)
    assert tokens.shape == (2, 10)


def test_initialisation():
    model = GaVaMoEForCausalLM(tiny_config(initializer_range=0.02))
    for experts in (layer.mlp.experts for layer in model.model.layers):
        assert experts.gate_up_proj.std().item() == pytest.approx(0.02, rel=0.1)
        assert experts.down_proj.std().item() == pytest.approx(0.02, rel=0.1)
    assert model.model.layers[0].mlp.gate.weight.std().item() == pytest.approx(0.02, rel=0.2)
    assert model.rating_model.user_embeddings.weight.std().item() == pytest.approx(0.02, rel=0.3)
    assert (model.rating_model.population_user == 0).all()
    assert model.rating_model.mixture.means.std() > 0.5
    # No parameter is left as the allocator gave it
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_prompts_as_embeddings_are_refused(model):
    """In them user and item cannot be told: every pair would read alike."""
    embeds = model.get_input_embeddings()(torch.tensor([[BOS, USER, 20, ITEM]]))
    pair = {"user_id": torch.tensor([1]), "item_id": torch.tensor([2])}
    with pytest.raises(ValueError, match="Expected the prompt as `input_ids`, but got `inputs_embeds`"):
        model(inputs_embeds=embeds, **pair)
    with pytest.raises(ValueError, match=r"`inputs_embeds` does not work .* Pass `input_ids`"):
        model.generate(inputs_embeds=embeds, **pair, max_new_tokens=2)
    tuned = get_peft_model(copy.deepcopy(model), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ValueError, match="use LoRA"):
        tuned(input_ids=torch.tensor([[BOS, USER, 20, ITEM]]), **pair)


@pytest.mark.parametrize(
    "cast",
    [
        lambda model: model.to(torch.bfloat16),
        lambda model: model.bfloat16(),
        lambda model: model.half(),
        lambda model: model.to(device="cpu", dtype=torch.float16),
        lambda model: model.to(torch.bfloat16).float().half(),
    ],
)
def test_gates_and_ratings_do_not_depend_on_a_cast(model, cast):
    users, items = all_pairs(model.config)
    lowered = cast(copy.deepcopy(model))
    assert lowered.lm_head.weight.dtype != torch.float32
    assert {tensor.dtype for tensor in lowered.rating_model.parameters()} == {torch.float32}
    assert torch.equal(lowered.gate_index(users, items), model.gate_index(users, items))
    assert torch.equal(lowered.predict_rating(users, items), model.predict_rating(users, items))


def test_offloaded_weights_answer_as_others(model, tmp_path):
    """accelerate's hooks bring weights in `forward` alone, and the rating model is asked outside of it."""
    users, items = all_pairs(model.config)
    expected = model.predict_rating(users, items)
    ids = {"input_ids": torch.tensor([[BOS, USER, 20, ITEM]]), "user_id": 1, "item_id": 2}
    tokens = model.generate(**ids, max_new_tokens=4, do_sample=False)
    model = copy.deepcopy(model)
    model.set_interactions([0, 0, 3], [1, 2, 4])
    best = model.recommend([0, 3], top_k=6, exclude=[0])
    model.save_pretrained(tmp_path)
    parts = ("embed_tokens", "layers", "norm", "rotary_emb", "user_projection", "item_projection")
    parts = {"lm_head": "cpu", **{f"model.{name}": "cpu" for name in parts}, "model.rating_model": "disk"}
    options = {"offload_folder": tmp_path / "offload"}
    for offloaded in (
        cpu_offload(copy.deepcopy(model), execution_device=torch.device("cpu")),
        GaVaMoEForCausalLM.from_pretrained(tmp_path, device_map=parts, **options),
        GaVaMoEForCausalLM.from_pretrained(tmp_path, device_map=parts, offload_buffers=True, **options),
        GaVaMoEForCausalLM.from_pretrained(tmp_path, device_map="auto", max_memory={"cpu": "60KB"}, **options),
    ):
        for _ in range(2):
            assert torch.equal(offloaded.predict_rating(users, items), expected)
            assert torch.equal(offloaded.generate(**ids, max_new_tokens=4, do_sample=False), tokens)
            assert torch.equal(offloaded.recommend([0, 3], top_k=6, exclude=[0]).item_id, best.item_id)


def test_loss_terms_count_once_however_a_batch_is_divided(model):
    """transformers' own Trainer hands the number of all labelled tokens to each part of a batch."""
    divided = copy.deepcopy(model).train()
    divided.config.alpha = 0.5
    for config in (divided.config, divided.rating_model.config):
        config.vae_dropout = config.vae_id_dropout = 0.0
    divided.rating_model.eval()  # z = mu
    input_ids = torch.randint(10, 60, (8, 9))
    input_ids[:, 1], input_ids[:, 2] = USER, ITEM
    labels = input_ids.masked_fill(torch.arange(9) < 4, -100)
    batch = {"input_ids": input_ids, "labels": labels, "rating": torch.arange(8) % 5 + 1.0}
    batch |= {"user_id": torch.arange(8), "item_id": torch.arange(8)}
    whole = divided(**batch).loss
    (expected,) = torch.autograd.grad(whole, divided.lm_head.weight)
    tokens = (labels != -100).sum()
    parts = [{name: values[start : start + 2] for name, values in batch.items()} for start in range(0, 8, 2)]
    losses = [divided(**part, num_items_in_batch=tokens).loss for part in parts]
    (found,) = torch.autograd.grad(sum(losses), divided.lm_head.weight)
    assert sum(losses).item() == pytest.approx(whole.item(), rel=1e-5)
    torch.testing.assert_close(found, expected)


def test_another_attention_can_be_asked_of_the_whole_model(model):
    asked = copy.deepcopy(model)
    for name in ("eager", "sdpa"):
        asked.set_attn_implementation(name)
        assert asked.config._attn_implementation == name
        assert torch.equal(asked.predict_rating(1, 2), model.predict_rating(1, 2))
