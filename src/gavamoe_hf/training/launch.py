"""What one of several processes of `accelerate launch` does by itself."""

from __future__ import annotations

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
        `RuntimeError`: if it fails; its own message is on standard error.
    """
    process = torch.multiprocessing.get_context("spawn").Process(target=function, args=arguments)
    hidden = {name: value for name, value in os.environ.items() if _is_launchers(name)}
    for name in hidden:
        del os.environ[name]
    try:
        process.start()
    finally:
        os.environ.update(hidden)
    process.join()
    if process.exitcode != 0:
        raise RuntimeError(f"{function.__name__} failed in a process of its own, with exit code {process.exitcode}.")


def wait_for_file(path: Path) -> None:
    """Returns once the file is there, however long that takes: a barrier of the process group would time out."""
    while not path.is_file():
        time.sleep(_POLL_SECONDS)


def _is_launchers(name: str) -> bool:
    return name in _LAUNCHERS_NAMES or name.startswith(_LAUNCHERS_PREFIXES)
