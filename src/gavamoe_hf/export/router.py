"""The request for a pair: which cluster's checkpoint to ask, and the prompt to ask it."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..configuration_gavamoe import POPULATION_ID
from ..processing_gavamoe import GaVaMoEProcessor
from ..vae_gmm_gavamoe import GaVaMoERatingModel

# In an export: the folder of rating model and processor, and the settings of the router
ROUTER_FOLDER, ROUTER_FILE = "router", "router.json"

# Stands for the features while the turn is put together; a private-use character that no template contains.
_SLOT = "\ue000"


def pair_token(kind: str, index: int) -> str:
    """The token of a row of the `"user"` or `"item"` table."""
    return f"<{kind}_population>" if index == POPULATION_ID else f"<{kind}_{index}>"


@dataclass
class ServedRequest:
    """
    What to send to a server of an export, from [`ExportedRouter.request`].

    Args:
        model (`str`): Folder of the cluster's checkpoint, inside the export.
        prompt_token_ids (`list[int]`): The prompt, for engines that take token ids.
        prompt (`str`, *optional*):
            The same as text, with the beginning-of-sequence token, if any. `None` where no text reads as these tokens,
            as with features that hold the name of a special token.
        messages (`list[dict]`, *optional*): The same for chat, where there is a prompt and a chat template.
        cluster (`int`): The pair's cluster.
        predicted_rating (`float`): The rating model's expectation.
        features (`list[str]`): The features that the prompt names.
    """

    model: str
    prompt_token_ids: list[int]
    prompt: str | None
    messages: list[dict[str, str]] | None
    cluster: int
    predicted_rating: float
    features: list[str]


class ExportedRouter:
    """
    Rating model and processor of an export, which say for any pair what to ask of which cluster's checkpoint.

    Args:
        output_dir (`str` or `os.PathLike`): The folder that `gavamoe export` wrote.
    """

    def __init__(self, output_dir: str | os.PathLike[str]):
        folder = Path(output_dir)
        if not (folder / ROUTER_FILE).is_file():
            raise FileNotFoundError(
                f"Expected the folder of an export, but {folder} has no {ROUTER_FILE}. Write one with `gavamoe export`."
            )
        self.settings: dict[str, Any] = json.loads((folder / ROUTER_FILE).read_text(encoding="utf-8"))
        no_code = {"trust_remote_code": False}
        self.processor = GaVaMoEProcessor.from_pretrained(folder / ROUTER_FOLDER, **no_code)
        self.rating_model = GaVaMoERatingModel.from_pretrained(folder / ROUTER_FOLDER, **no_code).eval()
        first = folder / self.settings["clusters"][0]
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(first, **no_code)

    def request(
        self,
        user: str | None,
        item: str | None,
        rating: float | None = None,
        features: list[str] | None = None,
    ) -> ServedRequest:
        """
        The request that asks for the explanation of a pair.

        Args:
            user (`str`), item (`str`): Raw ids; `None` is the population.
            rating (`float`, *optional*, defaults to the predicted rating): Rating whose sentiment the prompt states.
            features (`list[str]`, *optional*): Features to name; those that the item is known by if not given.

        Returns:
            [`ServedRequest`], whose prompt is the one that `GaVaMoEForCausalLM.explain` uses, token by token.

        Raises:
            `ValueError`: for ids that are not known.
        """
        processor = self.processor
        (pair,) = processor.normalize_pairs(user, item, rating, features)
        user_index, item_index = processor.user_index(pair.user), processor.item_index(pair.item)
        predicted = self.rating_model.predict(torch.tensor([user_index]), torch.tensor([item_index]))
        predicted_rating = predicted.predicted_rating.item()
        if pair.rating is None:
            is_positive = predicted_rating >= self.settings["positive_rating_threshold"]
            sentiment = "positive" if is_positive else "negative"
        else:
            sentiment = processor.sentiment(pair.rating)
        user_token, item_token = pair_token("user", user_index), pair_token("item", item_index)
        ids = self.tokenizer.convert_tokens_to_ids([user_token, item_token])
        replaced = dict(zip((processor.user_token_id, processor.item_token_id), ids, strict=True))
        prompt_ids = [replaced.get(token, token) for token in processor.encode_prompt(sentiment, pair.features)]
        messages = self._messages(sentiment, pair.features, user_token, item_token)
        prompt = self._render(messages)
        if self.tokenizer(prompt, add_special_tokens=False)["input_ids"] != prompt_ids:
            prompt = None
        cluster = int(predicted.cluster_posterior.argmax())
        clusters = self.settings["clusters"]
        return ServedRequest(
            # Dense layers have no gates: one checkpoint for all clusters
            model=clusters[cluster if len(clusters) > 1 else 0],
            prompt_token_ids=prompt_ids,
            prompt=prompt,
            messages=messages if prompt is not None and processor.chat_template is not None else None,
            cluster=cluster,
            predicted_rating=predicted_rating,
            features=pair.features,
        )

    def _messages(self, sentiment: str, features: list[str], user_token: str, item_token: str) -> list[dict[str, str]]:
        processor = self.processor
        template = processor.prompt_template if features else processor.prompt_template_without_features
        turn = template.replace(" {features}", _SLOT).format(sentiment=sentiment, item=item_token, user=user_token)
        if features:
            # As many tokens of them as the processor takes
            words = processor.encode_text(" " + ", ".join(features))[: processor.max_feature_tokens]
            turn = turn.replace(_SLOT, processor.tokenizer.decode(words, clean_up_tokenization_spaces=False))
        return [{"role": "system", "content": processor.system_prompt}, {"role": "user", "content": turn}]

    def _render(self, messages: list[dict[str, str]]) -> str:
        if self.processor.chat_template is not None:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        system, turn = (message["content"] for message in messages)
        return f"{self.tokenizer.bos_token or ''}{system}\n{turn}\n"
