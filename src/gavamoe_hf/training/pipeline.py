"""From records to a checkpoint that explains: both stages, the scores, and the files that they leave."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, make_dataclass
from enum import Enum
from importlib.metadata import requires
from pathlib import Path
from typing import Any, get_type_hints

import torch
from datasets import Dataset, DatasetDict
from huggingface_hub import create_repo
from peft import LoraConfig
from sklearn.metrics import adjusted_rand_score
from transformers import set_seed
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from ..data import SyntheticConfig, SyntheticTruth, generate_synthetic, load_records
from ..evaluation import baseline_scores, ranking_scores, rating_scorer, require_baselines, require_text_metrics
from ..evaluation.cluster_report import (
    CLUSTERS_FILE,
    CLUSTERS_TABLE_FILE,
    cluster_report,
    predict_pairs_of,
    write_cluster_report,
)
from ..evaluation.evaluator import score_predictions
from ..evaluation.predict import (
    predict_pairs,
    predict_records,
    write_json,
    write_json_lines,
    write_text,
)
from ..files import differences, one_writer, records_digest
from ..hub import hub_errors, push_checkpoint
from ..loading import load_adapter
from ..model_card import CARD_FILE, is_unedited_card, model_card, write_model_card
from ..modeling_gavamoe import GaVaMoEForCausalLM
from ..plots import LATENT_SPACE_FILE, TRAINING_CURVE_FILE, plot_latent_space, plot_training_curve
from ..processing_gavamoe import GaVaMoEProcessor
from ..upcycling_gavamoe import count_parameters
from ..vae_gmm_gavamoe import GaVaMoERatingModel
from .building import ModelArguments, build_model, build_processor
from .launch import in_one_process, wait_for_file
from .lora import LoraArguments, check_widths, lora_config, quantization_config, untrained_model
from .rating_trainer import RatingDataset, RatingTrainer, RatingTrainingArguments
from .resume import last_complete_checkpoint
from .sft_config import GaVaMoESFTConfig
from .sft_trainer import GaVaMoESFTTrainer, prepare_examples, set_loss_weights

logger = logging.getLogger(__name__)

SYNTHETIC = "synthetic"
RUN_FILE, METRICS_FILE, PREDICTIONS_FILE = "run.json", "metrics.json", "predictions_test.jsonl"
# In `run.json`, of the data
DIGEST = "records_sha256"
RATING_FOLDER, CHECKPOINT_FOLDER = "rating_model", "checkpoints"
# With LoRA: the model that it adapts, and the adapter
BASE_FOLDER, ADAPTER_FOLDER = "base_model", "adapter"
_TRUTH_FILE = "truth.json"
# Test users whose items are ranked: the whole catalogue is scored for each, by the model and three baselines
_RANKED_USERS = 1000
# Options under which a run is the same run
_NOT_DESCRIBED = {
    "output_dir",
    "overwrite_output_dir",
    "resume_from_checkpoint",
    "disable_tqdm",
    "push_to_hub",
    "hub_token",
    "dry_run",
}

# Options of stage 1 that the command line offers, with the prefix `rating_`; the seed is that of stage 2.
_RATING_OPTIONS = (
    "elbo_learning_rate",
    "num_train_epochs",
    "autoencoder_epochs",
    "per_device_train_batch_size",
    "weight_decay",
    "autoencoder_learning_rates",
    "bias_epochs",
    "bias_learning_rate",
    "refinement_epochs",
    "refinement_learning_rate",
    "cluster_weight",
    "kl_warmup_epochs",
    "early_stopping_patience",
)


def _rating_options() -> list[tuple[str, Any, Any]]:
    hints = get_type_hints(RatingTrainingArguments)
    options = []
    for option in dataclasses.fields(RatingTrainingArguments):
        if option.name in _RATING_OPTIONS:
            metadata = {"help": f"Stage 1. {option.metadata['help']}"}
            default = field(default=option.default, default_factory=option.default_factory, metadata=metadata)
            options.append((f"rating_{option.name}", hints[option.name], default))
    return options


RatingArguments = make_dataclass("RatingArguments", _rating_options())
RatingArguments.__module__ = __name__
RatingArguments.__doc__ = "Options of stage 1: those of [`RatingTrainingArguments`], with the prefix `rating_`."


@dataclass
class DataArguments:
    """What data a run uses."""

    dataset: str = field(
        metadata={
            "help": "A .jsonl, .json, .csv or .parquet file, a folder with train, validation and test files or with "
            'reviews.pickle and index files, a Hub id, or "synthetic" for the built-in data.'
        }
    )
    index_folder: str | None = field(
        default=None,
        metadata={"help": "Beside reviews.pickle, the sub-folder with the index files to use, such as 1 to 5."},
    )
    column_mapping: list[str] | None = field(
        default=None,
        metadata={"help": "Names of columns that differ, as ours=theirs, such as user=reviewerID item=asin."},
    )
    rating_levels: list[float] = field(
        default_factory=lambda: [1.0, 2.0, 3.0, 4.0, 5.0], metadata={"help": "The values a rating can take."}
    )
    unknown_held_out: str = field(
        default="error",
        metadata={
            "help": "What to do with held-out records whose user or item train does not have.",
            "choices": ["error", "drop"],
        },
    )
    split_seed: int = field(default=0, metadata={"help": "Seed of a random split."})
    license: str | None = field(
        default=None,
        metadata={
            "help": "License of the checkpoint, which its card states: a name that the Hub knows, such as apache-2.0, "
            "or other, with license_name and license_link."
        },
    )
    license_name: str | None = field(default=None, metadata={"help": "Name of a license that the Hub does not know."})
    license_link: str | None = field(default=None, metadata={"help": "Where its text is: a URL, or LICENSE."})
    language: list[str] | None = field(
        default=None, metadata={"help": "Languages of the texts, which the card states, as codes such as en."}
    )
    synthetic_groups: int = field(default=3, metadata={"help": 'Planted groups of users of "synthetic".'})
    overwrite_output_dir: bool = field(
        default=False,
        metadata={"help": "Replace the run that `output_dir` holds, once the data has been checked."},
    )
    generation_batch_size: int = field(default=64, metadata={"help": "Test pairs explained at once."})
    dry_run: bool = field(
        default=False,
        metadata={
            "help": "Train nothing: print the number of parameters, an estimate of the memory, and the first batch, "
            "with what of it is scored."
        },
    )

    def __post_init__(self):
        if (self.license == "other") != bool(self.license_name) or (self.license_link and not self.license_name):
            raise ValueError(
                "Expected `license_name`, and best a `license_link`, with the license `other` and with no other, but "
                f"got license {self.license!r}, license_name {self.license_name!r}, license_link {self.license_link!r}."
            )


def read_data(args: DataArguments) -> tuple[DatasetDict, SyntheticTruth | None]:
    """The records of a run, and the truth where they were planted."""
    if args.dataset == SYNTHETIC:
        data = generate_synthetic(SyntheticConfig(seed=args.split_seed, num_groups=args.synthetic_groups))
        return data.records, data.truth
    mapping = {}
    for entry in args.column_mapping or []:
        ours, separator, theirs = entry.partition("=")
        if not separator or not theirs:
            raise ValueError(f"Expected `column_mapping` as ours=theirs, but got {entry!r}.")
        mapping[ours] = theirs
    records = load_records(
        args.dataset,
        column_mapping=mapping or None,
        rating_levels=args.rating_levels,
        unknown_held_out=args.unknown_held_out,
        split_seed=args.split_seed,
        index_folder=args.index_folder,
    )
    truth_file = Path(args.dataset) / _TRUTH_FILE
    return records, SyntheticTruth.from_json(truth_file) if truth_file.is_file() else None


def run_training(
    data_args: DataArguments,
    model_args: ModelArguments,
    rating_args: Any,
    sft_args: GaVaMoESFTConfig,
    lora_args: LoraArguments | None = None,
) -> dict[str, Any]:
    """
    Trains both stages and leaves in `output_dir` a checkpoint, `metrics.json`, `predictions_test.jsonl`, a report on
    the clusters (`clusters.json`, `clusters.md` and, with matplotlib, `latent_space.png`), the checkpoint's card
    (`README.md`, unless somebody wrote or edited the one that is there), the rating model alone (`rating_model/`) and
    the trainers' own checkpoints (`checkpoints/`), from which a run that was interrupted goes on with
    `resume_from_checkpoint`. With LoRA, also the adapter (`adapter/`) and what it adapts (`base_model/`); the
    checkpoint is the two merged. With `push_to_hub`, the checkpoint, its card and its scores are pushed at the end, and
    nothing before that.

    Under `accelerate launch` all processes train stage 2, and share `output_dir`; the first one does the rest.

    Args:
        data_args ([`DataArguments`]): The data.
        model_args ([`ModelArguments`]): The model.
        rating_args (`RatingArguments`): Stage 1.
        sft_args ([`GaVaMoESFTConfig`]): Stage 2, and `output_dir` and `seed` of the run.
        lora_args ([`LoraArguments`], *optional*): LoRA in stage 2.

    Returns:
        `dict[str, Any]`: what `metrics.json` holds; empty in processes other than the first.

    Raises:
        `ValueError`: for data or options that do not work, before anything is trained or removed.
        `FileExistsError`: if `output_dir` holds another run.
        `OSError`: if the Hub does not let it create the repository, before anything is trained.
    """
    require_text_metrics()
    require_baselines()
    output_dir = Path(sft_args.output_dir)
    check_output_dir(output_dir, is_resumed(sft_args), data_args.overwrite_output_dir)
    # Of several processes of one run, the first writes for all
    with one_writer(output_dir.resolve()) if sft_args.process_index == 0 else nullcontext():
        return _run(data_args, model_args, rating_args, sft_args, lora_args or LoraArguments())


def _run(
    data_args: DataArguments,
    model_args: ModelArguments,
    rating_args: Any,
    sft_args: GaVaMoESFTConfig,
    lora_args: LoraArguments,
) -> dict[str, Any]:
    output_dir = Path(sft_args.output_dir)
    resume = is_resumed(sft_args)
    with sft_args.main_process_first(desc="reading the data"):
        records, truth = read_data(data_args)
    groups = (data_args, model_args, rating_args, sft_args, lora_args)
    arguments = {**_described(*groups), DIGEST: records_digest(records)}
    if resume:
        _check_same_run(output_dir, arguments, {name: value for group in groups for name, value in _defaults(group)})
    set_seed(sft_args.seed)
    processor = build_processor(records["train"], model_args, data_args.rating_levels)
    model = build_model(processor, model_args, data_args.rating_levels, torch_dtype_of(model_args, lora_args))
    # Whatever stage 2 would not take is found before stage 1
    peft_config = lora_config(lora_args, sft_args, model.config)
    if peft_config is not None:
        untrained_model(model.config, model.dtype, sft_args, peft_config)
        if lora_args.load_in_4bit:
            check_widths(model)
    examples = {
        split: prepare_examples(records[split], processor, sft_args, is_training=split == "train")
        for split in ("train", "validation")
    }
    hub_id = hub_repository(sft_args) if sft_args.push_to_hub and sft_args.process_index == 0 else None
    # All have looked at the folder by now
    with sft_args.main_process_first(desc="making output_dir"):
        if sft_args.process_index == 0:
            if not resume:
                _clear(output_dir)
            output_dir.mkdir(parents=True, exist_ok=True)
            write_json(output_dir / RUN_FILE, arguments)

    ratings = {split: RatingDataset.from_records(records[split], processor) for split in records}
    choose = model_args.chooses_num_clusters
    train_rating_model(model.rating_model, ratings, rating_args, sft_args, output_dir, resume, choose)
    if choose:
        model.drop_gates()
    model.set_interactions(ratings["train"].columns["user_id"], ratings["train"].columns["item_id"])
    if peft_config is not None:
        model = adapted_base(model, processor, lora_args, peft_config, sft_args, output_dir, resume)
    model = train_explanations(model, processor, examples, sft_args, output_dir, resume, peft_config)
    if model is None:
        return {}
    save_checkpoint(model, processor, output_dir)
    place_for_scoring(model, sft_args.device)
    metrics, rows = evaluate_run(model, processor, records, ratings, truth, data_args.generation_batch_size)
    write_json_lines(output_dir / PREDICTIONS_FILE, rows)
    write_json(output_dir / METRICS_FILE, metrics)
    report_clusters(model, processor, records["train"], output_dir)
    described = {name: value for name, value in arguments.items() if name != DIGEST}
    described |= {} if hub_id is None else {"hub_model_id": hub_id}
    leave_model_card(model, processor, records, metrics, described, sft_args)
    if hub_id is not None:
        push_run(output_dir, hub_id, sft_args)
    return metrics


def hub_repository(sft_args: GaVaMoESFTConfig) -> str:
    """Id of the repository that a run is pushed to, created if it is not there."""
    name = sft_args.hub_model_id or Path(sft_args.output_dir).resolve().name
    with hub_errors(
        "Nothing has been trained. Leave `push_to_hub` out and push later, or log in with `hf auth login`."
    ):
        return create_repo(name, private=sft_args.hub_private_repo, token=sft_args.hub_token, exist_ok=True).repo_id


def push_run(output_dir: Path, hub_id: str, sft_args: GaVaMoESFTConfig) -> None:
    """Pushes what a run left; `ConnectionError`, which says how to try again, where that fails."""
    try:
        commit = push_checkpoint(output_dir, hub_id, token=sft_args.hub_token, revision=sft_args.hub_revision)
    except OSError as error:
        raise ConnectionError(f"The run is complete in {output_dir}, but it could not be pushed. {error}") from error
    logger.info("Pushed to %s: %s", hub_id, commit.commit_url)


def train_rating_model(
    rating_model: GaVaMoERatingModel,
    ratings: Mapping[str, RatingDataset],
    rating_args: Any,
    sft_args: GaVaMoESFTConfig,
    output_dir: Path,
    resume: bool = False,
    choose_num_clusters: bool = False,
) -> None:
    """Stage 1, in place, in the first process; taken from `rating_model/` by the others, and where a resumed run has
    finished it already."""
    folder = output_dir / RATING_FOLDER
    is_alone = sft_args.world_size == 1
    if not (resume and (folder / "model.safetensors").is_file()):
        options = {name: getattr(rating_args, f"rating_{name}") for name in _RATING_OPTIONS}
        options |= {name: getattr(sft_args, name) for name in ("seed", "use_cpu", "disable_tqdm", "beta")}
        options["choose_num_clusters"] = choose_num_clusters
        if is_alone:
            return _rating_stage(rating_model, ratings, options, output_dir, resume)
        if sft_args.process_index == 0:
            in_one_process(_rating_stage, rating_model, ratings, options, output_dir, resume)
        wait_for_file(folder / "model.safetensors")
    trained = GaVaMoERatingModel.from_pretrained(folder)
    if choose_num_clusters:
        rating_model.resize_mixture(trained.config.num_clusters)
    rating_model.load_state_dict(trained.state_dict())


def _rating_stage(
    rating_model: GaVaMoERatingModel,
    ratings: Mapping[str, RatingDataset],
    options: dict[str, Any],
    output_dir: Path,
    resume: bool,
) -> None:
    checkpoints = output_dir / CHECKPOINT_FOLDER / "rating"
    args = RatingTrainingArguments(output_dir=str(checkpoints), **options)
    # Small, and not to depend on the number of GPUs
    args._n_gpu = min(args.n_gpu, 1)
    trainer = RatingTrainer(rating_model, args, ratings["train"], ratings["validation"])
    trainer.train(resume_from_checkpoint=resume)
    rating_model.cpu()
    beside = output_dir / (RATING_FOLDER + ".part")
    rating_model.save_pretrained(beside)
    os.replace(beside, output_dir / RATING_FOLDER)
    shutil.rmtree(checkpoints, ignore_errors=True)


def adapted_base(
    model: GaVaMoEForCausalLM,
    processor: GaVaMoEProcessor,
    lora_args: LoraArguments,
    peft_config: LoraConfig,
    sft_args: GaVaMoESFTConfig,
    output_dir: Path,
    resume: bool = False,
) -> GaVaMoEForCausalLM:
    """Leaves the model that LoRA is to adapt in `base_model/`, whose name the adapter keeps, or takes the one that a
    resumed run left there; quantises it for QLoRA."""
    folder = output_dir / BASE_FOLDER
    # The merged model has its config from here
    set_loss_weights(model, sft_args)
    # Written last
    is_saved = resume and (folder / "config.json").is_file()
    with sft_args.main_process_first(desc="saving the base model"):
        if is_saved:
            model = GaVaMoEForCausalLM.from_pretrained(folder)
        elif sft_args.process_index == 0:
            save_checkpoint(model, processor, folder)
    model.name_or_path = str(folder)
    if not lora_args.load_in_4bit:
        return model
    dtype = torch.bfloat16 if sft_args.bf16 else torch.float32
    quantization = quantization_config(lora_args, peft_config.modules_to_save, dtype)
    device = {"": sft_args.device}
    return GaVaMoEForCausalLM.from_pretrained(folder, quantization_config=quantization, device_map=device)


def train_explanations(
    model: GaVaMoEForCausalLM,
    processor: GaVaMoEProcessor,
    records: Mapping[str, Dataset],
    sft_args: GaVaMoESFTConfig,
    output_dir: Path,
    resume: bool = False,
    peft_config: LoraConfig | None = None,
) -> GaVaMoEForCausalLM | None:
    """Stage 2: the model of the best epoch; `None` in processes other than the first. One that was trained by LoRA, or
    in several processes, is a new one, merged, on the CPU."""
    folder = output_dir / CHECKPOINT_FOLDER / "explanation"
    args = copy.copy(sft_args)
    args.output_dir = str(folder)
    # The run is pushed when it is whole
    args.push_to_hub = False
    last = last_complete_checkpoint(folder) if resume else None
    train, validation = records["train"], records["validation"]
    trainer = GaVaMoESFTTrainer(model, args, train, validation, processor, peft_config=peft_config)
    counts = {name: f"{count:,}" for name, count in count_parameters(trainer.model).items()}
    logger.info("Stage 2: %s parameters, %s of them trained", counts["total"], counts["trainable"])
    trainer.train(resume_from_checkpoint=last)
    if peft_config is None and args.world_size == 1:
        write_json(output_dir / "training_log.json", trainer.state.log_history)
        return model
    # Whole on disk, however it was spread or quantised
    saved = output_dir / (ADAPTER_FOLDER if peft_config is not None else CHECKPOINT_FOLDER + "/best")
    trainer.save_model(str(saved))
    if args.process_index != 0:
        return None
    write_json(output_dir / "training_log.json", trainer.state.log_history)
    unset_hf_deepspeed_config()
    if peft_config is None:
        return GaVaMoEForCausalLM.from_pretrained(saved)
    return load_adapter(saved, output_dir / BASE_FOLDER)


def evaluate_run(
    model: GaVaMoEForCausalLM,
    processor: GaVaMoEProcessor,
    records: DatasetDict,
    ratings: Mapping[str, RatingDataset],
    truth: SyntheticTruth | None,
    batch_size: int = 64,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Scores of the test split, with the records' sentiment and features given, and the explanations scored. Beside
    the numbers are `profile`, `protocol` and `signatures`, which say how the explanations were scored."""
    rows = predict_records(model, processor, records["test"], batch_size=batch_size)
    pairs = ratings["train"].columns["user_id"], ratings["train"].columns["item_id"]
    clusters = predict_pairs(model.rating_model, *pairs).cluster_posterior.argmax(dim=-1)
    shares = torch.bincount(clusters, minlength=model.config.num_clusters) / len(clusters)
    splits = records["train"], records["validation"], records["test"]
    options = {"min_rating": processor.positive_rating_threshold, "max_users": _RANKED_USERS}
    metrics = {
        **_scores_if_any("of the explanations", score_predictions, rows, "given"),
        **_scores_if_any("of the baselines", baseline_scores, *splits),
        "min_cluster_share": shares.min().item(),
        **_scores_if_any(
            "of the ranking", ranking_scores, records, rating_scorer(model), processor.users, processor.items, **options
        ),
    }
    if truth is not None:
        groups = [truth.user_group[user] for user in records["train"]["user"]]
        metrics["cluster_ari"] = float(adjusted_rand_score(groups, clusters.numpy()))
        worded = [truth.wording_group(row["prediction"]) == truth.user_group[row["user"]] for row in rows]
        metrics["wording_match"] = sum(worded) / len(worded)
    return metrics, rows


