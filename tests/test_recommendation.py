"""recommend: the best of a brute-force ranking, whatever the chunk, the mode and the form of the ids."""

import copy
import json

import numpy as np
import pandas as pd
import pytest
import torch
from references import spread_clusters, tiny_model, tiny_run

from gavamoe_hf import GaVaMoERecommendationOutput
from gavamoe_hf.cli.main import main
from gavamoe_hf.training.pipeline import save_checkpoint

USERS = [0, 3, 7, -1]


def ranked(model, user: int, exclude=()) -> list[int]:
    """All items but the excluded, best first, one pair at a time."""
    ratings = {item: model.predict_rating(user, item).item() for item in range(model.config.num_items)}
    return sorted(set(ratings) - set(exclude), key=lambda item: (-ratings[item], item))


@pytest.fixture(scope="module")
def tied_model():
    """150 items of 5 kinds, item n of kind n % 5: every rating occurs 30 times."""
    model = spread_clusters(tiny_model(num_items=150)).eval()
    with torch.no_grad():
        table = model.rating_model.item_embeddings.weight
        table.copy_(table[:5].repeat(30, 1))
    return model


def test_best_items_first(model):
    output = model.recommend(USERS, top_k=4)
    assert isinstance(output, GaVaMoERecommendationOutput)
    assert output.item_id.tolist() == [ranked(model, user)[:4] for user in USERS]
    # The users do differ, or one list would do for all
    assert len({tuple(row) for row in output.item_id.tolist()}) > 1
    for user, items, ratings in zip(USERS, output.item_id, output.predicted_rating, strict=True):
        torch.testing.assert_close(ratings, model.predict_rating(user, items))


def test_whole_catalogue(model):
    assert model.recommend(2, top_k=9).item_id.tolist() == [ranked(model, 2)]


@pytest.mark.parametrize("users", [3, [3], torch.tensor(3), torch.tensor([3], dtype=torch.int32)])
def test_forms_of_a_user(model, users):
    output = model.recommend(users, top_k=3)
    assert output.item_id.tolist() == [ranked(model, 3)[:3]]
    assert output.predicted_rating.shape == (1, 3)


def test_equal_ratings_go_by_index_whatever_the_chunk(tied_model):
    best = ranked(tied_model, 4)
    kinds = sorted(range(5), key=best.index)
    expected = [kind + 5 * number for kind in kinds for number in range(30)]
    for chunk_size in (1, 2, 7, 64, 65, 149, 4096):
        # Alone and in a batch, of which the chunk takes fewer items
        for users, row in ((4, 0), ([1, 4, 6], 1)):
            assert tied_model.recommend(users, top_k=40, chunk_size=chunk_size).item_id[row].tolist() == expected[:40]


def test_chunks_bound_what_is_scored_at_once(tied_model, monkeypatch):
    sizes = []
    predict = tied_model.rating_model.predict

    def recorded(user_id, item_id):
        sizes.append(len(user_id))
        return predict(user_id, item_id)

    monkeypatch.setattr(tied_model.rating_model, "predict", recorded)
    tied_model.recommend([1, 2, 3], top_k=3, chunk_size=128)
    # 42 items of 3 users, then the last 24, each filled up to blocks of 64
    assert sizes == [128, 128, 128, 128]
    sizes.clear()
    tied_model.recommend([1, 2, 3], top_k=3)
    assert sizes == [512]


def test_excluded_for_all_users(model):
    gone = ranked(model, 3)[:2]
    for exclude in (gone, set(gone), torch.tensor(gone), [*gone, *gone], [torch.tensor(item) for item in gone]):
        output = model.recommend(USERS, top_k=5, exclude=exclude)
        assert output.item_id.tolist() == [ranked(model, user, gone)[:5] for user in USERS]


