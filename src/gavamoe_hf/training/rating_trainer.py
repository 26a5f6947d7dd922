"""Stage 1: trains the VAE-GMM rating model (section 3.2)."""

from __future__ import annotations

import copy
import logging
import math
import os
import shutil
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset as HubDataset
from safetensors.torch import load_file, save_file
from torch.utils.data import Dataset
from transformers import EarlyStoppingCallback, EvalPrediction, Trainer, TrainingArguments
from transformers.trainer_utils import TrainOutput

from ..evaluation.predict import predict_pairs
from ..processing_gavamoe import GaVaMoEProcessor
from ..vae_gmm_gavamoe import GaVaMoERatingModel
from .distillation import calibrate_decoder, distillation_loss
from .initialization import (
    choose_num_clusters,
    cluster_shares,
    initialize_decoder_bias,
    initialize_mixture,
    initialize_tables,
    leave_one_out_embeddings,
    leave_one_out_logits,
    leave_one_out_offsets,
    user_profiles,
    write_cluster_code,
)
from .progress import use_tidy_progress
from .resume import last_complete_checkpoint

logger = logging.getLogger(__name__)

BIAS, AUTOENCODER, ELBO, REFINEMENT = "bias", "autoencoder", "elbo", "refinement"

# What each phase trains, by the beginnings of parameters' names; the autoencoder phase trains all
_HEADS = ("mean_head.", "log_variance_head.")
_DECODER = ("decoder_hidden.", "decoder_output.")
_ENCODER = ("layers.", "population_")
_TRAINED = {
    BIAS: (*_ENCODER, *_HEADS, *_DECODER),
    AUTOENCODER: ("",),
    ELBO: (*_ENCODER, *_HEADS, *_DECODER, "mixture."),
    REFINEMENT: (*_ENCODER, "mean_head.", *_DECODER),
}
# Phases without the tables, in which each pair is shown biases without its own rating
_LEAVE_ONE_OUT = (BIAS, ELBO, REFINEMENT)
# Phases that have clusters
_CLUSTERED = (ELBO, REFINEMENT)

# What the ELBO phase needs when it is resumed: the users' cluster probabilities and, if any, the teacher's logits
_TARGETS_FILE = "targets.safetensors"
# What the ELBO phase left, from which the refinement begins
_ELBO_FILE = "elbo.safetensors"


class RatingDataset(Dataset):
    """
    Ratings as tensors, handed out a whole batch at a time so that the data loader does no work per record.

    Args:
        user_id (`torch.LongTensor` of shape `(num_records,)`): User indices.
        item_id (`torch.LongTensor` of shape `(num_records,)`): Item indices.
        rating (`torch.FloatTensor` of shape `(num_records,)`): Ratings on the rating scale.
    """

    def __init__(self, user_id: torch.Tensor, item_id: torch.Tensor, rating: torch.Tensor):
        if len({len(user_id), len(item_id), len(rating)}) != 1:
            raise ValueError(
                f"Expected one user, item and rating for each record, but got {len(user_id)}, {len(item_id)} and "
                f"{len(rating)}."
            )
        if not rating.isfinite().all():
            raise ValueError(f"Expected finite ratings, but got {rating[~rating.isfinite()][0].item()}.")
        self.columns = {"user_id": user_id.long(), "item_id": item_id.long(), "rating": rating.float()}

    @classmethod
    def from_records(cls, records: HubDataset, processor: GaVaMoEProcessor) -> RatingDataset:
        """From records with the columns user, item and rating, and the processor that knows the ids."""
        return cls(
            torch.tensor([processor.user_index(user) for user in records["user"]]),
            torch.tensor([processor.item_index(item) for item in records["item"]]),
            torch.tensor(list(records["rating"])),
        )

    def with_column(self, name: str, column: torch.Tensor) -> RatingDataset:
        """A data set that has one more column, `(num_records, ...)`; this one is left alone."""
        dataset = copy.copy(self)
        dataset.columns = {**self.columns, name: column}
        return dataset

    def __len__(self) -> int:
        return len(self.columns["rating"])

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.__getitems__([index])

    def __getitems__(self, indices: list[int]) -> dict[str, torch.Tensor]:
        return {name: column[indices] for name, column in self.columns.items()}