def _scores_if_any(what: str, score: Callable[..., dict[str, Any]], *args: Any, **kwargs: Any) -> dict[str, Any]:
    """Scores, or none and a warning where the test split has nothing to score: the run is trained by now."""
    try:
        return score(*args, **kwargs)
    except ValueError as error:
        logger.warning("There are no scores %s: %s", what, error)
        return {}


def report_clusters(model: GaVaMoEForCausalLM, processor: GaVaMoEProcessor, train: Dataset, output_dir: Path) -> None:
    """Leaves `clusters.json`, `clusters.md` and `latent_space.png` of the training pairs, and `training_curve.png`, or
    one log line for what could not be made."""
    made = f"{CLUSTERS_FILE} and {CLUSTERS_TABLE_FILE}"
    try:
        outputs = predict_pairs_of(model, processor, train)
        write_cluster_report(cluster_report(model, processor, train, outputs=outputs), output_dir)
        made = LATENT_SPACE_FILE
        panel = outputs.latent_mean, outputs.cluster_posterior.argmax(dim=-1)
        plot_latent_space({f"K = {model.config.num_clusters}": panel}, output_dir / LATENT_SPACE_FILE, max_pairs=1000)
        made, log = TRAINING_CURVE_FILE, output_dir / "training_log.json"
        if log.is_file():
            plot_training_curve(json.loads(log.read_text(encoding="utf-8")), output_dir / TRAINING_CURVE_FILE)
    except Exception as error:
        # Whatever it is: the run is complete by now, and is not to fail for a by-product
        logger.warning("Left out %s: %s", made, error)


