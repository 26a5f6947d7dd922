# Copyright 2026 The gavamoe-hf authors. Licensed under the Apache License, Version 2.0.
"""The processor of GaVaMoE: raw user and item ids, ratings and features to model inputs, and tokens back to text."""

import difflib
import string
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import BatchFeature, PreTrainedTokenizerBase
from transformers.processing_utils import ProcessorMixin

from .configuration_gavamoe import POPULATION_ID, to_python

USER_TOKEN = "<|user_embedding|>"
ITEM_TOKEN = "<|item_embedding|>"

SYSTEM_PROMPT = "You are a professional explainer who explains an item to a user in detail."
# Figure 2 of the paper, and the same sentence where no feature is known.
PROMPT_TEMPLATE = (
    "The user has a {sentiment} experience with the item, the item has {features} features, "
    "please provide an explanation for recommending {item} to {user}."
)
PROMPT_TEMPLATE_WITHOUT_FEATURES = (
    "The user has a {sentiment} experience with the item, "
    "please provide an explanation for recommending {item} to {user}."
)

# Far above any prompt: what a checkpoint states is rendered and tokenised, and must not fill the memory
_MAX_PROMPT_CHARACTERS = 20_000
_MAX_TEMPLATE_CHARACTERS = 200_000
_PROMPT_FIELDS = {"sentiment", "features", "item", "user"}

# Stands for the features while the chat template is rendered; a private-use character that no template contains.
_SLOT = "\ue000"

# A fast tokenizer keeps `split_special_tokens` as state: between two threads, text of one could be read by the rule of
# the other. Of the module, since a processor with a lock could be neither copied nor pickled.
_TOKENIZER_LOCK = threading.Lock()


@dataclass
class PairRequest:
    """One pair to explain, as [`GaVaMoEProcessor.normalize_pairs`] reads it: ids as `str` or `None`."""

    user: str | None
    item: str | None
    rating: float | None
    features: list[str]


