"""GaVaMoE for Hugging Face: explainable recommendation with a VAE-GMM-routed mixture of experts (arXiv 2410.11841)."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoProcessor

from .configuration_gavamoe import POPULATION_ID, GaVaMoEConfig
from .fold_in_gavamoe import GaVaMoEFoldInResult
from .generation_gavamoe import GaVaMoEExplanation, GaVaMoERoutingReport
from .loading import load_checkpoint
from .modeling_gavamoe import (
    GaVaMoECausalLMOutputWithPast,
    GaVaMoEForCausalLM,
    GaVaMoEModel,
    GaVaMoEModelOutputWithPast,
)
from .processing_gavamoe import GaVaMoEProcessor
from .recommendation_gavamoe import GaVaMoERecommendationOutput
from .vae_gmm_gavamoe import GaVaMoERatingModel, GaVaMoERatingOutput
from .version import __version__

AutoConfig.register("gavamoe", GaVaMoEConfig, exist_ok=True)
# The causal-LM class for AutoModel too, so that `generate` works from either
AutoModel.register(GaVaMoEConfig, GaVaMoEForCausalLM, exist_ok=True)
AutoModelForCausalLM.register(GaVaMoEConfig, GaVaMoEForCausalLM, exist_ok=True)
AutoProcessor.register(GaVaMoEConfig, GaVaMoEProcessor, exist_ok=True)

__all__ = [
    "POPULATION_ID",
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
    "__version__",
    "load_checkpoint",
]
