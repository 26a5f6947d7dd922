# Copyright 2026 The gavamoe-hf authors. Licensed under the Apache License, Version 2.0.
"""New users and items for a trained GaVaMoE: each gets a row of its own, fitted to a few ratings.

Shapes: N new rows, P ratings of their histories, E `vae_embedding_size`.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import nn
from transformers.utils.output_capturing import maybe_install_capturing_hooks

from .vae_gmm_gavamoe import GaVaMoERatingModel

# Chosen on users and items held out of training splits, planted and real; the figures hardly depend on any of them.
# The prior is wider than the table: trained rows are shrunk themselves, those with few ratings most.
_PRIOR_SCALE = 2.0
_SHRINKAGE = 0.1
# Within 0.002 nats of the optimum from 15 ratings, within 0.1 from 60
_NUM_STEPS = 25
_LEARNING_RATE = 0.3
_ADAM_BETAS = (0.7, 0.9)

# Variance below which a column of a table counts as constant; untrained tables have four times as much.
_MIN_VARIANCE = 1e-4
# Bounds of time and memory: rows that the prior is estimated from, and ratings in one forward pass.
_MAX_PRIOR_ROWS, _MAX_PAIRS = 4096, 4096


@dataclass
class GaVaMoEFoldInResult:
    """
    One user or item that was added, from [`GaVaMoEForCausalLM.add_users`] or [`GaVaMoEForCausalLM.add_items`].

    Args:
        id (`str`): Raw id.
        index (`int`): Its row in the table, for `user_id` or `item_id`.
        num_ratings (`int`): Length of its history.
        is_population (`bool`): Whether there was no history, so that the row is that of the population.
        loss (`float`, *optional*): Mean of -log p(rating | z) over the history at the fitted row, in nats; `None` for
            the population.
    """

    id: str
    index: int
    num_ratings: int
    is_population: bool
    loss: float | None = None


class GaVaMoEFoldInMixin:
    """Users and items that training did not see, for [`GaVaMoEForCausalLM`]."""

    def add_users(
        self, processor: Any, histories: Mapping[str, Sequence[tuple[str, float]]]
    ) -> list[GaVaMoEFoldInResult]:
        """
        Adds users to a trained model and its processor (folding in; not in the paper, which knows training users
        only). Each new row is the maximum a posteriori estimate under the user's ratings (eq. 3, z = mu) and a Gaussian
        prior, which is that of the trained users' rows. Nothing else changes: known users and items keep their rows and
        indices, and what a user gets does not depend on who else is added, before or in the same call.

        A user without ratings gets the population's row, and predictions as for `user_id=-1`.

        Save model and processor together afterwards. An optimiser made before holds the old table.

        Args:
            processor ([`GaVaMoEProcessor`]): The checkpoint's processor, which learns the new ids.
            histories (`Mapping[str, Sequence[tuple[str, float]]]`):
                For each new raw user id, (raw item id, rating) pairs. Items have to be known; one that is rated twice
                counts twice.

        Returns:
            `list[GaVaMoEFoldInResult]`: one for each user, in the order of `histories`.

        Raises:
            `ValueError`: for ids that are known already or given twice, histories with items that are not known or
            ratings outside the rating scale, and a processor of another model. Nothing has been changed then.
            `TypeError`: for histories that are not a mapping.
        """
        return self._fold_in("user", processor, histories, None)

    def add_items(
        self,
        processor: Any,
        histories: Mapping[str, Sequence[tuple[str, float]]],
        features: Mapping[str, Sequence[str]] | None = None,
    ) -> list[GaVaMoEFoldInResult]:
        """
        Adds items to a trained model and its processor, as [`~add_users`] adds users.

        Args:
            processor ([`GaVaMoEProcessor`]): The checkpoint's processor, which learns the new ids and features.
            histories (`Mapping[str, Sequence[tuple[str, float]]]`):
                For each new raw item id, (raw user id, rating) pairs. Users have to be known; one who rated twice
                counts twice.
            features (`Mapping[str, Sequence[str]]`, *optional*):
                For new items, the features that prompts name where none are given, most important first.

        Returns:
            `list[GaVaMoEFoldInResult]`: one for each item, in the order of `histories`.

        Raises:
            `ValueError`: as [`~add_users`], and for features of an item that is not added.
            `TypeError`: for histories that are not a mapping.
        """
        return self._fold_in("item", processor, histories, features)

    # Also for callers who serve requests without gradients
    @torch.inference_mode(False)
    @torch.enable_grad()
    def for_visitor(self, processor: Any, history: Sequence[tuple[str, float]]) -> Self:
        """
        The model as it is for someone who comes once: a view in which the population's user, `user=None` and
        `user_id=-1`, has the row that [`~add_users`] would fit to these ratings. This model and the processor stay as
        they are, so that views for many visitors can be made and used at once; each has a row and little more of its
        own, and shares all other parameters with this model. It is for questions, not for training.

        Args:
            processor ([`GaVaMoEProcessor`]): The checkpoint's processor.
            history (`Sequence[tuple[str, float]]`): The visitor's (raw item id, rating) pairs. Items have to be known.

        Returns:
            [`GaVaMoEForCausalLM`]: the view.

        Raises:
            `ValueError`: for histories as [`~add_users`], for a processor of another model, and for a model whose
            `forward` has been replaced, as accelerate does to spread one over devices.
        """
        modules = (self, self.model, self.rating_model)
        if any("forward" in vars(module) for module in modules):
            raise ValueError(
                "Expected a model whose `forward` is that of its class, but something replaced it, such as a "
                "`device_map` over several devices; a view would run this model in its place. Load it on one device."
            )
        _check_processor(processor, self.config)
        pairs = _check_history("user", "visitor", history, processor, self.config.rating_levels)
        rows, _ = self._fit("user", [pairs])
        # Layers are shared: hooks that both model and view had installed would record each output twice
        maybe_install_capturing_hooks(self.model)
        view, decoder, rating_model = map(_shallow_copy, modules)
        view.model, decoder.rating_model = decoder, rating_model
        population = rating_model.population_user
        rating_model.population_user = nn.Parameter(rows[0].to(population), requires_grad=False)
        rating_model.population_items = sorted({item for item, _ in pairs})
        return view

    @torch.inference_mode(False)
    @torch.enable_grad()
    def _fold_in(
        self, kind: str, processor: Any, histories: Any, features: Mapping[str, Sequence[str]] | None
    ) -> list[GaVaMoEFoldInResult]:
        rating_model = self.rating_model
        ids, pairs, item_features = _check_arguments(kind, processor, histories, features, self.config)
        first = getattr(self.config, f"num_{kind}s")
        rows, losses = self._fit(kind, pairs)
        # The table first and the processor last: whoever finds a new id in it finds its row as well
        rating_model.grow_table(kind, rows)
        for name in (f"num_{kind}s", f"num_added_{kind}s"):
            setattr(self.config, name, getattr(rating_model.config, name))
        new = [(first + row, partner) for row, history in enumerate(pairs) for partner, _ in history]
        known = torch.stack(rating_model.interactions(), dim=1)  # (user, item) each
        new = torch.tensor(new, dtype=torch.long, device=known.device).view(-1, 2)
        self.set_interactions(*torch.cat([known, new if kind == "user" else new.flip(1)]).unbind(dim=1))
        processor.add_ids(kind, ids, item_features)
        return [
            GaVaMoEFoldInResult(
                id=raw,
                index=first + row,
                num_ratings=len(pairs[row]),
                is_population=not pairs[row],
                loss=losses[row] if pairs[row] else None,
            )
            for row, raw in enumerate(ids)
        ]

    def _fit(self, kind: str, pairs: list[list[tuple[int, float]]]) -> tuple[torch.Tensor, list[float]]:
        """The row of each history of (partner's index, rating) pairs, and its loss, as [`_fit_rows`] has them."""
        owner = torch.tensor([row for row, history in enumerate(pairs) for _ in history], dtype=torch.long)
        partner = torch.tensor([index for history in pairs for index, _ in history], dtype=torch.long)
        rating = torch.tensor([value for history in pairs for _, value in history])
        num_trained = getattr(self.config, f"num_{kind}s") - getattr(self.config, f"num_added_{kind}s")
        trained = getattr(self.rating_model, f"{kind}_embeddings").weight[:num_trained]
        return _fit_rows(self.rating_model, kind, trained, len(pairs), owner, partner, rating)


def _shallow_copy(module: nn.Module) -> nn.Module:
    """A module with the parameters and children of another, in dictionaries of its own."""
    other = copy.copy(module)
    other._parameters, other._modules = dict(module._parameters), dict(module._modules)
    return other


def _check_processor(processor: Any, config: Any) -> None:
    for name, count in (("users", config.num_users), ("items", config.num_items)):
        known = len(getattr(processor, name))
        if known != count:
            raise ValueError(
                f"Expected the processor of this model, which has {count} {name}, but got one with {known}. Load both "
                "from the same checkpoint."
            )


def _check_arguments(
    kind: str, processor: Any, histories: Any, features: Mapping[str, Sequence[str]] | None, config: Any
) -> tuple[list[str], list[list[tuple[int, float]]], list[list[str]] | None]:
    """The new raw ids, for each its (partner's index, rating) pairs, and for items their features."""
    _check_processor(processor, config)
    if not isinstance(histories, Mapping):
        raise TypeError(
            f"Expected `histories` as a mapping from each new {kind} id to its ratings, such as "
            f'{{"id": [("{_partner(kind)} id", 4.0)]}}, but got {type(histories).__name__}.'
        )
    ids = processor.check_new_ids(kind, list(histories))
    pairs = [
        _check_history(kind, raw, history, processor, config.rating_levels)
        for raw, history in zip(ids, histories.values(), strict=True)
    ]
    if kind == "user":
        return ids, pairs, None
    return ids, pairs, _check_features(features, ids)


def _check_features(features: Any, ids: list[str]) -> list[list[str]]:
    """The features of each new item, none where `features` does not have it."""
    features = {} if features is None else features
    if not isinstance(features, Mapping):
        raise TypeError(f"Expected `features` as a mapping from item ids to lists, but got {type(features).__name__}.")
    named = dict.fromkeys(ids)
    for raw, names in features.items():
        if str(raw) not in named:
            raise ValueError(
                f"Expected features of items that are added, but got some of {raw!r}, which `histories` does not have. "
                "Give it a history there, which may be empty."
            )
        if not isinstance(names, Sequence) or isinstance(names, str) or not all(isinstance(n, str) for n in names):
            raise ValueError(f"Expected the features of item {raw!r} as a list of strings, but got {names!r:.100}.")
        named[str(raw)] = list(names)
    return [names or [] for names in named.values()]


def _check_history(
    kind: str, raw: str, history: Any, processor: Any, levels: Sequence[float]
) -> list[tuple[int, float]]:
    partner_kind = _partner(kind)
    remedy = f"Leave it out of the history of {kind} {raw!r}, or add it first with `add_{partner_kind}s`."
    pairs = []
    if not isinstance(history, Sequence) or isinstance(history, str):
        raise ValueError(
            f"Expected the history of {kind} {raw!r} as a list of ({partner_kind}, rating) pairs, but got "
            f"{history!r:.100}. Pass [] for none."
        )
    for pair in history:
        try:
            if isinstance(pair, str):
                raise TypeError("of two characters, it would pass for a pair")
            partner, rating = pair
            rating = float(rating)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"Expected the history of {kind} {raw!r} as ({partner_kind}, rating) pairs, but it holds "
                f"{pair!r:.100}. Ratings are numbers."
            ) from error
        # Not a number is not in the range either
        if not levels[0] <= rating <= levels[-1]:
            raise ValueError(
                f"Expected ratings from {levels[0]:g} to {levels[-1]:g}, but {kind} {raw!r} has {rating} for "
                f"{partner_kind} {partner!r}. Correct it, or leave it out."
            )
        pairs.append((processor.known_index(partner_kind, partner, remedy), rating))
    return pairs


