"""The commands, Python and YAML of README and docs, extracted from the files and run.

A fence says what it holds: ``bash``, ``python``, ``yaml``, ``text`` or ``bibtex``. A second word is
the file that the text says to write the block to. ``no-run: REASON`` exempts a block that
needs a download, several machines, ...; its commands must still parse.
"""

import argparse
import dataclasses
import gzip
import importlib
import json
import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from foreign_predictions import (
    motifs_records,
    raw_predictions,
    released_records,
    write_pickle,
    write_tang,
)
from import_files import write_import_files
from model_utils import CLASSES, PREDICATES, ROOT, released_state, write_dataset
from PIL import Image
from sandbox import NARROW, PRODUCERS, Runner, enter_checkout, merged, write_checkout
from torchvision import models
from usage_utils import (
    picture,
    write_checkpoint,
    write_coco_detector,
    write_precomputed_checkpoint,
)

import reldn_d2
from reldn_d2.engine.defaults import RelDNTrainer
from reldn_d2.evaluation.predictions_io import write_predictions
from reldn_d2.structures.scene_graph import SceneGraph
from reldn_d2.utils.user_modules import add_module_argument, import_modules
from reldn_d2.vis.video import VideoWriter

from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import default_argument_parser
from detectron2.modeling import build_model

FILES = [
    "README.md",
    "CONTRIBUTING.md",
    "datasets/README.md",
    *(f"docs/{x.name}" for x in (ROOT / "docs").glob("*.md")),
]
LANGUAGES = ("bash", "python", "yaml", "text", "bibtex")
NAMES = ["visual_genome_val", "openimages_vrd_mini_val"]  # that stand for NAME in commands

# Stands in for the package; tests/test_promises.py checks the file that it would follow.
WANDB = """
def init(project, sync_tensorboard):
    assert sync_tensorboard
"""


class Block(NamedTuple):
    """A fenced block: where it begins, its info string taken apart, its text."""

    file: str
    line: int
    language: str
    title: str
    reason: str
    text: str

    @property
    def name(self) -> str:
        """Return file and line, as an editor shows them."""
        return f"{self.file}:{self.line}"

    def commands(self) -> list[str]:
        """Return the commands of a shell block, each in one line without comments."""
        joined = self.text.replace("\\\n", " ")
        return [line for line in joined.splitlines() if shlex.split(line, comments=True)]


def read_blocks(file: str) -> list[Block]:
    blocks, start = [], None
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        if not line.startswith("```"):
            continue
        if start is None:
            start = number
            info, _, reason = line[3:].partition("no-run:")
            language, _, title = info.strip().partition(" ")
        else:
            text = "\n".join(lines[start : number - 1]) + "\n"
            blocks.append(Block(file, start, language, title.strip(), reason.strip(), text))
            start = None
    assert start is None, f"{file}:{start}: the fence is not closed"
    return blocks


BLOCKS = [block for file in FILES for block in read_blocks(file)]
EXEMPT = [block for block in BLOCKS if block.reason]
RUN = [
    block for block in BLOCKS if not block.reason and block.language in ("bash", "python", "yaml")
]


def parameters(blocks):
    return [pytest.param(block, id=block.name) for block in blocks]


