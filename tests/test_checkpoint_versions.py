"""A checkpoint that one version made loads in the next, by the package's code and by the code that came with it."""

import json
import re
import zipfile
from pathlib import Path

import pytest
from references import run_without_package
from transformers import AutoModelForCausalLM

from gavamoe_hf import load_checkpoint
from gavamoe_hf.configuration_gavamoe import FORMAT_VERSION

FIXTURES = sorted((Path(__file__).parent / "fixtures").glob("checkpoint_v*.zip"))
LENGTH = {"do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8}


def unpacked(fixture: Path, folder: Path) -> Path:
    with zipfile.ZipFile(fixture) as archive:
        archive.extractall(folder / fixture.stem)
    return folder / fixture.stem


def expected(fixture: Path) -> list[dict]:
    return json.loads(fixture.with_suffix(".json").read_text(encoding="utf-8"))["pairs"]


def check(model, processor, pairs):
    for pair in pairs:
        batch = processor(*pair["pair"])
        assert model.generate(**batch, **LENGTH)[0].tolist() == pair["tokens"], pair["pair"]
        predicted = model.rating_model.predict(batch["user_id"], batch["item_id"])
        assert predicted.predicted_rating.item() == pytest.approx(pair["predicted_rating"], abs=1e-4)
        assert predicted.cluster_posterior.argmax().item() == pair["cluster"]


def test_each_format_has_its_checkpoint():
    versions = [int(re.fullmatch(r"checkpoint_v(\d+)", fixture.stem)[1]) for fixture in FIXTURES]
    assert versions == list(range(1, FORMAT_VERSION + 1))
    for fixture in FIXTURES:
        assert fixture.stat().st_size < 150_000
        pairs = expected(fixture)
        # Pairs that differ, or nothing would show
        assert len({tuple(pair["tokens"][-8:]) for pair in pairs}) == len(pairs) > 3
        assert len({pair["cluster"] for pair in pairs}) > 1


@pytest.mark.parametrize("fixture", FIXTURES, ids=lambda fixture: fixture.stem)
def test_loads_and_is_saved_again(fixture, tmp_path):
    folder = unpacked(fixture, tmp_path)
    version = int(fixture.stem.removeprefix("checkpoint_v"))
    assert json.loads((folder / "config.json").read_text())["format_version"] == version
    model, processor = load_checkpoint(str(folder))
    check(model, processor, expected(fixture))
    if version == 1:
        # From before checkpoints knew what users have
        assert model.config.num_interactions == 0
        assert len(set(model.recommend(0, top_k=len(processor.items)).item_id[0].tolist())) == len(processor.items)
    model.save_pretrained(tmp_path / "again")
    processor.save_pretrained(tmp_path / "again")
    check(*load_checkpoint(str(tmp_path / "again")), expected(fixture))


# The same comparison where there is neither this package nor pytest
SCRIPT = r"""
import json
from transformers import AutoModelForCausalLM, AutoProcessor

folder, fixture = map(pathlib.Path, sys.argv[1:])
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules.")
for pair in json.loads(fixture.read_text())["pairs"]:
    batch = processor(*pair["pair"])
    tokens = model.generate(**batch, do_sample=False, max_new_tokens=8, min_new_tokens=8)
    assert tokens[0].tolist() == pair["tokens"], pair["pair"]
    rating = model.predict_rating(batch["user_id"], batch["item_id"]).item()
    assert abs(rating - pair["predicted_rating"]) < 1e-4, pair["pair"]
print("ALL CHECKED")
"""


@pytest.mark.parametrize("fixture", FIXTURES, ids=lambda fixture: fixture.stem)
def test_loads_by_the_code_that_came_with_it(fixture, tmp_path):
    folder = unpacked(fixture, tmp_path)
    output = run_without_package(SCRIPT, folder, fixture.with_suffix(".json"), modules=tmp_path, cwd=tmp_path)
    assert output.strip().endswith("ALL CHECKED")


def test_newer_format_asks_for_a_newer_package(tmp_path):
    folder = unpacked(FIXTURES[-1], tmp_path)
    config = json.loads((folder / "config.json").read_text())
    # Whose other fields may be of types that are not known here
    changed = {**config, "format_version": FORMAT_VERSION + 1, "num_clusters": {"by layer": [2, 3]}}
    (folder / "config.json").write_text(json.dumps(changed))
    message = rf"format version {FORMAT_VERSION + 1}, but this package reads up to {FORMAT_VERSION}\. Install a newer"
    for load in (load_checkpoint, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(ValueError, match=message):
            load(str(folder))
