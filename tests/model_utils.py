"""Small models, images and datasets for tests of the model."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import reldn_d2
from reldn_d2.structures.name_matching import Renumbering
from reldn_d2.structures.relations import ground_truth_relations

from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from detectron2.structures import Boxes, BoxMode, Instances

ROOT = Path(__file__).resolve().parents[1]
CLASSES = ["person", "cup", "ball", "guitar", "drum", "hat", "chair", "table", "box"]
PREDICATES = ["holds", "plays", "wears", "on", "under", "inside of"]

# configs/Toy, much smaller: a training step takes a fraction of a second.
SMALL = (
    *("MODEL.WEIGHTS", "", "MODEL.DEVICE", "cpu"),
    *("MODEL.RESNETS.STEM_OUT_CHANNELS", 8, "MODEL.FPN.OUT_CHANNELS", 8),
    *("MODEL.RPN.PRE_NMS_TOPK_TEST", 60, "MODEL.RPN.POST_NMS_TOPK_TEST", 20),
    *("MODEL.ROI_BOX_HEAD.FC_DIM", 16, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0),
    *("TEST.DETECTIONS_PER_IMAGE", 6),
)
SIZE = (64, 96)  # height and width of the images


TINY = (
    *("MODEL.RESNETS.RES2_OUT_CHANNELS", 16, "MODEL.RESNETS.WIDTH_PER_GROUP", 2),
    *("MODEL.VGG.WIDTH", 4, "INPUT.MIN_SIZE_TRAIN", (96,), "INPUT.MIN_SIZE_TEST", 96),
    *("MODEL.ROI_MASK_HEAD.CONV_DIM", 8, "TEST.DETECTIONS_PER_IMAGE", 5),
    *("MODEL.RETINANET.SCORE_THRESH_TEST", 0.0),
)


def small_config(*options, config: str = "configs/Toy/reldn.yaml") -> CfgNode:
    """Load a config of the repository with a tiny network, on the CPU.

    Args:
        options: key, value, key, value, ... merged last.
        config: relative to the repository's root.
    """
    cfg = get_cfg()
    reldn_d2.add_reldn_config(cfg)
    reldn_d2.merge_config(cfg, str(ROOT / config), [*SMALL, *options])
    return cfg


def one_iteration_config(dataset: str, folder: Path, *options) -> CfgNode:
    """Load the config of :func:`small_config` for a training of one iteration, without a test."""
    return small_config(
        *("DATASETS.TRAIN", (dataset,), "DATASETS.TEST", (), "OUTPUT_DIR", str(folder)),
        *("SOLVER.IMS_PER_BATCH", 2, "SOLVER.MAX_ITER", 1, *options),
    )


def small_model(*options, seed: int = 0, config: str = "configs/Toy/reldn.yaml"):
    """Build the model of :func:`small_config` with random weights from a seed."""
    torch.manual_seed(seed)
    model = build_model(small_config(*options, config=config))
    return model


def give_distinct_statistics(module: torch.nn.Module, seed: int = 0) -> None:
    """Fill weights and BatchNorm statistics with values that no initialization gives."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if tensor.is_floating_point():
                noise = torch.rand(tensor.shape, generator=generator)
                tensor.copy_(noise + 0.5 if "running_var" in name else 0.1 * noise)
            else:
                tensor.fill_(7)


def item(
    boxes: Sequence[Sequence[float]],
    classes: Sequence[int],
    relations: Sequence[Sequence[int]] = (),
    seed: int = 0,
    **extra,
) -> dict:
    """Build one mapped image with random pixels and the given ground truth."""
    generator = torch.Generator().manual_seed(seed)
    instances = Instances(SIZE)
    instances.gt_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    instances.gt_classes = torch.tensor(classes, dtype=torch.int64)
    return {
        "image": torch.randint(0, 255, (3, *SIZE), generator=generator).float(),
        "image_id": f"image-{seed}",
        "instances": instances,
        "relations": ground_truth_relations(relations, SIZE),
        **extra,
    }


def busy_item(seed: int = 0, **extra) -> dict:
    """Build a person, two cups (one held) and a table below; one pair has two predicates."""
    boxes = [[10, 5, 40, 60], [30, 20, 45, 35], [60, 25, 75, 40], [25, 30, 90, 62]]
    relations = [(0, 1, 0), (0, 1, 1), (1, 3, 3), (2, 3, 3), (3, 2, 4)]
    return item(boxes, [0, 1, 1, 7], relations, seed, **extra)


def unrelated_item(seed: int = 1) -> dict:
    return item([[5, 5, 40, 60], [20, 20, 80, 50]], [0, 7], [], seed)


def one_box_item(seed: int = 2) -> dict:
    return item([[5, 5, 40, 60]], [0], [], seed)


def empty_item(seed: int = 3) -> dict:
    return item([], [], [], seed)


def write_dataset(folder: Path, count: int = 4) -> list:
    """Write random images to ``folder`` and return dicts; the fourth has no annotations."""
    dicts = []
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 255, (*SIZE, 3), dtype=np.uint8)
        file_name = folder / f"{number}.png"
        Image.fromarray(pixels).save(file_name)
        mapped = busy_item()
        boxes, relations = mapped["instances"].gt_boxes, mapped["relations"]
        annotations = [
            {"bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "category_id": category, "iscrowd": 0}
            for box, category in zip(boxes.tensor.tolist(), mapped["instances"].gt_classes.tolist())
        ]
        triplets = [
            (*pair, predicate)
            for pair, predicate in zip(
                relations.gt_pairs.tolist(), relations.gt_predicates.tolist()
            )
        ]
        dicts.append(
            {
                "file_name": str(file_name),
                "image_id": number,
                "height": SIZE[0],
                "width": SIZE[1],
                "annotations": annotations if number != 3 else [],
                "relations": triplets if number != 3 else [],
            }
        )
    return dicts


def register_dataset(name: str, folder: Path, count: int = 4) -> None:
    """Register :func:`write_dataset`; undo it with :func:`unregister_dataset`."""
    dicts = write_dataset(folder, count)
    DatasetCatalog.register(name, lambda: dicts)
    MetadataCatalog.get(name).set(
        thing_classes=CLASSES, predicate_classes=PREDICATES, evaluator_type="relation"
    )


def register_permuted_dataset(name: str, of: str) -> None:
    """Register the same images with classes and predicates in the reverse order of their names."""
    ids = Renumbering(list(reversed(range(len(CLASSES)))), list(reversed(range(len(PREDICATES)))))
    DatasetCatalog.register(name, lambda: [ids.dataset_dict(x) for x in DatasetCatalog.get(of)])
    MetadataCatalog.get(name).set(
        thing_classes=CLASSES[::-1], predicate_classes=PREDICATES[::-1], evaluator_type="relation"
    )


def unregister_dataset(name: str) -> None:
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


def detector_config(kind, *options):
    name = "reldn" if kind == "faster_rcnn_FPN" else f"Detectors/{kind}"
    return small_config(*TINY, *options, config=f"configs/Toy/{name}.yaml")


def model_of(kind, *options):
    torch.manual_seed(0)
    return build_model(detector_config(kind, "MODEL.WEIGHTS", "", *options))


def released_state(tool, cfg):
    """Return random weights under the released names, in the released shapes."""
    torch.manual_seed(0)
    state = {}
    for name, value in build_model(cfg).state_dict().items():
        rule = tool.rule_of(name, cfg)
        if rule is not None:
            background = 4 if "bbox_pred" in name else 0  # their boxes of the background
            assert rule.name not in state
            state[rule.name] = torch.randn(value.shape[0] + background, *value.shape[1:])
    return state
