"""``--module``: what is imported, under which name, how often, and where."""

import argparse
import sys

import pytest
from torch.utils.data import DataLoader, Dataset

from reldn_d2.engine import launch
from reldn_d2.utils.processes import loader_worker_init
from reldn_d2.utils.user_modules import (
    UserModuleError,
    add_module_argument,
    import_modules,
    imported_modules,
    parse_and_import,
)

from detectron2.data import DatasetCatalog

REGISTER = """
from detectron2.data import DatasetCatalog

DatasetCatalog.register("{0}", list)  # raises if the name is registered already
"""
pytestmark = pytest.mark.usefixtures("own_registrations")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with a module and a package that each register a dataset."""
    (tmp_path / "my_own_data.py").write_text(REGISTER.format("of_file"))
    package = tmp_path / "my_own_package" / "parts"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").touch()
    (package / "__init__.py").write_text(REGISTER.format("of_package"))
    (package / "inner.py").write_text(f"from . import parts_of_it\n{REGISTER.format('of_inner')}")
    (package / "parts_of_it.py").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def error_of(*modules):
    with pytest.raises(UserModuleError) as caught:
        import_modules(modules)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", ["my_own_data", "my_own_data.py", "./my_own_data.py"])
def test_import_modules_file_or_name_registers(folder, name):
    import_modules([name])
    assert "of_file" in DatasetCatalog.list() and imported_modules() == ("my_own_data",)


def test_import_modules_twice_registers_once(folder):
    import_modules(["my_own_data.py", "my_own_data", str(folder / "my_own_data.py")])
    import_modules(["./my_own_data.py"])
    (folder / "linked").symlink_to(folder)
    import_modules(["linked/my_own_data.py"])
    assert imported_modules() == ("my_own_data",)


def test_import_modules_file_in_a_package_is_its_module(folder):
    import_modules(["my_own_package/parts/inner.py", "my_own_package.parts.inner"])
    import_modules(["my_own_package/parts/__init__.py"])
    assert imported_modules() == ("my_own_package.parts.inner", "my_own_package.parts")
    assert {"of_inner", "of_package"} <= set(DatasetCatalog.list())


def test_import_modules_file_finds_modules_next_to_it(folder, monkeypatch, tmp_path_factory):
    (folder / "my_head_file.py").write_text("import my_own_data\n")
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    import_modules([str(folder / "my_head_file.py")])
    assert "of_file" in DatasetCatalog.list()


def test_import_modules_no_such_file_names_the_folder(folder):
    error = error_of("my_haed.py")
    assert error.startswith(f"--module my_haed.py: there is no such file in {folder}. Give the")
    assert "this is a folder; name a Python file in it" in error_of("my_own_package/parts/")


@pytest.mark.parametrize("name", ["my_head.yaml.", "my-head", ".my_head", ""])
def test_import_modules_neither_file_nor_name_raises(folder, name):
    assert f"--module {name}: this is neither a Python file" in error_of(name)


@pytest.mark.parametrize("name", ["no_such_module", "my_own_package.no_such_module", "json.tool.x"])
def test_import_modules_unknown_name_says_how_to_write_it(folder, name):
    error = error_of(name)
    assert error.startswith(f"--module {name}: No module named '{name}'. Write it as in a Python")
    assert "PYTHONPATH; or give the path of its file" in error


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("\nx = 1 / 0\n", 2, "ZeroDivisionError: division by zero. Fix the module"),
        ("def f(:\n", 1, "SyntaxError: "),
        ("import json\nimport no_such_thing\n", 2, "No module named 'no_such_thing'. Fix"),
        ("raise ValueError('two\\nlines')\n", 1, "ValueError: two lines. Fix"),
        ("import sys\n\nsys.exit(3)\n", 3, 'under `if __name__ == "__main__":`'),
        (REGISTER.format("vrd_train"), 4, "AssertionError: Dataset 'vrd_train' is already"),
        ("import json\n\njson.loads('{')\n", 3, "JSONDecodeError: "),  # its line, not json's
    ],
)
def test_import_modules_error_inside_names_file_and_line(folder, text, line, message):
    path = folder / "my_broken_module.py"
    path.write_text(text)
    for name in ("my_broken_module.py", "my_broken_module"):
        error = error_of(name)
        assert error.startswith(f"--module {name}: {path}, line {line}: ") and message in error
        assert error.endswith(", then run the command again.")


@pytest.mark.parametrize("name", ["json", "random", "numpy", "reldn_d2"])
def test_import_modules_file_named_as_another_module_raises(folder, name):
    (folder / f"{name}.py").write_text(REGISTER.format("never"))
    error = error_of(f"{name}.py")
    assert f"Python has another module '{name}' already" in error and "Rename your file" in error
    assert "never" not in DatasetCatalog.list()


def test_import_modules_file_with_a_dash_raises(folder):
    (folder / "my-own-head.py").touch()
    assert "'my-own-head' is not a name that Python can import. Rename" in error_of(
        "my-own-head.py"
    )


def test_parse_and_import_bad_module_exits_2_with_one_line(folder, capsys):
    parser = argparse.ArgumentParser(prog="tool.py")
    add_module_argument(parser)
    with pytest.raises(SystemExit) as end:
        parse_and_import(parser, ["--module", "my_own_data.py", "--module", "none.py"])
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("tool.py: error: --module none.py: ") and error.count("\n") == 1
    assert "of_file" in DatasetCatalog.list()


# ------------------------------------------------------------------------------ other processes


class Registered(Dataset):
    """Its only item tells whether the process that reads it has registered the dataset."""

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return "of_file" in DatasetCatalog.list()


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_loader_workers_import_the_modules(folder, method):
    import_modules(["my_own_data.py"])
    loader = DataLoader(
        Registered(),
        num_workers=1,
        multiprocessing_context=method,
        worker_init_fn=loader_worker_init(),
        collate_fn=list,
    )
    assert list(loader) == [[True]]


def require_registered():
    assert "of_file" in DatasetCatalog.list() and "my_own_data" in sys.modules


def test_launched_processes_import_the_modules(folder):
    import_modules([str(folder / "my_own_data.py")])
    launch(require_registered, 2, on_cpu=True)