# ------------------------------------------------------------------------- the folder of a reader


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One checkout for each document, by name, with the files that its blocks assume."""
    made = {}

    def folder(file: str) -> Path:
        if file not in made:
            made[file] = write_checkout(tmp_path_factory.mktemp(Path(file).stem))
            write_files_of_reader(made[file])
        return made[file]

    return folder


def write_files_of_reader(folder: Path) -> None:
    """What a reader has by then: photos, a video, a trained model, predictions, a detector."""
    for name in ("photos", "more"):
        (folder / name).mkdir()
    names = ("image.jpg", "street.jpg", "a.jpg", "b.jpg", "photos/c.jpg", "more/d.png")
    names += ("000000000139.jpg",)
    for i, name in enumerate(names):
        Image.fromarray(picture(240, 320, seed=i)).save(folder / name)
    with VideoWriter(folder / "walk.mp4", 10.0) as video:
        for i in range(3):
            video.write(picture(64, 96, seed=i))
    (folder / "wandb.py").write_text(WANDB)
    write_import_files(folder)
    checkpoint = write_checkpoint(folder)
    write_precomputed_checkpoint(folder / "my_precomputed")
    write_coco_detector(folder / "coco_detector")
    own = models.get_model("ssdlite320_mobilenet_v3_large", weights_backbone=None, num_classes=3)
    torch.save(own.state_dict(), folder / "own_ssd.pth")
    detection = {"image_id": 139, "category_id": 0, "bbox": [9, 9, 50, 50], "score": 0.9}
    (folder / "coco_instances_results.json").write_text(json.dumps([detection]))
    detections = [{**detection, "image_id": f"test_{i}.jpg", "category_id": i} for i in range(4)]
    given = {"boxes": [[9, 9, 150, 150], [60, 60, 200, 180]], "classes": ["person", "horse"]}
    (folder / "boxes.json").write_text(json.dumps({"c.jpg": given}))
    (folder / "detections.json").write_text(json.dumps(detections))  # of vrd_test
    demo = folder / "output/toy/seed_1/reldn"
    demo.mkdir(parents=True)
    (demo / "model_final.pth").symlink_to(checkpoint)
    detector = ("MODEL.META_ARCHITECTURE", "GeneralizedRCNN", "MODEL.WEIGHTS", "")
    long = ("SOLVER.MAX_ITER", 270000, "OUTPUT_DIR", "my_detector")  # as in the model zoo
    cfg = merged("configs/Toy/Detectors/cascade_rcnn_FPN.yaml", *NARROW, *detector, *long)
    (folder / "my_cascade_rcnn_fpn.yaml").write_text(cfg.dump())
    shutil.copy(folder / "configs/lazy/toy_detector.py", folder / "my_lazy_detector.py")
    (folder / "my_faster_rcnn_fpn.yaml").write_text('_BASE_: "configs/Toy/detector.yaml"\n')


@pytest.fixture
def reader(folders, request, monkeypatch, own_registrations):
    """Put the test into the checkout of its document; registrations are undone after it."""
    block = request.getfixturevalue("block")
    folder = folders(block.file)
    enter_checkout(folder, monkeypatch)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr(RelDNTrainer, "auto_scale_workers", staticmethod(two_iterations))
    for name in ("my_relations_train", "my_relations_test"):
        dicts = write_dataset(folder / name)
        DatasetCatalog.register(name, lambda dicts=dicts: dicts)
        predicates = [*PREDICATES, "beside", "behind", "near"]  # the nine of the documents
        MetadataCatalog.get(name).set(
            thing_classes=CLASSES, predicate_classes=predicates, evaluator_type="relation"
        )
    if not (folder / "theirs.json.gz").exists():
        write_vrd_predictions(folder)
        write_foreign_predictions(folder)
    return folder


def two_iterations(cfg: CfgNode, num_workers: int) -> CfgNode:
    """Stand in for Detectron2's scaling, with which a trainer begins: the schedule cut short."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.SOLVER.MAX_ITER = 2
    return cfg


def write_vrd_predictions(folder: Path) -> None:
    """The annotations of vrd_test as predictions, in two files."""
    truth = [SceneGraph.from_dataset_dict(record) for record in DatasetCatalog.get("vrd_test")]
    predictions = [
        dataclasses.replace(x, box_scores=np.ones(len(x.boxes)), scores=np.ones(len(x.pairs)))
        for x in truth
    ]
    file = folder / "relation_predictions.json"
    write_predictions(predictions, str(file))
    with gzip.open(folder / "theirs.json.gz", "wb") as stream:
        stream.write(file.read_bytes())


def write_foreign_predictions(folder: Path) -> None:
    """The annotations of two test sets as predictions of other programs."""
    images, dicts = {}, {}
    for name in ("visual_genome_test", "openimages_vrd_released_val"):
        dicts[name] = DatasetCatalog.get(name)
        images[name] = raw_predictions(
            dicts[name], len(MetadataCatalog.get(name).predicate_classes)
        )
    test, released = dicts
    write_tang(folder / "eval_results.pytorch", images[test], dicts[test], scale=6.0)
    write_pickle(folder / "motifs.pkl", motifs_records(images[test], dicts[test]))
    records = released_records(images[released], dicts[released])
    write_pickle(folder / "rel_detections.pkl", records)


