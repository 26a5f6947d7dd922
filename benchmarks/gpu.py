"""
What only a GPU shows, in bfloat16; no rows without one. Not run yet: there was no GPU at hand when it was written.

    python benchmarks/gpu.py

SmolLM2-135M's shape with 12 experts of 128, and where the memory is enough the paper's 8B: grouped against eager
experts, CUDA graphs against plain decoding, the rate of a training step's matrix products against that of one large
product, peak memory against a count by hand, and how often a decode step makes the host wait.
"""

import argparse
import json
import warnings
from collections.abc import Callable
from typing import Any

import torch
from timing import as_row, compare
from torch.utils.flop_counter import FlopCounterMode
from transformers import StaticCache

from gavamoe_hf import GaVaMoEConfig, GaVaMoEForCausalLM
from gavamoe_hf.presets import llama_3_1_8b_paper

SIZES = dict(num_users=1000, num_items=1000)
SMOLLM2 = dict(
    vocab_size=49152,
    hidden_size=576,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    tie_word_embeddings=True,
    num_local_experts=12,
    num_experts_per_tok=2,
    moe_intermediate_size=128,
    user_token_id=5,
    item_token_id=6,
)
ROWS, PROMPT_TOKENS, NEW_TOKENS = 32, 60, 64
_MIB = 2**20
_BYTES_FOR_8B = 40 * 2**30


def make_model(config: GaVaMoEConfig) -> GaVaMoEForCausalLM:
    torch.manual_seed(0)
    config.dtype = torch.bfloat16
    with torch.device("cuda"):
        model = GaVaMoEForCausalLM._from_config(config, dtype=torch.bfloat16)
    return model.eval()


def make_inputs(config: GaVaMoEConfig, rows: int = ROWS) -> dict[str, torch.Tensor]:
    input_ids = torch.randint(10, 10_000, (rows, PROMPT_TOKENS), device="cuda")
    input_ids[:, 20], input_ids[:, 21] = config.user_token_id, config.item_token_id
    pairs = {name: torch.randint(1000, (rows,), device="cuda") for name in ("user_id", "item_id")}
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), **pairs}


