"""Statistics of registered datasets: the counts, and that the cache is never stale."""

import hashlib
import json
import os
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from data_files import (
    coco_content,
    pictures,
    released_content,
    write_coco,
    write_json,
    write_openimages,
    write_released,
    write_visual_genome,
)
from model_utils import register_dataset, small_config, unregister_dataset

import reldn_d2.data.statistics as statistics_module
from reldn_d2.data import count_predicates
from reldn_d2.data.datasets import (
    register_openimages_vrd,
    register_relation_instances,
    register_relation_json,
    register_visual_genome,
)
from reldn_d2.data.datasets.vrd import VRD_CLASSES, VRD_PREDICATES, register_vrd
from reldn_d2.data.statistics import (
    dataset_statistics,
    fingerprint,
    main,
    training_statistics_of,
    zero_shot_triplets,
)
from reldn_d2.engine.defaults import RelDNTrainer

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode


@pytest.fixture
def register(tmp_path, monkeypatch):
    """Registers a COCO file in its own folder; the names are removed after the test."""
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    names = []

    def make(name, content=None, **options):
        names.append(name)
        arguments = write_coco(tmp_path / name, content)
        register_relation_instances(name, {}, **arguments, **options)
        return arguments["json_file"]

    yield make
    for name in names:
        DatasetCatalog.pop(name, None)
        MetadataCatalog.pop(name, None)


@pytest.fixture
def loads(monkeypatch):
    """Names of the datasets that were loaded."""
    loaded = []
    get = statistics_module.dicts_without_images
    monkeypatch.setattr(
        statistics_module, "dicts_without_images", lambda name: loaded.append(name) or get(name)
    )
    return loaded


def test_dataset_statistics_counts(register):
    register("counted")
    statistics = dataset_statistics("counted")
    dicts = DatasetCatalog.get("counted")
    for overlap_filter in (False, True):
        expected = count_predicates(dicts, 2, 2, overlap_filter)
        assert torch.equal(statistics.table(overlap_filter), expected)
    assert statistics.table(True)[0, 1].tolist() == [1, 1, 2]
    assert statistics.predicate_counts.tolist() == [1, 2]
    assert statistics.predicate_frequencies.tolist() == [1 / 3, 2 / 3]
    assert statistics.triplets == {(0, 0, 1), (0, 1, 1), (1, 1, 0)}
    assert (statistics.num_images, statistics.num_relations) == (2, 3)
    assert statistics.thing_classes == ("man", "guitar")


def test_statistics_cache_roundtrip(register, loads, tmp_path):
    register("kept")
    first = dataset_statistics("kept")
    assert loads == ["kept"]
    assert (tmp_path / "kept/reldn_cache/kept.statistics.npz").is_file()
    second = dataset_statistics("kept")
    assert loads == ["kept"], "not loaded again"
    assert second.table(True).equal(first.table(True)) and second.triplets == first.triplets
    assert second.predicate_classes == first.predicate_classes
    assert (second.num_images, second.num_relations) == (2, 3)
    assert (second.num_related_pairs, second.num_apart_pairs) == (2, 0)
    dataset_statistics("kept", recount=True)
    assert loads == ["kept"] * 2


def test_statistics_changed_file_is_recounted(register, loads):
    """Even if its length and modification time are the same."""
    path = register("changed")
    before = os.stat(path)
    dataset_statistics("changed")
    text = open(path).read()
    changed = text.replace("[101, 102, 5]", "[102, 101, 5]")
    assert len(changed) == len(text) and changed != text
    with open(path, "w") as file:
        file.write(changed)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert dataset_statistics("changed").triplets == {(1, 1, 0), (0, 0, 1)}
    assert loads == ["changed"] * 2


def test_fingerprint_depends_on_options_names_and_version(register, monkeypatch):
    register("one")
    mark = fingerprint("one")
    assert mark == fingerprint("one")
    DatasetCatalog.remove("one")
    MetadataCatalog.remove("one")
    register("one", merge_duplicates=True)
    merged = fingerprint("one")
    assert merged != mark, "the options of the loader"
    monkeypatch.setattr(statistics_module, "COUNTING_VERSION", 2019)
    assert fingerprint("one") not in (mark, merged), "the version of the counts"


