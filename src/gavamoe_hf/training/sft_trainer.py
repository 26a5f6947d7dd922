"""Stage 2: trains the explanations together with the rating model (section 3.3)."""

from __future__ import annotations

import logging
import math
import random
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from trl import SFTTrainer

from ..configuration_gavamoe import share_weights
from ..data.collator import ExplanationCollator
from ..processing_gavamoe import GaVaMoEProcessor
from .lora import check_experts_are_trained, freeze_parts, use_full_precision
from .optimizer import grouped_optimizer
from .progress import use_tidy_progress
from .resume import check_finite, check_fits
from .sft_config import GaVaMoESFTConfig
from .token_loss import score_tokens

logger = logging.getLogger(__name__)

RECORD_COLUMNS = ("user", "item", "rating", "feature", "explanation")
EXAMPLE_COLUMNS = ("input_ids", "labels", "user_id", "item_id", "rating")


# Arguments of TRL's trainer that would be taken and do nothing, and what to do instead
_REFUSED_ARGUMENTS = {
    "compute_loss_func": "the loss is that of eq. 13: subclass the trainer and override `compute_loss`",
    "formatting_func": "the prompt is the processor's: change its `prompt_template`",
    "quantization_config": "the model is loaded already: pass it to `from_pretrained`",
}


def tokenize_records(
    records: Dataset | IterableDataset,
    processor: GaVaMoEProcessor,
    max_length: int | None = 180,
    feature_dropout: float = 0.0,
    seed: int = 0,
    num_proc: int | None = None,
) -> Dataset | IterableDataset:
    """
    Training examples from records.

    Args:
        records ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Columns user, item, rating, feature (a list) and explanation. A stream is read as it goes.
        processor ([`GaVaMoEProcessor`]): Knows the ids and the prompt.
        max_length (`int`, *optional*, defaults to 180): Tokens to which prompt and explanation together are cut.
        feature_dropout (`float`, *optional*, defaults to 0.0): Share of the records whose prompt names no feature.
        seed (`int`, *optional*, defaults to 0): Seed of that choice.
        num_proc (`int`, *optional*): Processes, where records are no stream.

    Returns:
        [`~datasets.Dataset`] with the columns input_ids, labels, user_id, item_id and rating.

    Raises:
        `ValueError`: for missing columns, an id that is not known, or a prompt longer than `max_length`.
    """
    names = _column_names(records)
    missing = [column for column in RECORD_COLUMNS if column not in names]
    if missing:
        raise ValueError(
            f"Expected records with the columns {list(RECORD_COLUMNS)}, but {missing} are missing from {names}. Load "
            "them with `gavamoe_hf.load_records`."
        )
    is_stream = isinstance(records, IterableDataset)
    generator = random.Random(seed)
    drawn = [] if is_stream else [generator.random() for _ in range(len(records))]

    def encode(record: dict[str, Any], index: int) -> dict[str, Any]:
        # A stream may be begun again: what is dropped depends on the place of a record alone
        draw = random.Random(f"{seed}-{index}").random() if is_stream else drawn[index]
        features = record["feature"] if draw >= feature_dropout else []
        return processor.encode_record(
            record["user"], record["item"], record["rating"], features, record["explanation"], max_length
        )

    options: dict[str, Any] = {} if is_stream else {"desc": "Tokenizing records", "num_proc": num_proc}
    return records.map(encode, with_indices=True, remove_columns=names, **options)


def _column_names(dataset: Dataset | IterableDataset) -> list[str]:
    # A stream need not know them before its first row
    return list(dataset.column_names or next(iter(dataset), {}))