@dataclass
class RatingTrainingArguments(TrainingArguments):
    """
    Arguments of [`RatingTrainer`]: those of [`~transformers.TrainingArguments`] and the ones below. Defaults that
    differ: `per_device_train_batch_size` 64 (the paper's batch is 4096, for hundreds of thousands of ratings),
    `weight_decay` 0.1, evaluation and saving every epoch. `learning_rate` gives way to those of the phases.
    """

    autoencoder_learning_rates: list[float] = field(
        default_factory=lambda: [3e-3],
        metadata={
            "help": "Learning rates of the autoencoder phase, which is run once for each; the run with the best "
            "validation loss goes on, or the bias phase's result where none is better."
        },
    )
    bias_epochs: int = field(
        default=6, metadata={"help": "Epochs of the bias phase, in which the tables hold biases and are not trained."}
    )
    bias_learning_rate: float = field(default=5e-4, metadata={"help": "Learning rate of the bias phase."})
    refinement_epochs: int = field(
        default=8,
        metadata={"help": "Epochs of the last phase, which trains at the latents' means, as they are used. 0: none."},
    )
    refinement_learning_rate: float = field(default=1e-3, metadata={"help": "Learning rate of the last phase."})
    num_train_epochs: float = field(
        default=12,
        metadata={"help": "Most epochs of the ELBO phase, after the autoencoder phase. Paper: 30."},
    )
    autoencoder_epochs: int = field(
        default=60, metadata={"help": "Most epochs of the autoencoder phase, which stops early as well."}
    )
    per_device_train_batch_size: int = field(default=64, metadata={"help": "Pairs per step and device. Paper: 4096."})
    per_device_eval_batch_size: int = field(default=4096, metadata={"help": "Pairs per evaluation step and device."})
    weight_decay: float = field(default=0.1, metadata={"help": "AdamW weight decay."})
    elbo_learning_rate: float = field(
        default=5e-4,
        metadata={"help": "Learning rate of the ELBO phase, which trains all but the tables. Paper: 1e-5."},
    )
    cluster_weight: float = field(
        default=1.0,
        metadata={
            "help": "Weight, from the ELBO phase on, of the cross-entropy that keeps the pairs of a user in the user's "
            "cluster. 0 is the paper's loss, whose clusters follow the rating rather than the user."
        },
    )
    beta: float | None = field(
        default=None,
        metadata={"help": "Weight of the KL term (eq. 12); the model config's, 0.01, if not given."},
    )
    choose_num_clusters: bool = field(
        default=False,
        metadata={
            "help": "Choose the number of clusters, 2 to 8, by the mean silhouette of the users after the autoencoder "
            "phase, in place of the model config's."
        },
    )
    kl_warmup_epochs: float = field(
        default=3.0, metadata={"help": "Epochs over which the weight of the KL term rises from 0 to `beta`."}
    )
    early_stopping_patience: int = field(
        default=20,
        metadata={
            "help": "Epochs without a better validation loss after which a phase stops. Who likes what is learned "
            "late, after biases have begun to overfit."
        },
    )
    min_cluster_share: float = field(
        default=0.05,
        metadata={"help": "Share of the training pairs under which a cluster counts as empty and is re-initialised."},
    )
    eval_strategy: str = field(default="epoch", metadata={"help": "Needed for keeping the best epoch."})
    save_strategy: str = field(default="epoch", metadata={"help": "Must match `eval_strategy`."})
    save_total_limit: int | None = field(default=1, metadata={"help": "Checkpoints kept besides the best one."})
    load_best_model_at_end: bool = field(default=True, metadata={"help": "Keep the best epoch of each phase."})
    metric_for_best_model: str | None = field(default="eval_loss", metadata={"help": "What best means."})
    greater_is_better: bool | None = field(default=False, metadata={"help": "Whether more of it is better."})
    logging_strategy: str = field(default="epoch", metadata={"help": "When training losses are logged."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "The data set holds what is needed."})
    label_names: list[str] | None = field(
        default_factory=lambda: ["rating"], metadata={"help": "The input that is the target."}
    )

    def __post_init__(self):
        super().__post_init__()
        if self.autoencoder_epochs < 1:
            raise ValueError(f"`autoencoder_epochs` must be at least 1, got {self.autoencoder_epochs}.")
        if not self.autoencoder_learning_rates:
            raise ValueError("`autoencoder_learning_rates` must hold at least one learning rate, got none.")
        if not 0 <= self.min_cluster_share < 1:
            raise ValueError(f"`min_cluster_share` must be in [0, 1), got {self.min_cluster_share}.")


