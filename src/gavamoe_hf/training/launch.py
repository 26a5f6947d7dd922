"""What one of several processes of `accelerate launch` does by itself."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

# What launchers put into the environment: without it, a process is on its own
_LAUNCHERS_NAMES = {"WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
_LAUNCHERS_PREFIXES = ("ACCELERATE_", "FSDP_", "TORCHELASTIC_", "GROUP_", "ROLE_", "DEEPSPEED_")

_POLL_SECONDS = 0.5


def in_one_process(function: Callable[..., None], *arguments: Any) -> None:
    """
    Calls a function in a new process that knows nothing of the others, and waits for it.

    Raises:
        `torch.multiprocessing.ProcessRaisedException`: if it fails, with its traceback.
    """
    level = logging.getLogger().getEffectiveLevel()
    hidden = {name: value for name, value in os.environ.items() if _is_launchers(name)}
    for name in hidden:
        del os.environ[name]
    try:
        # Ends with this process, however that ends
        context = torch.multiprocessing.start_processes(
            _call, (function, arguments, level), nprocs=1, join=False, start_method="spawn"
        )
    finally:
        os.environ.update(hidden)
    while not context.join():
        pass


def _call(_: int, function: Callable[..., None], arguments: tuple[Any, ...], level: int) -> None:
    logging.basicConfig(level=level, format="%(message)s")
    function(*arguments)


def wait_for_file(path: Path) -> None:
    """Returns once the file is there, however long that takes: a barrier of the process group would time out."""
    while not path.is_file():
        time.sleep(_POLL_SECONDS)


def _is_launchers(name: str) -> bool:
    return name in _LAUNCHERS_NAMES or name.startswith(_LAUNCHERS_PREFIXES)
