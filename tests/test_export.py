"""`gavamoe export`: plain Mixtral, Qwen2-MoE and Llama checkpoints that say what the model says, cluster by cluster."""

import json
import logging
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from references import all_pairs, guide_snippets, run_without_package, spread_clusters, tiny_config, tiny_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoProcessor, AutoTokenizer

from gavamoe_hf import GaVaMoEProcessor
from gavamoe_hf.cli.main import main
from gavamoe_hf.export import ExportedRouter, export_standard
from gavamoe_hf.export.standard import choose_architecture
from gavamoe_hf.export.weights import plan_layout

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)

# Options of the model, the format asked for, and the architecture that has to come of it
KINDS = {
    "mixtral": ({}, "auto", "mixtral"),
    "top_1_tied": (
        {"num_experts_per_tok": 1, "tie_word_embeddings": True, "num_key_value_heads": 4},
        "auto",
        "mixtral",
    ),
    "wide_heads": ({"head_dim": 16, "rms_norm_eps": 1e-5}, "mixtral", "mixtral"),
    "spare_rows": ({"vocab_size": 340}, "auto", "mixtral"),
    "shared": ({"shared_expert_intermediate_size": 24}, "auto", "qwen2_moe"),
    "not_rescaled": ({"norm_topk_prob": False}, "auto", "qwen2_moe"),
    "shared_as_mixtral": ({"shared_expert_intermediate_size": 24}, "mixtral", "mixtral"),
    "one_cluster": ({"num_clusters": 1}, "qwen2_moe", "qwen2_moe"),
    "llama3_rope": (
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500.0,
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        },
        "auto",
        "mixtral",
    ),
    "dense": ({"num_local_experts": 0}, "auto", "llama"),
    "no_injection": ({"num_local_experts": 0, "inject_pair_embeddings": False}, "auto", "llama"),
}

# Far from the start of training: experts and gates change what is said, and rounding is larger
SPEAKING_KINDS = {
    "speaking_mixtral": ({"initializer_range": 0.4}, "auto", "mixtral"),
    "speaking_shared": ({"initializer_range": 0.4, "shared_expert_intermediate_size": 24}, "auto", "qwen2_moe"),
}


def make_model(tokenizer, **overrides):
    # At a range of 0.1, logits spread by about 0.5, and float32 keeps six digits of them through two layers
    options = {"vocab_size": len(tokenizer), "initializer_range": 0.1, **overrides}
    model = tiny_model(user_token_id=3, item_token_id=4, **options)
    # Norms differ from channel to channel, as trained ones do
    for name, parameter in model.named_parameters():
        if name.endswith("layernorm.weight") or name == "model.norm.weight":
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return spread_clusters(model).eval()


def make_processor(tokenizer, **options):
    users, items = [f"U{number}" for number in range(8)], [f"I{number}" for number in range(9)]
    features = [["sound", "price"], ["strings"], *[[] for _ in range(7)]]
    return GaVaMoEProcessor(tokenizer, users=users, items=items, item_features=features, **options)


@pytest.fixture(scope="module")
def export(tokenizer, tmp_path_factory):
    """Model, processor and folder of a kind, exported once."""
    done = {}

    def of(kind):
        if kind not in done:
            options, form, _ = (KINDS | SPEAKING_KINDS)[kind]
            model, processor = make_model(tokenizer, **options), make_processor(tokenizer)
            folder = tmp_path_factory.mktemp("exports") / kind
            export_standard(model, processor, folder, format=form)
            done[kind] = model, processor, folder
        return done[kind]

    return of


def kept_tokens(model, processor):
    """Ids of the tokens that may be generated."""
    return [token for token in range(len(processor.tokenizer)) if token not in (3, 4)]


@torch.no_grad()
def logits_of_pairs(model, processor, folder, name, pairs):
    """Of pairs, with an explanation after the prompt: the model's logits, and those of the checkpoint `name`."""
    router = ExportedRouter(folder)
    standard = AutoModelForCausalLM.from_pretrained(folder / name).eval()
    kept = kept_tokens(model, processor)
    own, theirs = [], []
    for user, item in pairs:
        request = router.request(f"U{user}", f"I{item}", rating=2, features=["sound", "cheap"])
        record = processor.encode_record(f"U{user}", f"I{item}", 2, ["sound", "cheap"], "The strings feel cheap!")
        ids = torch.tensor([record["input_ids"]])
        own.append(model(ids, user_id=torch.tensor([user]), item_id=torch.tensor([item])).logits[0][:, kept])
        ids = torch.tensor([request.prompt_token_ids + record["input_ids"][len(request.prompt_token_ids) :]])
        theirs.append(standard(ids).logits[0][:, kept])
    return torch.cat(own), torch.cat(theirs), standard


