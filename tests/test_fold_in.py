"""Users and items that training did not see: the fitted row, what stays as it was, and the way to an explanation."""

import copy
import math

import pytest
import torch
from references import (
    naive_encode,
    naive_gelu,
    naive_linear,
    random_prompts,
    run_without_package,
    spread_clusters,
    tiny_model,
)

import gavamoe_hf.fold_in_gavamoe as fold_in
from gavamoe_hf import POPULATION_ID, GaVaMoEForCausalLM, GaVaMoEProcessor

HISTORY = [("I0", 5.0), ("I3", 1.0), ("I4", 4.0), ("I7", 5.0), ("I8", 2.0)]
OTHER = [("I1", 2.0), ("I2", 3.0)]
ITEM_HISTORY = [("U1", 1.0), ("U2", 2.0), ("U6", 5.0)]


@pytest.fixture
def fresh(model):
    """A model of the test's own."""
    return copy.deepcopy(model)


def table(model, kind):
    return getattr(model.rating_model, f"{kind}_embeddings").weight


def state(model, processor):
    """Everything that adding may change."""
    return (
        {name: value.clone() for name, value in model.state_dict().items()},
        [config.to_dict() for config in (model.config, model.model.config, model.rating_model.config)],
        copy.deepcopy((processor.users, processor.items, processor.item_features, processor._indices)),
    )


def assert_same_state(before, after):
    assert before[1:] == after[1:]
    assert before[0].keys() == after[0].keys()
    for name, value in before[0].items():
        assert torch.equal(value, after[0][name]), name


# The fit


def test_prior_worked_by_hand():
    mean, factor = fold_in._row_prior(torch.tensor([[1.0, 0.0, 7.0], [3.0, 4.0, 7.0]]))
    # Variances 1, 4 and 0 (raised to 1e-4), covariance 2 shrunk to 1.8, all doubled
    assert mean.tolist() == [2.0, 2.0, 7.0]
    expected = torch.tensor([[2.0, 3.6, 0.0], [3.6, 8.0, 0.0], [0.0, 0.0, 2e-4]])
    torch.testing.assert_close(factor @ factor.T, expected)


def test_prior_of_a_large_table_is_of_evenly_spaced_rows(monkeypatch):
    rows = torch.randn(11, 4)
    monkeypatch.setattr(fold_in, "_MAX_PRIOR_ROWS", 4)
    for found, expected in zip(fold_in._row_prior(rows), fold_in._row_prior(rows[[0, 3, 6, 9]]), strict=True):
        torch.testing.assert_close(found, expected)


def naive_objective(model, kind, row, history):
    """-log p(ratings | row) - log p(row) up to a constant, pair by pair and without the code's parametrisation."""
    rating_model, levels = model.rating_model, model.config.rating_levels
    trained = table(model, kind).detach().double()[: 8 if kind == "user" else 9]
    centred = trained - trained.mean(dim=0)
    covariance = sum(torch.outer(one, one) for one in centred) / len(centred)
    prior = 2.0 * (0.9 * covariance + 0.1 * torch.diag(covariance.diagonal()))
    away = row.double() - trained.mean(dim=0)
    total = 0.5 * away @ torch.linalg.solve(prior, away)
    naive = copy.deepcopy(rating_model)
    # A plain tensor, so that the row's gradient is found through the table
    weight = torch.cat([table(model, kind).detach(), row[None]])
    embeddings = getattr(naive, f"{kind}_embeddings")
    del embeddings.weight
    embeddings.weight = weight
    for partner, rating in history:
        pair = (len(weight) - 1, partner) if kind == "user" else (partner, len(weight) - 1)
        latent, _ = naive_encode(naive, *pair)
        logits = naive_linear(naive.decoder_output, naive_gelu(naive_linear(naive.decoder_hidden, latent)))
        if model.config.rating_likelihood == "categorical":
            total = total - logits.log_softmax(dim=0)[levels.index(rating)]
        else:
            target, chance = (rating - levels[0]) / (levels[-1] - levels[0]), logits[0].sigmoid()
            total = total - target * chance.log() - (1 - target) * (1 - chance).log()
    return total


