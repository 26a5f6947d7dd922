"""What the demo page asks of a model: ids, histories, visitors that leave no trace, many at once; without Gradio."""

import copy
import re
import runpy
import sys
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from packaging.requirements import Requirement
from references import spread_clusters, tiny_model

from gavamoe_hf.cli.main import main
from gavamoe_hf.demo import DemoError, DemoService, Rated, render
from gavamoe_hf.demo import service as service_module
from gavamoe_hf.evaluation import METRICS_MODULE

ROOT = Path(__file__).parents[1]
SPACE = ROOT / "examples" / "space"
RECORDS = Dataset.from_list(
    [
        {"user": user, "item": item, "rating": rating, "feature": ["sound"], "explanation": f"{user} on {item}"}
        for user, item, rating in [("U0", "I0", 5.0), ("U1", "I3", 2.0), ("U0", "I4", 1.0), ("U0", "gone", 3.0)]
    ]
)


@pytest.fixture(scope="module")
def model(tokenizer):
    """In place of the shared one, whose vocabulary is not the processor's."""
    return spread_clusters(tiny_model(vocab_size=len(tokenizer), user_token_id=3, item_token_id=4)).eval()


@pytest.fixture
def service(model, processor):
    return DemoService(model, processor, RECORDS, top_k=4, max_new_tokens=8)


# Ids


def test_search_finds_a_few_ids_those_that_start_so_first(model, processor, monkeypatch):
    processor.users[:] = ["Anna", "susan", "ANN", "Bob", "Joanna", "hanna", "an_2", "x"]
    service = DemoService(model, processor)
    assert service.search("user", " aN ") == ["Anna", "ANN", "an_2", "susan", "Joanna", "hanna"]
    assert service.search("user", "ann") == ["Anna", "ANN", "Joanna", "hanna"]
    monkeypatch.setattr(service_module, "NUM_FOUND", 3)
    assert service.search("user", "ann") == ["Anna", "ANN", "Joanna"]
    assert service.search("user", None) == ["Anna", "susan", "ANN"]
    assert service.search("item", "z") == []


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("", "^Please choose or type the id of a user.$"),
        (None, "^Please choose or type the id of a user.$"),
        (["U0"], "^Please choose or type the id of a user.$"),
        ("U77", "^The user “U77” is not among the 8 users that the model knows. Close to it: U7.$"),
        ("zzz", "^The user “zzz” is not among the 8 users that the model knows.$"),
        ("U" * 201, "^That is too long for a user's id: it may have 200 characters.$"),
    ],
)
def test_ids_that_are_not_known_get_a_sentence(service, typed, message):
    with pytest.raises(DemoError, match=message):
        service.known_user(typed)


def test_there_are_ids_to_begin_with(model, processor):
    """Of the records those with the most, of which the model may not know all; then the first that it knows."""
    rows = [("stranger", "I8"), ("stranger", "I8"), ("stranger", "I8"), ("U5", "I2"), ("U5", "I8"), ("U1", "I2")]
    records = Dataset.from_list([{"user": user, "item": item, "rating": 4.0, "explanation": ""} for user, item in rows])
    service = DemoService(model, processor, records)
    assert service.examples("user") == [*dict.fromkeys(["U5", "U1", *processor.users])][:5]
    assert service.examples("item") == [*dict.fromkeys(["I8", "I2", *processor.items])][:5]
    assert DemoService(model, processor).examples("user") == processor.users[:5]


def test_a_known_user_comes_with_their_history(service):
    person = service.known_user(" U0 ")
    assert person.user == "U0" and person.model is service.model
    assert [rated.item for rated in person.history] == ["I0", "I4", "gone"]
    assert person.history[1] == Rated("I4", 1.0, ("sound",), "U0 on I4")
    assert service.known_user("U7").history == ()


# Recommendations


def test_rated_items_are_not_recommended(service, model, processor):
    best = service.recommend(service.known_user("U0"))
    expected = model.recommend(0, top_k=4, exclude=[0, 4])
    assert [item for item, _ in best] == [f"I{row}" for row in expected.item_id[0].tolist()]
    assert [rating for _, rating in best] == expected.predicted_rating[0].tolist()
    everything = DemoService(model, processor, top_k=50)
    assert len(everything.recommend(everything.known_user("U0"))) == 9
    visitor = everything.visitor({f"I{row}": 3.0 for row in range(8)})
    assert [item for item, _ in everything.recommend(visitor)] == ["I8"]
    with pytest.raises(DemoError, match="nothing left to recommend"):
        everything.recommend(everything.visitor({f"I{row}": 3.0 for row in range(9)}))


