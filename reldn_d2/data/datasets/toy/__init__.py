"""The built-in data set, drawn by code."""

from .dataset import register_toy_vrd

__all__ = ["register_toy_vrd"]
