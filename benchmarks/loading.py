"""
Loading a checkpoint beside loading a plain Llama of as many bytes, in turns, from the page cache.

    OMP_NUM_THREADS=1 python benchmarks/loading.py

SmolLM2-135M's shape with 12 experts of 128 a layer, in bfloat16 but for the rating model, and a `LlamaForCausalLM` of
the same hidden size whose feed-forward layers are as wide as takes the same bytes. `load_checkpoint` also reads the
processor, so its reference also reads the tokenizer.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from timing import as_row, compare
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

from gavamoe_hf import GaVaMoEConfig, GaVaMoEForCausalLM, GaVaMoEProcessor, load_checkpoint
from gavamoe_hf.data import SyntheticConfig, generate_synthetic
from gavamoe_hf.training.building import ModelArguments, build_processor

TARGET = 1.1
SMOLLM2 = dict(
    vocab_size=49152, hidden_size=576, num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True
)
EXPERTS = dict(num_local_experts=12, num_experts_per_tok=2, moe_intermediate_size=128)
COUNT = 1000  # of users, and of items


def save_models(folder: Path, layers: int) -> tuple[Path, Path]:
    """A GaVaMoE with its processor, and a Llama of as many parameters with the same tokenizer."""
    torch.manual_seed(0)
    sizes = SMOLLM2 | {"num_hidden_layers": layers}
    records = generate_synthetic(SyntheticConfig(num_users=12, num_items=10, records_per_user=6)).records["train"]
    tokenizer = build_processor(records, ModelArguments(vocab_size=400)).tokenizer
    users, items = ([f"{kind}_{number}" for number in range(COUNT)] for kind in ("user", "item"))
    processor = GaVaMoEProcessor(tokenizer, users=users, items=items, item_features=[["sound", "price"]] * COUNT)
    known = dict(num_users=COUNT, num_items=COUNT, user_token_id=5, item_token_id=6)
    config = GaVaMoEConfig(**known, **sizes, **EXPERTS)
    model = GaVaMoEForCausalLM(config).bfloat16()
    # As a checkpoint has it: what is read is what is in the file, nothing is cast
    model.rating_model.float()
    model.save_pretrained(folder / "gavamoe")
    processor.save_pretrained(folder / "gavamoe")
    with torch.device("meta"):
        body = LlamaForCausalLM(LlamaConfig(intermediate_size=1, **sizes)).num_parameters()
    rest = sum(parameter.nbytes for parameter in model.parameters()) // 2 - body
    # The matrices of width 1 are counted in the body
    width = 1 + round(rest / (3 * SMOLLM2["hidden_size"] * layers))
    LlamaForCausalLM(LlamaConfig(intermediate_size=width, **sizes)).bfloat16().save_pretrained(folder / "llama")
    tokenizer.save_pretrained(folder / "llama")
    return folder / "gavamoe", folder / "llama"


def measure(quick: bool = False, rounds: int = 15) -> list[dict[str, Any]]:
    """Rows of `from_pretrained` and `load_checkpoint`; of 6 layers instead of 30 where `quick`."""
    disable_progress_bar()
    layers = 6 if quick else 30
    with tempfile.TemporaryDirectory() as name:
        ours, llama = save_models(Path(name), layers)
        sizes = [(path / "model.safetensors").stat().st_size / 2**20 for path in (ours, llama)]
        reference = f"LlamaForCausalLM.from_pretrained, {sizes[1]:.0f} MiB"
        model = compare(
            lambda: GaVaMoEForCausalLM.from_pretrained(ours), lambda: LlamaForCausalLM.from_pretrained(llama), rounds
        )
        both = compare(
            lambda: load_checkpoint(ours),
            lambda: (LlamaForCausalLM.from_pretrained(llama), AutoTokenizer.from_pretrained(llama)),
            rounds,
        )
    name = f"{layers} layers, {sizes[0]:.0f} MiB"
    return [
        as_row(f"GaVaMoEForCausalLM.from_pretrained, {name}", reference, model, TARGET),
        as_row(f"load_checkpoint, {name}", f"{reference}, and AutoTokenizer", both, TARGET),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="6 layers instead of 30.")
    parser.add_argument("--rounds", type=int, default=15, help="Turns that are counted.")
    args = parser.parse_args()
    print(json.dumps(measure(args.quick, args.rounds), indent=2))


if __name__ == "__main__":
    main()
