"""Datasets with relations, their mapper and their statistics."""

from . import datasets  # registers the built-in datasets
from .dataset_mapper import RelationDatasetMapper
from .frequency import count_predicates, log_frequencies

__all__ = ["RelationDatasetMapper", "count_predicates", "datasets", "log_frequencies"]
