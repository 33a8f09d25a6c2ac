"""Parts of a bulk prediction for the processes of a cluster, each written atomically.

A process that dies leaves no part of its shard, so whichever process gets the shard next predicts
all of it. Two that have the same shard write the same part.
"""

import hashlib
import json
import os
import socket
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from ..predictor import RelationPredictor
from ..pretrained.image_detectors import ImageDetector
from ..utils.image_io import ImageError
from .bulk_prediction import predict_images
from .image_loading import Entities
from .image_sources import (
    CONTAINER_SUFFIXES,
    ImageItem,
    expand_sources,
    images_of,
    unique_images,
)
from .output_folder import RUN_FILE, is_complete, read_part_keys, to_record, write_part

__all__ = ["Shard", "ShardResult", "describe_shards", "plan_shards", "predict_shard"]


class Shard(NamedTuple):
    """Images that one process predicts and writes as one part.

    Attributes:
        name: of the part.
        container: tar or Parquet file with the images, which the process lists itself; or "".
        images: (key, path) of image files, if there is no container.
    """

    name: str
    container: str
    images: tuple[tuple[str, str], ...] = ()

    def list_images(self) -> list[ImageItem]:
        """Return the images.

        Raises:
            ImageError: the container cannot be read, or two of its images have the same key.
        """
        if self.container:
            return unique_images(images_of(self.container))
        return [ImageItem(key, path) for key, path in self.images]


class ShardResult(NamedTuple):
    """What became of a shard: counts of its images, or why it has no part."""

    name: str
    predicted: int = 0
    errors: int = 0
    left_out: Counter[str] = Counter()  # boxes by the class that the model does not have
    problem: str = ""


def plan_shards(inputs: Iterable[str | Path], size: int) -> list[Shard]:
    """Return the shards of paths, globs, folders, lists, tar and Parquet files, in order.

    Args:
        inputs: as for :func:`.image_sources.list_images`.
        size: image files per shard; a tar or Parquet file is one shard, whatever its size.

    Raises:
        ImageError: as :func:`.image_sources.list_images`; tar and Parquet files are not read.
    """
    containers, images = [], []
    for path in expand_sources(inputs):
        if path.lower().endswith(CONTAINER_SUFFIXES) and not Path(path).is_dir():
            containers.append(path)
        else:
            images += images_of(path)
    images = [(image.key, image.path) for image in unique_images(images)]
    parts: list[tuple] = [("", tuple(images[i : i + size])) for i in range(0, len(images), size)]
    parts += [(path, ()) for path in containers]
    return [Shard(f"{i:06}", path, names) for i, (path, names) in enumerate(parts)]


def describe_shards(shards: Sequence[Shard]) -> str:
    """Return a hash of what each shard has, for :func:`.output_folder.check_run`."""
    digest = hashlib.sha256()
    for shard in shards:
        digest.update(json.dumps(shard).encode("ascii"))
    return digest.hexdigest()


def predict_shard(
    shard: Shard,
    predictor: RelationPredictor,
    entities: Entities | ImageDetector,
    folder: Path,
    kind: str,
    top_k: int,
    min_score: float,
    batch_size: int = 1,
    workers: int = 0,
) -> ShardResult:
    """Predict the images of a shard and write its part, unless it is there.

    Args:
        shard: to predict.
        predictor, entities, batch_size, workers: see :func:`.bulk_prediction.predict_images`.
        folder: of the output, which :func:`.output_folder.check_run` has prepared.
        kind: "jsonl" or "parquet".
        top_k: most relations written per image.
        min_score: relations with a lower score are not written.

    Raises:
        ValueError: the folder is another one on this machine.
        OSError: the part cannot be written.
    """
    if not (folder / RUN_FILE).exists():
        raise ValueError(
            f"{folder} is not the output folder on {socket.gethostname()}: all machines need the "
            "same files under the same path"
        )
    if is_complete(folder, shard.name, kind):
        keys, error_keys = read_part_keys(folder, shard.name, kind)
        return ShardResult(shard.name, len(keys), len(error_keys))
    records, errors = [], []
    left_out: Counter[str] = Counter()
    try:
        images = shard.list_images()
        for image, result in predict_images(predictor, images, entities, batch_size, workers):
            if isinstance(result, ImageError):
                errors.append((image.key, str(result)))
            else:
                left_out.update(result.left_out.values())
                records.append(to_record(image.key, result.best(top_k, min_score)))
    except (ImageError, ChildProcessError) as error:
        return ShardResult(shard.name, problem=f"part-{shard.name}: {error}")
    if errors and not any(os.path.exists(image.path) for image in images):
        problem = (
            f"part-{shard.name}: {socket.gethostname()} has none of its files, such as "
            f"{images[0].path}: all machines need the input under the same path"
        )
        return ShardResult(shard.name, problem=problem)
    # Another process may write the same part at this time: one that was believed to be dead.
    for _ in range(3):
        write_part(folder, shard.name, kind, records, errors)
        keys, error_keys = read_part_keys(folder, shard.name, kind)
        if {*keys, *error_keys} == {image.key for image in images}:
            return ShardResult(shard.name, len(records), len(errors), left_out)
    raise OSError(f"{folder}: part-{shard.name}.{kind} is not what was written into it")