@pytest.mark.parametrize("kind", KINDS)
def test_logits(export, kind):
    model, processor, folder = export(kind)
    names = sorted(path.name for path in folder.glob("cluster_*"))
    is_dense = model.config.num_local_experts == 0
    assert len(names) == (1 if is_dense else model.config.num_clusters)
    users, items = all_pairs(model.config)
    gates = model.gate_index(users, items)
    for cluster, name in enumerate(names):
        mine = torch.ones_like(gates, dtype=torch.bool) if is_dense else gates == cluster
        pairs = torch.stack([users[mine], items[mine]], dim=1)[::6].tolist()
        assert len(pairs) >= 3
        own, theirs, standard = logits_of_pairs(model, processor, folder, name, pairs)
        assert standard.config.model_type == KINDS[kind][2]
        torch.testing.assert_close(theirs, own, rtol=0, atol=1e-5)
        if len(names) > 1:
            # Another cluster's checkpoint says otherwise: the gates tell
            own, others, _ = logits_of_pairs(model, processor, folder, names[cluster - 1], pairs[:1])
            assert (others - own).abs().max() > 1e-2


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_other_precisions(tokenizer, tmp_path, precision):
    model, processor = make_model(tokenizer), make_processor(tokenizer)
    users, items = all_pairs(model.config)
    pairs = torch.stack([users, items], dim=1)[model.gate_index(users, items) == 0].tolist()
    model.to(precision)
    model.model.rating_model.float()
    export_standard(model, processor, tmp_path / "export")
    own, theirs, standard = logits_of_pairs(model, processor, tmp_path / "export", "cluster_0", pairs)
    assert standard.dtype == precision
    assert (theirs.float() - own.float()).std() < 0.03 * own.float().std()
    assert standard.lm_head.weight.isfinite().all()


def test_layout_by_hand():
    # 4 heads of 8 on 2 key-value heads: a third one brings 2 heads, and 16 channels
    layout = plan_layout(tiny_config(rms_norm_eps=1e-6))
    assert (layout.hidden_size, layout.num_heads, layout.num_kv_heads, layout.head_dim) == (48, 6, 3, 8)
    # Half of 32 * 1e-6 is for 16 squares, each at most 1e-6: the power of two below 1e-3
    assert (layout.added, layout.constant) == (16, 2**-10)
    assert layout.rms_norm_eps == pytest.approx((32e-6 - 16 / 2**20) / 48, rel=1e-12)
    # Heads wider than the hidden size leave room already
    wide = plan_layout(tiny_config(head_dim=16))
    assert (wide.hidden_size, wide.num_heads, wide.num_kv_heads, wide.added) == (64, 4, 2, 32)
    # Narrower ones take as many as it needs: 2 heads of 4 for each key-value head, and 40 is the first above 32
    narrow = plan_layout(tiny_config(head_dim=4))
    assert (narrow.hidden_size, narrow.num_heads, narrow.num_kv_heads) == (40, 10, 5)
    more = plan_layout(tiny_config(), extra_kv_heads=1)
    assert (more.hidden_size, more.num_heads, more.num_kv_heads) == (64, 8, 4)


@pytest.mark.parametrize("scale", [1e-5, 1e-3, 1.0, 100.0])
def test_norms_are_the_same_where_epsilon_matters(export, scale):
    model, _, folder = export("mixtral")
    standard = AutoModelForCausalLM.from_pretrained(folder / "cluster_0")
    hidden = scale * torch.randn(50, 32)
    padded = F.pad(hidden, (0, 16), value=plan_layout(model.config).constant)
    expected = model.model.norm(hidden)
    torch.testing.assert_close(standard.model.norm(padded)[:, :32], expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1000.0, 5000.0])
