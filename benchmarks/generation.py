"""
Generation on a model of the shape of SmolLM2-135M, each figure beside its reference in the same run.

    python benchmarks/generation.py --output outputs/generation.json
    python benchmarks/generation.py --quick

What is compared: pairs at once with one by one, a prefix that prompts share computed once for each gate with once for
each row, a decode step of mixed gates with one of a single gate, compiled steps on a static cache with uncompiled ones
on a dynamic cache, and long prompts with short ones. Seconds are those of the fastest round, ratios are medians over
rounds, and a ratio below 1 is faster than its reference. Weights are random, and so are prompts.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import CompileConfig, DynamicCache

import gavamoe_hf.generation_gavamoe as generation
from gavamoe_hf import GaVaMoEConfig, GaVaMoEForCausalLM

# Of the prompt of SmolLM2's tokenizer and chat template; the sentiment is where prompts begin to differ
PROMPT_TOKENS, SHARED_TOKENS, NEW_TOKENS = 58, 28, 20
USER, ITEM = 49152, 49153


def build_model(num_hidden_layers: int = 30, **overrides: Any) -> GaVaMoEForCausalLM:
    """A model of the shape of SmolLM2-135M, its feed-forward layers cut into 12 experts, with random weights."""
    torch.manual_seed(0)
    config = {
        "vocab_size": 49154,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": num_hidden_layers,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "moe_intermediate_size": 128,
        "tie_word_embeddings": True,
        "num_users": 1000,
        "num_items": 1000,
        "vae_embedding_size": 64,
        "latent_size": 32,
        "num_clusters": 3,
        "user_token_id": USER,
        "item_token_id": ITEM,
        "pad_token_id": 0,
    }
    return GaVaMoEForCausalLM(GaVaMoEConfig(**{**config, **overrides})).eval()


def build_inputs(model: GaVaMoEForCausalLM, batch_size: int, prompt_tokens: int = PROMPT_TOKENS) -> dict[str, Any]:
    """Prompts that begin alike, of which every second is one token shorter, for pairs of all gates in turn."""
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(10, 49000, (batch_size, prompt_tokens), generator=generator)
    input_ids[:, :SHARED_TOKENS] = input_ids[0, :SHARED_TOKENS]
    input_ids[:, -11], input_ids[:, -8] = ITEM, USER
    attention_mask = torch.ones_like(input_ids)
    input_ids[1::2, 1:] = input_ids[1::2, :-1].clone()
    input_ids[1::2, 0], attention_mask[1::2, 0] = 0, 0
    pairs = torch.arange(batch_size) % 1000
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "user_id": pairs, "item_id": pairs}
    # Untrained, the rating model would send all pairs to one gate
    inputs["gate_index"] = pairs % model.config.num_clusters
    return {name: values.to(model.device) for name, values in inputs.items()}


def generate(model: GaVaMoEForCausalLM, inputs: dict[str, Any], new_tokens: int = NEW_TOKENS, **options: Any) -> Any:
    """Greedy tokens, as many for each row."""
    fixed = {"do_sample": False, "max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
    return model.generate(**inputs, **fixed, **options)


def one_by_one(model: GaVaMoEForCausalLM, inputs: dict[str, Any], count: int = 2) -> None:
    """As [`generate`], each row alone and without padding."""
    for row in range(count):
        first = int((inputs["attention_mask"][row] == 0).sum())
        alone = {name: values[row : row + 1] for name, values in inputs.items()}
        generate(model, {**alone, **{key: alone[key][:, first:] for key in ("input_ids", "attention_mask")}})


def without_shared_prefix(function: Callable[[], Any]) -> Any:
    """Calls a function while prefixes are computed for each row."""
    saved, generation._MIN_SAVED_TOKENS = generation._MIN_SAVED_TOKENS, 10**9
    try:
        return function()
    finally:
        generation._MIN_SAVED_TOKENS = saved


def seconds_of(function: Callable[[], Any], per: int = 1) -> float:
    """Seconds that a call takes, for each of the `per` things that it does."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / per


