"""Scores a predictions file under named profiles, with intervals and a paired test, and writes JSON and Markdown."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from .bert_scores import ENGLISH_MODEL, BertScorer
from .bootstrap import confidence_intervals, interval_methods, paired_test, resample_scores
from .predict import write_json, write_text
from .prediction_files import (
    Corpus,
    PredictionRecord,
    PredictionSummary,
    check_predictions,
    check_same_records,
    read_predictions,
)
from .profiles import get_profile
from .rating_metrics import _as_ratings
from .record_statistics import ProfileStatistics, StatisticsCollector
from .sentiment import Sentiment
from .text_metrics import _check_pairs, require_text_metrics

logger = logging.getLogger(__name__)

METRICS_FILE, METRICS_TABLE_FILE = "metrics.json", "metrics.md"

_NOT_COVERED = (
    "p-values are not corrected for the number of metrics. Intervals and test cover the draw of the test records "
    "alone, not the seeds of training and decoding."
)
_OF_FILE = (
    "Without the data set, feature coverage counts the file's own features, and clipped ratings keep to the file's own "
    "range: such scores cannot be compared with those of a whole corpus."
)

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
    compare_protocol: str | None = None,
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
        compare (`str` or `os.PathLike`, *optional*):
            Another system's predictions of the same records. Both are scored on the optional keys that both files have.
        compare_protocol (`str`, *optional*): The other system's protocol; only named in the result.

    Returns:
        `dict`: the scores of the first profile by key, then `profile`, `protocol`, `num_records`, `signatures`,
        `confidence_95` (`None` where nothing varies) and `confidence_method` by key, `bootstrap` (resamples and seed);
        with `compare`, `comparison` (the other's protocol and scores, and the paired test by key); with several
        profiles, `profiles`, which has the same for each of the others.

    Raises:
        [`DataError`]: For files that cannot be scored, before anything is computed.
        `ValueError`: If the sentiment is to be scored, and one of the files has no ratings.
        `ImportError`: If a package is missing, which the message names with its extra.
    """
    options = options or EvaluationOptions()
    summary, corpus = check_predictions(path, corpus)
    require_ratings(path, summary, options)
    present, others = summary.present, []
    if compare is not None:
        check_same_records(path, compare)
        other_summary, _ = check_predictions(compare, corpus)
        require_ratings(compare, other_summary, options)
        present &= other_summary.present
        if alone := summary.present ^ other_summary.present:
            logger.warning("Scored without %s, which only one of the two files has", ", ".join(sorted(alone)))
        others = collect_statistics(read_predictions(compare), options, corpus, present)
    systems = collect_statistics(read_predictions(path), options, corpus, present)
    if any(_is_of_file(statistics.signatures) for statistics in systems):
        logger.warning("%s: %s", path, _OF_FILE)
    resampled = resample_scores([*systems, *others], options.num_resamples, options.seed)
    results = []
    for place, statistics in enumerate(systems):
        result = _result(statistics, resampled[place], protocol, options)
        if others:
            other, other_resampled = others[place], resampled[len(systems) + place]
            result["comparison"] = {
                "compared_with": os.fspath(compare),
                "protocol": compare_protocol,
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
    if features is not None:
        # As in files
        features = [tuple(feature.strip() for feature in row if feature.strip()) for row in features]
    given = {feature for row in features or [] for feature in row}
    corpus = Corpus(
        given if feature_set is None else {feature.strip() for feature in feature_set},
        rating_range,
        is_file=feature_set is None,
        is_file_range=rating_range is None,
    )
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
            None if features is None else features[row],
            columns["rating"][row] if ratings is not None else None,
            columns["predicted_rating"][row] if predicted_ratings is not None else None,
        )
        for row in range(len(predictions))
    )
    statistics, *_ = collect_statistics(records, options, corpus, frozenset(columns))
    scores = statistics.scores()
    return {**scores, "signatures": {key: statistics.signatures[key] for key in scores}}


