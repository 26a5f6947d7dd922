"""The card of a checkpoint, `README.md`: what was trained on what, how well, and what to mind, from the run's files."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from datasets import Dataset
from huggingface_hub import EvalResult, EvalResultEntry, ModelCard, ModelCardData, eval_result_entries_to_yaml

from .data.readers import SUFFIXES
from .evaluation.cluster_report import CLUSTERS_FILE
from .evaluation.predict import write_text
from .modeling_gavamoe import GaVaMoEForCausalLM
from .plots import LATENT_SPACE_FILE
from .processing_gavamoe import GaVaMoEProcessor
from .version import __version__

CARD_FILE = "README.md"
TEMPLATE = Path(__file__).with_name("model_card_template.md")

# Where the Hub looks for scores on data sets that it has, beside `model-index`
EVAL_RESULTS_FILE = ".eval_results/gavamoe.yaml"

_TRAINING_LOG_FILE, _PREDICTIONS_FILE = "training_log.json", "predictions_test.jsonl"
# Last line of a card: by the digest, a card that somebody has edited is told from one that may be replaced
_MARK = "<!-- Made by gavamoe-hf. Once edited, this card is left alone by later runs. "
_MARK_END = " -->\n"

# What each score is, its decimals, and whether less of it is better. Others are shown under their own names.
_METRICS = {
    "rating_rmse": ("RMSE of the predicted rating, stars", 3, True),
    "rating_mae": ("MAE of the predicted rating, stars", 3, True),
    "bleu_1": ("BLEU-1, %", 2, False),
    "bleu_4": ("BLEU-4, %", 2, False),
    "rouge_1": ("ROUGE-1, %", 2, False),
    "rouge_2": ("ROUGE-2, %", 2, False),
    "rouge_l": ("ROUGE-L, %", 2, False),
    "distinct_1": ("Distinct-1, %", 2, False),
    "distinct_2": ("Distinct-2, %", 2, False),
    "unique_sentence_ratio": ("different explanations of all explanations, 0 to 1", 3, False),
    "feature_match": ("explanations that name a given feature, 0 to 1", 3, False),
    "feature_coverage": ("features of the corpus that any explanation names (FCR), 0 to 1", 3, False),
    "feature_diversity": ("features that two explanations share (DIV), mean", 3, True),
    "bertscore_precision": ("BERTScore, precision", 4, False),
    "bertscore_recall": ("BERTScore, recall", 4, False),
    "bertscore_f1": ("BERTScore, F1", 4, False),
    "bertscore_precision_std": ("BERTScore, precision, standard deviation", 4, True),
    "bertscore_recall_std": ("BERTScore, recall, standard deviation", 4, True),
    "bertscore_f1_std": ("BERTScore, F1, standard deviation", 4, True),
    "sentiment_agreement": ("explanations with the sentiment of their rating, of those with any, 0 to 1", 3, False),
    "sentiment_neutral": ("explanations without a sentiment, 0 to 1", 3, True),
    "hr_10_sampled": ("hit ratio at 10, among 100 sampled items", 3, False),
    "ndcg_10_sampled": ("NDCG at 10, among 100 sampled items", 3, False),
    "hr_10_full": ("hit ratio at 10, among all items", 3, False),
    "ndcg_10_full": ("NDCG at 10, among all items", 3, False),
    "cluster_ari": ("clusters against the planted groups, adjusted Rand index", 3, False),
    "wording_match": ("explanations in the wording of the user's planted group, 0 to 1", 3, False),
}
# What describes the clusters and the records is no score
_NOT_SCORES = {"min_cluster_share", "num_records", "num_dropped"}
_BASELINES = {
    "mean": "mean rating",
    "bias": "user + item biases",
    "mf": "matrix factorisation",
    "popularity": "popularity",
}
# Options of stage 2 that a card shows. Others can hold paths or tokens of whoever trained.
_TRAINING_OPTIONS = (
    *("num_train_epochs", "max_steps", "learning_rate", "lr_scheduler_type", "warmup_steps"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "weight_decay", "max_grad_norm", "max_length"),
    *("rating_learning_rate_scale", "feature_dropout", "trainable_parts", "bf16", "seed", "metric_for_best_model"),
)
_LORA_OPTIONS = ("use_peft", "lora_r", "lora_alpha", "lora_dropout", "use_rslora", "load_in_4bit")
_EVALUATIONS_SHOWN = 5
_TYPICAL_SHOWN = 3
_EXAMPLES_SHOWN, _EXAMPLE_WIDTH = 3, 400
_NAME_WIDTH = 40

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
# What would be markup in a line of text: an underscore is, unless it is inside a word
_MARKUP = re.compile(r"[\\`*<>\[\]$@&~]|(?<![^\W_])_|_(?![^\W_])|(?<=www)\.|:(?=//)", re.IGNORECASE)


def model_card(
    model: GaVaMoEForCausalLM,
    processor: GaVaMoEProcessor,
    records: Mapping[str, Dataset],
    metrics: Mapping[str, Any],
    run_options: Mapping[str, Any],
    output_dir: str | os.PathLike[str],
    training_args: Any = None,
) -> ModelCard:
    """
    The card of a trained checkpoint, with `model-index` results in its metadata. It names no user, and no file by its
    whole path; names from the data are escaped, and can be neither Markdown nor HTML.

    Args:
        model ([`GaVaMoEForCausalLM`]): The model.
        processor ([`GaVaMoEProcessor`]): Its processor.
        records (`Mapping[str, Dataset]`): The splits, each with the columns user, item, rating, feature and
            explanation.
        metrics (`Mapping[str, Any]`):
            What `metrics.json` holds. Where there are `profile`, `protocol`, `signatures` (by metric) and
            `confidence_95` (low and high, by metric), these are shown beside the scores; the protocol is `given` if
            there is none, and not known where it is `None`.
        run_options (`Mapping[str, Any]`):
            What `run.json` holds: `dataset`, and of the options that differ from their defaults above all
            `base_model`, `license`, `language` and `hub_model_id`. A license is stated only where it is given.
        output_dir (`str` or `os.PathLike`):
            The checkpoint's folder, whose name is the model's where there is no `hub_model_id`. `training_log.json`,
            `clusters.json` and `latent_space.png` are shown if there, and explanations of `predictions_test.jsonl`.
        training_args ([`GaVaMoESFTConfig`], *optional*): Stage 2; what `run_options` says of it if not given.

    Returns:
        [`~huggingface_hub.ModelCard`]: the card, not validated by the Hub, which would need a network.
    """
    folder = Path(output_dir)
    hub_id = run_options.get("hub_model_id")
    hub_id = hub_id if hub_id and _HUB_ID.fullmatch(hub_id) else None
    name = hub_id.split("/")[-1] if hub_id else _one_line(folder.resolve().name) or "gavamoe"
    base_model = run_options.get("base_model")
    return ModelCard.from_template(
        _card_data(name, metrics, run_options, _widget(folder / _PREDICTIONS_FILE, processor)),
        template_path=str(TEMPLATE),
        model_name=_text(name),
        model_path=hub_id or ".",
        config=model.config,
        dataset=_source(run_options.get("dataset"), "https://huggingface.co/datasets/"),
        is_synthetic=run_options.get("dataset") == "synthetic",
        is_from_hub=_is_hub_id(run_options.get("dataset")),
        license_text=_license(run_options),
        data_table=_data_table(records),
        rating_table=_rating_table(records, model.config.rating_levels),
        popular_share=f"{_share_of_popular(records['train']['item'], len(processor.items)):.0%}",
        base_model=_source(base_model, "https://huggingface.co/") if base_model else "none, from scratch",
        model_table=_model_table(model, run_options, training_args),
        training_table=_training_table(run_options, training_args),
        hardware=_hardware(),
        hours=_hours(folder / _TRAINING_LOG_FILE),
        log_table=_log_table(folder / _TRAINING_LOG_FILE, training_args),
        num_test=f"{len(records['test']):,}",
        protocol=_text(metrics.get("protocol", "given") or ""),
        profile=_text(metrics.get("profile") or ""),
        metrics_table=_metrics_table(metrics),
        baselines_table=_baselines_table(metrics),
        clusters_table=_clusters_table(folder / CLUSTERS_FILE),
        min_cluster_share=metrics.get("min_cluster_share"),
        figure=LATENT_SPACE_FILE if (folder / LATENT_SPACE_FILE).is_file() else None,
        versions=f"gavamoe-hf {__version__}, transformers {transformers.__version__}, torch {torch.__version__}",
    )


def write_model_card(card: ModelCard, output_dir: str | os.PathLike[str]) -> bool:
    """
    Writes a card as `README.md`, whole or not at all, unless there is one that somebody wrote or edited. Its scores are
    written as `.eval_results/gavamoe.yaml`, too, where they are of a data set of the Hub.

    Args:
        card ([`~huggingface_hub.ModelCard`]): From [`model_card`].
        output_dir (`str` or `os.PathLike`): The checkpoint's folder.

    Returns:
        `bool`: whether it was written.
    """
    _write_eval_results(card, Path(output_dir) / EVAL_RESULTS_FILE)
    path = Path(output_dir) / CARD_FILE
    if path.exists() and not is_unedited_card(path):
        return False
    content = str(card).rstrip() + "\n\n"
    write_text(path, content + _mark(content))
    return True


def is_unedited_card(path: str | os.PathLike[str]) -> bool:
    """Whether a file is a card as [`write_model_card`] left it."""
    path = Path(path)
    if not path.is_file():
        return False
    content, mark, end = path.read_text(encoding="utf-8", errors="replace").rpartition(_MARK)
    return mark + end == _mark(content)


def _mark(content: str) -> str:
    return f"{_MARK}sha256 {hashlib.sha256(content.encode()).hexdigest()}{_MARK_END}"


# Metadata


def _card_data(
    name: str, metrics: Mapping[str, Any], run_options: Mapping[str, Any], widget: list[dict[str, Any]]
) -> ModelCardData:
    dataset, base_model = run_options.get("dataset"), run_options.get("base_model")
    is_base_on_hub = _is_hub_id(base_model)
    return ModelCardData(
        model_name=name,
        library_name="transformers",
        pipeline_tag="text-generation",
        license=run_options.get("license"),
        license_name=run_options.get("license_name"),
        license_link=run_options.get("license_link"),
        language=run_options.get("language"),
        tags=["gavamoe", "recommendation", "explainable-recommendation", "mixture-of-experts"],
        datasets=[dataset] if _is_hub_id(dataset) else None,
        base_model=base_model if is_base_on_hub else None,
        # With LoRA, too: what the folder holds is merged
        base_model_relation="finetune" if is_base_on_hub else None,
        widget=widget or None,
        eval_results=_eval_results(metrics, dataset) or None,
    )


def _eval_results(metrics: Mapping[str, Any], dataset: str | None) -> list[EvalResult]:
    name = _short_name(dataset)
    how = {key: metrics[key] for key in ("protocol", "profile") if metrics.get(key)}
    signatures = metrics.get("signatures") or {}
    return [
        EvalResult(
            task_type="text-generation",
            task_name="Explainable recommendation",
            dataset_type=dataset if _is_hub_id(dataset) else name,
            dataset_name=name,
            dataset_split="test",
            metric_type=_metric_type(key),
            metric_name=_METRICS.get(key, (key,))[0],
            metric_value=round(value, 6),
            metric_args={**how, "signature": signatures[key]} if key in signatures else how or None,
        )
        for key, value in _scores(metrics)
        if math.isfinite(value)
    ]


def _write_eval_results(card: ModelCard, path: Path) -> None:
    """The scores in the Hub's own format, or none where the data set is not there; those of an earlier run go."""
    results = card.data.get("eval_results") or []
    if not (results and card.data.get("datasets")):
        path.unlink(missing_ok=True)
        return
    keys = {name: key for key, (name, *_) in _METRICS.items()}
    entries = [
        EvalResultEntry(
            dataset_id=result.dataset_type,
            task_id=keys.get(result.metric_name, result.metric_name),
            value=result.metric_value,
            notes="; ".join(f"{name}: {value}" for name, value in (result.metric_args or {}).items()) or None,
        )
        for result in results
    ]
    path.parent.mkdir(exist_ok=True)
    write_text(path, yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False, allow_unicode=True))


