"""What the site needs beyond mkdocs: links to files beside docs/, and Hugging Face's style of docstrings."""

import re
from typing import Any

import griffe

_NO_MARKS = str.maketrans("", "", "`*")


def on_page_markdown(markdown: str, config: Any, **_: Any) -> str:
    """
    Links to files beside docs/, such as examples, lead to the repository where `repo_url` names it. Without it, they
    are the file's path.
    """

    def replace(link: re.Match) -> str:
        text, path = link.groups()
        if config.repo_url:
            return f"[{text}]({config.repo_url.rstrip('/')}/blob/HEAD/{path})"
        return f"`{path}`" if text.strip("`") in path else f"{text} (`{path}`)"

    return re.sub(r"\[([^\]]+)\]\(\.\./([^)#]+)\)", replace, markdown)


class HuggingFaceStyle(griffe.Extension):
    """Takes the marks out of docstrings that Google's style, which is close, would show as they stand."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is None:
            return
        # [`GaVaMoEConfig`], [`~datasets.Dataset`]
        text = re.sub(r"\[`~?(?:[\w.]+\.)?(\w+)`\](?!\()", r"`\1`", obj.docstring.value)
        # name (`int`, *optional*, defaults to 10): or user (`str`), item (`str`):
        text = re.sub(r"^( +)(\w+(?:, \w+)* \(`.*?)\):", _argument, text, flags=re.MULTILINE)
        # Returns: `list[str]`: what it is; Raises: `ValueError`, `OSError`: when
        obj.docstring.value = re.sub(r"^( +)(`[^`\n]+`(?:,? (?:or )?`[^`\n]+`)*):", _type, text, flags=re.MULTILINE)


def _argument(match: re.Match) -> str:
    indent, described = match.groups()
    names, types = zip(*(one.split(" (", 1) for one in described.split("), ")), strict=True)
    return f"{indent}{', '.join(names)} ({', '.join(dict.fromkeys(types))}):".translate(_NO_MARKS)


def _type(match: re.Match) -> str:
    return f"{match[1]}{match[2]}:".translate(_NO_MARKS)
