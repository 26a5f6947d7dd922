"""The human study: what is drawn and hidden, what answers are worth, and the sheet in a real browser."""

import functools
import json
import threading
from collections import Counter
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from gavamoe_hf.cli.main import main
from gavamoe_hf.evaluation.human_scores import krippendorff_alpha, markdown_scores, score_study
from gavamoe_hf.evaluation.human_study import CRITERIA, SCALE, draw_study

HOSTILE = (
    "</script><script>window.isHacked = true</script><img src=x onerror='window.isHacked = true'> &lt;b&gt; {{study}}"
)
NAMES = ("walrus", "ostrich")


def records(system, count=12, **changes):
    return [
        {
            "user": f"u{number}",
            "item": f"i{number}",
            "rating": 1 + number % 5,
            "feature": f"f{number}",
            "reference": f"said of {number}",
            "prediction": f"text {NAMES.index(system) if system in NAMES else 9} on {number}",
            **changes,
        }
        for number in range(count)
    ]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def predictions(tmp_path):
    return {name: write(tmp_path / f"{name}.jsonl", records(name)) for name in NAMES}


def shown(folder):
    """What the sheet holds beside its template."""
    sheet = (folder / "sheet.html").read_text()
    start = '<script type="application/json" id="study">'
    return json.loads(sheet[sheet.index(start) + len(start) :].split("</script>")[0])


def save_answers(path, study, rater, answers):
    path.write_text(json.dumps({"study": study, "rater": rater, "answers": answers}))
    return path


# What is drawn


def test_the_key_says_whose_text_the_sheet_shows(predictions, tmp_path):
    key = draw_study(predictions, tmp_path / "study", num_pairs=5)
    assert json.loads((tmp_path / "study" / "key.json").read_text()) == key
    sheet = shown(tmp_path / "study")
    assert sheet["study"] == key["study"] and len(sheet["pairs"]) == 5
    assert len({pair["row"] for pair in key["pairs"]}) == 5
    for seen, pair in zip(sheet["pairs"], key["pairs"], strict=True):
        row = pair["row"]
        assert seen == {
            "user": f"u{row}",
            "item": f"i{row}",
            "features": [f"f{row}"],
            "sentiment": "positive" if 1 + row % 5 >= 3 else "negative",
            "explanations": [f"text {NAMES.index(name)} on {row}" for name in pair["systems"]],
        }
    assert sheet["scale"] == [1, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5]
    assert [criterion["id"] for criterion in sheet["criteria"]] == ["P", "Q", "U"]
    assert sheet["criteria"][0]["anchors"]["3"] == "Moderate, with noticeable misalignments"


def test_the_sheet_hides_the_systems(predictions, tmp_path):
    draw_study(predictions, tmp_path / "study", num_pairs=12)
    text = (tmp_path / "study" / "sheet.html").read_text()
    assert not [name for name in NAMES if name in text]
    assert not {"row", "systems", "seed", "weight"} & set(json.dumps(shown(tmp_path / "study")).split('"'))


