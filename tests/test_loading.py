"""load_checkpoint: a checkpoint that lacks a file, or has a broken one, is named with it."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig
from references import make_trainer, spread_clusters, tiny_model
from transformers.models.llama.modeling_llama import LlamaMLP

from gavamoe_hf import GaVaMoEProcessor, load_checkpoint
from gavamoe_hf.export import export_standard
from gavamoe_hf.training.pipeline import save_checkpoint


@pytest.fixture(scope="module")
def saved(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    model = spread_clusters(tiny_model(vocab_size=len(tokenizer), user_token_id=3, item_token_id=4))
    processor = GaVaMoEProcessor(tokenizer, users=["a", "b"], items=["x"], item_features=[["sound"]])
    model.config.stored_prompts = processor.stored_prompts()
    model.save_pretrained(folder / "whole")
    processor.save_pretrained(folder / "whole")
    model.save_pretrained(folder / "sharded", max_shard_size="100KB")
    processor.save_pretrained(folder / "sharded")
    assert len(list((folder / "sharded").glob("model-*.safetensors"))) > 1
    return folder, model


@pytest.fixture
def checkpoint(saved, tmp_path):
    return shutil.copytree(saved[0] / "whole", tmp_path / "checkpoint")


@pytest.fixture
def sharded(saved, tmp_path):
    return shutil.copytree(saved[0] / "sharded", tmp_path / "sharded")


@pytest.mark.parametrize("kind", ["whole", "sharded"])
def test_loads(saved, kind):
    folder, model = saved
    loaded, processor = load_checkpoint(str(folder / kind))
    assert not loaded.training
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    inputs = processor(user="b", item="x", rating=4)
    tokens = loaded.generate(**inputs, max_new_tokens=2, min_new_tokens=2)
    assert tokens.shape == (1, inputs["input_ids"].shape[1] + 2)


def test_weights_that_are_missing_are_not_random(checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    config["num_hidden_layers"] += 1
    (checkpoint / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"are missing, such as model\.layers\.\d\.\S+, and would be random"):
        load_checkpoint(checkpoint)


def test_nothing_is_built_to_be_thrown_away(saved, monkeypatch):
    def refuse(self, config):
        raise AssertionError("a dense feed-forward layer, where the experts stand")

    monkeypatch.setattr(LlamaMLP, "__init__", refuse)
    model, _ = load_checkpoint(saved[0] / "whole")
    assert set(dict(model.model.layers[0].named_children())) == {
        "self_attn", "mlp", "input_layernorm", "post_attention_layernorm",
    }  # fmt: skip


def test_a_load_does_not_write_the_catalogue_out(saved, monkeypatch):
    def refuse(self):
        raise AssertionError("all ids and features as JSON")

    monkeypatch.setattr(GaVaMoEProcessor, "to_json_string", refuse)
    _, processor = load_checkpoint(saved[0] / "whole")
    assert repr(processor).startswith("GaVaMoEProcessor(2 users, 1 items, ")


def test_loads_in_another_dtype(saved):
    model, processor = load_checkpoint(saved[0] / "whole", dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16 and processor.users == ["a", "b"]


@pytest.mark.parametrize(
    "name", ["config.json", "processor_config.json", "tokenizer_config.json", "tokenizer.json", "model.safetensors"]
)
def test_missing_file(checkpoint, name):
    (checkpoint / name).unlink()
    with pytest.raises(FileNotFoundError, match=rf"The checkpoint .*checkpoint lacks {name}\. Save it again"):
        load_checkpoint(str(checkpoint))


@pytest.mark.parametrize("name", ["config.json", "processor_config.json", "tokenizer_config.json", "tokenizer.json"])
@pytest.mark.parametrize("content", [b'{"a": 1', b"", b'{"a": "\xff"}'], ids=["cut", "empty", "encoding"])
def test_broken_json(checkpoint, name, content):
    (checkpoint / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name} is not valid JSON: truncated\?"):
        load_checkpoint(str(checkpoint))


@pytest.mark.parametrize("keep", [0, 4, 8, 200, -1])
def test_truncated_weights(checkpoint, keep):
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"model\.safetensors (is truncated: expected|has no readable header)"):
        load_checkpoint(str(checkpoint))


@pytest.mark.parametrize("header", [b"3", b"[]", b"{}", b'{"a": 1}', b'{"a": {}}'])
def test_weights_that_are_none(checkpoint, header):
    (checkpoint / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ValueError, match=r"model\.safetensors has no readable header"):
        load_checkpoint(str(checkpoint))


def test_size_is_named(checkpoint):
    weights = checkpoint / "model.safetensors"
    size = weights.stat().st_size
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(ValueError, match=rf"expected {size} bytes, but found {size - 10}"):
        load_checkpoint(str(checkpoint))


def test_shards(sharded):
    index = sharded / "model.safetensors.index.json"
    shard = sorted(set(json.loads(index.read_text())["weight_map"].values()))[1]
    content = (sharded / shard).read_bytes()
    (sharded / shard).unlink()
    with pytest.raises(FileNotFoundError, match=rf"lacks {shard}"):
        load_checkpoint(str(sharded))
    (sharded / shard).write_bytes(content[:-1])
    with pytest.raises(ValueError, match=rf"{shard} is truncated"):
        load_checkpoint(str(sharded))
    for broken in ('{"weight_map": {', "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'):
        index.write_text(broken)
        with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json is not"):
            load_checkpoint(str(sharded))


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_json_that_is_no_object(checkpoint, name):
    (checkpoint / name).write_text("[]")
    with pytest.raises(ValueError, match=rf"{name}: expected a JSON object, but got a list\. Save it again"):
        load_checkpoint(str(checkpoint))


@pytest.mark.parametrize("shard", ["../checkpoint/model.safetensors", "/etc/passwd", "", ".."])
def test_weights_outside_the_folder_are_not_read(checkpoint, shard):
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(ValueError, match=r"index\.json: expected names of files in its folder, but got"):
        load_checkpoint(str(checkpoint))


@pytest.mark.parametrize(
    ("name", "change", "found"),
    [
        ("tokenizer.json", {"model": {}}, "Exception"),
        ("tokenizer_config.json", {"model_max_length": []}, "TypeError"),
        ("processor_config.json", {"users": 3}, "TypeError"),
        ("processor_config.json", {"chat_template": "{% broken"}, "TemplateSyntaxError"),
    ],
)
def test_fields_that_are_not_as_they_were_saved(checkpoint, name, change, found):
    path = checkpoint / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=rf"Expected a checkpoint .*, but loading it failed with {found}: .* Save or"):
        load_checkpoint(str(checkpoint))


def test_no_such_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"a checkpoint folder or a Hub id, but there is no folder .*nowhere"):
        load_checkpoint(str(tmp_path / "nowhere"))
    (tmp_path / "file").write_text("")
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*file"):
        load_checkpoint(str(tmp_path / "file"))
    with pytest.raises(FileNotFoundError, match=r"lacks config\.json"):
        load_checkpoint(str(tmp_path))


def test_weights_are_as_readable_as_the_files_beside_them(tmp_path, monkeypatch, tiny, planted):
    """safetensors writes files that their owner alone can read."""
    processor, model = tiny
    former = os.umask(0o022)
    try:
        model.save_pretrained(tmp_path / "whole")
        model.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
        model.rating_model.save_pretrained(tmp_path / "rating")
        export_standard(model, processor, tmp_path / "export")
        lora = LoraConfig(target_modules=["q_proj"], modules_to_save=["mlp.experts"])
        for name, peft_config in (("full", None), ("adapter", lora)):
            make_trainer(tiny, planted, tmp_path / "run", peft_config).save_model(str(tmp_path / name))
    finally:
        os.umask(former)
    weights = list(tmp_path.rglob("*.safetensors"))
    assert len(weights) >= 8 and {path.parent.name for path in weights} >= {"adapter", "full", "shards", "cluster_0"}
    assert {oct(path.stat().st_mode & 0o777) for path in weights} == {"0o644"}


def test_public_names_come_at_first_use():
    """What the card promises is imported from the package itself, and the package alone brings no TRL."""
    script = (
        "import sys, gavamoe_hf; assert 'trl' not in sys.modules; "
        "from gavamoe_hf import GaVaMoESFTConfig, GaVaMoESFTTrainer, RatingTrainer, load_records; "
        "assert 'trl' in sys.modules; assert all(getattr(gavamoe_hf, name) for name in gavamoe_hf.__all__); "
        "print(GaVaMoESFTTrainer.__module__)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "gavamoe_hf.training.sft_trainer"


def test_a_run_says_what_its_checkpoint_needs(tmp_path, tiny):
    """For those who load it without this package."""
    processor, model = tiny
    (tmp_path / "checkpoint").mkdir()
    save_checkpoint(model, processor, tmp_path / "checkpoint")
    lines = (tmp_path / "checkpoint" / "requirements.txt").read_text().splitlines()
    assert [line.split(">")[0].split("<")[0] for line in lines] == ["torch", "transformers"]