def synchronised(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Callable[[], None]:
    """The function with its arguments, ending when the GPU has."""

    def call() -> None:
        function(*args, **kwargs)
        torch.cuda.synchronize()

    return call


def peak_mib(function: Callable[[], Any]) -> float:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    function()
    return torch.cuda.max_memory_allocated() / _MIB


def experts_row(model: GaVaMoEForCausalLM, name: str, inputs: dict[str, torch.Tensor], rounds: int) -> dict[str, Any]:
    def forward(implementation: str) -> None:
        model.set_experts_implementation(implementation)
        with torch.no_grad():
            model(**inputs)

    timed = compare(synchronised(forward, "grouped_mm"), synchronised(forward, "eager"), rounds)
    model.set_experts_implementation("grouped_mm")
    return as_row(f"{name}, prefill, grouped_mm", "eager experts", timed)


def decoding_rows(
    model: GaVaMoEForCausalLM, name: str, inputs: dict[str, torch.Tensor], rounds: int
) -> list[dict[str, Any]]:
    options = dict(max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False)
    plain = synchronised(model.generate, **inputs, **options)
    # With a static cache on a GPU, generate compiles the decode step and captures it in a CUDA graph
    graph = synchronised(model.generate, **inputs, **options, cache_implementation="static")
    timed = compare(graph, plain, rounds, warmups=2)
    rates = [ROWS * NEW_TOKENS / timed[key] for key in ("seconds", "reference_seconds")]
    parameters = sum(parameter.nbytes for parameter in model.parameters()) / _MIB
    peak = peak_mib(plain)
    return [
        as_row(f"{name}, {ROWS} rows, static cache and CUDA graph", "plain decoding", timed),
        {
            "name": f"{name}, {ROWS} rows, decoding with a CUDA graph",
            "reference": "plain decoding",
            "ratio": rates[0] / rates[1],
            "value": rates[0],
            "reference_value": rates[1],
            "unit": "tokens/s",
        },
        memory_row(f"{name}, peak memory of decoding", "the parameters", peak, parameters),
    ]


def memory_row(name: str, reference: str, value: float, by_hand: float) -> dict[str, Any]:
    amounts = {"value": value, "reference_value": by_hand, "unit": "MiB"}
    return {"name": name, "reference": reference, "ratio": value / by_hand, **amounts}


def synchronisation_row(model: GaVaMoEForCausalLM, name: str) -> dict[str, Any]:
    """How often a decode step, with the gate known and a static cache, waits for the GPU: it should never."""
    gate = torch.zeros(ROWS, dtype=torch.long, device="cuda")
    token = torch.full((ROWS, 1), 10, device="cuda")
    cache = StaticCache(config=model.config, max_cache_len=PROMPT_TOKENS + 2)
    with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
        model(input_ids=token, gate_index=gate, past_key_values=cache)
        torch.cuda.synchronize()
        warnings.simplefilter("always")
        caught.clear()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            model(input_ids=token, gate_index=gate, past_key_values=cache)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    count = sum("synchroniz" in str(warning.message) for warning in caught)
    return {
        "name": f"{name}, host waits in a decode step",
        "reference": "none",
        "ratio": float(count),
        "target": 0,
        "value": count,
        "unit": "waits",
    }


def training_rows(model: GaVaMoEForCausalLM, name: str, inputs: dict[str, torch.Tensor], rounds: int) -> list[dict]:
    """Model FLOPs utilisation: the time of a step beside the time that its products take at a large one's rate."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    batch = inputs | {"labels": inputs["input_ids"], "rating": torch.full((ROWS,), 4.0, device="cuda")}

    def step() -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    with FlopCounterMode(display=False) as counter:
        step()
    size = 8192
    left, right = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    timed = compare(synchronised(step), synchronised(torch.mm, left, right), rounds, warmups=2)
    del left, right
    scale = counter.get_total_flops() / (2 * size**3)
    products = {**timed, "reference_seconds": scale * timed["reference_seconds"], "ratio": timed["ratio"] / scale}
    del products["processor_ratio"]
    peak = peak_mib(step)
    # Parameter, gradient and the two moments
    by_hand = 4 * sum(parameter.nbytes for parameter in model.parameters()) / _MIB
    model.eval()
    tokens = ROWS * PROMPT_TOKENS
    return [
        as_row(
            f"{name}, training step of {tokens:,} tokens (utilisation {1 / products['ratio']:.0%})",
            "its matrix products at the rate of one of 8,192",
            products,
        ),
        memory_row(f"{name}, peak memory of training", "parameters, gradients, moments", peak, by_hand),
    ]


def measure(quick: bool = False, rounds: int = 5) -> list[dict[str, Any]]:
    """Rows of both shapes, of the small one alone where `quick`; none without a GPU."""
    if not torch.cuda.is_available():
        return []
    model = make_model(GaVaMoEConfig(**SMOLLM2, **SIZES))
    inputs = make_inputs(model.config)
    name = "SmolLM2-135M's shape"
    rows = [
        experts_row(model, name, inputs, rounds),
        *decoding_rows(model, name, inputs, rounds),
        synchronisation_row(model, name),
        *training_rows(model, name, inputs, rounds),
    ]
    del model
    if not quick and torch.cuda.mem_get_info()[0] > _BYTES_FOR_8B:
        model = make_model(llama_3_1_8b_paper(**SIZES))
        inputs = make_inputs(model.config)
        rows += [experts_row(model, "8B", inputs, rounds), *decoding_rows(model, "8B", inputs, rounds)]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="The small shape alone.")
    parser.add_argument("--rounds", type=int, default=5, help="Turns that are counted.")
    args = parser.parse_args()
    print(json.dumps(measure(args.quick, args.rounds), indent=2))


if __name__ == "__main__":
    main()