def test_fingerprint_ignores_code_of_the_package(register, tmp_path, monkeypatch):
    """An edit of any file in data/ would otherwise count all datasets again."""
    register("one")
    mark = fingerprint("one")
    opened = []
    real_open = statistics_module.PathManager.open
    monkeypatch.setattr(
        statistics_module.PathManager,
        "open",
        lambda path, *rest: opened.append(path) or real_open(path, *rest),
    )
    assert fingerprint("one") == mark
    assert opened == [str(tmp_path / "one/relations.json")]


def test_fingerprint_of_own_function_depends_on_its_source(tmp_path, registered):
    """Functions registered without this package's helper are part of the dataset."""
    name = registered("own_function")
    (tmp_path / "data.txt").write_text("1")
    source = tmp_path / "own_module.py"

    def register_from(text):
        DatasetCatalog.pop(name, None)
        source.write_text(text)
        scope = {}
        exec(compile(text, str(source), "exec"), scope)
        DatasetCatalog.register(name, scope["load"])
        return fingerprint(name)

    MetadataCatalog.get(name).set(
        thing_classes=["a"], predicate_classes=["b"], annotation_files=[str(tmp_path / "data.txt")]
    )
    first = register_from("def load():\n    return []\n")
    assert first == register_from("def load():\n    return []\n")
    assert first != register_from("def load():\n    return [{}]\n")
    DatasetCatalog.pop(name)
    scope = {}
    exec("def load():\n    return []\n", scope)  # as typed into an interpreter: no file to hash
    DatasetCatalog.register(name, scope["load"])
    assert fingerprint(name) is None


# What the loaders and count_pairs give for the files of data_files.py, with the version they
# belong to. When a test fails here, increment COUNTING_VERSION and update both: otherwise cached
# statistics of real datasets would be stale.
GOLDEN_VERSION = 1
GOLDEN = {
    "coco": "3ca1b0d7d3d07e10",
    "released": "a91448b73fc92ad2",
    "visual_genome": "c515021f09f761d4",
    "openimages": "5188f14bef507d8e",
    "vrd": "76203e74c5ae1e93",
}


@pytest.mark.parametrize("kind", ["coco", "released", "visual_genome", "openimages", "vrd"])
def test_counting_version_belongs_to_the_results_of_the_loaders(kind, tmp_path, registered):
    name = registered(f"golden_{kind}")
    if kind == "coco":
        register_relation_instances(name, {}, **write_coco(tmp_path))
    elif kind == "released":
        register_relation_json(name, **write_released(tmp_path))
    elif kind == "visual_genome":
        register_visual_genome(name, split="train", **write_visual_genome(tmp_path))
    elif kind == "openimages":
        register_openimages_vrd(name, **write_openimages(tmp_path))
    else:
        write_json(tmp_path / "objects.json", list(VRD_CLASSES))
        write_json(tmp_path / "predicates.json", list(VRD_PREDICATES))
        content = json.loads(json.dumps(released_content()).replace("0, 40, 0, 30", "1, 40, 1, 30"))
        json_file = write_json(tmp_path / "annotations_train.json", content)
        register_vrd(name, json_file, pictures(tmp_path / "images", ["a.jpg", "b.jpg"]))
    statistics = dataset_statistics(name)
    counts = statistics.counts
    names = statistics.thing_classes, statistics.predicate_classes
    pairs = statistics.num_related_pairs, statistics.num_apart_pairs
    digest = hashlib.sha256(json.dumps([statistics.description(), names, pairs]).encode())
    for array in counts:
        digest.update(array.tobytes())
    result = digest.hexdigest()[:16]
    assert (statistics_module.COUNTING_VERSION, result) == (GOLDEN_VERSION, GOLDEN[kind])


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 something", None])
def test_statistics_damaged_cache_is_recounted(register, tmp_path, damage):
    register("damaged")
    expected = dataset_statistics("damaged")
    path = tmp_path / "damaged/reldn_cache/damaged.statistics.npz"
    path.write_bytes(path.read_bytes()[:300] if damage is None else damage)
    assert dataset_statistics("damaged").triplets == expected.triplets
    with np.load(path, allow_pickle=False) as content:
        assert str(content["fingerprint"]) == fingerprint("damaged"), "written again"


