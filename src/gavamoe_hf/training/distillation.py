"""Learning from what an earlier phase predicts, calibrated."""

from __future__ import annotations

import logging

import torch
import torch.nn.functional as F

from ..vae_gmm_gavamoe import GaVaMoERatingModel

logger = logging.getLogger(__name__)

_MAX_STEPS = 100


def distillation_loss(logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
    """
    Mean cross-entropy of rating logits against a teacher's distribution, in nats.

    Args:
        logits (`torch.Tensor` of shape `(batch_size, num_levels)`, or `(batch_size, 1)` for bernoulli): The student's.
        teacher_logits (`torch.Tensor` of the same shape): The teacher's.
    """
    if logits.shape[-1] == 1:
        return F.binary_cross_entropy_with_logits(logits, teacher_logits.sigmoid())
    return F.cross_entropy(logits, teacher_logits.softmax(dim=-1))


def calibrate_decoder(
    model: GaVaMoERatingModel,
    logits: torch.Tensor,
    rating: torch.Tensor,
    held_out_logits: torch.Tensor,
    held_out_rating: torch.Tensor,
) -> torch.Tensor:
    """
    Rescales the rating logits by a temperature and a bias for each level (temperature scaling, arXiv 1706.04599, with
    the biases of vector scaling), folded into the decoder. Dropout while training leaves predictions too close to the
    mean. Left out where it raises the loss on held-out ratings.

    Args:
        model ([`GaVaMoERatingModel`]): The model; its `decoder_output` is changed.
        logits (`torch.Tensor` of shape `(num_pairs, num_levels)`): Its logits of the pairs that are fitted to.
        rating (`torch.Tensor` of shape `(num_pairs,)`): Their ratings.
        held_out_logits (`torch.Tensor` of shape `(num_held_out, num_levels)`): Its logits of held-out pairs.
        held_out_rating (`torch.Tensor` of shape `(num_held_out,)`): Their ratings.

    Returns:
        `torch.Tensor` of shape `(num_pairs, num_levels)`: the pairs' logits as they are now.
    """
    scale = torch.ones(1, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(logits.shape[-1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([scale, bias], max_iter=_MAX_STEPS, line_search_fn="strong_wolfe")
    fitted = logits.double()

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model.reconstruction_loss(fitted * scale + bias, rating).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        held_out = held_out_logits.double()
        before = model.reconstruction_loss(held_out, held_out_rating).mean()
        after = model.reconstruction_loss(held_out * scale + bias, held_out_rating).mean()
        is_better = bool(after < before)
        logger.info(
            "Calibration by a scale of %.3f: validation loss %.4f instead of %.4f, %s",
            scale.item(),
            after.item(),
            before.item(),
            "kept" if is_better else "left out",
        )
        if not is_better:
            return logits
        output = model.decoder_output
        output.weight.mul_(scale.to(output.weight))
        output.bias.mul_(scale.to(output.bias)).add_(bias.to(output.bias))
        return (fitted * scale + bias).to(logits)