def leave_model_card(
    model: GaVaMoEForCausalLM,
    processor: GaVaMoEProcessor,
    records: DatasetDict,
    metrics: Mapping[str, Any],
    arguments: Mapping[str, Any],
    sft_args: GaVaMoESFTConfig,
) -> None:
    """Leaves the checkpoint's card, or one log line that says why not."""
    reason: object = "the folder has one that somebody wrote or edited"
    try:
        card = model_card(model, processor, records, metrics, arguments, sft_args.output_dir, sft_args)
        if write_model_card(card, sft_args.output_dir):
            return
    except Exception as error:
        # As for the clusters: a by-product
        reason = error
    logger.warning("Left out %s: %s", CARD_FILE, reason)


def is_resumed(sft_args: GaVaMoESFTConfig) -> bool:
    """Whether a run is to go on from an earlier one; the command line gives a text."""
    value = str(sft_args.resume_from_checkpoint or "false").lower()
    if value not in ("true", "false", "none"):
        raise ValueError(
            f"Expected `resume_from_checkpoint` as true or false, but got {value!r}. A run goes on from the last "
            "checkpoint in its `output_dir`."
        )
    return value == "true"


def check_output_dir(output_dir: Path, resume: bool, overwrite: bool) -> None:
    """Raises `FileExistsError` where a run would be overwritten, `FileNotFoundError` where there is none to resume."""
    if output_dir.exists() and not output_dir.is_dir():
        raise FileExistsError(f"Expected `output_dir` as a folder, but {output_dir} is a file.")
    has_run = any((output_dir / name).exists() for name in (RUN_FILE, "config.json", METRICS_FILE))
    if resume and not (output_dir / RUN_FILE).exists():
        raise FileNotFoundError(f"Expected a run to resume in {output_dir}, but it holds no {RUN_FILE}.")
    if has_run and not resume and not overwrite:
        raise FileExistsError(
            f"{output_dir} already holds a run. Pass --resume_from_checkpoint true to go on with it, "
            "--overwrite_output_dir to replace it, or another --output_dir."
        )