@pytest.mark.parametrize("likelihood", ["categorical", "bernoulli"])
@pytest.mark.parametrize("kind", ["user", "item"])
def test_row_is_the_maximum_a_posteriori(processor, kind, likelihood):
    model = spread_clusters(tiny_model(rating_likelihood=likelihood)).eval()
    with torch.no_grad():  # Ratings that tell a row: an untrained decoder hardly answers to the latent
        model.rating_model.decoder_output.weight.mul_(4)
    history = HISTORY if kind == "user" else ITEM_HISTORY
    known = [(int(raw[1:]), rating) for raw, rating in history]
    reference = table(model, kind).detach().mean(dim=0).requires_grad_()
    optimizer = torch.optim.LBFGS([reference], max_iter=60, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        objective = naive_objective(model, kind, reference, known)
        objective.backward()
        return objective

    start = closure().item()
    optimizer.step(closure)
    best = closure().item()
    add = model.add_users if kind == "user" else model.add_items
    (result,) = add(processor, {"new": history})
    row = table(model, kind)[-1].detach()
    table(model, kind).data = table(model, kind).data[:-1]
    found = naive_objective(model, kind, row, known).item()
    assert start - best > 0.2
    assert best - 1e-4 <= found <= best + 0.01 * (start - best)
    torch.testing.assert_close(row, reference.detach(), atol=0.05, rtol=0)
    # The loss that is reported is the part without the prior
    prior = naive_objective(model, kind, row, []).item()
    assert math.isclose(result.loss, (found - prior) / len(history), rel_tol=1e-4)


def test_ratings_decide_the_predictions(fresh, processor):
    items = [f"I{number}" for number in range(9)]
    low, high = fresh.add_users(processor, {"low": [(i, 1.0) for i in items], "high": [(i, 5.0) for i in items]})
    means = [fresh.predict_rating(result.index, list(range(9))).mean() for result in (low, high)]
    assert means[1] - means[0] > 0.5


def test_each_row_is_fitted_by_itself(model, processor):
    """Neither other rows of the call nor rows that were added before change a row."""
    histories = {"A": HISTORY, "B": [], "C": OTHER}
    rows = {}
    for order in (["A", "B", "C"], ["C"], ["A"]):
        one, ids = copy.deepcopy(model), copy.deepcopy(processor)
        one.add_users(ids, {raw: histories[raw] for raw in order})
        rows[tuple(order)] = table(one, "user")[8:]
    step, ids = copy.deepcopy(model), copy.deepcopy(processor)
    for raw in "BCA":
        step.add_users(ids, {raw: histories[raw]})
    together = rows["A", "B", "C"]
    for found in (torch.cat([rows["A",], together[1:2], rows["C",]]), table(step, "user")[[10, 8, 9]]):
        torch.testing.assert_close(found, together, atol=1e-5, rtol=0)
    assert (together[0] - together[2]).abs().max() > 0.01


@pytest.mark.parametrize("mode", ["training", "no_grad", "inference_mode"])
def test_mode_of_the_caller_does_not_matter(model, processor, mode):
    expected, ids = copy.deepcopy(model), copy.deepcopy(processor)
    expected.add_users(ids, {"A": HISTORY})
    changed = copy.deepcopy(model).train(mode == "training")
    with {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}.get(mode, torch.enable_grad)():
        changed.add_users(processor, {"A": HISTORY})
    assert torch.equal(table(changed, "user"), table(expected, "user"))
    assert changed.training == (mode == "training")
    # The table can be trained on
    changed.rating_model(torch.tensor([8]), torch.tensor([0]), torch.tensor([4.0])).loss.backward()
    assert table(changed, "user").grad[8].any()


def test_long_histories_are_fitted_in_parts(model, processor, monkeypatch):
    whole, ids = copy.deepcopy(model), copy.deepcopy(processor)
    whole.add_users(ids, {"A": HISTORY, "B": OTHER})
    monkeypatch.setattr(fold_in, "_MAX_PAIRS", 3)
    parts = copy.deepcopy(model)
    results = parts.add_users(processor, {"A": HISTORY, "B": OTHER})
    torch.testing.assert_close(table(parts, "user"), table(whole, "user"), atol=1e-5, rtol=0)
    assert [result.num_ratings for result in results] == [5, 2]


# What changes, and what does not


def test_nothing_else_changes(fresh, processor):
    before = state(fresh, processor)
    table(fresh, "user").requires_grad_(False)
    users = fresh.add_users(processor, {"A": HISTORY, 12: OTHER})
    items = fresh.add_items(processor, {"J": [*ITEM_HISTORY, ("A", 4.0)]}, features={"J": ["sound", "price"]})
    assert [(user.id, user.index, user.num_ratings, user.is_population) for user in users] == [
        ("A", 8, 5, False),
        ("12", 9, 2, False),
    ]
    assert [(item.id, item.index) for item in items] == [("J", 9)]
    after = state(fresh, processor)
    for name, value in before[0].items():
        found = after[0][name]
        if name.endswith("user_embeddings.weight"):
            assert found.shape == (10, 16) and torch.equal(found[:8], value)
        elif name.endswith("item_embeddings.weight"):
            assert found.shape == (10, 16) and torch.equal(found[:9], value)
        else:
            assert torch.equal(found, value), name
    for config in (fresh.config, fresh.model.config, fresh.rating_model.config):
        assert (config.num_users, config.num_items) == (10, 10)
        assert (config.num_added_users, config.num_added_items) == (2, 1)
    assert (fresh.rating_model.user_embeddings.num_embeddings, processor.user_index("A")) == (10, 8)
    assert [processor.user_index(f"U{number}") for number in range(8)] == list(range(8))
    assert (processor.user_index(12), processor.item_index("I8"), processor.item_index("J")) == (9, 8, 9)
    assert processor.item_features[9] == ["sound", "price"] and processor.item_features[0] == ["sound", "price"]
    assert not table(fresh, "user").requires_grad and table(fresh, "item").requires_grad
    assert all(parameter.grad is None for parameter in fresh.parameters())


def test_precision_is_kept(fresh, processor):
    fresh.to(torch.bfloat16)
    (result,) = fresh.add_users(processor, {"A": HISTORY})
    weight = table(fresh, "user")
    # Whatever the language model's, that of ratings and gates is float32
    assert fresh.lm_head.weight.dtype == torch.bfloat16
    assert weight.dtype == torch.float32 and weight[8].isfinite().all() and result.loss > 0
    assert not torch.equal(weight[8], fresh.rating_model.population_user)
    fresh.rating_model.grow_table("item", torch.ones(2, 16, dtype=torch.float64))
    assert table(fresh, "item").dtype == torch.float32 and table(fresh, "item")[9:].eq(1).all()


def test_population_without_a_history(fresh, processor):
    results = fresh.add_users(processor, {"nobody": [], "A": HISTORY})
    results += fresh.add_items(processor, {"nothing": []})
    assert [(result.num_ratings, result.is_population, result.loss is None) for result in results] == [
        (0, True, True),
        (5, False, False),
        (0, True, True),
    ]
    rating_model = fresh.rating_model
    assert torch.equal(table(fresh, "user")[8], rating_model.population_user)
    assert torch.equal(table(fresh, "item")[9], rating_model.population_item)
    items = torch.arange(-1, 10)
    known, unknown = (rating_model.predict(torch.full((11,), user), items) for user in (8, POPULATION_ID))
    for name in ("predicted_rating", "cluster_posterior", "latent_mean"):
        assert torch.equal(known[name], unknown[name])
    # As do items: row 9 against index -1
    assert torch.equal(known.rating_logits[10], known.rating_logits[0])


# Refusals, after which all is as it was


@pytest.mark.parametrize(
    "histories, error, message",
    [
        ({}, ValueError, "at least one new user id, but got none"),
        ([("A", HISTORY)], TypeError, "`histories` as a mapping .*, but got list"),
        ({"A": HISTORY, "U3": OTHER}, ValueError, "'U3' is known already, with index 3. Leave it out"),
        ({3: OTHER, "3": OTHER}, ValueError, "distinct new user ids, but got '3' twice"),
        ({None: OTHER}, ValueError, "non-empty string or a whole number, but got None"),
        ({" ": OTHER}, ValueError, "non-empty string or a whole number, but got ' '"),
        ({True: OTHER}, ValueError, "non-empty string or a whole number, but got True"),
        ({"A": HISTORY, "B": [("I99", 4)]}, ValueError, "item 'I99' is not among the 9 .* history of user 'B', or add"),
        ({"A": [(None, 4)]}, ValueError, "each item id as a non-empty string or a whole number, but got None"),
        ({"A": [("I1", 5.5)]}, ValueError, "from 1 to 5, but user 'A' has 5.5 for item 'I1'"),
        ({"A": [("I1", 0)]}, ValueError, "from 1 to 5, but user 'A' has 0.0 for item 'I1'"),
        ({"A": [("I1", float("nan"))]}, ValueError, "from 1 to 5, but user 'A' has nan"),
        ({"A": [("I1", float("-inf"))]}, ValueError, "from 1 to 5, but user 'A' has -inf"),
        ({"A": [("I1", "good")]}, ValueError, r"\(item, rating\) pairs, but it holds \('I1', 'good'\)"),
        ({"A": ["I1"]}, ValueError, r"\(item, rating\) pairs, but it holds 'I1'"),
        ({"A": [("I1", 4, 5)]}, ValueError, r"\(item, rating\) pairs, but it holds"),
        ({"A": None}, ValueError, r"history of user 'A' as a list .* got None. Pass \[\] for none"),
        ({"A": {"I1": 4}}, ValueError, "history of user 'A' as a list"),
    ],
)
def test_refused_users_leave_all_as_it_was(fresh, processor, histories, error, message):
    before = state(fresh, processor)
    with pytest.raises(error, match=message):
        fresh.add_users(processor, histories)
    assert_same_state(before, state(fresh, processor))


@pytest.mark.parametrize(
    "features, error, message",
    [
        ({"I0": ["sound"]}, ValueError, "features of items that are added, but got some of 'I0'"),
        ({"J": "sound"}, ValueError, "features of item 'J' as a list of strings, but got 'sound'"),
        ({"J": [3]}, ValueError, r"features of item 'J' as a list of strings, but got \[3\]"),
        ([["sound"]], TypeError, "`features` as a mapping from item ids to lists, but got list"),
    ],
)
def test_refused_features_leave_all_as_it_was(fresh, processor, features, error, message):
    before = state(fresh, processor)
    with pytest.raises(error, match=message):
        fresh.add_items(processor, {"J": ITEM_HISTORY}, features=features)
    with pytest.raises(ValueError, match=r"user 'U9' is not among the 8 .* history of item 'J', or .* `add_users`"):
        fresh.add_items(processor, {"J": [("U9", 3)]})
    assert_same_state(before, state(fresh, processor))


def test_refuses_the_processor_of_another_model(fresh, processor, tokenizer):
    other = GaVaMoEProcessor(tokenizer, users=processor.users[:5], items=processor.items)
    with pytest.raises(ValueError, match=r"this model, which has 8 users, but got one with 5. Load both from the same"):
        fresh.add_users(other, {"A": HISTORY})


def test_a_fit_that_fails_leaves_all_as_it_was(fresh, processor, monkeypatch):
    before = state(fresh, processor)

    def fail(*args):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(fold_in, "_history_nll", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        fresh.add_users(processor, {"A": HISTORY})
    assert_same_state(before, state(fresh, processor))


def test_ids_of_the_processor_alone(processor, tmp_path):
    assert processor.add_ids("user", ["A", 7]) == [8, 9]
    assert processor.add_ids("item", ["J"]) == [9] and processor.item_features[9] == []
    assert processor.add_ids("item", ["K"], [["price"]]) == [10]
    with pytest.raises(ValueError, match="features for each of the new items alone, but got 2 list"):
        processor.add_ids("item", ["L"], [["price"], []])
    with pytest.raises(ValueError, match="features for each of the new items alone, but got 1 list"):
        processor.add_ids("user", ["B"], [["price"]])
    processor.save_pretrained(tmp_path)
    again = GaVaMoEProcessor.from_pretrained(tmp_path)
    assert (again.users, again.items, again.item_features) == (
        processor.users,
        processor.items,
        processor.item_features,
    )
    assert (again.user_index("7"), again.item_index("K"), len(again.items)) == (9, 10, 11)


# The way to an explanation, and to a file


@pytest.fixture
def explaining(tokenizer):
    """A model whose vocabulary is the processor's."""
    model = tiny_model(vocab_size=len(tokenizer), user_token_id=3, item_token_id=4)
    return spread_clusters(model.eval())


def test_new_pairs_are_explained(explaining, processor):
    explaining.config.stored_prompts = processor.stored_prompts()
    (user,) = explaining.add_users(processor, {"A": HISTORY})
    (item,) = explaining.add_items(processor, {"J": ITEM_HISTORY}, features={"J": ["price", "sound"]})
    options = {"do_sample": False, "max_new_tokens": 4}
    explanations = explaining.explain(processor, ["A", "A", "U1"], ["J", "I2", "J"], **options)
    predicted = explaining.predict_rating([user.index, user.index, 1], [item.index, 2, item.index])
    assert [one.predicted_rating for one in explanations] == predicted.tolist()
    assert [one.features for one in explanations] == [["price"], [], ["price"]]
    posterior = explaining.cluster_posterior(user.index, item.index)
    assert explanations[0].cluster_posterior == pytest.approx(posterior[0].tolist(), abs=1e-6)
    assert explaining.gate_index(user.index, item.index).item() == explanations[0].cluster
    assert explaining.generate(user_id=user.index, item_id=[0, item.index], **options).shape[0] == 2
    # The row reaches the prompt: another row at the same gate gives other logits
    input_ids, mask = random_prompts([7])
    inputs = {"input_ids": input_ids, "attention_mask": mask, "item_id": torch.tensor([item.index])}
    gate = torch.tensor([0])
    logits = [
        explaining(**inputs, user_id=torch.tensor([row]), gate_index=gate).logits for row in (user.index, POPULATION_ID)
    ]
    assert not torch.allclose(*logits)


# Run elsewhere, with the folder as its argument.
SCRIPT = r"""
import torch
from transformers import AutoModelForCausalLM, AutoProcessor

torch.set_num_threads(1)
folder = pathlib.Path(sys.argv[1])
saved = torch.load(folder / "saved.pt", weights_only=True)
model = AutoModelForCausalLM.from_pretrained(folder / "checkpoint", trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder / "checkpoint", trust_remote_code=True)
assert torch.equal(model.rating_model.user_embeddings.weight, saved["users"])
assert torch.equal(model.rating_model.item_embeddings.weight, saved["items"])
assert (processor.user_index("A"), processor.user_index("U7"), processor.item_index("J")) == (8, 7, 9)
assert torch.equal(model.predict_rating([8, 3], [9, 9]), saved["predicted"])
options = {"do_sample": False, "max_new_tokens": 4}
(explanation,) = model.explain(processor, "A", "J", **options)
assert (explanation.explanation, explanation.features) == (saved["text"], ["sound"])
# And another one, as it would have been added before saving
(result,) = model.add_users(processor, {"B": saved["history"]})
assert (result.id, result.index, result.is_population) == ("B", 9, False)
assert torch.allclose(model.rating_model.user_embeddings.weight[9], saved["next"], atol=1e-5)
assert "gavamoe_hf" not in sys.modules
print("ALL CHECKED")
"""


def test_new_rows_are_saved_and_load_without_the_package(explaining, processor, tmp_path):
    explaining.add_users(processor, {"A": HISTORY})
    explaining.add_items(processor, {"J": ITEM_HISTORY}, features={"J": ["sound"]})
    explaining.save_pretrained(tmp_path / "checkpoint")
    processor.save_pretrained(tmp_path / "checkpoint")
    again = GaVaMoEForCausalLM.from_pretrained(tmp_path / "checkpoint")
    assert (again.config.num_users, again.rating_model.config.num_items) == (9, 10)
    assert torch.equal(table(again, "user"), table(explaining, "user"))
    saved = {
        "users": table(explaining, "user").detach().clone(),
        "items": table(explaining, "item").detach().clone(),
        "predicted": explaining.predict_rating([8, 3], [9, 9]),
        "text": explaining.explain(processor, "A", "J", do_sample=False, max_new_tokens=4)[0].explanation,
        "history": OTHER,
    }
    explaining.add_users(processor, {"B": OTHER})
    torch.save({**saved, "next": table(explaining, "user")[9].detach().clone()}, tmp_path / "saved.pt")
    output = run_without_package(SCRIPT, tmp_path, modules=tmp_path, cwd=tmp_path)
    assert output.strip().endswith("ALL CHECKED")