def test_excluded_for_each_user(model):
    gone = [ranked(model, 0)[:3], [], [8], [0, 2]]
    expected = [ranked(model, user, items)[:5] for user, items in zip(USERS, gone, strict=True)]
    for exclude in (gone, tuple(map(set, gone)), list(map(torch.tensor, gone))):
        for chunk_size in (1, 8, 4096):
            output = model.recommend(USERS, top_k=5, exclude=exclude, chunk_size=chunk_size)
            assert output.item_id.tolist() == expected
    assert 0 not in model.recommend(3, top_k=8, exclude=[0] * 9).item_id
    square = torch.tensor([[0, 1]] * 4)
    assert not torch.isin(model.recommend(USERS, top_k=7, exclude=square).item_id, torch.tensor([0, 1])).any()


def test_no_exclusion(model):
    for exclude in (None, [], [[], [], [], []], set()):
        assert torch.equal(model.recommend(USERS, exclude=exclude, top_k=3).item_id, model.recommend(USERS, 3).item_id)


def test_mode_does_not_matter(model):
    training = copy.deepcopy(model).train()
    training.config.vae_dropout = training.rating_model.config.vae_dropout = 0.5
    expected, output = model.recommend(USERS, top_k=9), training.recommend(USERS, top_k=9)
    assert torch.equal(output.item_id, expected.item_id)
    assert torch.equal(output.predicted_rating, expected.predicted_rating)
    assert training.training and not output.predicted_rating.requires_grad


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"top_k": 10}, ValueError, r"Expected at least `top_k` \(10\) items .* user row 0 has 9 of 9 left\. Lower"),
        (
            {"user_id": [1, 2], "top_k": 8, "exclude": [[3], [3, 4]]},
            ValueError,
            "user row 1 has 7 of 9 left",
        ),
        ({"top_k": 0}, ValueError, "Expected `top_k` as an int of at least 1, but got 0"),
        ({"top_k": True}, ValueError, "Expected `top_k` as an int of at least 1, but got True"),
        ({"chunk_size": 0}, ValueError, "Expected `chunk_size` as an int of at least 1, but got 0"),
        ({"user_id": 8}, IndexError, "`user_id` 8 is out of range: this model knows 0 to 7"),
        ({"user_id": "U3"}, ValueError, "Expected `user_id` as an int, a list of ints"),
        ({"user_id": []}, ValueError, "Expected `user_id` as an int, a list of ints"),
        ({"exclude": [9]}, IndexError, "`exclude` holds item 9, which is out of range: this model knows 0 to 8"),
        ({"exclude": [-1]}, IndexError, "`exclude` holds item -1, which is out of range"),
        ({"exclude": ["I3"]}, ValueError, r"Expected `exclude` as item indices, but got \['I3'\]\. Look raw ids up"),
        ({"exclude": [True] * 9}, ValueError, "Expected `exclude` as item indices, but got .True"),
        ({"exclude": [1.0]}, ValueError, r"Expected `exclude` as item indices, but got \[1\.0\]"),
        ({"exclude": [1, [2]], "user_id": [1, 2]}, ValueError, "Expected `exclude` as item indices, but got 1"),
        ({"exclude": [[1], [2]]}, ValueError, r"for each of the 1 user\(s\), .* but got 2 collections"),
    ],
)
def test_faults(model, arguments, error, message):
    with pytest.raises(error, match=message):
        model.recommend(**{"user_id": 3, "top_k": 2, **arguments})


# What users have

# User 0 has item 1, user 3 items 2 and 5 (one of them twice), user 7 item 8
INTERACTIONS = [3, 0, 3, 3, 7], [5, 1, 2, 5, 8]
OFFSETS, ITEMS = [0, 1, 1, 1, 3, 3, 3, 3, 4], [1, 2, 5, 8]
KNOWN = {0: [1], 3: [2, 5], 7: [8], -1: []}


@pytest.fixture
def knowing(model):
    """A model of the test's own, with [`INTERACTIONS`]."""
    model = copy.deepcopy(model)
    model.set_interactions(*INTERACTIONS)
    return model


