"""What a test's modules register, taken back after the test."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from reldn_d2.utils import config_keys, user_modules
from reldn_d2.utils.protocols import PROTOCOL_REGISTRY

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.registry import Registry


def registry_tables() -> list[dict]:
    """Return the dicts behind all registries of this package and Detectron2, and their like."""
    modules = [x for name, x in list(sys.modules.items()) if name.startswith(("reldn", "detec"))]
    values = [value for module in modules for value in list(vars(module).values())]
    registries = {id(x): x for x in values if isinstance(x, Registry)}
    tables = [x._obj_map for x in registries.values()]
    tables += [PROTOCOL_REGISTRY._by_name, config_keys.CONFIG_HOOKS, config_keys._owners]
    return [*tables, user_modules._imported]


@contextmanager
def restored_registries() -> Iterator[None]:
    """Undo all registrations, imports of modules and changes of ``sys.path`` made inside."""
    tables = registry_tables()
    before = [dict(table) for table in tables]
    datasets, modules, path = set(DatasetCatalog.list()), set(sys.modules), list(sys.path)
    yield
    for table, content in zip(tables, before):
        table.clear()
        table.update(content)
    for name in set(DatasetCatalog.list()) - datasets:
        DatasetCatalog.pop(name)
        MetadataCatalog.pop(name, None)
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        if "pytest-of-" in str(getattr(sys.modules[name], "__file__", "")):  # in a test's folder
            del sys.modules[name]
