# Copyright 2026 The gavamoe-hf authors. Licensed under the Apache License, Version 2.0.
"""
The experts of a layer on a CPU: tokens are sorted by expert once for forward and backward, each expert's are gathered
just before its matrix product, and the results of a token are summed in one pass.

Shapes: N tokens, k choices of each, H hidden size, I width of an expert, R choices of experts that are here (N * k,
unless expert parallelism keeps some of the experts elsewhere).
"""

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

SORTED_MM = "gavamoe_sorted_mm"

# Choices per expert below which a path with less to do around its matrix products is faster
_FEW, _FEW_WIDENED, _FEW_COMPILED = 32, 2, 4


def sorted_mm_experts_forward(
    self: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """
    The experts implementation `"gavamoe_sorted_mm"`, which models on a CPU use unless told otherwise. On other devices,
    for few tokens, and in compiled graphs, which cannot hold a loop that depends on the routing, it hands over to
    another.

    Args:
        self (`nn.Module`): Experts with `num_experts`, `gate_up_proj`, `down_proj` and `act_fn`.
        hidden_states (`torch.Tensor` of shape `(N, H)`).
        top_k_index (`torch.LongTensor` of shape `(N, k)`): Experts from `num_experts` on are elsewhere, and left out.
        top_k_weights (`torch.Tensor` of shape `(N, k)`).

    Returns:
        `torch.Tensor` of shape `(N, H)`
    """
    arguments = (self, hidden_states, top_k_index, top_k_weights)
    choices_per_expert = top_k_index.numel() / self.num_experts
    if hidden_states.device.type != "cpu":
        return ALL_EXPERTS_FUNCTIONS["grouped_mm"](*arguments)
    if torch.compiler.is_compiling():
        # Compiled, the weights that batched_mm gathers are not copied
        name = "batched_mm" if choices_per_expert <= _FEW_COMPILED else "grouped_mm"
        return ALL_EXPERTS_FUNCTIONS[name](*arguments)
    if len(hidden_states) == 1:
        return _one_token(*arguments)
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else hidden_states.dtype
    has_products = _has_matrix_products(dtype)
    if choices_per_expert < (_FEW if has_products else _FEW_WIDENED):
        return ALL_EXPERTS_FUNCTIONS["grouped_mm"](*arguments)
    routes = _sort_by_expert(top_k_index, self.num_experts)
    return _SortedExperts.apply(
        hidden_states,
        top_k_weights,
        self.gate_up_proj,
        self.down_proj,
        *routes,
        self.act_fn,
        dtype if has_products else torch.float32,
    )


def _one_token(
    self: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    gate_up, down = self.gate_up_proj, self.down_proj  # under LoRA, a look-up computes them
    output = torch.zeros_like(hidden_states)
    for expert, weight in zip(top_k_index[0].tolist(), top_k_weights[0], strict=True):
        if expert < self.num_experts:
            gate, up = F.linear(hidden_states.to(gate_up.dtype), gate_up[expert]).chunk(2, dim=-1)
            weighted = F.linear(self.act_fn(gate) * up, down[expert]) * weight
            output = output + weighted.to(output.dtype)
    return output


@cache
def _has_matrix_products(dtype: torch.dtype) -> bool:
    # Processors that lack the instructions are several times slower in half precision than in single
    if dtype == torch.bfloat16:
        return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if dtype == torch.float16:
        return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_fp16_supported()
    return True


def _sort_by_expert(top_k_index: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The choices in the order of their experts [R], the place of each in it [N, k], and how many each expert has."""
    experts = top_k_index.reshape(-1)
    counts = torch.bincount(experts, minlength=num_experts)[:num_experts]
    num_rows = int(counts.sum())
    order = experts.argsort(stable=True)[:num_rows]
    # Choices of experts that are elsewhere point to the row after the last, which is zero
    place = torch.full_like(experts, num_rows).scatter_(0, order, torch.arange(num_rows))
    return order, place.view_as(top_k_index), counts


def _gather(states: torch.Tensor, token: torch.Tensor, counts: list[int]) -> Iterator[torch.Tensor]:
    """The states of each expert's tokens, which last until the next expert's."""
    # One buffer for all stays in the processor's cache
    buffer = states.new_empty(max(counts), states.shape[1])
    for of_expert in token.split(counts):
        yield torch.index_select(states, 0, of_expert, out=buffer[: len(of_expert)])


def _sum_choices(rows: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    """Adds up the rows of each token, [R + 1, H] -> [N, H]; the last row stands for experts that are elsewhere."""
    rows[-1] = 0
    return F.embedding_bag(place, rows, mode="sum")


class _SortedExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_states: torch.Tensor,
        top_k_weights: torch.Tensor,
        gate_up: torch.Tensor,
        down: torch.Tensor,
        order: torch.Tensor,
        place: torch.Tensor,
        counts: torch.Tensor,
        act_fn: Callable,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        token = order // place.shape[1]
        weights = top_k_weights.reshape(-1)[order, None].to(dtype)  # [R, 1]
        sizes = counts.tolist()
        projected = hidden_states.new_empty(len(order), gate_up.shape[1], dtype=dtype)
        gathered = _gather(hidden_states.to(dtype), token, sizes)
        for states, weight, rows in zip(gathered, gate_up.mT, projected.split(sizes), strict=True):
            torch.mm(states, weight.to(dtype), out=rows)
        gate, up = projected.chunk(2, dim=-1)
        # Weighted here rather than after the down projection, where rows are H wide instead of I
        activated = (act_fn(gate) * up).mul_(weights)  # [R, I]
        output = hidden_states.new_empty(len(order) + 1, down.shape[1], dtype=dtype)
        for states, weight, rows in zip(activated.split(sizes), down.mT, output[:-1].split(sizes), strict=True):
            torch.mm(states, weight.to(dtype), out=rows)
        ctx.save_for_backward(hidden_states, weights, gate_up, down, order, place, counts, token, projected)
        ctx.act_fn, ctx.weights_dtype = act_fn, top_k_weights.dtype
        return _sum_choices(output, place).to(hidden_states.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden_states, weights, gate_up, down, order, place, counts, token, projected = ctx.saved_tensors
        dtype = projected.dtype
        sizes = counts.tolist()
        grad_gate_up, grad_down = (
            torch.empty_like(weight) if needed else None
            for weight, needed in zip((gate_up, down), ctx.needs_input_grad[2:4], strict=True)
        )
        gate, up = projected.chunk(2, dim=-1)
        with torch.enable_grad():
            gate = gate.detach().requires_grad_()
            activated = ctx.act_fn(gate)
        product = activated.detach() * up
        weighted = product * weights  # [R, I]
        grad_weighted = torch.empty_like(weighted)
        gathered = _gather(grad_output.to(dtype), token, sizes)
        of_experts = zip(gathered, weighted.split(sizes), grad_weighted.split(sizes), strict=True)
        for expert, (grads, states, rows) in enumerate(of_experts):
            torch.mm(grads, down[expert].to(dtype), out=rows)
            _mm_into(grad_down, expert, grads.t(), states)
        grad_weights = product.mul_(grad_weighted).sum(dim=-1)  # [R]
        grad_product = grad_weighted.mul_(weights)
        grad_projected = torch.empty_like(projected)
        grad_gate, grad_up = grad_projected.chunk(2, dim=-1)
        torch.mul(grad_product, activated.detach(), out=grad_up)
        grad_gate.copy_(torch.autograd.grad(activated, gate, grad_product.mul_(up))[0])
        grad_rows = hidden_states.new_empty(len(order) + 1, hidden_states.shape[1], dtype=dtype)
        gathered = _gather(hidden_states.to(dtype), token, sizes)
        of_experts = zip(gathered, grad_projected.split(sizes), grad_rows[:-1].split(sizes), strict=True)
        for expert, (states, grads, rows) in enumerate(of_experts):
            torch.mm(grads, gate_up[expert].to(dtype), out=rows)
            _mm_into(grad_gate_up, expert, grads.t(), states)
        grad_hidden = _sum_choices(grad_rows, place).to(hidden_states.dtype)
        grad_top_k = place.new_zeros(place.numel(), dtype=ctx.weights_dtype)
        grad_top_k.scatter_(0, order, grad_weights.to(ctx.weights_dtype))
        return grad_hidden, grad_top_k.view_as(place), grad_gate_up, grad_down, *(None,) * 5


def _mm_into(grads: torch.Tensor | None, expert: int, left: torch.Tensor, right: torch.Tensor) -> None:
    """The weight gradient of one expert, zero for one without tokens; nothing for frozen weights."""
    if grads is not None and grads.dtype == left.dtype:
        torch.mm(left, right, out=grads[expert])
    elif grads is not None:
        grads[expert] = left @ right


ALL_EXPERTS_FUNCTIONS.register(SORTED_MM, sorted_mm_experts_forward)
