"""The package's layers: imports point in one direction only."""

import ast
from pathlib import Path

import pytest

import reldn_d2

PACKAGE = Path(reldn_d2.__file__).parent

# A module may import from its own layer and from the layers before it.
LAYERS = (
    ("utils", "structures", "config"),
    ("data",),
    ("modeling",),
    ("evaluation",),
    ("checkpoint",),
    ("engine",),
    ("pretrained", "model_zoo"),
    ("predictor", "export"),
    ("vis",),
    ("", "env"),  # "" is reldn_d2/__init__.py
    ("bulk",),
    ("scripts",),
    ("serve",),
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}

# Within `modeling`, from the bottom to the top.
MODELING = ("precision", "sampling", "backbone", "losses") + (
    *("detectors", "relation_head", "meta_arch", ""),
)


def modules() -> list[str]:
    """Return dotted names below reldn_d2; a package is named without ``__init__``."""
    names = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        names.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return names


MODULES = modules()


def imported_modules(name: str) -> set[str]:
    """Return the modules of the package that a module imports, also inside functions."""
    folder = PACKAGE.joinpath(*name.split(".")) if name else PACKAGE
    is_package = folder.is_dir()
    path = folder / "__init__.py" if is_package else folder.with_suffix(".py")
    base = name.split(".") if name else []
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names if alias.name.startswith("reldn_d2")]
        elif isinstance(node, ast.ImportFrom) and node.level:
            levels = node.level - is_package
            parent = base[: len(base) - levels]
            start = ["reldn_d2", *parent, *([node.module] if node.module else [])]
            targets = [".".join([*start, alias.name]) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("reldn_d2"):
            targets = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for target in targets:
            parts = target.split(".")[1:]
            while parts and ".".join(parts) not in MODULES:
                parts.pop()  # a class or function, not a module
            found.add(".".join(parts))
    return found - {name}


@pytest.mark.parametrize("name", MODULES)
def test_imports_never_point_upwards(name):
    layer = name.split(".")[0]
    for target in imported_modules(name):
        assert RANK[target.split(".")[0]] <= RANK[layer], f"{name} imports {target}"
        if layer == "modeling" and target.startswith("modeling"):
            own, other = ((x.split(".") + [""])[1] for x in (name, target))
            assert MODELING.index(other) <= MODELING.index(own), f"{name} imports {target}"


def test_imports_have_no_cycle():
    remaining = {name: imported_modules(name) for name in MODULES}
    # A package runs before its modules, so a module depends on no __init__ of a package around it.
    for name, targets in remaining.items():
        targets -= {x for x in targets if x == "" or name.startswith(x + ".")}
    while remaining:
        leaves = {name for name, targets in remaining.items() if not targets & remaining.keys()}
        assert leaves, f"cycle among {sorted(remaining)}"
        remaining = {name: targets for name, targets in remaining.items() if name not in leaves}


def test_top_level_has_few_modules():
    assert {x.stem for x in PACKAGE.glob("*.py")} == {
        "__init__",
        "config",
        "env",
        "model_zoo",
        "predictor",
    }


def test_module_names_are_unique():
    # structures/relations.py and evaluation/relations.py would be mistaken for each other.
    names = [x.rsplit(".", 1)[-1] for x in MODULES]
    allowed = {"build", "relation_head"}
    repeated = {x for x in names if names.count(x) > 1} - allowed
    assert not repeated