# ------------------------------------------------------------------------------------- the blocks


def run_python(words: list[str], monkeypatch) -> None:
    """``python WORDS`` in this process; raises if its exit status is not 0."""
    module = words[0] == "-m"
    words = words[1:] if module else words
    monkeypatch.setattr(sys, "argv", words)
    try:
        if module:
            runpy.run_module(words[0], run_name="__main__", alter_sys=True)
        else:
            monkeypatch.syspath_prepend(str(Path(words[0]).parent))  # as Python does
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        assert not end.code, f"exit status {end.code}: python {shlex.join(words)}"


def in_small(words: list[str], folder: Path) -> list[str]:
    """A documented command with a narrow network, on one process, and what it starts from."""
    options = [str(x) for x in NARROW]
    if words[0].endswith("convert_released_weights.py"):
        write_released_checkpoint(folder / words[1], words[words.index("--config-file") + 1])
        return [*words, "--options", *options]
    if words[0].endswith("lazyconfig_train_net.py"):
        return in_small_lazy(words, folder)
    if words[0] != "train_net.py":
        return words
    words = list(words)
    if "--num-gpus" in words:
        words[words.index("--num-gpus") + 1] = "1"
    parser = default_argument_parser()
    add_module_argument(parser)
    args = parser.parse_args(words[1:])
    import_modules(args.module)
    runner = Runner(folder)
    weights = merged(folder / args.config_file, *args.opts).MODEL.WEIGHTS
    if weights in PRODUCERS and not (folder / weights).exists():
        runner.provide(PRODUCERS[weights])
        runner(PRODUCERS[weights])
    elif weights.startswith("my_detector/") and not (folder / weights).exists():
        datasets = ("DATASETS.TRAIN", "('my_relations_train',)")
        runner("my_cascade_rcnn_fpn.yaml", *datasets, "DATASETS.TEST", "('my_relations_test',)")
    elif "://" in weights:
        runner.provide(args.config_file)
    return [*words[: len(words) - len(args.opts)], *options, *args.opts]


def in_small_lazy(words: list[str], folder: Path) -> list[str]:
    """Cut a documented training by a LazyConfig short; it starts from a detector of full width."""
    weights = "output/toy/detector/model_final.pth"
    wide = folder / "wide_detector.pth"
    if not wide.exists():
        model = build_model(merged("configs/Toy/detector.yaml"))
        torch.save({"model": model.state_dict()}, wide)
    words = [x.replace(weights, str(wide)) for x in words]
    return [re.sub(r"^train\.max_iter=\d+$", "train.max_iter=2", x) for x in words]


def write_released_checkpoint(file: Path, config: str) -> None:
    import convert_released_weights as tool

    cfg = merged(config, *NARROW)
    cfg.merge_from_list(tool.released_options(cfg))
    torch.save({"model": released_state(tool, cfg)}, file)


@pytest.fixture(scope="module")
def namespaces():
    """Names of the Python blocks by document: later blocks go on with those of earlier ones."""
    return {}


@pytest.mark.parametrize("block", parameters(RUN))
def test_block_runs(block, reader, namespaces, monkeypatch):
    if block.title:
        (reader / block.title).write_text(block.text)
    if block.language == "yaml":
        cfg = get_cfg()
        reldn_d2.add_reldn_config(cfg)
        reldn_d2.merge_config(cfg, str(reader / block.title))
        if cfg.MODEL.META_ARCHITECTURE == "RelDN":
            # What the base may set otherwise: the detector's long schedule, and its folder.
            assert cfg.SOLVER.MAX_ITER < 40_000 and "MAX_ITER" in block.text + detector_yaml(block)
            assert "OUTPUT_DIR" in block.text
    elif block.language == "python":
        names = namespaces.setdefault(block.file, {"__name__": "__main__"})
        names["__file__"] = str(reader / (block.title or "block.py"))
        exec(compile(block.text, block.name, "exec"), names)
    else:
        for command in block.commands():
            run_command(command, reader, monkeypatch)


def detector_yaml(block: Block) -> str:
    """The YAML of the document that this one is based on, if it is one of its blocks."""
    return "".join(x.text for x in BLOCKS if x.file == block.file and x.title == "my_detector.yaml")