def test_what_the_model_knows_its_users_to_have_is_not_recommended(model, processor):
    model = copy.deepcopy(model)
    expected = model.recommend(0, top_k=4, exclude=[0, 4, 7])
    model.set_interactions([0, 0, 1], [4, 7, 2])
    service = DemoService(model, processor, RECORDS, top_k=4)
    assert [item for item, _ in service.recommend(service.known_user("U0"))] == [
        f"I{row}" for row in expected.item_id[0].tolist()
    ]
    service = DemoService(model, processor, top_k=50)
    assert len(service.recommend(service.known_user("U0"))) == 7
    assert len(service.recommend(service.anyone())) == 9
    model.set_interactions([0] * 9, range(9))
    with pytest.raises(DemoError, match="nothing left to recommend"):
        service.recommend(service.known_user("U0"))


# Visitors


def test_a_visitor_gets_what_an_added_user_gets(service, model, processor):
    ratings = {"I0": 5.0, "I3": 1.0, "I8": 2.0}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    visitor = service.visitor(ratings)
    added, other = copy.deepcopy(model), copy.deepcopy(processor)
    added.add_users(other, {"new": list(ratings.items())})
    assert not torch.equal(model.rating_model.population_user, visitor.model.rating_model.population_user)

    index = other.user_index("new")
    expected = added.recommend(index, top_k=4, exclude=[0, 3, 8])
    best = service.recommend(visitor)
    assert [int(item[1:]) for item, _ in best] == expected.item_id[0].tolist()
    assert [rating for _, rating in best] == expected.predicted_rating[0].tolist()
    for item in ("I1", "I3", "I5"):
        answer = service.explain(visitor, item)
        (explained,) = added.explain(other, "new", item, max_new_tokens=8, do_sample=False)
        assert answer.explanation.user is None
        for name in ("explanation", "predicted_rating", "cluster_posterior", "rating", "features"):
            assert getattr(answer.explanation, name) == getattr(explained, name), name
        read = other.encode_record("new", item, explained.rating, explained.features, explained.explanation)
        report = added.routing_report(index, read["item_id"], torch.tensor([read["input_ids"]]))
        assert answer.expert_share == report.expert_share[0].tolist()

    # Not a trace: neither of weights, nor ids, nor of what the population gets
    assert model.config.num_users == 8 == len(processor.users) == len(model.rating_model.user_embeddings.weight)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert service.explain(service.anyone(), "I1").explanation.predicted_rating == model.predict_rating(-1, 1).item()


def test_a_visitors_view_shares_all_weights_but_one_row(model, processor):
    view = model.for_visitor(processor, [("I0", 5.0)])
    own = [
        name
        for (name, mine), theirs in zip(view.named_parameters(), model.parameters(), strict=True)
        if mine.data_ptr() != theirs.data_ptr()
    ]
    assert own == ["model.rating_model.population_user"]
    assert type(view) is type(model) and view.rating_model is view.model.rating_model
    nothing_known = model.for_visitor(processor, [])
    assert torch.equal(nothing_known.rating_model.population_user, model.rating_model.population_user)
    with torch.inference_mode():
        again = model.for_visitor(processor, [("I0", 5.0)])
    assert torch.equal(again.rating_model.population_user, view.rating_model.population_user)
    assert not again.rating_model.population_user.is_inference()


@pytest.mark.parametrize("first", ["model", "view"])
def test_a_view_records_each_layer_once(processor, first):
    """Whoever is asked first for the experts, the layers, which are shared, record them once."""
    model = spread_clusters(tiny_model()).eval()
    view = model.for_visitor(processor, [("I0", 5.0)])
    order = [model, view] if first == "model" else [view, model]
    assert [len(each.routing_report(-1, 2).expert_share[0]) for each in order] == [2, 2]


