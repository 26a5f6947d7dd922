"""`gavamoe explain`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

from .arguments import HfArgumentParser


@dataclass
class ExplainArguments:
    """Options of `gavamoe explain`."""

    model: str = field(metadata={"help": "Folder or Hub id of a checkpoint."})
    user: str = field(metadata={"help": "Raw user id."})
    item: str = field(metadata={"help": "Raw item id."})
    rating: float | None = field(
        default=None,
        metadata={"help": "Rating whose sentiment is explained; the predicted one if not given."},
    )
    features: list[str] | None = field(
        default=None,
        metadata={"help": "Features to talk about; those that the item is known by if not given."},
    )
    max_new_tokens: int = field(default=40, metadata={"help": "Most tokens of an explanation. Paper: 30."})
    temperature: float = field(default=0.0, metadata={"help": "Sampling temperature; 0 decodes greedily. Paper: 0.7."})
    seed: int = field(default=0, metadata={"help": "Seed of sampling."})
    json: bool = field(default=False, metadata={"help": "Print a JSON object instead of sentences."})


def run(argv: list[str]) -> None:
    """Prints an explanation of one pair."""
    parser = HfArgumentParser(ExplainArguments, prog="gavamoe explain")
    (args,) = parser.parse_args_into_dataclasses(argv)
    import json

    from transformers import set_seed

    from ..loading import load_checkpoint

    model, processor = load_checkpoint(args.model)
    set_seed(args.seed)
    sampling = {"do_sample": True, "temperature": args.temperature} if args.temperature > 0 else {"do_sample": False}
    explained = model.explain(
        processor,
        user=args.user,
        item=args.item,
        rating=args.rating,
        features=args.features,
        max_new_tokens=args.max_new_tokens,
        **sampling,
    )[0]
    if args.json:
        print(json.dumps(asdict(explained), ensure_ascii=False))
        return
    print(explained.explanation)
    posterior = explained.cluster_posterior[explained.cluster]
    print(
        f"predicted rating {explained.predicted_rating:.2f}, cluster {explained.cluster} "
        f"(probability {posterior:.2f}), features: {', '.join(explained.features) or 'none'}"
    )
