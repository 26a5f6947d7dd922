# Copyright 2026 The gavamoe-hf authors. Licensed under the Apache License, Version 2.0.
"""Which items a GaVaMoE model recommends to a user: those of the highest predicted rating.

Shapes: B users, N items of the catalogue, C items scored at once.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers.utils import ModelOutput

from .configuration_gavamoe import POPULATION_ID, to_python

# Kernels take another path for the last rows of a matrix that does not fill a block, and may then sum in another
# order. With whole blocks alone, equal embeddings give equal ratings wherever they stand.
_BLOCK = 64


@dataclass
class GaVaMoERecommendationOutput(ModelOutput):
    """
    Items for users, best first, from [`GaVaMoEForCausalLM.recommend`].

    Args:
        item_id (`torch.LongTensor` of shape `(batch_size, top_k)`): Item indices.
        predicted_rating (`torch.FloatTensor` of shape `(batch_size, top_k)`): Expected ratings, on the rating scale.
    """

    item_id: torch.LongTensor | None = None
    predicted_rating: torch.FloatTensor | None = None


class GaVaMoERecommendationMixin:
    """Top-N recommendation, for [`GaVaMoEForCausalLM`]."""

    @torch.no_grad()
    def recommend(
        self,
        user_id: int | Sequence[int] | torch.LongTensor,
        top_k: int = 10,
        exclude: Collection[int] | Sequence[Collection[int]] | torch.LongTensor | None = None,
        chunk_size: int = 4096,
        include_known: bool = False,
    ) -> GaVaMoERecommendationOutput:
        """
        The items of the highest predicted rating (eq. 3 at z = mu), without dropout or sampling whatever the mode, that
        are new to the user. The catalogue is scored in chunks, of which only the best so far are kept.

        What a user has is what the checkpoint knows: the pairs that it was trained on, and the histories of
        [`~GaVaMoEForCausalLM.add_users`], [`~GaVaMoEForCausalLM.add_items`] and [`~GaVaMoEForCausalLM.for_visitor`].
        Older checkpoints know of nothing until [`~set_interactions`] tells them.

        Equal ratings are ordered by item index, so that the answer does not depend on `chunk_size`. The rating model
        is trained to predict ratings, not to rank: see [`~evaluation.ranking_scores`] for how well it does.

        Args:
            user_id (`int`, `Sequence[int]` or `torch.LongTensor` of shape `(batch_size,)`): User indices, -1 for the
                population.
            top_k (`int`, *optional*, defaults to 10): Items for each user.
            exclude (`Collection[int]`, or a `Sequence` of one such collection for each user, *optional*):
                Indices of more items not to recommend: one collection for all users, or one for each.
            chunk_size (`int`, *optional*, defaults to 4096):
                Pairs scored at once, which bounds the memory: with B users, `chunk_size // B` items of each, at least
                one.
            include_known (`bool`, *optional*, defaults to `False`): Whether items that the user has are ranked as well.

        Returns:
            [`GaVaMoERecommendationOutput`]

        Raises:
            `ValueError`: for arguments that do not fit, and for fewer items left than `top_k`.
            `IndexError`: for an id outside the tables.
        """
        users, _ = self._pair_tensors(user_id, POPULATION_ID)  # [B]
        for name, value in (("top_k", top_k), ("chunk_size", chunk_size)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"Expected `{name}` as an int of at least 1, but got {value!r}.")
        known = [set() if include_known else set(self.rating_model.known_items(user)) for user in users.tolist()]
        row, excluded = (ids.to(users.device) for ids in self._excluded_pairs(exclude, known, top_k))
        best_item = torch.empty(len(users), 0, dtype=torch.long, device=users.device)
        best_rating = torch.empty(len(users), 0, device=users.device)
        catalogue = torch.arange(self.config.num_items, device=users.device)
        for chunk in catalogue.split(max(1, chunk_size // len(users))):
            rating = self._rate_all(users, chunk)  # [B, C]
            inside = (excluded >= chunk[0]) & (excluded <= chunk[-1])
            rating[row[inside], excluded[inside] - chunk[0]] = -torch.inf
            # The sort is stable and earlier items come first: of equal ratings the lower index stays in front
            item = torch.cat([best_item, chunk.expand(len(users), -1)], dim=1)
            rating, order = torch.cat([best_rating, rating], dim=1).sort(dim=1, descending=True, stable=True)
            best_item, best_rating = item.gather(1, order[:, :top_k]), rating[:, :top_k]
        return GaVaMoERecommendationOutput(item_id=best_item, predicted_rating=best_rating.contiguous())

    def set_interactions(
        self, user_id: torch.LongTensor | Sequence[int], item_id: torch.LongTensor | Sequence[int]
    ) -> None:
        """
        Keeps which items each user has, for [`~recommend`], in place of what was known before; training does so. It is
        saved with the checkpoint. Empty lists leave nothing to save, for a checkpoint that is not to tell who has what.

        Args:
            user_id (`torch.LongTensor` of shape `(num_pairs,)`): User indices.
            item_id (`torch.LongTensor` of shape `(num_pairs,)`): For each, the index of an item.

        Raises:
            `ValueError`: unless there is one user for each item; `IndexError`: for an id outside the tables.
        """
        self.rating_model.set_interactions(user_id, item_id)
        self.config.num_interactions = self.rating_model.config.num_interactions

    def _rate_all(self, user_id: torch.LongTensor, item_id: torch.LongTensor) -> torch.FloatTensor:
        """Predicted ratings of all pairs of users `[B]` and items `[C]`, `[B, C]`."""
        users = user_id.repeat_interleave(len(item_id))
        items = item_id.repeat(len(user_id))
        padding = (0, -len(users) % _BLOCK)
        users, items = (F.pad(ids, padding, value=POPULATION_ID) for ids in (users, items))
        predicted = self.rating_model.predict(users, items).predicted_rating
        return predicted[: len(user_id) * len(item_id)].view(len(user_id), len(item_id))

    def _excluded_pairs(
        self, exclude: Any, known: list[set[int]], top_k: int
    ) -> tuple[torch.LongTensor, torch.LongTensor]:
        """Rows and items of the pairs that may not be recommended, once enough items are known to be left."""
        batch_size, num_items = len(known), self.config.num_items
        values = to_python([] if exclude is None else exclude)
        values = values if isinstance(values, list) else [values]
        if any(isinstance(value, list) for value in values):
            if len(values) != batch_size:
                raise ValueError(
                    f"Expected `exclude` as one collection of items for each of the {batch_size} user(s), or one flat "
                    f"collection for all, but got {len(values)} collections."
                )
            per_user = [self._item_set(value) for value in values]
        else:
            per_user = [self._item_set(values)] * batch_size
        per_user = [items | had for items, had in zip(per_user, known, strict=True)]
        for row, (items, had) in enumerate(zip(per_user, known, strict=True)):
            if len(had) == num_items:
                raise ValueError(
                    f"Expected items that are new to the user, but user row {row} has all {num_items} already. Set "
                    "`include_known` to rank these."
                )
            if num_items - len(items) < top_k:
                reason = f", without the {len(had)} that the user has" if had else ""
                remedy = (
                    "Lower `top_k`, exclude fewer, or set `include_known`" if had else "Lower `top_k` or exclude fewer"
                )
                raise ValueError(
                    f"Expected at least `top_k` ({top_k}) items to choose from, but user row {row} has "
                    f"{num_items - len(items)} of {num_items} left{reason}. {remedy}."
                )
        pairs = [(row, item) for row, items in enumerate(per_user) for item in items]
        users, items = torch.tensor(pairs, dtype=torch.long).view(-1, 2).unbind(dim=1)
        return users, items

    def _item_set(self, values: Any) -> set[int]:
        """Item indices as a set, checked."""
        # A bool is an int to Python: a mask would be read as the items 0 and 1
        if not isinstance(values, list) or not all(type(value) is int for value in values):
            raise ValueError(
                f"Expected `exclude` as item indices, but got {values!r:.100}. Look raw ids up with the checkpoint's "
                "processor: `processor.item_index(item)`."
            )
        outside = [item for item in values if not 0 <= item < self.config.num_items]
        if outside:
            raise IndexError(
                f"`exclude` holds item {outside[0]}, which is out of range: this model knows 0 to "
                f"{self.config.num_items - 1}. Look raw ids up with the checkpoint's processor."
            )
        return set(values)


__all__ = ["GaVaMoERecommendationMixin", "GaVaMoERecommendationOutput"]
