"""Where an interrupted run goes on."""

from __future__ import annotations

from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME


def last_complete_checkpoint(folder: Path) -> str | None:
    """
    The newest `checkpoint-STEP` of a trainer's folder that was written whole, or `None`.

    The trainer writes its state last, so that a checkpoint without it is one during whose writing the run ended.
    """
    checkpoints = [path.parent for path in folder.glob(f"checkpoint-*/{TRAINER_STATE_NAME}")]
    steps = {int(path.name.rpartition("-")[2]): path for path in checkpoints}
    return str(steps[max(steps)]) if steps else None
