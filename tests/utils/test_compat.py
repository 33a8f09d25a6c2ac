"""The patches for Detectron2 0.6: applied where they are needed, and nowhere else.

Cases that need a fresh interpreter run in one of their own, with a small fake Detectron2 that has
or lacks what the case is about.
"""

import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from reldn_d2.utils import compat

COMPAT_FILE = compat.__file__
REPOSITORY = Path(COMPAT_FILE).parents[2]

OFFICIAL = {
    "__init__.py": "",
    "_C.py": "def get_compiler_version():\n    return 'GCC 12'\n",
    "modeling/__init__.py": "",
    "checkpoint/__init__.py": "",
    "config/__init__.py": "",
    "data/transforms/transform.py": "interp = Image.BILINEAR\n",
    "data/build.py": "histogram = np.zeros((1,), dtype=int)\nids = np.int64(0)\n",
    "model_zoo/__init__.py": "from .model_zoo import get_config_file\n",
    "model_zoo/model_zoo.py": "def get_config_file(name):\n    return name\n",
}
NEEDS_NAMES = {
    "data/transforms/transform.py": "interp = Image.LINEAR\n",
    "data/build.py": "histogram = np.zeros((1,), dtype=np.int)\n",
}
NEEDS_PKG_RESOURCES = {
    "model_zoo/model_zoo.py": (
        "import pkg_resources\n"
        "def get_config_file(name):\n"
        "    return pkg_resources.resource_filename('detectron2.model_zoo', name)\n"
    )
}
NO_PKG_RESOURCES = """
import importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == "pkg_resources" else find_spec(name, *a)
"""
LOAD_COMPAT = f"""
import importlib.util
spec = importlib.util.spec_from_file_location("compat", {COMPAT_FILE!r})
compat = importlib.util.module_from_spec(spec)
spec.loader.exec_module(compat)
"""


def write_detectron2(folder: Path, *changes: dict, without: str = "") -> None:
    """Write a small fake Detectron2 into ``folder``."""
    files = dict(OFFICIAL)
    for change in changes:
        files.update(change)
    for name, text in files.items():
        if name != without:
            path = folder / "detectron2" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)


def run_python(folder: Path, code: str) -> subprocess.CompletedProcess:
    """Run code in a fresh interpreter that finds the packages in ``folder`` first."""
    code = f"import sys; sys.path.insert(0, {str(folder)!r})\n{code}"
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def printed(folder: Path, code: str) -> list[str]:
    """Run code after the patches; return the words that it printed."""
    result = run_python(folder, LOAD_COMPAT + code)
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


def test_apply_official_detectron2_changes_nothing(tmp_path):
    write_detectron2(tmp_path)
    code = (
        """
import numpy as np, PIL.Image
had = (hasattr(PIL.Image, "LINEAR"), hasattr(np, "int"))
"""
        + LOAD_COMPAT
        + """
import detectron2._C
assert (hasattr(PIL.Image, "LINEAR"), hasattr(np, "int")) == had
print(compat.applied, compat.has_compiled_ops(), detectron2._C.get_compiler_version())
"""
    )
    result = run_python(tmp_path, code)
    assert result.stdout.strip() == "[] True GCC 12", result.stderr
    assert result.stderr == ""


def test_apply_removed_names_in_use_restores_them(tmp_path):
    write_detectron2(tmp_path, NEEDS_NAMES)
    remove = """
import numpy as np, PIL.Image
for module, name in ((PIL.Image, "LINEAR"), (np, "int")):
    module.__dict__.pop(name, None)
"""
    code = remove + LOAD_COMPAT + """
assert PIL.Image.LINEAR == PIL.Image.BILINEAR and np.int is int
compat.apply()  # a second call does nothing
print(*compat.applied)
"""
    result = run_python(tmp_path, code)
    assert result.stdout.split() == ["PIL.Image.LINEAR", "numpy.int"], result.stderr


def test_restore_removed_names_existing_names_are_kept(monkeypatch, tmp_path):
    write_detectron2(tmp_path, NEEDS_NAMES)
    monkeypatch.setattr(compat, "applied", [])
    monkeypatch.setattr(PIL.Image, "LINEAR", "the library's own", raising=False)
    monkeypatch.setattr(np, "int", "the library's own", raising=False)
    compat.restore_removed_names(tmp_path / "detectron2")
    assert compat.applied == []
    assert PIL.Image.LINEAR == np.int == "the library's own"


def test_apply_missing_ops_raise_only_when_called(tmp_path):
    write_detectron2(tmp_path, without="_C.py")
    code = """
from detectron2 import _C
assert _C.get_compiler_version() == _C.get_cuda_version() == "compiled ops not installed"
assert not _C.has_cuda()
op = _C.deform_conv_forward
try:
    op(1, 2, stride=3)
except RuntimeError as error:
    assert "detectron2._C.deform_conv_forward" in str(error), error
    assert compat.INSTALL_DETECTRON2 in str(error), error
    print(*compat.applied, compat.has_compiled_ops(), hasattr(_C, "__file__"))
"""
    assert printed(tmp_path, code) == ["detectron2._C", "False", "False"]


