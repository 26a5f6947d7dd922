"""
Explains pairs with a checkpoint that is loaded through the Auto classes: `gavamoe_hf` need not be installed.

    python examples/explain.py --model outputs/quickstart
    python examples/explain.py --model outputs/quickstart --user user_003 --item item_005 --rating 5
"""

from dataclasses import dataclass, field

from transformers import AutoModel, AutoProcessor
from trl import TrlParser


@dataclass
class ScriptArguments:
    model: str = field(metadata={"help": "Folder or Hub id of a checkpoint, whose code is run."})
    user: list[str] | None = field(default=None, metadata={"help": "Raw user ids, one for each item."})
    item: list[str] | None = field(default=None, metadata={"help": "Raw item ids, one for each user."})
    rating: float | None = field(default=None, metadata={"help": "Rating to explain; the predicted one by default."})
    features: list[str] | None = field(
        default=None, metadata={"help": "Features to talk about; by default those that training knew the item by."}
    )
    num_pairs: int = field(default=3, metadata={"help": "Pairs of known ids to explain where no ids are given."})
    max_new_tokens: int = field(default=40, metadata={"help": "Most tokens of an explanation."})


def main(args: ScriptArguments) -> None:
    model = AutoModel.from_pretrained(args.model, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(args.model, trust_remote_code=True)
    users = args.user or processor.users[: args.num_pairs]
    items = args.item or processor.items[: len(users)]
    decoding = {"do_sample": False, "max_new_tokens": args.max_new_tokens}

    for user, item in zip(users, items, strict=True):
        # By raw id: the processor writes the prompt
        explained = model.explain(
            processor, user=user, item=item, rating=args.rating, features=args.features, **decoding
        )[0]
        print(f"\n{user}, {item}")
        print(f"  explanation       {explained.explanation}")
        print(f"  named features    {', '.join(explained.features) or 'none'}")
        print(f"  predicted rating  {explained.predicted_rating:.2f}")

        # By index: the rows of the model's tables, and the prompt that the checkpoint stores
        user_id, item_id = processor.user_index(user), processor.item_index(item)
        report = model.routing_report(user_id, item_id)
        gate = report.gate_index[0].item()
        print(f"  cluster and gate  {gate} (probability {report.cluster_posterior[0, gate]:.2f})")
        if report.expert_share is not None:
            for layer, shares in enumerate(report.expert_share[0].tolist()):  # [experts]
                most_used = sorted(range(len(shares)), key=shares.__getitem__, reverse=True)[:3]
                experts = ", ".join(f"{expert} ({shares[expert]:.0%})" for expert in most_used)
                print(f"  layer {layer:<3} experts {experts}")
        tokens = model.generate(user_id=user_id, item_id=item_id, **decoding)
        prompt_length = max(map(len, model.config.stored_prompts.values()))
        text = processor.batch_decode(tokens[:, prompt_length:], skip_special_tokens=True)[0]
        print(f"  by index          {text.strip()}")


if __name__ == "__main__":
    (script_args,) = TrlParser(ScriptArguments).parse_args_and_config()
    main(script_args)