def interleave(calls: dict[str, tuple[Callable[[], Any], int]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call in each round, which has all of them one after the other."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, (function, per) in calls.items():
            seconds[name].append(seconds_of(function, per))
    return seconds


def row(
    name: str, reference: str, seconds: list[float], reference_seconds: list[float], target: float | None = None
) -> dict[str, Any]:
    """A line of the table, from the seconds of both in each round."""
    ratios = [one / other for one, other in zip(seconds, reference_seconds, strict=True)]
    line = {
        "name": name,
        "reference": reference,
        "ratio": statistics.median(ratios),
        "seconds": min(seconds),
        "reference_seconds": min(reference_seconds),
    }
    return line if target is None else {**line, "target": target}


def measure_throughput(model: GaVaMoEForCausalLM, rounds: int) -> list[dict[str, Any]]:
    """Pairs at once against one by one, with and without the shared prefix."""
    inputs = {size: build_inputs(model, size) for size in (8, 16, 64)}
    one_by_one(model, inputs[8], 1)
    calls = {"one": (lambda: one_by_one(model, inputs[64]), 2)}
    for size, batch in inputs.items():
        calls[str(size)] = (lambda batch=batch: generate(model, batch), size)
    calls["each row"] = (lambda: without_shared_prefix(lambda: generate(model, inputs[64])), 64)
    seconds = interleave(calls, rounds)
    lines = [
        row(
            f"generation, {size} pairs at once, per pair",
            "one by one",
            seconds[str(size)],
            seconds["one"],
            # 8 times the pairs per second
            1 / 8 if size == 64 else None,
        )
        for size in inputs
    ]
    prefix = f"generation, 64 pairs, prefix of {SHARED_TOKENS} of {PROMPT_TOKENS} tokens computed once a gate, per pair"
    return [*lines, row(prefix, "computed for each row", seconds["64"], seconds["each row"])]


def decode_step(model: GaVaMoEForCausalLM, batch_size: int = 64) -> Callable[[], Any]:
    """One decode step after a prompt, again and again."""
    inputs = build_inputs(model, batch_size)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
    # Rows of one token alone would all go to the experts that a single gate has for it
    token = torch.arange(100, 100 + batch_size, device=model.device)[:, None]
    mask = F.pad(inputs["attention_mask"], (0, 1), value=1)

    @torch.no_grad()
    def step() -> None:
        model(token, attention_mask=mask, past_key_values=cache, use_cache=True, gate_index=inputs["gate_index"])
        cache.crop(-1)

    return step


def measure_decode_step(model: GaVaMoEForCausalLM, rounds: int) -> list[dict[str, Any]]:
    """
    A decode step of mixed gates against the same model whose layers each have one gate, a linear layer. With random
    weights one gate has fewer experts to read than three, so a second reference takes what the three chose.
    """
    step = decode_step(model)
    gates = [layer.mlp.gate for layer in model.model.layers]
    chosen = {}
    hooks = [gate.register_forward_hook(lambda gate, _, output: chosen.update({gate: output[2]})) for gate in gates]
    step()
    for hook in hooks:
        hook.remove()

    def single_gate(gate: torch.nn.Module, same_experts: bool) -> Callable[..., Any]:
        weight = gate.weight[0]

        def forward(hidden_states: torch.Tensor, gate_index: torch.Tensor) -> tuple[torch.Tensor, ...]:
            logits = F.linear(hidden_states.flatten(0, 1), weight)
            weights, index = logits.softmax(dim=-1, dtype=torch.float32).topk(gate.top_k, dim=-1)
            weights = (weights / weights.sum(dim=-1, keepdim=True)).to(logits.dtype)
            return logits, weights, chosen[gate] if same_experts else index

        return forward

    def fixed(same_experts: bool) -> None:
        for gate in gates:
            gate.forward = single_gate(gate, same_experts)
        step()
        for gate in gates:
            del gate.forward

    calls = {
        "mixed": (step, 1),
        "fixed": (lambda: fixed(False), 1),
        "same experts": (lambda: fixed(True), 1),
    }
    interleave(calls, 1)
    seconds = interleave(calls, 6 * rounds)
    name, reference = "decode step of 64 rows, 3 gates", "one fixed gate, a linear layer"
    return [
        row(name, f"{reference}{more}", seconds["mixed"], seconds[key], 1.05)
        for key, more in (("fixed", ""), ("same experts", ", experts of the three"))
    ]


def measure_compiled(model: GaVaMoEForCausalLM, rounds: int) -> list[dict[str, Any]]:
    """
    Compiled decode steps on a static cache, and uncompiled ones, against uncompiled ones on a dynamic cache. The model
    has fewer layers than the others, since compiling takes a while.
    """
    inputs = build_inputs(model, 8)
    config = CompileConfig(fullgraph=True, mode="default")
    # By default only accelerators compile
    config._compile_all_devices = True
    options = {
        "dynamic": {},
        "static": {"cache_implementation": "static", "disable_compile": True},
        "compiled": {"cache_implementation": "static", "compile_config": config},
    }
    calls = {
        name: (lambda more=more: without_shared_prefix(lambda: generate(model, inputs, **more)), 8)
        for name, more in options.items()
    }
    tokens = [function() for function, _ in calls.values()]
    if not all(torch.equal(tokens[0], other) for other in tokens):
        raise RuntimeError("Expected the same tokens from all caches, but they differ.")
    seconds = interleave(calls, rounds)
    what = f"generation, 8 pairs, {model.config.num_hidden_layers} layers"
    return [
        row(f"{what}, {name}, per pair", "dynamic cache", seconds[key], seconds["dynamic"])
        for key, name in (("static", "static cache"), ("compiled", "static cache and compiled steps"))
    ]


def measure_growth(model: GaVaMoEForCausalLM, rounds: int) -> list[dict[str, Any]]:
    """The first token of longer prompts, against those of half the length."""
    lengths = (60, 120, 240)
    inputs = {length: build_inputs(model, 8, length) for length in lengths}
    calls = {
        str(length): (lambda batch=batch: without_shared_prefix(lambda: generate(model, batch, 1)), 1)
        for length, batch in inputs.items()
    }
    seconds = interleave(calls, rounds)
    return [
        row(f"prefill of 8 prompts of {2 * length} tokens", f"of {length} tokens", *map(seconds.get, (name, half)))
        for length, name, half in ((length, str(2 * length), str(length)) for length in lengths[:-1])
    ]


def measure(quick: bool = False) -> list[dict[str, Any]]:
    """
    Args:
        quick (`bool`, *optional*, defaults to `False`): Two layers and one round, to see that all of it runs.

    Returns:
        `list[dict]`: `name`, `reference`, `ratio`, `seconds`, `reference_seconds` and, where there is one, `target`,
        the ratio at most.
    """
    rounds = 1 if quick else 3
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build_model(2 if quick else 30).to(device)
    lines = measure_throughput(model, max(rounds - 1, 1))
    lines += measure_decode_step(model, rounds)
    lines += measure_growth(model, rounds)
    return lines + measure_compiled(build_model(2 if quick else 8).to(device), rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="Two layers and one round, to see that it runs.")
    parser.add_argument("--output", type=Path, help="Where to write the lines as JSON, if not printed.")
    args = parser.parse_args()
    text = json.dumps(measure(args.quick), indent=2)
    if args.output is None:
        print(text)
        return
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
