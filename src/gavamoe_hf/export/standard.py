"""A GaVaMoE as checkpoints of a standard architecture, one for each cluster, that inference engines serve."""

from __future__ import annotations

import copy
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken
from torch import Tensor
from transformers import LlamaConfig, MixtralConfig, PreTrainedConfig, PreTrainedTokenizerBase, Qwen2MoeConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from ..configuration_gavamoe import POPULATION_ID, GaVaMoEConfig, share_weights
from ..evaluation.predict import predict_pairs, write_json, write_text
from .readme import readme
from .router import ROUTER_FILE, ROUTER_FOLDER, pair_token
from .weights import Layout, gate_tensors, plan_layout, shared_expert_width, shared_tensors

logger = logging.getLogger(__name__)

ExportFormat = Literal["auto", "mixtral", "qwen2_moe"]

TABLE_FILE = "router.safetensors"
_CONFIG_CLASSES = {"mixtral": MixtralConfig, "qwen2_moe": Qwen2MoeConfig, "llama": LlamaConfig}
_ARCHITECTURES = {"mixtral": "MixtralForCausalLM", "qwen2_moe": "Qwen2MoeForCausalLM", "llama": "LlamaForCausalLM"}
_METADATA = {"format": "pt"}


def export_standard(
    model: Any,
    processor: Any,
    output_dir: str | os.PathLike[str],
    format: ExportFormat = "auto",
    extra_kv_heads: int = 0,
    max_table_pairs: int = 200_000,
    max_shard_bytes: int = 5 * 10**9,
) -> list[Path]:
    """
    Writes, for each cluster, a checkpoint whose router is the cluster's gate, with users and items as tokens of its
    vocabulary: `<user_17>` and `<item_5>` by index, `<user_population>` and `<item_population>` for anyone not known.
    Given these tokens, its logits are this model's.

    No engine can generate the tokens of users and items, or the placeholders: whatever the hidden state, their logit is
    below the mean of the others; how far is said in `weights.py`. The clusters' folders hold the same files as hard
    links, but for the gates.

    Args:
        model ([`GaVaMoEForCausalLM`]): The model.
        processor ([`GaVaMoEProcessor`]): Its processor.
        output_dir (`str` or `os.PathLike`): A folder that does not exist or is empty.
        format (`str`, *optional*, defaults to `"auto"`):
            `"qwen2_moe"` holds every model with experts. `"mixtral"` holds those with `norm_topk_prob`; a shared expert
            is copied into each of the others, which then take as much more memory. `"auto"` is Mixtral for a model with
            `norm_topk_prob` and no shared expert, Llama for one with dense layers, and Qwen2-MoE for all others.
        extra_kv_heads (`int`, *optional*, defaults to 0):
            Key-value heads, of zeros, beyond the one that is added anyway: tensor parallelism has to divide their
            number.
        max_table_pairs (`int`, *optional*, defaults to 200,000):
            Up to how many pairs the clusters of all pairs are written to `router.safetensors`.
        max_shard_bytes (`int`, *optional*, defaults to 5 GB): Size of a file of weights.

    Returns:
        `list[Path]`: the clusters' folders.

    Raises:
        `ValueError`: for a model that the format cannot hold; `FileExistsError`: for a folder with something in it.
    """
    output_dir = Path(output_dir)
    architecture = choose_architecture(model.config, format)
    layout = plan_layout(model.config, extra_kv_heads)
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise FileExistsError(f"Expected a new or empty folder, but {output_dir} exists. Name another, or remove it.")
    tokenizer, first_token = _extended_tokenizer(model.config, processor)
    names = [f"cluster_{cluster}" for cluster in range(1 if architecture == "llama" else model.config.num_clusters)]
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    # Beside, then renamed: the folder is whole or not there
    with tempfile.TemporaryDirectory(prefix=f"{output_dir.name}.", dir=output_dir.parent) as beside:
        folder = Path(beside) / "export"
        first = folder / names[0]
        first.mkdir(parents=True)
        _write_tokenizer(tokenizer, first)
        model.generation_config.save_pretrained(first)
        index = _write_shards(shared_tensors(model, layout, architecture, first_token), first, max_shard_bytes)
        write_json(first / "config.json", _config(model, layout, architecture, index["model.embed_tokens.weight"][1]))
        for name in names[1:]:
            _link(first, folder / name)
        for cluster, name in enumerate(names):
            _write_gates(gate_tensors(model, layout, architecture, cluster), index, folder / name)
        _write_router(model, processor, names, folder, max_table_pairs)
        write_text(folder / "README.md", readme(names, architecture, model.config, (folder / TABLE_FILE).is_file()))
        for part in (folder, *folder.iterdir()):
            share_weights(part)
        os.replace(folder, output_dir)
    return [output_dir / name for name in names]


