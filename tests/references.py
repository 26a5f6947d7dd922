"""Tiny models and naive references: loops that follow the equations, one pair, token and expert at a time."""

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor

from gavamoe_hf import GaVaMoEConfig, GaVaMoEForCausalLM, GaVaMoEProcessor, GaVaMoERatingModel
from gavamoe_hf.data import SyntheticConfig, generate_synthetic
from gavamoe_hf.training.building import ModelArguments, build_model, build_processor
from gavamoe_hf.training.sft_config import GaVaMoESFTConfig
from gavamoe_hf.training.sft_trainer import GaVaMoESFTTrainer
from gavamoe_hf.training.tokenizer import train_tokenizer

# Real reviews, which tests use where they are
MUSICAL_INSTRUMENTS = Path(
    os.environ.get(
        "GAVAMOE_MUSICAL_INSTRUMENTS", Path(__file__).resolve().parents[2] / "shared" / "data" / "musical_instruments"
    )
)

PAD, BOS, EOS, USER, ITEM = range(5)
VOCAB = 64

# Start of a script that runs in a process of its own: from here on, the package cannot be imported.
BLOCK_PACKAGE = """
import importlib.abc, pathlib, sys

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "gavamoe_hf":
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocker())
"""


def guide_snippets(guide: str) -> list[str]:
    """The Python of a guide in docs/."""
    text = (Path(__file__).resolve().parent.parent / "docs" / guide).read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def run_without_package(script: str, *arguments: object, modules: Path, cwd: Path) -> str:
    """Runs a script that starts in a process which knows neither the package nor a network; what it prints."""
    home = {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(modules / "modules"), "HF_HOME": str(modules / "home")}
    environment = {name: value for name, value in {**os.environ, **home}.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        [sys.executable, "-c", BLOCK_PACKAGE + script, *map(str, arguments)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout


# Options of `ModelArguments` for a model from scratch that trains in seconds
TINY_MODEL = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, moe_intermediate_size=16, num_experts=4)


def tiny_config(**overrides) -> GaVaMoEConfig:
    values = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "num_users": 8,
        "num_items": 9,
        "vae_embedding_size": 16,
        "vae_num_heads": 2,
        "vae_intermediate_size": 24,
        "vae_decoder_hidden_size": 12,
        "latent_size": 4,
        "num_clusters": 3,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "user_token_id": USER,
        "item_token_id": ITEM,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        # Far from the usual 0.02, at which random experts and gates hardly change a logit
        "initializer_range": 0.4,
        # Both placeholders each, in another order; the negative one is shorter
        "stored_prompts": {"positive": [BOS, 20, 21, USER, 22, ITEM, 23], "negative": [BOS, 30, ITEM, 31, USER]},
    }
    return GaVaMoEConfig(**{**values, **overrides})


def tiny_model(**overrides) -> GaVaMoEForCausalLM:
    torch.manual_seed(0)
    return GaVaMoEForCausalLM(tiny_config(**overrides))


def tiny_run() -> tuple[GaVaMoEForCausalLM, GaVaMoEProcessor]:
    """Model and processor of a tiny run on synthetic data, untrained."""
    records = generate_synthetic(SyntheticConfig(num_users=12, num_items=10, records_per_user=6)).records
    arguments = ModelArguments(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        moe_intermediate_size=16,
        num_experts=4,
        vocab_size=400,
    )
    processor = build_processor(records["train"], arguments)
    return build_model(processor, arguments), processor


@torch.no_grad()
def spread_clusters(model: GaVaMoEForCausalLM) -> GaVaMoEForCausalLM:
    """Puts the mixture's means on latents far apart, so that pairs differ in cluster, and the threshold of a positive
    rating among the predicted ratings, so that they differ in sentiment."""
    rating_model = model.rating_model
    # Untrained tables are nearly zero: these differ as trained ones do
    torch.nn.init.normal_(rating_model.user_embeddings.weight, std=0.4)
    torch.nn.init.normal_(rating_model.item_embeddings.weight, std=0.4)
    torch.nn.init.normal_(rating_model.population_user)
    torch.nn.init.normal_(rating_model.population_item)
    users, items = all_pairs(model.config)
    predicted = rating_model.predict(users, items)
    latents = predicted.latent_mean
    # Equal slices along the direction in which the latents vary most
    direction = torch.linalg.svd(latents - latents.mean(dim=0), full_matrices=False).Vh[0]
    slices = latents[(latents @ direction).argsort()].chunk(model.config.num_clusters)
    rating_model.mixture.means.copy_(torch.stack([part.mean(dim=0) for part in slices]))
    rating_model.mixture.log_variances.uniform_(-2.2, -1.8)
    rating_model.mixture.logits.uniform_(-0.1, 0.1)
    model.config.positive_rating_threshold = predicted.predicted_rating.median().item()
    return model


