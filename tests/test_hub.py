"""Pushed to a stand-in for the Hub and read back: model, processor, card, metrics, a run; pinned by revision."""

import json
import os
import subprocess
import sys

import pytest
from fake_hub import FakeHub
from references import BLOCK_PACKAGE, spread_clusters, tiny_model

from gavamoe_hf import GaVaMoEProcessor
from gavamoe_hf.hub import push_checkpoint, push_metrics

DECODING = {"do_sample": False, "max_new_tokens": 5, "min_new_tokens": 5}

# With the package, in a process of its own: huggingface_hub reads the environment when it is imported. Prints as JSON
# what the tests look at.
PUSH = r"""
import json, pathlib, sys
import torch
from huggingface_hub import HfApi, ModelCard
from gavamoe_hf import load_checkpoint
from gavamoe_hf.cli.main import main
from gavamoe_hf.evaluation import METRICS_MODULE
from gavamoe_hf.hub import push_checkpoint, push_metrics

torch.set_num_threads(1)
folder, decoding = pathlib.Path(sys.argv[1]), json.loads(sys.argv[2])
model, processor = load_checkpoint(str(folder / "checkpoint"))
printed = {}

def push(name):
    model.push_to_hub("someone/explainer")
    explained = model.explain(processor, "U3", "I5", **decoding)[0]
    sha = HfApi().model_info("someone/explainer").sha
    printed[name] = [sha, explained.explanation, explained.predicted_rating]

processor.push_to_hub("someone/explainer")
ModelCard("---\nlicense: mit\n---\n# An explainer\n").push_to_hub("someone/explainer")
push("first")
with torch.no_grad():
    model.lm_head.weight.copy_(model.lm_head.weight.flip(0))
    model.rating_model.decoder_output.bias[0] += 3
push("second")

printed["folder"] = push_checkpoint(folder / "run", "someone/whole", revision="tried").oid
try:
    push_checkpoint(folder / "run", "someone/whole", token="hf_wrong")
except OSError as error:
    printed["wrong token"] = str(error)

push_metrics("someone/gavamoe_metrics")
import evaluate
texts = {"predictions": ["the strings sound great"], "references": ["these strings sound really great"]}
scores = [evaluate.load(name, "peter").compute(**texts) for name in ("someone/gavamoe_metrics", METRICS_MODULE)]
assert scores[0] == scores[1] and scores[0]["rouge_l"] > 0

options = (
    "train --dataset synthetic --use_cpu true --hidden_size 32 --num_hidden_layers 1 --num_attention_heads 2 "
    "--moe_intermediate_size 16 --num_experts 4 --vocab_size 500 --rating_autoencoder_learning_rates 1e-3 "
    "--rating_autoencoder_epochs 1 --rating_num_train_epochs 1 --max_steps 2 --save_strategy no --eval_strategy no "
    "--load_best_model_at_end false --disable_tqdm true --push_to_hub true "
).split()
refused = [*options, "--output_dir", str(folder / "refused"), "--hub_token", "hf_wrong"]
printed["refused"] = [main([*refused, "--dataset", str(folder / "records")]), (folder / "refused").exists()]
named = [*options, "--output_dir", str(folder / "trained"), "--hub_model_id", "someone/trained"]
printed["trained"] = main([*named, "--dataset", str(folder / "records")])
(folder / "printed.json").write_text(json.dumps(printed))
"""

# Without the package, and with an empty cache.
READ = r"""
import json
import torch
from transformers import AutoModel, AutoProcessor, pipeline

torch.set_num_threads(1)
decoding, printed = (json.loads(text) for text in sys.argv[1:])

def check(revision, expected):
    options = {"trust_remote_code": True} | ({} if revision is None else {"revision": revision})
    model = AutoModel.from_pretrained("someone/explainer", **options)
    processor = AutoProcessor.from_pretrained("someone/explainer", **options)
    explained = model.explain(processor, "U3", "I5", **decoding)[0]
    assert explained.explanation == expected[1], (revision, explained, expected)
    assert abs(explained.predicted_rating - expected[2]) < 1e-5, (revision, explained, expected)
    explain = pipeline("explainable-recommendation", model="someone/explainer", device="cpu", **options)
    output = explain({"user": "U3", "item": "I5"}, **decoding)
    assert output["explanation"] == expected[1], (revision, output, expected)

check(printed["first"][0], printed["first"])
check(None, printed["second"])
# From the cache, after a newer one
check(printed["first"][0], printed["first"])
model = AutoModel.from_pretrained("someone/trained", trust_remote_code=True)
processor = AutoProcessor.from_pretrained("someone/trained", trust_remote_code=True)
explained = model.explain(processor, processor.users[0], processor.items[0])
assert explained[0].user == processor.users[0]
assert "gavamoe_hf" not in sys.modules
print("ALL CHECKED")
"""


