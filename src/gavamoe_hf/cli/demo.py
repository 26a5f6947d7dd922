"""`gavamoe demo`."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..version import install_hint
from .arguments import CommandParser


@dataclass
class DemoArguments:
    """Options of `gavamoe demo`."""

    model: str = field(metadata={"help": "Folder or Hub id of a checkpoint."})
    dataset: str | None = field(
        default=None,
        metadata={
            "help": "The data that the model was trained on, as for `gavamoe train`: shows the users' histories, and "
            "recommends only what they have not rated."
        },
    )
    column_mapping: list[str] | None = field(
        default=None, metadata={"help": "Names of columns that differ, as for `gavamoe train`."}
    )
    split_seed: int = field(default=0, metadata={"help": "Seed of a random split, as for `gavamoe train`."})
    synthetic_groups: int = field(default=3, metadata={"help": 'Planted groups of users of "synthetic".'})
    title: str = field(default="Explained recommendations", metadata={"help": "Heading of the page."})
    top_k: int = field(default=10, metadata={"help": "Items to recommend."})
    max_new_tokens: int = field(default=40, metadata={"help": "Most tokens of an explanation. Paper: 30."})
    device: str = field(default="auto", metadata={"help": "Where the model runs: auto, cpu, cuda, cuda:1, mps, ..."})
    host: str = field(
        default="127.0.0.1",
        metadata={"help": "Address to serve at; 0.0.0.0 lets other machines in, which needs no password."},
    )
    port: int = field(default=7860, metadata={"help": "Port to serve at."})
    share: bool = field(
        default=False, metadata={"help": "Also open a public link through Gradio's servers, which needs a network."}
    )


def run(argv: list[str]) -> None:
    """Serves the page until it is interrupted."""
    (args,) = CommandParser(DemoArguments, prog="gavamoe demo").parse(argv)
    try:
        from ..demo.page import build_page, launch_page
    except ImportError as error:
        raise ImportError(
            f"Expected Gradio for the page, but it cannot be imported ({error}). {install_hint('demo')}"
        ) from error
    import torch

    from ..demo import DemoService
    from ..loading import load_checkpoint

    model, processor = load_checkpoint(args.model)
    device = args.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    service = DemoService(
        model.to(device),
        processor,
        None if args.dataset is None else _read_records(args, model.config.rating_levels),
        top_k=args.top_k,
        max_new_tokens=args.max_new_tokens,
    )
    launch_page(build_page(service, args.title), server_name=args.host, server_port=args.port, share=args.share)


def _read_records(args: DemoArguments, rating_levels: list[float]):
    from ..training.pipeline import DataArguments, read_data

    records, _ = read_data(
        DataArguments(
            dataset=args.dataset,
            column_mapping=args.column_mapping,
            rating_levels=rating_levels,
            # No model knows them, and training has said so
            unknown_held_out="drop",
            split_seed=args.split_seed,
            synthetic_groups=args.synthetic_groups,
        )
    )
    return records["train"]
