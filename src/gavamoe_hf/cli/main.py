"""Entry point of the `gavamoe` command: one module for each subcommand, imported when it is called."""

from __future__ import annotations

import difflib
import importlib
import logging
import sys
import warnings

COMMANDS = {
    "prepare": "make records of raw reviews",
    "train": "train both stages on a data set and leave a checkpoint that explains",
    "explain": "explain a pair with a checkpoint",
    "recommend": "recommend items to a user, and explain them",
    "clusters": "report on the clusters of checkpoints, and plot their latent space",
    "evaluate": "score a checkpoint, or any system's predictions file",
    "export": "write standard checkpoints (Mixtral, Qwen2-MoE) that inference engines serve",
    "demo": "serve a page that recommends and explains",
    "human-study": "draw a blinded study for human raters, and score their answers",
}


# What is kept of a command that was stopped
_GO_ON = {
    "train": "Go on with the same options and --resume_from_checkpoint true.",
    "explain": "With --pairs, the same command goes on where it was.",
    "evaluate": "The same command keeps the explanations that are there.",
    "prepare": "The same command goes on after the last finished part.",
}


def main(argv: list[str] | None = None) -> int:
    """
    Runs `gavamoe COMMAND ...`.

    Args:
        argv (`list[str]`, *optional*, defaults to the process's arguments): Command and options.

    Returns:
        `int`: exit status: 0, 1 where the input was at fault (the message is on standard error), 2 for wrong usage.
    """
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        _print_usage(sys.stdout)
        return 0 if argv else 2
    command, options = argv[0], argv[1:]
    if command == "--version":
        from ..version import __version__

        sys.stdout.write(f"gavamoe-hf {__version__}\n")
        return 0
    if command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, 1)
        hint = f". Did you mean {near[0]}?" if near else ""
        sys.stderr.write(f"gavamoe: expected a command among {', '.join(COMMANDS)}, but got {command!r}{hint}\n")
        return 2
    try:
        with warnings.catch_warnings():
            _be_quiet()
            run = importlib.import_module(f".{command.replace('-', '_')}", __package__).run
            if not {"-h", "--help"} & set(options):
                # With the Auto classes, which the package leaves to its command
                importlib.import_module("..auto", __package__)
                importlib.import_module("transformers.utils.logging").disable_progress_bar()
            run(options)
    except (ValueError, LookupError, OSError, ImportError) as error:
        from .arguments import as_options

        sys.stderr.write(f"gavamoe {command}: {type(error).__name__}: {as_options(str(error))}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write(f"\ngavamoe {command}: interrupted. {_GO_ON.get(command, '')}".rstrip() + "\n")
        return 130
    return 0


def _be_quiet() -> None:
    """Keeps what libraries say to those who program with them out of a command's output; errors stay."""
    for category in (DeprecationWarning, FutureWarning, PendingDeprecationWarning, UserWarning):
        warnings.simplefilter("ignore", category)
    # It names a kernel that it would have fetched
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    # Of heads that are tied to the embeddings, and tokens that a tokenizer has and a config has not
    for name in ("transformers.trainer", "transformers.trainer_utils"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _print_usage(stream) -> None:
    stream.write("usage: gavamoe COMMAND [options]\n\ncommands:\n")
    for name, text in COMMANDS.items():
        stream.write(f"  {name:13}{text}\n")
    stream.write("\n`gavamoe COMMAND --help` lists a command's options.\n")


if __name__ == "__main__":
    sys.exit(main())
