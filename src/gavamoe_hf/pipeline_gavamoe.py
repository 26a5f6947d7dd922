# Copyright 2026 The gavamoe-hf authors. Licensed under the Apache License, Version 2.0.
"""The pipeline of GaVaMoE: pairs in, explanations out, in batches."""

from collections.abc import Generator, Iterable, Mapping
from dataclasses import asdict
from typing import Any

from torch.utils.data import Dataset
from transformers import Pipeline

TASK = "explainable-recommendation"


class ExplainableRecommendationPipeline(Pipeline):
    """
    Explains pairs named by their raw ids, as `model.explain` does.

    It comes with every checkpoint, so that `pipeline("explainable-recommendation", model="folder or Hub id",
    trust_remote_code=True)` works without the package. Beside the package, once that is imported, the task is known to
    transformers, and no code of the checkpoint is run.

    Each input is a mapping with

    - `user`, `item` (`str`, `int` or `None`): Raw ids; `None` is the population.
    - `rating` (`float`, *optional*): Rating whose sentiment the prompt states; the predicted one by default.
    - `features` (`Sequence[str]`, *optional*): Features for the prompt to name; those that the item is known by if not
      given.

    and whatever else, which is left alone: a row of a data set may be passed as it is. One mapping gives one output, a
    list gives a list; a generator or any other iterable, such as a [`~datasets.Dataset`] or a `KeyDataset`, gives an
    iterator that reads as it goes. Prompts of a batch are padded on the left.

    Outputs are `dict`s with the fields of [`GaVaMoEExplanation`]; a list of them for each pair where
    `num_return_sequences` is more than one.

    Args:
        batch_size (`int`, *optional*, defaults to 1): Pairs explained at once.
        kwargs: everything that `generate` takes, here or in each call; decoding is greedy unless told otherwise.

    Raises:
        `ValueError`: for inputs that are no pairs, and ids that are not known.

    Example:

    ```python
    >>> from transformers import pipeline

    >>> explain = pipeline("explainable-recommendation", model="outputs/quickstart", trust_remote_code=True)
    >>> explain({"user": "user_003", "item": "item_005"}, max_new_tokens=30)["explanation"]
    ```"""

    _load_processor = True
    _load_tokenizer = False
    _load_image_processor = False
    _load_video_processor = False
    _load_feature_extractor = False

    def _sanitize_parameters(self, **generate_kwargs):
        return {}, generate_kwargs, {}

    def __call__(self, inputs: Any, **kwargs):
        """Explains pairs, see the class: `inputs` is one mapping, a list, or anything that gives mappings in turn."""
        if isinstance(inputs, list | tuple):
            # The parent looks at the first
            return super().__call__(list(inputs), **kwargs) if inputs else []
        if isinstance(inputs, Iterable) and not isinstance(inputs, str | Mapping | Generator | Dataset):
            inputs = (pair for pair in inputs)
        return super().__call__(inputs, **kwargs)

    def preprocess(self, input_: Any) -> dict[str, Any]:
        if not isinstance(input_, Mapping) or not {"user", "item"} <= set(input_):
            got = f"the keys {sorted(map(str, input_))}" if isinstance(input_, Mapping) else repr(input_)[:100]
            raise ValueError(f'Expected each input as {{"user": ..., "item": ...}}, but got {got}.')
        # No tensors yet: the processor pads a batch, both sentiments' prompts to one length
        return {"pair": {name: input_.get(name) for name in ("user", "item", "rating", "features")}}

    def _forward(self, model_inputs: dict[str, Any], **generate_kwargs) -> dict[str, Any]:
        is_batch = isinstance(model_inputs["pair"], list)
        pairs = model_inputs["pair"] if is_batch else [model_inputs["pair"]]
        columns = {name: [pair[name] for pair in pairs] for name in pairs[0]}
        explained = self.model.explain(self.processor, **columns, **{"do_sample": False, **generate_kwargs})
        repeats = len(explained) // len(pairs)
        groups = [explained[start : start + repeats] for start in range(0, len(explained), repeats)]
        return {"explanations": groups if is_batch else groups[0]}

    def postprocess(self, model_outputs: dict[str, Any]) -> dict[str, Any] | list[dict[str, Any]]:
        explanations = [asdict(explanation) for explanation in model_outputs["explanations"]]
        return explanations[0] if len(explanations) == 1 else explanations

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:
        """Saves model and processor, with this pipeline; `kwargs` as for theirs."""
        # The parent would save the processor's tokenizer alone
        self.model.save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory, **kwargs)


__all__ = ["TASK", "ExplainableRecommendationPipeline"]