def choose_architecture(config: GaVaMoEConfig, format: ExportFormat) -> str:
    """`"mixtral"`, `"qwen2_moe"` or `"llama"`; `ValueError` where the model does not fit the format."""
    if format not in get_args(ExportFormat):
        raise ValueError(f"Expected `format` among {', '.join(get_args(ExportFormat))}, but got {format!r}.")
    if config.num_local_experts == 0:
        if format != "auto":
            raise ValueError(f'Expected format="auto" for a model with dense layers, a Llama, but got {format!r}.')
        return "llama"
    if format == "mixtral" and not config.norm_topk_prob:
        raise ValueError(
            "Expected a model whose experts' weights sum to one (`norm_topk_prob`), as Mixtral's do, but this one's do "
            'not. Export it with format="qwen2_moe".'
        )
    if format == "auto":
        return "mixtral" if config.norm_topk_prob and not config.shared_expert_intermediate_size else "qwen2_moe"
    return format


def _config(model: Any, layout: Layout, architecture: str, vocab_size: int) -> dict[str, Any]:
    config = model.config
    names = ["num_hidden_layers", "hidden_act", "max_position_embeddings", "initializer_range"]
    names += ["pad_token_id", "bos_token_id", "eos_token_id", "rope_parameters"]
    # As copies, of which a config makes its own
    options: dict[str, Any] = {name: copy.deepcopy(getattr(config, name)) for name in names}
    options |= {
        "vocab_size": vocab_size,
        "hidden_size": layout.hidden_size,
        "num_attention_heads": layout.num_heads,
        "num_key_value_heads": layout.num_kv_heads,
        "head_dim": layout.head_dim,
        "rms_norm_eps": layout.rms_norm_eps,
        "tie_word_embeddings": False,
        "intermediate_size": config.intermediate_size,
        "architectures": [_ARCHITECTURES[architecture]],
    }
    if architecture != "llama":
        options["num_experts_per_tok"] = config.num_experts_per_tok
    if architecture == "mixtral":
        options["num_local_experts"] = config.num_local_experts
        options["intermediate_size"] = config.moe_intermediate_size + config.shared_expert_intermediate_size
    elif architecture == "qwen2_moe":
        options |= {
            "num_experts": config.num_local_experts,
            "moe_intermediate_size": config.moe_intermediate_size,
            "shared_expert_intermediate_size": shared_expert_width(config),
            "norm_topk_prob": config.norm_topk_prob,
        }
    standard: PreTrainedConfig = _CONFIG_CLASSES[architecture](**options)
    dtype = str(model.get_input_embeddings().weight.dtype).removeprefix("torch.")
    rope = standard.rope_parameters
    # Under the names of transformers 4 too, which engines may still have
    legacy = {
        "torch_dtype": dtype,
        "rope_theta": rope["rope_theta"],
        "rope_scaling": None if rope["rope_type"] == "default" else rope,
    }
    return {**standard.to_dict(), "dtype": dtype, **legacy}


def _extended_tokenizer(config: GaVaMoEConfig, processor: Any) -> tuple[PreTrainedTokenizerBase, int]:
    """A copy of the tokenizer with the users' and items' tokens, in the order of the rows, and the id of the first."""
    names = [
        pair_token(kind, index)
        for kind, count in (("user", config.num_users), ("item", config.num_items))
        for index in [*range(count), POPULATION_ID]
    ]
    tokenizer = copy.deepcopy(processor.tokenizer)
    taken = set(names) & set(tokenizer.get_vocab())
    if taken:
        raise ValueError(f"Expected a vocabulary without tokens of users and items, but it has {min(taken)!r} already.")
    first = len(tokenizer)
    # As they stand, blanks around them kept, and left out where special tokens are
    tokenizer.add_tokens([AddedToken(name, special=True, normalized=False) for name in names], special_tokens=True)
    if tokenizer.convert_tokens_to_ids(names) != list(range(first, first + len(names))):
        raise ValueError(f"Expected the tokenizer to number new tokens from {first} on, but it does not.")
    tokenizer.chat_template = processor.chat_template
    return tokenizer, first


