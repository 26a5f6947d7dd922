"""The negative log-likelihood of tokens and what is logged of them, in one pass over the logits."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

# Logits handled at once: on a CPU as many as stay in its cache, elsewhere enough to make up for starting kernels
_CHUNK_ELEMENTS = {"cpu": 2**20}
_CHUNK_ELEMENTS_ELSEWHERE = 2**26


class _TokenScores(torch.autograd.Function):
    """
    Cross-entropy by chunks of tokens. Besides the logits there is never a tensor of their size: neither their softmax
    nor a float32 copy is kept for the backward pass, which writes their gradient over them.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, targets: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        ctx.chunk_size = _chunk_size(logits)
        parts = []
        for chunk, target in zip(logits.split(ctx.chunk_size), targets.split(ctx.chunk_size), strict=True):
            highest, prediction = chunk.float().max(dim=-1, keepdim=True)  # [n, 1]
            shifted = chunk.float() - highest  # [n, V]
            target_score = shifted.gather(1, target[:, None])[:, 0]
            weights = shifted.exp()
            total = weights.sum(dim=-1)
            log_total = total.log()
            entropy = log_total - weights.mul_(shifted).sum(dim=-1) / total
            correct = (prediction[:, 0] == target).float()
            parts.append(torch.stack([log_total - target_score, entropy, correct, highest[:, 0] + log_total]))
        nll, entropy, correct, log_normaliser = torch.cat(parts, dim=1)
        ctx.save_for_backward(logits, targets, log_normaliser)
        ctx.mark_non_differentiable(entropy, correct)
        return nll, entropy, correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, nll_gradient: torch.Tensor, *_: torch.Tensor) -> tuple[torch.Tensor, None]:
        logits, targets, log_normaliser = ctx.saved_tensors
        columns = (logits, targets, log_normaliser, nll_gradient)
        for chunk, target, normaliser, gradient in zip(
            *(column.split(ctx.chunk_size) for column in columns), strict=True
        ):
            # (softmax - one-hot) * gradient, rounded once to the precision of the logits
            chunk_gradient = (chunk.float() - normaliser[:, None]).exp_().mul_(gradient[:, None])
            chunk.copy_(chunk_gradient.scatter_add_(1, target[:, None], -gradient[:, None]))
        return logits.detach(), None


def _chunk_size(logits: torch.Tensor) -> int:
    return max(1, _CHUNK_ELEMENTS.get(logits.device.type, _CHUNK_ELEMENTS_ELSEWHERE) // logits.shape[-1])


def score_tokens(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Scores of tokens, computed in float32 whatever the precision of the logits.

    The backward pass overwrites the logits with their gradient: they must be of no use by then, as those of a language
    model's head are not, and it can run once only.

    Args:
        logits (`torch.Tensor` of shape `(num_tokens, vocab_size)`): Of the positions that are scored.
        targets (`torch.LongTensor` of shape `(num_tokens,)`): Their tokens.

    Returns:
        `tuple[torch.Tensor, torch.Tensor, torch.Tensor]`, each `(num_tokens,)`: the negative log-likelihood in nats,
        which alone has a gradient; the entropy in nats; and 1 where the target is the likeliest token, 0 elsewhere.
    """
    return _TokenScores.apply(logits, targets)
