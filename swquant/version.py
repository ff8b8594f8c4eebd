"""The version, and nothing else: whoever needs it must not import the face of the package."""

__all__ = ["__version__"]

__version__ = "0.1.0"