class GaVaMoEProcessor(ProcessorMixin):
    """
    Builds prompts for pairs and decodes explanations.

    Text from data (ids, features, explanations) is always tokenised as plain text, so that it can never turn into a
    special token.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Tokenizer that has both placeholder tokens; see
            [`~GaVaMoEProcessor.add_placeholder_tokens`].
        users (`list[str]`, *optional*): Raw user ids, in the order of the model's user table.
        items (`list[str]`, *optional*): Raw item ids, in the order of the model's item table.
        item_features (`list[list[str]]`, *optional*):
            For each item, the features that it was talked about for in training, most frequent first.
        item_titles (`list[str]`, *optional*): For each item, what people call it; empty where that is not known.
        positive_rating_threshold (`float`, *optional*, defaults to 3.0):
            Ratings from here on read as a positive experience.
        num_prompt_features (`int`, *optional*, defaults to 1):
            How many of an item's known features a prompt names where none are given.
        max_feature_tokens (`int`, *optional*, defaults to 32): Where the features of a prompt are cut off.
        system_prompt (`str`, *optional*): The system turn; the paper's (figure 2) by default.
        prompt_template (`str`, *optional*):
            The user turn, with `{sentiment}`, `{features}`, `{item}` and `{user}`; the paper's (figure 2) by default.
        prompt_template_without_features (`str`, *optional*): The same without `{features}`.
        chat_template (`str`, *optional*): The tokenizer's chat template, which is used where there is one.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None = None,
        users: list[str] | None = None,
        items: list[str] | None = None,
        item_features: list[list[str]] | None = None,
        positive_rating_threshold: float = 3.0,
        num_prompt_features: int = 1,
        max_feature_tokens: int = 32,
        system_prompt: str = SYSTEM_PROMPT,
        prompt_template: str = PROMPT_TEMPLATE,
        prompt_template_without_features: str = PROMPT_TEMPLATE_WITHOUT_FEATURES,
        chat_template: str | None = None,
        item_titles: list[str] | None = None,
    ):
        if chat_template is None and tokenizer is not None:
            chat_template = tokenizer.chat_template
        super().__init__(tokenizer, chat_template=chat_template)
        self.users = list(users or [])
        self.items = list(items or [])
        self.item_features = [list(features) for features in item_features or [[] for _ in self.items]]
        self.item_titles = None if item_titles is None else list(item_titles)
        self.positive_rating_threshold = positive_rating_threshold
        self.num_prompt_features = num_prompt_features
        self.max_feature_tokens = max_feature_tokens
        self.system_prompt = system_prompt
        self.prompt_template = prompt_template
        self.prompt_template_without_features = prompt_template_without_features
        self._check_prompts()
        if len(self.item_features) != len(self.items):
            raise ValueError(
                f"Expected features for each of the {len(self.items)} items, but got {len(self.item_features)} lists."
            )
        titles = self.item_titles
        if titles is not None and (len(titles) != len(self.items) or not all(isinstance(text, str) for text in titles)):
            raise ValueError(
                f"Expected `item_titles` as a text for each of the {len(self.items)} items, but got {len(titles)} "
                "entries or others than texts."
            )
        self._indices = {}
        for kind, ids in (("user", self.users), ("item", self.items)):
            self._indices[kind] = {raw: index for index, raw in enumerate(ids)}
            if len(self._indices[kind]) != len(ids):
                raise ValueError(
                    f"Expected distinct {kind} ids, but got {len(ids) - len(self._indices[kind])} repeated."
                )
        self._prompts: dict[tuple[str, bool], list[list[int]]] = {}

    def _check_prompts(self) -> None:
        """Raises where texts of the prompt are too long, or ask `str.format` for more than to fill in names."""
        for name in ("system_prompt", "prompt_template", "prompt_template_without_features"):
            text = getattr(self, name)
            if not isinstance(text, str) or len(text) > _MAX_PROMPT_CHARACTERS:
                raise ValueError(
                    f"Expected `{name}` as text of at most {_MAX_PROMPT_CHARACTERS:,} characters, but got "
                    f"{f'{len(text):,}' if isinstance(text, str) else type(text).__name__}."
                )
            if name == "system_prompt":
                continue
            # A width ("{item:>99999999}") would fill the memory, an attribute or index reads what it likes
            for _, field, form, conversion in string.Formatter().parse(text):
                if field is not None and (field not in _PROMPT_FIELDS or form or conversion):
                    raise ValueError(
                        f"Expected `{name}` with the fields {', '.join(sorted(_PROMPT_FIELDS))} alone and as they are, "
                        f"but got {{{field[:40]}{f':{form[:20]}' if form else ''}}}."
                    )
        templates = self.chat_template if isinstance(self.chat_template, dict) else {"": self.chat_template}
        if any(template is not None and len(template) > _MAX_TEMPLATE_CHARACTERS for template in templates.values()):
            raise ValueError(
                f"Expected a chat template of at most {_MAX_TEMPLATE_CHARACTERS:,} characters, but got more."
            )

    def __repr__(self) -> str:
        # The parent's is the whole JSON, ids and features of the catalogue included, and every load makes it for a log
        return f"{type(self).__name__}({len(self.users)} users, {len(self.items)} items, {self.tokenizer!r})"

    @staticmethod
    def add_placeholder_tokens(tokenizer: PreTrainedTokenizerBase) -> int:
        """
        Adds the user and item placeholders to a tokenizer as special tokens.

        Returns:
            `int`: how many were added, 2.

        Raises:
            `ValueError`: if the vocabulary has one of them already, whose meaning would be unknown.
        """
        vocabulary = tokenizer.get_vocab()
        taken = [token for token in (USER_TOKEN, ITEM_TOKEN) if token in vocabulary]
        if taken:
            raise ValueError(
                f"Expected a tokenizer without the placeholder tokens, but it already has {taken}. Start from the base "
                "model's own tokenizer, or continue from a GaVaMoE checkpoint with its processor."
            )
        tokens = {"additional_special_tokens": [USER_TOKEN, ITEM_TOKEN]}
        # Beside those that the base has already, such as the marks of its chat template
        return tokenizer.add_special_tokens(tokens, replace_extra_special_tokens=False)

    @property
    def user_token_id(self) -> int:
        """Token id of the user placeholder, for `GaVaMoEConfig.user_token_id`."""
        return self._token_id(USER_TOKEN)

    @property
    def item_token_id(self) -> int:
        """Token id of the item placeholder, for `GaVaMoEConfig.item_token_id`."""
        return self._token_id(ITEM_TOKEN)

    def _token_id(self, token: str) -> int:
        # Looked up there and back, which does not build the whole vocabulary as a dict: the unknown token is another
        token_id = self.tokenizer.convert_tokens_to_ids(token)
        if token_id is None or self.tokenizer.convert_ids_to_tokens(token_id) != token:
            raise ValueError(
                f"Expected the tokenizer to have the placeholder {token!r}, but it does not. Call "
                "`GaVaMoEProcessor.add_placeholder_tokens(tokenizer)` first and resize the model."
            )
        return token_id

    def user_index(self, user: str | int | None) -> int:
        """Row of a raw user id in the model's table; -1, the population, for `None`. `ValueError` if not known."""
        return self._index("user", user)

    def item_index(self, item: str | int | None) -> int:
        """Row of a raw item id in the model's table; -1, the population, for `None`. `ValueError` if not known."""
        return self._index("item", item)

    def item_title(self, item: str | int) -> str:
        """What people call an item, by its raw id; empty where that is not known."""
        return "" if self.item_titles is None else self.item_titles[self.item_index(item)]

    def _index(self, kind: str, raw: str | int | None) -> int:
        if raw is None:
            return POPULATION_ID
        return self.known_index(kind, raw, f"Pass {kind}=None to explain for the population instead.")

    def known_id(self, kind: str, raw: str | int | float) -> str | None:
        """
        A raw id of a `kind`, `"user"` or `"item"`, as it is known; `None` if it is not. A whole number that a table
        wrote as 3.0, as it does beside an empty cell, is the id 3 where no other one has that name.
        """
        text, whole = str(raw), str(raw).removesuffix(".0")
        if text in self._indices[kind]:
            return text
        # Of more than 15 digits, a float may have been another number
        is_whole = text != whole and len(whole) <= 15 and whole.removeprefix("-").isdecimal()
        return whole if is_whole and whole in self._indices[kind] else None

    def _id(self, kind: str, raw: Any) -> str:
        text = id_text(kind, raw)
        return self.known_id(kind, raw) or text

    def known_index(self, kind: str, raw: str | int | float, remedy: str) -> int:
        """Row of a raw id of a `kind`, `"user"` or `"item"`. `ValueError`, which ends in `remedy`, if not known."""
        index = self._indices[kind].get(self._id(kind, raw))
        if index is None:
            known = self.users if kind == "user" else self.items
            close = difflib.get_close_matches(str(raw), known[:100_000], n=3)
            hint = f" Close to it: {', '.join(map(repr, close))}." if close else ""
            raise ValueError(
                f"The {kind} {str(raw)[:100]!r} is not among the {len(known)} known {kind}s.{hint} {remedy}"
            )
        return index

    def check_new_ids(self, kind: str, ids: Sequence[str | int]) -> list[str]:
        """The raw ids as [`~add_ids`] would add them; `ValueError` where it could not."""
        if not ids:
            raise ValueError(f"Expected at least one new {kind} id, but got none.")
        ids = [id_text(f"new {kind}", raw) for raw in to_python(ids)]
        known = [raw for raw in ids if self.known_id(kind, raw) is not None]
        if known:
            raise ValueError(
                f"Expected new {kind} ids, but {known[0]!r} is known already, with index "
                f"{self._indices[kind][self.known_id(kind, known[0])]}. Leave it out: known ids keep their rows."
            )
        if len(set(ids)) != len(ids):
            repeated = next(raw for raw in ids if ids.count(raw) > 1)
            raise ValueError(f"Expected distinct new {kind} ids, but got {repeated!r} twice. Join its entries.")
        return ids

    def add_ids(
        self, kind: str, ids: Sequence[str | int], item_features: Sequence[Sequence[str]] | None = None
    ) -> list[int]:
        """
        Appends ids to those that the processor knows; known ids keep their indices. The model's table has to grow as
        well, which `model.add_users` and `model.add_items` do before they call this.

        Args:
            kind (`str`): `"user"` or `"item"`.
            ids (`Sequence[str]`): New raw ids.
            item_features (`Sequence[Sequence[str]]`, *optional*): For new items, what they are known for.

        Returns:
            `list[int]`: the indices of the new ids.

        Raises:
            `ValueError`: for ids that are known already, repeated or empty, and for features that are not one list for
            each new item.
        """
        ids = self.check_new_ids(kind, ids)
        if item_features is not None and (kind != "item" or len(item_features) != len(ids)):
            raise ValueError(
                f"Expected features for each of the new items alone, but got {len(item_features)} list(s) for "
                f"{len(ids)} {kind}(s)."
            )
        known = self.users if kind == "user" else self.items
        indices = list(range(len(known), len(known) + len(ids)))
        if kind == "item":
            features = [[]] * len(ids) if item_features is None else item_features
            self.item_features.extend([list(names) for names in features])
            if self.item_titles is not None:
                self.item_titles.extend([""] * len(ids))
        known.extend(ids)
        # Last: an index that can be looked up has its id and features
        self._indices[kind].update(zip(ids, indices, strict=True))
        return indices

    def sentiment(self, rating: float) -> str:
        """`"positive"` from `positive_rating_threshold` on, else `"negative"`."""
        return "positive" if rating >= self.positive_rating_threshold else "negative"

    def normalize_pairs(
        self,
        user: Any,
        item: Any,
        rating: Any = None,
        features: Any = None,
    ) -> list[PairRequest]:
        """The pairs that the arguments of [`~GaVaMoEProcessor.__call__`] name, features filled in."""
        user, item, rating, features = map(to_python, (user, item, rating, features))
        single = not _is_list(user) and not _is_list(item)
        users, items = (values if _is_list(values) else [values] for values in (user, item))
        count = max(len(users), len(items))
        users = list(users) * count if len(users) == 1 else list(users)
        items = list(items) * count if len(items) == 1 else list(items)
        ratings = list(rating) if _is_list(rating) else [rating] * count
        if single or features is None:
            feature_lists = [features] * count
        else:
            feature_lists = list(features) if _is_list(features) else [features] * count
        lengths = {
            "user": len(users),
            "item": len(items),
            "rating": len(ratings),
            "features": len(feature_lists),
        }
        if count == 0 or len(set(lengths.values())) > 1:
            raise ValueError(f"Expected one user, item, rating and feature list for each pair, but got {lengths}.")
        pairs = []
        for raw_user, raw_item, value, names in zip(users, items, ratings, feature_lists, strict=True):
            item_index = self.item_index(raw_item)
            if names is None:
                known = self.item_features[item_index] if item_index >= 0 else []
                names = known[: self.num_prompt_features]
            pairs.append(
                PairRequest(
                    user=None if raw_user is None else self._id("user", raw_user),
                    item=None if raw_item is None else self._id("item", raw_item),
                    rating=_checked_rating(value),
                    features=_checked_features(names),
                )
            )
        return pairs

    def __call__(
        self,
        user: str | Sequence[str | None] | None,
        item: str | Sequence[str | None] | None,
        rating: float | Sequence[float | None] | None = None,
        features: str | Sequence[str] | Sequence[Sequence[str] | None] | None = None,
        return_tensors: str = "pt",
    ) -> BatchFeature:
        """
        Inputs of `model.generate` for one pair or a batch of them.

        Args:
            user (`str`, or `Sequence` of them): Raw user ids; `None` is the population. One is used for all items.
            item (`str`, or `Sequence` of them): Raw item ids, likewise.
            rating (`float`, or `Sequence` of them, *optional*):
                Ratings, whose sentiment the prompt states. Where it is missing, prompts for both sentiments are
                returned and `generate` takes the one of the predicted rating.
            features (`Sequence[str]` for one pair, or one such sequence for each pair, *optional*):
                Features for the prompt to name; defaults to those that training knew the item by. An empty list names
                none.
            return_tensors (`str`, *optional*, defaults to `"pt"`): Only PyTorch tensors are supported.

        Returns:
            [`~transformers.BatchFeature`] with `input_ids` and `attention_mask` `(batch_size, sequence_length)`,
            padded on the left, `user_id` and `item_id` `(batch_size,)`, and, where a rating is missing,
            `negative_input_ids` and `negative_attention_mask`.

        Raises:
            `ValueError`: for ids that are not known, and arguments that do not fit together.
        """
        if return_tensors != "pt":
            raise ValueError(f'Expected return_tensors="pt", but got {return_tensors!r}.')
        pairs = self.normalize_pairs(user, item, rating, features)
        sentiments = ["positive" if pair.rating is None else self.sentiment(pair.rating) for pair in pairs]
        rows = [self.encode_prompt(s, pair.features) for s, pair in zip(sentiments, pairs, strict=True)]
        unrated = [pair.rating is None for pair in pairs]
        if any(unrated):
            rows += [
                self.encode_prompt("negative", pair.features) if missing else []
                for pair, missing in zip(pairs, unrated, strict=True)
            ]
        input_ids, attention_mask = self._left_pad(rows)
        data = {
            "input_ids": input_ids[: len(pairs)],
            "attention_mask": attention_mask[: len(pairs)],
            "user_id": torch.tensor([self.user_index(pair.user) for pair in pairs]),
            "item_id": torch.tensor([self.item_index(pair.item) for pair in pairs]),
        }
        if any(unrated):
            negative = input_ids[len(pairs) :].clone()
            negative[~torch.tensor(unrated)] = -1
            data["negative_input_ids"] = negative
            data["negative_attention_mask"] = attention_mask[len(pairs) :]
        return BatchFeature(data)

    def encode_prompt(self, sentiment: str, features: Sequence[str]) -> list[int]:
        """Token ids of the prompt of a `"positive"` or `"negative"` experience, naming `features`."""
        key = (sentiment, len(features) > 0)
        if key not in self._prompts:
            self._prompts[key] = self._render(*key)
        pieces = self._prompts[key]
        if not features:
            return list(pieces[0])
        words = self.encode_text(" " + ", ".join(features))[: self.max_feature_tokens]
        return [*pieces[0], *words, *pieces[1]]

    def encode_text(self, text: str) -> list[int]:
        """Token ids of text from data, none of which is a special token."""
        return self._tokenize(text, split_special_tokens=True)

    def _tokenize(self, text: str, split_special_tokens: bool) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"Expected text that UTF-8 can hold, but got {text[:100]!r}: {error}.") from error
        with _TOKENIZER_LOCK:
            encoding = self.tokenizer(text, add_special_tokens=False, split_special_tokens=split_special_tokens)
        return encoding["input_ids"]

    def encode_record(
        self,
        user: str | None,
        item: str | None,
        rating: float,
        features: Sequence[str],
        explanation: str,
        max_length: int | None = None,
    ) -> dict[str, Any]:
        """
        A training example: the prompt, which is masked, and the explanation with the end-of-sequence token.

        Args:
            user (`str`), item (`str`): Raw ids.
            rating (`float`): The record's rating.
            features (`Sequence[str]`): Features for the prompt to name, none if empty.
            explanation (`str`): The text to learn.
            max_length (`int`, *optional*): Length in tokens to which the explanation is cut.

        Returns:
            `dict` with `input_ids`, `labels` (-100 over the prompt), `user_id`, `item_id` and `rating`.
        """
        prompt = self.encode_prompt(self.sentiment(rating), features)
        completion = [*self.encode_text(explanation.strip()), self.tokenizer.eos_token_id]
        if max_length is not None:
            if len(prompt) >= max_length:
                raise ValueError(
                    f"The prompt alone takes {len(prompt)} tokens, but `max_length` is {max_length}. Raise it."
                )
            completion = completion[: max_length - len(prompt)]
        return {
            "input_ids": prompt + completion,
            "labels": [-100] * len(prompt) + completion,
            "user_id": self.user_index(user),
            "item_id": self.item_index(item),
            "rating": float(rating),
        }

    def stored_prompts(self) -> dict[str, list[int]]:
        """Prompts that name no feature, for `GaVaMoEConfig.stored_prompts`."""
        return {sentiment: self.encode_prompt(sentiment, []) for sentiment in ("positive", "negative")}

    def _render(self, sentiment: str, with_features: bool) -> list[list[int]]:
        """The prompt as token ids, in the pieces before and after the features."""
        template = self.prompt_template if with_features else self.prompt_template_without_features
        if {template.count("{features}"), template.count(" {features}")} != {int(with_features)}:
            raise ValueError(
                f'Expected " {{features}}" {int(with_features)} time(s) in the prompt template, but got {template!r}.'
            )
        # The blank before the features belongs to their own first token
        turn = template.replace(" {features}", _SLOT).format(sentiment=sentiment, item=ITEM_TOKEN, user=USER_TOKEN)
        if self.chat_template is not None:
            messages = [{"role": "system", "content": self.system_prompt}, {"role": "user", "content": turn}]
            text = self.tokenizer.apply_chat_template(
                messages, chat_template=self.chat_template, tokenize=False, add_generation_prompt=True
            )
        else:
            text = f"{self.tokenizer.bos_token or ''}{self.system_prompt}\n{turn}\n"
        pieces = text.split(_SLOT)
        if len(pieces) != 1 + with_features:
            raise ValueError(
                f"Expected a chat template that states the user turn once, but it gave it {len(pieces) - 1} time(s)."
            )
        return [self._tokenize(piece, split_special_tokens=False) for piece in pieces]

    def _left_pad(self, rows: list[list[int]]) -> tuple[torch.LongTensor, torch.LongTensor]:
        length = max(map(len, rows))
        padding = self.tokenizer.pad_token_id
        padding = self.tokenizer.eos_token_id if padding is None else padding
        input_ids = torch.full((len(rows), length), padding)
        attention_mask = torch.zeros((len(rows), length), dtype=torch.long)
        for row, ids in enumerate(rows):
            if ids:
                input_ids[row, -len(ids) :] = torch.tensor(ids)
                attention_mask[row, -len(ids) :] = 1
        return input_ids, attention_mask

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "user_id", "item_id"]


