"""Loads checkpoints with this package's own code, and says what is wrong with one that cannot be loaded."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel

from .modeling_gavamoe import GaVaMoEForCausalLM
from .processing_gavamoe import GaVaMoEProcessor
from .upcycling_gavamoe import check_safetensors

_PROCESSOR_FILES = ("processor_config.json", "tokenizer_config.json", "tokenizer.json")
_NEEDED_FILES = ("config.json", *_PROCESSOR_FILES, "model.safetensors")
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
    folder = Path(path_or_id)
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        check_checkpoint(folder, _ADAPTER_FILES)
        return load_adapter(folder, base_model, **kwargs).eval(), GaVaMoEProcessor.from_pretrained(folder)
    if folder.is_dir():
        check_checkpoint(folder)
    elif folder.exists() or str(path_or_id).startswith(("/", ".", "~")):
        raise FileNotFoundError(f"Expected a checkpoint folder or a Hub id, but there is no folder {path_or_id}.")
    try:
        model, loaded = GaVaMoEForCausalLM.from_pretrained(path_or_id, **kwargs, output_loading_info=True)
        if loaded["missing_keys"]:
            raise ValueError(
                f"Expected all weights of the model that config.json describes in {path_or_id}, but "
                f"{len(loaded['missing_keys'])} are missing, such as {min(loaded['missing_keys'])}, and would be "
                "random. Save or download config and weights again, together."
            )
        processor = GaVaMoEProcessor.from_pretrained(path_or_id, **kwargs)
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
    if base_model is None:
        beside = Path(adapter).parent / "base_model"
        named = PeftConfig.from_pretrained(str(adapter)).base_model_name_or_path
        base_model = beside if beside.is_dir() else named
    if base_model is not None and Path(base_model).is_dir():
        check_checkpoint(Path(base_model), ("config.json", "model.safetensors"))
    try:
        model = GaVaMoEForCausalLM.from_pretrained(base_model or "", **kwargs)
    except OSError as error:
        raise FileNotFoundError(
            f"Expected the base model of the adapter {adapter} at {str(base_model)!r}, but it could not be loaded. "
            f"Pass its folder as `base_model`. ({error})"
        ) from error
    return PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()


def check_checkpoint(folder: Path, needed: tuple[str, ...] = _NEEDED_FILES) -> None:
    """Raises where a checkpoint folder lacks a file or has a truncated one, naming it."""
    for name in needed:
        if name.endswith(".json"):
            _require_file(folder / name)
            _read_json(folder / name)
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
