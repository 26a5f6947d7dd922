"""LoRA and QLoRA of stage 2: what is adapted, and what is trained in full beside it."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib.util import find_spec

import torch
from peft import LoraConfig, get_peft_model
from peft.utils import ModulesToSaveWrapper
from transformers import BitsAndBytesConfig

from ..configuration_gavamoe import GaVaMoEConfig
from ..modeling_gavamoe import GaVaMoEForCausalLM
from ..vae_gmm_gavamoe import GaVaMoERatingModel
from ..version import install_hint
from .sft_config import TRAINABLE_PARTS, GaVaMoESFTConfig

ATTENTION_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj")
EXPERT_PARAMETERS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")

# New in every upcycled model, and small: low-rank updates of their random start would not do
_TRAINED_IN_FULL = ("rating_model", "projections", "gates")


@dataclass
class LoraArguments:
    """
    LoRA (arXiv 2106.09685) in stage 2, with the names of TRL's `ModelConfig`. Parts in `trainable_parts` are trained
    and saved in full beside it: rating model, projections and gates if not given. Paper: experts too, and r = 8,
    alpha = 16, dropout 0.1 on the attention.
    """

    use_peft: bool = field(
        default=False,
        metadata={
            "help": "Train the pretrained weights by LoRA. `trainable_parts`, trained in full beside it, is then "
            f"{', '.join(_TRAINED_IN_FULL)} if not given."
        },
    )
    lora_r: int = field(default=8, metadata={"help": "Rank of the updates. Paper: 8."})
    lora_alpha: int = field(default=16, metadata={"help": "Their scale, times the rank. Paper: 16."})
    lora_dropout: float = field(
        default=0.0, metadata={"help": "Dropout of their inputs; experts under LoRA allow none. Paper: 0.1."}
    )
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": f"Layers under LoRA; {', '.join(ATTENTION_MODULES)} if not given (paper)."}
    )
    lora_target_parameters: list[str] | None = field(
        default=None,
        metadata={
            "help": f"Parameters under LoRA; {' and '.join(EXPERT_PARAMETERS)} if not given, unless the experts are "
            "trained in full."
        },
    )
    use_rslora: bool = field(default=False, metadata={"help": "Scale by alpha over the root of r (arXiv 2312.03732)."})
    load_in_4bit: bool = field(
        default=False,
        metadata={
            "help": "Keep the frozen layers in 4 bits (QLoRA, arXiv 2305.14314); needs the extra quantization. "
            "Experts, embeddings, head, and all that is trained in full stay as they are."
        },
    )
    bnb_4bit_quant_type: str = field(default="nf4", metadata={"help": "Type of the 4 bits.", "choices": ["fp4", "nf4"]})
    use_bnb_nested_quant: bool = field(default=False, metadata={"help": "Quantise the scales of the 4 bits, too."})

    def __post_init__(self):
        if self.load_in_4bit and not self.use_peft:
            raise ValueError("`load_in_4bit` trains adapters on frozen layers: pass `use_peft` with it.")
        if self.load_in_4bit and find_spec("bitsandbytes") is None:
            raise ImportError("Expected bitsandbytes for `load_in_4bit`. " + install_hint("quantization"))


def lora_config(args: LoraArguments, sft_args: GaVaMoESFTConfig, config: GaVaMoEConfig) -> LoraConfig | None:
    """
    The `peft_config` of [`GaVaMoESFTTrainer`], or `None` without LoRA.

    Args:
        args ([`LoraArguments`]): Options.
        sft_args ([`GaVaMoESFTConfig`]): Says which parts are trained in full.
        config ([`GaVaMoEConfig`]): Says which parts there are.

    Raises:
        `ValueError`: for a dropout that the experts do not allow.
    """
    if not args.use_peft:
        return None
    in_full = list(_TRAINED_IN_FULL if sft_args.trainable_parts is None else sft_args.trainable_parts)
    has_experts = config.num_local_experts > 0
    parameters = args.lora_target_parameters
    if parameters is None:
        parameters = list(EXPERT_PARAMETERS) if has_experts and "experts" not in in_full else []
    if set(parameters) not in (set(), set(EXPERT_PARAMETERS)):
        raise ValueError(
            f"Expected `lora_target_parameters` as {list(EXPERT_PARAMETERS)}, both of them or, in a YAML file, [] for "
            f"none, but got {parameters}. With one alone, experts that start at zero stay there."
        )
    if "attention" in in_full:
        raise ValueError(
            'Expected `trainable_parts` without "attention", which LoRA adapts, but got '
            f"{in_full}. Leave it out, or train without `use_peft`."
        )
    if parameters and args.lora_dropout > 0:
        raise ValueError(
            f"Expected `lora_dropout` 0 with the experts' parameters under LoRA, but got {args.lora_dropout}. Leave it "
            'out, or train the experts in full: add "experts" to `trainable_parts`.'
        )
    absent = set() if has_experts else {"gates", "shared_expert"}
    absent |= set() if config.inject_pair_embeddings else {"projections"}
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        use_rslora=args.use_rslora,
        target_modules=list(args.lora_target_modules or ATTENTION_MODULES),
        target_parameters=parameters or None,
        modules_to_save=[name for part in in_full if part not in absent for name in TRAINABLE_PARTS[part]],
    )


def untrained_model(
    config: GaVaMoEConfig, dtype: torch.dtype | None, sft_args: GaVaMoESFTConfig, peft_config: LoraConfig | None
) -> torch.nn.Module:
    """
    The model that stage 2 would train, on the meta device, where it takes no memory.

    Raises:
        `ValueError`: for a `peft_config` that does not fit the model, or leaves its experts frozen.
    """
    with torch.device("meta"):
        model = GaVaMoEForCausalLM._from_config(config, dtype=dtype or config.dtype or torch.float32)
        model.rating_model.float()
        model.tie_weights()
        if peft_config is None:
            freeze_parts(model, sft_args.trainable_parts)
            return model
        names = [name for name, _ in model.named_modules()]
        unknown = [end for end in peft_config.target_modules if not any(name.endswith(end) for name in names)]
        if unknown:
            raise ValueError(
                f"Expected `lora_target_modules` among the model's layers, such as {', '.join(ATTENTION_MODULES)}, but "
                f"got {unknown}."
            )
        model = get_peft_model(model, copy.deepcopy(peft_config))
    check_experts_are_trained(model, sft_args.trainable_parts)
    use_full_precision(model, sft_args.bf16 or sft_args.fp16)
    return model


def quantization_config(args: LoraArguments, trained_in_full: Iterable[str], dtype: torch.dtype) -> BitsAndBytesConfig:
    """How `from_pretrained` loads the base of QLoRA, but for the modules trained in full."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=args.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=args.use_bnb_nested_quant,
        bnb_4bit_compute_dtype=dtype,
        # The names of what they hold, from the start
        llm_int8_skip_modules=["lm_head", *(rf".*\.{name}" for name in {"rating_model", *trained_in_full})],
    )


