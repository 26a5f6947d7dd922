"""A page that shows what a GaVaMoE recommends to whom, and why. Gradio (the extra `demo`) is needed by `page` alone."""

from .service import Answer, DemoError, DemoService, Person, Rated

__all__ = ["Answer", "DemoError", "DemoService", "Person", "Rated"]
