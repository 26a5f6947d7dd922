"""The presets have the sizes of the published models, counted by hand, and the recipes are what the command takes."""

import re
from pathlib import Path

import pytest
import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from gavamoe_hf import GaVaMoEConfig, GaVaMoEForCausalLM
from gavamoe_hf.cli import train
from gavamoe_hf.presets import llama_3_1_8b, llama_3_1_8b_paper
from gavamoe_hf.training.dry_run import memory_estimate
from gavamoe_hf.training.lora import EXPERT_PARAMETERS, lora_config, untrained_model
from gavamoe_hf.upcycling_gavamoe import count_parameters

RECIPES = Path(__file__).parents[1] / "examples" / "recipes"

# The paper's TripAdvisor
USERS, ITEMS = 9765, 6280

# Of Llama-3.1-8B: 128,256 tokens and two placeholders, embedded and scored
EMBEDDINGS = 2 * 128258 * 4096
# Queries and outputs are 4096 wide, keys and values have 8 of 32 heads
ATTENTION = 2 * 4096 * 4096 + 2 * 4096 * 1024
NORMS = 2 * 4096
PROJECTIONS = 2 * (768 * 4096 + 4096)


def rating_parameters(num_outputs: int, num_clusters: int) -> int:
    # Rows of users and items, and one population for each
    tables = (USERS + ITEMS + 2) * 768
    # Query, key, value and output of the attention, each with its bias; a feed-forward layer twice as wide; two norms
    layer = 4 * (768 * 768 + 768) + (768 * 1536 + 1536) + (1536 * 768 + 768) + 2 * 2 * 768
    # Mean and log variance from user, item and their product
    heads = 2 * (3 * 768 * 128 + 128)
    decoder = (128 * 256 + 256) + (256 * num_outputs + num_outputs)
    # Weight, mean and log variance of each component
    mixture = num_clusters * (1 + 2 * 128)
    return tables + 2 * layer + heads + decoder + mixture


def on_meta(config: GaVaMoEConfig) -> GaVaMoEForCausalLM:
    with torch.device("meta"):
        return GaVaMoEForCausalLM(config)


