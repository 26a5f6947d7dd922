"""Checkpoints and adapters made to do harm: none of their code runs, nobody is asked, and one line says why not."""

import builtins
import json
import shutil
import sys
import time

import pytest
import torch
from peft import LoraConfig, get_peft_model
from references import spread_clusters, tiny_model
from safetensors.torch import load_file, save_file

from gavamoe_hf import GaVaMoEProcessor, load_checkpoint
from gavamoe_hf.cli.main import main

# Leaves a mark where it is imported or run
EVIL = "import pathlib; pathlib.Path({mark!r}).touch()\nclass Evil:\n    def __init__(self, *_, **__): pass\n"


@pytest.fixture(scope="module")
def saved(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile") / "checkpoint"
    model = spread_clusters(tiny_model(vocab_size=len(tokenizer), user_token_id=3, item_token_id=4))
    model.save_pretrained(folder)
    users, items = [f"U{number}" for number in range(8)], [f"I{number}" for number in range(9)]
    GaVaMoEProcessor(tokenizer, users=users, items=items).save_pretrained(folder)
    return folder


@pytest.fixture
def hostile(saved, tmp_path, monkeypatch):
    """A copy, evil modules that could be imported, and a file that exists once one was."""
    mark = tmp_path / "mark"
    folder = shutil.copytree(saved, tmp_path / "checkpoint")
    (tmp_path / "megatron").mkdir()
    for path in (folder / "evil.py", tmp_path / "megatron" / "evil.py", tmp_path / "megatron" / "__init__.py"):
        path.write_text(EVIL.format(mark=str(mark)))
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(EVIL.format(mark=str(mark)))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(builtins, "input", lambda *_: pytest.fail("asked whether to run code"))
    yield folder, mark
    for name in [name for name in sys.modules if name.split(".")[0] == "megatron"]:
        del sys.modules[name]


def change(path, **values):
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | values))


CHECKPOINTS = {
    "tokenizer_code": (
        "tokenizer_config.json",
        {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}},
    ),
    "model_code": ("config.json", {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil"}}),
    "audio_tokenizer": (
        "processor_config.json",
        {"audio_tokenizer": {"audio_tokenizer_class": "Evil", "audio_tokenizer_name_or_path": "some/repository"}},
    ),
    "quantization": ("config.json", {"quantization_config": {"quant_method": "evil"}}),
    "kernels": ("config.json", {"attn_implementation": "some/kernels"}),
    "private_kernels": ("config.json", {"_experts_implementation": "some/kernels:evil"}),
    "generation_code": ("generation_config.json", {"custom_generate": "some/repository"}),
    "adapter_beside": ("adapter_config.json", {"peft_type": "LORA", "r": 1, "target_modules": ["q_proj"]}),
    "width": ("processor_config.json", {"prompt_template": "{sentiment:>9999999999} {features} {item} {user}"}),
    "attribute": ("processor_config.json", {"prompt_template": "{item.__class__} {features} {user}"}),
    "long_system_prompt": ("processor_config.json", {"system_prompt": "a" * 4_000_000}),
    "many_levels": ("config.json", {"rating_levels": list(range(1_000_000))}),
    "many_layers": ("config.json", {"num_hidden_layers": 10**9}),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoints(hostile, name):
    folder, mark = hostile
    file, values = CHECKPOINTS[name]
    change(folder / file, **values)
    start = time.monotonic()
    with pytest.raises((ValueError, OSError)) as caught:
        load_checkpoint(str(folder))
    assert time.monotonic() - start < 10
    assert not mark.exists() and len(str(caught.value)) < 1000


@pytest.mark.parametrize("name", ["tokenizer_code", "model_code", "audio_tokenizer", "adapter_beside"])
@pytest.mark.parametrize("command", ["explain", "recommend", "export"])
def test_commands(hostile, tmp_path, capsys, name, command):
    folder, mark = hostile
    file, values = CHECKPOINTS[name]
    change(folder / file, **values)
    options = {"explain": ["--user", "U1", "--item", "I1"], "recommend": ["--user", "U1"]}
    options["export"] = ["--output_dir", str(tmp_path / "export")]
    assert main([command, "--model", str(folder), *options[command]]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"gavamoe {command}: ") and file.split(".")[0] in error
    assert not mark.exists() and not (tmp_path / "export").exists()


@pytest.fixture(scope="module")
def adapter(saved, tokenizer, tmp_path_factory):
    """A good adapter, beside its base."""
    folder = tmp_path_factory.mktemp("adapter")
    shutil.copytree(saved, folder / "base_model")
    model, processor = load_checkpoint(str(folder / "base_model"))
    config = LoraConfig(target_modules=["q_proj"], r=2, task_type="CAUSAL_LM", modules_to_save=["rating_model"])
    adapted = get_peft_model(model, config)
    with torch.no_grad():
        for value in adapted.parameters():
            value.add_(0.01)
    adapted.save_pretrained(folder / "adapter")
    processor.save_pretrained(folder / "adapter")
    return folder


ADAPTERS = {
    "megatron": {"megatron_config": {"a": 1}, "megatron_core": "megatron.evil"},
    "megatron_core": {"megatron_core": "megatron.evil"},
    "backtracking": {"target_modules": "(.*a)*(.*b)*(.*c)*x"},
    "pattern": {"rank_pattern": {"(.*a)*(.*b)*x": 2}},
    "replication": {"layer_replication": [[0, 2]] * 1000},
    "huge_rank": {"r": 10**9},
    "loftq": {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}},
    "eva": {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}},
    "prompt_tuning": {"peft_type": "PROMPT_TUNING"},
    "no_kind": {"peft_type": None},
}


