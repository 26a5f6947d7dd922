"""What all that write share: one writer at a time, and whether what an earlier one left is of the same run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from datasets import DatasetDict
from filelock import FileLock, Timeout


@contextmanager
def one_writer(path: Path, wait: bool = False) -> Iterator[None]:
    """
    Makes this process the only writer of a file or folder for as long as the context lasts. The operating system holds
    the lock for the process and ends it with the process, however that ends: a killed run leaves nothing to clean up.

    Args:
        path (`Path`): What is written; the lock is a file beside it, with `.lock` after its name.
        wait (`bool`, *optional*, defaults to `False`): Whether to wait for another writer.

    Raises:
        `FileExistsError`: while another process writes there.
    """
    file = path.with_name(path.name + ".lock")
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(file, timeout=-1 if wait else 0)
    try:
        lock.acquire()
    except Timeout as error:
        raise FileExistsError(
            f"{path} is being written by another process. Wait for it, or write elsewhere. (If there is none, as after "
            f"a crash on a network drive, delete {file}.)"
        ) from error
    try:
        yield
    finally:
        file.unlink(missing_ok=True)
        lock.release()


def differences(earlier: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """How the options of an earlier run differ from those of one that would go on with it; empty where they do not."""
    changed = [name for name in sorted({*earlier, *now}) if earlier.get(name) != now.get(name)]
    shown = [[_shown(options, name) for options in (earlier, now)] for name in changed]
    return ", ".join(f"{name} was {before}, now {after}" for name, (before, after) in zip(changed, shown, strict=True))


def _shown(options: Mapping[str, Any], name: str) -> str:
    return repr(options[name])[:100] if name in options else "not given"


def records_digest(records: DatasetDict) -> str:
    """A SHA-256 of all records, in their order, split by split."""
    digest = hashlib.sha256()
    for split in records.values():
        for name in split.column_names:
            digest.update(json.dumps([split.split and str(split.split), name, list(split[name])]).encode())
    return digest.hexdigest()


def checkpoint_identity(folder: Path) -> dict[str, Any]:
    """What tells a checkpoint from another in its place: its JSON and templates, and size and time of its weights."""
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.json"), *folder.glob("*.jinja")]):
        if "config" in path.name or path.name.startswith(("tokenizer", "chat_template")):
            digest.update(path.name.encode() + path.read_bytes())
    weights = sorted(folder.glob("*.safetensors"))
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in weights]
    return {"checkpoint_files": digest.hexdigest(), "weights_modified": [list(stat) for stat in stats]}