def test_a_view_is_refused_where_it_would_run_the_model(model, processor, service):
    spread = copy.deepcopy(model)
    spread.model.forward = spread.model.forward
    with pytest.raises(ValueError, match=r"something replaced it, such as a `device_map`.* Load it on one device"):
        spread.for_visitor(processor, [("I0", 5.0)])
    with pytest.raises(ValueError, match="Expected ratings from 1 to 5, but user 'visitor' has 9"):
        model.for_visitor(processor, [("I0", 9)])
    processor.add_ids("user", ["late"])
    with pytest.raises(ValueError, match="Expected the processor of this model, which has 8 users, but got one with 9"):
        model.for_visitor(processor, [("I0", 5.0)])


def test_ratings_are_checked_and_kept(service, monkeypatch):
    first = service.rate({}, "I0", 5)
    second = service.rate(first, " I3 ", "2")
    assert first == {"I0": 5.0} and second == {"I0": 5.0, "I3": 2.0}
    assert service.rate(second, "I0", 1) == {"I0": 1.0, "I3": 2.0}
    for item, rating, message in [
        ("I99", 5, "^The item “I99” is not among the 9 items"),
        ("I1", None, "^Please choose how you rate the item.$"),
        ("I1", 6, "^A rating is a number from 1 to 5.$"),
        ("I1", "nan", "^A rating is a number from 1 to 5.$"),
        ("I1", [3], "^A rating is a number from 1 to 5.$"),
    ]:
        with pytest.raises(DemoError, match=message):
            service.rate(second, item, rating)
    monkeypatch.setattr(service_module, "MAX_RATINGS", 2)
    assert service.rate(second, "I3", 4) == {"I0": 5.0, "I3": 4.0}
    with pytest.raises(DemoError, match="2 ratings are the most"):
        service.rate(second, "I1", 4)


# Explanations


def test_what_is_asked_reaches_the_model(service, model, processor):
    person = service.known_user("U1")
    answer = service.explain(person, "I0", "1", "tone,  neck ,")
    (expected,) = model.explain(
        processor, "U1", "I0", rating=1.0, features=["tone", "neck"], max_new_tokens=8, do_sample=False
    )
    assert answer.explanation == expected and answer.sentiment == "negative"
    assert service.explain(person, "I0").explanation.features == ["sound"]
    unknown = service.explain(person, None).explanation
    assert unknown.item is None and unknown.predicted_rating == model.predict_rating(1, -1).item()
    for asked, message in [
        ((None, "I0"), "^Please choose first for whom.$"),
        ((person, "I99"), "^The item “I99” is not among"),
        ((person, "I0", 0), "^A rating is a number from 1 to 5.$"),
        ((person, "I0", None, "x" * 201), "^Please name fewer features: 200 characters are the most.$"),
    ]:
        with pytest.raises(DemoError, match=message):
            service.explain(*asked)


def test_special_tokens_are_text(service, processor):
    person = service.known_user("U1")
    placeholder = processor.tokenizer.convert_ids_to_tokens(processor.user_token_id)
    assert service.explain(person, "I0", features=placeholder).explanation.features == [placeholder]


def test_many_at_once_get_what_each_gets_alone(service):
    people = [service.known_user(f"U{row}") for row in range(3)]
    histories = [{f"I{row}": 5.0, f"I{row + 1}": 1.0} for row in range(3)]
    asked = [(person, f"I{item}") for item in range(2) for person in [*people, *histories]]

    def ask(person, item):
        # Visitors come and go between the others' questions
        person = service.visitor(person) if isinstance(person, dict) else person
        answer = service.explain(person, item)
        return answer.explanation, answer.expert_share, service.recommend(person)

    alone = [ask(*each) for each in asked]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda each: ask(*each), asked))
    assert together == alone
    assert len({explanation.explanation for explanation, _, _ in alone}) > 4


def test_arguments_are_checked(model, processor):
    with pytest.raises(ValueError, match="Expected `top_k` as a number of at least 1, but got 0"):
        DemoService(model, processor, top_k=0)


# What is shown


HOSTILE = "<img src=x onerror=alert(1)>"


