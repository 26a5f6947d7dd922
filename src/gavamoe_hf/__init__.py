"""GaVaMoE for Hugging Face: explainable recommendation with a VAE-GMM-routed mixture of experts (arXiv 2410.11841)."""

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

from .version import __version__


def _is_command() -> bool:
    """Whether this process is `gavamoe`, or `python -m gavamoe_hf`."""
    script = sys.argv[0] if getattr(sys, "argv", None) else ""
    # Not `sys.argv` alone: a process that the command spawns is given the command's
    original = sys.orig_argv
    if script == "-m":  # only while the parent packages of the module are imported, ours or somebody else's
        return "-m" in original[:-1] and original[original.index("-m") + 1].split(".")[0] == __name__
    return script in original and os.path.basename(script) in ("gavamoe", "gavamoe.exe", "gavamoe-script.py")


# An import registers with the Auto classes, so that `AutoModel.from_pretrained` works after `import gavamoe_hf` alone.
# It takes seconds, since it brings torch and transformers, and the command has to list its options without them: there
# the names come at first use, and `cli/main.py` registers before it runs anything. The command is told by its name,
# since nothing else sets it apart before the package is imported; what is not recognised gets the whole import.
if TYPE_CHECKING or not _is_command():
    from .auto import (
        POPULATION_ID,
        ExplainableRecommendationPipeline,
        GaVaMoECausalLMOutputWithPast,
        GaVaMoEConfig,
        GaVaMoEExplanation,
        GaVaMoEFoldInResult,
        GaVaMoEForCausalLM,
        GaVaMoEModel,
        GaVaMoEModelOutputWithPast,
        GaVaMoEProcessor,
        GaVaMoERatingModel,
        GaVaMoERatingOutput,
        GaVaMoERecommendationOutput,
        GaVaMoERoutingReport,
        load_checkpoint,
    )

if TYPE_CHECKING:
    from .data import load_records
    from .training.rating_trainer import RatingDataset, RatingTrainer, RatingTrainingArguments
    from .training.sft_config import GaVaMoESFTConfig
    from .training.sft_trainer import GaVaMoESFTTrainer

# Imported at first use, as they bring TRL and more
_LAZY = {
    "GaVaMoESFTConfig": ".training.sft_config",
    "GaVaMoESFTTrainer": ".training.sft_trainer",
    "RatingDataset": ".training.rating_trainer",
    "RatingTrainer": ".training.rating_trainer",
    "RatingTrainingArguments": ".training.rating_trainer",
    "load_records": ".data",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY.get(name, ".auto"), __name__), name)


__all__ = [
    "POPULATION_ID",
    "ExplainableRecommendationPipeline",
    "GaVaMoECausalLMOutputWithPast",
    "GaVaMoEConfig",
    "GaVaMoEExplanation",
    "GaVaMoEFoldInResult",
    "GaVaMoEForCausalLM",
    "GaVaMoEModel",
    "GaVaMoEModelOutputWithPast",
    "GaVaMoEProcessor",
    "GaVaMoERatingModel",
    "GaVaMoERatingOutput",
    "GaVaMoERecommendationOutput",
    "GaVaMoERoutingReport",
    "GaVaMoESFTConfig",
    "GaVaMoESFTTrainer",
    "RatingDataset",
    "RatingTrainer",
    "RatingTrainingArguments",
    "__version__",
    "load_checkpoint",
    "load_records",
]
