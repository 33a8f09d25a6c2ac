"""Files of other programs and datasets, imported or registered as they are."""

from .imported_dataset import FORMATS, import_relations, register_imported_relations
from .name_lists import read_name_file
from .relation_import import Imported, ImportOptions

__all__ = [
    "FORMATS",
    "ImportOptions",
    "Imported",
    "import_relations",
    "read_name_file",
    "register_imported_relations",
]