def id_text(kind: str, raw: Any) -> str:
    """
    A raw id as text; whole numbers that arrive as floats, as beside an empty cell of a table, are whole numbers.

    Raises:
        `ValueError`: for what is no id, and for floats from 2^53 on, which are other numbers by now.
    """
    if isinstance(raw, str) and raw.strip():
        return raw
    if isinstance(raw, float) and raw.is_integer() and abs(raw) < 2**53:
        return str(int(raw))
    if isinstance(raw, int) and not isinstance(raw, bool):
        return str(raw)
    reason = (
        ", of which the last digits are lost. Read the column as text or whole numbers"
        if isinstance(raw, float) and raw.is_integer()
        else ""
    )
    raise ValueError(
        f"Expected each {kind} id as a non-empty string or a whole number, but got {repr(raw)[:100]} "
        f"({type(raw).__name__}){reason}."
    )


def _is_list(value: Any) -> bool:
    return isinstance(value, list)


def _checked_rating(value: Any) -> float | None:
    if value is None:
        return None
    try:
        rating = float(value)
    except (TypeError, ValueError, OverflowError):
        rating = float("nan")
    if rating != rating or rating in (float("inf"), float("-inf")):
        raise ValueError(f"Expected `rating` as a finite number, but got {repr(value)[:100]}.")
    return rating


def _checked_features(names: Any) -> list[str]:
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"Expected `features` of a pair as a list of strings, but got {repr(names)[:100]}.")
    return list(names)


GaVaMoEProcessor.register_for_auto_class()

__all__ = ["ITEM_TOKEN", "USER_TOKEN", "GaVaMoEProcessor", "PairRequest", "id_text"]
