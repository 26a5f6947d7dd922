"""BERTScore with a tiny encoder from a local folder, against bert_score itself and against its definition."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModel, BertConfig, BertModel, PreTrainedTokenizerFast

from gavamoe_hf.evaluation import BertScorer, EvaluationOptions, score_profile
from gavamoe_hf.evaluation.bert_scores import require_bert_score

PREDICTIONS = ["a good guitar", "strings break", "", "the the cable", "good"]
REFERENCES = ["a nice old guitar", "the strings break", "good", "a cable", " "]
WORDS = ["a", "good", "guitar", "strings", "break", "the", "cable", "nice", "old"]
BASELINE = "LAYER,P,R,F\n0,0.1,0.1,0.1\n1,0.2,0.3,0.25\n2,0.5,0.4,0.45\n"


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    # "t5" in the name: bert_score itself would take it for a T5
    folder = tmp_path_factory.mktemp("bert5")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(words), initializer_range=0.5, **sizes)).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def baseline(tmp_path: Path) -> str:
    path = tmp_path / "baseline.csv"
    path.write_text(BASELINE, encoding="utf-8")
    return str(path)


@pytest.fixture
def bert_score():
    return pytest.importorskip("bert_score")


@torch.no_grad()
def by_definition(encoder: str, layer: int, prediction: str, reference: str) -> list[float]:
    """Each word with its most similar one on the other side, by the cosine of their states."""
    model = AutoModel.from_pretrained(encoder).eval()
    sides = []
    for text in (prediction, reference):
        tokens = torch.tensor([[2, *(4 + WORDS.index(word) for word in text.split()), 3]])
        states = model(tokens, output_hidden_states=True).hidden_states[layer][0]
        sides.append(torch.nn.functional.normalize(states, dim=-1))
    similar = sides[0] @ sides[1].T
    # Words can match [CLS] and [SEP], whose own matches do not count
    precision, recall = similar.max(dim=1).values[1:-1].mean(), similar.max(dim=0).values[1:-1].mean()
    return [precision.item(), recall.item(), (2 * precision * recall / (precision + recall)).item()]


@pytest.mark.parametrize("layer", [1, 2])
def test_equals_its_definition(encoder: str, layer: int, bert_score) -> None:
    scores = BertScorer(encoder, num_layers=layer, batch_size=2, device="cpu").score(PREDICTIONS, REFERENCES)
    for row, (prediction, reference) in enumerate(zip(PREDICTIONS, REFERENCES, strict=True)):
        expected = by_definition(encoder, layer, prediction, reference) if row not in (2, 4) else [0, 0, 0]
        assert scores[row] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("layer", [1, 2])
def test_equals_bert_score(encoder: str, layer: int, bert_score, baseline: str, monkeypatch) -> None:
    # bert_score cuts the texts at the tokenizer's length, which this one does not state, and reads types from the path
    folder = Path(encoder)
    monkeypatch.chdir(folder.parent)
    renamed = folder.parent / "bert"
    if not renamed.exists():
        renamed.symlink_to(folder)
    theirs = bert_score.BERTScorer(
        model_type="bert", num_layers=layer, lang="en", device="cpu", rescale_with_baseline=True, baseline_path=baseline
    )
    theirs._tokenizer.model_max_length = 510
    pairs = [0, 1, 3]  # with transformers 5 it fails on empty texts
    texts = [[PREDICTIONS[row] for row in pairs], [REFERENCES[row] for row in pairs]]
    expected = np.stack([scores.numpy() for scores in theirs.score(*texts)], axis=1)
    ours = BertScorer(encoder, layer, rescale=True, baseline=baseline, device="cpu")
    assert ours.score(PREDICTIONS, REFERENCES)[pairs] == pytest.approx(expected, abs=1e-5)


def test_default_has_it_on_request(encoder: str, bert_score) -> None:
    options = EvaluationOptions(bertscore_model=encoder, bertscore_num_layers=1)
    scores = score_profile(PREDICTIONS, REFERENCES, options)
    expected = BertScorer(encoder, 1).score(PREDICTIONS, REFERENCES).mean(axis=0)
    assert scores["bertscore_f1"] == pytest.approx(expected[2], abs=1e-5)
    assert "layer:1|idf:no|rescale:no|bert_score:" in scores["signatures"]["bertscore_f1"]
    assert "bertscore_f1" not in score_profile(PREDICTIONS, REFERENCES)


def test_xrec(encoder: str, bert_score, baseline: str) -> None:
    options = EvaluationOptions(profiles=["xrec"], bertscore_model=encoder, bertscore_baseline=baseline)
    scores = score_profile(PREDICTIONS, REFERENCES, options, ratings=[1] * 5, predicted_ratings=[1] * 5)
    raw = BertScorer(encoder).score(PREDICTIONS, REFERENCES)
    rescaled = (raw - [0.5, 0.4, 0.45]) / [0.5, 0.6, 0.55]  # of layer 2, the last
    for column, key in enumerate(("bertscore_precision", "bertscore_recall", "bertscore_f1")):
        assert scores[key] == pytest.approx(rescaled[:, column].mean(), abs=1e-5)
        # Of the population: divided by 5
        assert scores[f"{key}_std"] == pytest.approx(rescaled[:, column].std(ddof=0), abs=1e-5)
    assert scores["unique_sentence_ratio"] == 1
    assert len(scores) == 8 and "rescale:custom" in scores["signatures"]["bertscore_recall_std"]


class TestErrors:
    def test_missing_package(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("gavamoe_hf.evaluation.bert_scores.find_spec", lambda name: None)
        with pytest.raises(ImportError, match=r"could not import it\. Install it with `pip install \"\.\[bert"):
            require_bert_score()
        with pytest.raises(ImportError, match="expected the package bert_score"):
            score_profile(["a"], ["a"], EvaluationOptions(profiles=["xrec"]))

    def test_missing_sentiment_package(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from gavamoe_hf.evaluation import vader_sentiment

        monkeypatch.setitem(sys.modules, "vaderSentiment", None)
        monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", None)
        with pytest.raises(ImportError, match=r"vaderSentiment, .* `pip install \"\.\[sentiment\]\"`"):
            vader_sentiment()

    def test_no_baseline(self, encoder: str, bert_score) -> None:
        with pytest.raises(ValueError, match=r"bert_score has none for 'bert50'\. Pass a file with columns LAYER"):
            BertScorer(encoder, rescale=True)

    def test_baseline_without_the_layer(self, encoder: str, bert_score, tmp_path: Path) -> None:
        (tmp_path / "b.csv").write_text("LAYER,P,R,F\n1,0,0,0\n", encoding="utf-8")
        with pytest.raises(ValueError, match=r"b\.csv: expected a line for layer 2"):
            BertScorer(encoder, rescale=True, baseline=tmp_path / "b.csv")

    @pytest.mark.parametrize("layer", [-1, 3])
    def test_no_such_layer(self, encoder: str, layer: int, bert_score) -> None:
        with pytest.raises(ValueError, match=rf"Expected a layer from 1 to 2 of .* but got {layer}"):
            BertScorer(encoder, num_layers=layer)

    def test_no_such_model(self, tmp_path: Path, bert_score) -> None:
        with pytest.raises(OSError, match="Expected a folder or a Hub id of an encoder for BERTScore"):
            BertScorer(str(tmp_path / "nothing"))

    def test_known_models(self, bert_score) -> None:
        from bert_score.utils import model2layers

        from gavamoe_hf.evaluation.bert_scores import _known_name

        assert _known_name("/models/roberta-large", model2layers) == "roberta-large"
        assert _known_name("roberta-large", model2layers) == "roberta-large"
        assert _known_name("/models/mine", model2layers) == "mine"
