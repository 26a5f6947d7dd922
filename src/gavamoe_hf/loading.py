"""Loads checkpoints with this package's own code, and says what is wrong with one that cannot be loaded."""

from __future__ import annotations

import difflib
import json
import os
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file

from .modeling_gavamoe import GaVaMoEForCausalLM
from .processing_gavamoe import GaVaMoEProcessor
from .upcycling_gavamoe import check_safetensors

_PROCESSOR_FILES = ("processor_config.json", "tokenizer_config.json", "tokenizer.json")
_NEEDED_FILES = ("config.json", *_PROCESSOR_FILES, "model.safetensors")
# What a checkpoint is loaded from: neither code nor pickles
CHECKPOINT_FILES = (
    *("config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json"),
    *("processor_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
)
_HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "force_download")
# Keys by which these files name code, other repositories or kernels
_REFUSED_KEYS = {
    "config.json": ("quantization_config", "kernel_config", "use_kernels"),
    "tokenizer_config.json": (),
    "processor_config.json": ("audio_tokenizer",),
    "generation_config.json": ("custom_generate", "assistant_model"),
}
_REFUSED_ADAPTER_KEYS = (
    *("megatron_config", "auto_map", "loftq_config", "eva_config", "corda_config", "arrow_config", "layer_replication"),
    *("rank_pattern", "alpha_pattern", "layers_pattern", "layers_to_transform"),
)
_MAX_RANK = 4096
# Of the files whose fields are checked one by one; the catalogue is in none of them
_MAX_CONFIG_BYTES = 2**20
_FEW_ELEMENTS = 2**20
_ADAPTER_FILES = ("adapter_config.json", *_PROCESSOR_FILES, "adapter_model.safetensors")