def run_command(command: str, folder: Path, monkeypatch) -> None:
    program, *words = shlex.split(command, comments=True)
    if program == "export":
        monkeypatch.setenv(*words[0].split("=", 1))
        return
    assert program == "python", f"mark the block as no-run: {command}"
    for name in NAMES if "NAME" in words else [""]:
        run_python(
            in_small([x.replace("NAME", name) if name else x for x in words], folder), monkeypatch
        )


# ------------------------------------------------------------------------------------- exemptions


class Parsed(Exception):
    """The command line was accepted."""


@pytest.mark.parametrize("block", [pytest.param(x, id=x.name) for x in EXEMPT])
def test_exempt_block_parses(block, reader, monkeypatch):
    assert len(block.reason) > 10 and block.language in ("bash", "python")
    if block.language == "python":  # needs packages that may not be installed
        compile(block.text, block.name, "exec")
        (test,) = re.findall(r"tests/[\w/]+\.py", block.reason)
        assert block.file in (ROOT / test).read_text(), f"{test} does not run it"
        return

    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(self, args=None, namespace=None):
        parse(self, args, namespace)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for command in block.commands():
        program, *words = shlex.split(command, comments=True)
        if program == "make":
            assert words[0] in targets
        elif program == "python":
            with pytest.raises(Parsed):
                run_python(words, monkeypatch)
        elif program in ("curl", "docker"):  # tests/serve/test_serve_command.py runs or reads them
            assert block.file == "docs/serve.md"
        else:
            assert program == "pip" and words[0] == "install"


def test_every_fence_says_what_it_holds():
    assert [block.name for block in BLOCKS if block.language not in LANGUAGES] == []
    assert [x.name for x in BLOCKS if x.language == "yaml" and not x.title] == []
    assert len(RUN) > 25


EXAMPLES = [x for x in BLOCKS if x.file == "docs/extending.md" and x.title]


@pytest.mark.parametrize("block", parameters(EXAMPLES))
def test_example_of_an_own_part_is_short_and_used(block):
    assert sum(bool(line.strip()) for line in block.text.splitlines()) <= 25
    commands = [x for other in BLOCKS if other.language == "bash" for x in other.commands()]
    if block.language == "python":
        assert any(f"--module {block.title}" in command for command in commands)


# ---------------------------------------------------------------------------- keys, links, datasets


def prose(file: str) -> str:
    return re.sub(r"^```.*?^```", "", (ROOT / file).read_text(), flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("file", FILES)
def test_config_keys_in_prose_exist(file):
    cfg = get_cfg()
    reldn_d2.add_reldn_config(cfg)
    roots = "|".join(key for key, value in cfg.items() if isinstance(value, dict))
    unknown = []
    for key in re.findall(rf"\b((?:{roots})(?:\.[A-Z0-9_]+)+)", prose(file)):
        node = cfg
        for part in key.rstrip("._").split("."):
            node = node.get(part) if isinstance(node, dict) else None
        if node is None:
            unknown.append(key)
    assert unknown == []


@pytest.mark.parametrize("file", FILES)
def test_links_lead_to_files_and_headings(file):
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", prose(file)):
        path, _, anchor = target.partition("#")
        path = (ROOT / file).parent / path if path else ROOT / file
        assert path.exists(), target
        if anchor:
            heads = re.findall(r"^#+ (.*)", path.read_text(), re.MULTILINE)
            slugs = [re.sub(r"[^\w\- ]", "", x.lower()).replace(" ", "-") for x in heads]
            assert anchor in slugs, target


@pytest.mark.parametrize("file", FILES)
def test_files_named_in_prose_exist(file):
    pattern = r"`((?:configs|tools|demo|docs|tests|reldn_d2|datasets)/[\w./-]+\.\w+)`"
    missing = [x for x in re.findall(pattern, prose(file)) if not (ROOT / x).exists()]
    assert missing == []


def test_modules_run_with_python_m_exist():
    for file in FILES:
        for module in re.findall(r"python -m (reldn_d2[\w.]*)", (ROOT / file).read_text()):
            assert importlib.util.find_spec(module), f"{file}: {module}"