def save_checkpoint(model: GaVaMoEForCausalLM, processor: GaVaMoEProcessor, output_dir: Path) -> None:
    """Writes model and processor beside `output_dir`'s files and moves them in when they are whole."""
    beside = output_dir / ".part"
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    model.save_pretrained(beside)
    processor.save_pretrained(str(beside))
    # For those who load the checkpoint without this package
    lines = [line for line in requires("gavamoe-hf") or [] if "extra ==" not in line]
    needed = [line for line in lines if line.startswith(("torch", "transformers"))]
    write_text(beside / "requirements.txt", "".join(f"{line}\n" for line in sorted(needed)))
    for path in sorted(beside.iterdir(), key=lambda path: path.name == "config.json"):
        os.replace(path, output_dir / path.name)
    beside.rmdir()


def _clear(output_dir: Path) -> None:
    """Removes what an earlier run left, and nothing else."""
    for name in (RATING_FOLDER, CHECKPOINT_FOLDER, BASE_FOLDER, ADAPTER_FOLDER, ".part", RATING_FOLDER + ".part"):
        shutil.rmtree(output_dir / name, ignore_errors=True)
    reports = (CLUSTERS_FILE, CLUSTERS_TABLE_FILE, LATENT_SPACE_FILE, TRAINING_CURVE_FILE)
    for name in (RUN_FILE, METRICS_FILE, PREDICTIONS_FILE, "training_log.json", "config.json", *reports):
        (output_dir / name).unlink(missing_ok=True)
    if is_unedited_card(output_dir / CARD_FILE):
        (output_dir / CARD_FILE).unlink()
    for path in output_dir.glob("model*.safetensors*"):
        path.unlink()


