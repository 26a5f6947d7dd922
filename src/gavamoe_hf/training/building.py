"""Builds processor and model for a set of records: from a base model, or from scratch."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from datasets import Dataset
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from ..configuration_gavamoe import GaVaMoEConfig
from ..modeling_gavamoe import GaVaMoEForCausalLM
from ..processing_gavamoe import (
    PROMPT_TEMPLATE,
    PROMPT_TEMPLATE_WITHOUT_FEATURES,
    SYSTEM_PROMPT,
    GaVaMoEProcessor,
)
from ..upcycling_gavamoe import read_llama_config, upcycled_config
from ..vae_gmm_gavamoe import GaVaMoERatingModel
from .initialization import MAX_CHOSEN_CLUSTERS
from .tokenizer import train_tokenizer

AUTO = "auto"

Ablation = Literal["none", "no_multi_gating", "no_fine_grained_experts", "base"]

# Features kept for each item, most frequent first.
_FEATURES_PER_ITEM = 8

# How often each feature is seen when a tokenizer is trained, besides the explanations: in a small corpus enough for a
# rare feature to become one token, which is easier to repeat than several.
_REPEATS_OF_A_FEATURE = 30


@dataclass
class ModelArguments:
    """
    What model is trained. Sizes of the language model apply to models from scratch; those of the rating model default
    to the paper's (768, 128) with a base model and to small ones from scratch.
    """

    base_model: str | None = field(
        default=None, metadata={"help": "Path or Hub id of a pretrained Llama. From scratch if not given."}
    )
    gguf_file: str | None = field(
        default=None, metadata={"help": "Name of a GGUF file in `base_model`, where its weights are not safetensors."}
    )
    expert_init: str = field(
        default="residual",
        metadata={
            "help": "What becomes of a base model's feed-forward layers: residual (kept as an expert of every token, "
            "the model starts equal to its base), partition (cut into the experts, equal only while all are active) "
            "or random (replaced, the paper's).",
            "choices": ["residual", "partition", "random"],
        },
    )
    dtype: str | None = field(
        default=None,
        metadata={
            "help": "Precision of a base model's weights; with LoRA the base's own, else float32. That of the rating "
            "model is float32.",
            "choices": ["auto", "float32", "bfloat16", "float16"],
        },
    )
    ablation: str = field(
        default="none",
        metadata={
            "help": "Part of the method that is left out (figure 3): no_multi_gating (one gate), "
            "no_fine_grained_experts (experts merged, total and active parameters equal), base (plain Llama).",
            "choices": ["none", "no_multi_gating", "no_fine_grained_experts", "base"],
        },
    )
    num_clusters: str = field(
        default="3",
        metadata={
            "help": 'Clusters and gates K, a number, or "auto": the one from 2 to 8 whose clusters of users have the '
            "largest mean silhouette. Paper: 3."
        },
    )
    num_experts: int = field(default=12, metadata={"help": "Experts of each layer. Paper: 12."})
    num_experts_per_tok: int = field(default=2, metadata={"help": "Experts that each token uses. Paper: 2."})
    moe_intermediate_size: int = field(default=128, metadata={"help": "Width of one expert. Paper: 1280."})
    shared_expert_intermediate_size: int = field(
        default=0,
        metadata={
            "help": "Width of a dense expert that every token uses besides the routed ones; with a base model and "
            "expert_init residual it is the base's own feed-forward layer. Paper: none."
        },
    )
    norm_topk_prob: bool = field(
        default=True, metadata={"help": "Rescale the weights of the chosen experts to sum to one. Paper: no."}
    )
    rating_likelihood: str = field(
        default="categorical",
        metadata={
            "help": "Likelihood of ratings. Paper: bernoulli.",
            "choices": ["categorical", "bernoulli"],
        },
    )
    vae_embedding_size: int | None = field(
        default=None,
        metadata={"help": "Size of user and item embeddings; 64 from scratch, else the paper's 768."},
    )
    latent_size: int | None = field(
        default=None, metadata={"help": "Size of the latent; 32 from scratch, else the paper's 128."}
    )
    vae_dropout: float = field(default=0.1, metadata={"help": "Dropout in the rating model."})
    vae_id_dropout: float = field(
        default=0.1, metadata={"help": "Share of ids replaced by the population while training."}
    )
    hidden_size: int = field(default=256, metadata={"help": "Width of a model from scratch."})
    num_hidden_layers: int = field(default=4, metadata={"help": "Layers of a model from scratch."})
    num_attention_heads: int = field(default=4, metadata={"help": "Attention heads of a model from scratch."})
    vocab_size: int = field(default=3000, metadata={"help": "Most tokens of a tokenizer trained from scratch."})
    attention_dropout: float = field(default=0.0, metadata={"help": "Dropout of a model from scratch."})

    def __post_init__(self):
        # A YAML file gives a number
        self.num_clusters = str(self.num_clusters)
        if self.num_clusters != AUTO and not (self.num_clusters.isdecimal() and int(self.num_clusters) > 0):
            raise ValueError(f'Expected `num_clusters` as a number from 1, or "{AUTO}", but got {self.num_clusters!r}.')

    @property
    def chooses_num_clusters(self) -> bool:
        """Whether stage 1 is to choose the number of clusters."""
        return self.num_clusters == AUTO and self.ablation != "no_multi_gating"


def build_processor(
    train: Dataset, model_args: ModelArguments, rating_levels: Sequence[float] = (1, 2, 3, 4, 5)
) -> GaVaMoEProcessor:
    """
    The processor of a run: the ids and features of the training records, and the tokenizer.

    Args:
        train ([`~datasets.Dataset`]): Training records.
        model_args ([`ModelArguments`]): Says whether the tokenizer is the base model's or trained on the records.
        rating_levels (`Sequence[float]`, *optional*): The values a rating can take.

    Raises:
        `ValueError`: for a base model that is not a Llama, or whose tokenizer does not fit it or has the placeholder
        tokens already.
        `FileNotFoundError`: for a base model, or a tokenizer of it, that is not there.
    """
    users, items = sorted(set(train["user"])), sorted(set(train["item"]))
    counts: dict[str, Counter[str]] = {item: Counter() for item in items}
    for item, features in zip(train["item"], train["feature"], strict=True):
        counts[item].update(features)
    titles: dict[str, str] = {}
    for item, title in zip(train["item"], train["item_title"], strict=True) if "item_title" in train.features else ():
        if title:
            titles.setdefault(item, title)
    if model_args.base_model is None:
        features = sorted({name for features in train["feature"] for name in features})
        words = [" " + word for word in (*features, "positive", "negative", "to")]
        texts = [*train["explanation"], *words * _REPEATS_OF_A_FEATURE]
        tokenizer = train_tokenizer(texts, model_args.vocab_size, _prompt_phrases())
    else:
        tokenizer = _base_tokenizer(model_args.base_model, model_args.gguf_file)
    return GaVaMoEProcessor(
        tokenizer,
        users=users,
        items=items,
        item_features=[[name for name, _ in counts[item].most_common(_FEATURES_PER_ITEM)] for item in items],
        positive_rating_threshold=(min(rating_levels) + max(rating_levels)) / 2,
        item_titles=[titles.get(item, "") for item in items] if titles else None,
    )


def _base_tokenizer(base_model: str, gguf_file: str | None) -> PreTrainedTokenizerBase:
    """The base model's tokenizer with the placeholder tokens, which has to fit the base model's vocabulary."""
    config = read_llama_config(base_model, gguf_file)
    try:
        tokenizer = AutoTokenizer.from_pretrained(base_model, gguf_file=gguf_file, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"Expected the base model {base_model!r} to have a tokenizer (tokenizer.json and tokenizer_config.json), "
            f"but it could not be loaded. Save the base's own beside it. ({error})"
        ) from error
    size = len(tokenizer)
    GaVaMoEProcessor.add_placeholder_tokens(tokenizer)
    if size > config.vocab_size:
        raise ValueError(
            f"Expected a tokenizer of at most {config.vocab_size} tokens, the vocabulary of the base model "
            f"{base_model!r}, but the one beside it has {size}. Save the base's own there."
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _prompt_phrases() -> list[str]:
    """The longer unchanging parts of the prompts, which a model from scratch knows nothing about word by word."""
    phrases = set()
    for template in (PROMPT_TEMPLATE, PROMPT_TEMPLATE_WITHOUT_FEATURES):
        # The blank before a word belongs to the word, before a placeholder token to the phrase
        parts = re.split(r" \{(?:sentiment|features)\}|\{\w+\}", f"{SYSTEM_PROMPT}\n{template}")
        phrases |= {part for part in parts if len(part) > 10}
    return sorted(phrases)


def build_model(
    processor: GaVaMoEProcessor,
    model_args: ModelArguments,
    rating_levels: Sequence[float] = (1, 2, 3, 4, 5),
    dtype: torch.dtype | None = None,
) -> GaVaMoEForCausalLM:
    """
    The model of a run, its rating model untrained.

    Args:
        processor ([`GaVaMoEProcessor`]): From [`build_processor`].
        model_args ([`ModelArguments`]): Sizes, base model and ablation.
        rating_levels (`Sequence[float]`, *optional*): The values a rating can take.
        dtype (`torch.dtype`, *optional*): Precision of a base model's weights; its own if not given.

    Raises:
        `ValueError`: for a base that is not a Llama, or sizes that do not fit together.
    """
    tokenizer = processor.tokenizer
    if model_args.base_model is None:
        model = GaVaMoEForCausalLM(build_config(processor, model_args, rating_levels))
        _initialize_copying_heads(model)
    else:
        model = GaVaMoEForCausalLM.from_llama(
            model_args.base_model,
            expert_init=model_args.expert_init,
            vocab_size=len(tokenizer),
            dtype=dtype,
            gguf_file=model_args.gguf_file,
            **_method_fields(processor, model_args, rating_levels),
        )
        model.config.pad_token_id = tokenizer.pad_token_id
    set_generation_defaults(model, tokenizer)
    return model


def build_config(
    processor: GaVaMoEProcessor, model_args: ModelArguments, rating_levels: Sequence[float] = (1, 2, 3, 4, 5)
) -> GaVaMoEConfig:
    """The config of [`build_model`], for which no weights are read; arguments likewise."""
    fields = _method_fields(processor, model_args, rating_levels)
    tokenizer = processor.tokenizer
    if model_args.base_model is not None:
        base = read_llama_config(model_args.base_model, model_args.gguf_file)
        return upcycled_config(GaVaMoEConfig, base, model_args.expert_init, len(tokenizer), fields)
    routed = model_args.num_experts * model_args.moe_intermediate_size
    return GaVaMoEConfig(
        vocab_size=len(tokenizer),
        hidden_size=model_args.hidden_size,
        intermediate_size=routed + model_args.shared_expert_intermediate_size,
        num_hidden_layers=model_args.num_hidden_layers,
        num_attention_heads=model_args.num_attention_heads,
        attention_dropout=model_args.attention_dropout,
        # Llama's 0.02 suits widths in the thousands; narrow layers would start with next to no signal
        initializer_range=model_args.hidden_size**-0.5,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **fields,
    )


def build_rating_model(
    processor: GaVaMoEProcessor, model_args: ModelArguments, rating_levels: Sequence[float] = (1, 2, 3, 4, 5)
) -> GaVaMoERatingModel:
    """The rating model of [`build_model`] alone, for stage 1 without a language model; arguments likewise."""
    fields = _method_fields(processor, model_args, rating_levels)
    return GaVaMoERatingModel(GaVaMoEConfig(vocab_size=len(processor.tokenizer), **fields))


@torch.no_grad()
def _initialize_copying_heads(model: GaVaMoEForCausalLM) -> None:
    """
    Starts each attention head of a model from scratch as one that repeats what it attends to: its output projection is
    the transpose of its value projection, as in mimetic initialisation (arXiv 2305.09828). An explanation has to name
    the prompt's feature, however rare; on thousands of records that is learned word by word otherwise.
    """
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.copy_(layer.self_attn.v_proj.weight.T)


def set_generation_defaults(model: GaVaMoEForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    """Ends explanations at the tokenizer's end-of-sequence token, after 40 new tokens at most."""
    config = model.generation_config or GenerationConfig()
    ends = config.eos_token_id
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    config.eos_token_id = sorted({*ends, tokenizer.eos_token_id})
    config.pad_token_id = tokenizer.pad_token_id
    config.bos_token_id = tokenizer.bos_token_id
    config.max_new_tokens = 40
    model.generation_config = config