def interactions(model) -> tuple[list[int], list[int]]:
    """As they are stored, in the types that they are stored in."""
    offsets, items = model.rating_model.interaction_offsets, model.rating_model.interaction_items
    assert (offsets.dtype, items.dtype) == (torch.int64, torch.int32)
    assert model.config.num_interactions == model.rating_model.config.num_interactions == len(items)
    assert len(offsets) == model.config.num_users + 1
    return offsets.tolist(), items.tolist()


def test_what_users_have_is_left_out(knowing, model):
    assert interactions(knowing) == (OFFSETS, ITEMS)
    assert [ids.tolist() for ids in knowing.rating_model.interactions()] == [[0, 3, 3, 7], [1, 2, 5, 8]]
    expected = [ranked(model, user, KNOWN[user]) for user in USERS]
    assert expected != [ranked(model, user)[: len(items)] for user, items in zip(USERS, expected, strict=True)]
    for chunk_size in (1, 8, 4096):
        output = knowing.recommend(USERS, top_k=7, chunk_size=chunk_size)
        assert output.item_id.tolist() == [items[:7] for items in expected]
        output = knowing.recommend(USERS, top_k=9, chunk_size=chunk_size, include_known=True)
        assert output.item_id.tolist() == [ranked(model, user) for user in USERS]
    # Beside what the caller excludes
    output = knowing.recommend(USERS, top_k=5, exclude=[0, 5])
    assert output.item_id.tolist() == [ranked(model, user, {0, 5, *KNOWN[user]})[:5] for user in USERS]
    assert knowing.recommend(3, top_k=9, include_known=True).item_id.tolist() == [ranked(model, 3)]


@pytest.mark.parametrize("form", [torch.tensor, np.array, tuple, lambda ids: pd.Series(ids, index=[9, 8, 7, 6, 5])])
def test_forms_of_interactions(model, form):
    model = copy.deepcopy(model)
    model.set_interactions(*map(form, INTERACTIONS))
    assert interactions(model) == (OFFSETS, ITEMS)


def test_interactions_that_are_refused_or_empty(knowing):
    for users, items, error, message in (
        ([8], [0], IndexError, "`user_id` 8 is out of range: this model knows 0 to 7"),
        ([0], [9], IndexError, "`item_id` 9 is out of range"),
        (
            [0, 1],
            [2],
            ValueError,
            r"for each pair, but got torch.int64 of shape \(2,\) and torch.int64 of shape \(1,\)",
        ),
        (
            [0.0],
            [2],
            ValueError,
            "Expected the index of a user and that of an item for each pair, but got torch.float32",
        ),
    ):
        with pytest.raises(error, match=message):
            knowing.set_interactions(users, items)
        assert interactions(knowing) == (OFFSETS, ITEMS)
    knowing.set_interactions([-1, 3, 2], [4, -1, 6])
    assert interactions(knowing) == ([0, 0, 0, 1, 1, 1, 1, 1, 1], [6])
    knowing.set_interactions([], [])
    assert knowing.config.num_interactions == 0
    assert not any("interaction" in name for name in knowing.state_dict())
    assert knowing.recommend(3, top_k=9).item_id.tolist() == [ranked(knowing, 3)]