def _widget(path: Path, processor: GaVaMoEProcessor) -> list[dict[str, Any]]:
    """Explanations of the test split as the Hub shows examples: what was asked, without the user, and what was said."""
    if not path.is_file():
        return []
    examples: list[dict[str, Any]] = []
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            template = processor.prompt_template if row["feature"] else processor.prompt_template_without_features
            asked = template.format(
                sentiment=processor.sentiment(row["rating"]),
                features=", ".join(row["feature"] or ()),
                item=row["item"],
                user="the user",
            )
            said = _one_line(row["prediction"])[:_EXAMPLE_WIDTH]
            if said and all(said != example["output"]["text"] for example in examples):
                examples.append({"text": _one_line(asked)[:_EXAMPLE_WIDTH], "output": {"text": said}})
            if len(examples) == _EXAMPLES_SHOWN:
                break
    return examples


def _license(run_options: Mapping[str, Any]) -> str:
    name, link = (run_options.get(f"license_{part}") for part in ("name", "link"))
    return _text(name or run_options.get("license") or "") + (f" ({_text(link, width=None)})" if link else "")


def _metric_type(key: str) -> str:
    first = key.partition("_")[0]
    return first if first in ("bleu", "rouge") else key.removeprefix("rating_")


def _is_hub_id(name: str | None) -> bool:
    """Whether what a run was given by this name came from the Hub: where the readers, too, look there for it."""
    if not name or name == "synthetic" or not _HUB_ID.fullmatch(name):
        return False
    return Path(name).suffix.lower() not in SUFFIXES and not Path(name).expanduser().exists()


