"""Draw the demo's pictures: ground truth and both models' best triplets, from prediction files."""

from pathlib import Path
from typing import Any

from draw_relations import Loaded, load_predictions
from PIL import Image

from reldn_d2.evaluation.matching import counted_relations, counted_triplets, match_relations
from reldn_d2.structures.scene_graph import SceneGraph
from reldn_d2.utils.image_io import read_rgb
from reldn_d2.utils.protocols import default_protocol
from reldn_d2.vis.compare import compare_models

from detectron2.data import DatasetCatalog, MetadataCatalog

__all__ = ["draw_pictures"]

DATASET = "toy_vrd_test"
TASK = "prdcls"


def count_found(dataset_dict: dict[str, Any], predicted: SceneGraph) -> int:
    """Count the ground-truth relations among the top n triplets, n being their number."""
    rules = default_protocol(DATASET)
    truth = counted_relations(SceneGraph.from_dataset_dict(dataset_dict), rules)
    k = rules.predicates_per_pair[0]
    best = counted_triplets(predicted, truth, rules, k, len(truth.pairs))
    _, found = match_relations(best, truth, rules, k)
    return int(found.sum())


def draw_pictures(folders: dict[str, Path], output: Path, count: int) -> list[Path]:
    """Draw the test images in which two models differ most, in both directions.

    In two thirds of the images the second model finds more relations than the first; in one third
    it finds fewer, if there are such images.

    Args:
        folders: output folders of the two models, by name.
        output: folder for the pictures; all PNG files in it are removed first.
        count: number of images to draw.

    Returns:
        The files written.
    """
    records = DatasetCatalog.get(DATASET)
    dicts = {x["image_id"]: x for x in records}
    metadata = MetadataCatalog.get(DATASET)
    models = {}
    for name, folder in folders.items():
        file = folder / "inference" / TASK / "relation_predictions.json"
        models[name] = Loaded(records, metadata, load_predictions(file, records, metadata))
    first, second = models.values()
    gains = {
        image_id: count_found(x, second.predicted(x)) - count_found(x, first.predicted(x))
        for image_id, x in dicts.items()
    }
    order = sorted(gains, key=lambda image_id: gains[image_id])
    worse = [x for x in order[: count // 3] if gains[x] < 0]
    chosen = order[::-1][: count - len(worse)] + worse

    output.mkdir(parents=True, exist_ok=True)
    for old in output.glob("*.png"):
        old.unlink()
    files = []
    for rank, image_id in enumerate(chosen):
        image = read_rgb(dicts[image_id]["file_name"])
        row = compare_models(
            image,
            dicts[image_id],
            {name: model.predicted(dicts[image_id]) for name, model in models.items()},
            metadata,
        )
        path = output / f"{rank + 1}_image_{Path(dicts[image_id]['file_name']).stem}.png"
        Image.fromarray(row).save(path)
        files.append(path)
    return files
