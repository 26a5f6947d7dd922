"""Loads checkpoints with this package's own code, and says what is wrong with one that cannot be loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .modeling_gavamoe import GaVaMoEForCausalLM
from .processing_gavamoe import GaVaMoEProcessor
from .upcycling_gavamoe import check_safetensors

_NEEDED_FILES = ("config.json", "processor_config.json", "tokenizer_config.json", "tokenizer.json")


def load_checkpoint(path_or_id: str, **kwargs) -> tuple[GaVaMoEForCausalLM, GaVaMoEProcessor]:
    """
    Model (in evaluation mode) and processor of a checkpoint.

    Args:
        path_or_id (`str`): A folder, or a Hub id.
        kwargs: passed to `from_pretrained` of both (`revision`, `token`, ...).

    Raises:
        `FileNotFoundError`: for a folder that lacks a file, naming it; `ValueError`: for one with a truncated file.
    """
    folder = Path(path_or_id)
    if folder.is_dir():
        check_checkpoint(folder)
    elif folder.exists() or str(path_or_id).startswith(("/", ".", "~")):
        raise FileNotFoundError(f"Expected a checkpoint folder or a Hub id, but there is no folder {path_or_id}.")
    model = GaVaMoEForCausalLM.from_pretrained(path_or_id, **kwargs).eval()
    return model, GaVaMoEProcessor.from_pretrained(path_or_id, **kwargs)


def check_checkpoint(folder: Path) -> None:
    """Raises where a checkpoint folder lacks a file or has a truncated one, naming it."""
    for name in _NEEDED_FILES:
        _require_file(folder / name)
        if name.endswith(".json"):
            try:
                json.loads((folder / name).read_text(encoding="utf-8"))
            except ValueError as error:
                raise ValueError(f"{folder / name} is not valid JSON: truncated? ({error}) Save it again.") from error
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            shards = sorted(set(_read_json(index)["weight_map"].values()))
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(
                f"{index} is not an index of weights: no `weight_map`. Save or download it again."
            ) from error
    else:
        shards = ["model.safetensors"]
    for shard in shards:
        _require_file(folder / shard)
        check_safetensors(folder / shard)


def _require_file(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(
            f"The checkpoint {path.parent} lacks {path.name}. Save it again with `save_pretrained` of model and "
            "processor, or download it whole."
        )


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: truncated? ({error}) Save it again.") from error
