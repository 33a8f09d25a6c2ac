"""Fixtures for all tests: folders of real data (tests skip without them), loggers, checkpoints.

A test that writes outside its temporary folder fails (write_guard.py).
"""

import logging
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
from write_guard import WriteGuard

if "PYTEST_XDIST_WORKER" in os.environ:  # several processes share the cores; before torch starts
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# The built-in datasets are then read from ./datasets: a test that needs some runs in a folder with
# small ones (sandbox.py), and no test depends on what the user has.
os.environ.pop("DETECTRON2_DATASETS", None)

# Caches, mainly of fonts and of drawn images, instead of the home folder; kept, because they take
# time.
_CACHE = Path(tempfile.gettempdir(), f"reldn_d2_tests_{os.getuid()}")
os.environ.setdefault("XDG_CACHE_HOME", str(_CACHE))
os.environ.setdefault("MPLCONFIGDIR", str(_CACHE / "matplotlib"))
os.environ.setdefault("FVCORE_CACHE", str(_CACHE / "fvcore"))

# What tests and their child processes write into the home folder is found there.
os.environ["HOME"] = tempfile.mkdtemp(prefix="reldn_d2_home_")

GUARD = WriteGuard(os.environ["HOME"])
GUARD.start()

_REPOSITORY = Path(__file__).resolve().parents[1]
_ANNOTATIONS = "vrd/json_dataset/annotations_train.json"


# Start with the files that take longest, so that the two processes end at the same time.
_LONGEST = (
    *("test_installed_package.py", "tools/test_toy_demo.py", "test_documentation.py"),
    *("tools/test_setup_env.py", "test_every_config.py", "test_train_net.py", "test_tutorial.py"),
    *(
        "tools/test_lazyconfig_train_net.py",
        "engine/test_interruption.py",
        "engine/test_trainer.py",
    ),
    *("engine/test_loader_start_methods.py", "evaluation/test_protocols.py"),
    *("engine/test_launch.py", "engine/test_name_order.py", "engine/test_rendezvous.py"),
    *("modeling/detectors/test_detectors.py", "evaluation/test_submission.py"),
    *("tools/test_vrd_benchmark.py", "tools/test_export_model.py", "utils/test_user_modules.py"),
)


def pytest_unconfigure() -> None:
    """Remove the home folder of this run."""
    shutil.rmtree(os.environ["HOME"], ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort tests so that the longest files come first."""
    folder = Path(__file__).parent
    rank = {folder / name: index for index, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: rank.get(item.path, len(rank)))


def _dataset_folders() -> list[Path]:
    """Return folders in the layout of datasets/README.md, from a variable or near the checkout."""
    named = os.environ.get("RELDN_TEST_DATASETS")
    if named:
        return [Path(part) for part in named.split(os.pathsep)]
    return [_REPOSITORY / "datasets", *sorted(_REPOSITORY.parent.glob("*/datasets*"))]


@pytest.fixture(scope="session")
def real_datasets() -> Path:
    """Return a folder for DETECTRON2_DATASETS with images and annotations of VRD."""
    for folder in _dataset_folders():
        if (folder / _ANNOTATIONS).is_file() and (folder / "vrd/sg_dataset").is_dir():
            return folder
    pytest.skip("no images of VRD: set RELDN_TEST_DATASETS to a folder that holds vrd/")


@pytest.fixture(scope="session")
def full_vrd_annotations() -> Path:
    """Return the folder json_dataset with VRD's full annotations; images are not required."""
    for folder in _dataset_folders():
        path = folder / _ANNOTATIONS
        if path.is_file() and path.stat().st_size > 1_000_000:  # a sample of VRD has less
            return path.parent
    pytest.skip("no full annotations of VRD: set RELDN_TEST_DATASETS to a folder that holds vrd/")


@pytest.fixture(autouse=True)
def writes_only_temporary_files(tmp_path_factory):
    """Fail a test that wrote somewhere else: site-packages, the home folder, this repository."""
    base = str(tmp_path_factory.getbasetemp().resolve())
    if base not in GUARD.allowed:
        GUARD.allowed.append(base)
    yield
    found = GUARD.take()
    assert not found, f"written outside temporary folders: {', '.join(found)}"


@pytest.fixture(autouse=True)
def restore_loggers():
    """Undo what tests set: handlers whose streams are closed, levels that hide caplog's lines."""
    loggers = [logging.getLogger(name) for name in (None, "reldn_d2", "detectron2", "fvcore")]
    before = [(list(x.handlers), x.level, x.propagate) for x in loggers]
    module = sys.modules.get("detectron2.utils.logger")
    if module is not None:
        module._LOG_COUNTER.clear()  # so that each test sees what is logged once per process
    yield
    for logger, (handlers, level, propagate) in zip(loggers, before):
        for handler in [x for x in logger.handlers if x not in handlers]:
            logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate


@pytest.fixture
def registered():
    """Mark names of datasets, which are removed from the catalogs after the test."""
    import reldn_d2  # noqa: F401  (before Detectron2)

    from detectron2.data import DatasetCatalog, MetadataCatalog

    names = []
    yield lambda name: names.append(name) or name
    for name in names:
        DatasetCatalog.pop(name, None)
        MetadataCatalog.pop(name, None)


@pytest.fixture
def own_registrations():
    """Forget after the test which modules it imported with --module and what they registered."""
    from registrations import restored_registries

    with restored_registries():
        yield


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """Write ``model_final.pth`` of a tiny RelDN."""
    from usage_utils import write_checkpoint

    return write_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def predictor(checkpoint):
    """Build the predictor of that checkpoint on the CPU."""
    from reldn_d2.predictor import RelationPredictor

    return RelationPredictor.from_checkpoint(checkpoint, device="cpu")


@pytest.fixture(scope="session")
def checkout(tmp_path_factory) -> Path:
    """A small checkout with every built-in dataset and a cache of its own (sandbox.py)."""
    from sandbox import write_checkout

    return write_checkout(tmp_path_factory.mktemp("checkout"))


@pytest.fixture
def in_checkout(checkout, monkeypatch) -> Path:
    """Run a test in that checkout, with few drawn images and without slow log lines."""
    from sandbox import enter_checkout

    enter_checkout(checkout, monkeypatch)
    return checkout