def _write_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    tokenizer.save_pretrained(folder, save_jinja_files=False)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    # Of where the tokenizer came from: GaVaMoE's processor, whose code a server would ask for, and a local folder
    for name in ("processor_class", "auto_map", "is_local", "local_files_only"):
        settings.pop(name, None)
    # Under the names of transformers 4, which 5 reads too
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings["additional_special_tokens"] = settings.pop("extra_special_tokens", [])
    write_json(path, settings)


def _write_shards(
    tensors: Iterable[tuple[str, Tensor]], folder: Path, max_shard_bytes: int
) -> dict[str, tuple[int, int, int]]:
    """
    Writes tensors to files `model-00001.safetensors`, ..., holding one file's tensors at a time.

    Returns:
        `dict[str, tuple]`: of each tensor its file's number, length and bytes.
    """
    index: dict[str, tuple[int, int, int]] = {}
    shard: dict[str, Tensor] = {}
    number, size = 1, 0
    for name, tensor in tensors:
        if shard and size + tensor.nbytes > max_shard_bytes:
            save_file(shard, folder / f"model-{number:05d}.safetensors", metadata=_METADATA)
            shard, size, number = {}, 0, number + 1
        shard[name] = tensor.cpu()
        index[name] = (number, len(tensor), tensor.nbytes)
        size += tensor.nbytes
    save_file(shard, folder / f"model-{number:05d}.safetensors", metadata=_METADATA)
    return index


def _write_gates(gates: dict[str, Tensor], index: dict[str, tuple[int, int, int]], folder: Path) -> None:
    """Writes the gates as the last file of the checkpoint, and the index; the other files get their final names."""
    shared = max(number for number, _, _ in index.values())
    total = shared + bool(gates)
    files = {number: f"model-{number:05d}-of-{total:05d}.safetensors" for number in range(1, total + 1)}
    for number in range(1, shared + 1):
        os.replace(folder / f"model-{number:05d}.safetensors", folder / files[number])
    weight_map = {name: files[number] for name, (number, _, _) in index.items()}
    if gates:
        save_file({name: gate.cpu() for name, gate in gates.items()}, folder / files[total], metadata=_METADATA)
        weight_map |= dict.fromkeys(gates, files[total])
    size = sum(size for _, _, size in index.values()) + sum(gate.nbytes for gate in gates.values())
    write_json(folder / SAFE_WEIGHTS_INDEX_NAME, {"metadata": {"total_size": size}, "weight_map": weight_map})


def _link(source: Path, target: Path) -> None:
    """A folder with the files of another, as hard links; as copies where the file system has none."""
    target.mkdir()
    copied = []
    for path in sorted(source.iterdir()):
        try:
            os.link(path, target / path.name)
        except OSError:
            shutil.copyfile(path, target / path.name)
            copied.append(path.name)
    if copied:
        logger.warning("This file system has no hard links: %s has copies of %s.", target.name, ", ".join(copied))


def _write_router(model: Any, processor: Any, names: list[str], folder: Path, max_table_pairs: int) -> None:
    """What tells the cluster of a pair: rating model, processor, and, where there are not too many, a table of all."""
    model.rating_model.save_pretrained(folder / ROUTER_FOLDER)
    processor.save_pretrained(folder / ROUTER_FOLDER)
    config = model.config
    threshold = config.positive_rating_threshold
    write_json(folder / ROUTER_FILE, {"clusters": names, "positive_rating_threshold": threshold})
    rows, columns = config.num_users + 1, config.num_items + 1
    if rows * columns > max_table_pairs:
        logger.warning(
            "%d users and %d items make too many pairs for %s, of which at most %d are written: `ExportedRouter` tells "
            "the cluster of any pair.",
            *(config.num_users, config.num_items, TABLE_FILE, max_table_pairs),
        )
        return
    # The population, -1, is the last row and column, as in Python's indexing
    items = torch.arange(columns).where(torch.arange(columns) < columns - 1, POPULATION_ID)
    table: dict[str, list[Tensor]] = {"cluster": [], "positive": []}
    for user in [*range(rows - 1), POPULATION_ID]:
        predicted = predict_pairs(model.rating_model, torch.full_like(items, user), items)
        table["cluster"].append(predicted.cluster_posterior.argmax(dim=-1).to(torch.uint8))
        table["positive"].append((predicted.predicted_rating >= threshold).to(torch.uint8))
    save_file({name: torch.stack(values) for name, values in table.items()}, folder / TABLE_FILE)
