"""The pipeline: what `explain` gives pair by pair, in batches; with the package and from a checkpoint alone."""

import json
from dataclasses import asdict

import pytest
import torch
from datasets import Dataset
from references import run_without_package, spread_clusters, tiny_model
from transformers import pipeline
from transformers.pipelines.pt_utils import KeyDataset

from gavamoe_hf import ExplainableRecommendationPipeline, GaVaMoEProcessor

TASK = "explainable-recommendation"
# Prompts of several lengths, sentiments that are given and that are not, the population, ids that are no strings
PAIRS = [
    {"user": "U0", "item": "I0"},
    {"user": "U1", "item": "I3", "rating": 1.0, "features": ["sound", "strings and the price of them"]},
    {"user": None, "item": "I1", "rating": None, "features": []},
    {"user": "U5", "item": "I2", "rating": 5, "explanation": "a row's other columns"},
    {"user": "U7", "item": None, "features": ["price"]},
]
DECODING = {"max_new_tokens": 5, "min_new_tokens": 5}


@pytest.fixture(scope="module")
def saved(tokenizer, tmp_path_factory):
    """Model, processor, and the folder of both."""
    folder = tmp_path_factory.mktemp("pipeline") / "checkpoint"
    model = tiny_model(vocab_size=len(tokenizer), user_token_id=3, item_token_id=4)
    spread_clusters(model.eval())
    processor = GaVaMoEProcessor(
        tokenizer,
        users=[f"U{n}" for n in range(8)],
        items=[f"I{n}" for n in range(9)],
        item_features=[["sound", "price"], ["strings"], *[[] for _ in range(7)]],
        positive_rating_threshold=model.config.positive_rating_threshold,
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model, processor, folder


@pytest.fixture(scope="module")
def explain(saved):
    model, processor, _ = saved
    return pipeline(TASK, model=model, processor=processor, device="cpu", **DECODING)


@pytest.fixture(scope="module")
def expected(saved) -> list[dict]:
    """One by one, by `explain` itself."""
    model, processor, _ = saved
    columns = [{name: pair.get(name) for name in ("user", "item", "rating", "features")} for pair in PAIRS]
    return [asdict(model.explain(processor, **pair, do_sample=False, **DECODING)[0]) for pair in columns]


def check(outputs, expected):
    assert len(outputs) == len(expected)
    for output, other in zip(outputs, expected, strict=True):
        assert output.keys() == other.keys()
        for name, value in other.items():
            assert output[name] == (pytest.approx(value, abs=1e-5) if "rating" in name or "post" in name else value)


def test_the_task_is_registered(explain, expected):
    assert type(explain) is ExplainableRecommendationPipeline
    assert len({output["explanation"] for output in expected}) > 1
    assert len({output["cluster"] for output in expected}) > 1
    check([explain(pair) for pair in PAIRS], expected)


@pytest.mark.parametrize("batch_size", [1, 2, 5, 8])
def test_batches(explain, expected, batch_size):
    check(explain(PAIRS, batch_size=batch_size), expected)


def test_inputs_of_every_kind(explain, expected):
    check(explain(tuple(PAIRS), batch_size=2), expected)
    columns = {name: [pair.get(name) for pair in PAIRS] for name in ("user", "item", "rating", "features")}
    rows = Dataset.from_dict(columns)
    nested = KeyDataset(Dataset.from_dict({"pair": list(rows)}), "pair")
    for inputs in ((pair for pair in PAIRS), iter(PAIRS), rows, nested):
        outputs = explain(inputs, batch_size=2)
        assert not isinstance(outputs, list)
        check(list(outputs), expected)
    assert explain([]) == []


def test_a_stream_is_read_as_it_is_asked_for(explain):
    read = []

    def pairs():
        for pair in PAIRS:
            read.append(pair)
            yield pair

    outputs = iter(explain(pairs(), batch_size=2))
    next(outputs)
    assert len(read) < len(PAIRS)


def test_options_of_generate_at_either_place(saved, explain):
    model, processor, _ = saved
    several = explain(PAIRS[:3], batch_size=2, num_beams=2, num_return_sequences=2)
    assert [len(outputs) for outputs in several] == [2, 2, 2]
    first = model.explain(processor, "U0", "I0", do_sample=False, num_beams=2, num_return_sequences=2, **DECODING)
    assert [output["explanation"] for output in several[0]] == [explained.explanation for explained in first]
    check(explain(PAIRS[0], num_beams=2, num_return_sequences=2), several[0])
    longer = explain(PAIRS[0], max_new_tokens=9, min_new_tokens=9)["explanation"]
    assert longer.startswith(explain(PAIRS[0])["explanation"]) and longer != explain(PAIRS[0])["explanation"]


def test_errors(explain):
    with pytest.raises(
        ValueError, match=r'Expected each input as \{"user": ..., "item": ...\}, but got .*\[\'user\'\]'
    ):
        explain({"user": "U0"})
    with pytest.raises(ValueError, match=r"but got 'U0'"):
        explain("U0")
    with pytest.raises(ValueError, match=r"The user 'U99' is not among the 8 known users"):
        explain([PAIRS[0], {"user": "U99", "item": "I0"}], batch_size=2)


def test_folder_with_the_package(saved, expected, tmp_path):
    """By the package's own code, so that no code of the checkpoint has to be trusted."""
    for options in ({}, {"trust_remote_code": True}):
        loaded = pipeline(TASK, model=str(saved[2]), device="cpu", **options)
        assert type(loaded) is ExplainableRecommendationPipeline
        check(loaded(PAIRS, batch_size=3, **DECODING), expected)
    loaded.save_pretrained(tmp_path / "again")
    assert {path.name for path in (tmp_path / "again").iterdir()} == {path.name for path in saved[2].iterdir()}
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    implementation = "pipeline_gavamoe.ExplainableRecommendationPipeline"
    assert config["custom_pipelines"] == {TASK: {"impl": implementation, "pt": ["AutoModelForCausalLM"]}}
    assert (tmp_path / "again" / "pipeline_gavamoe.py").is_file()


SCRIPT = r"""
import json
from transformers import pipeline

folder = pathlib.Path(sys.argv[1])
case = json.loads((folder / "case.json").read_text())

def check(path, **options):
    explain = pipeline(model=str(path), trust_remote_code=True, device="cpu", **options)
    assert type(explain).__module__.startswith("transformers_modules."), type(explain).__module__
    for batch_size in (1, 3):
        outputs = explain(case["pairs"], batch_size=batch_size, **case["decoding"])
        assert [output["explanation"] for output in outputs] == case["explanations"], outputs
    # Of strings, as in the file
    assert "AutoModelForCausalLM" in repr(explain.model.config)
    return explain

check(folder / "checkpoint").save_pretrained(folder / "again")
check(folder / "again", task="explainable-recommendation")
try:
    pipeline("explainable-recommendation", model=str(folder / "again"), trust_remote_code=False)
except ValueError as error:
    assert "trust_remote_code=True" in str(error)
else:
    raise AssertionError("the checkpoint's code ran without leave")
print("ALL CHECKED")
"""


def test_folder_without_the_package(saved, expected, tmp_path):
    texts = [output["explanation"] for output in expected]
    case = {"pairs": PAIRS, "decoding": DECODING, "explanations": texts}
    (saved[2].parent / "case.json").write_text(json.dumps(case))
    output = run_without_package(SCRIPT, saved[2].parent, modules=tmp_path, cwd=tmp_path)
    assert output.strip().endswith("ALL CHECKED")


def test_the_given_model_is_left_as_it_is(saved, explain):
    model, _, _ = saved
    before = {name: value.clone() for name, value in model.state_dict().items()}
    explain(PAIRS[0])
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