@pytest.mark.parametrize("num_systems", [1, 2, 3])
def test_every_system_stands_at_every_place_equally_often(num_systems, tmp_path):
    names = [f"s{number}" for number in range(num_systems)]
    files = {name: write(tmp_path / f"{name}.jsonl", records(name, count=600)) for name in names}
    key = draw_study(files, tmp_path / "study", num_pairs=600)
    places = Counter((place, name) for pair in key["pairs"] for place, name in enumerate(pair["systems"]))
    assert set(places.values()) == {600 // num_systems} and len(places) == num_systems**2
    if num_systems == 2:
        # Balanced, but not in turn: of 300 runs of two pairs, about half begin with the first system
        begins = sum(pair["systems"][0] == "s0" for pair in key["pairs"][::2])
        assert 110 < begins < 190
    if num_systems == 3:
        # Nor does a page's order follow from the one before it
        drawn = [pair["systems"] for pair in key["pairs"]]
        turns = [one.index(two[0]) for one, two in zip(drawn[::3], drawn[1::3], strict=True)]
        assert 70 < turns.count(1) < 130 and 70 < turns.count(2) < 130


def test_the_seed_decides(predictions, tmp_path):
    def draw(name, seed):
        draw_study(predictions, tmp_path / name, num_pairs=6, seed=seed)
        return [(tmp_path / name / file).read_bytes() for file in ("sheet.html", "key.json")]

    assert draw("one", 3) == draw("two", 3)
    assert draw("one", 3)[0] != draw("three", 4)[0]


def test_the_reference_takes_part_in_disguise(predictions, tmp_path):
    key = draw_study(predictions, tmp_path / "study", num_pairs=4, include_reference=True)
    assert key["systems"] == [*NAMES, "reference"]
    for seen, pair in zip(shown(tmp_path / "study")["pairs"], key["pairs"], strict=True):
        assert seen["explanations"][pair["systems"].index("reference")] == f"said of {pair['row']}"
    assert '"reference"' not in (tmp_path / "study" / "sheet.html").read_text()
    predictions["reference"] = predictions.pop("walrus")
    with pytest.raises(ValueError, match="Expected no system called 'reference'"):
        draw_study(predictions, tmp_path / "other", num_pairs=4, include_reference=True)


def test_what_one_file_lacks_another_gives(tmp_path):
    bare = [{name: row[name] for name in ("user", "item", "reference", "prediction")} for row in records("walrus")]
    titled = records("ostrich", feature=["sound", "price"], item_title="A drum", rating=2)
    files = {"a": write(tmp_path / "a.jsonl", bare), "b": write(tmp_path / "b.jsonl", titled)}
    draw_study(files, tmp_path / "study", num_pairs=1)
    (pair,) = shown(tmp_path / "study")["pairs"]
    assert (pair["item"], pair["features"], pair["sentiment"]) == ("A drum", ["sound", "price"], "negative")
    draw_study({"a": files["a"]}, tmp_path / "bare", num_pairs=1)
    (pair,) = shown(tmp_path / "bare")["pairs"]
    assert pair["item"].startswith("i") and pair["features"] == [] and pair["sentiment"] is None


def test_raters_see_what_the_user_rated_before(predictions, tmp_path):
    """But not of the item itself, which may be what is rated, and no more than they can read."""
    told = [{"item": "i3", "rating": 1.0, "explanation": "the reference"}]
    told += [{"item": f"x{n}", "rating": 4.5, "explanation": HOSTILE + "long " * 100} for n in range(9)]
    histories, titles = {"u3": told}, {"i3": "A drum", "x0": "y" * 200}
    draw_study(predictions, tmp_path / "study", num_pairs=12, histories=histories, item_titles=titles)
    text = (tmp_path / "study" / "sheet.html").read_text()
    assert text.count("<script") == text.count("</script") == 2 and "<img" not in text and "the reference" not in text
    pairs = {pair["user"]: pair for pair in shown(tmp_path / "study")["pairs"]}
    assert pairs["u3"]["item"] == "A drum" and pairs["u1"]["item"] == "i1" and pairs["u1"]["history"] == []
    history = pairs["u3"]["history"]
    assert [seen["item"] for seen in history] == ["y" * 99 + "…", "x1", "x2", "x3", "x4", "x5"]
    assert {len(seen["text"]) for seen in history} == {300} and history[0]["rating"] == 4.5


def test_text_cannot_end_its_script(tmp_path):
    rows = records("walrus", prediction=HOSTILE, feature=HOSTILE, item_title=HOSTILE)
    draw_study({"walrus": write(tmp_path / "a.jsonl", rows)}, tmp_path / "study", num_pairs=2)
    text = (tmp_path / "study" / "sheet.html").read_text()
    assert text.count("<script") == text.count("</script") == 2 and "<img" not in text
    pair = shown(tmp_path / "study")["pairs"][0]
    assert pair["explanations"] == [HOSTILE] and pair["features"] == [HOSTILE] and pair["item"] == HOSTILE


def test_the_sheet_loads_nothing(predictions, tmp_path):
    draw_study(predictions, tmp_path / "study", num_pairs=1)
    text = (tmp_path / "study" / "sheet.html").read_text()
    assert not [
        mark for mark in ("http:", "https:", "//cdn", "src=", "<link", "url(", "@import", "fetch(") if mark in text
    ]
    assert "default-src 'none'" in text


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (records("ostrich")[:-1], "ostrich: expected 12 records, as walrus has, but got 11"),
        (records("ostrich")[::-1], "ostrich, record 1: expected user 'u0', as walrus has, but got 'u11'"),
        (records("ostrich", reference="other"), "expected reference 'said of 0'"),
        (records("ostrich", rating=2), "record 1: expected rating 1, as walrus has, but got 2"),
        (records("ostrich", prediction=None), r"line 1: expected a text as `prediction`, but got nothing \(null\)"),
        (records("ostrich", rating=float("nan")), "line 1: expected a finite number as `rating`, but got nan"),
        (records("ostrich", rating=10**400), "line 1: expected a finite number as `rating`, but got 1000"),
        (records("ostrich", rating="5"), "expected a finite number as `rating`, but got '5'"),
        (records("ostrich", feature=[1]), r"expected a word or a list of words as `feature`, but got \[1\]"),
        (records("ostrich", user=""), "expected an id as `user`, but got ''"),
        (records("ostrich", user=7.6561197970982479e16), r"expected an id as `user`, but got 7\.656119797098248e\+16"),
        # As a table writes the whole number 3: an id, but another one
        (records("ostrich", user=3.0), "record 1: expected user 'u0', as walrus has, but got '3'"),
        ([{"user": "u0", "item": "i0", "reference": ""}], r"expected the columns .* but 'prediction' are not among"),
        ([], "the file is empty"),
    ],
)
def test_files_that_do_not_fit(changed, message, predictions, tmp_path):
    write(predictions["ostrich"], changed)
    with pytest.raises(ValueError, match=message):
        draw_study(predictions, tmp_path / "study", num_pairs=2)
    assert not (tmp_path / "study").exists()


