"""The tables of a study, as Markdown and JSON, and its figures, from the cells that are finished."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..evaluation.cluster_report import predict_pairs_of
from ..evaluation.evaluator import format_p_value
from ..evaluation.predict import write_json, write_text
from ..evaluation.sparsity import THIRDS
from ..plots import LATENT_SPACE_FILE, plot_latent_space
from .config import PROTOCOLS, Cell, StudyConfig
from .figures import ABLATION_FILE, ALPHA_FILE, GATES_FILE, SPARSITY_FILE, plot_ablations, plot_lines
from .paper_results import PAPER_RESULTS
from .peers import compare_with_peer, score_peer
from .runner import StudyData, load_rating_model, lock_study, read_metrics
from .scoring import WHOLE

logger = logging.getLogger(__name__)

TABLES_FILE, REPORT_FILE = "study.json", "study.md"
OURS = "GaVaMoE"
# In place of a protocol: what the paper reports
PAPER = "paper"
ABLATION_LABELS = {
    "no_multi_gating": "no multi-gating",
    "no_fine_grained_experts": "no fine-grained experts",
    "base": "plain Llama",
}


@dataclass(frozen=True)
class Metric:
    """How a score is shown: its column, unit and decimals, and which way is better."""

    label: str
    unit: str
    decimals: int
    lower_is_better: bool = False


METRICS = {
    "rating_rmse": Metric("RMSE", "stars", 3, lower_is_better=True),
    "rating_mae": Metric("MAE", "stars", 3, lower_is_better=True),
    "bleu_1": Metric("BLEU-1", "%", 2),
    "bleu_4": Metric("BLEU-4", "%", 2),
    "rouge_1": Metric("ROUGE-1", "%", 2),
    "rouge_2": Metric("ROUGE-2", "%", 2),
    "rouge_l": Metric("ROUGE-L", "%", 2),
    "distinct_1": Metric("Distinct-1", "%", 1),
    "distinct_2": Metric("Distinct-2", "%", 1),
    "bertscore_precision": Metric("BERTScore P", "0 to 1", 3),
    "bertscore_recall": Metric("BERTScore R", "0 to 1", 3),
    "bertscore_f1": Metric("BERTScore F", "0 to 1", 3),
    "unique_sentence_ratio": Metric("USR", "share", 3),
    "feature_match": Metric("FMR", "share", 3),
    "feature_coverage": Metric("FCR", "share", 3),
    "feature_diversity": Metric("DIV", "shared features", 3, lower_is_better=True),
}
# Of the smaller tables and the figures; with ranges, all metrics would be too wide to read
SHORT = ("rating_rmse", "bleu_4", "rouge_l", "distinct_2", "feature_match")

Summary = dict[str, dict[str, float]]
# By seed and metric
PeerTests = dict[int, dict[str, dict[str, Any]]]


@dataclass
class Row:
    """
    A row of a table.

    Attributes:
        label (`str`): The method, or the setting that the table compares.
        protocol (`str`): `"given"`, `"predicted"`, or `"paper"` for what the paper reports.
        seeds (`int`): How many seeds it is of.
        scores (`dict[str, dict[str, float]]`): `mean`, `min` and `max` over the seeds by metric.
        part (`str`, defaults to `"all"`): Part of the test split.
        num_parameters (`int`, *optional*): Of the whole model.
    """

    label: str
    protocol: str
    seeds: int
    scores: Summary
    part: str = WHOLE
    num_parameters: int | None = None


def summarize(scores: Sequence[Mapping[str, float]]) -> Summary:
    """
    Mean and range over seeds of every known metric that all of them have.

    Args:
        scores (`Sequence[dict[str, float]]`): Scores by name, one for each seed.

    Returns:
        `dict[str, dict[str, float]]`: `mean`, `min` and `max` by metric.
    """
    summary = {}
    for name in METRICS:
        values = [score[name] for score in scores if name in score]
        if values and len(values) == len(scores):
            summary[name] = {"mean": sum(values) / len(values), "min": min(values), "max": max(values)}
    return summary


def write_report(config: StudyConfig, data: StudyData) -> dict[str, list[Row]]:
    """
    Leaves in the study's folder `study.md`, `study.json` and, with matplotlib, the figures `ablation.png`,
    `sparsity.png`, `gates.png`, `alpha.png` and `latent_space.png`, from the cells that are finished by now. The
    latent spaces are those of the rating models after stage 1, of the first seed.

    Args:
        config ([`StudyConfig`]): The study.
        data ([`StudyData`]): Its data, from [`read_study_data`].

    Returns:
        `dict[str, list[Row]]`: the rows of the tables `main`, `ablation`, `gates`, `alpha` and `sparsity`.

    Raises:
        `ValueError`: for a peer's file whose rows are not those of the test split.
    """
    peers = {name: score_peer(config, data, name) for name in config.peers}
    with lock_study(config):
        # Not before: another process may have finished cells, and reported them, in the meantime
        tables = study_tables(config, peers)
        tests = {name: compare_with_peer(config, data, name) for name in config.peers}
        figures = _draw_figures(config, data, tables)
        cells = {cell.name: read_metrics(config, cell) for cell in config.cells()}
        missing = [name for name, metrics in cells.items() if metrics is None]
        report = {
            "data": data.summary,
            "seeds": config.seeds,
            "cells": {"finished": len(cells) - len(missing), "missing": missing},
            "tables": {name: [vars(row) for row in rows] for name, rows in tables.items()},
            "peer_tests": tests,
            "paper": PAPER_RESULTS.get(config.paper_dataset or ""),
        }
        write_json(config.folder / TABLES_FILE, report)
        write_text(config.folder / REPORT_FILE, _markdown(config, data, tables, tests, missing, figures))
    return tables


# Tables


def study_tables(config: StudyConfig, peers: Mapping[str, dict[str, dict[str, float]]]) -> dict[str, list[Row]]:
    """
    The rows of all tables.

    Args:
        config ([`StudyConfig`]): The study.
        peers (`dict[str, dict[str, dict[str, float]]]`): What [`score_rows`] gives for each peer.

    Returns:
        `dict[str, list[Row]]`: By table; a row without a single finished cell is left out.
    """

    def rows(label: str, cell_of: Callable[[int], Cell], parts: Iterable[str] = (WHOLE,)) -> list[Row]:
        finished = [found for seed in config.seeds if (found := read_metrics(config, cell_of(seed)))]
        made = []
        for protocol in config.protocols:
            for part in parts:
                scores = [found["scores"][protocol][part] for found in finished if part in found["scores"][protocol]]
                if scores:
                    size = finished[0]["num_parameters"]
                    made.append(Row(label, protocol, len(scores), summarize(scores), part, size))
        return made

    def peer_rows(parts: Iterable[str] = (WHOLE,)) -> list[Row]:
        return [
            Row(name, config.peers[name]["protocol"], 1, summarize([scores[part]]), part)
            for name, scores in peers.items()
            for part in parts
            if part in scores
        ]

    variants = [(OURS, config.main_cell)]
    variants += [
        (ABLATION_LABELS[name], lambda seed, name=name: config.ablation_cell(seed, name)) for name in config.ablations
    ]
    paper = PAPER_RESULTS[config.paper_dataset]["main"] if config.paper_dataset else {}
    return {
        "main": [
            *rows(OURS, config.main_cell),
            *peer_rows(),
            *(Row(f"{name} (paper)", PAPER, 1, summarize([scores])) for name, scores in paper.items()),
        ],
        "ablation": [row for label, cell_of in variants for row in rows(label, cell_of)],
        "gates": [
            row for k in config.num_clusters for row in rows(str(k), lambda seed, k=k: Cell(seed, k, config.main_alpha))
        ],
        "alpha": [
            row
            for alpha in map(float, config.alphas)
            for row in rows(f"{alpha:g}", lambda seed, alpha=alpha: Cell(seed, config.main_num_clusters, alpha))
        ],
        "sparsity": [
            *(row for label, cell_of in variants for row in rows(label, cell_of, THIRDS)),
            *peer_rows(THIRDS),
        ],
    }


# Markdown


def _markdown(
    config: StudyConfig,
    data: StudyData,
    tables: Mapping[str, list[Row]],
    tests: Mapping[str, PeerTests],
    missing: list[str],
    figures: list[str],
) -> str:
    summary, paper = data.summary, PAPER_RESULTS.get(config.paper_dataset or "")
    sizes = ", ".join(f"{name} {count:,}" for name, count in summary["splits"].items())
    seeds = ", ".join(map(str, config.seeds))
    lines = [
        "# Study",
        "",
        f"Data: {summary['users']:,} users, {summary['items']:,} items, {summary['records']:,} records ({sizes}), "
        f"{summary['features']:,} features.",
    ]
    if paper:
        lines.append("The paper's: {users:,}, {items:,}, {records:,} and {features:,}.".format(**paper["data"]))
    lines += [
        "",
        f"Seeds {seeds} of the training; the data is split once. A figure is the mean over the seeds, with the least "
        "and the greatest in brackets. The best mean of each protocol is bold, whether or not the ranges overlap. "
        "Given: the record's rating and feature are in the prompt, as in the paper. Predicted: neither.",
    ]
    if missing:
        lines += ["", f"Not finished: {len(missing)} of {len(config.cells())} cells ({', '.join(missing)})."]
    titles = {
        "main": ("Main table", "method"),
        "ablation": ("Ablations, at equal data, budget and experts' parameters", "model"),
        "gates": (f"Number of gates, alpha = {config.main_alpha:g}", "K"),
        "alpha": (f"Weight of the negative ELBO, K = {config.main_num_clusters}", "alpha"),
        "sparsity": ("Sparsity: thirds of the test split by their users' records in train", "model"),
    }
    for name, (title, heading) in titles.items():
        metrics = METRICS if name == "main" else SHORT
        lines += ["", f"## {title}", "", *markdown_table(tables[name], heading, metrics, name in ("ablation", "gates"))]
        if name == "main":
            for peer, by_seed in tests.items():
                lines += peer_test_table(peer, config.peers[peer]["protocol"], by_seed)
        if name == "sparsity":
            lines += ["", _thirds_line(data)]
        if name == "gates" and paper:
            lines += ["", paper["gates"]]
    lines += ["", *(f"![{Path(name).stem}]({name})" for name in figures)]
    return "\n".join(lines).rstrip() + "\n"


def _thirds_line(data: StudyData) -> str:
    counts: dict[str, int] = {}
    for user in data.records["train"]["user"]:
        counts[user] = counts.get(user, 0) + 1
    users = list(data.records["test"]["user"])
    ranges = []
    for name, rows in data.thirds.items():
        found = [counts[users[row]] for row in rows]
        ranges.append(f"{name} {len(rows)} records of users with {min(found)} to {max(found)}" if rows else name)
    return f"Records in train: {'; '.join(ranges)}."


def markdown_table(
    rows: Sequence[Row], heading: str, metrics: Iterable[str] = tuple(METRICS), with_sizes: bool = False
) -> list[str]:
    """
    A table in Markdown, with a column for each metric that any row has, and the rows of a protocol together.

    Args:
        rows (`Sequence[Row]`): Its rows.
        heading (`str`): Of the first column.
        metrics (`Iterable[str]`, *optional*): The metrics to show; all that are known by default.
        with_sizes (`bool`, *optional*, defaults to `False`): Whether to show the numbers of parameters.

    Returns:
        `list[str]`: The lines.
    """
    if not rows:
        return ["No cell is finished yet."]
    # The sort is stable: within a protocol the rows stay as they are
    rows = sorted(rows, key=lambda row: (*PROTOCOLS, PAPER).index(row.protocol))
    columns = [name for name in metrics if any(name in row.scores for row in rows)]
    has_parts = any(row.part != WHOLE for row in rows)
    headings = [heading, "protocol", *(["part"] if has_parts else []), *(["parameters, M"] if with_sizes else [])]
    headings += [f"{METRICS[name].label}, {METRICS[name].unit}" for name in columns]
    lines = [f"| {' | '.join(headings)} |", f"|{'---|' * len(headings)}"]
    for row in rows:
        cells = [row.label, row.protocol, *([row.part] if has_parts else [])]
        if with_sizes:
            cells.append("" if row.num_parameters is None else f"{row.num_parameters / 1e6:.2f}")
        cells += [_score_cell(row, name, rows) for name in columns]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def peer_test_table(peer: str, protocol: str, tests: PeerTests) -> list[str]:
    """
    The paired tests against a peer in Markdown: a row for each metric, a column for each seed.

    Args:
        peer (`str`): Its name.
        protocol (`str`): That both were told the same.
        tests (`dict[int, dict[str, dict]]`): From [`compare_with_peer`].

    Returns:
        `list[str]`: The lines, the heading among them; none where there is no test.
    """
    if not tests:
        return []
    lines = [
        "",
        f"### {OURS} less {peer}, {protocol}",
        "",
        "Difference on the same records of each seed, its 95 % interval and p, by paired bootstrap. p is not corrected "
        "for the number of metrics.",
        "",
        f"| metric | {' | '.join(f'seed {seed}' for seed in tests)} |",
        f"|{'---|' * (1 + len(tests))}",
    ]
    for name, metric in METRICS.items():
        found = [by_metric.get(name) for by_metric in tests.values()]
        if any(found):
            cells = [_difference(test, metric.decimals) if test else "" for test in found]
            lines.append(f"| {metric.label}, {metric.unit} | {' | '.join(cells)} |")
    return lines


def _difference(test: Mapping[str, Any], decimals: int) -> str:
    text, interval, p = f"{test['difference']:+.{decimals}f}", test["confidence_95"], test["p_value"]
    if interval is not None:
        text += f" ({interval[0]:+.{decimals}f} to {interval[1]:+.{decimals}f})"
    return text if p is None else f"{text}, p {format_p_value(p)}"


def _score_cell(row: Row, name: str, rows: Sequence[Row]) -> str:
    if name not in row.scores:
        return ""
    metric, score = METRICS[name], row.scores[name]
    text = f"{score['mean']:.{metric.decimals}f}"
    rivals = [
        other.scores[name]["mean"]
        for other in rows
        if name in other.scores and (other.protocol, other.part) == (row.protocol, row.part)
    ]
    if len(set(rivals)) > 1 and score["mean"] == (min(rivals) if metric.lower_is_better else max(rivals)):
        text = f"**{text}**"
    if row.seeds > 1:
        text += f" ({score['min']:.{metric.decimals}f} to {score['max']:.{metric.decimals}f})"
    return text


# Figures


def _draw_figures(config: StudyConfig, data: StudyData, tables: Mapping[str, list[Row]]) -> list[str]:
    """The names of the figures that could be drawn; one log line for each that could not."""
    labels = {name: f"{METRICS[name].label} ({METRICS[name].unit})" for name in SHORT}
    given = config.protocols[0]
    # A figure of everything would be read by nobody: the full model, the plain one, and the peers
    sparsity = [
        row
        for row in tables["sparsity"]
        if row.label in config.peers or (row.protocol == given and row.label in (OURS, ABLATION_LABELS["base"]))
    ]
    lines = {
        GATES_FILE: (tables["gates"], "label", "protocol", "Number of gates K"),
        ALPHA_FILE: (tables["alpha"], "label", "protocol", "Weight alpha of the negative ELBO"),
        SPARSITY_FILE: (sparsity, "part", "label", "Third, most frequent users first"),
    }
    drawn = []
    for name, draw in {
        ABLATION_FILE: lambda path: plot_ablations(tables["ablation"], labels, path),
        **{
            name: lambda path, entry=entry: plot_lines(entry[0], labels, path, *entry[1:])
            for name, entry in lines.items()
        },
        LATENT_SPACE_FILE: lambda path: _draw_latent_spaces(config, data, path),
    }.items():
        try:
            draw(config.folder / name)
            drawn.append(name)
        except Exception as error:
            # Whatever it is: the tables are not to fail for a figure
            logger.warning("Left out %s: %s", name, error)
    return drawn


def _draw_latent_spaces(config: StudyConfig, data: StudyData, path: Path) -> None:
    panels = {}
    for k in config.num_clusters:
        rating_model = load_rating_model(config, Cell(config.seeds[0], k, config.main_alpha))
        if rating_model is not None:
            outputs = predict_pairs_of(rating_model, data.processor, data.records["train"])
            panels[f"K = {k}"] = outputs.latent_mean, outputs.cluster_posterior.argmax(dim=-1)
    plot_latent_space(panels, path, max_pairs=1000)
