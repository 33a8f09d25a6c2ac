"""Data of the benchmark on VRD's boxes, which all runs of a process share."""

import functools
import os
from pathlib import Path
from typing import Any

__all__ = [
    "Prepared",
    "ceiling",
    "find_detections",
    "hold_out",
    "prepared",
    "register_held_out",
    "register_parts",
]

CONFIG = str(Path(__file__).resolve().parents[2] / "configs" / "VRD" / "reldn_boxes.yaml")
HELD_OUT, NUM_HELD_OUT = ("vrd_train_rest", "vrd_train_held_out"), 500


@functools.cache
def prepared(held_out: bool) -> "Prepared":
    """Return the data of this process, from ``vrd_train`` alone or from the training and test set.

    Args:
        held_out: test on images of the training set.
    """
    return Prepared(held_out)


class Prepared:
    """Datasets, mapped images and their pairs, which all runs of a process share.

    None of this depends on the seed, except the order of the training images, which is set for each
    run. It takes a third of the time of a short training otherwise.
    """

    def __init__(self, held_out: bool):
        import reldn_d2  # noqa: F401  (registers the datasets)

        from detectron2.data import MetadataCatalog

        self.names, self.tasks = ("vrd_train", "vrd_test"), ("sgdet", "preddet", "prdcls")
        if held_out:
            register_held_out()
            self.names, self.tasks = HELD_OUT, ("prdcls",)
        else:
            for name in self.names:  # the loaders and each evaluator read the annotations
                metadata = vars(MetadataCatalog.get(name))
                metadata["load_annotations"] = functools.cache(metadata["load_annotations"])
        self.test_batches = functools.cache(self._test_batches)
        self._train_loaders: dict[str, Any] = {}

    def train(self, cfg: Any, trained: bool) -> Any:
        """Return the model of a config in evaluation mode, trained or with its counted table."""
        from reldn_d2.engine import RelDNTrainer
        from reldn_d2.engine.model_setup import ensure_frequency_table

        loaders = self._train_loaders

        class Trainer(RelDNTrainer):
            @classmethod
            def build_train_loader(cls, cfg: Any) -> Any:
                # All that the images and their kept pairs depend on.
                head = cfg.MODEL.ROI_RELATION_HEAD
                contrastive = any(head.LOSS[f"LAMBDA_{i}"] for i in (1, 2, 3))
                solver = cfg.SOLVER.IMS_PER_BATCH
                parts = (cfg.DATASETS, cfg.DATALOADER, cfg.INPUT, cfg.MODEL.RELDN, head.SAMPLING)
                key = str([*parts, head.OVERLAP_FILTER, contrastive, solver])
                if key not in loaders:
                    loaders[key] = super().build_train_loader(cfg)
                loaders[key].seek(0, cfg.SEED)
                return loaders[key]

        if not trained:
            network = RelDNTrainer.build_model(cfg).eval()
            ensure_frequency_table(cfg, network)
            return network
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=False)
        trainer.train()
        return trainer.model.eval()

    def _test_batches(self, detections: str | None) -> list[Any]:
        """Return the mapped test images, with their detections or for given boxes."""
        from reldn_d2 import load_config
        from reldn_d2.engine import RelDNTrainer

        name = self.names[1]
        options = ["DATASETS.TEST", (name,), "TEST.RELATIONS.TASK", "prdcls"]
        if detections is not None:
            options[-1:] = ["sgdet", "DATASETS.DETECTION_FILES_TEST", (detections,)]
        return list(RelDNTrainer.build_test_loader(load_config(CONFIG, options), name))


def register_held_out() -> None:
    """Register the two parts of ``vrd_train``, see :func:`hold_out`."""
    import reldn_d2  # noqa: F401  (registers vrd_train)
    from reldn_d2.data.boxes_only import load_without_images

    from detectron2.data import DatasetCatalog, MetadataCatalog

    if HELD_OUT[0] in DatasetCatalog:
        return
    rest, held_out = hold_out(load_without_images("vrd_train"))
    evaluator_type = MetadataCatalog.get("vrd_train").evaluator_type
    register_parts("vrd_train", dict(zip(HELD_OUT, (rest, held_out))), evaluator_type)


def hold_out(records: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Split a training set: the other images, and 500 that are always the same ones."""
    import numpy as np

    chosen = set(np.random.default_rng(0).permutation(len(records))[:NUM_HELD_OUT].tolist())
    rest = [x for i, x in enumerate(records) if i not in chosen]
    return rest, [x for i, x in enumerate(records) if i in chosen]


def register_parts(
    source: str, parts: dict[str, list[dict[str, Any]]], evaluator_type: str
) -> None:
    """Register datasets with the names of classes and predicates of another one.

    Args:
        source: registered dataset.
        parts: images by name of the dataset; the first one is the training set of all.
        evaluator_type: of the parts.
    """
    from detectron2.data import DatasetCatalog, MetadataCatalog

    metadata = MetadataCatalog.get(source)
    for name, part in parts.items():
        DatasetCatalog.register(name, lambda part=part: part)
        MetadataCatalog.get(name).set(
            thing_classes=metadata.thing_classes,
            predicate_classes=metadata.predicate_classes,
            evaluator_type=evaluator_type,
            train_dataset=next(iter(parts)),
        )


def ceiling(detections: str) -> float:
    """Return the share of the test set's relations with both boxes among the detections, in %.

    No model can find more of them.
    """
    import reldn_d2  # noqa: F401  (registers vrd_test)
    from reldn_d2.config import load_config
    from reldn_d2.data.build import load_test_dicts
    from reldn_d2.structures.boxes_np import pairwise_iou
    from reldn_d2.structures.scene_graph import SceneGraph

    options = ["DATASETS.DETECTION_FILES_TEST", (detections,), "TEST.RELATIONS.TASK", "sgdet"]
    cfg = load_config(CONFIG, options)
    num_classes = cfg.MODEL.ROI_HEADS.NUM_CLASSES
    reachable, total = 0, 0
    for record in load_test_dicts(cfg, "vrd_test", num_classes, None, with_images=False):
        truth, found = SceneGraph.from_dataset_dict(record), record["detections"]
        same_class = truth.classes[:, None] == found["classes"][None]
        is_found = same_class & (pairwise_iou(truth.boxes, found["boxes"]) >= 0.5)
        subjects, objects = is_found[truth.pairs[:, 0]], is_found[truth.pairs[:, 1]]
        one_box = (subjects.sum(1) == 1) & (objects.sum(1) == 1) & (subjects & objects).any(1)
        reachable += int((subjects.any(1) & objects.any(1) & ~one_box).sum())
        total += len(truth.pairs)
    return 100 * reachable / total


def find_detections() -> str:
    """Return the file with Lu et al.'s detections, in the folder of VRD.

    Raises:
        FileNotFoundError: the annotations or the detections are missing.
    """
    folder = Path(os.environ.get("DETECTRON2_DATASETS", "datasets")) / "vrd"
    path = folder / "test_detections_rcnn.json"
    for needed in (folder / "json_dataset" / "annotations_train.json", path):
        if not needed.is_file():
            raise FileNotFoundError(
                f"There is no {needed}. Set DETECTRON2_DATASETS to a folder with vrd/json_dataset "
                "(the annotations) and vrd/test_detections_rcnn.json, the detections; "
                "docs/benchmarks.md says where to get them. Images are not needed."
            )
    return str(path)
