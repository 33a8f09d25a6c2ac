"""Training batches in an order that depends only on the seed and the iteration.

A resumed run sees exactly the batches that the interrupted run would have seen.
"""

import logging
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count, islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, DatasetFromList, MapDataset, MetadataCatalog
from detectron2.data.build import (
    filter_images_with_only_crowd_annotations,
    get_detection_dataset_dicts,
    load_proposals_into_dataset,
    print_instances_class_histogram,
)
from detectron2.data.samplers import RepeatFactorTrainingSampler, TrainingSampler
from detectron2.utils import comm

from ..structures.name_matching import Renumbering
from ..utils.processes import loader_worker_init
from .boxes_only import add_sizes, load_without_images
from .dataset_dict import check_annotations
from .datasets.catalog import dataset_names, joint_names
from .detection_files import attach_detections
from .repeat_factors import (
    PREDICATE_SAMPLER,
    check_sampler,
    log_repeats,
    predicate_repeats,
    with_drop_probabilities,
)
from .start_checks import check_records, training_warnings
from .statistics import training_statistics_of

__all__ = [
    "TrainLoader",
    "build_train_loader",
    "load_test_dicts",
    "load_training_dicts",
    "mix_seed",
]

logger = logging.getLogger(__name__)


def mix_seed(*values: int) -> int:
    """Derive one seed below 2**32 from several values, such as seed, iteration and rank."""
    return int(np.random.SeedSequence(values).generate_state(1)[0])


@contextmanager
def _own_randomness(seed: int) -> Iterator[None]:
    """Seed the generators that augmentations draw from, and restore them afterwards."""
    python, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        random.seed(seed)
        np.random.seed(seed)
        torch.default_generator.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy_state)


class _SeededDataset(Dataset):
    """Mapped images, indexed by ``(index, seed)``."""

    def __init__(self, dataset: Dataset, keep_mapped: bool):
        self.dataset = dataset
        self.kept: list[dict[str, Any] | None] | None = None
        if keep_mapped:
            self.kept = [None] * len(dataset)
        self.renumbering = Renumbering()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        index, seed = key
        if self.kept is not None:
            if self.kept[index] is None:
                self.kept[index] = self.renumbering.fields(self.dataset[index])
            return dict(self.kept[index])
        with _own_randomness(seed):
            return self.renumbering.fields(self.dataset[index])


