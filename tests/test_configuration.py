"""GaVaMoEConfig: what it refuses, what it defaults to, what survives a file."""

import json

import pytest
from huggingface_hub.errors import StrictDataclassError
from references import tiny_config

from gavamoe_hf import GaVaMoEConfig

REFUSALS = [
    ({"vae_num_layers": 1001}, "`vae_num_layers` must be at most 1000"),
    ({"num_hidden_layers": 10**400}, "`num_hidden_layers` must be at most 1000"),
    ({"format_version": 2}, r"format version 2, but this package reads up to 1\. Install a newer"),
    *[
        ({name: 0}, rf"`{name}` must be at least 1, got 0")
        for name in (
            "num_users",
            "num_items",
            "num_clusters",
            "latent_size",
            "vae_embedding_size",
            "vae_num_layers",
            "vae_intermediate_size",
            "vae_decoder_hidden_size",
        )
    ],
    ({"vae_num_heads": 3}, r"`vae_num_heads` must divide `vae_embedding_size` \(16\), got 3"),
    ({"vae_num_heads": 0}, r"`vae_num_heads` must divide `vae_embedding_size` \(16\), got 0"),
    ({"vae_dropout": 1.0}, r"`vae_dropout` must be in \[0, 1\), got 1\.0"),
    ({"vae_id_dropout": -0.1}, r"`vae_id_dropout` must be in \[0, 1\), got -0\.1"),
    ({"rating_likelihood": "normal"}, r'must be "categorical" or "bernoulli", got "normal"'),
    ({"rating_levels": [3]}, r"at least two finite, ascending numbers .*got \[3\.0\]"),
    ({"rating_levels": []}, r"at least two finite, ascending numbers .*got \[\]"),
    ({"rating_levels": [1, 3, 2]}, r"at least two finite, ascending numbers .*got \[1\.0, 3\.0, 2\.0\]"),
    ({"rating_levels": [1, 1, 2]}, r"at least two finite, ascending numbers"),
    ({"rating_levels": [1.0, float("nan")]}, r"at least two finite, ascending numbers"),
    ({"rating_levels": [1.0, float("inf")]}, r"at least two finite, ascending numbers"),
    ({"alpha": 1.5}, r"`alpha` must be in \[0, 1\], got 1\.5"),
    ({"alpha": float("nan")}, r"`alpha` must be in \[0, 1\], got nan"),
    ({"beta": -1}, r"`beta` must not be negative, got -1"),
    ({"num_local_experts": -1}, r"`num_local_experts` must be 0 \(dense layers\) or more, got -1"),
    ({"shared_expert_intermediate_size": -1}, r"`shared_expert_intermediate_size` must be 0 \(none\) or more"),
    ({"num_experts_per_tok": 5}, r"between 1 and `num_local_experts` \(4\), got 5"),
    ({"num_experts_per_tok": 0}, r"between 1 and `num_local_experts` \(4\), got 0"),
    ({"moe_intermediate_size": 0}, r"`moe_intermediate_size` must be at least 1, got 0"),
    ({"user_token_id": 64}, r"`user_token_id` must be inside the vocabulary, 0 to 63, got 64"),
    ({"item_token_id": -1}, r"`item_token_id` must be inside the vocabulary, 0 to 63, got -1"),
    ({"item_token_id": 3}, r"`user_token_id` and `item_token_id` must differ, got 3 for both"),
    ({"stored_prompts": {"positive": [1]}}, r'under "positive" and "negative", got the keys \[\'positive\'\]'),
]


@pytest.mark.parametrize(("values", "message"), REFUSALS, ids=lambda value: str(value)[:40])
def test_refuses_what_cannot_work(values, message):
    with pytest.raises(StrictDataclassError, match=message):
        tiny_config(**values)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_users", "3"),
        ("num_users", 2.0),
        ("num_users", True),
        ("alpha", "0.1"),
        ("norm_topk_prob", "yes"),
        ("rating_levels", None),
        ("rating_levels", ["1", "2"]),
        ("stored_prompts", [1, 2]),
        ("num_local_experts", "4"),
        # Through the alias too
        ("num_experts", "4"),
        ("num_experts", 4.0),
    ],
)
def test_types_are_strict(name, value):
    field = "num_local_experts" if name == "num_experts" else name
    with pytest.raises(StrictDataclassError, match=f"'{field}'"):
        tiny_config(**{name: value})


def test_assignment_is_strict_too():
    config = tiny_config()
    with pytest.raises(StrictDataclassError, match="'num_clusters' expected int, got str"):
        config.num_clusters = "3"


def test_defaults_are_the_documented_ones():
    config = GaVaMoEConfig()
    assert config.model_type == "gavamoe"
    assert (config.vae_embedding_size, config.latent_size, config.num_clusters) == (768, 128, 3)
    assert (config.num_local_experts, config.num_experts_per_tok, config.moe_intermediate_size) == (12, 2, 1280)
    assert (config.alpha, config.beta, config.norm_topk_prob) == (0.1, 0.01, True)
    assert config.rating_levels == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert config.positive_rating_threshold == 3.0


@pytest.mark.parametrize(
    ("levels", "given", "expected"),
    # The middle of the scale: (0 + 10) / 2 and (0.5 + 5) / 2
    [([0, 10], None, 5.0), ([0.5, 2, 5], None, 2.75), ((1, 2), None, 1.5), ([1, 2, 3, 4, 5], 4, 4)],
)
def test_positive_rating_threshold(levels, given, expected):
    config = tiny_config(rating_levels=levels, positive_rating_threshold=given)
    assert config.positive_rating_threshold == expected
    assert config.rating_levels == [float(level) for level in levels]
    assert all(type(level) is float for level in config.rating_levels)


def test_num_experts_is_another_name():
    config = tiny_config(num_experts=7)
    assert config.num_local_experts == config.num_experts == 7
    config.num_experts = 5
    assert config.num_local_experts == 5
    saved = json.loads(config.to_json_string())
    assert saved["num_local_experts"] == 5 and "num_experts" not in saved


def test_dense_layers_need_no_experts():
    config = tiny_config(num_local_experts=0, num_experts_per_tok=2, moe_intermediate_size=0)
    assert config.num_experts == 0


def test_json_round_trip(tmp_path):
    config = tiny_config(rating_levels=(0.5, 1, 2.5), rating_likelihood="bernoulli", num_experts=6, alpha=0, beta=2)
    config.save_pretrained(tmp_path)
    loaded = GaVaMoEConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == {**config.to_dict(), "transformers_version": loaded.transformers_version}
    assert loaded.rating_levels == [0.5, 1.0, 2.5]
    assert loaded.stored_prompts == config.stored_prompts
    # What a file says is checked like what a caller says
    (tmp_path / "config.json").write_text(json.dumps({**config.to_dict(), "num_clusters": 0}))
    with pytest.raises(StrictDataclassError, match="`num_clusters` must be at least 1"):
        GaVaMoEConfig.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config.to_dict(), "format_version": 99}))
    with pytest.raises(ValueError, match="format version 99"):
        GaVaMoEConfig.from_pretrained(tmp_path)