class RatingTrainer(Trainer):
    """
    Trains a [`GaVaMoERatingModel`] in the two phases of the paper (section 3.2) and one before and after, each set back
    to its best epoch by validation loss:

    1. biases: an autoencoder (z = mu, no KL term) of the biases that the tables start with, each pair without its own
       rating, the tables fixed. It is as good as a bias model and hardly overfits;
    2. autoencoder: everything learns who likes what. Where that does not help on validation, as on sparse ratings, the
       result of the first phase goes on;
    3. clusters of users, the mixture initialised from them, then the negative ELBO with a rising weight of the KL term,
       the tables fixed;
    4. refinement: the same at z = mu, as the model is used, and without the KL term.

    Where the tables hold biases alone, a pair's own rating can only be learned by heart from the third phase on: the
    target is then the distribution that the second phase predicts, calibrated by [`calibrate_decoder`].

    Args:
        model ([`GaVaMoERatingModel`]): The model.
        args ([`RatingTrainingArguments`]): Arguments.
        train_dataset ([`RatingDataset`]): Ratings to learn from.
        eval_dataset ([`RatingDataset`]): Ratings that choose the epoch.
        kwargs: everything else that [`~transformers.Trainer`] takes.

    Raises:
        `TypeError`: for data that is not a [`RatingDataset`].
        `ValueError`: for ratings from which nothing can be learned, or too few users for the clusters.
    """

    def __init__(
        self,
        model: GaVaMoERatingModel,
        args: RatingTrainingArguments,
        train_dataset: RatingDataset,
        eval_dataset: RatingDataset,
        **kwargs: Any,
    ):
        for name, dataset in (("train_dataset", train_dataset), ("eval_dataset", eval_dataset)):
            if not isinstance(dataset, RatingDataset):
                raise TypeError(
                    f"Expected `{name}` as a RatingDataset, but got {type(dataset).__name__}. Did you mean "
                    "RatingDataset.from_records(records, processor)?"
                )
        _check_ratings(model, train_dataset, eval_dataset, args)
        self.phase = BIAS
        self.beta = model.config.beta if args.beta is None else args.beta
        self._cluster_target = torch.empty(0)
        self._loss_terms: dict[str, list[float]] = defaultdict(list)
        self._root = Path(args.output_dir)
        self._base_args = args
        super().__init__(
            model=model,
            args=self._phase_args(BIAS),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            data_collator=_passthrough,
            compute_metrics=kwargs.pop("compute_metrics", _rating_metrics),
            **kwargs,
        )
        use_tidy_progress(self)
        # The model does not divide by the number of items in the accumulated batch
        self.model_accepts_loss_kwargs = False
        if args.early_stopping_patience > 0:
            self.add_callback(EarlyStoppingCallback(args.early_stopping_patience))

    def train(self, resume_from_checkpoint: bool | None = None, **kwargs: Any) -> Any:
        """
        Runs all phases.

        Args:
            resume_from_checkpoint (`bool`, *optional*):
                Whether to go on from the last checkpoint of the ELBO phase in `output_dir`, or after it. A run that had
                not come so far starts again. Either way the result is that of a run that was not interrupted.

        Returns:
            [`~transformers.trainer_utils.TrainOutput`] of the ELBO phase.
        """
        last = last_complete_checkpoint(self._root / ELBO) if resume_from_checkpoint else None
        self._log_history: list[dict[str, Any]] = []  # of all phases; the state has that of one
        train_dataset = self.train_dataset
        trainable = {name for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        try:
            # Before the first phase, since the item biases are of the ratings alone
            offset = leave_one_out_offsets(self.model, *self._ratings)
            self.train_dataset = train_dataset.with_column("offset", offset)
            if last is not None:
                targets = load_file(self._root / _TARGETS_FILE)
                if self._base_args.choose_num_clusters:
                    self.model.resize_mixture(targets["cluster_target"].shape[1])
            else:
                (self._root / _ELBO_FILE).unlink(missing_ok=True)
                targets = self._prepare_targets(self._train_autoencoder(**kwargs))
                _save_beside(targets, self._root / _TARGETS_FILE)
            self._use_targets(targets)
            self._start(ELBO, self._base_args.elbo_learning_rate)
            output = self._train_elbo(last, **kwargs)
            if self._base_args.refinement_epochs > 0:
                self._train_shortly(REFINEMENT, self._base_args.refinement_learning_rate, **kwargs)
        finally:
            self.train_dataset = train_dataset
            for name, parameter in self.model.named_parameters():
                parameter.requires_grad_(name in trainable)
        self._repair_clusters()
        self.state.log_history = self._log_history
        return output

    def _train_elbo(self, last: str | None, **kwargs: Any) -> Any:
        """
        The ELBO phase, or what it left where a run was stopped after it: the weights, and the states of the generators,
        from which the refinement goes on as if nothing had happened.
        """
        file = self._root / _ELBO_FILE
        if last is not None and file.is_file():
            left = load_file(file)
            torch.set_rng_state(left.pop("rng_state"))
            if "cuda_rng_state" in left:
                torch.cuda.set_rng_state(left.pop("cuda_rng_state"), self.args.device)
            self.model.load_state_dict(left)
            return TrainOutput(0, 0.0, {})
        output = super().train(resume_from_checkpoint=last, **kwargs)
        self._log_history += self.state.log_history
        state = {name: value.contiguous() for name, value in self.model.state_dict().items()}
        state["rng_state"] = torch.get_rng_state()
        if self.args.device.type == "cuda":
            state["cuda_rng_state"] = torch.cuda.get_rng_state(self.args.device)
        _save_beside(state, file)
        return output

    @property
    def _ratings(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        columns = self.train_dataset.columns
        return columns["user_id"], columns["item_id"], columns["rating"]

    def _train_shortly(self, phase: str, learning_rate: float, **kwargs: Any) -> float:
        """Runs a phase that leaves no checkpoints, and returns the validation loss of its best epoch."""
        self._start(phase, learning_rate)
        super().train(**kwargs)
        self._log_history += self.state.log_history
        shutil.rmtree(self.args.output_dir, ignore_errors=True)
        return self.state.best_metric

    def _train_autoencoder(self, **kwargs: Any) -> bool:
        """
        Runs the bias phase, and from there the autoencoder phase at each learning rate; the best result is kept.

        Returns:
            `bool`: whether that is the bias phase's.
        """
        initialize_decoder_bias(self.model, self._ratings[2])
        initialize_tables(self.model, *self._ratings)
        best_loss = self._train_shortly(BIAS, self._base_args.bias_learning_rate, **kwargs)
        logger.info("Stage 1, biases alone: validation loss %.4f", best_loss)
        start = copy.deepcopy(self.model.state_dict())
        best_state = start
        for learning_rate in self._base_args.autoencoder_learning_rates:
            self.model.load_state_dict(start)
            loss = self._train_shortly(AUTOENCODER, learning_rate, **kwargs)
            logger.info("Stage 1, autoencoder at learning rate %g: validation loss %.4f", learning_rate, loss)
            if loss < best_loss:
                best_loss, best_state = loss, copy.deepcopy(self.model.state_dict())
        if not math.isfinite(best_loss):
            raise RuntimeError(
                "Expected a finite validation loss, but neither the bias phase nor the learning rates "
                f"{self._base_args.autoencoder_learning_rates} gave one. Lower `bias_learning_rate`."
            )
        self.model.load_state_dict(best_state)
        return best_state is start

    def _prepare_targets(self, is_bias_model: bool) -> dict[str, torch.Tensor]:
        """What the ELBO phase learns from; the mixture is set, and the users' clusters written into their table."""
        targets = {}
        if is_bias_model:
            pairs = self.train_dataset.columns
            logits = leave_one_out_logits(self.model, pairs["user_id"], pairs["item_id"], pairs["offset"])
            held_out = self.eval_dataset.columns
            held_out_logits = predict_pairs(self.model, held_out["user_id"], held_out["item_id"]).rating_logits
            targets["teacher_logits"] = calibrate_decoder(
                self.model, logits, pairs["rating"], held_out_logits, held_out["rating"]
            )
        profiles = user_profiles(self.model, self._ratings[0].unique(), self.args.seed)
        if self._base_args.choose_num_clusters:
            chosen, silhouettes = choose_num_clusters(profiles, self.args.seed)
            self.model.resize_mixture(chosen)
            shown = ", ".join(f"{number}: {value:.3f}" for number, value in silhouettes.items())
            logger.info("Chose %d clusters, whose mean silhouette is the largest (%s)", chosen, shown)
        targets["cluster_target"] = self._initialize_mixture(profiles)
        if self._base_args.cluster_weight > 0:
            write_cluster_code(self.model, targets["cluster_target"])
        return targets

    def _use_targets(self, targets: dict[str, torch.Tensor]) -> None:
        self._cluster_target = targets["cluster_target"].to(self.args.device)
        if "teacher_logits" in targets:
            self.train_dataset = self.train_dataset.with_column("teacher_logits", targets["teacher_logits"])

    def _phase_args(self, phase: str, learning_rate: float | None = None) -> RatingTrainingArguments:
        phase_args = copy.copy(self._base_args)
        phase_args.output_dir = str(self._root / phase)
        epochs = {BIAS: "bias_epochs", AUTOENCODER: "autoencoder_epochs", REFINEMENT: "refinement_epochs"}
        if phase in epochs:
            phase_args.num_train_epochs = getattr(self._base_args, epochs[phase])
        if learning_rate is not None:
            phase_args.learning_rate = learning_rate
        # The epochs without an improvement count on
        phase_args.restore_callback_states_from_checkpoint = True
        return phase_args

    def _start(self, phase: str, learning_rate: float | None = None) -> None:
        self.phase = phase
        self.args = self._phase_args(phase, learning_rate)
        self.optimizer = self.lr_scheduler = None
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name.startswith(_TRAINED[phase]))
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, EarlyStoppingCallback):
                callback.early_stopping_patience_counter = 0
        logger.info("Stage 1, %s phase: %g epochs at most", phase, self.args.num_train_epochs)

    def _initialize_mixture(self, profiles: np.ndarray | None = None) -> torch.Tensor:
        return initialize_mixture(self.model, *self._ratings[:2], seed=self.args.seed, profiles=profiles)

    def _repair_clusters(self) -> None:
        """Refits the mixture where a cluster ended up (nearly) empty, and fails if that does not help."""
        if self.model.config.num_clusters == 1:
            return
        shares = cluster_shares(self.model, *self._ratings[:2])
        if shares.min() >= self.args.min_cluster_share:
            return
        logger.warning(
            "Cluster shares of the training pairs are %s, the smallest under %g: the mixture is fitted again.",
            _rounded(shares),
            self.args.min_cluster_share,
        )
        self._initialize_mixture()
        shares = cluster_shares(self.model, *self._ratings[:2])
        if shares.min() == 0:
            raise RuntimeError(
                f"Expected pairs in each of {len(shares)} clusters, but the shares are {_rounded(shares)}. Lower "
                "`num_clusters`, or train the rating model on more ratings."
            )

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        inputs = dict(inputs)
        offset, teacher_logits = inputs.pop("offset", None), inputs.pop("teacher_logits", None)
        if offset is not None and self.phase in _LEAVE_ONE_OUT:
            rating_model = self.accelerator.unwrap_model(model)
            inputs["pair_embeddings"] = leave_one_out_embeddings(
                rating_model, inputs["user_id"], inputs["item_id"], offset
            )
        if self.phase in _CLUSTERED and self._base_args.cluster_weight > 0:
            inputs["cluster_target"] = self._cluster_target[inputs["user_id"]]
        if self.phase == REFINEMENT and teacher_logits is not None:
            # Noise is for what can be learned by heart
            inputs["dropout"] = 0.0
        is_elbo = self.phase == ELBO
        beta = self.beta if is_elbo else 0.0
        if is_elbo and model.training and self._base_args.kl_warmup_epochs > 0:
            beta *= min(1.0, (self.state.epoch or 0.0) / self._base_args.kl_warmup_epochs)
        outputs = model(**inputs, beta=beta, sample_latent=is_elbo and model.training)
        loss = outputs.loss
        if teacher_logits is not None:
            loss = loss - outputs.reconstruction_loss + distillation_loss(outputs.rating_logits, teacher_logits)
        if outputs.cluster_loss is not None:
            loss = loss + self._base_args.cluster_weight * outputs.cluster_loss
        if model.training:
            for name in ("reconstruction_loss", "kl_loss", "cluster_loss"):
                if outputs.get(name) is not None:
                    self._loss_terms[name].append(outputs[name].detach())
        return (loss, outputs) if return_outputs else loss

    def prediction_step(
        self, model: Any, inputs: dict[str, torch.Tensor], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Any, Any, Any]:
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        size = len(inputs["rating"])
        predictions = (
            outputs.predicted_rating,
            outputs.cluster_posterior,
            outputs.reconstruction_loss.expand(size),
            outputs.kl_loss.expand(size),
        )
        return loss.detach(), predictions, inputs["rating"]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self._loss_terms and not any(name.startswith("eval_") for name in logs):
            for name, values in self._loss_terms.items():
                logs[name] = torch.stack(values).mean().item()
            self._loss_terms.clear()
        logs["phase"] = self.phase
        super().log(logs, start_time)