def all_pairs(config: GaVaMoEConfig) -> tuple[Tensor, Tensor]:
    grid = torch.cartesian_prod(torch.arange(config.num_users), torch.arange(config.num_items))
    return grid[:, 0], grid[:, 1]


def mixed_pairs(model: GaVaMoEForCausalLM, count: int = 64) -> tuple[Tensor, Tensor]:
    """Pairs in random order; every cluster has some of them."""
    users, items = all_pairs(model.config)
    order = torch.randperm(len(users), generator=torch.Generator().manual_seed(1))[:count]
    users, items = users[order], items[order]
    gates = model.gate_index(users, items)
    shares = torch.bincount(gates, minlength=model.config.num_clusters) / len(gates)
    assert shares.min() >= 0.1, f"the pairs' clusters are not mixed: {shares}"
    return users, items


def random_prompts(lengths: list[int], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Left-padded prompts of these lengths, placeholders anywhere, and their mask."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    input_ids = torch.full((len(lengths), width), PAD)
    mask = torch.zeros(len(lengths), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        ids = torch.randint(ITEM + 1, VOCAB, (length,), generator=generator)
        user, item = torch.randperm(length, generator=generator)[:2]
        ids[user], ids[item] = USER, ITEM
        input_ids[row, width - length :] = ids
        mask[row, width - length :] = 1
    return input_ids, mask


def train_tiny_tokenizer():
    texts = ["The sound is great and the price is fair.", "The strings feel cheap, poor sound."] * 2
    return train_tokenizer(texts, vocab_size=300)


# Experts and router


def naive_expert(hidden: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """SwiGLU of one token `[H]`: silu(gate(x)) * up(x) -> down; `gate_up` `[2I, H]`, `down` `[H, I]`."""
    width = down.shape[1]
    gate, up = gate_up[:width] @ hidden, gate_up[width:] @ hidden
    return down @ (gate * torch.sigmoid(gate) * up)


def naive_experts(hidden: Tensor, gate_up: Tensor, down: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """sum_i G_i E_i(x), token by token."""
    rows = []
    for token in range(len(hidden)):
        row = torch.zeros_like(hidden[token])
        for choice in range(index.shape[1]):
            expert = index[token, choice]
            row = row + weights[token, choice] * naive_expert(hidden[token], gate_up[expert], down[expert])
        rows.append(row)
    return torch.stack(rows)


def naive_router(hidden: Tensor, gates: Tensor, gate_index: Tensor, top_k: int, normalise: bool):
    """Logits, weights and experts of `[B, T, H]` hidden states under gates `[K, X, H]`, in plain Python."""
    hidden, gates = hidden.detach(), gates.detach()
    all_logits, all_weights, all_experts = [], [], []
    for sample, gate in zip(hidden, gate_index.tolist(), strict=True):
        for token in sample:
            logits = [float(row @ token) for row in gates[gate]]
            shares = [math.exp(value - max(logits)) for value in logits]
            shares = [share / sum(shares) for share in shares]  # over all experts, before any is dropped
            best = sorted(range(len(shares)), key=lambda expert: -shares[expert])[:top_k]
            kept = [shares[expert] for expert in best]
            if normalise:
                kept = [share / sum(kept) for share in kept]
            all_logits.append(logits)
            all_weights.append(kept)
            all_experts.append(best)
    return torch.tensor(all_logits), torch.tensor(all_weights), torch.tensor(all_experts)


def naive_balance(router_logits, mask: Tensor, top_k: int) -> float:
    """Load-balancing loss (arXiv 2101.03961, eq. 4-6): X sum_i f_i P_i over all layers' tokens that are not padding,
    f_i the number of slots of expert i per token and P_i its mean probability."""
    slots, probabilities, tokens = None, None, 0
    for logits in router_logits:
        count = logits.shape[-1]
        slots = slots or [0.0] * count
        probabilities = probabilities or [0.0] * count
        for row, keep in zip(logits.detach().softmax(dim=-1).tolist(), mask.flatten().tolist(), strict=True):
            if not keep:
                continue
            tokens += 1
            for expert in sorted(range(count), key=lambda expert: -row[expert])[:top_k]:
                slots[expert] += 1
            for expert in range(count):
                probabilities[expert] += row[expert]
    return count * sum(f / tokens * p / tokens for f, p in zip(slots, probabilities, strict=True))


# Rating model


def naive_layer_norm(norm: torch.nn.LayerNorm, vector: Tensor) -> Tensor:
    centred = vector - vector.mean()
    return centred / (centred.square().mean() + norm.eps).sqrt() * norm.weight + norm.bias


def naive_gelu(value: Tensor) -> Tensor:
    return 0.5 * value * (1 + torch.erf(value / math.sqrt(2)))


def naive_linear(linear: torch.nn.Linear, vector: Tensor) -> Tensor:
    return linear.weight @ vector + linear.bias


def naive_encode(model: GaVaMoERatingModel, user: int, item: int) -> tuple[Tensor, Tensor]:
    """mu and log sigma^2 of one pair, read as the two tokens [user, item]."""
    size, heads = model.config.vae_embedding_size, model.config.vae_num_heads
    width = size // heads
    tokens = [
        model.user_embeddings.weight[user] if user >= 0 else model.population_user,
        model.item_embeddings.weight[item] if item >= 0 else model.population_item,
    ]
    for layer in model.layers:
        projected = [naive_linear(layer.query_key_value, naive_layer_norm(layer.attention_norm, t)) for t in tokens]
        attended = []
        for row in projected:
            pieces = []
            for head in range(heads):
                part = slice(head * width, (head + 1) * width)
                query = row[:size][part]
                scores = torch.stack([query @ other[size : 2 * size][part] for other in projected])
                shares = (scores / math.sqrt(width)).softmax(dim=0)
                values = [other[2 * size :][part] for other in projected]
                pieces.append(sum(share * value for share, value in zip(shares, values, strict=True)))
            attended.append(naive_linear(layer.attention_output, torch.cat(pieces)))
        tokens = [token + extra for token, extra in zip(tokens, attended, strict=True)]
        expanded = [
            naive_gelu(naive_linear(layer.feed_forward_up, naive_layer_norm(layer.feed_forward_norm, t)))
            for t in tokens
        ]
        tokens = [t + naive_linear(layer.feed_forward_down, e) for t, e in zip(tokens, expanded, strict=True)]
    features = torch.cat([tokens[0], tokens[1], tokens[0] * tokens[1] * math.sqrt(size)])
    return naive_linear(model.mean_head, features), naive_linear(model.log_variance_head, features)


def naive_posterior(model: GaVaMoERatingModel, latent: Tensor) -> list[Tensor]:
    """gamma_c = pi_c N(z | mu_c, sigma_c^2) / sum_c' (...) (eq. 8), as it is printed: not in log space."""
    mixture = model.mixture
    joint = []
    for weight, means, log_variances in zip(
        mixture.logits.softmax(dim=0), mixture.means, mixture.log_variances, strict=True
    ):
        density = weight
        for z, m, log_s in zip(latent, means, log_variances, strict=True):
            density = density * (-((z - m) ** 2) / (2 * log_s.exp())).exp() / (2 * math.pi * log_s.exp()).sqrt()
        joint.append(density)
    return [density / sum(joint) for density in joint]


def naive_kl(model: GaVaMoERatingModel, posterior, mean: Tensor, log_variance: Tensor) -> Tensor:
    """The KL of the method's section on stage 1, cluster by cluster and dimension by dimension."""
    mixture = model.mixture
    weights = mixture.logits.softmax(dim=0)
    total = 0.0
    for cluster, gamma in enumerate(posterior):
        inner = 0.0
        for d in range(len(mean)):
            s = mixture.log_variances[cluster, d].exp()
            inner = inner + s.log() + log_variance[d].exp() / s + (mean[d] - mixture.means[cluster, d]) ** 2 / s
        total = total + 0.5 * gamma * inner - gamma * (weights[cluster] / gamma).log()
    for d in range(len(mean)):
        total = total - 0.5 * (1 + log_variance[d])
    return total


def naive_rating_loss(model: GaVaMoERatingModel, users, items, ratings, noise: Tensor) -> Tensor:
    """Mean negative ELBO (eq. 12), pair by pair, at z = mu + noise * sigma (eq. 2)."""
    levels = model.config.rating_levels
    total = 0.0
    for user, item, rating, epsilon in zip(users, items, ratings, noise, strict=True):
        mean, log_variance = naive_encode(model, user, item)
        latent = mean + epsilon * (log_variance / 2).exp()
        logits = naive_linear(model.decoder_output, naive_gelu(naive_linear(model.decoder_hidden, latent)))
        if model.config.rating_likelihood == "categorical":
            chances = logits.exp() / logits.exp().sum()
            reconstruction = -chances[levels.index(rating)].log()
        else:
            target, chance = (rating - levels[0]) / (levels[-1] - levels[0]), logits[0].sigmoid()
            reconstruction = -(target * chance.log() + (1 - target) * (1 - chance).log())
        kl = naive_kl(model, naive_posterior(model, latent), mean, log_variance)
        total = total + reconstruction + model.config.beta * kl
    return total / len(users)


def sft_arguments(folder, **options):
    defaults = dict(
        output_dir=str(folder),
        use_cpu=True,
        disable_tqdm=True,
        per_device_train_batch_size=8,
        num_train_epochs=1,
        learning_rate=1e-3,
        logging_steps=1,
        feature_dropout=0.0,
    )
    return GaVaMoESFTConfig(**{**defaults, **options})


def make_trainer(tiny, planted, folder, peft_config=None, **options):
    processor, model = tiny
    return GaVaMoESFTTrainer(
        model,
        sft_arguments(folder, **options),
        train_dataset=planted.records["train"].select(range(32)),
        eval_dataset=planted.records["validation"].select(range(10)),
        processor=processor,
        peft_config=peft_config,
    )


def library_scores(predictions: list[str], references: list[str], features: list[list[str]] | None = None) -> dict:
    """The text scores of the profile `default`, from the libraries themselves and from sets of n-grams."""
    import sacrebleu
    from rouge_score.rouge_scorer import RougeScorer

    lowered = [text.lower() for text in predictions]
    scores = {}
    for order in (1, 4):
        metric = sacrebleu.BLEU(lowercase=True, max_ngram_order=order)
        scores[f"bleu_{order}"] = metric.corpus_score(predictions, [references]).score
    names = {"rouge1": "rouge_1", "rouge2": "rouge_2", "rougeL": "rouge_l"}
    rouge = [RougeScorer(list(names)).score(true.lower(), text) for text, true in zip(lowered, references, strict=True)]
    for name, key in names.items():
        scores[key] = 100 * sum(each[name].fmeasure for each in rouge) / len(rouge)
    for n in (1, 2):
        grams = [tuple(words[i : i + n]) for words in map(str.split, lowered) for i in range(len(words) - n + 1)]
        scores[f"distinct_{n}"] = 100 * len(set(grams)) / len(grams) if grams else 0.0
    scores["unique_sentence_ratio"] = len({tuple(text.split()) for text in lowered}) / len(lowered)
    asked = [(text, given) for text, given in zip(lowered, features or [], strict=bool(features)) if any(given)]
    if asked:
        # Whole words, and symbols each by itself
        spaced = [f" {' '.join(re.findall(r'[a-z0-9_]+|[^a-z0-9_ ]', text))} " for text, _ in asked]
        named = [
            any(f" {name.lower()} " in text for name in given) for text, (_, given) in zip(spaced, asked, strict=True)
        ]
        scores["feature_match"] = sum(named) / len(named)
    return scores