def test_options_that_do_not_fit(predictions, tmp_path):
    for num_pairs in (0, 13):
        with pytest.raises(ValueError, match=f"`num_pairs` from 1 to the 12 records of the files, but got {num_pairs}"):
            draw_study(predictions, tmp_path / "study", num_pairs=num_pairs)
    with pytest.raises(ValueError, match="Expected at least one system"):
        draw_study({}, tmp_path / "study")
    with pytest.raises(FileNotFoundError, match="expected a file of predictions"):
        draw_study({"a": tmp_path / "none.jsonl"}, tmp_path / "study")
    with pytest.raises(ValueError, match="at most 26 systems, but got 27"):
        draw_study({f"s{number}": predictions["walrus"] for number in range(27)}, tmp_path / "study", num_pairs=1)


def test_the_key_of_another_study_is_kept(predictions, tmp_path):
    folder = tmp_path / "study"
    draw_study(predictions, folder, num_pairs=6)
    before = (folder / "key.json").read_bytes()
    with pytest.raises(FileExistsError, match="this is the key of another one"):
        draw_study(predictions, folder, num_pairs=6, seed=1)
    draw_study(predictions, folder, num_pairs=6)
    assert (folder / "key.json").read_bytes() == before


# What answers are worth


@pytest.fixture
def key(tmp_path):
    path = tmp_path / "key.json"
    pairs = [{"systems": ["a", "b"]}, {"systems": ["b", "a"]}]
    path.write_text(json.dumps({"study": "s", "seed": 0, "systems": ["a", "b"], "pairs": pairs}))
    return path


