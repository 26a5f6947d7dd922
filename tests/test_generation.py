"""generate: whatever the batch, padding, cache, decoding and thread, a pair gets what it would get alone."""

import copy
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import pytest
import torch
from references import ITEM, PAD, USER, mixed_pairs, random_prompts, spread_clusters, tiny_model

from gavamoe_hf import GaVaMoEProcessor

FIXED = {"do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8}


def one_by_one(model, users, items, input_ids, mask, **kwargs) -> list[list[int]]:
    """The continuations of each pair alone, without its padding."""
    continuations = []
    for user, item, ids, kept in zip(users, items, input_ids, mask, strict=True):
        prompt = ids[kept.bool()][None]
        tokens = model.generate(input_ids=prompt, user_id=user.item(), item_id=item.item(), **FIXED, **kwargs)
        continuations += tokens[:, prompt.shape[1] :].tolist()
    return continuations


def in_a_batch(model, users, items, input_ids, mask, **kwargs) -> list[list[int]]:
    tokens = model.generate(input_ids=input_ids, attention_mask=mask, user_id=users, item_id=items, **FIXED, **kwargs)
    assert torch.equal(tokens[:: len(tokens) // len(users), : input_ids.shape[1]], input_ids)
    return tokens[:, input_ids.shape[1] :].tolist()


@pytest.fixture(scope="module")
def batch(model):
    """64 pairs of mixed clusters with prompts of 4 to 12 tokens."""
    users, items = mixed_pairs(model, 64)
    return users, items, *random_prompts([4 + row % 9 for row in range(64)])


def test_batch_of_mixed_clusters_equals_one_by_one(model, batch):
    together = in_a_batch(model, *batch)
    assert together == one_by_one(model, *batch)
    # The texts do differ, and the gate matters: another gate, another text
    assert len({tuple(text) for text in together}) > 50
    gates = model.gate_index(batch[0], batch[1])
    forced = copy.deepcopy(model)
    forced.gate_index = lambda users, items: (gates + 1) % 3
    other = in_a_batch(forced, *batch)
    assert sum(a != b for a, b in zip(together, other, strict=True)) > 50


def test_unpadded_batch_equals_one_by_one(model):
    users, items = mixed_pairs(model, 64)
    input_ids, mask = random_prompts([7] * 64)
    assert in_a_batch(model, users, items, input_ids, mask) == one_by_one(model, users, items, input_ids, mask)


def test_more_padding_changes_nothing(model, batch):
    users, items, input_ids, mask = batch
    wider = torch.nn.functional.pad(input_ids, (5, 0), value=PAD)
    wider_mask = torch.nn.functional.pad(mask, (5, 0), value=0)
    assert in_a_batch(model, users, items, wider, wider_mask) == in_a_batch(model, *batch)


def test_cached_equals_full_generation(model, batch):
    assert in_a_batch(model, *batch, use_cache=False) == in_a_batch(model, *batch)


def test_placeholders_are_never_generated(model, batch):
    eager = copy.deepcopy(model)
    with torch.no_grad():
        # Placeholders would always be the most probable tokens: their rows of the head are ten times another's
        eager.lm_head.weight[USER] = 10 * eager.lm_head.weight[40]
        eager.lm_head.weight[ITEM] = -10 * eager.lm_head.weight[40]
    users, items, input_ids, mask = (values[:16] for values in batch)
    best = eager(input_ids, attention_mask=mask, user_id=users, item_id=items).logits[:, -1].argmax(dim=-1)
    assert set(best.tolist()) & {USER, ITEM}
    for kwargs in ({}, {"use_cache": False}, {"num_beams": 2}, {"logits_processor": [lambda ids, scores: scores]}):
        texts = in_a_batch(eager, users, items, input_ids, mask, **kwargs)
        assert not {USER, ITEM} & {token for text in texts for token in text}


def test_static_cache_equals_dynamic(model, batch):
    assert in_a_batch(model, *batch, cache_implementation="static") == in_a_batch(model, *batch)


def test_scores_are_the_forward_pass(model, batch):
    users, items, input_ids, mask = (values[:8] for values in batch)
    output = model.generate(
        input_ids=input_ids,
        attention_mask=mask,
        user_id=users,
        item_id=items,
        **FIXED,
        output_logits=True,
        return_dict_in_generate=True,
    )
    sequences = output.sequences
    whole = model(
        sequences,
        attention_mask=torch.nn.functional.pad(mask, (0, 8), value=1),
        user_id=users,
        item_id=items,
    ).logits
    stepwise = torch.stack(output.logits, dim=1)
    torch.testing.assert_close(stepwise, whole[:, input_ids.shape[1] - 1 : -1], rtol=1e-4, atol=1e-3)


def test_beams_keep_the_gate_of_their_pair(model, batch):
    users, items, input_ids, mask = (values[:12] for values in batch)
    assert len(model.gate_index(users, items).unique()) == 3
    beams = {"num_beams": 3, "num_return_sequences": 2}
    together = in_a_batch(model, users, items, input_ids, mask, **beams)
    assert len(together) == 24
    assert together == one_by_one(model, users, items, input_ids, mask, **beams)
    assert together == in_a_batch(model, users, items, input_ids, mask, use_cache=False, **beams)


def test_sampled_sequences_keep_the_gate_of_their_pair(model, batch):
    users, items, input_ids, mask = (values[:6] for values in batch)
    gates = []
    handle = model.model.layers[0].mlp.register_forward_pre_hook(lambda _, args: gates.append(args[1].tolist()))
    model.generate(
        input_ids=input_ids,
        attention_mask=mask,
        user_id=users,
        item_id=items,
        do_sample=True,
        num_return_sequences=3,
        max_new_tokens=4,
        min_new_tokens=4,
    )
    handle.remove()
    assert gates == [model.gate_index(users, items).repeat_interleave(3).tolist()] * 4


def test_sampling_repeats_with_its_seed(model, batch):
    sampled = {**FIXED, "do_sample": True, "temperature": 0.7}
    users, items, input_ids, mask = batch
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(
            model.generate(input_ids=input_ids, attention_mask=mask, user_id=users, item_id=items, **sampled).tolist()
        )
    assert draws[0] == draws[1] != draws[2]


# Ids and prompts


def test_ids_in_every_form(model):
    expected = model.generate(user_id=torch.tensor([3, 4]), item_id=torch.tensor([5, 5]), **FIXED).tolist()
    assert model.generate(user_id=[3, 4], item_id=[5, 5], **FIXED).tolist() == expected
    assert model.generate(user_id=[3, 4], item_id=5, **FIXED).tolist() == expected
    assert model.generate(user_id=(3, 4), item_id=torch.tensor(5), **FIXED).tolist() == expected
    assert model.generate(user_id=np.array([3, 4]), item_id=[5], **FIXED).tolist() == expected
    assert model.generate(user_id=torch.tensor([3, 4], dtype=torch.int32), item_id=5, **FIXED).tolist() == expected
    assert model.generate(user_id=3, item_id=5, **FIXED).tolist() == expected[:1]
    population = model.generate(user_id=-1, item_id=-1, **FIXED)
    assert population.shape == (1, 15)


def test_prompt_positional_or_named(model):
    prompt, _ = random_prompts([6])
    named = model.generate(input_ids=prompt, user_id=1, item_id=2, **FIXED)
    assert torch.equal(model.generate(prompt, user_id=1, item_id=2, **FIXED), named)
    assert torch.equal(model.generate(inputs=prompt, user_id=1, item_id=2, **FIXED), named)


def test_stored_prompt_takes_the_predicted_sentiment(model):
    users, items = mixed_pairs(model, 64)
    predicted = model.predict_rating(users, items)
    negative = (predicted < model.config.positive_rating_threshold).tolist()
    assert 20 < sum(negative) < 44
    stored = model.config.stored_prompts
    length = len(stored["positive"])
    tokens = model.generate(user_id=users, item_id=items, **FIXED)
    for row, is_negative in enumerate(negative):
        prompt = stored["negative" if is_negative else "positive"]
        assert tokens[row, :length].tolist() == [PAD] * (length - len(prompt)) + prompt
        alone = model.generate(torch.tensor([prompt]), user_id=users[row], item_id=items[row], **FIXED)
        assert tokens[row, length:].tolist() == alone[0, len(prompt) :].tolist()


def test_negative_prompts_of_the_processor(tokenizer):
    model = tiny_model(
        vocab_size=len(tokenizer),
        user_token_id=tokenizer.convert_tokens_to_ids("<|user_embedding|>"),
        item_token_id=tokenizer.convert_tokens_to_ids("<|item_embedding|>"),
    )
    spread_clusters(model.eval())
    processor = GaVaMoEProcessor(tokenizer, users=[f"U{n}" for n in range(8)], items=[f"I{n}" for n in range(9)])
    users, items = mixed_pairs(model, 24)
    # Every fourth has a rating, which decides; the model decides for the others
    ratings = [[None, None, None, 1.0, None, None, None, 5.0][row % 8] for row in range(24)]
    pairs = [f"U{n}" for n in users.tolist()], [f"I{n}" for n in items.tolist()]
    inputs = processor(user=pairs[0], item=pairs[1], rating=ratings, features=[["sound"]] * 24)
    tokens = model.generate(**inputs, **FIXED)
    predicted = model.predict_rating(users, items).tolist()
    sentiments = set()
    for row, rating in enumerate(ratings):
        threshold = model.config.positive_rating_threshold if rating is None else 3.0
        negative = (predicted[row] if rating is None else rating) < threshold
        sentiments.add((rating is None, negative))
        prompt = processor.encode_prompt("negative" if negative else "positive", ["sound"])
        width = inputs["input_ids"].shape[1]
        assert tokens[row, width - len(prompt) : width].tolist() == prompt
        alone = model.generate(torch.tensor([prompt]), user_id=users[row], item_id=items[row], **FIXED)
        assert tokens[row, width:].tolist() == alone[0, len(prompt) :].tolist()
    assert len(sentiments) == 4
    # One rating for all: nothing is left to choose
    rated = processor(user="U1", item="I2", rating=1, features=["sound"])
    assert "negative_input_ids" not in rated
    assert model.generate(**rated, **FIXED).shape == (1, rated["input_ids"].shape[1] + 8)
    # explain: the same texts, with what the model says of each pair
    explained = model.explain(processor, *pairs, rating=ratings, features=[["sound"]] * 24, **FIXED)
    width = inputs["input_ids"].shape[1]
    for row, explanation in enumerate(explained):
        assert explanation.explanation == tokenizer.decode(tokens[row, width:], skip_special_tokens=True).strip()
        assert (explanation.user, explanation.item) == (pairs[0][row], pairs[1][row])
        assert explanation.predicted_rating == pytest.approx(predicted[row], abs=1e-5)
        assert explanation.rating == pytest.approx(predicted[row] if ratings[row] is None else ratings[row], abs=1e-5)
        assert explanation.cluster == model.gate_index(users[row], items[row]).item()
        assert sum(explanation.cluster_posterior) == pytest.approx(1, abs=1e-5)
    several = model.explain(processor, ["U1", "U2"], "I3", num_beams=2, num_return_sequences=2, **FIXED)
    assert [(e.user, e.item) for e in several] == [("U1", "I3")] * 2 + [("U2", "I3")] * 2


# State


@pytest.mark.parametrize("kwargs", [{}, {"use_cache": False}, {"num_beams": 2}])
def test_routing_is_computed_once(model, batch, kwargs, monkeypatch):
    calls = []
    for name in ("route", "encode", "forward"):
        function = getattr(model.rating_model, name)
        monkeypatch.setattr(
            model.rating_model,
            name,
            lambda *args, name=name, function=function, **kwargs: (calls.append(name), function(*args, **kwargs))[1],
        )
    in_a_batch(model, *(values[:4] for values in batch), **kwargs)
    assert calls == ["route", "encode"]


def test_two_threads_at_once(model, batch):
    parts = [tuple(values[start : start + 8] for values in batch) for start in range(0, 64, 8)]
    sequential = [in_a_batch(model, *part) for part in parts]
    modules = {name: dict(vars(module)) for name, module in model.named_modules()}
    with ThreadPoolExecutor(2) as pool:
        for _ in range(3):
            assert list(pool.map(lambda part: in_a_batch(model, *part), parts)) == sequential
            beams = list(pool.map(lambda part: in_a_batch(model, *part, num_beams=2), parts[:2]))
    assert beams == [in_a_batch(model, *part, num_beams=2) for part in parts[:2]]
    # Nothing is kept on a module
    for name, module in model.named_modules():
        assert vars(module).keys() == modules[name].keys(), name
        for key, value in vars(module).items():
            assert not isinstance(value, torch.Tensor) or value is modules[name][key], (name, key)


def test_threads_with_router_logits(model, batch):
    parts = [tuple(values[start : start + 8] for values in batch) for start in range(0, 32, 8)]

    def logits(part):
        users, items, input_ids, mask = part
        with torch.no_grad():
            output = model(input_ids, attention_mask=mask, user_id=users, item_id=items, output_router_logits=True)
        return torch.stack(output.router_logits)

    sequential = [logits(part) for part in parts]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(3):
            for together, alone in zip(pool.map(logits, parts), sequential, strict=True):
                assert torch.equal(together, alone)


@pytest.mark.parametrize("kwargs", [{}, {"num_beams": 2}, {"cache_implementation": "static"}, {"use_cache": False}])
def test_generates_with_the_training_flag_for_router_logits(model, batch, kwargs):
    copied = copy.deepcopy(model)
    copied.config.output_router_logits = True
    part = tuple(values[:4] for values in batch)
    assert in_a_batch(copied, *part, **kwargs) == in_a_batch(model, *part, **kwargs)


def test_dense_model_generates():
    model = tiny_model(num_local_experts=0).eval()
    prompt, mask = random_prompts([6, 8])
    ids = {"user_id": [1, 2], "item_id": [3, 4]}
    together = model.generate(input_ids=prompt, attention_mask=mask, **ids, **FIXED)
    assert together[:, 8:].tolist() == one_by_one(model, *map(torch.tensor, ids.values()), prompt, mask)
    plain = tiny_model(num_local_experts=0, inject_pair_embeddings=False).eval()
    assert plain.generate(input_ids=prompt, attention_mask=mask, **FIXED).shape == (2, 16)


# Refusals


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        ({"user_id": 3}, ValueError, r"`user_id` and `item_id`, but `item_id` is missing"),
        ({"item_id": 3}, ValueError, r"`user_id` and `item_id`, but `user_id` is missing"),
        ({"user_id": [0, 1], "item_id": [0, 1, 2]}, ValueError, r"one for all, but got 2 and 3"),
        ({"user_id": 0.5, "item_id": 1}, ValueError, r"`user_id` as an int.*Raw ids are looked up by the"),
        ({"user_id": [[0]], "item_id": [[1]]}, ValueError, r"`user_id` as an int.*shape \(1, 1\)"),
        ({"user_id": [], "item_id": []}, ValueError, r"`user_id` as an int.*shape \(0,\)"),
        ({"user_id": "A2", "item_id": "B0"}, ValueError, r"`user_id` as an int.*'A2'.*Raw ids are looked up by"),
        ({"user_id": 1, "item_id": ["B0"]}, ValueError, r"`item_id` as an int.*\['B0'\].*Raw ids are looked up"),
        ({"user_id": [None], "item_id": 1}, ValueError, r"`user_id` as an int.*\[None\]"),
        ({"user_id": 8, "item_id": 1}, IndexError, r"`user_id` 8 is out of range: this model knows 0 to 7"),
        ({"user_id": 0, "item_id": [1, 9]}, IndexError, r"`item_id` 9 is out of range.*\(9 in all\)"),
    ],
    ids=str,
)
def test_refuses_ids(model, ids, error, message):
    with pytest.raises(error, match=message):
        model.generate(**ids)
    if len(ids) == 2:
        with pytest.raises(error, match=message):
            model.predict_rating(**ids)


def test_refuses_prompts(model):
    prompt, mask = random_prompts([6, 6])
    with pytest.raises(ValueError, match=r"one pair for each prompt, but got 3 pair\(s\) and 2 prompt\(s\)"):
        model.generate(input_ids=prompt, attention_mask=mask, user_id=[0, 1, 2], item_id=[0, 1, 2])
    with pytest.raises(ValueError, match=r"exactly one user placeholder .* row 0 has 0"):
        model.generate(input_ids=torch.tensor([[9, 10]]), user_id=0, item_id=0, max_new_tokens=1)
    with pytest.raises(ValueError, match=r"needs a gate, one of 3"):
        model.generate(input_ids=prompt, attention_mask=mask, max_new_tokens=1)
    with pytest.raises(ValueError, match=r"stores no prompt: pass `input_ids` from its processor"):
        tiny_model(stored_prompts=None).generate(user_id=0, item_id=0)


@pytest.fixture(scope="module")
def explained(model, tokenizer):
    """A model with the processor's vocabulary, and a call of `explain` on it."""
    options = {"vocab_size": len(tokenizer), "user_token_id": 3, "item_token_id": 4}
    model = spread_clusters(tiny_model(**options)).eval()
    users, items = [f"U{number}" for number in range(8)], [f"I{number}" for number in range(9)]
    processor = GaVaMoEProcessor(tokenizer, users=users, items=items)
    return model, lambda **options: model.explain(processor, **{**FIXED, **options})


def test_arrays_are_the_lists_that_they_are(explained):
    model, explain = explained
    table = pd.DataFrame({"user": ["U1", "U2", "U3"], "item": ["I4", "I5", "I6"], "rating": [4.0, 2.0, 1.0]})
    table = table.set_index(pd.Index([7, 5, 3]))
    expected = explain(user=list(table["user"]), item=list(table["item"]), rating=list(table["rating"]))
    columns = {name: table[name] for name in table}
    assert explain(**columns) == expected
    assert explain(**{name: column.to_numpy(dtype=object) for name, column in columns.items()}) == expected
    assert explain(**columns | {"rating": torch.tensor([4.0, 2.0, 1.0])}) == expected
    assert explain(**columns | {"features": [np.array(["sound"])] * 3}) == explain(**columns, features=[["sound"]] * 3)
    indices = pd.Series([1, 2, 3], index=[9, 8, 7]), np.array([4, 5, 6], dtype=np.int32)
    assert torch.equal(model.predict_rating(*indices), model.predict_rating([1, 2, 3], [4, 5, 6]))
    with pytest.raises(ValueError, match=r"each user id as .*, but got nan \(float\)"):
        explain(user=pd.Series(["U1", float("nan")], dtype=object), item="I1")


def test_ids_that_a_table_turned_into_floats(tokenizer):
    processor = GaVaMoEProcessor(tokenizer, users=["3", "4"], items=["1"])
    assert processor.user_index(3.0) == processor.user_index(np.float64(3)) == processor.user_index("3") == 0
    for raw, message in ((2.0**53, "last digits are lost"), (3.5, "got 3.5"), (True, "bool"), ([3], "list")):
        with pytest.raises(ValueError, match=message):
            processor.user_index(raw)


def test_ratings_off_the_scale_are_refused(explained):
    for rating in (0.5, 9, 1e30):
        with pytest.raises(ValueError, match=r"ratings from 1 to 5, this model's scale, but got"):
            explained[1](user="U1", item=["I1", "I2"], rating=[4, rating])
    with pytest.raises(ValueError, match="finite"):
        explained[1](user="U1", item="I1", rating=float("nan"))


def test_a_dictionary_of_outputs_is_explained_too(explained):
    options = {"user": ["U1", "U2"], "item": "I3", "num_beams": 2, "num_return_sequences": 2}
    assert explained[1](**options, return_dict_in_generate=True, output_scores=True) == explained[1](**options)


def test_weights_that_predict_nan_are_no_result(explained):
    broken = copy.deepcopy(explained[0])
    broken.rating_model.decoder_output.bias.data[0] = float("nan")
    for ask in (lambda: broken.predict_rating(1, 2), lambda: broken.recommend(1, top_k=2)):
        with pytest.raises(ValueError, match=r"those of \d+ of \d+ pairs are NaN or infinite"):
            ask()
