"""The ground truth of a registered data set."""

from ..data.dataset_dict import dicts_without_images
from ..structures.scene_graph import ImageId, SceneGraph

__all__ = ["ImagePair", "load_ground_truth"]

ImagePair = tuple[SceneGraph, SceneGraph]  # ground truth and prediction of one image


def load_ground_truth(dataset_name: str) -> dict[ImageId, SceneGraph]:
    """Ground truth of a registered data set, in its order.

    Raises:
        ValueError: two dicts have one ``image_id``, or a relation points outside the annotations.
    """
    images: dict[ImageId, SceneGraph] = {}
    for record in dicts_without_images(dataset_name):
        image_id = record["image_id"]
        where = f"Data set '{dataset_name}', image {image_id!r}"
        if image_id in images:
            raise ValueError(
                f"{where}: occurs twice. Give every image of the data set an image_id of its own."
            )
        images[image_id] = SceneGraph.from_dataset_dict(record, where)
    return images
