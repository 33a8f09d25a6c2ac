"""Data sets with relations; importing this package registers the built-in ones."""

from . import builtin  # registers the built-in data sets
from .vrd import load_vrd, register_vrd

__all__ = ["builtin", "load_vrd", "register_vrd"]
