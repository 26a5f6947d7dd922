"""Pushes what a run left, and the metrics module, to the Hub."""

from __future__ import annotations

import os
from pathlib import Path

from huggingface_hub import CommitInfo, HfApi

from .evaluation import METRICS_MODULE
from .loading import check_checkpoint

# Of a run's folder: the checkpoint, and what its card shows. Neither the predictions, which are beside texts of the
# data, nor the report on clusters, which says who is typical of them, nor `run.json`, which has paths of this machine;
# and nothing below the folder.
_PUSHED = (
    *("config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json", "*_gavamoe.py"),
    *("processor_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
    *("README.md", "metrics.json", "training_log.json", "latent_space.png"),
)


def push_checkpoint(
    folder: str | os.PathLike[str],
    repo_id: str,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str = "Upload checkpoint",
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

    Returns:
        [`~huggingface_hub.CommitInfo`]: its `oid` pins the checkpoint: `from_pretrained(repo_id, revision=oid)`.

    Raises:
        `FileNotFoundError`, `ValueError`: for a folder that is no whole checkpoint, before anything is pushed.
        `OSError`: what the Hub answered.
    """
    check_checkpoint(Path(folder))
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    return api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        allow_patterns=list(_PUSHED),
        ignore_patterns=["*/*"],
        revision=revision,
        commit_message=commit_message,
    )


def push_metrics(repo_id: str, private: bool | None = None, token: str | None = None) -> CommitInfo:
    """
    Pushes the metrics module as a Space, from where `evaluate.load(repo_id, profile)` gets it.

    Args:
        repo_id (`str`): `user/gavamoe_metrics`: the module is found by the name of its file.
        private (`bool`, *optional*): Whether a Space that is created is private.
        token (`str`, *optional*): Defaults to the one of `hf auth login`.

    Raises:
        `ValueError`: for a repository of another name; `OSError`: what the Hub answered.
    """
    name = Path(METRICS_MODULE).name
    if repo_id.split("/")[-1] != name:
        raise ValueError(f"Expected `repo_id` as user/{name}, but got {repo_id!r}.")
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, repo_type="space", space_sdk="gradio", private=private, exist_ok=True).repo_id
    return api.upload_folder(
        repo_id=repo_id, repo_type="space", folder_path=METRICS_MODULE, ignore_patterns=["__pycache__/*"]
    )


__all__ = ["push_checkpoint", "push_metrics"]
