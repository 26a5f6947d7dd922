"""BERTScore (Zhang et al., 2020) by the package bert_score, with any encoder: a Hub id or a local folder."""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ..version import install_hint
from .text_metrics import _check_pairs

BERTSCORE_KEYS = ("bertscore_precision", "bertscore_recall", "bertscore_f1")
# bert_score's own choice for English, which XRec uses
ENGLISH_MODEL = "roberta-large"

# Tokenizers without a length of their own say 1e30
_NO_LIMIT = 1_000_000


class BertScorer:
    """
    BERTScore with one backbone, loaded once; texts are scored a few at a time and not kept.

    Args:
        model (`str`, *optional*, defaults to `"roberta-large"`): A folder or a Hub id of an encoder.
        num_layers (`int`, *optional*):
            The layer whose states are compared. By default bert_score's choice for the id, or for a model with the name
            of the folder; the last layer of any other model.
        rescale (`bool`, *optional*, defaults to `False`): Whether to rescale so that 0 is what unrelated texts score.
        baseline (`str` or `Path`, *optional*):
            File with that score for each layer (CSV: LAYER, P, R, F). By default bert_score's own for English.
        batch_size (`int`, *optional*, defaults to 64): Texts encoded at once.
        device (`str`, *optional*, defaults to the GPU if there is one): Where to compute.

    Raises:
        `ImportError`: If bert_score is missing; the message says how to install it.
        `OSError`: If there is no such model.
        `ValueError`: If the model has no such layer, or is to be rescaled and has no baseline.
    """

    def __init__(
        self,
        model: str = ENGLISH_MODEL,
        num_layers: int | None = None,
        rescale: bool = False,
        baseline: str | Path | None = None,
        batch_size: int = 64,
        device: str | None = None,
    ):
        require_bert_score()
        from bert_score.utils import model2layers
        from transformers import AutoModel, AutoTokenizer

        self.name = _known_name(model, model2layers)
        try:
            encoder = AutoModel.from_pretrained(model, trust_remote_code=False)
            self._tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
        except OSError as error:
            raise OSError(
                f"Expected a folder or a Hub id of an encoder for BERTScore, but could not load {model!r}: {error}"
            ) from error
        if hasattr(encoder, "decoder"):
            encoder = encoder.get_encoder()
        config = encoder.config
        self.num_layers = num_layers or min(model2layers.get(self.name, np.inf), config.num_hidden_layers)
        if not 0 < self.num_layers <= config.num_hidden_layers:
            raise ValueError(
                f"Expected a layer from 1 to {config.num_hidden_layers} of {model!r} for BERTScore, but got "
                f"{self.num_layers}."
            )
        self.rescale, self.batch_size = rescale, batch_size
        self._baseline = self._read_baseline(baseline) if rescale else np.zeros(3)
        self._is_custom_baseline = baseline is not None
        if self._tokenizer.model_max_length > _NO_LIMIT:
            # RoBERTa's first two positions are padding
            self._tokenizer.model_max_length = getattr(config, "max_position_embeddings", 514) - 2
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self._layer = _Layer(encoder, self.num_layers).eval().to(device)

    def score(self, predictions: Sequence[str], references: Sequence[str]) -> np.ndarray:
        """
        Precision, recall and F1 of each pair.

        Args:
            predictions (`Sequence[str]`): Generated explanations.
            references (`Sequence[str]`): True explanations, in the same order.

        Returns:
            `np.ndarray` of shape `(num_records, 3)`. A pair with an empty text is 0, before rescaling, as in
            bert_score.

        Raises:
            `ValueError`: If the lengths differ or if there is no text.
        """
        from bert_score.utils import bert_cos_score_idf

        _check_pairs(predictions, references)
        scores = np.zeros((len(predictions), 3))
        # bert_score itself fails on an empty text with transformers 5
        filled = [
            row for row, pair in enumerate(zip(predictions, references, strict=True)) if all(map(str.strip, pair))
        ]
        weights = defaultdict(lambda: 1.0, {self._tokenizer.sep_token_id: 0.0, self._tokenizer.cls_token_id: 0.0})
        # As many at a time: bert_score keeps the states of all texts of a call
        for start in range(0, len(filled), self.batch_size):
            rows = filled[start : start + self.batch_size]
            scores[rows] = bert_cos_score_idf(
                self._layer,
                [references[row] for row in rows],
                [predictions[row] for row in rows],
                self._tokenizer,
                weights,
                batch_size=self.batch_size,
                device=next(self._layer.parameters()).device,
            ).numpy()
        return (scores - self._baseline) / (1 - self._baseline)

    @property
    def details(self) -> dict[str, object]:
        """What a score depends on, for its signature."""
        rescale = "no" if not self.rescale else "custom" if self._is_custom_baseline else "en"
        versions = {package: version(package) for package in ("bert_score", "transformers")}
        return {"model": self.name, "layer": self.num_layers, "idf": "no", "rescale": rescale, **versions}

    def _read_baseline(self, path: str | Path | None) -> np.ndarray:
        if path is None:
            package = Path(find_spec("bert_score").origin).parent  # type: ignore[union-attr, arg-type]
            path = package / "rescale_baseline" / "en" / f"{self.name}.tsv"
            if not path.is_file():
                raise ValueError(
                    f"Expected a BERTScore baseline to rescale with, but bert_score has none for {self.name!r}. "
                    "Pass a file with columns LAYER, P, R, F, do not rescale, or use roberta-large."
                )
        with open(path, encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                if row.get("LAYER") == str(self.num_layers):
                    return np.array([float(row[name]) for name in "PRF"])
        raise ValueError(f"{path}: expected a line for layer {self.num_layers} (LAYER, P, R, F), but found none.")


def require_bert_score() -> None:
    """`ImportError` that says how to install bert_score, where it is missing."""
    if find_spec("bert_score") is None:
        raise ImportError(
            "expected the package bert_score for BERTScore, but could not import it. " + install_hint("bertscore")
        )


def _known_name(model: str, known: dict[str, int]) -> str:
    """The id under which bert_score knows the model, else the last part of its path."""
    folder = Path(model).name
    names = [name for name in known if model == name] or [name for name in known if name.split("/")[-1] == folder]
    return names[0] if names else folder


class _Layer(nn.Module):
    """An encoder that returns the states of one layer. bert_score would cut the later layers off, but finds out how
    from the path: one with "t5" in it loads as a T5."""

    def __init__(self, encoder: nn.Module, num_layers: int):
        super().__init__()
        self.encoder, self.num_layers = encoder, num_layers

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **_: object) -> tuple[Tensor]:
        outputs = self.encoder(input_ids, attention_mask=attention_mask, output_hidden_states=True)
        return (outputs.hidden_states[self.num_layers],)