def test_statistics_read_only_folder_uses_cache_folder(register, tmp_path, loads):
    register("read_only")
    os.chmod(tmp_path / "read_only", 0o555)
    try:
        dataset_statistics("read_only")
        dataset_statistics("read_only")
    finally:
        os.chmod(tmp_path / "read_only", 0o755)
    assert loads == ["read_only"] and not (tmp_path / "read_only/reldn_cache").exists()
    assert len(list((tmp_path / "cache").rglob("read_only.statistics.npz"))) == 1


def test_statistics_without_files_counted_each_time(loads):
    boxes = [
        {"bbox": [0, 0, 4, 4], "bbox_mode": BoxMode.XYXY_ABS, "category_id": c} for c in (0, 1)
    ]
    dicts = [{"file_name": "a", "annotations": boxes, "relations": [(0, 1, 0)]}]
    DatasetCatalog.register("by_function", lambda: dicts)
    MetadataCatalog.get("by_function").set(thing_classes=["a", "b"], predicate_classes=["on"])
    try:
        assert fingerprint("by_function") is None
        assert dataset_statistics("by_function").triplets == {(0, 0, 1)}
        dicts[0]["relations"] = [(1, 0, 0)]
        assert dataset_statistics("by_function").triplets == {(1, 0, 0)}
        assert dataset_statistics("by_function", dicts).num_images == 1
        assert len(loads) == 2, "not loaded if the dicts are given"
    finally:
        DatasetCatalog.remove("by_function")
        MetadataCatalog.remove("by_function")


def test_zero_shot_triplets(register):
    register("train")
    content = coco_content()
    content["images"][0]["relations"] = [[102, 101, 2], [101, 102, 5]]
    register("test", content)
    with pytest.raises(
        ValueError, match="Zero-shot triplets of 'test' need a training set.*train_dataset"
    ):
        zero_shot_triplets("test")
    MetadataCatalog.get("test").train_dataset = "train"
    assert zero_shot_triplets("test") == {(1, 0, 0)}
    assert zero_shot_triplets("train", "test") == {(0, 0, 1)}


def test_training_statistics_of_several_datasets(register):
    register("part_1")
    register("part_2")
    both = training_statistics_of(["part_1", "part_2"])
    assert both.predicate_counts.tolist() == [2, 4] and both.num_images == 4
    assert (both.num_related_pairs, both.num_apart_pairs) == (4, 0)
    assert both.table(False)[0, 1].tolist() == [2, 2, 3], "plus 1 only once"
    content = coco_content()
    content["predicates"][0]["name"] = "carries"
    register("part_3", content)
    with pytest.raises(
        ValueError,
        match="predicate_classes of dataset 'part_3' and of .*'part_1' differ.*'carries' .1 of",
    ):
        training_statistics_of(["part_1", "part_3"])


def test_training_statistics_other_order_is_mapped(register):
    register("part_1")
    content = coco_content()  # the same with other ids, which determine the order of the names
    for record in content["categories"] + content["predicates"]:
        record["id"] *= -1
    for record in content["annotations"]:
        record["category_id"] *= -1
    for record in content["images"] + content["annotations"]:
        if "relations" in record:
            record["relations"] = [[s, o, -p] for s, o, p in record["relations"]]
        record.pop("verified_labels", None)
    register("part_2", content)
    one, both = dataset_statistics("part_1"), training_statistics_of(["part_1", "part_2"])
    other = dataset_statistics("part_2")
    assert other.thing_classes == one.thing_classes[::-1] != one.thing_classes
    assert not np.array_equal(other.counts.relations, one.counts.relations)
    assert both.thing_classes == one.thing_classes
    for name, counts in both.counts._asdict().items():
        assert np.array_equal(counts, 2 * getattr(one.counts, name)), name
    assert zero_shot_triplets("part_1", "part_2") == frozenset()