def test_scores_by_hand(key, tmp_path):
    # System a is 1A and 2B, system b is 1B and 2A
    one = {
        "1A": {"P": 5, "Q": 4, "U": 3},
        "1B": {"P": 2, "Q": 1, "U": 1},
        "2A": {"P": 3, "Q": 1, "U": 2},
        "2B": {"P": 4, "Q": 3, "U": 3},
    }
    two = {"1A": {"P": 4.5, "Q": 4}, "2B": {"P": 2.5, "Q": None}}
    files = [save_answers(tmp_path / f"{rater}.json", "s", rater, given) for rater, given in (("x", one), ("y", two))]
    scores = score_study(key, files)
    a, b = scores["systems"]["a"], scores["systems"]["b"]
    assert a["P"]["mean"] == pytest.approx((5 + 4.5 + 4 + 2.5) / 4)
    assert a["Q"]["mean"] == pytest.approx((4 + 4 + 3) / 3)
    assert a["U"]["mean"] == 3
    assert a["human_score"]["mean"] == pytest.approx(0.4 * 4 + 0.3 * 11 / 3 + 0.3 * 3)
    # Both pairs are drawn twice in a quarter of the resamples each: the percentiles are the two pairs' own means
    assert a["P"]["interval"] == pytest.approx([3.25, 4.75])
    assert b["P"] == {"mean": 2.5, "interval": [2, 3]}
    assert b["human_score"]["mean"] == pytest.approx(0.4 * 2.5 + 0.3 * 1 + 0.3 * 1.5)
    assert b["human_score"]["interval"] == pytest.approx([0.4 * 2 + 0.3 + 0.3, 0.4 * 3 + 0.3 + 0.6])
    assert (a["num_answers"], b["num_answers"]) == (4 + 3 + 2, 6)
    assert (scores["num_raters"], scores["num_answers"], scores["num_missing"]) == (2, 15, 9)
    # P: variances 0.125 and 1.125, two values each; of the four values together 3.5 / 3
    assert scores["agreement"]["P"] == pytest.approx(1 - 0.625 / (3.5 / 3))
    assert scores["agreement"]["Q"] is None and scores["agreement"]["U"] is None
    # Of the resamples, a quarter is the first pair alone, a quarter the second, and half both
    (difference,) = scores["differences"]
    assert difference["systems"] == ["a", "b"]
    assert difference["P"] == {"mean": pytest.approx(4 - 2.5), "interval": pytest.approx([3.25 - 3, 4.75 - 2])}
    assert difference["human_score"]["mean"] == pytest.approx(a["human_score"]["mean"] - b["human_score"]["mean"])
    # 0.4 * 4.75 + 0.3 * 4 + 0.3 * 3 - 1.4 and 0.4 * 3.25 + 0.3 * 3 + 0.3 * 3 - 2.1
    assert difference["human_score"]["interval"] == pytest.approx([1.0, 2.6])
    assert score_study(key, files) == scores
    table = markdown_scores(scores)
    assert "| a | 4.000 [3.250, 4.750] | 3.667 [3.000, 4.000] | 3.000 [3.000, 3.000] | 3.600 [" in table
    assert "| a minus b | 1.500 [0.250, 2.750] | 2.667 [2.000, 3.000] |" in table
    assert "bootstrap resamples of the pairs, with the same raters (seed 0)" in table
    assert "P 0.464, Q not defined, U not defined. Raters: 2; pairs: 2; answers: 15 of 24." in table


def test_a_system_without_answers_has_no_score(key, tmp_path):
    path = save_answers(tmp_path / "x.json", "s", "x", {"1A": {"P": 1}, "1B": {"Q": 2}})
    scores = score_study(key, [path], num_resamples=50)
    assert scores["systems"]["a"]["P"] == {"mean": 1, "interval": [1, 1]}
    assert scores["systems"]["a"]["human_score"] == {"mean": None, "interval": None}
    assert scores["systems"]["b"]["P"]["mean"] is None
    assert "| b | n/a | 2.000 [2.000, 2.000] | n/a | n/a | 1 |" in markdown_scores(scores)
    assert scores["differences"][0]["P"] == {"mean": None, "interval": None}
    json.dumps(scores, allow_nan=False)


def test_no_resample_holds_both_systems(key, tmp_path):
    """They were scored on different pairs, and each resample here draws one pair twice."""
    path = save_answers(tmp_path / "x.json", "s", "x", {"1A": {"P": 1}, "2A": {"P": 4}})
    seeds = (seed for seed in range(99) if score_study(key, [path], 1, seed)["differences"][0]["P"]["interval"] is None)
    scores = score_study(key, [path], 1, next(seeds))
    assert scores["differences"][0]["P"]["mean"] == -3
    assert "| a minus b | -3.000 | n/a |" in markdown_scores(scores)
    json.dumps(scores, allow_nan=False)


