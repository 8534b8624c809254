"""Transformer²: experts of singular values on a base, what dispatches them, and their training."""

from archs.transformer_squared.model import TransformerSquared

__all__ = ["TransformerSquared"]
