"""A checkpoint is self-contained: a fresh process that cannot import the package loads and uses it all the same."""

import json

import pytest
import torch
from references import random_prompts, run_without_package, spread_clusters, tiny_model

from gavamoe_hf import GaVaMoEProcessor

# Run elsewhere, with the folder as its argument. Prints what it has checked at the end.
SCRIPT = r"""
try:
    import gavamoe_hf
except ImportError as error:
    assert "blocked" in str(error)
else:
    raise AssertionError("the package can be imported")

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoProcessor

torch.set_num_threads(1)
folder = pathlib.Path(sys.argv[1])
saved = torch.load(folder / "saved.pt", weights_only=True)

def check(path):
    config = AutoConfig.from_pretrained(path, trust_remote_code=True)
    assert type(config).__name__ == "GaVaMoEConfig" and config.num_users == 8
    processor = AutoProcessor.from_pretrained(path, trust_remote_code=True)
    for loader in (AutoModel, AutoModelForCausalLM):
        model = loader.from_pretrained(path, trust_remote_code=True)
        assert type(model).__name__ == "GaVaMoEForCausalLM" and not model.training
        assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
        state = model.state_dict()
        assert state.keys() == saved["state"].keys()
        assert any("user_embeddings" in name for name in state) and any("item_embeddings" in name for name in state)
        for name, value in saved["state"].items():
            assert state[name].dtype == value.dtype and torch.equal(state[name], value), name
        with torch.no_grad():
            output = model(**saved["inputs"])
        assert torch.equal(output.logits, saved["logits"])
        assert torch.equal(output.elbo_loss, saved["elbo"])
        assert torch.equal(output.gate_index, saved["gates"])
        tokens = model.generate(user_id=3, item_id=5, do_sample=False, max_new_tokens=6)
        assert torch.equal(tokens, saved["tokens"])
        model.set_experts_implementation("eager")
    inputs = processor(user="U3", item="I5", rating=4, features=["sound"])
    assert all(torch.equal(inputs[name], value) for name, value in saved["processed"].items())
    tokens = model.generate(**inputs, do_sample=False, max_new_tokens=6)
    text = processor.batch_decode(tokens[:, inputs["input_ids"].shape[1]:], skip_special_tokens=True)
    assert [e.explanation for e in model.explain(processor, "U3", "I5", 4, ["sound"], do_sample=False,
                                                 max_new_tokens=6)] == [text[0].strip()]
    return model, processor

model, processor = check(folder / "checkpoint")
model.save_pretrained(folder / "again")
processor.save_pretrained(folder / "again")
# By name, as a new process would: the modules of the second folder are another copy
again, _ = check(folder / "again")
assert type(again) is not type(model)
assert "gavamoe_hf" not in sys.modules
print("ALL CHECKED")
"""


@pytest.fixture(scope="module")
def saved(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("remote")
    model = tiny_model(vocab_size=len(tokenizer), user_token_id=3, item_token_id=4, shared_expert_intermediate_size=8)
    spread_clusters(model.eval())
    processor = GaVaMoEProcessor(tokenizer, users=[f"U{n}" for n in range(8)], items=[f"I{n}" for n in range(9)])
    assert (processor.user_token_id, processor.item_token_id) == (3, 4)
    model.config.stored_prompts = processor.stored_prompts()
    model.save_pretrained(folder / "checkpoint")
    processor.save_pretrained(folder / "checkpoint")
    input_ids, mask = random_prompts([9, 7, 5, 6])
    inputs = {
        "input_ids": input_ids,
        "attention_mask": mask,
        "user_id": torch.tensor([0, 3, 7, -1]),
        "item_id": torch.tensor([1, 5, 8, -1]),
        "rating": torch.tensor([1.0, 5.0, 3.0, 4.0]),
    }
    with torch.no_grad():
        output = model(**inputs)
    torch.save(
        {
            "state": dict(model.state_dict()),
            "inputs": inputs,
            "logits": output.logits,
            "elbo": output.elbo_loss,
            "gates": output.gate_index,
            "tokens": model.generate(user_id=3, item_id=5, do_sample=False, max_new_tokens=6),
            "processed": dict(processor(user="U3", item="I5", rating=4, features=["sound"])),
        },
        folder / "saved.pt",
    )
    return folder


def test_files_of_a_checkpoint(saved):
    files = {path.name for path in (saved / "checkpoint").iterdir()}
    assert files >= {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "processor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "configuration_gavamoe.py",
        "fold_in_gavamoe.py",
        "generation_gavamoe.py",
        "modeling_gavamoe.py",
        "pipeline_gavamoe.py",
        "vae_gmm_gavamoe.py",
        "processing_gavamoe.py",
        "recommendation_gavamoe.py",
        "upcycling_gavamoe.py",
    }
    config = json.loads((saved / "checkpoint" / "config.json").read_text())
    assert config["auto_map"] == {
        "AutoConfig": "configuration_gavamoe.GaVaMoEConfig",
        "AutoModel": "modeling_gavamoe.GaVaMoEForCausalLM",
        "AutoModelForCausalLM": "modeling_gavamoe.GaVaMoEForCausalLM",
    }
    assert config["architectures"] == ["GaVaMoEForCausalLM"]
    assert list(config["custom_pipelines"]) == ["explainable-recommendation"]
    processor = json.loads((saved / "checkpoint" / "processor_config.json").read_text())
    assert processor["auto_map"] == {"AutoProcessor": "processing_gavamoe.GaVaMoEProcessor"}
    assert processor["users"][3] == "U3"


def test_loads_without_the_package(saved, tmp_path):
    output = run_without_package(SCRIPT, saved, modules=tmp_path, cwd=tmp_path)
    assert output.strip().endswith("ALL CHECKED")