def test_one_system_has_no_differences(tmp_path):
    key = tmp_path / "key.json"
    key.write_text(json.dumps({"study": "s", "seed": 0, "systems": ["a"], "pairs": [{"systems": ["a"]}]}))
    scores = score_study(key, [save_answers(tmp_path / "x.json", "s", "x", {"1A": {"P": 1}})])
    assert scores["differences"] == [] and "difference" not in markdown_scores(scores)


NAN = float("nan")
# Published examples: Krippendorff, "Computing Krippendorff's Alpha-Reliability" (2011), four observers; and the one of
# three coders in Wikipedia's article on Krippendorff's alpha
FOUR_OBSERVERS = [
    [1, 2, 3, 3, 2, 1, 4, 1, 2, NAN, NAN, NAN],
    [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, NAN, 3],
    [NAN, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, NAN],
    [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, NAN],
]
THREE_CODERS = [
    [NAN, NAN, NAN, NAN, NAN, 3, 4, 1, 2, 1, 1, 3, 3, NAN, 3],
    [1, NAN, 2, 1, 3, 3, 4, 3, NAN, NAN, NAN, NAN, NAN, NAN, NAN],
    [NAN, NAN, 2, 1, 3, 4, 4, NAN, 2, 1, 1, 3, 3, NAN, 4],
]


@pytest.mark.parametrize(("values", "published"), [(FOUR_OBSERVERS, 0.849), (THREE_CODERS, 0.811)])
def test_alpha_of_published_examples(values, published):
    assert krippendorff_alpha(np.array(values)) == pytest.approx(published, abs=5e-4)


def test_alpha_is_that_of_its_definition():
    """Over all ordered pairs of values: within units, weighed by 1 / (values - 1), and among all values."""
    rng = np.random.default_rng(0)
    values = rng.choice(SCALE, size=(4, 30))
    values[rng.random(values.shape) < 0.4] = NAN
    units = [[value for value in unit if not np.isnan(value)] for unit in values.T]
    units = [unit for unit in units if len(unit) > 1]
    pooled = [value for unit in units for value in unit]
    observed = sum((v - w) ** 2 / (len(unit) - 1) for unit in units for v in unit for w in unit) / len(pooled)
    expected = sum((v - w) ** 2 for v in pooled for w in pooled) / (len(pooled) * (len(pooled) - 1))
    assert krippendorff_alpha(values) == pytest.approx(1 - observed / expected)


def test_alpha_at_its_ends():
    assert krippendorff_alpha(np.array([[1.0, 2.0, 5.0]] * 3)) == 1
    assert krippendorff_alpha(np.array([[1.0, 5.0], [5.0, 1.0]])) < 0
    assert krippendorff_alpha(np.array([[4.0, 4.0], [4.0, 4.0]])) is None
    assert krippendorff_alpha(np.array([[4.0, 2.0]])) is None
    assert krippendorff_alpha(np.array([[4.0, NAN], [NAN, 2.0]])) is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"study": "t"}, "expected answers to the study 's', but got 't'"),
        ({"rater": " "}, "expected `rater`, a name"),
        ({"answers": []}, "`answers`, an object"),
        ({"answers": {"3A": {"P": 1}}}, "expected ids from '1A' to '2B', but got '3A'"),
        ({"answers": {"1A": {"X": 1}}}, "1A: expected scores of 'P', 'Q', 'U'"),
        ({"answers": {"1A": [1]}}, r"1A: expected scores of 'P', 'Q', 'U', but got \[1\]"),
        ({"answers": {"1A": {"P": 1.25}}}, "1A: expected P from 1 to 5 in half points, but got 1.25"),
        ({"answers": {"1A": {"P": 0.5}}}, "but got 0.5"),
        ({"answers": {"1A": {"P": 5.5}}}, "but got 5.5"),
        ({"answers": {"1A": {"U": "4"}}}, "expected U from 1 to 5 in half points, but got '4'"),
        ({"answers": {"1A": {"P": True}}}, "but got True"),
        ({"answers": {"1A": {"P": NAN}}}, "but got nan"),
        ({"answers": {}}, "the files hold none"),
    ],
)
def test_answers_that_do_not_fit(content, message, key, tmp_path):
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"study": "s", "rater": "x", "answers": {"1A": {"P": 1}}} | content))
    with pytest.raises(ValueError, match=message):
        score_study(key, [path])