def score_predictions(rows: Sequence[dict[str, Any]], protocol: str) -> dict[str, Any]:
    """
    Scores of rows as [`predict_records`] returns them, under `default`.

    Args:
        rows (`Sequence[dict]`): The rows.
        protocol (`"given"` or `"predicted"`): The one that they were predicted under; only named in the result.

    Returns:
        `dict`: the scores of ratings and texts by key, then `profile`, `protocol` and `signatures`. Those that need the
        features of the whole corpus are left to [`evaluate_predictions`].
    """
    if not rows:
        raise ValueError("Expected at least one prediction to score, but got none.")
    options = EvaluationOptions()
    scores = score_profile(
        [row["prediction"] for row in rows],
        [row["reference"] for row in rows],
        options,
        features=[[row["feature"]] if isinstance(row["feature"], str) else list(row["feature"] or []) for row in rows],
        ratings=[row["rating"] for row in rows],
        predicted_ratings=[row["predicted_rating"] for row in rows],
    )
    of_corpus = {"feature_coverage", "feature_diversity"}
    signatures = {key: text for key, text in scores.pop("signatures").items() if key not in of_corpus}
    named = {"profile": options.profiles[0], "protocol": protocol, "signatures": signatures}
    return {**{key: scores[key] for key in signatures}, **named}


def require_ratings(path: str | os.PathLike[str], summary: PredictionSummary, options: EvaluationOptions) -> None:
    """Raises `ValueError` where the sentiment is to be scored, and a file has no ratings to compare it with."""
    if options.sentiment is not None and "rating" not in summary.present:
        raise ValueError(f"{path}: expected 'rating' in every line to compare the sentiment with, but got none.")


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
            lines += [_compared(comparison, block["protocol"]), ""]
            head += ["other", "difference", "95 % interval", "p"]
        lines += [_row(head), _row(["---"] + ["---:"] * (len(head) - 1))]
        for key in block["signatures"]:
            if key not in block:
                continue
            mark = "*" if block["confidence_method"][key] == "jackknife" else ""
            cells = [key, _number(block[key]), _interval(block["confidence_95"][key], mark)]
            if comparison:
                test = comparison["tests"].get(key)
                cells += ["", "", "", ""]
                if test is not None:
                    p_value = format_p_value(test["p_value"])
                    interval = _interval(test["confidence_95"], mark)
                    cells[3:] = [_number(comparison["scores"][key]), _number(test["difference"]), interval, p_value]
            lines.append(_row(cells))
        resamples, seed = block["bootstrap"]["resamples"], block["bootstrap"]["seed"]
        lines += ["", f"Intervals: bootstrap, {resamples} resamples, seed {seed}; * jackknife."]
        lines += [_NOT_COVERED]
        if _is_of_file(block["signatures"]):
            lines += ["", _OF_FILE]
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
        "confidence_95": confidence_intervals(statistics, resampled),
        "confidence_method": interval_methods(statistics),
        "bootstrap": {"resamples": options.num_resamples, "seed": options.seed},
    }


def _compared(comparison: Mapping[str, Any], protocol: str | None) -> str:
    """Names the other system, and says where it may have been told more or less than the first one."""
    other = comparison["protocol"]
    line = f"Compared with `{comparison['compared_with']}`{f', protocol {other}' if other else ''}."
    if None in (protocol, other):
        return f"{line} Whether both systems had the same protocol is not known."
    if protocol != other:
        line += " The protocols differ: so does what the systems were told of the records."
    return line


def _is_of_file(signatures: Mapping[str, str]) -> bool:
    """Whether scores depend on what else the predictions file holds."""
    return any("|features:file-" in signature or "|clip:file:" in signature for signature in signatures.values())


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def format_p_value(value: float | None) -> str:
    """A p-value as tables show it; none where there was no test."""
    return "" if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"


def _number(value: float) -> str:
    return f"{value:.4f}"


def _interval(bounds: Sequence[float] | None, mark: str) -> str:
    return "" if bounds is None else f"{bounds[0]:.4f} to {bounds[1]:.4f}{mark}"
