"""`gavamoe explain`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from .arguments import CommandParser


@dataclass
class ExplainArguments:
    """Options of `gavamoe explain`."""

    model: str = field(metadata={"help": "Folder or Hub id of a checkpoint."})
    user: str | None = field(default=None, metadata={"help": "Raw user id."})
    item: str | None = field(default=None, metadata={"help": "Raw item id."})
    rating: float | None = field(
        default=None,
        metadata={"help": "Rating whose sentiment is explained; the predicted one if not given."},
    )
    features: list[str] | None = field(
        default=None,
        metadata={"help": "Features to talk about; those that the item is known by if not given."},
    )
    pairs: str | None = field(
        default=None,
        metadata={
            "help": "Instead of `user` and `item`, a file of pairs: CSV with a header or JSON lines, with user, item "
            "and optionally rating and features."
        },
    )
    output: str | None = field(
        default=None,
        metadata={
            "help": "With `pairs`, where the explanations go, as JSON lines in the order of the pairs. A run that was "
            "killed goes on where it was when it is started again."
        },
    )
    batch_size: int = field(default=64, metadata={"help": "With `pairs`, how many are explained at once."})
    unknown: str = field(
        default="error",
        metadata={
            "help": "With `pairs`, what ids get that the checkpoint does not know: error, before anything is "
            "explained, or population, the answer for an average user or item.",
            "choices": ["error", "population"],
        },
    )
    overwrite_output: bool = field(
        default=False, metadata={"help": "Replace an `output` that is there, or was begun with other options."}
    )
    device: str | None = field(
        default=None, metadata={"help": "Device such as cpu or cuda:1; a GPU, where there is one, if not given."}
    )
    max_new_tokens: int = field(default=40, metadata={"help": "Most tokens of an explanation. Paper: 30."})
    temperature: float = field(default=0.0, metadata={"help": "Sampling temperature; 0 decodes greedily. Paper: 0.7."})
    seed: int = field(default=0, metadata={"help": "Seed of sampling."})
    json: bool = field(default=False, metadata={"help": "Print a JSON object instead of sentences."})

    def __post_init__(self) -> None:
        single = (self.user, self.item, self.rating, self.features)
        if self.pairs is None and self.output is None:
            if self.user is None or self.item is None:
                raise ValueError("Expected a pair or a file of them. Pass --user and --item, or --pairs and --output.")
        elif self.pairs is None or self.output is None:
            raise ValueError("Expected `--pairs` and `--output` together, but got one of them alone.")
        elif any(value is not None for value in single) or self.json:
            raise ValueError(
                "Expected one pair or a file of them, but got both. With `--pairs`, leave out --user, --item, "
                "--rating, --features, which are columns of the file, and --json."
            )
        if self.batch_size < 1:
            raise ValueError(f"Expected `--batch_size` of at least 1, but got {self.batch_size}.")


def run(argv: list[str]) -> None:
    """Prints an explanation of one pair, or writes those of a file of pairs."""
    (args,) = CommandParser(ExplainArguments, prog="gavamoe explain").parse(argv)
    import torch

    from ..loading import load_checkpoint

    model, processor = load_checkpoint(args.model)
    model.to(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    options: dict[str, Any] = {"max_new_tokens": args.max_new_tokens, "do_sample": args.temperature > 0}
    if args.temperature > 0:
        options["temperature"] = args.temperature
    if args.pairs is None:
        _explain_one(args, model, processor, options)
        return
    from ..batch_explain import explain_file
    from ..files import checkpoint_identity
    from ..loading import local_folder

    identity = {"model": args.model, **checkpoint_identity(local_folder(args.model))}
    explain_file(
        model,
        processor,
        args.pairs,
        args.output,
        batch_size=args.batch_size,
        unknown=args.unknown,
        seed=args.seed,
        overwrite=args.overwrite_output,
        identity=identity,
        **options,
    )


def _explain_one(args: ExplainArguments, model: Any, processor: Any, options: dict[str, Any]) -> None:
    import json

    from transformers import set_seed

    set_seed(args.seed)
    explained = model.explain(
        processor, user=args.user, item=args.item, rating=args.rating, features=args.features, **options
    )[0]
    title = processor.item_title(explained.item)
    if args.json:
        print(json.dumps(asdict(explained) | ({"item_title": title} if title else {}), ensure_ascii=False))
        return
    if title:
        print(f"{explained.item}, {title}")
    print(explained.explanation)
    posterior = explained.cluster_posterior[explained.cluster]
    print(
        f"predicted rating {explained.predicted_rating:.2f}, cluster {explained.cluster} "
        f"(probability {posterior:.2f}), features: {', '.join(explained.features) or 'none'}"
    )