def test_broken_files_and_a_rater_twice(key, tmp_path):
    fine = save_answers(tmp_path / "x.json", "s", "x", {"1A": {"P": 1}})
    cut = tmp_path / "cut.json"
    cut.write_text(fine.read_text()[:-5])
    with pytest.raises(ValueError, match=r"cut\.json: expected answers that a sheet saved, but got broken JSON"):
        score_study(key, [fine, cut])
    cut.write_text("[]")
    with pytest.raises(ValueError, match=r"cut\.json: expected answers that a sheet saved, but got \[\]"):
        score_study(key, [cut])
    again = save_answers(tmp_path / "again.json", "s", " x ", {"1A": {"P": 2}})
    with pytest.raises(ValueError, match=r"again\.json: expected one file for each rater, but .*x\.json is by 'x' too"):
        score_study(key, [fine, again])
    with pytest.raises(ValueError, match="Expected at least one file of answers"):
        score_study(key, [])
    with pytest.raises(ValueError, match="expected the key that"):
        score_study(fine, [fine])
    key.write_text(key.read_text().replace('["b", "a"]', '["b", "b"]'))
    with pytest.raises(ValueError, match="with `study`, `systems` and `pairs`"):
        score_study(key, [fine])


def test_commands(predictions, tmp_path, capsys):
    folder = tmp_path / "study"
    systems = [f"{name}={path}" for name, path in predictions.items()]
    draw = ["human-study", "draw", "--output_dir", str(folder), "--num_pairs", "3", "--predictions"]
    assert main([*draw, *systems]) == 0
    assert "3 pairs, 2 explanations each" in capsys.readouterr().out
    assert "history" not in shown(folder)["pairs"][0]
    key = json.loads((folder / "key.json").read_text())
    given = {f"{pair}{place}": dict.fromkeys(CRITERIA, 4.5) for pair in (1, 2, 3) for place in "AB"}
    answers = save_answers(tmp_path / "x.json", key["study"], "x", given)
    score = ["human-study", "score", "--key", str(folder / "key.json"), "--answers", str(answers)]
    assert main([*score, "--output_dir", str(tmp_path / "scores")]) == 0
    table = capsys.readouterr().out
    assert "| ostrich | 4.500 [4.500, 4.500] |" in table
    assert (tmp_path / "scores" / "human_scores.md").read_text() == table
    scores = json.loads((tmp_path / "scores" / "human_scores.json").read_text())
    assert scores["systems"]["walrus"]["human_score"]["mean"] == pytest.approx(4.5)

    assert main([*draw, "walrus"]) == 1
    assert "Expected --predictions as NAME=FILE, but got 'walrus'" in capsys.readouterr().err
    assert main([*draw, systems[0], systems[0]]) == 1
    assert "got 'walrus' twice" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        main(["human-study", "fly"])
    assert stopped.value.code == 2 and "invalid choice: 'fly'" in capsys.readouterr().err


# The sheet in a browser


class Rater:
    """Someone with a keyboard alone."""

    def __init__(self, browser):
        from selenium.webdriver.common.action_chains import ActionChains
        from selenium.webdriver.common.keys import Keys

        self.browser, self.keys, self.chain = browser, Keys, ActionChains(browser, duration=0)

    @property
    def focused(self):
        return self.browser.switch_to.active_element

    def press(self, *keys):
        self.chain.send_keys(*keys).perform()

    def tab_to(self, text):
        """Tabs on until the focus is at the element of that id, name or text."""
        for _ in range(40):
            self.press(self.keys.TAB)
            focused = self.focused
            if text in (focused.get_attribute("id"), focused.get_attribute("name"), focused.text):
                return
        pytest.fail(f"no way to {text!r} by the Tab key")

    def score(self, name, value):
        self.tab_to(name)
        self.press(self.keys.SPACE, *[self.keys.ARROW_RIGHT] * SCALE.index(value))

    def read(self, element_id):
        return self.browser.find_element("id", element_id).text

    def wait_for(self, condition):
        from selenium.webdriver.support.wait import WebDriverWait

        return WebDriverWait(self.browser, 20).until(lambda _: condition())

    def scores(self):
        """The scores of the page, by the names of their groups."""
        script = "return [...document.querySelectorAll('input:checked')].map((input) => [input.name, +input.value])"
        return dict(self.browser.execute_script(script))