def _method_fields(
    processor: GaVaMoEProcessor, model_args: ModelArguments, rating_levels: Sequence[float]
) -> dict[str, Any]:
    is_small = model_args.base_model is None
    embedding_size = model_args.vae_embedding_size or (64 if is_small else 768)
    return {
        "num_users": len(processor.users),
        "num_items": len(processor.items),
        "vae_embedding_size": embedding_size,
        "vae_num_heads": 4 if is_small else 8,
        "vae_intermediate_size": 2 * embedding_size,
        "vae_decoder_hidden_size": 64 if is_small else 256,
        "vae_dropout": model_args.vae_dropout,
        "vae_id_dropout": model_args.vae_id_dropout,
        "latent_size": model_args.latent_size or (32 if is_small else 128),
        # Where stage 1 is to choose, as many gates as it may come to; those left over are dropped
        "num_clusters": MAX_CHOSEN_CLUSTERS if model_args.num_clusters == AUTO else int(model_args.num_clusters),
        "rating_likelihood": model_args.rating_likelihood,
        "rating_levels": [float(level) for level in rating_levels],
        "num_local_experts": model_args.num_experts,
        "num_experts_per_tok": model_args.num_experts_per_tok,
        "moe_intermediate_size": model_args.moe_intermediate_size,
        "shared_expert_intermediate_size": model_args.shared_expert_intermediate_size,
        "norm_topk_prob": model_args.norm_topk_prob,
        "user_token_id": processor.user_token_id,
        "item_token_id": processor.item_token_id,
        "stored_prompts": processor.stored_prompts(),
        **_ablation_fields(model_args),
    }


def _ablation_fields(model_args: ModelArguments) -> dict[str, Any]:
    """What an ablation (figure 3) changes."""
    if model_args.ablation == "no_multi_gating":
        return {"num_clusters": 1}
    if model_args.ablation == "no_fine_grained_experts":
        merged = model_args.num_experts_per_tok
        if model_args.num_experts % merged:
            raise ValueError(
                f"Expected `num_experts` ({model_args.num_experts}) to be a multiple of `num_experts_per_tok` "
                f"({merged}), which is how many experts are merged into one."
            )
        return {
            "num_local_experts": model_args.num_experts // merged,
            "num_experts_per_tok": 1,
            "moe_intermediate_size": model_args.moe_intermediate_size * merged,
            # The weight of a single expert, rescaled, would always be 1 and teach its gate nothing
            "norm_topk_prob": False,
        }
    if model_args.ablation == "base":
        return {"num_local_experts": 0, "inject_pair_embeddings": False}
    return {}