def _described(*arguments: Any) -> dict[str, Any]:
    """Every option that differs from its default; of those that say where and how a run is shown, none."""
    described: dict[str, Any] = {}
    for group in arguments:
        for name, default in _defaults(group):
            value = getattr(group, name)
            if name not in _NOT_DESCRIBED and value != default and _is_plain(value):
                described[name] = value
    return described


def _defaults(group: Any) -> Iterator[tuple[str, Any]]:
    for option in dataclasses.fields(group):
        yield option.name, option.default_factory() if callable(option.default_factory) else option.default


def _is_plain(value: Any) -> bool:
    return isinstance(value, str | int | float | bool | list | None) and not isinstance(value, Enum)


def _check_same_run(output_dir: Path, arguments: dict[str, Any], defaults: dict[str, Any]) -> None:
    earlier = json.loads((output_dir / RUN_FILE).read_text(encoding="utf-8"))
    if DIGEST not in earlier:  # of an older version
        arguments = {name: value for name, value in arguments.items() if name != DIGEST}
    elif earlier[DIGEST] != arguments[DIGEST]:
        raise ValueError(
            f"Expected the records of the run in {output_dir}, but they have changed: rows of users and items would be "
            "others'. Resume with the same data, or start again with --overwrite_output_dir."
        )
    # What is not described has its default
    known = {name: defaults[name] for name in {*earlier, *arguments} if name in defaults}
    found = differences({**known, **earlier}, {**known, **arguments})
    if found:
        raise ValueError(f"Expected the options of the run in {output_dir}, but {found}. Resume with the same options.")


def torch_dtype_of(model_args: ModelArguments, lora_args: LoraArguments) -> torch.dtype | None:
    """The precision of the language model's weights; `None` is the base model's own."""
    if model_args.dtype is not None:
        return None if model_args.dtype == "auto" else getattr(torch, model_args.dtype)
    # AdamW's small steps would be lost to the rounding of weights of 16 bits; adapters have 32 whatever the base has
    return None if lora_args.use_peft else torch.float32


def place_for_scoring(model: GaVaMoEForCausalLM, device: torch.device) -> None:
    """To the device where it is scored, if it fits there whole: it may have been trained spread, or in 4 bits."""
    try:
        model.to(device)
    except torch.OutOfMemoryError as error:
        logger.warning("The whole model does not fit %s, so that it is scored on the CPU: %s", device, error)
        model.to("cpu")