def check_widths(model: torch.nn.Module) -> None:
    """
    Refuses a model for 4 bits whose layers bitsandbytes cannot pack on every processor: on one with AVX512-BF16 it
    takes 64 inputs and 32 outputs at once and fails for others, when they are first run. The same on all processors, so
    that it does not depend on the machine whether a run works.

    Raises:
        `ValueError`: naming the first such layer.
    """
    for name, layer in model.named_modules():
        if not isinstance(layer, torch.nn.Linear) or not re.search(r"\.layers\.\d+\.(self_attn|mlp)\.", name):
            continue
        if layer.in_features % 64 or layer.out_features % 32:
            raise ValueError(
                f"Expected layers with a multiple of 64 inputs and of 32 outputs for `load_in_4bit`, but {name} has "
                f"{layer.in_features} and {layer.out_features}. Leave `load_in_4bit` out."
            )


def check_experts_are_trained(model: torch.nn.Module, trainable_parts: list[str] | None) -> None:
    """
    Refuses a model whose experts are frozen although nobody said so. PEFT passes over stacked parameters without a
    word, and experts that start at zero then stay there.

    Raises:
        `ValueError`: unless `trainable_parts` leaves the experts out.
    """
    if trainable_parts is not None and "experts" not in trainable_parts:
        return
    trained = [parameter.requires_grad for name, parameter in model.named_parameters() if ".mlp.experts." in name]
    if trained and not any(trained):
        raise ValueError(
            "Expected experts that are trained, but with this `peft_config` all of them are frozen. Pass "
            f'`target_parameters={list(EXPERT_PARAMETERS)}` (LoRA), or add "mlp.experts" to `modules_to_save` (in '
            'full). To freeze them on purpose, set `trainable_parts` without "experts".'
        )


@torch.no_grad()
def use_full_precision(model: torch.nn.Module, is_autocast: bool) -> None:
    """
    Keeps in 32 bits what is trained in full beside LoRA, as its adapters are: in 16 most of AdamW's small steps would
    be lost to rounding. Without autocast all but the rating model need one precision, and it alone is kept. (TRL lowers
    all that QLoRA trains.)
    """
    for module in model.modules():
        if not isinstance(module, ModulesToSaveWrapper):
            continue
        if is_autocast or isinstance(module.original_module, GaVaMoERatingModel):
            for copied in module.modules_to_save.values():
                for parameter, original in zip(copied.parameters(), module.original_module.parameters(), strict=True):
                    parameter.data = original.detach().float().clone()


def freeze_parts(model: torch.nn.Module, trainable: list[str] | None) -> None:
    """Leaves the named parts of [`TRAINABLE_PARTS`] trainable and no others; all as they are where none is named."""
    if trainable is None:
        return
    modules = [f".{module}." for part in trainable for module in TRAINABLE_PARTS[part]]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(module in f".{name}" for module in modules))
