"""Stage 2: trains the explanations together with the rating model (section 3.3)."""

from __future__ import annotations

import logging
import random
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from trl import SFTTrainer

from ..data.collator import ExplanationCollator
from ..processing_gavamoe import GaVaMoEProcessor
from .lora import check_experts_are_trained, freeze_parts, use_full_precision
from .optimizer import grouped_optimizer
from .resume import check_fits
from .sft_config import GaVaMoESFTConfig
from .token_loss import score_tokens

logger = logging.getLogger(__name__)

RECORD_COLUMNS = ("user", "item", "rating", "feature", "explanation")
EXAMPLE_COLUMNS = ("input_ids", "labels", "user_id", "item_id", "rating")


def tokenize_records(
    records: Dataset,
    processor: GaVaMoEProcessor,
    max_length: int | None = 180,
    feature_dropout: float = 0.0,
    seed: int = 0,
) -> Dataset:
    """
    Training examples from records.

    Args:
        records ([`~datasets.Dataset`]): Columns user, item, rating, feature (a list) and explanation.
        processor ([`GaVaMoEProcessor`]): Knows the ids and the prompt.
        max_length (`int`, *optional*, defaults to 180): Tokens to which prompt and explanation together are cut.
        feature_dropout (`float`, *optional*, defaults to 0.0): Share of the records whose prompt names no feature.
        seed (`int`, *optional*, defaults to 0): Seed of that choice.

    Returns:
        [`~datasets.Dataset`] with the columns input_ids, labels, user_id, item_id and rating.

    Raises:
        `ValueError`: for missing columns, an id that is not known, or a prompt longer than `max_length`.
    """
    missing = [column for column in RECORD_COLUMNS if column not in records.column_names]
    if missing:
        raise ValueError(
            f"Expected records with the columns {list(RECORD_COLUMNS)}, but {missing} are missing from "
            f"{records.column_names}. Load them with `gavamoe_hf.data.load_records`."
        )
    draw = random.Random(seed)
    keep_features = [draw.random() >= feature_dropout for _ in range(len(records))]

    def encode(record: dict[str, Any], index: int) -> dict[str, Any]:
        features = record["feature"] if keep_features[index] else []
        return processor.encode_record(
            record["user"], record["item"], record["rating"], features, record["explanation"], max_length
        )

    return records.map(encode, with_indices=True, remove_columns=records.column_names, desc="Tokenizing records")


def prepare_examples(
    dataset: Dataset | None, processor: GaVaMoEProcessor, args: GaVaMoESFTConfig, is_training: bool = True
) -> Dataset | None:
    """Training or validation examples as [`GaVaMoESFTTrainer`] makes them of records; what is tokenised stays."""
    if dataset is None or "input_ids" in dataset.column_names:
        return dataset
    return tokenize_records(dataset, processor, args.max_length, args.feature_dropout * is_training, args.seed)


def set_loss_weights(model: Any, args: GaVaMoESFTConfig) -> None:
    """Puts alpha and beta into the configs of a model, where the arguments give them."""
    config = model.config
    config.alpha = config.alpha if args.alpha is None else args.alpha
    config.beta = config.beta if args.beta is None else args.beta
    model.rating_model.config.beta = config.beta


class GaVaMoESFTTrainer(SFTTrainer):
    """
    TRL's SFTTrainer with the loss of eq. 13, `alpha * elbo + (1 - alpha) * (nll + router_aux_loss_coef * aux)`. All
    terms come from one forward pass, and only explanation tokens are scored against the vocabulary.

    TRL's metrics (entropy, mean_token_accuracy, num_tokens, aux_loss) are logged as there, and `nll`, `elbo`,
    `reconstruction_loss` and `kl_loss`; in evaluation with the prefix `eval_`. `nll` is the exact mean over tokens.

    Args:
        model ([`GaVaMoEForCausalLM`]): The model, its rating model trained by [`RatingTrainer`].
        args ([`GaVaMoESFTConfig`]): Arguments.
        train_dataset ([`~datasets.Dataset`]): Records, or examples from [`tokenize_records`].
        eval_dataset ([`~datasets.Dataset`], *optional*): The same for validation.
        processor ([`GaVaMoEProcessor`]): Saved with every checkpoint.
        kwargs: everything else that [`~trl.SFTTrainer`] takes, `peft_config` among it.
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
        eval_dataset = prepare_examples(eval_dataset, processor, args, is_training=False)
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
            data_collator=ExplanationCollator(tokenizer.pad_token_id, args.pad_to_multiple_of),
            **kwargs,
        )
        check_experts_are_trained(self.model, args.trainable_parts)
        use_full_precision(self.model, args.bf16 or args.fp16)
        # Asked for by this trainer alone: a saved config that asks for router logits slows every later generation
        config.output_router_logits = False
        if self.accelerator.is_fsdp2:
            # Gathered as they are: in bfloat16 the rating model would choose other gates. Autocast lowers the rest
            self.accelerator.state.fsdp_plugin.mixed_precision_policy = None

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = list(EXAMPLE_COLUMNS)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW, the rating model at a learning rate of its own."""
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
                "Only explanation tokens are scored, so there are no logits of whole sequences to return. Leave out "
                "`compute_metrics` and score generated explanations with `gavamoe_hf.evaluation` instead."
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

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        # TRL adds its metrics to the log alone; the best epoch is chosen by what this returns
        metrics = super().evaluate(*args, **kwargs)
        return {**{k: v for k, v in self.state.log_history[-1].items() if k.startswith("eval_")}, **metrics}

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        check_fits(Path(resume_from_checkpoint), self.model if model is None else model)
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            self.processor.save_pretrained(str(Path(self.args.output_dir if output_dir is None else output_dir)))