def prepare_examples(
    dataset: Dataset | IterableDataset | None,
    processor: GaVaMoEProcessor,
    args: GaVaMoESFTConfig,
    is_training: bool = True,
) -> Dataset | IterableDataset | None:
    """Training or validation examples as [`GaVaMoESFTTrainer`] makes them of records; what is tokenised stays."""
    if dataset is None:
        return None
    if not isinstance(dataset, Dataset | IterableDataset):
        hint = ' Did you mean `records["train"]`?' if isinstance(dataset, DatasetDict | IterableDatasetDict) else ""
        raise TypeError(f"Expected records as a Dataset or IterableDataset, but got {type(dataset).__name__}.{hint}")
    if "input_ids" not in _column_names(dataset):
        dropout = args.feature_dropout * is_training
        dataset = tokenize_records(dataset, processor, args.max_length, dropout, args.seed, args.dataset_num_proc)
    return dataset.shuffle(seed=args.seed) if is_training and args.shuffle_dataset else dataset


def set_loss_weights(model: Any, args: GaVaMoESFTConfig) -> None:
    """Puts alpha and beta into the configs of a model, where the arguments give them."""
    config = model.config
    config.alpha = config.alpha if args.alpha is None else args.alpha
    config.beta = config.beta if args.beta is None else args.beta
    model.rating_model.config.beta = config.beta


def _check_arguments(model: Any, args: Any, eval_dataset: Any, arguments: dict[str, Any]) -> None:
    """Raises where an argument of the trainer is of another kind, or would be taken and do nothing."""
    if not isinstance(args, GaVaMoESFTConfig):
        raise TypeError(f"Expected `args` as a GaVaMoESFTConfig, but got {type(args).__name__}.")
    if not isinstance(model, torch.nn.Module):
        raise TypeError(
            f"Expected `model` as a GaVaMoEForCausalLM, but got {model!r:.100}. Load it with `load_checkpoint` or "
            "`from_pretrained`."
        )
    for name, reason in _REFUSED_ARGUMENTS.items():
        if arguments.get(name) is not None:
            raise ValueError(f"`{name}` would do nothing: {reason}.")
    best = args.metric_for_best_model
    if isinstance(eval_dataset, dict) and args.load_best_model_at_end and best == "eval_nll":
        names = [f"eval_{name}_nll" for name in eval_dataset]
        raise ValueError(
            f"Expected `metric_for_best_model` among {names} with several sets for validation, but got {best!r}. Name "
            "the one that chooses the checkpoint, or set `load_best_model_at_end=False`."
        )