@pytest.mark.parametrize(
    "text",
    [
        "`torch.jit.script` is deprecated. Please switch to `torch.compile`.",
        "`torch.jit.script` is not supported in Python 3.14+ and may break. Please switch.",
    ],
)
def test_apply_scripted_functions_do_not_warn(tmp_path, text):
    warning = f"import warnings\nwarnings.warn({text!r}, FutureWarning)\n"
    write_detectron2(tmp_path, {"modeling/__init__.py": warning})
    result = run_python(tmp_path, LOAD_COMPAT)
    assert (result.returncode, result.stderr) == (0, "")


def test_apply_broken_ops_warns(tmp_path):
    write_detectron2(tmp_path, {"_C.py": "raise ImportError('undefined symbol: _ZN2at')\n"})
    result = run_python(tmp_path, LOAD_COMPAT + "print(compat.has_compiled_ops())")
    assert result.stdout.strip() == "False", result.stderr
    assert "undefined symbol: _ZN2at" in result.stderr and "--force-reinstall" in result.stderr


def test_apply_pkg_resources_stub_is_seen_by_detectron2_only(tmp_path):
    write_detectron2(tmp_path, NEEDS_PKG_RESOURCES)
    code = NO_PKG_RESOURCES + LOAD_COMPAT + """
from detectron2 import model_zoo
print(model_zoo.get_config_file("a.yaml"), "pkg_resources" in sys.modules, *compat.applied)
"""
    result = run_python(tmp_path, code)
    expected = str(tmp_path / "detectron2" / "model_zoo" / "a.yaml")
    assert result.stdout.split() == [expected, "False", "pkg_resources"], result.stderr


def test_import_without_detectron2_says_what_to_run():
    code = "sys.modules['detectron2'] = None  # as if not installed\nimport reldn_d2"
    result = run_python(REPOSITORY, code)
    assert result.returncode == 1
    message = result.stderr.strip().splitlines()[-1]
    assert message.startswith("ImportError: reldn_d2 needs Detectron2, which "), result.stderr
    assert compat.INSTALL_DETECTRON2 in message and "make setup" in message
    assert "During handling" not in result.stderr


def test_find_detectron2_folder_of_that_name_raises(monkeypatch):
    """A clone of Detectron2's repository in the working folder looks like a package."""
    find_spec = compat.importlib.util.find_spec
    folder = types.SimpleNamespace(origin=None, submodule_search_locations=["/here/detectron2"])
    monkeypatch.setattr(
        compat.importlib.util,
        "find_spec",
        lambda name: folder if name == "detectron2" else find_spec(name),
    )
    with pytest.raises(ImportError, match="the folder /here/detectron2 is not the package"):
        compat.find_detectron2()


def test_find_detectron2_without_torch_names_it(monkeypatch):
    def find_spec(name):
        return types.SimpleNamespace(origin=name) if name == "detectron2" else None

    monkeypatch.setattr(compat.importlib.util, "find_spec", find_spec)
    with pytest.raises(ImportError, match="needs torch, torchvision and Detectron2"):
        compat.find_detectron2()


@pytest.mark.parametrize(
    "module",
    "checkpoint config data data.transforms engine engine.hooks evaluation layers model_zoo "
    "modeling modeling.roi_heads solver structures utils.collect_env utils.visualizer".split(),
)
def test_used_detectron2_modules_can_be_imported(module):
    assert compat.importlib.import_module(f"detectron2.{module}")


def test_anchor_generation_does_not_warn():
    code = """
import reldn_d2, torch
from detectron2.modeling.anchor_generator import _create_grid_offsets
import inspect
kinds = inspect.signature(_create_grid_offsets).parameters
_create_grid_offsets([2, 3], 4, 0.0, torch.zeros(1) if "target_device_tensor" in kinds else "cpu")
"""
    result = run_python(Path(__file__).resolve().parents[2], code)
    assert result.returncode == 0 and "meshgrid" not in result.stderr, result.stderr


def test_class_histogram_is_logged(caplog):
    """Without ``numpy.int`` Detectron2 0.6 silently omits this table."""
    from detectron2.data.build import print_instances_class_histogram

    dicts = [{"annotations": [{"category_id": 1}, {"category_id": 1}]}]
    with caplog.at_level("INFO"):
        print_instances_class_histogram(dicts, ["cup", "drum"])
    rows = [line.split("|") for line in caplog.text.splitlines() if "drum" in line]
    assert [cell.strip() for cell in rows[0] if cell.strip()] == ["cup", "0", "drum", "2"]