def _short_name(name: str | None) -> str:
    """Without the folders of whoever trained."""
    return _one_line((name if _is_hub_id(name) else Path(name or "").name) or "unknown")


def _source(name: str | None, hub: str) -> str:
    return f"[{_text(name)}]({hub}{name})" if _is_hub_id(name) else _text(_short_name(name))


# Tables


def _data_table(records: Mapping[str, Dataset]) -> str:
    rows = []
    for split, part in records.items():
        words = [len(text.split()) for text in part["explanation"]]
        described = sum(bool(names) for names in part["feature"])
        counts = (len(part), len(set(part["user"])), len(set(part["item"])))
        shares = (f"{sum(words) / max(len(words), 1):.1f}", f"{described / max(len(part), 1):.0%}")
        rows.append([_text(split), *(f"{count:,}" for count in counts), *shares])
    return _table(["split", "records", "users", "items", "mean words of an explanation", "with a feature"], rows)


def _rating_table(records: Mapping[str, Dataset], levels: Sequence[float]) -> str:
    counts = {split: Counter(part["rating"]) for split, part in records.items()}
    rows = [
        [f"{level:g}", *(f"{count[level] / max(count.total(), 1):.1%}" for count in counts.values())]
        for level in levels
    ]
    return _table(["rating", *map(_text, counts)], rows)