def _save_beside(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Writes a file that is whole or not there."""
    beside = path.with_name(path.name + ".part")
    save_file(tensors, beside)
    os.replace(beside, path)


def _passthrough(batch: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    """The collator: [`RatingDataset`] hands out whole batches already."""
    return dict(batch)


def _rating_metrics(prediction: EvalPrediction) -> dict[str, float]:
    predicted, posterior, reconstruction, kl = prediction.predictions
    error = predicted - prediction.label_ids
    shares = np.bincount(posterior.argmax(axis=-1), minlength=posterior.shape[1]) / len(posterior)
    metrics = {
        "rmse": float(np.sqrt(np.mean(error**2))),
        "mae": float(np.mean(np.abs(error))),
        "reconstruction_loss": float(reconstruction.mean()),
        "kl_loss": float(kl.mean()),
    }
    return metrics | {f"cluster_share_{cluster}": float(share) for cluster, share in enumerate(shares)}


def _check_ratings(
    model: GaVaMoERatingModel, train: RatingDataset, validation: RatingDataset, args: RatingTrainingArguments
) -> None:
    """Refuses what cannot be trained on, before any work."""
    num_clusters = model.config.num_clusters
    for name, dataset in (("train_dataset", train), ("eval_dataset", validation)):
        if len(dataset) == 0:
            raise ValueError(f"Expected ratings in `{name}`, but it is empty.")
        model.check_ids(dataset.columns["user_id"], dataset.columns["item_id"])
    ratings, users = train.columns["rating"], train.columns["user_id"].unique()
    if ratings.min() == ratings.max():
        raise ValueError(
            f"Expected training ratings that differ, but all {len(ratings)} are {ratings[0].item():g}: there is no "
            "preference to learn from. Use all ratings of a data set rather than its positive ones."
        )
    # Where the number is chosen, it is among those that there are users for
    if len(users) < num_clusters and not args.choose_num_clusters:
        raise ValueError(
            f"Expected at least as many users as clusters, but got {len(users)} users with training ratings for "
            f"{num_clusters} clusters. Lower `num_clusters`."
        )
    if args.cluster_weight > 0 and num_clusters >= model.config.vae_embedding_size:
        raise ValueError(
            "Expected more columns in the tables than clusters, but got `vae_embedding_size` "
            f"{model.config.vae_embedding_size} for {num_clusters} clusters. Raise it, or lower `num_clusters`."
        )


def _rounded(shares: np.ndarray) -> list[float]:
    return [round(float(share), 3) for share in shares]
