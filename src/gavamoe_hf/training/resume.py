"""Where an interrupted run goes on."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open
from transformers.trainer import TRAINER_STATE_NAME

from ..upcycling_gavamoe import check_safetensors

# What the sizes of a tensor are, by the end of its name
_SIZES = {
    "mlp.gate.weight": "clusters, experts, hidden size",
    "mlp.experts.gate_up_proj": "experts, twice the width of one, hidden size",
    "mlp.experts.down_proj": "experts, hidden size, width of one",
    "mixture.means": "clusters, latent size",
    "user_embeddings.weight": "users, embedding size",
    "item_embeddings.weight": "items, embedding size",
}


@torch.no_grad()
def check_finite(model: torch.nn.Module) -> None:
    """Raises `ValueError` for weights that hold NaN or infinity, before they are saved."""
    broken = [
        name for name, value in model.named_parameters() if value.is_floating_point() and not value.isfinite().all()
    ]
    if broken:
        raise ValueError(
            f"The weights are no longer finite ({broken[0]} and {len(broken) - 1} more): the training has diverged, "
            "and they are not saved. Lower the learning rate."
        )


def last_complete_checkpoint(folder: Path) -> str | None:
    """
    The newest `checkpoint-STEP` of a trainer's folder that was written whole, or `None`.

    The trainer writes its state last, so that a checkpoint without it, or with a part of it, is one during whose
    writing the run ended.
    """
    checkpoints = [path.parent for path in folder.glob(f"checkpoint-*/{TRAINER_STATE_NAME}") if _is_whole(path)]
    steps = {int(path.name.rpartition("-")[2]): path for path in checkpoints}
    return str(steps[max(steps)]) if steps else None


def _is_whole(state: Path) -> bool:
    try:
        json.loads(state.read_text(encoding="utf-8"))
    except ValueError:
        return False
    return True


def check_fits(checkpoint: Path, model: torch.nn.Module) -> None:
    """
    Compares the sizes of a checkpoint's tensors with those of the model that is to go on from it, before any is read.

    Raises:
        `ValueError`: for a tensor of another size, or a truncated file.
    """
    sizes = {_saved_name(name): tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for path in sorted(checkpoint.glob("*.safetensors")):
        check_safetensors(path)
        with safe_open(path, framework="pt") as file:
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (not a dict)
        # The gates first, which say the most
        for name in sorted(found, key=lambda name: "mlp.gate" not in name):
            if name in sizes and found[name] != sizes[name]:
                meaning = next((f" ({text})" for end, text in _SIZES.items() if name.endswith(end)), "")
                raise ValueError(
                    f"Expected {name} to be {sizes[name]}{meaning}, as in the model to be trained, but in the "
                    f"checkpoint {checkpoint} it is {found[name]}. Resume with the options of the run that left it."
                )


def _saved_name(name: str) -> str:
    """The name under which PEFT saves a tensor of its adapter "default"."""
    return name.replace(".modules_to_save.default", "").replace(".default.", ".")