def test_the_gate_of_the_shared_expert_is_one(export, scale):
    # Up to the massive activations that pretrained models have at some tokens
    model, _, folder = export("shared")
    layer = AutoModelForCausalLM.from_pretrained(folder / "cluster_0").model.layers[0]
    padded = F.pad(scale * torch.randn(200, 32), (0, 16), value=plan_layout(model.config).constant)
    gate = layer.mlp.shared_expert_gate(layer.post_attention_layernorm(padded)).sigmoid()
    assert (gate == 1).all()


def test_extra_heads(tokenizer, tmp_path, export):
    model, processor, _ = export("shared")
    (first, *_) = export_standard(model, processor, tmp_path / "export", extra_kv_heads=1)
    pairs = [(user, item) for user, item in zip(*all_pairs(model.config), strict=True)]
    pairs = [(int(user), int(item)) for user, item in pairs if model.gate_index(int(user), int(item)) == 0][:4]
    own, theirs, standard = logits_of_pairs(model, processor, tmp_path / "export", first.name, pairs)
    assert (standard.config.num_attention_heads, standard.config.num_key_value_heads) == (8, 4)
    torch.testing.assert_close(theirs, own, rtol=0, atol=1e-5)


# Tokens that must not be generated


def barred_and_kept(standard, model, processor):
    kept = torch.tensor(kept_tokens(model, processor))
    barred = torch.ones(standard.config.vocab_size, dtype=torch.bool)
    barred[kept] = False
    return barred, kept


@pytest.fixture(scope="module")
def leaning(tokenizer, tmp_path_factory):
    """A model whose output rows lean to one side, as those of pretrained models do, its export, and that side."""
    model, processor = make_model(tokenizer), make_processor(tokenizer)
    side = torch.randn(32)
    with torch.no_grad():
        model.lm_head.weight += side
    folder = tmp_path_factory.mktemp("leaning") / "export"
    (first, *_) = export_standard(model, processor, folder)
    return model, processor, AutoModelForCausalLM.from_pretrained(first).eval(), side


@torch.no_grad()
@pytest.mark.parametrize("scale", [1e-4, 1.0, 30.0, 1000.0, 1e6])
def test_users_and_items_never_win(leaning, scale):
    model, processor, standard, side = leaning
    barred, kept = barred_and_kept(standard, model, processor)
    # What enters the last norm: anything, and what makes the logit of every real token negative
    hidden = torch.cat([torch.randn(200, 32), -side[None] / model.model.norm.weight]) * scale
    padded = F.pad(hidden, (0, 16), value=plan_layout(model.config).constant)
    logits = standard.lm_head(standard.model.norm(padded))
    assert barred.sum() == 2 + 8 + 9 + 2
    # Rows of zeros would win there
    assert (logits[-1, kept] < 0).all()
    assert (logits[:, barred].amax(dim=-1) < logits[:, kept].mean(dim=-1)).all()
    assert not barred[logits.argmax(dim=-1)].any()
    if scale <= 1000:
        assert logits.softmax(dim=-1)[:, barred].max() == 0
        # So do they at a temperature of 2, and each alone
        drawn = (logits / 2).softmax(dim=-1).multinomial(10_000, replacement=True)
        assert not barred[drawn].any()


def test_sampling_hot(leaning):
    model, processor, standard, _ = leaning
    barred, _ = barred_and_kept(standard, model, processor)
    prompt = torch.tensor([[1, 20, 21]]).expand(50, -1)
    options = {"do_sample": True, "temperature": 100.0, "top_k": 0, "eos_token_id": -1}
    tokens = standard.generate(prompt, max_new_tokens=60, min_new_tokens=60, **options)[:, 3:]
    # Hot enough that nearly every other token comes up
    assert len(tokens.unique()) > 0.9 * len(processor.tokenizer)
    assert not barred[tokens].any()


# Files


