"""What the demo page asks of a model, without a page: people, items, recommendations and explanations."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import torch
from datasets import Dataset

from ..generation_gavamoe import GaVaMoEExplanation
from ..modeling_gavamoe import GaVaMoEForCausalLM
from ..processing_gavamoe import GaVaMoEProcessor

# Bounds of what one visitor can send
MAX_ID_LENGTH = 200
MAX_FEATURES_LENGTH = 200
MAX_RATINGS = 50
# Most ids that a search finds, and ids to begin with
NUM_FOUND, NUM_EXAMPLES = 20, 5

# Ids that are compared with one that is not known; comparing takes about a second for every 100,000
_NUM_COMPARED = 10_000


class DemoError(ValueError):
    """What a visitor asked cannot be answered; the message is one or more sentences to show."""


@dataclass(frozen=True)
class Rated:
    """An item that someone rated; `explanation` is what they wrote of it, empty if nothing."""

    item: str
    rating: float
    features: tuple[str, ...] = ()
    explanation: str = ""


@dataclass(frozen=True)
class Person:
    """
    Whom the page answers for.

    Args:
        kind (`str`): `"user"`, known to the model; `"anyone"`, the population; or `"visitor"`, who rated items here.
        user (`str`, *optional*): Raw id of a known user; `None` for the others, which is the population's user of
            `model`.
        model ([`GaVaMoEForCausalLM`]): The service's model, or a visitor's view of it.
        history (`tuple[Rated, ...]`): What they rated, as far as it is known.
    """

    kind: str
    user: str | None
    model: GaVaMoEForCausalLM = field(repr=False)
    history: tuple[Rated, ...] = ()


@dataclass(frozen=True)
class Answer:
    """
    An explanation and the way that it took.

    Args:
        explanation ([`GaVaMoEExplanation`]): Text, rating, features and clusters.
        expert_share (`list[list[float]]`, *optional*): Of each layer, the share of each expert over prompt and
            explanation; `None` where the layers are dense.
        sentiment (`str`): What the prompt called the experience, `"positive"` or `"negative"`.
    """

    explanation: GaVaMoEExplanation
    expert_share: list[list[float]] | None
    sentiment: str


class DemoService:
    """
    Answers for the page. Nothing of it changes after it was made, and visitors get views of the model, so that any
    number of threads may ask at once.

    Args:
        model ([`GaVaMoEForCausalLM`]): A model in evaluation mode.
        processor ([`GaVaMoEProcessor`]): Its processor.
        records ([`~datasets.Dataset`], *optional*): The records that it was trained on, for the users' histories. Their
            items are not recommended again, nor those that the model knows its users to have.
        top_k (`int`, *optional*, defaults to 10): Items to recommend.
        max_new_tokens (`int`, *optional*, defaults to 40): Most tokens of an explanation.
    """

    def __init__(
        self,
        model: GaVaMoEForCausalLM,
        processor: GaVaMoEProcessor,
        records: Dataset | None = None,
        top_k: int = 10,
        max_new_tokens: int = 40,
    ):
        for name, value in (("top_k", top_k), ("max_new_tokens", max_new_tokens)):
            if value < 1:
                raise ValueError(f"Expected `{name}` as a number of at least 1, but got {value}.")
        self.model, self.processor, self.records = model, processor, records
        self.top_k, self.max_new_tokens = top_k, max_new_tokens
        self.rating_levels = list(model.config.rating_levels)
        self._ids = {"user": list(processor.users), "item": list(processor.items)}
        self._lowered = {kind: [raw.lower() for raw in ids] for kind, ids in self._ids.items()}
        self._index = {kind: {raw: index for index, raw in enumerate(ids)} for kind, ids in self._ids.items()}
        self._rows: Mapping[str, Any] = {}
        if records is not None:
            users = pd.Series(records["user"][:], dtype=object)
            self._rows = users.groupby(users).indices

    def search(self, kind: str, text: Any) -> list[str]:
        """At most `NUM_FOUND` ids of a `kind`, `"user"` or `"item"`, that hold the text: first those that start so."""
        text = str(text or "").strip().lower()[:MAX_ID_LENGTH]
        first, others = [], []
        for raw, lowered in zip(self._ids[kind], self._lowered[kind], strict=True):
            if lowered.startswith(text):
                first.append(raw)
                if len(first) == NUM_FOUND:
                    break
            elif len(others) < NUM_FOUND and text in lowered:
                others.append(raw)
        return (first + others)[:NUM_FOUND]

    def examples(self, kind: str) -> list[str]:
        """A few ids of a `kind` to begin with: those with the most records, or the first where there are no records."""
        counted = [] if self.records is None else pd.Series(self.records[kind][:], dtype=object).value_counts().index
        known = [raw for raw in counted if raw in self._index[kind]]
        return list(dict.fromkeys([*known, *self._ids[kind][:NUM_EXAMPLES]]))[:NUM_EXAMPLES]

    def known_id(self, kind: str, text: Any) -> str:
        """The id that was typed; [`DemoError`], which names close ones, if the model does not know it."""
        text = text.strip() if isinstance(text, str) else ""
        if not text:
            raise DemoError(f"Please choose or type the id of {_article(kind)}.")
        if len(text) > MAX_ID_LENGTH:
            raise DemoError(f"That is too long for {_article(kind)}'s id: it may have {MAX_ID_LENGTH} characters.")
        if text not in self._index[kind]:
            close = self.search(kind, text)[:3] or difflib.get_close_matches(text, self._ids[kind][:_NUM_COMPARED])
            hint = f" Close to it: {', '.join(close)}." if close else ""
            raise DemoError(
                f"The {kind} “{text}” is not among the {len(self._ids[kind]):,} {kind}s that the model knows.{hint}"
            )
        return text

    def known_user(self, text: Any) -> Person:
        """A user that the model was trained on, with their history; [`DemoError`] for an id that it does not know."""
        user = self.known_id("user", text)
        return Person("user", user, self.model, self._history(user))

    def anyone(self) -> Person:
        """Someone of whom nothing is known: the population."""
        return Person("anyone", None, self.model)

    def rate(self, ratings: Mapping[str, float], item: Any, rating: Any) -> dict[str, float]:
        """A visitor's ratings with one more, or a new one of the same item; [`DemoError`] if it is not a rating."""
        item = self.known_id("item", item)
        if rating is None:
            raise DemoError("Please choose how you rate the item.")
        rated = {**ratings, item: self._checked_rating(rating)}
        if len(rated) > MAX_RATINGS:
            raise DemoError(
                f"{MAX_RATINGS} ratings are the most that this page takes. Start again, or go on with these."
            )
        return rated

    def visitor(self, ratings: Mapping[str, float]) -> Person:
        """A new user who rated known items, fitted to these ratings."""
        history = tuple(Rated(item, rating) for item, rating in ratings.items())
        return Person("visitor", None, self.model.for_visitor(self.processor, list(ratings.items())), history)

    def recommend(self, person: Person) -> list[tuple[str, float]]:
        """(item, predicted rating) of the best items that the person has not rated, best first."""
        index, user = self._index["item"], self.processor.user_index(person.user)
        exclude = {index[rated.item] for rated in person.history if rated.item in index}
        exclude.update(person.model.rating_model.known_items(user))
        top_k = min(self.top_k, len(index) - len(exclude))
        if top_k < 1:
            raise DemoError("There is nothing left to recommend: all items are rated.")
        best = person.model.recommend(user, top_k=top_k, exclude=exclude)
        items = [self._ids["item"][row] for row in best.item_id[0].tolist()]
        return list(zip(items, best.predicted_rating[0].tolist(), strict=True))

    def explain(self, person: Person | None, item: Any, rating: Any = None, features: Any = "") -> Answer:
        """
        Why an item is recommended to a person, or not.

        Args:
            person ([`Person`]): Whom to explain it to.
            item (`str`, *optional*): Raw id of a known item; `None` is an item of which nothing is known.
            rating (`float`, *optional*): Rating whose sentiment is explained; the predicted one if not given.
            features (`str`, *optional*): What to talk about, separated by commas; if empty, what the item is known for.

        Raises:
            [`DemoError`]: for an item that is not known, and other input that cannot be used.
        """
        if person is None:
            raise DemoError("Please choose first for whom.")
        item = None if item is None else self.known_id("item", item)
        rating = None if rating is None else self._checked_rating(rating)
        named = _split_features(features)
        # Greedy: the same pair gets the same words whoever else is being answered
        (explained,) = person.model.explain(
            self.processor,
            user=person.user,
            item=item,
            rating=rating,
            features=named or None,
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
        )
        return Answer(explained, self._expert_share(person, explained), self.processor.sentiment(explained.rating))

    def _expert_share(self, person: Person, explained: GaVaMoEExplanation) -> list[list[float]] | None:
        read = self.processor.encode_record(
            explained.user, explained.item, explained.rating, explained.features, explained.explanation
        )
        input_ids = torch.tensor([read["input_ids"]], device=self.model.device)
        report = person.model.routing_report(read["user_id"], read["item_id"], input_ids)
        return None if report.expert_share is None else report.expert_share[0].tolist()

    def _checked_rating(self, rating: Any) -> float:
        lowest, highest = self.rating_levels[0], self.rating_levels[-1]
        try:
            value = float(rating)
        except (TypeError, ValueError):
            value = math.nan
        # Not a number is not in the range either
        if not lowest <= value <= highest:
            raise DemoError(f"A rating is a number from {lowest:g} to {highest:g}.")
        return value

    def _history(self, user: str) -> tuple[Rated, ...]:
        if user not in self._rows:
            return ()
        rows = self.records[self._rows[user]]
        features = rows.get("feature", [()] * len(rows["item"]))
        return tuple(
            Rated(item, rating, tuple(names), text)
            for item, rating, names, text in zip(
                rows["item"], rows["rating"], features, rows["explanation"], strict=True
            )
        )


def _split_features(text: Any) -> list[str]:
    """What is between the commas; [`DemoError`] if there is too much of it."""
    text = text if isinstance(text, str) else ""
    if len(text) > MAX_FEATURES_LENGTH:
        raise DemoError(f"Please name fewer features: {MAX_FEATURES_LENGTH} characters are the most.")
    return [name.strip() for name in text.split(",") if name.strip()]


def _article(kind: str) -> str:
    return "an item" if kind == "item" else "a user"
