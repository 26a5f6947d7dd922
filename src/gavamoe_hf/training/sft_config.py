"""Arguments of stage 2."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

import torch
from trl import SFTConfig

# Name of each part of the model, and the ends of its modules' names.
TRAINABLE_PARTS = {
    "rating_model": ("rating_model",),
    "projections": ("user_projection", "item_projection"),
    "gates": ("mlp.gate",),
    # Of the routed layers, and of the dense ones of the plain Llama
    "experts": ("mlp.experts", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    "shared_expert": ("mlp.shared_expert",),
    "attention": ("self_attn",),
    "embeddings": ("embed_tokens",),
    "norms": ("input_layernorm", "post_attention_layernorm", "model.norm"),
    "lm_head": ("lm_head",),
}


# Options of TRL and transformers that would do nothing here, or something else than they say, and why
REFUSED_OPTIONS = {
    "packing": "it joins samples into one row, but each sample needs its own gate",
    "eval_packing": "it joins samples into one row, but each sample needs its own gate",
    "padding_free": "it joins samples into one row, but each sample needs its own gate",
    "completion_only_loss": "explanation tokens alone are scored, as in eq. 13",
    "assistant_only_loss": "records hold no conversations; explanation tokens alone are scored",
    "loss_type": "the loss is that of eq. 13",
    "label_smoothing_factor": "the loss is that of eq. 13",
    "use_liger_kernel": "its fused loss would leave out the ELBO",
    "chat_template_path": "the prompt is the processor's: set its `chat_template`",
    "dataset_text_field": "records have columns of their own, see `gavamoe_hf.load_records`",
    "truncation_mode": "the end of the explanation is cut, never the prompt",
    "eos_token": "the processor's tokenizer has it",
    "pad_token": "the processor's tokenizer has it",
    "model_init_kwargs": "the trainer takes a model, not its name",
}
# What leaves an option as it is: its default, and what says the same
_UNSET = {"completion_only_loss": (None, True), "eval_packing": (None, False)}


@dataclass
class GaVaMoESFTConfig(SFTConfig):
    """
    Arguments of [`GaVaMoESFTTrainer`]: those of [`~trl.SFTConfig`] and the ones below. Defaults that differ:
    `max_length` 180 (the paper's), validation and saving every epoch with the best one kept by validation negative
    log-likelihood, bf16 only where there is a GPU for it, no gradient checkpointing.
    """

    learning_rate: float = field(
        default=3e-5, metadata={"help": "Peak learning rate of AdamW. Paper: 3e-5, on a pretrained Llama."}
    )
    alpha: float | None = field(
        default=None,
        metadata={
            "help": "Weight of the negative ELBO: alpha * elbo + (1 - alpha) * nll (eq. 13). The model config's, 0.1, "
            "if not given. Paper: not reported."
        },
    )
    beta: float | None = field(
        default=None,
        metadata={"help": "Weight of the KL term in the ELBO (eq. 12); the model config's, 0.01, if not given."},
    )
    trainable_parts: list[str] | None = field(
        default=None,
        metadata={"help": f"Parts to train, all if not given: {', '.join(TRAINABLE_PARTS)}. The others are frozen."},
    )
    rating_learning_rate_scale: float = field(
        default=0.1,
        metadata={
            "help": "Learning rate of the rating model in stage 2, as a multiple of `learning_rate`: it has been "
            "trained already, and sparse ratings overfit."
        },
    )
    feature_dropout: float = field(
        default=0.1,
        metadata={
            "help": "Share of the training prompts that name no feature, so that the model can also explain without."
        },
    )
    max_length: int | None = field(
        default=180, metadata={"help": "Tokens to which prompt and explanation together are cut. Paper: 180."}
    )
    gradient_checkpointing: bool | None = field(
        default=None,
        metadata={"help": "Recompute activations in the backward pass: less memory, about 20 % slower."},
    )
    per_device_eval_batch_size: int = field(default=32, metadata={"help": "Records scored at once and device."})
    eval_strategy: str = field(default="epoch", metadata={"help": "When the validation split is scored."})
    save_strategy: str = field(default="epoch", metadata={"help": "When checkpoints are saved."})
    save_total_limit: int | None = field(default=1, metadata={"help": "Checkpoints kept besides the best one."})
    load_best_model_at_end: bool = field(default=True, metadata={"help": "Keep the best checkpoint, not the last."})
    metric_for_best_model: str | None = field(default="eval_nll", metadata={"help": "What best means."})
    greater_is_better: bool | None = field(default=False, metadata={"help": "Whether more of it is better."})

    def __post_init__(self):
        if self.bf16 is None and not self.fp16:
            self.bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        # Before TRL, which warns of some, and derives others from them
        defaults = {option.name: option.default for option in fields(self)}
        for name, reason in REFUSED_OPTIONS.items():
            if getattr(self, name) not in _UNSET.get(name, (defaults[name],)):
                raise ValueError(f"`{name}` is {getattr(self, name)!r}, but {reason}. Leave it out.")
        super().__post_init__()
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise ValueError(f"`alpha` must be in [0, 1], got {self.alpha}.")
        if not 0 <= self.feature_dropout <= 1:
            raise ValueError(f"`feature_dropout` must be in [0, 1], got {self.feature_dropout}.")
        unknown = [part for part in self.trainable_parts or [] if part not in TRAINABLE_PARTS]
        if unknown:
            raise ValueError(f"Expected `trainable_parts` among {list(TRAINABLE_PARTS)}, but got {unknown}.")
