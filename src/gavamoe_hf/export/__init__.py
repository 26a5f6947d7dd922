"""A GaVaMoE as checkpoints of standard architectures, and the requests that a server of them is sent."""

from .router import ExportedRouter, ServedRequest
from .standard import ExportFormat, export_standard

__all__ = ["ExportFormat", "ExportedRouter", "ServedRequest", "export_standard"]
