"""The parser of the commands' options: transformers' own, without the seconds that importing transformers takes."""

from __future__ import annotations

import argparse
import difflib
import importlib.util
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

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

# Before values that begin as options do, while argparse looks at them: a character that no text has
_ESCAPE = "\x00"


class CommandParser(HfArgumentParser):
    """
    The options of a command, as the fields of dataclasses. Ids that begin with a dash are values; an unknown option is
    told with the nearest known one, and a missing one in two lines; YAML means what it says.
    """

    # Of the parser made last, for what is said of errors: see `as_options`
    known: frozenset[str] = frozenset()

    def parse(self, argv: Sequence[str], defaults: Mapping[str, Any] | None = None) -> tuple[Any, ...]:
        """
        The dataclasses of a command line.

        Args:
            argv (`Sequence[str]`): Options; `--config FILE.yaml` among them sets others, which the rest overrides.
            defaults (`Mapping[str, Any]`, *optional*): Values of fields, in place of their own defaults.

        Raises:
            `ValueError`: for a file of options that is no mapping, or has unknown or unfit ones.
        """
        argv = list(argv)
        CommandParser.known = frozenset(self._option_string_actions)
        self._set_defaults(dict(defaults or {}), "the defaults")
        if "--config" in argv[:-1] and "--config" not in self._option_string_actions:
            place = argv.index("--config")
            _, file = argv.pop(place), argv.pop(place)
            self._set_defaults(read_config(file), file)
        _, rest = self.parse_known_args(argv)
        if rest:
            self.error(f"unknown option {rest[0]}{self._nearest(rest[0].split('=')[0])}")
        return tuple(self.parse_args_into_dataclasses(argv))

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[argparse.Namespace, list[str]]:
        found, rest = super().parse_known_args(self._escape(list(args or [])), namespace)
        for name, value in vars(found).items():
            setattr(found, name, [_unescape(part) for part in value] if isinstance(value, list) else _unescape(value))
        return found, [_unescape(text) for text in rest]

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {_unescape(message)}\n`{self.prog} --help` lists the options.\n")

    def _escape(self, argv: list[str]) -> list[str]:
        """Marks values that begin with a dash: what is no option, and where one waits for a value no near one."""
        escaped: list[str] = []
        waiting = False
        for text in argv:
            is_option = text.split("=")[0] in self._option_string_actions
            is_typo = text.startswith("--") and (not waiting or self._nearest(text))
            if text.startswith("-") and not is_option and not is_typo:
                text, is_option = _ESCAPE + text, False
            waiting = is_option and "=" not in text
            escaped.append(text)
        return escaped

    def _nearest(self, option: str) -> str:
        names = [name for name in self._option_string_actions if name.startswith("--")]
        near = difflib.get_close_matches("--" + option.lstrip("-"), names, 1, cutoff=0.7)
        return f". Did you mean {near[0]}?" if near else ""

    def _set_defaults(self, values: dict[str, Any], source: str) -> None:
        for name, given in values.items():
            # Two for a truth value: --x and --no_x
            actions = [action for action in self._actions if action.dest == name]
            if not actions:
                raise ValueError(f"{source}: unknown option {name!r}{self._nearest(str(name))}")
            value, choices = _of_yaml(actions[0], given), actions[0].choices
            if choices is not None and value is not None and value not in choices:
                raise ValueError(f"{source}: expected {name} among {list(choices)}, but got {value!r}.")
            for action in actions:
                action.default, action.required = value, False


def read_config(file: str) -> dict[str, Any]:
    """The options in a YAML file; what is below `env` becomes variables of the environment, as in TRL's files."""
    import yaml

    with open(file, encoding="utf-8-sig") as text:
        try:
            config = yaml.safe_load(text)
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{file}: expected YAML, but got {str(error).splitlines()[0]}. Correct it.") from error
    if not isinstance(config, dict):
        raise ValueError(f"{file}: expected options as `name: value`, but got {type(config).__name__}.")
    for name, value in (config.pop("env", None) or {}).items():
        os.environ[name] = str(value)
    return config


def _of_yaml(action: argparse.Action, value: Any) -> Any:
    """A value of a YAML file as the option means it: `no` as a word, one name as a list of one, a mapping as pairs."""
    is_flag = action.const is True
    if action.nargs == "+":
        if isinstance(value, Mapping):
            value = [f"{key}={part}" for key, part in value.items()]
        value = value if isinstance(value, list) or value is None else [value]
        return value and [_of_yaml(argparse.Action([], "", type=action.type), part) for part in value]
    if isinstance(value, bool) and not is_flag:
        # YAML reads the words no and yes, off and on, as truth values
        value = "yes" if value else "no"
    if action.type is str and value is not None and not isinstance(value, dict | list):
        return str(value)
    return action.type(value) if action.type in (int, float) and isinstance(value, str) else value


def _unescape(value: Any) -> Any:
    return value.replace(_ESCAPE, "") if isinstance(value, str) else value


def as_options(message: str) -> str:
    """What the library says of its arguments, as the command line says it: `top_k` is --top_k, `x=False` --x false."""

    def replace(found: re.Match[str]) -> str:
        name, value = found["name"], found["value"]
        if f"--{name}" not in CommandParser.known:
            return found[0]
        return f"--{name}" if value is None else f"--{name} {value.lower()}"

    # Of Python alone: a command has the population for unknown ids of a file of pairs
    message = re.sub(r" ?Pass \w+=None [^.]*\.", "", message)
    return re.sub(r"`(?:--)?(?P<name>\w+)(?:=(?P<value>\w+))?`", replace, message)
