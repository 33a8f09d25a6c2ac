"""The built-in dataset, drawn by code."""

from .dataset import register_toy_vrd

__all__ = ["register_toy_vrd"]
