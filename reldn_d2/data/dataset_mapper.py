"""Map a dataset dict to the model input: image, instances and the relations between them."""

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from detectron2.config import CfgNode, configurable
from detectron2.data import DatasetMapper
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T
from detectron2.structures import Boxes, Instances

from ..structures.attributes import ground_truth_attributes
from ..structures.name_matching import match_names
from ..structures.relations import ground_truth_relations, remap_relations
from ..structures.scene_graph import boxes_xyxy
from ..utils.image_io import read_image
from .boxes_only import image_name
from .dataset_dict import check_annotations
from .datasets.catalog import dataset_names as names_of
from .detection_files import transform_detections
from .repeat_factors import DROP_KEY

__all__ = ["RelationDatasetMapper"]

_RESIZING = (T.Resize, T.ResizeShortestEdge)
_EMPTY = 1e-5  # pixels; shorter sides make a box empty, as in filter_empty_instances


class RelationDatasetMapper(DatasetMapper):
    """Detectron2's ``DatasetMapper`` that also maps the relations.

    In addition to Detectron2's keys the dataset dict has ``"relations"``: a list of
    ``(subject_index, object_index, predicate_id)``, 0-based, with indices into ``"annotations"``.
    Any augmentation of Detectron2 can be used. The given dict is not modified.

    In training, crowd annotations and boxes that the augmentation leaves empty are dropped, as in
    Detectron2. Their relations are dropped too, and the indices of the other relations are
    remapped. Relations are therefore always valid for ``"instances"``, and either may be empty. For
    inference nothing is dropped, so that the model can be given ground-truth boxes (tasks PRDCLS
    and SGCLS).

    A model that reads no pixels needs no ``image``: with ``with_images=False`` no image is read,
    boxes stay in pixels of the original image (resizing is skipped), and augmentations are applied
    to the boxes alone.
    """

    @configurable
    def __init__(
        self,
        is_train: bool,
        *,
        num_classes: int | None = None,
        num_predicates: int | None = None,
        num_attributes: int = 0,
        with_images: bool = True,
        **kwargs: Any,
    ) -> None:
        """Args:
        is_train: whether the mapper is used for training.
        num_classes: number of entity classes of the dataset; not checked when None.
        num_predicates: number of predicates of the dataset; not checked when None.
        num_attributes: number of attributes of the dataset; 0 leaves attributes out.
        with_images: whether images are read.
        **kwargs: augmentations, image_format and other arguments of ``DatasetMapper``.
        """
        if not with_images:
            kwargs["augmentations"] = [
                x for x in kwargs["augmentations"] if not isinstance(x, _RESIZING)
            ]
        super().__init__(is_train, **kwargs)
        self.num_classes = num_classes
        self.num_predicates = num_predicates
        self.num_attributes = num_attributes
        self.with_images = with_images

    @property
    def keeps_results(self) -> bool:
        """Whether results are small and always the same, so that they can be kept in memory."""
        return not self.with_images and not self.augmentations.augs

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict[str, Any]:
        """Return the arguments of ``__init__``; counts are those of ``cfg.DATASETS``."""
        names = cfg.DATASETS.TRAIN if is_train else cfg.DATASETS.TEST
        ret = super().from_config(cfg, is_train)
        ret["num_classes"] = _count_names(names, "thing_classes")
        ret["num_predicates"] = _count_names(names, "predicate_classes")
        ret["num_attributes"] = _count_names(names, "attribute_classes") or 0
        return ret

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        """Map one image.

        Args:
            dataset_dict: one image in Detectron2's format, plus ``"relations"``.

        Returns:
            The other keys of the dict, and:

            * ``image``: (C, H, W) tensor in ``image_format``; missing without images.
            * ``instances``: ``Instances`` of R entities in the frame of ``image``, with
              ``gt_boxes`` (R, 4) and ``gt_classes`` (R,); R may be 0. If the dataset has
              attributes, also ``gt_attributes`` (R, A) and ``gt_attributes_known`` (R,), see
              :mod:`reldn_d2.structures.attributes`.
            * ``relations``: ``Instances`` of M relations, with ``gt_pairs`` (M, 2) into
              ``instances`` and ``gt_predicates`` (M,); M may be 0. In training, if the dict has
              ``"drop_probabilities"`` (:mod:`.repeat_factors`), also ``gt_kept`` (M,) bool, drawn
              again each time: False for a relation that is not trained on this time.
            * ``derived``: an empty dict, if the result may be kept (:attr:`keeps_results`, and no
              relation is dropped); the model keeps there what it computes from this image alone.

            ``instances`` and ``relations`` are missing without ``"annotations"`` (inference on
            plain images).

        Raises:
            ValueError: the image cannot be read or mapped, or its annotations are invalid; the
                message names the file.
        """
        path = image_name(dataset_dict)
        try:
            if not self.with_images:
                return self._map_boxes(dataset_dict)
            return self._map(copy.deepcopy(dataset_dict))
        except Exception as error:  # decoders and augmentations raise many types
            if path in str(error):
                raise
            raise ValueError(
                f"{path}: cannot be mapped to a model input ({type(error).__name__}: {error})."
            ) from error

    def _check(self, dataset_dict: dict[str, Any]) -> None:
        check_annotations(
            dataset_dict,
            self.num_classes,
            self.num_predicates,
            num_attributes=self.num_attributes or None,
        )

    def _add_attributes(self, instances: Instances, annotations: Sequence[dict[str, Any]]) -> None:
        """Add the attributes of the annotations that the instances were made of, in order."""
        if self.num_attributes:
            table, known = ground_truth_attributes(annotations, self.num_attributes)
            instances.gt_attributes, instances.gt_attributes_known = table, known

    def _map(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        """See :meth:`__call__`; the dict is modified."""
        annotated = self.is_train or "annotations" in dataset_dict or "relations" in dataset_dict
        if annotated:
            self._check(dataset_dict)
        image = read_image(dataset_dict["file_name"], self.image_format)
        utils.check_image_size(dataset_dict, image)

        # Some augmentations use the boxes, e.g. to choose a crop.
        boxes = boxes_xyxy(dataset_dict["annotations"]) if annotated else None
        aug_input = T.AugInput(image, boxes=boxes)
        transforms = self.augmentations(aug_input)
        image = aug_input.image
        image_shape = image.shape[:2]
        dataset_dict["image"] = torch.as_tensor(np.ascontiguousarray(image.transpose(2, 0, 1)))

        if self.proposal_topk is not None:
            utils.transform_proposals(
                dataset_dict, image_shape, transforms, proposal_topk=self.proposal_topk
            )
        if "detections" in dataset_dict:
            dataset_dict["detections"] = transform_detections(
                dataset_dict["detections"], transforms, image_shape
            )
        if annotated:
            self._transform_annotations(dataset_dict, transforms, image_shape)
        return dataset_dict

    def _map_boxes(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        """Map without the image, all boxes at once; the dict is not modified.

        The entities are those that :meth:`_map` finds for an image of the same size.
        """
        result = {k: v for k, v in dataset_dict.items() if k not in ("annotations", "relations")}
        annotated = self.is_train or "annotations" in dataset_dict or "relations" in dataset_dict
        boxes = None
        if annotated:
            self._check(dataset_dict)
            boxes = boxes_xyxy(dataset_dict["annotations"])
        # No channels, so no memory: augmentations see the size only.
        image = np.empty((dataset_dict["height"], dataset_dict["width"], 0), np.uint8)
        aug_input = T.AugInput(image, boxes=None if boxes is None else boxes.copy())
        transforms = self.augmentations(aug_input)
        size = aug_input.image.shape[:2]
        if "detections" in dataset_dict:
            result["detections"] = transform_detections(
                dataset_dict["detections"], transforms, size
            )
        if annotated:
            annotations = dataset_dict["annotations"]
            boxes = transforms.apply_box(boxes) if len(boxes) else boxes
            boxes = boxes.clip(0, [size[1], size[0]] * 2)
            kept = torch.ones(len(boxes), dtype=torch.bool)
            instances = Instances(size)
            instances.gt_boxes = Boxes(torch.from_numpy(boxes.astype(np.float32)))
            classes = [int(x["category_id"]) for x in annotations]
            instances.gt_classes = torch.tensor(classes, dtype=torch.int64)
            self._add_attributes(instances, annotations)
            if self.is_train:
                kept &= ~torch.tensor([bool(x.get("iscrowd", 0)) for x in annotations]).bool()
                kept &= instances.gt_boxes.nonempty(threshold=_EMPTY)
                instances = instances[kept]
            relations = self._relations(dataset_dict, size)
            result["instances"] = instances
            result["relations"] = remap_relations(relations, kept)
        drops = result.pop(DROP_KEY, None) is not None
        if self.is_train and self.keeps_results and not drops:
            result["derived"] = {}
        return result

    def _transform_annotations(
        self, dataset_dict: dict[str, Any], transforms: T.Transform, image_shape: Sequence[int]
    ) -> None:
        """Replace annotations and relations with ``Instances`` in the frame of the new image."""
        annotations = dataset_dict.pop("annotations")
        kept = torch.ones(len(annotations), dtype=torch.bool)
        for index, annotation in enumerate(annotations):
            # Detectron2's transforms work in place, so they would round a box of integers.
            annotation["bbox"] = [float(value) for value in annotation["bbox"]]
            if not self.use_instance_mask:
                annotation.pop("segmentation", None)
            if not self.use_keypoint:
                annotation.pop("keypoints", None)
            if self.is_train and annotation.get("iscrowd", 0):
                kept[index] = False

        instances = utils.annotations_to_instances(
            [
                utils.transform_instance_annotations(
                    annotation,
                    transforms,
                    image_shape,
                    keypoint_hflip_indices=self.keypoint_hflip_indices,
                )
                for annotation, keep in zip(annotations, kept.tolist(), strict=True)
                if keep
            ],
            image_shape,
            mask_format=self.instance_mask_format,
        )
        self._add_attributes(
            instances, [x for x, keep in zip(annotations, kept.tolist(), strict=True) if keep]
        )
        if self.is_train:
            # A cropped mask may have a tighter box than the cropped box.
            if self.recompute_boxes and instances.has("gt_masks"):
                instances.gt_boxes = instances.gt_masks.get_bounding_boxes()
            instances, nonempty = utils.filter_empty_instances(instances, return_mask=True)
            kept[kept.clone()] = nonempty
        relations = self._relations(dataset_dict, image_shape)
        dataset_dict.pop(DROP_KEY, None)
        dataset_dict["instances"] = instances
        dataset_dict["relations"] = remap_relations(relations, kept)

    def _relations(self, dataset_dict: dict[str, Any], image_size: Sequence[int]) -> Instances:
        """Return all relations of an image; in training draw which of them are dropped."""
        relations = ground_truth_relations(dataset_dict.get("relations", ()), image_size)
        if self.is_train and DROP_KEY in dataset_dict:
            # numpy's generator, as Detectron2's augmentations: the loader seeds it for each image.
            draws = np.random.random(len(relations))
            relations.gt_kept = torch.from_numpy(draws >= np.array(dataset_dict[DROP_KEY]))
        return relations


def _count_names(dataset_names: Sequence[str], key: str) -> int | None:
    """Return the number of classes or predicates of the datasets, None if it is not set.

    Raises:
        NameMismatchError: if the datasets do not have the same names, in whatever order.
    """
    lists = {name: names_of(name).get(key) for name in dataset_names}
    if key == "attribute_classes":  # an empty list is as good as none
        lists = {name: names or None for name, names in lists.items()}
    named = [(name, names) for name, names in lists.items() if names is not None]
    for name, names in named[1:]:
        match_names(names, named[0][1], key, f"dataset '{name}'", f"dataset '{named[0][0]}'")
    return len(named[0][1]) if named else None