def test_a_good_adapter_loads(adapter):
    model, _ = load_checkpoint(str(adapter / "adapter"))
    base, _ = load_checkpoint(str(adapter / "base_model"))
    assert not torch.equal(model.model.layers[0].self_attn.q_proj.weight, base.model.layers[0].self_attn.q_proj.weight)


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters(adapter, hostile, tmp_path, name):
    mark = hostile[1]
    shutil.copytree(adapter, tmp_path / "copy")
    change(tmp_path / "copy" / "adapter" / "adapter_config.json", **ADAPTERS[name])
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"adapter_config\.json: expected"):
        load_checkpoint(str(tmp_path / "copy" / "adapter"))
    assert time.monotonic() - start < 10 and not mark.exists()


@pytest.mark.parametrize("kind", ["half", "none", "more"])
def test_adapters_without_their_weights(adapter, tmp_path, kind):
    shutil.copytree(adapter, tmp_path / "copy")
    path = tmp_path / "copy" / "adapter" / "adapter_model.safetensors"
    weights = load_file(path)
    names = sorted(weights)
    kept = {"half": names[::2], "none": names[:1], "more": names}[kind]
    extra = (
        {"base_model.model.model.layers.0.self_attn.k_proj.lora_A.weight": torch.zeros(2, 32)} if kind == "more" else {}
    )
    save_file({name: weights[name] for name in kept} | extra, path, metadata={"format": "pt"})
    missing = len(names) - len(kept)
    with pytest.raises(
        ValueError, match=f"{missing} are missing and {len(extra)} are no part of it, such as base_model"
    ):
        load_checkpoint(str(tmp_path / "copy" / "adapter"))


def test_weights_that_are_no_numbers(saved, adapter, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "checkpoint")
    weights = load_file(folder / "model.safetensors")
    weights["model.rating_model.user_embeddings.weight"][1, 1] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"Expected finite weights in .*rating_model.user_embeddings.weight holds NaN"):
        load_checkpoint(str(folder))
    shutil.copytree(adapter, tmp_path / "copy")
    path = tmp_path / "copy" / "adapter" / "adapter_model.safetensors"
    weights = load_file(path)
    weights[min(weights)][0, 0] = float("inf")
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="Expected finite weights"):
        load_checkpoint(str(path.parent))


def test_a_mistyped_folder_is_told_at_once(tmp_path, monkeypatch, capsys):
    """It never goes to the network, whose retries take most of a minute; a Hub id does."""
    asked = []
    monkeypatch.setattr("gavamoe_hf.loading.snapshot_download", lambda name, **_: asked.append(name) or 1 / 0)
    (tmp_path / "outputs" / "quickstart").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for name in (
        "outputs/quickstrat",
        "./quickstart",
        "~/quickstart-not-here",
        "quickstart",
        "a/b/c",
        str(tmp_path / "x"),
    ):
        with pytest.raises(FileNotFoundError, match="there is no folder"):
            load_checkpoint(name)
    with pytest.raises(FileNotFoundError, match=r"Did you mean outputs/quickstart\?"):
        load_checkpoint("outputs/quickstrat")
    assert not asked
    with pytest.raises(FileNotFoundError, match="no folder someone/model here, and the Hub gave no such checkpoint"):
        load_checkpoint("someone/model")
    assert asked == ["someone/model"]
    assert main(["explain", "--model", "outputs/quickstrat", "--user", "a", "--item", "b"]) == 1
    assert "Did you mean outputs/quickstart?" in capsys.readouterr().err