def _share_of_popular(items: Sequence[str], num_items: int) -> float:
    """Share of the records that the tenth of the items with the most records has."""
    return sum(count for _, count in Counter(items).most_common(max(num_items // 10, 1))) / max(len(items), 1)


def _model_table(model: GaVaMoEForCausalLM, run_options: Mapping[str, Any], training_args: Any) -> str:
    config = model.config
    total, rating = (sum(p.numel() for p in part.parameters()) for part in (model, model.rating_model))
    shared = config.shared_expert_intermediate_size or "none"
    is_chosen = run_options.get("num_clusters") == "auto"
    rows = [
        ["parameters", f"{total / 1e6:.2f} M, {rating / 1e6:.2f} M of them in the rating model"],
        ["layers, width", f"{config.num_hidden_layers}, {config.hidden_size}"],
        ["clusters, which are the gates", f"{config.num_clusters}{', chosen by silhouette' if is_chosen else ''}"],
        ["experts a layer, used by each token", f"{config.num_local_experts}, {config.num_experts_per_tok}"],
        ["width of an expert, of the shared one", f"{config.moe_intermediate_size}, {shared}"],
        ["size of the user and item embeddings, of the latent", f"{config.vae_embedding_size}, {config.latent_size}"],
        ["likelihood of ratings", _text(config.rating_likelihood)],
    ]
    for name, symbol in (("alpha", "weight of the negative ELBO in stage 2"), ("beta", "weight of the KL divergence")):
        value = getattr(training_args, name, run_options.get(name))
        rows.append([f"{symbol}, {name}", f"{getattr(config, name) if value is None else value:g}"])
    if run_options.get("ablation", "none") != "none":
        rows.append(["left out, as an ablation", _text(run_options["ablation"])])
    return _table(["model", ""], rows)


def _hardware() -> str:
    """Of this process, which has just trained."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {_text(torch.cuda.get_device_name())}"
    return f"{os.cpu_count()} CPU cores ({_text(platform.machine())})"


def _hours(path: Path) -> str:
    """How long stage 2 took, by its log; of a run that was interrupted, its last part."""
    log = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    seconds = [entry["train_runtime"] for entry in log if "train_runtime" in entry]
    return f"{seconds[-1] / 3600:.2g}" if seconds else ""


def _training_table(run_options: Mapping[str, Any], training_args: Any) -> str:
    """Options of stage 2, and those of stage 1 and of LoRA that differ from their defaults."""
    stage_1 = [name for name in run_options if name.startswith("rating_") and name not in _TRAINING_OPTIONS]
    options = {name: run_options.get(name) for name in ("expert_init", *stage_1, *_LORA_OPTIONS)}
    options |= {name: getattr(training_args, name, run_options.get(name)) for name in _TRAINING_OPTIONS}
    if (options["max_steps"] or 0) <= 0:
        del options["max_steps"]
    # An enumeration by its value
    shown = {name: getattr(value, "value", value) for name, value in options.items() if value is not None}
    return _table(["option", "value"], [[f"`{name}`", _text(value)] for name, value in shown.items()])


def _log_table(path: Path, training_args: Any) -> str:
    """The last evaluations of stage 2, each with the training loss before it, and the one whose weights were kept."""
    if not path.is_file():
        return ""
    loss, evaluations = None, []
    for entry in json.loads(path.read_text(encoding="utf-8")):
        loss = entry.get("loss", loss)
        if "eval_loss" in entry:
            evaluations.append({**entry, "loss": loss})
    kept = None
    metric = f"eval_{str(getattr(training_args, 'metric_for_best_model', None)).removeprefix('eval_')}"
    if getattr(training_args, "load_best_model_at_end", False) and all(metric in entry for entry in evaluations):
        best = max if training_args.greater_is_better else min
        kept = best(evaluations, key=lambda entry: entry[metric], default=None)
    shown = evaluations[-_EVALUATIONS_SHOWN:]
    if kept is not None and kept not in shown:
        shown = [kept, *shown]
    names = ("loss", "eval_loss", "eval_nll", "eval_mean_token_accuracy")
    rows = [
        [
            f"{entry['epoch']:.3g}{' (kept)' if entry is kept else ''}",
            *("-" if entry.get(name) is None else f"{entry[name]:.4f}" for name in names),
        ]
        for entry in shown
    ]
    header = ["epoch", "training loss", "validation loss", "NLL of a token", "token accuracy"]
    return _table(header, rows) if rows else ""


def _scores(metrics: Mapping[str, Any]) -> list[tuple[str, float]]:
    return [
        (key, value)
        for key, value in metrics.items()
        if isinstance(value, int | float)
        and not isinstance(value, bool)
        and not key.startswith("baseline_")
        and key not in _NOT_SCORES
    ]


def _label(key: str) -> str:
    return _METRICS[key][0] if key in _METRICS else _text(key)


def _value(key: str, value: float) -> str:
    return f"{value:.{_METRICS[key][1]}f}" if key in _METRICS else f"{value:.4g}"


def _metrics_table(metrics: Mapping[str, Any]) -> str:
    intervals, signatures = metrics.get("confidence_95") or {}, metrics.get("signatures") or {}
    header = ["metric", "in `metrics.json`", "value"]
    header += ["95 % interval"] * bool(intervals) + ["signature"] * bool(signatures)
    rows = []
    for key, value in _scores(metrics):
        row = [_label(key), f"`{key}`", _value(key, value)]
        if intervals:
            row.append(" to ".join(_value(key, bound) for bound in intervals.get(key) or ()))
        if signatures:
            row.append(_text(signatures.get(key, ""), width=None))
        rows.append(row)
    return _table(header, rows) if rows else ""


def _baselines_table(metrics: Mapping[str, Any]) -> str:
    """A row for each score that a baseline has too, the best of the row in bold."""
    scores = dict(_scores(metrics))
    found: dict[str, dict[str, float]] = {}
    for key, value in metrics.items():
        _, _, rest = key.partition("baseline_")
        name, _, metric = rest.partition("_")
        for of_model in (metric, f"rating_{metric}"):
            if key.startswith("baseline_") and of_model in scores:
                found.setdefault(of_model, {"": scores[of_model]})[name] = value
    names = list(dict.fromkeys(name for row in found.values() for name in row))
    rows = []
    for metric, values in found.items():
        is_less_better = _METRICS.get(metric, ("", 0, False))[2]
        shown = {name: _value(metric, value) for name, value in values.items()}
        best = shown[(min if is_less_better else max)(values, key=values.__getitem__)]
        cells = (f"**{shown[name]}**" if shown.get(name) == best else shown.get(name, "") for name in names)
        rows.append([_label(metric), *cells])
    return _table(["metric", "this model", *(_BASELINES.get(name, name) for name in names[1:])], rows) if rows else ""


def _clusters_table(path: Path) -> str:
    """From the report on the clusters, without the users that it names."""
    if not path.is_file():
        return ""
    rows = []
    for cluster in json.loads(path.read_text(encoding="utf-8"))["clusters"]:
        rating = cluster["mean_rating"]
        cells = [str(cluster["cluster"]), f"{cluster['share']:.1%}", f"{cluster['num_users']:,}"]
        cells.append("-" if rating is None else f"{rating:.2f}")
        for kind in ("typical_items", "typical_features"):
            members = cluster[kind][:_TYPICAL_SHOWN]
            cells.append(", ".join(f"{_text(member['name'])} ({member['score']:.2f})" for member in members) or "-")
        rows.append(cells)
    return _table(["cluster", "share of the pairs", "users", "mean rating", "typical items", "typical features"], rows)


def _table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    header = list(header)
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _one_line(value: Any) -> str:
    """Without line breaks and characters that are not seen, such as those that turn the direction of the text."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(value)).split())


def _text(value: Any, width: int | None = _NAME_WIDTH) -> str:
    """A value that came from a user or from data, as text that is no markup, in a table cell or elsewhere."""
    if isinstance(value, list | tuple):
        value = ", ".join(map(str, value))
    line = _one_line(value)
    if width is not None and len(line) > width:
        line = line[: width - 1] + "…"
    # References to characters are never markup, but do not keep a cell from ending
    return _MARKUP.sub(lambda match: f"&#{ord(match[0])};", line).replace("|", "\\|")
