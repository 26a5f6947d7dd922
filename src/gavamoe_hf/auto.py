"""The public names, and registration with the Auto classes, which is all that happens when this module is imported."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoProcessor
from transformers.pipelines import PIPELINE_REGISTRY

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
from .pipeline_gavamoe import TASK, ExplainableRecommendationPipeline
from .processing_gavamoe import GaVaMoEProcessor
from .recommendation_gavamoe import GaVaMoERecommendationOutput
from .vae_gmm_gavamoe import GaVaMoERatingModel, GaVaMoERatingOutput

AutoConfig.register("gavamoe", GaVaMoEConfig, exist_ok=True)
# The causal-LM class for AutoModel too, so that `generate` works from either
AutoModel.register(GaVaMoEConfig, GaVaMoEForCausalLM, exist_ok=True)
AutoModelForCausalLM.register(GaVaMoEConfig, GaVaMoEForCausalLM, exist_ok=True)
AutoProcessor.register(GaVaMoEConfig, GaVaMoEProcessor, exist_ok=True)
PIPELINE_REGISTRY.register_pipeline(TASK, ExplainableRecommendationPipeline, pt_model=AutoModelForCausalLM)

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
    "load_checkpoint",
]