def total(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("num_clusters", [3, 5])
def test_the_papers_sizes(num_clusters):
    model = on_meta(llama_3_1_8b_paper(USERS, ITEMS, num_clusters))
    # 12 experts of gate, up and down; the gates of all clusters
    experts, gates = 12 * 3 * 4096 * 1280, num_clusters * 12 * 4096
    layer = model.model.layers[31]
    assert len(model.model.layers) == 32
    assert total(layer.self_attn) == ATTENTION == 41_943_040
    assert total(layer.mlp.experts) == experts == 188_743_680
    assert total(layer.mlp.gate) == gates
    assert total(layer.mlp) == experts + gates
    rating = rating_parameters(1, num_clusters)
    assert total(model.rating_model) == rating
    whole = EMBEDDINGS + 32 * (ATTENTION + NORMS + experts + gates) + 4096 + PROJECTIONS + rating
    assert 8.4e9 < whole < 8.5e9
    # 2 of 12 experts and one gate
    active = EMBEDDINGS + 32 * (ATTENTION + NORMS + experts // 6 + 12 * 4096) + 4096 + PROJECTIONS
    assert count_parameters(model) == {"total": whole, "active": active, "trainable": whole, "new": whole}


def test_the_recommended_sizes():
    model = on_meta(llama_3_1_8b(USERS, ITEMS))
    shared, experts, gates = 3 * 4096 * 14336, 12 * 3 * 4096 * 256, 3 * 12 * 4096
    llama = 2 * 128256 * 4096 + 32 * (ATTENTION + NORMS + shared) + 4096
    # The published count of Llama-3.1-8B
    assert llama == 8_030_261_248
    added = 2 * 2 * 4096 + 32 * (experts + gates) + PROJECTIONS + rating_parameters(5, 3)
    assert count_parameters(model, llama) == {
        "total": llama + added,
        "active": llama + 2 * 2 * 4096 + 32 * (experts // 6 + 12 * 4096) + PROJECTIONS,
        "trainable": llama + added,
        "new": added,
    }
    assert total(model.model.layers[0].mlp.shared_expert) == shared


def test_settings():
    for preset in (llama_3_1_8b, llama_3_1_8b_paper):
        config = preset(10, 20)
        assert (config.vocab_size, config.user_token_id, config.item_token_id) == (128258, 128256, 128257)
        assert (config.head_dim, config.tie_word_embeddings, config.dtype) == (128, False, torch.bfloat16)
        # Long waves are 8 times slower, short ones as they were
        plain = 500000.0 ** -(torch.arange(0, 128, 2) / 128)
        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config)
        torch.testing.assert_close(scaled[-1], plain[-1] / 8)
        torch.testing.assert_close(scaled[0], plain[0])
        # Each call has its own
        config.rope_parameters["factor"] = 2.0
        config.eos_token_id.clear()
        again = preset(10, 20, alpha=0.3, rms_norm_eps=1e-6)
        assert again.rope_parameters["factor"] == 8.0 and again.eos_token_id == [128001, 128008, 128009]
        assert (again.alpha, again.rms_norm_eps, config.rms_norm_eps) == (0.3, 1e-6, 1e-5)
    assert (config.norm_topk_prob, config.rating_likelihood, config.beta) == (False, "bernoulli", 0.1)
    assert config.shared_expert_intermediate_size == config.router_aux_loss_coef == config.vae_id_dropout == 0


@pytest.fixture
def parse(monkeypatch):
    """What the command makes of a recipe, instead of training."""

    def parse(path, *options):
        parsed = []
        monkeypatch.setattr(
            "gavamoe_hf.training.pipeline.run_training", lambda *arguments: parsed.extend(arguments) or {"score": 0.0}
        )
        train.run(["--config", str(path), "--dataset", "d", "--output_dir", "o", "--use_cpu", "true", *options])
        return parsed

    return parse


def test_recipes_are_understood(parse, tmp_path):
    names = sorted(path.name for path in RECIPES.iterdir())
    assert names == ["llama-3.1-8b-paper.yaml", "llama-3.1-8b.yaml", "smollm2-135m.yaml"]
    for name in names:
        _, model_args, *_ = parse(RECIPES / name, "--base_model", "path/to/base")
        assert model_args.base_model == "path/to/base"
    unknown = tmp_path / "recipe.yaml"
    unknown.write_text((RECIPES / names[0]).read_text() + "\nexpert_width: 3\n")
    with pytest.raises(ValueError, match=r"recipe\.yaml: unknown option 'expert_width'\. Did you mean --expert_init\?"):
        parse(unknown)


def test_the_papers_recipe(parse):
    _, model_args, rating_args, sft_args, lora_args = parse(RECIPES / "llama-3.1-8b-paper.yaml")
    config = llama_3_1_8b_paper(10, 20)
    assert int(model_args.num_clusters) == config.num_clusters
    for name in (
        "num_experts",
        "num_experts_per_tok",
        "moe_intermediate_size",
        "shared_expert_intermediate_size",
        "norm_topk_prob",
        "rating_likelihood",
        "vae_embedding_size",
        "vae_id_dropout",
        "latent_size",
    ):
        assert getattr(model_args, name) == getattr(config, name), name
    assert model_args.expert_init == "random"
    assert (sft_args.alpha, sft_args.beta, sft_args.router_aux_loss_coef) == (config.alpha, config.beta, 0.0)
    expected = {
        "learning_rate": 3e-5,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 8,
        "max_grad_norm": 0.3,
        "num_train_epochs": 3,
        "bf16": True,
        "max_length": 180,
    }
    assert {name: getattr(sft_args, name) for name in expected} == expected
    expected = {
        "rating_per_device_train_batch_size": 4096,
        "rating_elbo_learning_rate": 1e-5,
        "rating_autoencoder_learning_rates": [1e-5],
        "rating_num_train_epochs": 30,
        "rating_cluster_weight": 0.0,
    }
    assert {name: getattr(rating_args, name) for name in expected} == expected
    adapters = lora_config(lora_args, sft_args, config)
    assert (adapters.r, adapters.lora_alpha, adapters.lora_dropout) == (8, 16, 0.1)
    assert set(adapters.target_modules) == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert adapters.target_parameters is None and "mlp.experts" in adapters.modules_to_save


def test_the_recommended_recipe(parse):
    _, model_args, _, sft_args, lora_args = parse(RECIPES / "llama-3.1-8b.yaml")
    config = llama_3_1_8b(10, 20)
    assert model_args.expert_init == "residual"
    for name in ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob", "rating_likelihood"):
        assert getattr(model_args, name) == getattr(config, name), name
    for base_size in ("vae_embedding_size", "latent_size"):
        assert getattr(model_args, base_size) is None
    assert (config.vae_embedding_size, config.latent_size) == (768, 128)
    adapters = lora_config(lora_args, sft_args, config)
    assert set(adapters.target_parameters) == set(EXPERT_PARAMETERS) and "mlp.gate" in adapters.modules_to_save


@pytest.mark.parametrize(
    ("name", "preset", "options"),
    [
        ("llama-3.1-8b-paper.yaml", llama_3_1_8b_paper, ()),
        ("llama-3.1-8b.yaml", llama_3_1_8b, ()),
        ("llama-3.1-8b.yaml", llama_3_1_8b, ("--load_in_4bit",)),
    ],
)
def test_recipes_say_what_a_step_takes(parse, name, preset, options):
    _, _, _, sft_args, lora_args = parse(RECIPES / name, *options)
    config = preset(9765, 6280)
    model = untrained_model(config, config.dtype, sft_args, lora_config(lora_args, sft_args, config))
    memory = memory_estimate(model, config, sft_args, 180, 80, lora_args.load_in_4bit)
    stated = re.search(
        r"(\d+) GB instead" if options else r"A step is estimated at (\d+) GB", (RECIPES / name).read_text()
    )
    assert sum(memory.values()) / 2**30 == pytest.approx(int(stated[1]), abs=0.5)