def _partner(kind: str) -> str:
    return "item" if kind == "user" else "user"


def _fit_rows(
    rating_model: GaVaMoERatingModel,
    kind: str,
    trained: torch.Tensor,
    num_rows: int,
    owner: torch.Tensor,
    partner: torch.Tensor,
    rating: torch.Tensor,
) -> tuple[torch.Tensor, list[float]]:
    """
    Rows under which ratings are likely, and which are likely among the trained ones.

    Args:
        rating_model ([`GaVaMoERatingModel`]): The model, which is left as it is.
        kind (`str`): `"user"` or `"item"`, what is added.
        trained (`torch.Tensor` of shape `(num_trained, vae_embedding_size)`): Rows that training learned.
        num_rows (`int`): N.
        owner (`torch.LongTensor` of shape `(num_ratings,)`): Of each rating, the new row that it belongs to.
        partner (`torch.LongTensor` of shape `(num_ratings,)`): Of each rating, the index of the known item or user.
        rating (`torch.FloatTensor` of shape `(num_ratings,)`): Ratings.

    Returns:
        `tuple[torch.Tensor, list[float]]`: the rows `(num_rows, vae_embedding_size)` and the mean -log p(rating | z) of
        each, in nats; the population's row and 0 where there are no ratings.
    """
    device = trained.device
    owner, partner, rating = owner.to(device), partner.to(device), rating.to(device)
    population = rating_model.population_user if kind == "user" else rating_model.population_item
    rows = population.detach().expand(num_rows, -1).clone()
    fitted = owner.unique()
    if len(fitted) == 0:
        return rows, [0.0] * num_rows
    mean, factor = _row_prior(trained.detach())
    # Rows as they differ from the mean, in units of the prior, so that one learning rate fits all columns
    code = torch.zeros(num_rows, len(mean), device=device, requires_grad=True)  # [N, E]
    optimizer = torch.optim.Adam([code], lr=_LEARNING_RATE, betas=_ADAM_BETAS)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=_NUM_STEPS)
    parts = torch.arange(len(owner), device=device).split(_MAX_PAIRS)
    for _ in range(_NUM_STEPS):
        # The prior's part of the gradient is the code itself. The sum over rows keeps each row's fit its own.
        code.grad = code.detach().clone()
        for part in parts:
            nll = _history_nll(rating_model, kind, mean + code @ factor.T, owner[part], partner[part], rating[part])
            # Not `backward`, which would leave gradients on the model
            code.grad += torch.autograd.grad(nll.sum(), code)[0]
        optimizer.step()
        scheduler.step()
    with torch.no_grad():
        rows[fitted] = (mean + code @ factor.T)[fitted].to(rows)
        nll = torch.cat([_history_nll(rating_model, kind, rows, owner[p], partner[p], rating[p]) for p in parts])
        losses = torch.zeros(num_rows, device=device).index_add_(0, owner, nll)
    return rows, (losses / owner.bincount(minlength=num_rows).clamp(min=1)).tolist()


