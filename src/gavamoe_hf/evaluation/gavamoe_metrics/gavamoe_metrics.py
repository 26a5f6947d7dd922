"""Metrics of explainable recommendation under named profiles, as a module of the evaluate library."""

import datasets
import evaluate

from gavamoe_hf.evaluation import PROFILES, EvaluationOptions, score_profile, vader_sentiment

_DESCRIPTION = """
Scores of explanations in recommendation: BLEU, ROUGE, Distinct, BERTScore, unique sentence ratio (USR), feature match
(FMR), coverage (FCR) and diversity (DIV), rating errors, and agreement of sentiment and rating. The same output scores
differently from one repository to the next: the configuration names whose definitions are meant, `default`
(sacrebleu and rouge_score), `peter`, `pepler`, `gavamoe-released` or `xrec`, and each score comes with a signature.
"""

_INPUTS = """
Args:
    predictions (`list[str]`): Generated explanations.
    references (`list[str]`): True explanations, one for each prediction.
    features (`list[list[str]]`, *optional*): For each prediction the list of its features.
    ratings, predicted_ratings (`list[float]`, *optional*): In stars.
    feature_set (`list[str]`, *optional*): All features of the corpus; those of `features` if not given.
    rating_range (`tuple[float, float]`, *optional*): Of the corpus; that of `ratings` if not given.
    bertscore_model (`str`, *optional*): Folder or Hub id of an encoder. `xrec` takes roberta-large if not given.
    bertscore_num_layers (`int`, *optional*): The layer that is compared.
    bertscore_rescale (`bool`, *optional*, defaults to `False`): Rescale with a baseline; `xrec` always does.
    bertscore_baseline (`str`, *optional*): The baseline as CSV (LAYER,P,R,F); bert_score's for English if not given.
    sentiment (`bool`, *optional*, defaults to `False`): Whether to score agreement of sentiment and rating.
    positive_threshold (`float`, *optional*, defaults to 3.0): A rating from here on is positive.
Returns:
    `dict`: scores by key (percent for BLEU, ROUGE and Distinct), and `signatures`.
"""

_CITATION = """
@misc{tang2024gavamoe,
    title={GaVaMoE: Gaussian-Variational Gated Mixture of Experts for Explainable Recommendation},
    author={Fei Tang and Yongliang Shen and Hang Zhang and Zeqi Tan and Wenqi Zhang and Zhibiao Huang and Kaitao Song
        and Weiming Lu and Yueting Zhuang},
    year={2024},
    eprint={2410.11841},
    archivePrefix={arXiv}
}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS)
class GavamoeMetrics(evaluate.Metric):
    """One configuration for each profile."""

    def _info(self):
        if self.config_name not in PROFILES:
            raise ValueError(f"Expected a configuration among {', '.join(PROFILES)}, but got {self.config_name!r}.")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
            reference_urls=["https://arxiv.org/abs/2410.11841"],
        )

    def _compute(
        self,
        predictions,
        references,
        features=None,
        ratings=None,
        predicted_ratings=None,
        feature_set=None,
        rating_range=None,
        sentiment=False,
        **options,
    ):
        return score_profile(
            predictions,
            references,
            EvaluationOptions(
                profiles=[self.config_name], sentiment=vader_sentiment() if sentiment else None, **options
            ),
            features=features,
            ratings=ratings,
            predicted_ratings=predicted_ratings,
            feature_set=feature_set,
            rating_range=rating_range,
        )
