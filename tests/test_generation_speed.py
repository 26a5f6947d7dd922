"""What makes generation fast changes no token: a shared prefix, routing once, compiled steps; and its memory."""

import copy

import pytest
import torch
from references import ITEM, PAD, USER, mixed_pairs, random_prompts, spread_clusters, tiny_model, tiny_run
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CompileConfig

import gavamoe_hf.generation_gavamoe as generation

FIXED = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6}
PREFIX = [1, 10, 20, 30, 11, 21, 31]


@pytest.fixture
def always(monkeypatch):
    """A prefix is shared however little it saves."""
    monkeypatch.setattr(generation, "_MIN_SAVED_TOKENS", 1)


def prompts_that_begin_alike(lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Left-padded prompts of the prefix and as many random tokens more, placeholders among them, and their mask."""
    rest, mask = random_prompts(lengths)
    rows = [[*PREFIX, *ids[kept.bool()].tolist()] for ids, kept in zip(rest, mask, strict=True)]
    width = max(map(len, rows))
    return (
        torch.tensor([[PAD] * (width - len(row)) + row for row in rows]),
        torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows]),
    )


@pytest.fixture(scope="module")
def batch(model):
    """24 pairs of all clusters: user_id, item_id, input_ids, attention_mask."""
    users, items = mixed_pairs(model, 24)
    input_ids, mask = prompts_that_begin_alike([2 + row % 7 for row in range(24)])
    return {"user_id": users, "item_id": items, "input_ids": input_ids, "attention_mask": mask}


def widths(model, **inputs) -> tuple[list[tuple[int, int]], torch.Tensor]:
    """The shape of the tokens in each forward pass of a generation, and what it returns."""
    shapes = []
    handle = model.model.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    try:
        return shapes, model.generate(**inputs)
    finally:
        handle.remove()


# A prefix that all prompts share


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cache_implementation": "static"},
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 2},
    ],
    ids=["greedy", "static", "beams", "sampled"],
)
def test_shared_prefix_changes_no_token(model, batch, options, monkeypatch):
    options = {**FIXED, **options}
    rows = 24 * max(options.get("num_beams", 1), options.get("num_return_sequences", 1))
    torch.manual_seed(3)
    monkeypatch.setattr(generation, "_MIN_SAVED_TOKENS", 10**9)
    plain_shapes, plain = widths(model, **batch, **options)
    monkeypatch.setattr(generation, "_MIN_SAVED_TOKENS", 1)
    torch.manual_seed(3)
    shapes, shared = widths(model, **batch, **options)
    assert torch.equal(shared, plain)
    width = batch["input_ids"].shape[1]
    assert plain_shapes[:2] == [(rows, width), (rows, 1)]
    # The prefix once for each of the three gates, and the rest for each row
    assert shapes[:3] == [(3, len(PREFIX)), (rows, width - len(PREFIX)), (rows, 1)]


def test_shared_prefix_gives_the_same_keys_and_values(model, batch, always, monkeypatch):
    outputs = []
    for saved in (1, 10**9):
        monkeypatch.setattr(generation, "_MIN_SAVED_TOKENS", saved)
        outputs.append(
            model.generate(**batch, do_sample=False, max_new_tokens=2, return_dict_in_generate=True, output_logits=True)
        )
    kept = torch.nn.functional.pad(batch["attention_mask"], (0, 1), value=1).bool()
    for one, other in zip(outputs[0].past_key_values.layers, outputs[1].past_key_values.layers, strict=True):
        for name in ("keys", "values"):
            states = [getattr(layer, name).transpose(1, 2)[kept] for layer in (one, other)]
            torch.testing.assert_close(*states, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(outputs[0].logits[0], outputs[1].logits[0], rtol=1e-4, atol=1e-3)


def test_prompts_without_padding_share_their_prefix(model, always):
    users, items = mixed_pairs(model, 24)
    input_ids, mask = prompts_that_begin_alike([5] * 24)
    inputs = {"user_id": users, "item_id": items, "input_ids": input_ids}
    shapes, unmasked = widths(model, **inputs, **FIXED)
    assert shapes[:2] == [(3, len(PREFIX)), (24, 5)]
    _, masked = widths(model, **inputs, attention_mask=mask, **FIXED)
    assert torch.equal(unmasked, masked)
    alone = [
        model.generate(input_ids=input_ids[row : row + 1], user_id=users[row], item_id=items[row], **FIXED)
        for row in range(24)
    ]
    assert torch.equal(unmasked, torch.cat(alone))


def test_prefix_ends_before_placeholders_and_the_last_token(model, always):
    users, items = mixed_pairs(model, 6)
    pairs = {"user_id": users, "item_id": items}
    same = torch.tensor([[1, 10, USER, 11, ITEM, 12]] * 6)
    num_gates = len(model.gate_index(users, items).unique())
    assert widths(model, **pairs, input_ids=same, **FIXED)[0][:2] == [(num_gates, 2), (6, 4)]
    first = torch.tensor([[USER, 10, ITEM]] * 6)
    assert widths(model, **pairs, input_ids=first, **FIXED)[0][0] == (6, 3)
    plain = tiny_model(num_local_experts=0, inject_pair_embeddings=False, user_token_id=None, item_token_id=None).eval()
    equal = torch.tensor([[1, 10, 11]] * 6)
    assert widths(plain, input_ids=equal, **FIXED)[0][:2] == [(1, 2), (6, 1)]


def test_dense_model_shares_a_prefix_among_all_rows(batch, always):
    dense = spread_clusters(tiny_model(num_local_experts=0)).eval()
    shapes, shared = widths(dense, **batch, **FIXED)
    assert shapes[0] == (1, len(PREFIX))
    assert torch.equal(shared, dense.generate(**batch, use_cache=False, **FIXED))


@pytest.mark.parametrize(
    "options",
    [
        {"use_cache": False},
        {"output_hidden_states": True, "return_dict_in_generate": True},
        {"output_attentions": True, "return_dict_in_generate": True},
    ],
    ids=lambda options: next(iter(options)),
)
def test_other_ways_to_generate_are_left_alone(model, batch, options, always):
    shapes, output = widths(model, **batch, **FIXED, **options)
    assert shapes[0][0] == 24
    tokens = output if isinstance(output, torch.Tensor) else output.sequences
    assert torch.equal(tokens, model.generate(**batch, **FIXED))


def test_right_padded_prompts_are_left_alone(model, always):
    users, items = torch.arange(3), torch.arange(3)
    input_ids = torch.tensor([[1, 10, USER, ITEM, 12], [1, 10, USER, ITEM, PAD], [1, 10, USER, ITEM, 13]])
    inputs = {"user_id": users, "item_id": items, "input_ids": input_ids, "attention_mask": (input_ids != PAD).long()}
    assert widths(model, **inputs, **FIXED)[0][0] == (3, 5)


def test_prefix_is_shared_only_where_it_saves(model, batch):
    # 24 rows, 3 gates: 21 x 7 tokens are saved, which is enough; of one gate's single row none would be
    assert (24 - 3) * len(PREFIX) > generation._MIN_SAVED_TOKENS
    assert widths(model, **batch, **FIXED)[0][0] == (3, len(PREFIX))
    few = {name: values[:8] for name, values in batch.items()}
    assert widths(model, **few, **FIXED)[0][0] == (8, batch["input_ids"].shape[1])


# Routing once


def test_rating_model_rests_in_decode_steps(model, batch):
    running = []
    handles = [
        module.register_forward_hook(lambda *_, name=name: running.append(name))
        for name, module in model.rating_model.named_modules()
    ]
    steps = []

    def end_of_step(*_) -> None:
        steps.append(list(running))
        running.clear()

    handles.append(model.model.register_forward_hook(end_of_step))
    model.generate(**batch, **FIXED)
    for handle in handles:
        handle.remove()
    assert "layers.0" in steps[0] and "user_embeddings" in steps[-6]
    assert steps[-5:] == [[]] * 5


def test_explain_asks_the_rating_model_once(monkeypatch):
    model, processor = tiny_run()
    calls, encode = [], model.rating_model.encode
    monkeypatch.setattr(model.rating_model, "encode", lambda *args: (calls.append(len(args[0])), encode(*args))[1])
    users, items = processor.users[:5], processor.items[:5]
    expected = model.eval().generate(**processor(users, items), **FIXED)
    calls.clear()
    explained = model.explain(processor, users, items, **FIXED)
    assert calls == [5]
    width = expected.shape[1] - 6
    texts = processor.batch_decode(expected[:, width:], skip_special_tokens=True)
    assert [row.explanation for row in explained] == [text.strip() for text in texts]


def test_gates_can_be_given(model, batch):
    gates = (model.gate_index(batch["user_id"], batch["item_id"]) + 1) % 3
    forced = copy.deepcopy(model)
    forced.gate_index = lambda users, items: gates
    expected = forced.generate(**batch, **FIXED)
    assert torch.equal(model.generate(**batch, gate_index=gates, **FIXED), expected)
    assert not torch.equal(model.generate(**batch, **FIXED), expected)


# Static cache and compiled steps


def test_compiled_decode_steps_give_the_same_tokens(model, batch):
    torch._dynamo.reset()
    compiled = copy.deepcopy(model)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    # A break of the graph is an error
    config = CompileConfig(fullgraph=True, backend=backend, mode=None)
    config._compile_all_devices = True
    part = {name: values[:6] for name, values in batch.items()}
    static = {"cache_implementation": "static", **FIXED}
    tokens = compiled.generate(**part, **static, compile_config=config)
    assert torch.equal(tokens, model.generate(**part, **static))
    assert torch.equal(tokens, model.generate(**part, **FIXED))
    # All five steps are one graph
    assert len(graphs) == 1
    torch._dynamo.reset()


# Memory


class _Largest(TorchDispatchMode):
    """The most rows of a tensor whose last dimension is the vocabulary, views of the head's weight aside."""

    def __init__(self, model):
        super().__init__()
        self.weight, self.vocab_size, self.rows = model.lm_head.weight, model.config.vocab_size, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, tuple | list) else [output]:
            if not isinstance(tensor, torch.Tensor) or not tensor.ndim or tensor.shape[-1] != self.vocab_size:
                continue
            if tensor.untyped_storage().data_ptr() != self.weight.untyped_storage().data_ptr():
                self.rows = max(self.rows, tensor.numel() // self.vocab_size)
        return output


@pytest.mark.parametrize("saved", [1, 10**9], ids=["shared prefix", "plain"])
def test_logits_are_of_the_last_position_alone(batch, saved, monkeypatch):
    monkeypatch.setattr(generation, "_MIN_SAVED_TOKENS", saved)
    # A size that nothing else has
    model = spread_clusters(tiny_model(vocab_size=101)).eval()
    with _Largest(model) as largest:
        model.generate(**batch, **FIXED)
    assert largest.rows == 24
    with _Largest(model) as largest:
        model(**batch)
    assert largest.rows == batch["input_ids"].numel()


def test_cache_is_as_large_as_counted(model, batch, always):
    output = model.generate(**batch, **FIXED, return_dict_in_generate=True)
    config = model.config
    head = config.hidden_size // config.num_attention_heads
    # Keys and values of every position but the last, whose token is only returned
    expected = 2 * config.num_hidden_layers * 24 * config.num_key_value_heads * (output.sequences.shape[1] - 1) * head
    states = [states for layer in output.past_key_values.layers for states in (layer.keys, layer.values)]
    assert sum(state.untyped_storage().nbytes() for state in states) == 4 * expected