def test_statistics_description_is_plain_and_complete(register):
    register("described")
    statistics = dataset_statistics("described")
    description = json.loads(json.dumps(statistics.description()))
    counts = torch.zeros(2, 2, 2, dtype=torch.int64)
    for subject, object_, predicate, count in description["relation_counts"]:
        counts[subject, object_, predicate] = count
    assert counts.equal(statistics.table(True)[..., :-1])
    assert description["predicate_counts"] == [1, 2]


def test_statistics_command_prints_counts(register, capsys, loads):
    path = register("by_command")
    register("by_command_test")
    MetadataCatalog.get("by_command_test").train_dataset = "by_command"
    assert main(["by_command", "by_command_test"]) == 0
    printed = capsys.readouterr().out
    assert "by_command: 2 images, 3 relations, 3 distinct triplets" in printed
    assert "| plays       |           2 | 66.67%  |" in printed
    assert "zero-shot: 0 triplets, 0 relations are unseen in by_command" in printed
    count = len(loads)
    assert main(["by_command", "--recount"]) == 0 and len(loads) == count + 1
    assert main(["by_comand"]) == 1
    assert (
        "No dataset 'by_comand' is registered. Did you mean by_command" in capsys.readouterr().err
    )
    os.remove(path)
    assert main(["by_command"]) == 1
    assert "not found" in capsys.readouterr().err


def test_checkpoint_contains_statistics_and_names(tmp_path):
    """A resumed run keeps them, without reading the data again."""
    register_dataset("in_a_checkpoint", tmp_path / "images")
    try:
        cfg = small_config(
            *("DATASETS.TRAIN", ("in_a_checkpoint",), "DATASETS.TEST", ("in_a_checkpoint",)),
            *("OUTPUT_DIR", str(tmp_path / "run"), "INPUT.MIN_SIZE_TRAIN", (64,)),
        )
        os.mkdir(tmp_path / "run")
        trainer = RelDNTrainer(cfg)
        trainer.resume_or_load(resume=False)
        trainer.checkpointer.save("model_0", iteration=0)
        content = torch.load(tmp_path / "run/model_0.pth", weights_only=True)["reldn"]
        statistics = dataset_statistics("in_a_checkpoint")
        assert content["statistics"] == statistics.description()
        assert sum(content["statistics"]["predicate_counts"]) == statistics.num_relations > 0
        assert tuple(content["thing_classes"]) == statistics.thing_classes
        assert tuple(content["predicate_classes"]) == statistics.predicate_classes

        again = RelDNTrainer(cfg)
        again.resume_or_load(resume=True)
        again.checkpointer.save("model_1", iteration=1)
        later = torch.load(tmp_path / "run/model_1.pth", weights_only=True)["reldn"]
        assert later["statistics"] == content["statistics"]
    finally:
        unregister_dataset("in_a_checkpoint")


@pytest.mark.parametrize(
    ("write", "register", "triplets"),
    [
        (write_released, register_relation_json, {(0, 3, 1), (1, 0, 0)}),
        (
            write_coco,
            partial(register_relation_instances, metadata={}),
            {(0, 0, 1), (0, 1, 1), (1, 1, 0)},
        ),
        (
            write_visual_genome,
            partial(register_visual_genome, split="train", num_val_images=0),
            {(77, 30, 129), (129, 49, 149), (77, 0, 129)},
        ),
    ],
)
def test_dataset_statistics_needs_no_images(tmp_path, write, register, triplets):
    """For formats whose annotations can be read without images."""
    arguments = write(tmp_path)
    shutil.rmtree(arguments["image_root"])
    register("without_images", **arguments)
    try:
        assert dataset_statistics("without_images").triplets == triplets
    finally:
        DatasetCatalog.remove("without_images")
        MetadataCatalog.remove("without_images")