def run(script: str, *arguments: object, hub: FakeHub, home) -> str:
    environment = {**os.environ, **hub.environment(home), "GRADIO_ANALYTICS_ENABLED": "False"}
    command = [sys.executable, "-c", script, *map(str, arguments)]
    result = subprocess.run(command, env=environment, cwd=home, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout


@pytest.fixture(scope="module")
def hub():
    with FakeHub() as hub:
        yield hub


@pytest.fixture(scope="module")
def folder(tokenizer, planted, tmp_path_factory):
    """A checkpoint, and a run's folder with what must not be pushed."""
    folder = tmp_path_factory.mktemp("pushed")
    model = tiny_model(vocab_size=len(tokenizer), user_token_id=3, item_token_id=4)
    spread_clusters(model.eval())
    processor = GaVaMoEProcessor(tokenizer, users=[f"U{n}" for n in range(8)], items=[f"I{n}" for n in range(9)])
    for name in ("checkpoint", "run"):
        model.save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
    (folder / "run" / "rating_model").mkdir()
    private = ("run.json", "predictions_test.jsonl", "clusters.json", "notes.txt", "rating_model/config.json")
    for name in (*private, "metrics.json", "README.md"):
        (folder / "run" / name).write_text("{}")
    (folder / "records").mkdir()
    for split, records in planted.records.items():
        records.to_json(folder / "records" / f"{split}.jsonl")
    return folder


@pytest.fixture(scope="module")
def printed(hub, folder):
    run(PUSH, folder, json.dumps(DECODING), hub=hub, home=folder)
    return json.loads((folder / "printed.json").read_text())


def test_model_processor_and_card_are_pushed(hub, printed, folder):
    files = hub.files("someone/explainer", revision=printed["first"][0])
    saved = {path.name: path.read_bytes() for path in (folder / "checkpoint").iterdir()}
    assert files.keys() == {*saved, "README.md", ".gitattributes"}
    for name in ("model.safetensors", "tokenizer.json", "pipeline_gavamoe.py", "modeling_gavamoe.py"):
        assert files[name] == saved[name], name
    # That of the first push, and not one that transformers would make
    assert b"# An explainer" in files["README.md"]
    later = hub.files("someone/explainer")
    assert {name for name in files if files[name] != later[name]} == {"model.safetensors"}
    assert printed["first"][1] != printed["second"][1]
    assert abs(printed["first"][2] - printed["second"][2]) > 0.1


def test_read_back_without_the_package_pinned_by_revision(hub, printed, tmp_path):
    output = run(BLOCK_PACKAGE + READ, json.dumps(DECODING), json.dumps(printed), hub=hub, home=tmp_path)
    assert output.strip().endswith("ALL CHECKED")


def test_a_run_is_pushed_without_what_is_not_for_others(hub, printed, folder):
    files = hub.files("someone/whole", revision="tried")
    saved = {path.name for path in (folder / "checkpoint").iterdir()}
    assert files.keys() == {*saved, "metrics.json", "README.md", ".gitattributes"}
    assert hub.branches["models", "someone/whole"]["tried"] == printed["folder"]
    assert hub.files("someone/whole").keys() == {".gitattributes"}
    assert "401" in printed["wrong token"]


def test_train_pushes_at_the_end(hub, printed, folder):
    assert printed["trained"] == 0
    files = hub.files("someone/trained")
    run_files = {path.name for path in (folder / "trained").iterdir()}
    left_out = {"run.json", "predictions_test.jsonl", "clusters.json", "clusters.md", "rating_model", "checkpoints"}
    assert left_out - {"checkpoints"} <= run_files
    assert files.keys() == run_files - left_out | {".gitattributes"}
    for name in ("model.safetensors", "README.md", "metrics.json"):
        assert files[name] == (folder / "trained" / name).read_bytes(), name
    assert b"someone/trained" in files["README.md"]
    # Once, by itself, when all was there
    assert sum("commit" in request and "someone/trained" in request for request in hub.requests) == 1


def test_train_is_refused_before_it_starts(printed):
    assert printed["refused"] == [1, False]


def test_metrics_are_pushed_as_a_space(hub, printed):
    files = hub.files("someone/gavamoe_metrics", kind="spaces")
    assert files.keys() == {"README.md", "app.py", "gavamoe_metrics.py", "requirements.txt", ".gitattributes"}


def test_errors_come_before_the_hub(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"lacks config\.json"):
        push_checkpoint(tmp_path, "someone/nothing")
    with pytest.raises(ValueError, match=r"Expected `repo_id` as user/gavamoe_metrics, but got 'someone/scores'"):
        push_metrics("someone/scores")
