"""
The mixture-of-experts layer beside what it has to compare with, in turns: transformers' Mixtral block of the same sizes
with its best experts implementation, and a dense SwiGLU layer with as many active parameters.

    OMP_NUM_THREADS=1 python benchmarks/moe_layer.py --threads 1
    OMP_NUM_THREADS=1 python benchmarks/moe_layer.py --threads 1 --tokens 12288 --dtype bfloat16 --output layer.json
    OMP_NUM_THREADS=1 python benchmarks/moe_layer.py --threads 1 --profile

Hidden size 576, 12 experts of 128, top 2, 3 gates, CPU. Every round has tokens of its own, so that the experts' shares
differ from round to round as they do in training. Prints a table, and writes the rows as JSON with `--output`.
"""

import argparse
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timing import as_row, compare
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, MixtralConfig
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from gavamoe_hf import GaVaMoEConfig
from gavamoe_hf.evaluation.predict import write_json
from gavamoe_hf.experts_gavamoe import SORTED_MM
from gavamoe_hf.modeling_gavamoe import GaVaMoEMultiGateRouter, GaVaMoESparseMoeBlock

HIDDEN, WIDTH, EXPERTS, TOP_K, GATES = 576, 128, 12, 2, 3
ROWS = 32  # samples of a batch, each with a gate of its own
MIXTRAL_TARGET, DENSE_TARGET, ROUTER_TARGET = 1.0, 1.3, 1.05
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class SingleGate(nn.Module):
    """A router with one gate, a linear layer: the least that a router can cost."""

    def __init__(self, router: GaVaMoEMultiGateRouter):
        super().__init__()
        self.top_k = router.top_k
        self.weight = nn.Parameter(router.weight.detach()[0].clone())

    def forward(self, hidden_states: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor, ...]:
        logits = F.linear(hidden_states.flatten(0, 1), self.weight)
        weights, index = logits.softmax(dim=-1, dtype=torch.float32).topk(self.top_k, dim=-1)
        return logits, (weights / weights.sum(dim=-1, keepdim=True)).to(logits.dtype), index


def build_layer(dtype: torch.dtype, experts: int = EXPERTS, gates: int = GATES) -> GaVaMoESparseMoeBlock:
    config = GaVaMoEConfig(hidden_size=HIDDEN, moe_intermediate_size=WIDTH, num_experts=experts, num_clusters=gates)
    config._experts_implementation = SORTED_MM
    return filled(GaVaMoESparseMoeBlock(config), dtype)


def build_mixtral(dtype: torch.dtype, implementation: str) -> MixtralSparseMoeBlock:
    config = MixtralConfig(
        hidden_size=HIDDEN, intermediate_size=WIDTH, num_local_experts=EXPERTS, num_experts_per_tok=TOP_K
    )
    config._experts_implementation = implementation
    return filled(MixtralSparseMoeBlock(config), dtype)


def filled(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.05)
    return module.to(dtype)