def test_histories_and_names_of_the_data(predictions, tmp_path):
    rows = [
        {
            "who": f"u{user}",
            "item": f"i{item}",
            "stars": 4,
            "explanation": f"said {user} of {item}",
            "title": f"T{item}",
        }
        for user in range(12)
        for item in (user, (user + 1) % 12, (user + 2) % 12)
    ]
    splits = {"train": rows, "validation": rows[:2], "test": rows[:2]}
    (tmp_path / "data").mkdir()
    for split, part in splits.items():
        write(tmp_path / "data" / f"{split}.jsonl", part)
    draw = ["human-study", "draw", "--output_dir", str(tmp_path / "study"), "--num_pairs", "12", "--predictions"]
    draw += [f"{name}={path}" for name, path in predictions.items()]
    mapping = ["user=who", "rating=stars", "item_title=title"]
    assert main([*draw, "--dataset", str(tmp_path / "data"), "--column_mapping", *mapping]) == 0
    (pair,) = [pair for pair in shown(tmp_path / "study")["pairs"] if pair["user"] == "u4"]
    assert pair["item"] == "T4"
    assert pair["history"] == [{"item": f"T{n}", "rating": 4.0, "text": f"said 4 of {n}"} for n in (5, 6)]


@pytest.fixture
def served(tmp_path):
    """Address of the test's folder: Chromium now and then forgets what a page from a file had kept, once reloaded."""
    handler = functools.partial(QuietHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


def test_sheet_in_a_browser(browser, served, tmp_path):
    files = {name: write(tmp_path / f"{name}.jsonl", records(name, prediction=HOSTILE)) for name in NAMES}
    told = {f"u{number}": [{"item": HOSTILE, "rating": 4.0, "explanation": HOSTILE}] for number in range(12)}
    key = draw_study(files, tmp_path / "study", num_pairs=2, histories=told)
    sheet = f"{served}/study/sheet.html"
    saved = tmp_path / "downloads" / "answers_Änn_K.json"
    rater = Rater(browser)
    browser.get(sheet)

    # It fits, loads nothing, runs nothing of its texts, and says what everything is
    assert browser.execute_script("return document.documentElement.scrollWidth") == 390
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0
    assert browser.find_element("tag name", "blockquote").text == HOSTILE
    seen = browser.find_element("css selector", ".history")
    assert seen.text == f"What this user rated before\n{HOSTILE[:99]}…: 4. {HOSTILE}"
    assert browser.execute_script("return window.isHacked") is None
    group = browser.find_element("tag name", "fieldset")
    assert group.aria_role == "group" and group.accessible_name.startswith("Personalisation of explanation A")
    assert browser.find_element("css selector", "[name='1A-P'][value='3.5']").accessible_name == "3.5"
    unnamed = [
        field.get_attribute("id")
        for field in browser.find_elements("css selector", "input, button")
        if not field.accessible_name
    ]
    assert unnamed == []

    # All but the last score, by keyboard
    given = {f"{page}{place}-{criterion}": value for page, place, criterion, value in [
        (1, "A", "P", 4.5), (1, "A", "Q", 1), (1, "A", "U", 2), (1, "B", "P", 5), (1, "B", "Q", 1.5), (1, "B", "U", 3),
        (2, "A", "P", 2), (2, "A", "Q", 2.5), (2, "A", "U", 1), (2, "B", "P", 3.5), (2, "B", "Q", 4), (2, "B", "U", 1),
    ]}  # fmt: skip
    for name, value in given.items():
        if name == "2A-P":
            rater.tab_to("Next")
            rater.press(rater.keys.ENTER)
            assert rater.focused.text == "Page 2 of 2"
        if name != "2B-U":
            rater.score(name, value)
    assert browser.execute_script("return getComputedStyle(document.activeElement).outlineStyle") == "solid"
    assert rater.read("progress-text") == "11 of 12 scores given"
    assert rater.read("status") == "Kept in this browser, but not yet saved as a file."

    # No name, no file; with one missing, it asks first
    rater.tab_to("save")
    rater.press(rater.keys.ENTER)
    assert rater.focused.get_attribute("id") == "rater"
    assert rater.read("rater-error").startswith("Please enter a name")
    rater.press("Änn K")
    rater.tab_to("save")
    rater.press(rater.keys.ENTER)
    assert rater.focused.get_attribute("id") == "question"
    assert rater.read("question-text") == "1 of 12 scores are missing."
    assert not saved.exists()
    rater.tab_to("Save unfinished")
    rater.press(rater.keys.ENTER)
    rater.wait_for(saved.exists)
    assert rater.read("status").startswith("Saved as answers_Änn_K.json")
    unfinished = saved.rename(tmp_path / "unfinished.json")
    content = json.loads(unfinished.read_text())
    assert (content["study"], content["rater"]) == (key["study"], "Änn K")
    flat = {
        f"{answer}-{name}": score for answer, scores in content["answers"].items() for name, score in scores.items()
    }
    assert flat == {name: score for name, score in given.items() if name != "2B-U"}

    # The browser has kept them, and goes on at what is missing
    browser.refresh()
    assert rater.read("status") == "Your scores are back from this browser."
    assert rater.read("page-title") == "Page 2 of 2" and len(rater.scores()) == 5
    rater.tab_to("missing")
    rater.press(rater.keys.ENTER)
    assert rater.focused.get_attribute("name") == "2B-U"
    rater.press(rater.keys.SPACE)
    rater.tab_to("save")
    rater.press(rater.keys.ENTER)
    rater.wait_for(saved.exists)

    # Another browser: the file alone
    browser.execute_script("localStorage.clear()")
    browser.refresh()
    assert rater.read("progress-text") == "0 of 12 scores given" and rater.scores() == {}
    load = browser.find_element("id", "load")
    load.send_keys(str(save_answers(tmp_path / "other.json", "other", "x", {})))
    rater.wait_for(lambda: "belongs to another study" in rater.read("question-text"))
    load.send_keys(str(save_answers(tmp_path / "off.json", key["study"], "x", {"1A": {"P": 1.2}})))
    rater.wait_for(lambda: "does not know: 1A P 1.2" in rater.read("question-text"))
    load.send_keys(str(unfinished))
    rater.wait_for(lambda: rater.read("progress-text") == "11 of 12 scores given")
    assert browser.find_element("id", "rater").get_attribute("value") == "Änn K"
    assert rater.scores() == {name: value for name, value in given.items() if name[0] == "2" and name != "2B-U"}

    # What was saved can be scored
    scores = score_study(tmp_path / "study" / "key.json", [saved])
    assert scores["num_missing"] == 0
    for system in NAMES:
        places = [f"{number}{'AB'[pair['systems'].index(system)]}" for number, pair in enumerate(key["pairs"], start=1)]
        for criterion in CRITERIA:
            expected = sum(given[f"{place}-{criterion}"] for place in places) / 2
            assert scores["systems"][system][criterion]["mean"] == pytest.approx(expected)


def test_sheet_without_storage(browser, predictions, tmp_path):
    draw_study(predictions, tmp_path / "study", num_pairs=1)
    deny = "Object.defineProperty(window, 'localStorage', { get() { throw new DOMException('denied'); } })"
    browser.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": deny})
    browser.get((tmp_path / "study" / "sheet.html").as_uri())
    rater = Rater(browser)
    rater.score("1A-P", 2)
    assert rater.read("status").startswith("This browser does not keep answers")
    assert rater.read("progress-text") == "1 of 6 scores given"
    rater.tab_to("rater")
    rater.press("b")
    rater.tab_to("restart")
    rater.press(rater.keys.ENTER)
    assert rater.read("question-text") == "Delete the name and all scores on this sheet?"
    rater.tab_to("Delete")
    rater.press(rater.keys.ENTER)
    assert rater.scores() == {} and rater.read("status") == "The sheet is empty."
