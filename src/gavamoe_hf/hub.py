"""Pushes what a run left, and the metrics module, to the Hub."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import CommitInfo, HfApi

from .evaluation import METRICS_MODULE
from .loading import CHECKPOINT_FILES, check_checkpoint, first_line

# Of a run's folder: the checkpoint, and what its card shows. Neither the predictions, which are beside texts of the
# data, nor the report on clusters, which says who is typical of them, nor `run.json`, which has paths of this machine;
# and nothing below the folder.
_PUSHED = (
    *(*CHECKPOINT_FILES, "*_gavamoe.py", "requirements.txt", ".eval_results/*.yaml"),
    *("README.md", "metrics.json", "training_log.json", "latent_space.png", "training_curve.png"),
)


@contextmanager
def hub_errors(remedy: str) -> Iterator[None]:
    """Turns whatever fails between here and the Hub into one `ConnectionError` that says what to do."""
    try:
        yield
    except (FileNotFoundError, ValueError):
        raise
    except Exception as error:
        # httpx's errors are of no one kind, and what the Hub answers takes several lines
        raise ConnectionError(f"The Hub could not be reached, or refused: {first_line(error)} {remedy}") from error


def push_checkpoint(
    folder: str | os.PathLike[str],
    repo_id: str,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str = "Upload checkpoint",
    create_pr: bool = False,
) -> CommitInfo:
    """
    Pushes a checkpoint's folder in one commit: model, processor, code, card, and the scores that the card shows.

    Args:
        folder (`str` or `os.PathLike`): What `gavamoe train` or `save_pretrained` of model and processor left.
        repo_id (`str`): `user/name`, created if it is not there.
        private (`bool`, *optional*): Whether a repository that is created is private.
        token (`str`, *optional*): Defaults to the one of `hf auth login`.
        revision (`str`, *optional*, defaults to `"main"`): Branch to push to, made from main if it is not there.
        commit_message (`str`, *optional*, defaults to `"Upload checkpoint"`): Message of the commit.
        create_pr (`bool`, *optional*, defaults to `False`): Whether to open a pull request instead.

    Returns:
        [`~huggingface_hub.CommitInfo`]: its `oid` pins the checkpoint: `from_pretrained(repo_id, revision=oid)`.

    Raises:
        `FileNotFoundError`, `ValueError`: for a folder that is no whole checkpoint, before anything is pushed.
        `ConnectionError`: where the Hub cannot be reached or refuses, in one line.
    """
    check_checkpoint(Path(folder))
    api = HfApi(token=token)
    with hub_errors(f'Try again with `gavamoe_hf.hub.push_checkpoint("{folder}", "{repo_id}")`.'):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            allow_patterns=list(_PUSHED),
            # Nothing below the folder, whatever its name, but what is asked for
            ignore_patterns=["[!.]*/*", ".[!e]*/*"],
            revision=revision,
            commit_message=commit_message,
            create_pr=create_pr,
        )


def push_metrics(repo_id: str, private: bool | None = None, token: str | None = None) -> CommitInfo:
    """
    Pushes the metrics module as a Space, from where `evaluate.load(repo_id, profile)` gets it.

    Args:
        repo_id (`str`): `user/gavamoe_metrics`: the module is found by the name of its file.
        private (`bool`, *optional*): Whether a Space that is created is private.
        token (`str`, *optional*): Defaults to the one of `hf auth login`.

    Raises:
        `ValueError`: for a repository of another name; `ConnectionError`: where the Hub fails.
    """
    name = Path(METRICS_MODULE).name
    if repo_id.split("/")[-1] != name:
        raise ValueError(f"Expected `repo_id` as user/{name}, but got {repo_id!r}.")
    api = HfApi(token=token)
    with hub_errors("Try again later."):
        url = api.create_repo(repo_id, repo_type="space", space_sdk="gradio", private=private, exist_ok=True)
        return api.upload_folder(
            repo_id=url.repo_id, repo_type="space", folder_path=METRICS_MODULE, ignore_patterns=["__pycache__/*"]
        )


__all__ = ["push_checkpoint", "push_metrics"]
