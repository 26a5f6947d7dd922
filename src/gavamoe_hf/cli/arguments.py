"""The parser of the commands' options: transformers' own, without the seconds that importing transformers takes."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import HfArgumentParser


def _load_parser() -> type[HfArgumentParser]:
    """
    `HfArgumentParser` from its file, which needs only the standard library and PyYAML, while any import from
    transformers runs the package's `__init__` first. Should the file move or come to need more, the import is the
    ordinary one.
    """
    package = importlib.util.find_spec("transformers")
    if package is not None and package.origin is not None:
        file = Path(package.origin).with_name("hf_argparser.py")
        spec = importlib.util.spec_from_file_location(f"{__package__}.hf_argparser", file)
        if spec is not None and spec.loader is not None:
            module = importlib.util.module_from_spec(spec)
            try:
                spec.loader.exec_module(module)
                return module.HfArgumentParser
            except (ImportError, OSError, AttributeError):
                pass
    from transformers import HfArgumentParser

    return HfArgumentParser


if not TYPE_CHECKING:
    HfArgumentParser = _load_parser()