def load_checkpoint(
    path_or_id: str, base_model: str | os.PathLike | None = None, **kwargs
) -> tuple[GaVaMoEForCausalLM, GaVaMoEProcessor]:
    """
    Model (in evaluation mode) and processor of a checkpoint, or of a local folder with a LoRA adapter, which is
    merged.

    Args:
        path_or_id (`str`): A folder, or a Hub id.
        base_model (`str` or `os.PathLike`, *optional*): The base of an adapter, see [`load_adapter`].
        kwargs: passed to `from_pretrained` of both (`revision`, `token`, ...), or of an adapter's base.

    Raises:
        `FileNotFoundError`: for a folder that lacks a file, naming it; `ValueError`: for one with a truncated file,
        with one that is not as it was saved, or without some of the weights.
    """
    hub = {name: kwargs.pop(name) for name in _HUB_OPTIONS if name in kwargs}
    folder = local_folder(path_or_id, **hub)
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        check_checkpoint(folder, _ADAPTER_FILES)
        processor = GaVaMoEProcessor.from_pretrained(folder, trust_remote_code=False)
        return load_adapter(folder, base_model, **hub, **kwargs).eval(), processor
    check_checkpoint(folder)
    try:
        model, loaded = GaVaMoEForCausalLM.from_pretrained(
            folder, **kwargs, output_loading_info=True, trust_remote_code=False
        )
        if loaded["missing_keys"]:
            raise ValueError(
                f"Expected all weights of the model that config.json describes in {path_or_id}, but "
                f"{len(loaded['missing_keys'])} are missing, such as {min(loaded['missing_keys'])}, and would be "
                "random. Save or download config and weights again, together."
            )
        _check_finite(model, folder)
        processor = GaVaMoEProcessor.from_pretrained(folder, trust_remote_code=False)
        # A tokenizer or a template that does not work is found here
        processor.stored_prompts()
        processor(user=None, item=None, features=["a"])
        return model.eval(), processor
    except (OSError, ValueError, ImportError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        # A field that is not as it was saved may make transformers and tokenizers raise nearly anything
        raise ValueError(
            f"Expected a checkpoint as `save_pretrained` leaves it in {path_or_id}, but loading it failed with "
            f"{type(error).__name__}: {error}. Save or download it again."
        ) from error


def load_adapter(
    adapter: str | os.PathLike, base_model: str | os.PathLike | None = None, **kwargs: Any
) -> GaVaMoEForCausalLM:
    """
    The model that a LoRA adapter makes of its base, merged: it needs no PEFT any more.

    Args:
        adapter (`str` or `os.PathLike`): A folder with `adapter_config.json`.
        base_model (`str` or `os.PathLike`, *optional*):
            The GaVaMoE that the adapter was trained on, in its own precision. Defaults to a folder `base_model` beside
            the adapter, else to what the adapter names.
        kwargs: passed to `from_pretrained` of the base (`dtype`, `token`, ...).

    Raises:
        `FileNotFoundError`: where there is no base.
    """
    hub = {name: kwargs.pop(name) for name in _HUB_OPTIONS if name in kwargs}
    adapter = Path(adapter)
    config = _check_adapter(adapter)
    if base_model is None:
        beside = adapter.parent / "base_model"
        base_model = beside if beside.is_dir() else config.get("base_model_name_or_path")
    try:
        folder = local_folder(base_model or "", **hub)
        check_checkpoint(folder, ("config.json", "model.safetensors"))
        model = GaVaMoEForCausalLM.from_pretrained(folder, **kwargs, trust_remote_code=False)
    except OSError as error:
        raise FileNotFoundError(
            f"Expected the base model of the adapter {adapter} at {str(base_model)!r}, but it could not be loaded. "
            f"Pass its folder as `base_model`. ({error})"
        ) from error
    adapted = get_peft_model(model, LoraConfig.from_pretrained(str(adapter)))
    weights = load_file(adapter / "adapter_model.safetensors")
    expected = set(get_peft_model_state_dict(adapted))
    missing, stray = expected - set(weights), set(weights) - expected
    if missing or stray:
        raise ValueError(
            f"Expected the weights that {adapter / 'adapter_config.json'} describes, but {len(missing)} are missing "
            f"and {len(stray)} are no part of it, such as {min(missing | stray)}. Save or download the adapter again."
        )
    set_peft_model_state_dict(adapted, weights)
    _check_finite(adapted, adapter)
    return adapted.merge_and_unload()


def local_folder(path_or_id: str | os.PathLike, **hub: Any) -> Path:
    """
    The folder of a checkpoint. From the Hub come JSON, templates and safetensors alone, into its cache.

    Args:
        path_or_id (`str` or `os.PathLike`): A folder, or a Hub id, `user/name`.
        hub: `revision`, `token`, `cache_dir`, `local_files_only`, `force_download`.

    Raises:
        `FileNotFoundError`: where there is no such folder, at once if it cannot be a Hub id, with a near name; and
            where the Hub has none or cannot be reached.
    """
    folder = Path(path_or_id).expanduser()
    if folder.is_dir():
        return folder
    name = str(path_or_id)
    parts = Path(name).parts
    is_path = isinstance(path_or_id, os.PathLike) or name.startswith((".", "/", "~")) or "\\" in name
    if is_path or len(parts) != 2 or Path(parts[0]).is_dir() or folder.exists():
        near = difflib.get_close_matches(
            folder.name, sorted(os.listdir(folder.parent)) if folder.parent.is_dir() else [], 1
        )
        hint = f" Did you mean {folder.parent / near[0]}?" if near else ""
        raise FileNotFoundError(f"Expected a checkpoint folder or a Hub id, but there is no folder {name}.{hint}")
    try:
        return Path(snapshot_download(name, allow_patterns=list(CHECKPOINT_FILES), ignore_patterns=["*/*"], **hub))
    except Exception as error:
        # httpx's errors, which are of no one kind, and the Hub's
        raise FileNotFoundError(
            f"There is no folder {name} here, and the Hub gave no such checkpoint: {first_line(error)}"
        ) from error


def first_line(error: Exception) -> str:
    """The first line of an error's message; its kind where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _check_adapter(folder: Path) -> dict[str, Any]:
    """
    The config of an adapter, before PEFT reads it: PEFT imports what `megatron_core` names, and matches names by the
    patterns that it holds.
    """
    path = folder / "adapter_config.json"
    _require_file(path)
    config = _read_json(path)
    refused = [name for name in _REFUSED_ADAPTER_KEYS if config.get(name) not in (None, False, {}, [])]
    refused += [name for name in ("target_modules", "exclude_modules") if isinstance(config.get(name), str)]
    if config.get("megatron_core") not in (None, "megatron.core"):
        refused.append("megatron_core")
    if not isinstance(config.get("init_lora_weights", True), bool):
        refused.append("init_lora_weights")
    if config.get("peft_type") != "LORA" or not isinstance(config.get("r"), int) or not 0 < config["r"] <= _MAX_RANK:
        raise ValueError(
            f"{path}: expected a LoRA adapter of rank 1 to {_MAX_RANK}, but got {str(config.get('peft_type'))[:40]!r} "
            f"of rank {str(config.get('r'))[:40]}. Other kinds are not loaded."
        )
    if refused:
        raise ValueError(
            f"{path}: expected layers by name and nothing that runs code, but got {', '.join(refused)}. Do not use "
            "this adapter unless you know who made it; PEFT itself loads it."
        )
    return config


def _check_no_code(folder: Path) -> None:
    """Raises where a file of a checkpoint asks for code of its own, for another repository, or for an adapter."""
    if (folder / "config.json").is_file() and (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"{folder} has an adapter_config.json beside its config.json, which transformers would merge whatever base "
            "it is of. Remove it, or load the adapter from a folder of its own."
        )
    for name, keys in _REFUSED_KEYS.items():
        path = folder / name
        size = path.stat().st_size if path.is_file() else 0
        if size > _MAX_CONFIG_BYTES and name in ("config.json", "generation_config.json"):
            raise ValueError(f"{path}: expected a config of a few KiB, but got {size:,} bytes. Do not use it.")
        content = _read_json(path) if size else {}
        asked = [key for key in keys if content.get(key) not in (None, False, {}, [])]
        asked += [key for key, value in content.items() if key.endswith("_implementation") and "/" in str(value)]
        # What a processor of this package names is its own code, which is not read
        auto_map = content.get("auto_map") if name == "tokenizer_config.json" else None
        asked += [] if not auto_map or set(auto_map) == {"AutoProcessor"} else ["auto_map"]
        if asked:
            raise ValueError(
                f"{path} asks for code or files from elsewhere ({', '.join(asked)}), which is never loaded here. Do "
                "not use this checkpoint unless you know who made it."
            )
    config = folder / "config.json"
    kind = _read_json(config).get("model_type") if config.is_file() else "gavamoe"
    if kind != "gavamoe":
        raise ValueError(f"{config}: expected a checkpoint of this package, but its model_type is {str(kind)[:40]!r}.")


@torch.no_grad()
def _check_finite(model: torch.nn.Module, folder: Path) -> None:
    """
    Raises for weights with NaN or infinity. A training that diverged leaves them everywhere, so that the smaller
    tensors tell, and the others need not be read from disk before they are used.
    """
    for name, value in model.named_parameters():
        is_read = value.numel() <= _FEW_ELEMENTS and value.is_floating_point() and not value.is_meta
        if is_read and not value.isfinite().all():
            raise ValueError(
                f"Expected finite weights in {folder}, but {name} holds NaN or infinity: a training that diverged? "
                "Load another checkpoint."
            )


def check_checkpoint(folder: Path, needed: tuple[str, ...] = _NEEDED_FILES) -> None:
    """Raises where a checkpoint folder lacks a file, has a truncated one, or asks for code, naming it."""
    for name in needed:
        if name.endswith(".json"):
            _require_file(folder / name)
            _read_json(folder / name)
    _check_no_code(folder)
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            shards = sorted(set(_read_json(index)["weight_map"].values()))
            outside = [shard for shard in shards if Path(shard).name != shard or shard in ("", "..")]
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(
                f"{index} is not an index of weights: no `weight_map`. Save or download it again."
            ) from error
        if outside:
            raise ValueError(f"{index}: expected names of files in its folder, but got {outside[0]!r}. Do not use it.")
    else:
        shards = [name for name in needed if name.endswith(".safetensors")]
    for shard in shards:
        _require_file(folder / shard)
        check_safetensors(folder / shard)


def _require_file(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(
            f"The checkpoint {path.parent} lacks {path.name}. Save it again with `save_pretrained` of model and "
            "processor, or download it whole."
        )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: truncated? ({error}) Save it again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, but got a {type(content).__name__}. Save it again.")
    return content
