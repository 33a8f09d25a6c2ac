"""Datasets with relations; importing this package registers the built-in ones."""

from . import builtin  # registers the built-in datasets
from .coco import load_relation_instances, register_relation_instances
from .coco_writer import to_relation_instances
from .importers import import_relations, register_imported_relations
from .openimages import load_openimages_vrd, register_openimages_vrd
from .relation_json import load_relation_json, register_relation_json
from .visual_genome import load_visual_genome, register_visual_genome
from .vrd import load_vrd, register_vrd

__all__ = [
    "builtin",
    "import_relations",
    "load_openimages_vrd",
    "load_relation_instances",
    "load_relation_json",
    "load_visual_genome",
    "load_vrd",
    "register_imported_relations",
    "register_openimages_vrd",
    "register_relation_instances",
    "register_relation_json",
    "register_visual_genome",
    "register_vrd",
    "to_relation_instances",
]