def test_nothing_or_too_little_is_left(knowing):
    message = (
        r"`top_k` \(8\) .* user row 1 has 7 of 9 left, without the 2 that the user has\. Lower `top_k`, exclude fewer, "
        r"or set `include_known`"
    )
    with pytest.raises(ValueError, match=message):
        knowing.recommend([1, 3], top_k=8)
    with pytest.raises(ValueError, match="has 6 of 9 left, without the 2 that the user has"):
        knowing.recommend(3, top_k=8, exclude=[0, 2])
    knowing.set_interactions([4] * 9, range(9))
    message = r"items that are new to the user, but user row 1 has all 9 already\. Set `include_known` to rank these"
    with pytest.raises(ValueError, match=message):
        knowing.recommend([0, 4], top_k=1)
    assert knowing.recommend(4, top_k=1, include_known=True).item_id.tolist() == [ranked(knowing, 4)[:1]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_interactions_are_saved(knowing, tmp_path, dtype):
    for name, options in (("whole", {}), ("shards", {"max_shard_size": "20KB"})):
        knowing.save_pretrained(tmp_path / name, **options)
        assert len(list((tmp_path / name).glob("*.safetensors"))) == 1 or name == "shards"
        loaded, report = type(knowing).from_pretrained(tmp_path / name, dtype=dtype, output_loading_info=True)
        assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert interactions(loaded) == (OFFSETS, ITEMS)
        assert loaded.recommend(3, top_k=3).item_id.tolist() == [ranked(loaded, 3, KNOWN[3])[:3]]
        assert json.loads((tmp_path / name / "config.json").read_text())["num_interactions"] == 4
    knowing.set_interactions([], [])
    knowing.save_pretrained(tmp_path / "none")
    loaded, report = type(knowing).from_pretrained(tmp_path / "none", output_loading_info=True)
    assert loaded.config.num_interactions == 0 and not any(report.values())


@pytest.mark.parametrize(
    "cast", ["half", "bfloat16", "double", lambda model: model.to(torch.float16), lambda model: model.type(torch.half)]
)
def test_casts_leave_interactions_alone(knowing, cast):
    # Beyond what 16 bits can count
    knowing.config.num_items = knowing.rating_model.config.num_items = 100_000
    knowing.set_interactions([3, 3], [70_001, 99_999])
    knowing = getattr(knowing, cast)() if isinstance(cast, str) else cast(knowing)
    assert interactions(copy.deepcopy(knowing)) == ([0, 0, 0, 0, 2, 2, 2, 2, 2], [70_001, 99_999])


def test_interactions_of_those_who_are_added(knowing, model, processor):
    empty = copy.deepcopy(processor)
    user, none = knowing.add_users(processor, {"new": [("I4", 5.0), ("I0", 1.0), ("I4", 4.0)], "none": []})
    (item,) = knowing.add_items(processor, {"thing": [("U3", 5.0), ("new", 2.0)]})
    assert interactions(knowing) == ([0, 1, 1, 1, 4, 4, 4, 4, 5, 8, 8], [1, 2, 5, 9, 8, 0, 4, 9])
    assert knowing.recommend(user.index, top_k=7).item_id.tolist() == [ranked(knowing, user.index, [0, 4, 9])]
    assert item.index in ranked(knowing, none.index)
    assert knowing.recommend(none.index, top_k=10).item_id.tolist() == [ranked(knowing, none.index)]
    # Also where nothing was known before
    model = copy.deepcopy(model)
    model.add_users(empty, {"new": [("I4", 5.0)]})
    assert interactions(model) == ([0] * 9 + [1], [4])
    # A table that is grown by itself: the new user has nothing
    model.rating_model.grow_table("user", torch.zeros(2, model.config.vae_embedding_size))
    assert model.rating_model.interaction_offsets.tolist() == [0] * 9 + [1, 1, 1]
    model.rating_model.resize_mixture(2)
    assert model.rating_model.interaction_items.tolist() == [4]


def test_visitors_have_what_they_rated(knowing, processor):
    view = knowing.for_visitor(processor, [("I4", 5.0), ("I0", 1.0), ("I4", 4.0)])
    other = knowing.for_visitor(processor, [])
    assert view.recommend(-1, top_k=7).item_id.tolist() == [ranked(view, -1, [0, 4])]
    assert view.recommend(-1, top_k=9, include_known=True).item_id.tolist() == [ranked(view, -1)]
    assert view.recommend(3, top_k=7).item_id.tolist() == [ranked(knowing, 3, KNOWN[3])]
    for one in (knowing, other):
        assert one.recommend(-1, top_k=9).item_id.tolist() == [ranked(one, -1)]


# The command


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    model, processor = tiny_run()
    model = spread_clusters(model).eval()
    # All but the second of the best three
    model.set_interactions([processor.user_index("user_005")] * 2, [ranked(model, 5)[0], ranked(model, 5)[2]])
    folder = tmp_path_factory.mktemp("run") / "checkpoint"
    folder.mkdir()
    save_checkpoint(model, processor, folder)
    return folder, model, processor


def run(checkpoint, capsys, *options: str) -> str:
    assert main(["recommend", "--model", str(checkpoint[0]), *options]) == 0
    return capsys.readouterr().out


def test_command_prints_the_best_items(checkpoint, capsys):
    _, model, processor = checkpoint
    best = [processor.items[index] for index in ranked(model, processor.user_index("user_003"))]
    lines = run(checkpoint, capsys, "--user", "user_003", "--top_k", "4").splitlines()
    assert [line.split()[1] for line in lines] == best[:4]
    ratings = [float(line.split()[0]) for line in lines]
    assert ratings == sorted(ratings, reverse=True) and ratings[-1] >= 1 and ratings[0] <= 5
    lines = run(checkpoint, capsys, "--user", "user_003", "--top_k", "4", "--exclude", best[0], best[2]).splitlines()
    assert [line.split()[1] for line in lines] == [best[1], *best[3:6]]


def test_command_leaves_out_what_the_user_has(checkpoint, capsys):
    _, model, processor = checkpoint
    best = [processor.items[index] for index in ranked(model, processor.user_index("user_005"))]
    lines = run(checkpoint, capsys, "--user", "user_005", "--top_k", "3").splitlines()
    assert [line.split()[1] for line in lines] == [best[1], *best[3:5]]
    lines = run(checkpoint, capsys, "--user", "user_005", "--top_k", "3", "--include_known").splitlines()
    assert [line.split()[1] for line in lines] == best[:3]
    assert main(["recommend", "--model", str(checkpoint[0]), "--user", "user_005", "--top_k", "9"]) == 1
    assert "has 8 of 10 left, without the 2 that the user has" in capsys.readouterr().err


def test_command_without_a_user_is_for_the_population(checkpoint, capsys):
    _, model, processor = checkpoint
    printed = json.loads(run(checkpoint, capsys, "--json"))
    assert printed["user"] is None
    assert [entry["item"] for entry in printed["recommendations"]] == [
        processor.items[index] for index in ranked(model, -1)
    ]
    assert all(entry.keys() == {"item", "predicted_rating"} for entry in printed["recommendations"])


def test_command_explains(checkpoint, capsys):
    _, model, processor = checkpoint
    options = ["--user", "user_003", "--top_k", "3", "--explain", "--max_new_tokens", "5"]
    printed = json.loads(run(checkpoint, capsys, *options, "--json"))["recommendations"]
    items = [entry["item"] for entry in printed]
    expected = model.explain(processor, "user_003", items, do_sample=False, max_new_tokens=5)
    assert [entry["explanation"] for entry in printed] == [explained.explanation for explained in expected]
    assert any(entry["explanation"] for entry in printed)
    lines = run(checkpoint, capsys, *options).splitlines()
    assert len(lines) >= 3 and lines[0].startswith(f"{printed[0]['predicted_rating']:.2f}  {items[0]}")


def test_command_names_what_is_wrong(checkpoint, capsys):
    options = ["recommend", "--model", str(checkpoint[0])]
    assert main([*options, "--user", "user_999"]) == 1
    assert "The user 'user_999' is not among the 12 known users" in capsys.readouterr().err
    assert main([*options, "--exclude", "item_999"]) == 1
    assert "The item 'item_999' is not among the 10 known items" in capsys.readouterr().err
    assert main([*options, "--top_k", "11"]) == 1
    assert "Expected at least --top_k (11) items" in capsys.readouterr().err


def test_every_option_has_help(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["recommend", "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    for option in ("--model", "--user", "--top_k", "--exclude", "--include_known", "--explain", "--json"):
        assert option in text