class GaVaMoESFTTrainer(SFTTrainer):
    """
    TRL's SFTTrainer with the loss of eq. 13, `alpha * elbo + (1 - alpha) * (nll + router_aux_loss_coef * aux)`. All
    terms come from one forward pass, and only explanation tokens are scored against the vocabulary.

    TRL's metrics (entropy, mean_token_accuracy, num_tokens, aux_loss) are logged as there, and `nll`, `elbo`,
    `reconstruction_loss` and `kl_loss`; in evaluation with the prefix `eval_`. `nll` is the exact mean over tokens.

    Args:
        model ([`GaVaMoEForCausalLM`]): The model, its rating model trained by [`RatingTrainer`].
        args ([`GaVaMoESFTConfig`]): Arguments.
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Records, or examples from [`tokenize_records`]; a stream needs `max_steps`.
        eval_dataset ([`~datasets.Dataset`], [`~datasets.IterableDataset`] or `dict`, *optional*):
            The same for validation, or a `dict` of several. `evaluate` and `predict` take records or examples as well.
        processor ([`GaVaMoEProcessor`]): Saved with every checkpoint.
        kwargs: what else [`~trl.SFTTrainer`] takes, `peft_config` and `optimizers` among it.

    Raises:
        `ValueError`: for arguments that would do nothing here (docs/options.md), and for a training that diverges.
        `TypeError`: for a model, arguments, records or a processor of another kind.
    """

    def __init__(
        self,
        model: Any,
        args: GaVaMoESFTConfig,
        train_dataset: Dataset,
        eval_dataset: Dataset | None = None,
        processor: GaVaMoEProcessor | None = None,
        **kwargs: Any,
    ):
        _check_arguments(model, args, eval_dataset, kwargs)
        processor = kwargs.pop("processing_class", None) if processor is None else processor
        if not hasattr(processor, "encode_record"):
            raise TypeError(f"Expected `processor` as a GaVaMoEProcessor, but got {type(processor).__name__}.")
        self.processor = processor
        tokenizer = processor.tokenizer
        if args.n_gpu > 1:
            # Without a launcher, Trainer would split batches by nn.DataParallel, which gives no ELBO
            logger.warning("Using one of %d GPUs. `accelerate launch` uses all.", args.n_gpu)
            args._n_gpu = 1
        train_dataset = prepare_examples(train_dataset, processor, args)
        eval_dataset = self._held_out(eval_dataset, args)
        args.dataset_kwargs = {**(args.dataset_kwargs or {}), "skip_prepare_dataset": True}
        freeze_parts(model, args.trainable_parts)
        config = model.config
        set_loss_weights(model, args)
        self._nll_totals: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            data_collator=kwargs.pop("data_collator", None)
            or ExplanationCollator(tokenizer.pad_token_id, args.pad_to_multiple_of),
            **kwargs,
        )
        use_tidy_progress(self)
        check_experts_are_trained(self.model, args.trainable_parts)
        use_full_precision(self.model, args.bf16 or args.fp16)
        # Asked for by this trainer alone: a saved config that asks for router logits slows every later generation
        config.output_router_logits = False
        if self.accelerator.is_fsdp2:
            # Gathered as they are: in bfloat16 the rating model would choose other gates. Autocast lowers the rest
            self.accelerator.state.fsdp_plugin.mixed_precision_policy = None

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = list(EXAMPLE_COLUMNS)

    def _held_out(self, dataset: Any, args: GaVaMoESFTConfig | None = None) -> Any:
        """Examples of records, or of each of several sets of them, to evaluate or predict."""
        args = self.args if args is None else args
        if isinstance(dataset, dict):
            return {name: prepare_examples(part, self.processor, args, False) for name, part in dataset.items()}
        return prepare_examples(dataset, self.processor, args, is_training=False)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW, or what the trainer was given, the rating model at a learning rate of its own."""
        if self.optimizer is not None:
            return self.optimizer
        scale = self.args.rating_learning_rate_scale
        model = self.model if model is None else model
        self.optimizer = grouped_optimizer(self, model, lambda name: scale if ".rating_model." in name else 1.0)
        return self.optimizer

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        if return_outputs:
            raise ValueError(
                "`compute_loss` returns no outputs: explanation tokens alone are scored against the vocabulary."
            )
        next_labels = F.pad(inputs["labels"][:, 1:], (0, 1), value=-100)  # [B, T]
        is_scored = next_labels != -100
        model_inputs = {name: value for name, value in inputs.items() if name != "labels"}
        outputs = model(
            **model_inputs,
            logits_to_keep=is_scored,
            use_cache=False,
            output_router_logits=self.aux_loss_enabled,
        )
        rows, columns = is_scored.nonzero(as_tuple=True)
        token_nll, entropy, correct = score_tokens(outputs.logits, next_labels[rows, columns])  # [N] each
        num_tokens = len(rows) if num_items_in_batch is None else num_items_in_batch
        nll = token_nll.sum() / torch.as_tensor(num_tokens, device=token_nll.device).clamp(min=1)
        steps = 1
        if num_items_in_batch is not None:
            # The count is that of all accumulated batches and ranks: a mean over the batch has to be divided by their
            # number, and DDP, which averages over ranks, undone (as in SFTTrainer.compute_loss)
            steps = self.current_gradient_accumulation_steps
            if self.args.average_tokens_across_devices:
                nll = nll * (self.accelerator.num_processes // self.get_tp_size())
        loss = nll
        if outputs.aux_loss is not None:
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss / steps
        alpha = self._config.alpha
        loss = (1 - alpha) * loss + alpha * outputs.elbo_loss / steps
        scores = torch.stack([token_nll.detach(), entropy, correct, torch.ones_like(entropy)], dim=-1)  # [N, 4]
        self._record_metrics(outputs, scores, rows, inputs)
        return loss

    @property
    def _config(self) -> Any:
        return self.accelerator.unwrap_model(self.model).config

    @torch.no_grad()
    def _record_metrics(
        self, outputs: Any, scores: torch.Tensor, rows: torch.Tensor, inputs: dict[str, torch.Tensor]
    ) -> None:
        """`scores` `(num_tokens, 4)`: nll, entropy, correct or not, and 1, of tokens in `rows` `(num_tokens,)`."""
        mode = "train" if self.model.training else "eval"
        metrics = self._metrics[mode]
        # Summed by record: the last batch of several processes repeats records, which are told by their place in it
        local = scores.new_zeros(len(inputs["labels"]), 4).index_add_(0, rows, scores)
        totals = self.accelerator.gather_for_metrics(local).sum(dim=0).tolist()
        if not math.isfinite(totals[0]):
            raise ValueError(
                f"The loss is {totals[0]} after {self.state.global_step} steps: the training has diverged, and nothing "
                "of it is saved. Lower `learning_rate` or `max_grad_norm`, or train in float32."
            )
        count = max(totals[3], 1.0)
        self._nll_totals[mode][0] += totals[0]
        self._nll_totals[mode][1] += count
        metrics["entropy"].append(totals[1] / count)
        metrics["mean_token_accuracy"].append(totals[2] / count)
        means = {
            "elbo": outputs.elbo_loss,
            "reconstruction_loss": outputs.reconstruction_loss,
            "kl_loss": outputs.kl_loss,
        }
        if outputs.aux_loss is not None:
            means["aux_loss"] = outputs.aux_loss
        # Gathered and read together: on a GPU, each reading waits for all that was started before
        num_tokens = inputs["attention_mask"].sum()
        local = torch.stack([value.detach().float() for value in (*means.values(), num_tokens)])[None]
        gathered = self.accelerator.gather_for_metrics(local)  # [processes, terms + 1]
        *values, num_tokens = torch.cat([gathered[:, :-1].mean(dim=0), gathered[:, -1:].sum(dim=0)]).tolist()
        for name, value in zip(means, values, strict=True):
            metrics[name].append(value)
        if mode == "train":
            self._total_train_tokens += int(num_tokens) // self._tp_size
        metrics["num_tokens"] = [self._total_train_tokens]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode = "train" if self.model.training else "eval"
        if mode in self._nll_totals:
            nll_sum, count = self._nll_totals.pop(mode)
            self._metrics[mode]["nll"] = [nll_sum / count]
        super().log(logs, start_time)

    def predict(self, test_dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return super().predict(self._held_out(test_dataset), *args, **kwargs)

    def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None) -> Any:
        loss, _, _ = super().prediction_step(model, inputs, True, ignore_keys)
        if prediction_loss_only or self.compute_metrics is None:
            return loss, None, None
        # Only a metric asks for the logits of whole sequences: as in TRL, another forward pass makes them
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            logits = model(
                **{name: value for name, value in inputs.items() if name != "labels"}, use_cache=False
            ).logits
        return loss, logits.detach(), inputs["labels"]

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        if not isinstance(eval_dataset, str):
            eval_dataset = self._held_out(eval_dataset)
        # TRL adds its metrics to the log alone; the best epoch is chosen by what this returns
        metrics = super().evaluate(eval_dataset, *args, **kwargs)
        logged = self.state.log_history[-1]
        prefix = kwargs.get("metric_key_prefix", "eval")
        for name in [name for name in logged if name.startswith("eval_") and not name.startswith(f"{prefix}_")]:
            # One of several sets, whose name TRL does not put before its own metrics
            logged[prefix + name.removeprefix("eval")] = logged.pop(name)
        return {**{name: value for name, value in logged.items() if name.startswith("eval_")}, **metrics}

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        check_fits(Path(resume_from_checkpoint), self.model if model is None else model)
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        check_finite(self.model)
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            folder = str(Path(self.args.output_dir if output_dir is None else output_dir))
            self.processor.save_pretrained(folder)
            share_weights(folder)