class Call:
    """Forward, or forward and backward, of one module on the next of a few batches."""

    def __init__(self, module: nn.Module, tokens: int, backward: bool, dtype: torch.dtype, takes_gates: bool = True):
        self.module, self.backward = module, backward
        draw = torch.Generator().manual_seed(0)
        rows = ROWS if tokens % ROWS == 0 else tokens
        gates = module.gate.weight.shape[0] if takes_gates and module.gate.weight.dim() == 3 else 1
        hidden = torch.randn(4, rows, tokens // rows, HIDDEN, generator=draw)
        self.batches = itertools.cycle(
            [
                (states.to(dtype).requires_grad_(backward), *[index] * takes_gates)
                for states, index in zip(hidden, torch.randint(gates, (4, rows), generator=draw), strict=True)
            ]
        )
        self.direction = torch.randn(rows, tokens // rows, HIDDEN, generator=draw).to(dtype)

    def __call__(self) -> None:
        batch = next(self.batches)
        if not self.backward:
            with torch.no_grad():
                self.module(*batch)
            return
        self.module(*batch).backward(self.direction)
        for tensor in (batch[0], *self.module.parameters()):
            tensor.grad = None


def best_mixtral(tokens: int, backward: bool, dtype: torch.dtype) -> tuple[str, Call]:
    """The fastest of transformers' implementations for these tokens."""
    # batched_mm copies the weights of an expert for each choice, gigabytes for many tokens
    names = ["eager", "grouped_mm"] + ["batched_mm"] * (tokens <= 64)
    calls = {name: Call(build_mixtral(dtype, name), tokens, backward, dtype, takes_gates=False) for name in names}
    best = names[0]
    for name in names[1:]:
        if compare(calls[name], calls[best], rounds=3)["processor_ratio"] < 1:
            best = name
    return best, calls[best]


def measure_layer(tokens: int, dtype_name: str, rounds: int) -> list[dict[str, Any]]:
    """The layer against Mixtral's block, and against a dense layer of the same active parameters."""
    dtype, rows = _DTYPES[dtype_name], []
    dense = filled(LlamaMLP(LlamaConfig(hidden_size=HIDDEN, intermediate_size=TOP_K * WIDTH)), dtype)
    for backward in (False, True):
        name = f"MoE layer, {tokens:,} tokens, {dtype_name}, forward{' and backward' if backward else ''}"
        layer = Call(build_layer(dtype), tokens, backward, dtype)
        implementation, mixtral = best_mixtral(tokens, backward, dtype)
        # The targets are for prefill and training: few tokens read the weights of more experts than they use fully
        targets = (MIXTRAL_TARGET, DENSE_TARGET) if tokens >= 1536 else (None, None)
        rows.append(as_row(name, f"Mixtral block, {implementation}", compare(layer, mixtral, rounds), targets[0]))
        reference = Call(dense, tokens, backward, dtype, takes_gates=False)
        rows.append(as_row(name, "dense SwiGLU", compare(layer, reference, rounds), targets[1]))
    return rows


def measure_router(tokens: int, rounds: int) -> list[dict[str, Any]]:
    """Three gates, one for each sample, against a single linear gate: the whole layer, and the router alone."""
    layer = build_layer(torch.float32)
    single = build_layer(torch.float32)
    single.gate = SingleGate(single.gate)
    rows = []
    for backward in (False, True):
        what = f"{tokens:,} tokens, float32, forward{' and backward' if backward else ''}"
        calls = [Call(module, tokens, backward, torch.float32) for module in (layer, single)]
        rows.append(
            as_row(f"MoE layer of 3 gates, {what}", "single linear gate", compare(*calls, rounds), ROUTER_TARGET)
        )
        if not backward:
            for call in calls:
                call.module = call.module.gate
            rows.append(as_row(f"router alone of {GATES} gates, {what}", "single linear gate", compare(*calls, rounds)))
    return rows


def measure_growth(tokens: int, rounds: int) -> list[dict[str, Any]]:
    """Forward and backward with more experts, gates and tokens, against the layer as it is."""

    def call(number: int = tokens, **sizes: int) -> Call:
        return Call(build_layer(torch.float32, **sizes), number, True, torch.float32)

    larger = {
        **{
            f"{experts} experts": (f"{EXPERTS} experts", call(experts=experts))
            for experts in (2 * EXPERTS, 4 * EXPERTS)
        },
        **{f"{gates} gates": (f"{GATES} gates", call(gates=gates)) for gates in (1, 8)},
        **{f"{factor * tokens:,} tokens": (f"{tokens:,} tokens", call(factor * tokens)) for factor in (2, 4, 8)},
    }
    return [
        as_row(f"MoE layer, {what}, float32, forward and backward", reference, compare(function, call(), rounds))
        for what, (reference, function) in larger.items()
    ]


def measure(quick: bool = False) -> list[dict[str, Any]]:
    """
    Args:
        quick (`bool`, *optional*, defaults to `False`): Few tokens and rounds, to see that all of it runs.

    Returns:
        `list[dict]`: `name`, `reference`, `ratio`, `seconds`, `reference_seconds`, `processor_ratio` and, where there
        is one, `target`, the ratio at most.
    """
    tokens, rounds = (192, 1) if quick else (1536, 15)
    # Where the processor has no instructions for it, a dense layer takes ten times as long in bfloat16
    rows = measure_layer(tokens, "float32", rounds) + measure_layer(tokens, "bfloat16", max(rounds // 5, 1))
    for few in (1, 16, 64):
        rows += measure_layer(few, "float32", rounds)[:2]
    return rows + measure_router(tokens, rounds) + measure_growth(tokens, max(rounds // 3, 1))


def profile_layer(tokens: int, dtype: torch.dtype) -> str:
    """Where forward and backward of the layer and of the dense one spend their time, in milliseconds a call."""
    dense = filled(LlamaMLP(LlamaConfig(hidden_size=HIDDEN, intermediate_size=TOP_K * WIDTH)), dtype)
    calls: dict[str, Callable[[], None]] = {
        "MoE layer": Call(build_layer(dtype), tokens, True, dtype),
        "dense SwiGLU": Call(dense, tokens, True, dtype, takes_gates=False),
    }
    lines = []
    for name, call in calls.items():
        call()
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            for _ in range(10):
                call()
        events = sorted(profiled.key_averages(), key=lambda event: -event.self_cpu_time_total)
        lines.append(f"{name}: {sum(event.self_cpu_time_total for event in events) / 1e4:.2f}")
        lines += [
            f"  {event.self_cpu_time_total / 1e4:7.2f}  {event.count // 10:4d}  {event.key}" for event in events[:16]
        ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, help="This many alone, against Mixtral and dense, instead of all rows.")
    parser.add_argument("--dtype", choices=list(_DTYPES), default="float32", help="With --tokens or --profile.")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch's own number if not given.")
    parser.add_argument("--rounds", type=int, default=15, help="With --tokens.")
    parser.add_argument("--quick", action="store_true", help="Few tokens and rounds, to see that all of it runs.")
    parser.add_argument("--profile", action="store_true", help="Print where the time goes instead.")
    parser.add_argument("--output", type=Path, help="Where to write the rows as JSON.")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.profile:
        print(profile_layer(args.tokens or 1536, _DTYPES[args.dtype]))
        return
    rows = measure_layer(args.tokens, args.dtype, args.rounds) if args.tokens else measure(args.quick)
    print("| what | reference | ratio | by processor time | target | ms | reference's |")
    print("|---|---|" + "---:|" * 5)
    for row in rows:
        print(
            f"| {row['name']} | {row['reference']} | {row['ratio']:.2f} | {row['processor_ratio']:.2f} | "
            f"{row.get('target', '')} | {1e3 * row['seconds']:.2f} | {1e3 * row['reference_seconds']:.2f} |"
        )
    if args.output is not None:
        write_json(args.output, rows)


if __name__ == "__main__":
    main()