def _row_prior(trained: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Mean `(vae_embedding_size,)` and Cholesky factor `(vae_embedding_size, vae_embedding_size)` of a Gaussian over rows.
    The covariance is that of the trained rows, shrunk towards its diagonal: what users have in common is in how columns
    vary together, and fewer rows than columns are enough to find it. The first column, which starts as the bias of a
    row, brings its own spread.
    """
    # On the CPU, since not every accelerator has float64
    sample = trained[:: -(-len(trained) // _MAX_PRIOR_ROWS)].float().cpu()
    mean = sample.mean(dim=0)
    centred = sample - mean
    covariance = (centred.T @ centred / len(sample)).double()
    variance = covariance.diagonal().clamp(min=_MIN_VARIANCE)
    covariance = (1 - _SHRINKAGE) * covariance
    covariance.diagonal().copy_(variance)
    factor = torch.linalg.cholesky(_PRIOR_SCALE * covariance).float()
    return mean.to(trained.device), factor.to(trained.device)


def _history_nll(
    rating_model: GaVaMoERatingModel,
    kind: str,
    rows: torch.Tensor,
    owner: torch.Tensor,
    partner: torch.Tensor,
    rating: torch.Tensor,
) -> torch.Tensor:
    """-log p(rating | z = mu) of each rating of the histories, `(num_ratings,)`, without dropout whatever the mode."""
    partners = rating_model.item_embeddings if kind == "user" else rating_model.user_embeddings
    pair = [rows[owner].to(partners.weight), partners(partner)]
    with torch.autocast(partner.device.type, enabled=False):
        mean, _ = rating_model.encode(torch.stack(pair if kind == "user" else pair[::-1], dim=1))
        return rating_model.reconstruction_loss(rating_model.decode(mean), rating).float()


__all__ = ["GaVaMoEFoldInMixin", "GaVaMoEFoldInResult"]