def test_weights_are_shared(export):
    _, _, folder = export("mixtral")
    clusters = [folder / f"cluster_{cluster}" for cluster in range(3)]
    for cluster in clusters:
        names = sorted(path.name for path in cluster.glob("*.safetensors"))
        assert names == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
        assert (cluster / names[0]).samefile(clusters[0] / names[0])
        assert (cluster / "tokenizer.json").samefile(clusters[0] / "tokenizer.json")
        # The gates alone, and all that the index names
        gates = load_file(cluster / names[1])
        assert len(gates) == 2 and all(name.endswith("block_sparse_moe.gate.weight") for name in gates)
        index = json.loads((cluster / "model.safetensors.index.json").read_text())
        found = {name: path for path in names for name in load_file(cluster / path)}
        assert index["weight_map"] == found
        tensors = [value for path in names for value in load_file(cluster / path).values()]
        assert index["metadata"]["total_size"] == sum(value.nbytes for value in tensors)
    assert not (clusters[1] / names[1]).samefile(clusters[0] / names[1])


def test_shards(tokenizer, tmp_path, export):
    model, processor, folder = export("shared")
    export_standard(model, processor, tmp_path / "export", max_shard_bytes=100_000)
    assert len(list((tmp_path / "export" / "cluster_1").glob("model-*-of-*.safetensors"))) > 3
    whole = AutoModelForCausalLM.from_pretrained(folder / "cluster_1").state_dict()
    cut = AutoModelForCausalLM.from_pretrained(tmp_path / "export" / "cluster_1").state_dict()
    assert whole.keys() == cut.keys() and all(torch.equal(whole[name], cut[name]) for name in whole)


def test_file_system_without_links(export, tmp_path, monkeypatch, caplog):
    model, processor, folder = export("mixtral")

    def refuse(*arguments):
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    with caplog.at_level(logging.WARNING):
        export_standard(model, processor, tmp_path / "export")
    assert "no hard links: cluster_1 has copies of config.json" in caplog.text
    name = "model-00001-of-00002.safetensors"
    copies = [tmp_path / "export" / f"cluster_{cluster}" / name for cluster in (0, 1)]
    assert not copies[0].samefile(copies[1])
    assert copies[0].read_bytes() == copies[1].read_bytes() == (folder / "cluster_0" / name).read_bytes()


def test_no_other_code_is_asked_for(export, tmp_path):
    model, processor, _ = export("shared")
    # A tokenizer that was loaded remembers whose it was
    processor.save_pretrained(tmp_path / "processor")
    loaded = GaVaMoEProcessor.from_pretrained(tmp_path / "processor")
    (first, *_) = export_standard(model, loaded, tmp_path / "export")
    for name in ("config.json", "tokenizer_config.json"):
        text = (first / name).read_text()
        assert "auto_map" not in text and "GaVaMoE" not in text and "local" not in text.replace("num_local", "")
    # As servers load them; the processor of a folder without one is its tokenizer
    tokenizer = AutoProcessor.from_pretrained(first, trust_remote_code=False)
    assert tokenizer("<user_3>")["input_ids"] == [len(tokenizer) - 19 + 3]


