"""The package's version, kept apart so that the build reads it without importing the package."""

__version__ = "0.1.0"


def install_hint(extra: str) -> str:
    """How errors say that an extra of this package is to be installed; it is on no package index."""
    return f'Install it with `pip install ".[{extra}]"` in a checkout of gavamoe-hf.'
