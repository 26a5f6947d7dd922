"""`gavamoe recommend`."""

from __future__ import annotations

from dataclasses import dataclass, field

from .arguments import CommandParser


@dataclass
class RecommendArguments:
    """Options of `gavamoe recommend`."""

    model: str = field(metadata={"help": "Folder or Hub id of a checkpoint."})
    user: str | None = field(default=None, metadata={"help": "Raw user id; the population if not given."})
    top_k: int = field(default=10, metadata={"help": "Number of items."})
    exclude: list[str] | None = field(
        default=None, metadata={"help": "Raw ids of more items not to recommend, besides those that the user has."}
    )
    include_known: bool = field(
        default=False, metadata={"help": "Recommend also what the user had when the model was trained."}
    )
    explain: bool = field(default=False, metadata={"help": "Explain each recommendation."})
    max_new_tokens: int = field(default=40, metadata={"help": "Most tokens of an explanation. Paper: 30."})
    json: bool = field(default=False, metadata={"help": "Print a JSON object instead of lines."})


def run(argv: list[str]) -> None:
    """Prints the items of the highest predicted rating."""
    (args,) = CommandParser(RecommendArguments, prog="gavamoe recommend").parse(argv)
    import json

    from ..loading import load_checkpoint

    model, processor = load_checkpoint(args.model)
    excluded = [processor.item_index(item) for item in args.exclude or []]
    best = model.recommend(
        processor.user_index(args.user), top_k=args.top_k, exclude=excluded, include_known=args.include_known
    )
    items = [processor.items[index] for index in best.item_id[0].tolist()]
    recommendations = [
        {"item": item, "predicted_rating": rating}
        for item, rating in zip(items, best.predicted_rating[0].tolist(), strict=True)
    ]
    for recommendation in recommendations:
        if title := processor.item_title(recommendation["item"]):
            recommendation["item_title"] = title
    if args.explain:
        explained = model.explain(
            processor, user=args.user, item=items, max_new_tokens=args.max_new_tokens, do_sample=False
        )
        for recommendation, explanation in zip(recommendations, explained, strict=True):
            recommendation["explanation"] = explanation.explanation
    if args.json:
        print(json.dumps({"user": args.user, "recommendations": recommendations}, ensure_ascii=False))
        return
    width = max(map(len, items))
    for recommendation in recommendations:
        line = f"{recommendation['predicted_rating']:.2f}  {recommendation['item']:{width}}"
        line += f"  {recommendation['item_title']}" if "item_title" in recommendation else ""
        print(f"{line}  {recommendation.get('explanation', '')}".rstrip())
