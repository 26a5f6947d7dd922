"""Scores a predictions file under named profiles, with intervals and a paired test, and writes JSON and Markdown."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from .bert_scores import ENGLISH_MODEL, BertScorer
from .bootstrap import confidence_intervals, interval_methods, paired_test, resample_scores
from .predict import write_json, write_text
from .prediction_files import Corpus, PredictionRecord, check_predictions, check_same_records, read_predictions
from .profiles import get_profile
from .rating_metrics import _as_ratings
from .record_statistics import ProfileStatistics, StatisticsCollector
from .sentiment import Sentiment
from .text_metrics import _check_pairs, require_text_metrics

METRICS_FILE, METRICS_TABLE_FILE = "metrics.json", "metrics.md"

# Folder of the `evaluate.Metric`: `evaluate.load(METRICS_MODULE, "peter")` needs no network
METRICS_MODULE = str(Path(__file__).parent / "gavamoe_metrics")


@dataclass
class EvaluationOptions:
    """
    How predictions are scored.

    Attributes:
        profiles (`Sequence[str]`, defaults to `("default",)`): Names of profiles, each once.
        num_resamples (`int`, defaults to 1000): Resamples of the bootstrap.
        seed (`int`, defaults to 0): Seed of the bootstrap.
        bertscore_model (`str`, *optional*):
            Folder or Hub id of BERTScore's encoder. Given, `default` has BERTScore too; `xrec` always has, from
            `"roberta-large"` if not given.
        bertscore_num_layers (`int`, *optional*): As in [`BertScorer`].
        bertscore_rescale (`bool`, defaults to `False`): Whether `default` rescales; `xrec` always does.
        bertscore_baseline (`str`, *optional*): As in [`BertScorer`].
        sentiment (`Callable[[str], float]`, *optional*): Judge of the texts, to score agreement with the rating.
        positive_threshold (`float`, defaults to 3.0): A rating from here on is positive.
    """

    profiles: Sequence[str] = ("default",)
    num_resamples: int = 1000
    seed: int = 0
    bertscore_model: str | None = None
    bertscore_num_layers: int | None = None
    bertscore_rescale: bool = False
    bertscore_baseline: str | None = None
    sentiment: Sentiment | None = None
    positive_threshold: float = 3.0

    def __post_init__(self) -> None:
        if isinstance(self.profiles, str) or not self.profiles or len(set(self.profiles)) < len(self.profiles):
            raise ValueError(f"Expected `profiles` as a list of different names, but got {self.profiles!r}.")
        if any(get_profile(name).scores == "libraries" for name in self.profiles):
            require_text_metrics()
        if self.num_resamples < 1:
            raise ValueError(f"Expected at least one resample of the bootstrap, but got {self.num_resamples}.")

    @cached_property
    def bert_scorers(self) -> dict[str, BertScorer]:
        """The scorer of each profile that has BERTScore, loaded once."""
        scorers = {}
        for name in self.profiles:
            always = get_profile(name).scores == "bertscore"
            if always or (name == "default" and self.bertscore_model is not None):
                scorers[name] = BertScorer(
                    self.bertscore_model or ENGLISH_MODEL,
                    self.bertscore_num_layers,
                    rescale=always or self.bertscore_rescale,
                    baseline=self.bertscore_baseline,
                )
        return scorers


def evaluate_predictions(
    path: str | os.PathLike[str],
    options: EvaluationOptions | None = None,
    corpus: Corpus | None = None,
    protocol: str | None = None,
    compare: str | os.PathLike[str] | None = None,
) -> dict[str, Any]:
    """
    Scores a predictions file.

    The file is read twice, line by line: once to check it, once to score it. No texts are kept.

    Args:
        path (`str` or `os.PathLike`): The file, as in [`read_predictions`].
        options ([`EvaluationOptions`], *optional*): Profiles and so on.
        corpus ([`Corpus`], *optional*):
            The data set that was predicted. Without it, feature set and range of ratings are those of the file.
        protocol (`str`, *optional*): Whether the system was `"given"` the record's rating and feature or `"predicted"`
            them; only named in the result.
        compare (`str` or `os.PathLike`, *optional*): Another system's predictions of the same records.

    Returns:
        `dict`: the scores of the first profile by key, then `profile`, `protocol`, `num_records`, `signatures`,
        `confidence_95` and `confidence_method` by key, `bootstrap` (resamples and seed); with `compare`, `comparison`
        (the other's scores and the paired test by key); with several profiles, `profiles`, which has the same for each
        of the others.

    Raises:
        [`DataError`]: For files that cannot be scored, before anything is computed.
        `ImportError`: If a package is missing, which the message names with its extra.
    """
    options = options or EvaluationOptions()
    summary, corpus = check_predictions(path, corpus)
    if options.sentiment is not None and "rating" not in summary.present:
        raise ValueError(f"{path}: expected 'rating' in every line to compare the sentiment with, but got none.")
    other_summary = None
    if compare is not None:
        check_same_records(path, compare)
        other_summary, other_corpus = check_predictions(compare, corpus)
        if corpus.is_file:
            corpus.features |= other_corpus.features
    systems = collect_statistics(read_predictions(path), options, corpus, summary.present)
    others = []
    if other_summary is not None:
        others = collect_statistics(read_predictions(compare), options, corpus, other_summary.present)
    resampled = resample_scores([*systems, *others], options.num_resamples, options.seed)
    results = []
    for place, statistics in enumerate(systems):
        result = _result(statistics, resampled[place], protocol, options)
        if others:
            other, other_resampled = others[place], resampled[len(systems) + place]
            result["comparison"] = {
                "compared_with": os.fspath(compare),
                "scores": other.scores(),
                "tests": paired_test(statistics, other, resampled[place], other_resampled),
            }
        results.append(result)
    first, *rest = results
    return {**first, **({"profiles": {result["profile"]: result for result in rest}} if rest else {})}


def score_profile(
    predictions: Sequence[str],
    references: Sequence[str],
    options: EvaluationOptions | None = None,
    features: Sequence[Sequence[str]] | None = None,
    ratings: Sequence[float] | None = None,
    predicted_ratings: Sequence[float] | None = None,
    feature_set: Iterable[str] | None = None,
    rating_range: tuple[float, float] | None = None,
) -> dict[str, Any]:
    """
    Scores lists in memory under one profile, as [`evaluate_predictions`] scores a file, without intervals.

    Args:
        predictions (`Sequence[str]`): Generated explanations.
        references (`Sequence[str]`): True explanations, in the same order.
        options ([`EvaluationOptions`], *optional*): Its first profile and so on.
        features (`Sequence[Sequence[str]]`, *optional*): For each prediction the list of its features.
        ratings, predicted_ratings (`Sequence[float]`, *optional*): In stars.
        feature_set (`Iterable[str]`, *optional*): All features of the corpus; by default those of `features`.
        rating_range (`tuple[float, float]`, *optional*): Of the corpus; by default that of `ratings`.

    Returns:
        `dict`: the scores by key, and `signatures`.

    Raises:
        `ValueError`: If the lengths differ, if there is no text, if a rating is not finite, or if `feature_set` lacks a
            record's feature.

    Example:
        ```python
        >>> options = EvaluationOptions(profiles=["peter"])
        >>> score_profile(["great strings"], ["these strings are great"], options)["unique_sentence_ratio"]
        1.0
        ```
    """
    options = options or EvaluationOptions()
    _check_pairs(predictions, references)
    columns: dict[str, Sequence[Any]] = {}
    if features is not None:
        columns["feature"] = features
    for key, values in (("rating", ratings), ("predicted_rating", predicted_ratings)):
        if values is not None:
            columns[key] = _as_ratings(values, key).tolist()
    for key, values in columns.items():
        if len(values) != len(predictions):
            raise ValueError(
                f"expected one {key} for each prediction, but got {len(predictions)} predictions and {len(values)}. "
                "Pass all in the order of the same records."
            )
    if options.sentiment is not None and ratings is None:
        raise ValueError("expected `ratings` to compare the sentiment with, but got none.")
    for row in features or []:
        if isinstance(row, str):
            raise ValueError(f"expected a list of features for each prediction, but got {row!r}. Wrap it: [{row!r}].")
    given = {feature for row in features or [] for feature in row}
    corpus = Corpus(given if feature_set is None else set(feature_set), rating_range, is_file=feature_set is None)
    if unknown := sorted(given - corpus.features):
        raise ValueError(f"expected features of `feature_set`, but got {unknown[0]!r}. Pass those of the whole corpus.")
    if corpus.rating_range is None and ratings is not None:
        corpus.rating_range = min(columns["rating"]), max(columns["rating"])
    records = (
        PredictionRecord(
            row + 1,
            "",
            "",
            references[row],
            predictions[row],
            None if features is None else tuple(features[row]),
            columns["rating"][row] if ratings is not None else None,
            columns["predicted_rating"][row] if predicted_ratings is not None else None,
        )
        for row in range(len(predictions))
    )
    statistics, *_ = collect_statistics(records, options, corpus, frozenset(columns))
    scores = statistics.scores()
    return {**scores, "signatures": {key: statistics.signatures[key] for key in scores}}


def collect_statistics(
    records: Iterable[PredictionRecord], options: EvaluationOptions, corpus: Corpus, present: frozenset[str]
) -> list[ProfileStatistics]:
    """
    The statistics of records under each profile, from one reading.

    Args:
        records (`Iterable[PredictionRecord]`): The records.
        options ([`EvaluationOptions`]): Profiles and so on.
        corpus ([`Corpus`]): Feature set and range of ratings.
        present (`frozenset[str]`): The optional keys that every record has.
    """
    collectors = [
        StatisticsCollector(
            get_profile(name),
            corpus,
            present,
            bert_scorer=options.bert_scorers.get(name),
            sentiment=options.sentiment,
            positive_threshold=options.positive_threshold,
        )
        for name in options.profiles
    ]
    for record in records:
        for collector in collectors:
            collector.add(record)
    return [collector.finish() for collector in collectors]


def write_evaluation(result: dict[str, Any], output_dir: str | os.PathLike[str]) -> None:
    """Leaves `metrics.json` and `metrics.md` in a folder."""
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / METRICS_TABLE_FILE, markdown_table(result))
    write_json(folder / METRICS_FILE, result)


def markdown_table(result: dict[str, Any]) -> str:
    """The result of [`evaluate_predictions`] as Markdown: a table for each profile, and what the scores depend on."""
    parts = []
    for block in result_blocks(result):
        comparison = block.get("comparison")
        protocol = f", protocol {block['protocol']}" if block["protocol"] else ""
        lines = [f"## Profile {block['profile']}{protocol}, {block['num_records']} records", ""]
        head = ["metric", "score", "95 % interval"]
        if comparison:
            lines += [f"Compared with `{comparison['compared_with']}`.", ""]
            head += ["other", "difference", "95 % interval", "p"]
        lines += [_row(head), _row(["---"] + ["---:"] * (len(head) - 1))]
        for key in block["signatures"]:
            if key not in block:
                continue
            mark = "*" if block["confidence_method"][key] == "jackknife" else ""
            cells = [key, _number(block[key]), _interval(block["confidence_95"][key]) + mark]
            if comparison:
                test = comparison["tests"].get(key)
                cells += ["", "", "", ""]
                if test is not None:
                    p_value = _p_value(test["p_value"])
                    interval = _interval(test["confidence_95"]) + mark
                    cells[3:] = [_number(comparison["scores"][key]), _number(test["difference"]), interval, p_value]
            lines.append(_row(cells))
        resamples, seed = block["bootstrap"]["resamples"], block["bootstrap"]["seed"]
        lines += ["", f"Intervals: bootstrap, {resamples} resamples, seed {seed}; * jackknife."]
        lines += ["", *(f"- `{block['signatures'][key]}`" for key in block["signatures"] if key in block)]
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def result_blocks(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The result of each profile, and of each protocol, as a list."""
    blocks = [result, *result.get("profiles", {}).values()]
    for other in result.get("protocols", {}).values():
        blocks += result_blocks(other)
    return blocks


def _result(
    statistics: ProfileStatistics, resampled: dict[str, Any], protocol: str | None, options: EvaluationOptions
) -> dict[str, Any]:
    scores = statistics.scores()
    return {
        **scores,
        "profile": statistics.profile.name,
        "protocol": protocol,
        "num_records": statistics.num_records,
        "signatures": {key: statistics.signatures[key] for key in scores},
        "confidence_95": {key: list(bounds) for key, bounds in confidence_intervals(statistics, resampled).items()},
        "confidence_method": interval_methods(statistics),
        "bootstrap": {"resamples": options.num_resamples, "seed": options.seed},
    }


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _p_value(value: float | None) -> str:
    return "" if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"


def _number(value: float) -> str:
    return f"{value:.4f}"


def _interval(bounds: Sequence[float]) -> str:
    return f"{bounds[0]:.4f} to {bounds[1]:.4f}"