def test_texts_are_escaped(model, processor):
    records = Dataset.from_list([{"user": "U0", "item": HOSTILE, "rating": 5.0, "explanation": HOSTILE}])
    service = DemoService(model, processor, records, max_new_tokens=4)
    person = service.known_user("U0")
    answer = service.explain(person, "I0", features=HOSTILE)
    for html in (render.notice(HOSTILE), render.person_view(person), render.answer_view(person, answer)):
        assert "<img" not in html and "&lt;img" in html


def test_the_heat_map_is_a_table_of_numbers():
    # Each cell says whose it is, since the row may go over several lines
    html = render._experts([[0.5, 0.25, 0.25], [0.0, 0.0, 1.0]])
    assert html.count("<tr>") == 3 and html.count('scope="col"') == 4 and html.count('scope="row"') == 2
    assert '#0b57d0 35%, white)">50</td>' in html and '#0b57d0 70%, white)">100</td>' in html
    assert '#0b57d0 0%, white)">0</td>' in html
    assert html.count('<td data-expert="2" style="background:') == 2
    assert "layers are dense" in render._experts(None)


def test_long_histories_are_cut():
    html = render._history([Rated(f"I{row}", 4.5, (), "long " * 100) for row in range(60)])
    assert "50 of 60 rated" in html and html.count("<tr>") == 52 and "I50" not in html
    assert "<summary>45 more</summary>" in html.split(">I4<")[1].split(">I5<")[0]
    assert "…" in html and html.count("long") == 50 * 32 and ">4.5<" in html
    assert "What they said" not in render._history([Rated("I0", 4.0)])


# The command


def test_the_command_says_what_is_missing(capsys, monkeypatch):
    with pytest.raises(SystemExit):
        main(["demo", "--help"])
    options = capsys.readouterr().out
    for option in ("--model", "--dataset", "--host", "--port", "--share", "--top_k", "--device"):
        assert option in options
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "gavamoe_hf.demo.page", raising=False)
    assert main(["demo", "--model", "nowhere"]) == 1
    assert 'pip install ".[demo]"' in capsys.readouterr().err


def test_a_dense_model_has_no_experts_to_show(processor):
    dense = tiny_model(vocab_size=len(processor.tokenizer), num_local_experts=0).eval()
    service = DemoService(dense, processor, max_new_tokens=4)
    assert service.explain(service.anyone(), "I0").expert_share is None


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"GAVAMOE_MODEL": "me/model"}, ["--model", "me/model", "--host", "127.0.0.1"]),
        (
            {"GAVAMOE_MODEL": "me/model", "GAVAMOE_DATASET": "me/data", "SPACE_ID": "me/space"},
            ["--model", "me/model", "--dataset", "me/data", "--host", "0.0.0.0"],
        ),
    ],
)
def test_the_space_serves_its_checkpoint(monkeypatch, variables, expected):
    for name in ("GAVAMOE_MODEL", "GAVAMOE_DATASET", "SPACE_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    calls = []
    monkeypatch.setattr("gavamoe_hf.cli.main.main", lambda argv: calls.append(argv) or 0)
    _, header, _ = (SPACE / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    metadata = yaml.safe_load(header)
    assert metadata["sdk"] == "gradio" and len(metadata["short_description"]) <= 60
    monkeypatch.setattr(sys, "argv", ["app.py"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(SPACE / metadata["app_file"]), run_name="__main__")
    assert stopped.value.code == 0 and calls == [["demo", *expected]]


def test_the_space_of_the_metrics_computes():
    gr = pytest.importorskip("gradio", reason="gradio is not installed (the extra `demo`)")
    app = runpy.run_path(str(Path(METRICS_MODULE) / "app.py"))
    scores = app["compute"]("peter", "the strings sound great\na cable", "the strings sound great\na cable")
    assert scores["bleu_1"] == pytest.approx(100) and "peter" in scores["signatures"]["bleu_1"]
    with pytest.raises(gr.Error, match="got 1 predictions, 2 references"):
        app["compute"]("default", "one", "one\ntwo")


def test_spaces_name_a_gradio_that_the_package_works_with():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (allowed,) = [Requirement(requirement).specifier for requirement in extras["demo"]]
    for folder in (SPACE, Path(METRICS_MODULE)):
        card = (folder / "README.md").read_text()
        assert re.search(r"^sdk_version: (.*)$", card, re.MULTILINE)[1] in allowed, folder
