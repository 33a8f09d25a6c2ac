"""Shared by all loaders: names on first access, built-in splits, image sizes, workers."""

import errno
import json
import os

import pytest
from data_files import (
    CLASSES,
    pictures,
    write_coco,
    write_csv,
)
from PIL import Image

import reldn_d2.data.datasets.image_sizes as image_sizes_module
from reldn_d2.data import RelationDatasetMapper
from reldn_d2.data.datasets import (
    builtin,
    register_openimages_vrd,
    register_relation_instances,
)
from reldn_d2.data.datasets.catalog import (
    UnknownDatasetError,
    dataset_names,
    register_dataset,
    require_dataset,
)
from reldn_d2.data.datasets.image_sizes import image_sizes, known_sizes

from detectron2.config import get_cfg
from detectron2.data import (
    DatasetCatalog,
    DatasetFromList,
    MetadataCatalog,
    build_detection_train_loader,
)


def test_metadata_before_download_has_no_names(tmp_path, registered):
    name = registered("not_there_yet")
    register_openimages_vrd(
        name, str(tmp_path / "a.csv"), str(tmp_path), str(tmp_path / "classes.csv")
    )
    metadata = MetadataCatalog.get(name)
    assert metadata.get("thing_classes") is None and not hasattr(metadata, "predicate_classes")
    assert metadata.evaluator_type == "openimages_vrd"
    write_csv(tmp_path / "classes.csv", CLASSES)
    assert metadata.thing_classes == ["Man", "Guitar", "Chair"]
    assert len(metadata.predicate_classes) == 9


def test_builtin_datasets_register_without_files():
    names = [
        *("vrd_train", "vrd_test", "visual_genome_val", "visual_genome_attributes_test"),
        *("openimages_vrd_train", "openimages_vrd_mini_val", "openimages_vrd_v6_test"),
        *("openimages_vrd_released_val", "visual_genome_released_train", "toy_vrd_test"),
    ]
    assert set(names) <= set(DatasetCatalog.list())
    for name in names:
        metadata = MetadataCatalog.get(name)
        assert metadata.evaluator_type in ("vrd", "scene_graph", "openimages_vrd", "relation")
        if metadata.get("train_dataset"):
            assert metadata.train_dataset in DatasetCatalog.list()


def test_builtin_visual_genome_trains_without_images_that_have_no_relation(monkeypatch):
    keeps = {}
    monkeypatch.setattr(
        builtin,
        "register_visual_genome",
        lambda name, *paths, keep_images_without_relations, **options: keeps.update(
            {name: keep_images_without_relations}
        ),
    )
    builtin.register_all_visual_genome("datasets")
    assert keeps == {
        f"visual_genome{kind}_{split}": split != "train"
        for kind in ("", "_attributes")
        for split in ("train", "val", "test")
    }


def test_image_sizes_cached_until_image_changes(tmp_path, monkeypatch):
    root = pictures(tmp_path / "images", ["a.png", "b.png"])
    paths = [os.path.join(root, name) for name in ("a.png", "b.png")]
    read = []
    real = image_sizes_module.image_size
    monkeypatch.setattr(
        image_sizes_module, "image_size", lambda path: read.append(path) or real(path)
    )
    assert image_sizes(root, paths, "test") == [(40, 60)] * 2
    assert image_sizes(root, paths, "test") == [(40, 60)] * 2
    assert sorted(read) == paths, "each once"
    Image.new("RGB", (10, 20)).save(paths[1])
    assert image_sizes(root, paths, "test") == [(40, 60), (20, 10)]
    assert len(read) == 3, "the changed image again"
    cache = tmp_path / "reldn_cache/images.sizes.json"
    for damage in ("", "{}", '{"version": 1, "sizes": {"a.png": "x"}}'):
        cache.write_text(damage)
        assert image_sizes(root, paths, "test") == [(40, 60), (20, 10)]


def test_known_sizes_are_those_of_the_cache(tmp_path):
    root = pictures(tmp_path / "images", ["a.png", "b.png", "c.png"])
    names = ["a.jpg", "b.png", "c.png", "d.png"]  # a is annotated with another suffix
    assert known_sizes(root, names) == [None] * 4
    image_sizes(root, [os.path.join(root, f"{x}.png") for x in "abc"], "test")
    os.remove(os.path.join(root, "a.png"))
    Image.new("RGB", (10, 20)).save(os.path.join(root, "b.png"))
    assert known_sizes(root, names) == [(40, 60), None, (40, 60), None], "b has changed"
    assert known_sizes("scheme://images", names) == [None] * 4


