"""Training batches in an order that the seed and the iteration determine, so that a resumed run
goes on with the very batches that the interrupted one would have had.
"""

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
    load_proposals_into_dataset,
    print_instances_class_histogram,
)
from detectron2.data.samplers import RepeatFactorTrainingSampler, TrainingSampler
from detectron2.utils import comm

from .dataset_dict import check_annotations
from .detection_files import attach_detections

__all__ = ["TrainLoader", "build_train_loader", "load_training_dicts", "mix_seed"]


def mix_seed(*numbers: int) -> int:
    """One seed below 2**32 out of several numbers, such as seed, iteration and rank."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


@contextmanager
def _own_randomness(seed: int) -> Iterator[None]:
    """Seed the generators that augmentations draw from; afterwards they are as before."""
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


class _Seeded(Dataset):
    """Mapped images by ``(index, seed)``."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        index, seed = key
        with _own_randomness(seed):
            return self.dataset[index]


def _as_list(batch: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return batch


class TrainLoader:
    """Batches without end, each a list of mapped images.

    The order is that of Detectron2's loader: a sampler's indices, grouped so that a batch has only
    wide or only high images. Groups are known from the dicts, so batches that an earlier run has
    seen are skipped without reading an image. Each image's augmentation has a seed of its own.

    Attributes:
        dataset: the dataset dicts, serialised; iterable.
        seed: determines the order and the augmentations; the same on all processes.
        start: the batch to begin with.
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
        seed: int,
    ):
        """
        Args:
            dicts: dataset dicts.
            mapper: from a dict to the model's input.
            build_sampler: from a seed to a sampler without end, of this process's share.
            batch_size: images of this process in a batch.
            group_by_aspect_ratio: let a batch have only wide or only high images.
            num_workers: of torch's ``DataLoader``.
            seed: see the class.
        """
        self.wide = [x["width"] > x["height"] for x in dicts] if group_by_aspect_ratio else None
        self.dataset = DatasetFromList(list(dicts), copy=False)
        self._mapped = _Seeded(MapDataset(self.dataset, mapper))
        self._build_sampler = build_sampler
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed, self.start = seed, 0

    def seek(self, start: int, seed: int | None = None) -> None:
        """Begin with batch ``start``; call it before the first batch is taken."""
        self.start = start
        self.seed = self.seed if seed is None else seed

    def indices(self) -> Iterator[list[tuple[int, int]]]:
        """The batches from the first on, as (index of the image, seed of its augmentation)."""
        groups: dict[bool, list[tuple[int, int]]] = {False: [], True: []}
        rank, world = comm.get_rank(), comm.get_world_size()
        for number, index in zip(count(rank, world), self._build_sampler(self.seed)):
            group = groups[bool(self.wide and self.wide[index])]
            group.append((index, number))
            if len(group) == self.batch_size:
                yield [(i, mix_seed(self.seed, n)) for i, n in group]
                group.clear()

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        yield from DataLoader(
            self._mapped,
            batch_sampler=islice(self.indices(), self.start, None),
            num_workers=self.num_workers,
            collate_fn=_as_list,
            generator=torch.Generator(),  # the global one is the model's
        )


def load_training_dicts(
    cfg: CfgNode, num_classes: int | None, num_predicates: int | None
) -> list[dict[str, Any]]:
    """The dicts of ``DATASETS.TRAIN``, each checked, filtered as Detectron2 does.

    Args:
        cfg: with ``DATASETS``, ``DATALOADER`` and ``MODEL.LOAD_PROPOSALS``.
        num_classes, num_predicates: what records are checked against; None: not checked.

    Raises:
        ValueError: a record that cannot be used, or files of detections that do not fit the names.
    """
    names = list(cfg.DATASETS.TRAIN)
    proposals = list(cfg.DATASETS.PROPOSAL_FILES_TRAIN) if cfg.MODEL.LOAD_PROPOSALS else []
    detections = detection_files(cfg, is_train=True)
    dicts: list[dict[str, Any]] = []
    for number, name in enumerate(names):
        records = DatasetCatalog.get(name)
        for record in records:
            check_annotations(record, num_classes, num_predicates)
        if proposals:
            records = load_proposals_into_dataset(records, proposals[number])
        if detections:
            records = attach_detections(records, name, detections[number], num_classes)
        dicts.extend(records)
    if cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS:
        dicts = filter_images_with_only_crowd_annotations(dicts)
    if not dicts:
        raise ValueError(f"No image with annotations in {', '.join(names)} (DATASETS.TRAIN).")
    classes = MetadataCatalog.get(names[0]).get("thing_classes", None)
    if classes is not None:
        print_instances_class_histogram(dicts, classes)
    return dicts


def detection_files(cfg: CfgNode, is_train: bool) -> list[str]:
    """The files of ``DATASETS.DETECTION_FILES_TRAIN`` or ``_TEST``; none, or one a data set.

    Raises:
        ValueError: their number is another.
    """
    split = "TRAIN" if is_train else "TEST"
    files, names = list(cfg.DATASETS[f"DETECTION_FILES_{split}"]), cfg.DATASETS[split]
    if files and len(files) != len(names):
        raise ValueError(
            f"DATASETS.DETECTION_FILES_{split} has {len(files)} files, but DATASETS.{split} "
            f"{len(names)} data sets: {', '.join(names)}. Name one file for each."
        )
    return files


def build_train_loader(
    cfg: CfgNode, mapper: Callable, num_classes: int | None, num_predicates: int | None
) -> TrainLoader:
    """A :class:`TrainLoader` for ``DATASETS.TRAIN`` with Detectron2's keys of ``DATALOADER``.

    Raises:
        ValueError: the batch cannot be divided among the processes, or the sampler is unknown.
    """
    dicts = load_training_dicts(cfg, num_classes, num_predicates)
    number = len(dicts)  # the sampler must not keep the dicts themselves in memory
    batch, world = cfg.SOLVER.IMS_PER_BATCH, comm.get_world_size()
    if batch % world or batch < world:
        raise ValueError(f"SOLVER.IMS_PER_BATCH is {batch}: not divisible by {world} processes.")
    name = cfg.DATALOADER.SAMPLER_TRAIN
    if name == "RepeatFactorTrainingSampler":
        factors = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(
            dicts, cfg.DATALOADER.REPEAT_THRESHOLD
        )

        def build_sampler(seed: int) -> Sampler:
            return RepeatFactorTrainingSampler(factors, seed=seed)

    elif name == "TrainingSampler":

        def build_sampler(seed: int) -> Sampler:
            return TrainingSampler(number, seed=seed)

    else:
        raise ValueError(
            f"DATALOADER.SAMPLER_TRAIN is '{name}'; known: TrainingSampler, "
            "RepeatFactorTrainingSampler. For another one override build_train_loader."
        )
    return TrainLoader(
        dicts,
        mapper,
        build_sampler,
        batch_size=batch // world,
        group_by_aspect_ratio=cfg.DATALOADER.ASPECT_RATIO_GROUPING,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        seed=cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed(),
    )
