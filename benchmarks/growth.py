"""
How a stage-1 step and a recommendation grow with users and items.

    OMP_NUM_THREADS=1 python benchmarks/growth.py

A step is forward, backward and the trainer's fused AdamW on 512 pairs, over as many users as items; a recommendation is
the ten best items of one user. Each is beside the same with 1,000 of each, in turns. The encoder is 128 wide: a narrow
one, since the pairs' share of a step hides the tables'.
"""

import argparse
import json
from collections.abc import Callable
from typing import Any

import torch
from timing import as_row, compare

from gavamoe_hf import GaVaMoEConfig, GaVaMoEForCausalLM, GaVaMoERatingModel

SMALLEST = 1_000
ENCODER = dict(vae_embedding_size=128, vae_intermediate_size=512, vae_num_layers=1)
# Nothing is generated
DECODER = dict(vocab_size=16, hidden_size=16, num_hidden_layers=1, num_attention_heads=1, moe_intermediate_size=8)
BATCH_SIZE = 512


def make_step(count: int) -> Callable[[], None]:
    """A step of stage 1 with as many users and items, on the same number of pairs."""
    torch.manual_seed(0)
    model = GaVaMoERatingModel(GaVaMoEConfig(num_users=count, num_items=count, **ENCODER)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    users, items = (torch.randint(count, (BATCH_SIZE,)) for _ in range(2))
    rating = torch.randint(1, 6, (BATCH_SIZE,)).float()

    def step() -> None:
        model(user_id=users, item_id=items, rating=rating).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def make_recommendation(count: int) -> Callable[[], Any]:
    """Ten of as many items for a user."""
    torch.manual_seed(0)
    sizes = dict(num_users=SMALLEST, num_items=count, user_token_id=5, item_token_id=6)
    model = GaVaMoEForCausalLM(GaVaMoEConfig(**sizes, **ENCODER, **DECODER)).eval()
    return lambda: model.recommend(7, top_k=10)


def measure(quick: bool = False, counts: tuple[int, ...] = (10_000, 100_000), rounds: int = 3) -> list[dict[str, Any]]:
    """Rows of each count beside 1,000; of 10,000 alone where `quick`."""
    rows = []
    grown = {
        f"stage-1 step of {BATCH_SIZE} pairs, {{:,}} users and as many items": make_step,
        "recommend 10 of {:,} items": make_recommendation,
    }
    for name, make in grown.items():
        smallest = make(SMALLEST)
        for count in counts[:1] if quick else counts:
            timed = compare(make(count), smallest, rounds)
            rows.append(as_row(name.format(count), f"the same with {SMALLEST:,}", timed))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--rounds", type=int, default=3, help="Turns that are counted.")
    args = parser.parse_args()
    print(json.dumps(measure(counts=tuple(args.counts), rounds=args.rounds), indent=2))


if __name__ == "__main__":
    main()