def test_image_sizes_interrupted_keeps_progress(tmp_path, monkeypatch):
    root = pictures(tmp_path / "images", [f"{i}.png" for i in range(5)])
    paths = [os.path.join(root, f"{i}.png") for i in range(5)]
    read = []

    def stop_at_third(path):
        if path == paths[3]:
            raise KeyboardInterrupt
        read.append(path)
        return 40, 60

    monkeypatch.setattr(image_sizes_module, "image_size", stop_at_third)
    with pytest.raises(KeyboardInterrupt):
        image_sizes(root, paths, "test")
    kept = len(json.loads((tmp_path / "reldn_cache/images.sizes.json").read_text())["sizes"])
    assert kept == 3
    read.clear()
    monkeypatch.setattr(image_sizes_module, "image_size", lambda path: read.append(path) or (1, 2))
    image_sizes(root, paths, "test")
    assert sorted(read) == paths[3:]


def test_image_sizes_disk_full_warns_and_leaves_no_file(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    root = pictures(tmp_path / "data/images", ["a.png"])

    def disk_full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("reldn_d2.utils.file_io.os.fsync", disk_full)
    with caplog.at_level("WARNING", "reldn_d2"):
        assert image_sizes(root, [os.path.join(root, "a.png")], "test") == [(40, 60)]
    assert "Could not cache the sizes of 1 images" in caplog.text
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["a.png"]


def test_require_dataset_unknown_name_raises():
    with pytest.raises(UnknownDatasetError) as caught:
        require_dataset("vrd_trian")
    assert str(caught.value).startswith("No dataset 'vrd_trian' is registered. Did you mean vrd_tr")
    assert isinstance(caught.value, ValueError), "prints without the quotes of a KeyError"
    require_dataset("vrd_train")


def test_image_sizes_read_only_folder_uses_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    root = pictures(tmp_path / "data/images", ["a.png"])
    os.chmod(tmp_path / "data", 0o555)
    try:
        assert image_sizes(root, [os.path.join(root, "a.png")], "test") == [(40, 60)]
        assert os.listdir(tmp_path / "data") == ["images"]
        assert len(list((tmp_path / "cache").rglob("images.sizes.json"))) == 1
    finally:
        os.chmod(tmp_path / "data", 0o755)


def test_train_loader_serializes_records_once(tmp_path, registered):
    """The training loader keeps one serialized copy, and no list of Python objects."""
    name = registered("shared_records")
    register_relation_instances(name, {}, **write_coco(tmp_path))
    cfg = get_cfg()
    cfg.DATASETS.TRAIN = (name,)
    cfg.DATALOADER.NUM_WORKERS = 1
    cfg.SOLVER.IMS_PER_BATCH = 1
    loader = build_detection_train_loader(cfg, mapper=RelationDatasetMapper(cfg, True))
    lists, seen = [], set()
    queue = [loader]
    while queue:  # all references, from the loader down
        held = queue.pop()
        if id(held) in seen or isinstance(held, type):
            continue
        seen.add(id(held))
        if isinstance(held, DatasetFromList):
            lists.append(held)
        elif isinstance(held, (list, tuple)):
            assert not any(isinstance(x, dict) and "annotations" in x for x in held)
            queue += held
        else:
            queue += list(getattr(held, "__dict__", {}).values())
    (records,) = lists
    assert not isinstance(records._lst, list), "one buffer"
    assert records[0]["relations"] == [(0, 1, 1), (0, 1, 0), (1, 0, 1)]


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("thing_classes", 'thing_classes of dataset .twice.: classes 0 and 2 are both "cup"'),
        ("predicate_classes", ".*: predicates 0 and 2 are both .cup.*Rename one of them"),
    ],
)
def test_register_dataset_name_twice_raises(registered, field, message):
    names = {"thing_classes": ["a", "b"], "predicate_classes": ["on"]}
    names[field] = ["cup", "hat", " cup"]
    options = {"annotation_files": ()}
    with pytest.raises(ValueError, match=message):
        register_dataset(registered("twice"), list, {}, **options, **names)
    # Names in files are known on first access.
    register_dataset("twice", list, {}, read_names=lambda: names, **options)
    with pytest.raises(ValueError, match=message):
        MetadataCatalog.get("twice").get("thing_classes")
    with pytest.raises(ValueError, match=message):
        dataset_names("twice")


def test_dataset_names_set_by_hand_twice_raises(registered):
    MetadataCatalog.get(registered("by hand")).thing_classes = ["cup", "cup "]
    with pytest.raises(ValueError, match="classes 0 and 1 are both"):
        dataset_names("by hand")
    MetadataCatalog.get(registered("nameless"))
    assert dataset_names("nameless") == {}