def test_config_names_of_transformers_4(export):
    _, _, folder = export("llama3_rope")
    config = json.loads((folder / "cluster_0" / "config.json").read_text())
    assert config["rope_theta"] == 500.0 and config["rope_scaling"]["rope_type"] == "llama3"
    assert config["torch_dtype"] == "float32" and config["tie_word_embeddings"] is False
    assert config["head_dim"] * config["num_attention_heads"] == config["hidden_size"]
    settings = json.loads((folder / "cluster_0" / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert settings["additional_special_tokens"] == ["<|user_embedding|>", "<|item_embedding|>"]


def test_a_failure_leaves_nothing(export, tmp_path, monkeypatch):
    model, processor, _ = export("mixtral")
    monkeypatch.setattr("gavamoe_hf.export.standard._write_router", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export_standard(model, processor, tmp_path / "export")
    assert list(tmp_path.iterdir()) == []


def test_the_model_is_left_as_it_was(tokenizer, tmp_path):
    model, processor = make_model(tokenizer), make_processor(tokenizer)
    before, length = {name: value.clone() for name, value in model.state_dict().items()}, len(tokenizer)
    export_standard(model, processor, tmp_path / "export")
    assert len(tokenizer) == len(processor.tokenizer) == length
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


# Tokens and requests


def test_tokens(export):
    model, processor, folder = export("mixtral")
    tokenizer = AutoTokenizer.from_pretrained(folder / "cluster_1")
    first = len(processor.tokenizer)
    assert len(tokenizer) == first + 8 + 1 + 9 + 1
    names = ["<user_0>", "<user_7>", "<user_population>", "<item_0>", "<item_8>", "<item_population>"]
    ids = [first, first + 7, first + 8, first + 9, first + 17, first + 18]
    assert tokenizer.convert_tokens_to_ids(names) == ids
    # One token each, blanks around them kept; left out of a text without special tokens
    text = "a <user_7>  b<item_0>."
    assert [token for token in tokenizer(text)["input_ids"] if token >= first] == [ids[1], ids[3]]
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == "a   b."
    # No one else's text changes
    other = "The sound of <user_8> and <item_x> is great, < user_7>"
    assert tokenizer(other)["input_ids"] == processor.tokenizer(other)["input_ids"]
    # The rows are the projected embeddings
    standard = AutoModelForCausalLM.from_pretrained(folder / "cluster_1")
    rows = standard.get_input_embeddings().weight[ids, :32]
    rating_model = model.rating_model
    expected = [model.model.user_projection(rating_model.user_embeddings.weight[index]) for index in (0, 7)]
    expected += [model.model.user_projection(rating_model.population_user)]
    expected += [model.model.item_projection(rating_model.item_embeddings.weight[index]) for index in (0, 8)]
    expected += [model.model.item_projection(rating_model.population_item)]
    torch.testing.assert_close(rows, torch.stack(expected))


@pytest.mark.parametrize("template", [None, CHAT_TEMPLATE])
def test_requests(tokenizer, tmp_path, template):
    model, processor = make_model(tokenizer), make_processor(tokenizer, chat_template=template)
    model.config.stored_prompts = processor.stored_prompts()
    export_standard(model, processor, tmp_path / "export")
    router = ExportedRouter(tmp_path / "export")
    served = AutoTokenizer.from_pretrained(tmp_path / "export" / "cluster_0")
    users, items = [*range(8), -1], [*range(9), -1]
    sentiments = set()
    for user in users:
        for item in items:
            raw_user, raw_item = None if user < 0 else f"U{user}", None if item < 0 else f"I{item}"
            request = router.request(raw_user, raw_item)
            assert request.model == f"cluster_{model.gate_index(user, item).item()}" == f"cluster_{request.cluster}"
            predicted = model.predict_rating(user, item).item()
            assert request.predicted_rating == pytest.approx(predicted, abs=1e-5)
            sentiment = "positive" if predicted >= model.config.positive_rating_threshold else "negative"
            sentiments.add(sentiment)
            assert f"has a {sentiment} experience" in request.prompt
            names = f"<item_{'population' if item < 0 else item}>", f"<user_{'population' if user < 0 else user}>"
            assert request.prompt.count(names[0]) == request.prompt.count(names[1]) == 1
            # Token by token what the model reads, but for the placeholders
            own = processor.encode_prompt(sentiment, request.features)
            ids = dict(zip((4, 3), served.convert_tokens_to_ids(list(names)), strict=True))
            assert request.prompt_token_ids == [ids.get(token, token) for token in own]
            assert served(request.prompt, add_special_tokens=False)["input_ids"] == request.prompt_token_ids
            if template is None:
                assert request.messages is None
            else:
                chat = served.apply_chat_template(request.messages, add_generation_prompt=True, return_dict=False)
                assert chat == request.prompt_token_ids
    assert sentiments == {"positive", "negative"}
    assert router.request("U1", "I0").features == ["sound"]
    assert "has a negative" in router.request("U1", "I0", rating=1, features=[]).prompt
    with pytest.raises(ValueError, match="'nobody' is not among the 8 known users"):
        router.request("nobody", "I0")


@pytest.mark.parametrize("text", ["<user_3>", "<|item_embedding|>", "great<|end_of_text|>", "<item_population> x"])
def test_features_never_become_special_tokens(export, text):
    _, processor, folder = export("mixtral")
    request = ExportedRouter(folder).request("U1", "I0", rating=5, features=[text])
    special = {*processor.tokenizer.all_special_ids, *range(len(processor.tokenizer), 1000)}
    # The pair's own two, and the beginning
    assert sum(token in special for token in request.prompt_token_ids) == 3
    # There is no text that says this
    assert request.prompt is None and request.messages is None


def test_long_features_are_cut(tokenizer, tmp_path):
    model, processor = make_model(tokenizer), make_processor(tokenizer, max_feature_tokens=2)
    export_standard(model, processor, tmp_path / "export")
    request = ExportedRouter(tmp_path / "export").request("U1", "I0", features=["strings strings price"])
    assert " strings strings features" in request.prompt


def test_table_of_all_pairs(export):
    model, _, folder = export("mixtral")
    table = load_file(folder / "router.safetensors")
    threshold = model.config.positive_rating_threshold
    for user in [*range(8), -1]:
        for item in [*range(9), -1]:
            assert table["cluster"][user, item] == model.gate_index(user, item)
            assert table["positive"][user, item] == (model.predict_rating(user, item) >= threshold)
    assert table["cluster"].shape == (9, 10) and table["cluster"].unique().tolist() == [0, 1, 2]


def test_table_is_left_out_where_it_would_be_large(export, tmp_path, caplog):
    model, processor, folder = export("mixtral")
    with caplog.at_level(logging.WARNING):
        export_standard(model, processor, tmp_path / "export", max_table_pairs=89)
    assert "8 users and 9 items make too many pairs" in caplog.text
    assert not (tmp_path / "export" / "router.safetensors").exists()
    assert "`router.safetensors`" not in (tmp_path / "export" / "README.md").read_text()
    assert "`router.safetensors`" in (folder / "README.md").read_text()
    assert ExportedRouter(tmp_path / "export").request("U1", "I0").model.startswith("cluster_")


def test_readme_names_what_llama_cpp_cannot(export):
    assert "llama.cpp (tried" in (export("shared")[2] / "README.md").read_text()
    assert "llama.cpp (tried" not in (export("not_rescaled")[2] / "README.md").read_text()
    assert "llama.cpp (tried" not in (export("shared_as_mixtral")[2] / "README.md").read_text()


# In other processes

_GENERATE = """
import json
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, prompts = sys.argv[1], json.loads(sys.argv[2])
texts = []
for name, prompt in prompts:
    model = AutoModelForCausalLM.from_pretrained(f"{folder}/{name}")
    tokenizer = AutoTokenizer.from_pretrained(f"{folder}/{name}")
    inputs = tokenizer(prompt, return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    texts.append([model.config.model_type, tokens[0, inputs["input_ids"].shape[1] :].tolist()])
print(json.dumps(texts))
"""


def one_of_each_cluster(model, folder):
    """A request and its raw ids for each cluster."""
    router, chosen = ExportedRouter(folder), {}
    for user, item in zip(*all_pairs(model.config), strict=True):
        request = router.request(f"U{user}", f"I{item}")
        chosen.setdefault(request.model, (f"U{user}", f"I{item}", request))
    assert len(chosen) == 3
    return sorted(chosen.items())


def greedy_tokens(model, processor, user, item):
    batch = processor(user=user, item=item)
    tokens = model.generate(**batch, max_new_tokens=12, do_sample=False)
    return tokens[0, batch["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("kind", SPEAKING_KINDS)
def test_greedy_tokens_in_a_process_without_the_package(export, tmp_path, kind):
    model, processor, folder = export(kind)
    chosen = one_of_each_cluster(model, folder)
    prompts = json.dumps([[name, request.prompt] for name, (_, _, request) in chosen])
    output = run_without_package(_GENERATE, folder, prompts, modules=tmp_path, cwd=tmp_path)
    own = [[SPEAKING_KINDS[kind][2], greedy_tokens(model, processor, user, item)] for _, (user, item, _) in chosen]
    assert json.loads(output.splitlines()[-1]) == own
    assert len({str(tokens) for _, tokens in own}) == 3


_SERVING = [name for name in ("fastapi", "uvicorn", "openai") if find_spec(name) is None]


def bash_of_the_guide(start):
    """The one command of docs/serving.md that starts so, with this interpreter's transformers."""
    text = (Path(__file__).resolve().parent.parent / "docs" / "serving.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    (command,) = [block.strip() for block in blocks if block.startswith(start)]
    return command.replace("transformers serve", f"exec {sys.executable} -m transformers.cli.transformers serve")


@pytest.fixture
def server(export, tmp_path):
    """Port of the guide's `transformers serve` in a process of its own, with an export as `outputs/served`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs" / "served").symlink_to(export("speaking_shared")[2])
    command = f"{bash_of_the_guide('cd outputs/served')} --port {port} --device cpu"
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(["bash", "-c", command], stdout=log, stderr=subprocess.STDOUT, cwd=tmp_path)
    try:
        for _ in range(180):
            assert process.poll() is None, (tmp_path / "log").read_text()
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            except (urllib.error.URLError, TimeoutError):
                time.sleep(1)
        yield port
    finally:
        process.terminate()
        process.wait(timeout=60)


@pytest.mark.slow
@pytest.mark.skipif(bool(_SERVING), reason=f"transformers serve needs {', '.join(_SERVING)}")
@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not on this machine")
def test_served_over_http_as_the_guide_says(export, server, tmp_path, monkeypatch):
    model, processor, folder = export("speaking_shared")
    monkeypatch.chdir(tmp_path)
    ask = bash_of_the_guide("curl").replace("localhost:8000", f"127.0.0.1:{server}")
    (body,) = [snippet for snippet in guide_snippets("serving.md") if "request.json" in snippet]
    for _, (user, item, _) in one_of_each_cluster(model, folder):
        exec(body.replace("user_003", user).replace("item_005", item).replace("40", "12"), {})
        answer = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, timeout=120, check=True).stdout
        text = json.loads(answer)["choices"][0]["text"]
        assert text == processor.decode(greedy_tokens(model, processor, user, item), skip_special_tokens=True)


# Refusals and the command line


def test_refusals(tokenizer, export, tmp_path):
    _, processor, _ = export("mixtral")
    with pytest.raises(ValueError, match=r"`format` among auto, mixtral, qwen2_moe, but got 'gpt2'"):
        export_standard(export("mixtral")[0], processor, tmp_path / "export", format="gpt2")
    for form in ("mixtral", "qwen2_moe"):
        with pytest.raises(ValueError, match=r'format="auto" for a model with dense layers, a Llama'):
            choose_architecture(export("dense")[0].config, form)
    with pytest.raises(ValueError, match=r"weights sum to one .* Export it with format=\"qwen2_moe\""):
        choose_architecture(export("not_rescaled")[0].config, "mixtral")
    for name in ("attention_bias", "mlp_bias"):
        with pytest.raises(ValueError, match=rf"a model without biases.*{name}=True"):
            plan_layout(tiny_config(**{name: True}))
    with pytest.raises(ValueError, match=r"a positive `rms_norm_eps`, which the export needs, but got 0\.0"):
        plan_layout(tiny_config(rms_norm_eps=0.0))
    with pytest.raises(ValueError, match=r"`extra_kv_heads` of 0 or more, but got -1"):
        plan_layout(tiny_config(), extra_kv_heads=-1)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("x")
    with pytest.raises(FileExistsError, match=r"a new or empty folder, but .*full exists\. Name another"):
        export_standard(export("mixtral")[0], processor, tmp_path / "full")
    with pytest.raises(FileNotFoundError, match=r"full has no router\.json\. Write one with `gavamoe export`"):
        ExportedRouter(tmp_path / "full")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]


def test_a_vocabulary_with_such_tokens(tmp_path, export):
    model, _, folder = export("mixtral")
    extended = make_processor(AutoTokenizer.from_pretrained(folder / "cluster_0"))
    with pytest.raises(ValueError, match=r"a vocabulary without tokens of users and items, but it has '<item_0>'"):
        export_standard(model, extended, tmp_path / "export")


def test_command_line(export, tmp_path, capsys):
    model, processor, _ = export("mixtral")
    model.save_pretrained(tmp_path / "checkpoint")
    processor.save_pretrained(tmp_path / "checkpoint")
    command = ["export", "--model", str(tmp_path / "checkpoint"), "--output_dir", str(tmp_path / "out" / "export")]
    assert main([*command, "--format", "qwen2_moe", "--dtype", "bfloat16"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == [str(tmp_path / "out" / "export" / f"cluster_{cluster}") for cluster in range(3)]
    assert "README.md" in lines[3]
    standard = AutoModelForCausalLM.from_pretrained(lines[0])
    assert standard.config.model_type == "qwen2_moe" and standard.dtype == torch.bfloat16
    assert main(command) == 1
    assert "FileExistsError: Expected a new or empty folder" in capsys.readouterr().err
