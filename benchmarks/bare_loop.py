"""
The matrix products of a training step of the rating model, without anything else: what `rating_scale.py` compares with.

In plain torch, on batches made beforehand: the embedding rows, the linear layers without biases, attention over the two
tokens, residuals, the product of user and item, cross-entropy, backward, and the fused AdamW of the trainer over the
same tables. Left out are the loader, shuffling, the Trainer, gradient clipping, the learning-rate schedule and logging,
and of the model biases, LayerNorm, GELU, dropout, dropped ids, the check of ids, the sampled latent, mixture posterior
and KL, the cluster loss, leave-one-out offsets and the predicted rating.
"""

import torch
import torch.nn.functional as F
from torch import nn

from gavamoe_hf import GaVaMoEConfig
from gavamoe_hf.training.rating_trainer import RatingDataset

LEARNING_RATE = 1e-5  # the paper's; it has no bearing on speed


class BareLoop:
    """
    Weights of the model's shapes, and a training step of them.

    Args:
        config ([`GaVaMoEConfig`]): The sizes.
        trains_tables (`bool`, *optional*, defaults to `True`): Whether the tables are trained, or only looked up.
    """

    def __init__(self, config: GaVaMoEConfig, trains_tables: bool = True):
        size, latent, hidden = config.vae_embedding_size, config.latent_size, config.vae_decoder_hidden_size
        self.num_heads = config.vae_num_heads
        self.tables = [weight(count, size, trains_tables) for count in (config.num_users, config.num_items)]
        widths = [(3 * size, size), (size, size), (config.vae_intermediate_size, size)]
        widths.append((size, config.vae_intermediate_size))
        self.layers = [[weight(*width) for width in widths] for _ in range(config.vae_num_layers)]
        self.heads = [weight(latent, 3 * size), weight(latent, 3 * size)]
        self.decoder = [weight(hidden, latent), weight(len(config.rating_levels), hidden)]
        parameters = [*self.tables, *(matrix for layer in self.layers for matrix in layer), *self.heads, *self.decoder]
        self.optimizer = torch.optim.AdamW(
            [parameter for parameter in parameters if parameter.requires_grad], lr=LEARNING_RATE, fused=True
        )

    def step(self, user_id: torch.Tensor, item_id: torch.Tensor, level: torch.Tensor) -> None:
        ids = (user_id, item_id)
        rows = [F.embedding(of_kind, table) for of_kind, table in zip(ids, self.tables, strict=True)]
        # The model always has this gradient, since its population rows are trained where the tables are not
        hidden_states = torch.stack(rows, dim=1).requires_grad_()  # [B, 2, E]
        batch, tokens, size = hidden_states.shape
        for query_key_value, attention_output, up, down in self.layers:
            heads = F.linear(hidden_states, query_key_value)
            heads = heads.view(batch, tokens, 3, self.num_heads, size // self.num_heads)
            attended = F.scaled_dot_product_attention(*heads.permute(2, 0, 3, 1, 4))
            attended = attended.transpose(1, 2).reshape(batch, tokens, size)
            hidden_states = hidden_states + F.linear(attended, attention_output)
            hidden_states = hidden_states + F.linear(F.linear(hidden_states, up), down)
        user, item = hidden_states.unbind(dim=1)
        pair = torch.cat([user, item, user * item], dim=-1)  # [B, 3E]
        mean, log_variance = (F.linear(pair, head) for head in self.heads)
        logits = F.linear(F.linear(mean, self.decoder[0]), self.decoder[1])
        # The variance head has to be in the loss, or its products would be missing from backward
        (F.cross_entropy(logits, level) + log_variance.mean()).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def weight(rows: int, columns: int, is_trained: bool = True) -> nn.Parameter:
    return nn.Parameter(torch.randn(rows, columns) * 0.02, requires_grad=is_trained)


def bare_batches(ratings: RatingDataset, batch_size: int) -> list[tuple[torch.Tensor, ...]]:
    """User ids, item ids and rating levels of an epoch."""
    columns = ratings.columns
    tensors = columns["user_id"], columns["item_id"], columns["rating"].long() - 1
    return list(zip(*(tensor.split(batch_size) for tensor in tensors), strict=True))
