"""The synthetic data: its planted truth is in the ratings and the words, and nothing simpler finds it."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from gavamoe_hf.data import (
    DataError,
    SyntheticConfig,
    SyntheticTruth,
    generate_synthetic,
    load_records,
    write_synthetic,
)
from gavamoe_hf.data.wordings import ASPECTS, KINDS, WORDINGS, find_wording

CASES = [(groups, seed) for groups in (2, 3, 4, 5) for seed in (0, 1)]
SMALL = SyntheticConfig(num_users=30, num_items=12, records_per_user=8)


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}groups-seed{case[1]}")
def data(request):
    groups, seed = request.param
    return generate_synthetic(SyntheticConfig(num_groups=groups, seed=seed))


def all_rows(data):
    return [row for part in data.records.values() for row in part.to_list()]


def rmse(predicted, rows):
    return float(np.sqrt(np.mean([(guess - row["rating"]) ** 2 for guess, row in zip(predicted, rows, strict=True)])))


def bias_model(train, test, penalty=2.0):
    """Predict with a mean and a shrunken bias of each user and item, fitted by ridge regression."""
    names = {name: number for number, name in enumerate(sorted({row[k] for row in train for k in ("user", "item")}))}

    def design(rows):
        matrix = np.zeros((len(rows), len(names)))
        for number, row in enumerate(rows):
            matrix[number, [names[row["user"]], names[row["item"]]]] = 1
        return matrix

    features, ratings = design(train), np.asarray([row["rating"] for row in train])
    mean = ratings.mean()
    biases = np.linalg.solve(features.T @ features + penalty * np.eye(len(names)), features.T @ (ratings - mean))
    return np.clip(mean + design(test) @ biases, 1, 5)


def test_truth_beats_biases_by_far(data):
    train, test = data.records["train"].to_list(), data.records["test"].to_list()
    oracle = rmse([data.truth.expected_rating(row["user"], row["item"]) for row in test], test)
    biases = rmse(bias_model(train, test), test)
    assert oracle <= 0.5
    assert oracle <= 0.4 * biases


def test_item_means_carry_little(data):
    train, test = data.records["train"].to_list(), data.records["test"].to_list()
    mean = rmse([np.mean([row["rating"] for row in train])] * len(test), test)
    assert rmse(bias_model(train, test), test) >= 0.9 * mean


def test_ratings_use_the_scale(data):
    ratings = Counter(row["rating"] for row in all_rows(data))
    total = sum(ratings.values())
    assert set(ratings) == {1.0, 2.0, 3.0, 4.0, 5.0}
    assert min(ratings.values()) >= 0.05 * total
    assert 0.45 <= sum(count for rating, count in ratings.items() if rating >= 3) / total <= 0.75


def test_every_explanation_tells_its_group(data):
    truth = data.truth
    rows = all_rows(data)
    assert all(truth.wording_group(row["explanation"]) == truth.user_group[row["user"]] for row in rows)
    assert len({row["explanation"] for row in rows}) >= 1000


def test_explanations_name_kind_feature_and_sentiment(data):
    for row in all_rows(data):
        wording = WORDINGS[data.truth.user_group[row["user"]]]
        words = set(row["explanation"].lower().strip(".").replace(",", "").split())
        assert data.truth.item_kind[row["item"]] in row["explanation"]
        assert words & set(ASPECTS) == set(row["feature"])
        assert bool(words & set(wording.praise)) == (row["rating"] >= 3)
        assert bool(words & set(wording.blame)) == (row["rating"] < 3)


def test_feature_agrees_with_the_rating(data):
    for row in all_rows(data):
        (feature,) = row["feature"]
        aspects = data.truth.item_aspects[row["item"]]
        assert feature in aspects
        sign = 1 if row["rating"] >= 3 else -1
        preferences = {aspect: sign * data.truth.preference(row["user"], aspect) for aspect in aspects}
        assert preferences[feature] == max(preferences.values())


def test_groups_differ(data):
    preferences = data.truth.group_preferences
    groups, aspects = preferences.shape
    assert groups == data.truth.config.num_groups and aspects == len(data.truth.aspects) == 12
    assert set(np.unique(preferences)) <= {-1, 0, 1}
    for first in range(groups):
        assert (preferences[first] == 1).sum() >= 3 and (preferences[first] == -1).sum() >= 3
        for second in range(first):
            assert (preferences[first] != preferences[second]).sum() >= 8
    assert not preferences.sum(axis=0).any()
    sizes = Counter(data.truth.user_group.values())
    assert max(sizes.values()) - min(sizes.values()) <= 1


def test_records_are_what_load_records_returns(data):
    assert [len(part) for part in data.records.values()] == [3072, 384, 384]
    loaded = load_records(data.records)
    for split, part in data.records.items():
        assert part.to_list() == loaded[split].to_list()
        assert part.features == loaded[split].features
        assert "Synthetic" in part.info.description


def test_users_rate_distinct_items():
    data = generate_synthetic(SMALL)
    rows = all_rows(data)
    assert len({(row["user"], row["item"]) for row in rows}) == len(rows) == 30 * 8
    assert set(data.truth.user_group) == {f"user_{number:03d}" for number in range(30)}
    assert set(data.truth.item_kind) == {f"item_{number:03d}" for number in range(12)}
    assert {len(aspects) for aspects in data.truth.item_aspects.values()} <= {3, 4}


def test_seed_decides():
    first, again, other = (generate_synthetic(replace(SMALL, seed=seed)) for seed in (1, 1, 2))
    assert all_rows(first) == all_rows(again)
    assert all_rows(first) != all_rows(other)


def test_without_noise_the_rating_is_the_rounded_expectation():
    data = generate_synthetic(replace(SMALL, noise=0.0))
    for row in all_rows(data):
        assert row["rating"] == np.rint(data.truth.expected_rating(row["user"], row["item"]))


def test_expected_rating_by_hand():
    truth = SyntheticTruth(
        config=replace(SMALL, num_groups=2),
        aspects=("tone", "price", "grip"),
        group_preferences=np.asarray([[1, 1, -1], [-1, 0, -1]]),
        user_group={"a": 0, "b": 1},
        item_aspects={"x": ("tone", "price", "grip")},
        item_kind={"x": "bass amp"},
        user_bias={"a": 0.25, "b": 0.0},
        item_bias={"x": -0.5},
    )
    assert truth.expected_rating("a", "x") == pytest.approx(3 + 3 * (1 / 3) + 0.25 - 0.5)
    # 3 - 2 - 0.5 is below the scale.
    assert truth.expected_rating("b", "x") == 1.0
    with pytest.raises(DataError, match=r"such as 'a' and 'x', but got 'a' and 'y'\. Take both from its records"):
        truth.expected_rating("a", "y")


def test_written_files(tmp_path):
    folder = tmp_path / "new" / "synthetic"
    folder.mkdir(parents=True)
    (folder / "train.jsonl").write_text("old")
    (folder / "notes.txt").write_text("mine")
    data = write_synthetic(folder, SMALL)
    names = ["notes.txt", "test.jsonl", "train.jsonl", "truth.json", "validation.jsonl"]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert (folder / "notes.txt").read_text() == "mine"
    assert {split: part.to_list() for split, part in load_records(folder).items()} == {
        split: part.to_list() for split, part in data.records.items()
    }
    row = json.loads((folder / "test.jsonl").read_text().splitlines()[0])
    assert list(row) == ["user", "item", "rating", "feature", "explanation"]
    assert isinstance(row["rating"], int) and isinstance(row["feature"], str)
    assert json.loads((folder / "truth.json").read_text())["synthetic"] is True


def test_truth_survives_a_file(tmp_path):
    truth = write_synthetic(tmp_path, SMALL).truth
    read = SyntheticTruth.from_json(tmp_path / "truth.json")
    assert read.config == truth.config
    assert read.aspects == truth.aspects and read.item_aspects == truth.item_aspects
    assert read.user_group == truth.user_group and read.item_kind == truth.item_kind
    np.testing.assert_array_equal(read.group_preferences, truth.group_preferences)
    assert read.expected_rating("user_003", "item_004") == truth.expected_rating("user_003", "item_004")


def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    write_synthetic(tmp_path, SMALL)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def write_text(self, *args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr("pathlib.Path.write_text", write_text)
    with pytest.raises(OSError, match="disk full"):
        write_synthetic(tmp_path, replace(SMALL, seed=1))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    "text, message",
    [
        (
            None,
            r"expected the truth of synthetic data, but got .*No such file.*Write it with write_synthetic",
        ),
        ("{", r"expected the truth of synthetic data, but got "),
        ("[]", r"'config', 'aspects', .* are missing\. Write it"),
        ("{}", r"'config', 'aspects', .* are missing\. Write it"),
        ('{"config": {"planets": 3}}', r"are missing"),
    ],
)
def test_bad_truth_file(tmp_path, text, message):
    path = tmp_path / "truth.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(DataError, match=message):
        SyntheticTruth.from_json(path)


def test_truth_file_with_a_bad_value(tmp_path):
    path = tmp_path / "truth.json"
    generate_synthetic(SMALL).truth.to_json(path)
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "config": {"planets": 3}}))
    with pytest.raises(DataError, match=r"expected the truth of synthetic data, but got .*planets"):
        SyntheticTruth.from_json(path)


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("num_groups", 1, r"num_groups to be a whole number from 2 to 5, but got 1\. The default is 3"),
        ("num_groups", 6, r"num_groups .* from 2 to 5, but got 6"),
        ("num_users", 2, r"num_users to be a whole number of at least 3, but got 2"),
        ("num_users", 240.0, r"num_users to be a whole number .* but got 240\.0"),
        ("num_users", True, r"num_users to be a whole number .* but got True"),
        ("num_items", 1, r"num_items to be a whole number of at least 2, but got 1"),
        ("num_aspects", 7, r"num_aspects to be a whole number from 8 to 16, but got 7"),
        ("num_aspects", 17, r"num_aspects .* from 8 to 16, but got 17"),
        ("records_per_user", 0, r"records_per_user to be a whole number from 1 to 60, but got 0"),
        ("records_per_user", 61, r"records_per_user .* from 1 to 60, but got 61"),
        ("seed", -1, r"seed to be a whole number of at least 0, but got -1"),
        ("strength", 0, r"strength to be a finite number greater than 0, but got 0\. The default is 3\.0"),
        ("strength", float("inf"), r"strength to be a finite number greater than 0, but got inf"),
        ("bias_scale", -0.1, r"bias_scale to be a finite number of at least 0, but got -0\.1"),
        ("noise", float("nan"), r"noise to be a finite number of at least 0, but got nan"),
        ("noise", "0.3", r"noise to be a finite number of at least 0, but got '0\.3'"),
    ],
)
def test_every_setting_is_checked(field, value, message):
    with pytest.raises(DataError, match=rf"SyntheticConfig: expected {message}"):
        SyntheticConfig(**{field: value})


def test_too_few_records_are_refused():
    with pytest.raises(DataError, match=r"can be held out"):
        generate_synthetic(SyntheticConfig(num_users=3, num_items=4, records_per_user=1))


@pytest.mark.parametrize("num_aspects", [8, 13, 16])
@pytest.mark.parametrize("num_groups", [2, 3, 4, 5])
def test_other_numbers_of_aspects(num_groups, num_aspects):
    truth = generate_synthetic(replace(SMALL, num_groups=num_groups, num_aspects=num_aspects)).truth
    preferences = truth.group_preferences
    assert preferences.shape == (num_groups, num_aspects)
    differing = (preferences[:, None] != preferences[None]).sum(axis=2)
    assert differing[~np.eye(num_groups, dtype=bool)].min() >= num_aspects / 2


def test_wordings_do_not_overlap():
    own = [{*wording.markers, *wording.praise, *wording.blame} for wording in WORDINGS]
    for number, wording in enumerate(WORDINGS):
        for template in (*wording.positive, *wording.negative):
            # No adjective, so that the template's own marker is what counts.
            text = template.format(kind=KINDS[0], feature=ASPECTS[0], adjective="so")
            assert find_wording(text) == number
            words = set(text.lower().strip(".").replace(",", "").split())
            assert words & own[number]
            assert not any(words & own[other] for other in range(len(own)) if other != number)
    assert sum(map(len, own)) == len(set().union(*own))


def test_only_the_feature_names_an_aspect():
    texts = [*KINDS]
    for wording in WORDINGS:
        texts += [*wording.positive, *wording.negative, *wording.praise, *wording.blame]
    for text in texts:
        assert not [aspect for aspect in ASPECTS if aspect in text.lower()]


@pytest.mark.parametrize(
    "text, groups, expected",
    [
        ("", 5, None),
        ("The bass amp is good.", 5, None),
        ("GIG night!", 5, 0),
        ("A gig in the studio.", 5, None),
        ("A gig in the studio with an engineer.", 5, 1),
        ("Busking on the sidewalk.", 5, 4),
        ("Busking on the sidewalk.", 3, None),
        ("A gigantic staging.", 5, None),
    ],
)
def test_wording_of_any_text(text, groups, expected):
    assert find_wording(text, groups) == expected