def _as_list(batch: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return batch


class TrainLoader:
    """Endless batches, each a list of mapped images.

    The order is that of Detectron2's loader: a sampler's indices, grouped so that a batch has only
    wide or only tall images. Grouping needs only the dicts, so batches that an earlier run has seen
    are skipped without reading an image. The augmentation of each image has its own seed.

    Attributes:
        renumbering: maps the ids of the dataset to those of the model; set it before iterating.
        dataset: the dataset dicts, serialized; iterable.
        seed: determines the order and the augmentations; the same on all processes.
        start: index of the first batch.
    """

    def __init__(
        self,
        dicts: Sequence[dict[str, Any]],
        mapper: Callable[[dict[str, Any]], dict[str, Any]],
        build_sampler: Callable[[int], Sampler],
        *,
        batch_size: int,
        group_by_aspect_ratio: bool = True,
        num_workers: int = 0,
        keep_mapped: bool = False,
        seed: int,
    ):
        """
        Args:
            dicts: dataset dicts.
            mapper: maps a dict to the model input.
            build_sampler: maps a seed to an endless sampler of this process's share of the images.
            batch_size: images per batch and process.
            group_by_aspect_ratio: whether batches have only wide or only tall images.
            num_workers: see torch's ``DataLoader``.
            keep_mapped: map each image once and keep the result, for a mapper without randomness
                whose results are small.
            seed: see the class.
        """
        self.wide = [x["width"] > x["height"] for x in dicts] if group_by_aspect_ratio else None
        self.dataset = DatasetFromList(list(dicts), copy=False)
        self._mapped = _SeededDataset(MapDataset(self.dataset, mapper), keep_mapped)
        self._build_sampler = build_sampler
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed, self.start = seed, 0

    @property
    def renumbering(self) -> Renumbering:
        return self._mapped.renumbering

    @renumbering.setter
    def renumbering(self, renumbering: Renumbering) -> None:
        self._mapped.renumbering = renumbering

    def seek(self, start: int, seed: int | None = None) -> None:
        """Start with batch ``start``; call this before iterating."""
        self.start = start
        self.seed = self.seed if seed is None else seed

    def indices(self) -> Iterator[list[tuple[int, int]]]:
        """Yield all batches from the first one, as (index, augmentation seed) of their images."""
        groups: dict[bool, list[tuple[int, int]]] = {False: [], True: []}
        rank, world = comm.get_rank(), comm.get_world_size()
        # `position` counts the images of all processes, so that no two augmentations share a seed.
        for position, index in zip(count(rank, world), self._build_sampler(self.seed)):
            group = groups[bool(self.wide and self.wide[index])]
            group.append((index, position))
            if len(group) == self.batch_size:
                yield [(i, mix_seed(self.seed, p)) for i, p in group]
                group.clear()

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        yield from DataLoader(
            self._mapped,
            batch_sampler=islice(self.indices(), self.start, None),
            num_workers=self.num_workers,
            collate_fn=_as_list,
            worker_init_fn=loader_worker_init(),
            generator=torch.Generator(),  # the global one belongs to the model
        )


def load_training_dicts(
    cfg: CfgNode,
    num_classes: int | None,
    num_predicates: int | None,
    with_relations: bool = False,
    with_images: bool = True,
) -> list[dict[str, Any]]:
    """Load and check the dicts of ``DATASETS.TRAIN``, and filter them as Detectron2 does.

    Ids are those of :func:`.datasets.catalog.joint_names`; others are mapped by name.
    Facts that lose or confuse relations are logged as warnings.

    Args:
        cfg: config with ``DATASETS``, ``DATALOADER`` and ``MODEL.LOAD_PROPOSALS``.
        num_classes: number of entity classes to check against; not checked when None.
        num_predicates: number of predicates to check against; not checked when None.
        with_relations: whether relations are trained, so that the datasets need some.
        with_images: False opens no image, and images need not exist; see :mod:`.boxes_only`.

    Raises:
        FileNotFoundError: images are missing.
        ValueError: a record is invalid, the datasets have different names, all boxes have another
            form than declared, there is no relation to train on, or the number of detection files
            is wrong.
    """
    names = list(cfg.DATASETS.TRAIN)
    proposals = list(cfg.DATASETS.PROPOSAL_FILES_TRAIN) if cfg.MODEL.LOAD_PROPOSALS else []
    detections = detection_files(cfg, is_train=True)
    joint = joint_names(names)
    dicts: list[dict[str, Any]] = []
    loaded: dict[str, list[dict[str, Any]]] = {}
    for index, name in enumerate(names):
        records = loaded[name] = _load(name, with_images)
        _check_annotations(name, records, num_classes, num_predicates, is_train=True)
        if proposals:
            records = load_proposals_into_dataset(records, proposals[index])
        if detections:
            records = attach_detections(records, name, detections[index], num_classes)
        if not with_images:
            records = add_sizes(name, records)
        check_records(name, records, with_images)
        if index:
            owners = (f"dataset '{name}'", f"dataset '{names[0]}'")
            ids = Renumbering.between(dataset_names(name), joint, *owners)
            records = [ids.dataset_dict(record) for record in records] if ids else records
        dicts.extend(records)
    if with_relations:
        if cfg.MODEL.ROI_ATTRIBUTE_HEAD.ENABLED:
            _require_attributes(names, dicts)
        for warning in training_warnings(training_statistics_of(names, loaded), cfg):
            logger.warning(warning)
    if cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS:
        dicts = filter_images_with_only_crowd_annotations(dicts)
    if not dicts:
        raise ValueError(f"No image with annotations in {', '.join(names)} (DATASETS.TRAIN).")
    classes = MetadataCatalog.get(names[0]).get("thing_classes", None)
    if classes is not None:
        print_instances_class_histogram(dicts, classes)
    return dicts


def _require_attributes(names: Sequence[str], dicts: Sequence[dict[str, Any]]) -> None:
    """Raise if there is nothing to train an attribute head on."""
    if not any(x.get("attributes") for record in dicts for x in record["annotations"]):
        raise ValueError(
            f"MODEL.ROI_ATTRIBUTE_HEAD.ENABLED is True, but no annotation of {', '.join(names)} "
            "(DATASETS.TRAIN) has attributes. Are they where the loader expects them "
            "(docs/own_data.md)? To train without attributes, set it to False."
        )


def _load(name: str, with_images: bool) -> list[dict[str, Any]]:
    return DatasetCatalog.get(name) if with_images else load_without_images(name)


def _check_annotations(
    name: str,
    records: Sequence[dict[str, Any]],
    num_classes: int | None,
    num_predicates: int | None,
    is_train: bool = False,
) -> None:
    """Raise if the annotations of a loaded dataset are invalid."""
    num_attributes = len(dataset_names(name).get("attribute_classes") or ()) or None
    for record in records:
        if is_train or "annotations" in record:  # a test set may be images alone
            check_annotations(record, num_classes, num_predicates, num_attributes=num_attributes)


def load_test_dicts(
    cfg: CfgNode,
    name: str,
    num_classes: int | None,
    num_predicates: int | None,
    with_images: bool = True,
) -> list[dict[str, Any]]:
    """Load and check the dicts of a test set, with its proposals or detections.

    Args:
        cfg: config with ``DATASETS`` and ``MODEL.LOAD_PROPOSALS``.
        name: name of the dataset; one of ``DATASETS.TEST`` if it has proposals or detections.
        num_classes: number of entity classes to check against; not checked when None.
        num_predicates: number of predicates to check against; not checked when None.
        with_images: see :func:`load_training_dicts`.

    Raises:
        FileNotFoundError: images are missing.
        ValueError: a record is invalid, all boxes have another form than declared, or the number of
            detection files is wrong.
    """
    files = detection_files(cfg, is_train=False)
    if not with_images:
        dicts = load_without_images(name)
        _check_annotations(name, dicts, num_classes, num_predicates)
        if files:
            index = list(cfg.DATASETS.TEST).index(name)
            dicts = attach_detections(dicts, name, files[index], num_classes)
        dicts = add_sizes(name, dicts)
        check_records(name, dicts, with_images=False)
        return dicts
    proposals = list(cfg.DATASETS.PROPOSAL_FILES_TEST) if cfg.MODEL.LOAD_PROPOSALS else []
    index = list(cfg.DATASETS.TEST).index(name) if files or proposals else 0
    dicts = get_detection_dataset_dicts(
        name, filter_empty=False, proposal_files=proposals[index : index + 1] or None
    )
    _check_annotations(name, dicts, num_classes, num_predicates)
    check_records(name, dicts)
    return attach_detections(dicts, name, files[index], num_classes) if files else dicts


def detection_files(cfg: CfgNode, is_train: bool) -> list[str]:
    """Return ``DATASETS.DETECTION_FILES_TRAIN`` or ``_TEST``: no files, or one per dataset.

    Raises:
        ValueError: there are more or fewer files.
    """
    split = "TRAIN" if is_train else "TEST"
    files, names = list(cfg.DATASETS[f"DETECTION_FILES_{split}"]), cfg.DATASETS[split]
    if files and len(files) != len(names):
        raise ValueError(
            f"DATASETS.DETECTION_FILES_{split} has {len(files)} files, but DATASETS.{split} has "
            f"{len(names)} datasets: {', '.join(names)}. Set one file per dataset."
        )
    return files


def build_train_loader(
    cfg: CfgNode,
    mapper: Callable,
    num_classes: int | None,
    num_predicates: int | None,
    with_relations: bool = False,
    with_images: bool = True,
    keep_mapped: bool = False,
) -> TrainLoader:
    """Build a :class:`TrainLoader` for ``DATASETS.TRAIN`` from Detectron2's ``DATALOADER`` keys.

    See :func:`load_training_dicts` and, for ``keep_mapped``, :class:`TrainLoader` for the arguments
    and the checks. The sets of ``DATASETS.TEST`` are checked as well.

    Raises:
        ValueError: the batch size is not divisible by the number of processes, or the sampler's
            keys are wrong (see :func:`.repeat_factors.check_sampler`).
    """
    check_sampler(cfg, with_relations)
    dicts = load_training_dicts(cfg, num_classes, num_predicates, with_relations, with_images)
    for name in cfg.DATASETS.TEST:  # now: the evaluation may be many hours away
        if name not in cfg.DATASETS.TRAIN:
            records = _load(name, with_images)
            _check_annotations(name, records, num_classes, num_predicates)
            check_records(name, records, with_images)
    num_images = len(dicts)  # the sampler must not keep the dicts themselves in memory
    batch, world = cfg.SOLVER.IMS_PER_BATCH, comm.get_world_size()
    if batch % world or batch < world:
        raise ValueError(f"SOLVER.IMS_PER_BATCH is {batch}: not divisible by {world} processes.")
    name, threshold = cfg.DATALOADER.SAMPLER_TRAIN, cfg.DATALOADER.REPEAT_THRESHOLD
    if name == "TrainingSampler":

        def build_sampler(seed: int) -> Sampler:
            return TrainingSampler(num_images, seed=seed)

    else:
        if name == PREDICATE_SAMPLER:
            repeats = predicate_repeats(dicts, threshold, num_predicates)
            factors = repeats.images
            if cfg.DATALOADER.RELATION_DROP_RATE:
                # Other relations are dropped each time, so no mapped image can be kept.
                keep_mapped = False
                dicts = with_drop_probabilities(dicts, repeats, cfg.DATALOADER.RELATION_DROP_RATE)
            names = dataset_names(cfg.DATASETS.TRAIN[0]).get("predicate_classes")
            log_repeats(repeats, dicts, names, cfg)
        else:
            count_classes = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency
            factors = count_classes(dicts, threshold)

        def build_sampler(seed: int) -> Sampler:
            return RepeatFactorTrainingSampler(factors, seed=seed)

    return TrainLoader(
        dicts,
        mapper,
        build_sampler,
        batch_size=batch // world,
        group_by_aspect_ratio=cfg.DATALOADER.ASPECT_RATIO_GROUPING,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        keep_mapped=keep_mapped,
        seed=cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed(),
    )
