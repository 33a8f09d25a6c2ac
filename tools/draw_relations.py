#!/usr/bin/env python
r"""Draw images of a registered data set with their true relations, beside predictions if given.

Example::

    python tools/draw_relations.py --dataset vrd_test --output output/vrd/pictures --number 10 \
        --predictions output/vrd/reldn_small/inference/prdcls/relation_predictions.json
"""

import argparse
import sys
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where it is not installed

import reldn_d2  # noqa: E402,F401  # isort: skip  registers the data sets
from PIL import Image

from reldn_d2.data.datasets.catalog import add_module_argument, import_modules, require_dataset
from reldn_d2.evaluation.predictions_io import read_predictions, read_settings
from reldn_d2.structures.scene_graph import SceneGraph
from reldn_d2.utils.image_io import distinct_paths, read_rgb
from reldn_d2.vis.compare import compare_image
from reldn_d2.vis.visualizer import RelationVisualizer

from detectron2.data import DatasetCatalog, MetadataCatalog

__all__ = ["Loaded", "add_arguments", "load_arguments", "load_predictions"]


class Loaded(NamedTuple):
    """A data set, and what was predicted for it."""

    dicts: list[dict[str, Any]]
    metadata: Any
    predictions: dict[Any, SceneGraph]  # by image id

    def predicted(self, record: dict[str, Any]) -> SceneGraph | None:
        """Return the prediction for the image of a dataset dict."""
        return self.predictions.get(record["image_id"])


def add_arguments(parser: argparse.ArgumentParser, predictions_required: bool) -> None:
    """Options that name a data set and predictions."""
    parser.add_argument("--dataset", required=True, help="a registered data set")
    add_module_argument(parser)
    parser.add_argument(
        "--predictions",
        type=Path,
        required=predictions_required,
        help="relation_predictions.json of this data set, plain or gzipped",
    )


def load_predictions(
    file: Path, dicts: list[dict[str, Any]], metadata: Any
) -> dict[Any, SceneGraph]:
    """Predictions of a data set by image id, as small arrays.

    Raises:
        FileNotFoundError, ValueError: as :func:`.predictions_io.read_predictions`; or an image is
            not one of the data set's.
    """
    written_for = read_settings(str(file)).get("dataset", metadata.name)
    if written_for != metadata.name:
        print(
            f"warning: {file} was written for data set '{written_for}', not '{metadata.name}': "
            "equal image ids may be other images",
            file=sys.stderr,
        )
    known = {record["image_id"] for record in dicts}
    numbers = [len(metadata.thing_classes), len(metadata.predicate_classes)]
    found = {}
    for number, prediction in enumerate(read_predictions(str(file), *numbers)):
        if prediction.image_id not in known:
            raise ValueError(
                f"{file}, record {number}: data set '{metadata.name}' has no image "
                f"{prediction.image_id!r}. Name the data set that the file was written for."
            )
        found[prediction.image_id] = prediction
    return found


def load_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> Loaded:
    """What the options of :func:`add_arguments` name; ends with a line on what to mend."""
    try:
        import_modules(args.module)
        require_dataset(args.dataset)
        dicts, metadata = DatasetCatalog.get(args.dataset), MetadataCatalog.get(args.dataset)
        predictions = {}
        if args.predictions:
            predictions = load_predictions(args.predictions, dicts, metadata)
    except (ImportError, KeyError, OSError, ValueError) as error:
        parser.error(str(error.args[0] if isinstance(error, KeyError) else error))
    return Loaded(dicts, metadata, predictions)


def spread_evenly(dicts: list[dict[str, Any]], number: int) -> list[dict[str, Any]]:
    """Choose ``number`` dataset dicts, evenly spread over those with relations if there are any."""
    related = [record for record in dicts if record.get("relations")] or dicts
    number = min(number, len(related))
    return [related[i * len(related) // number] for i in range(number)]


def main(arguments: list[str] | None = None) -> int:
    """Draw; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser, predictions_required=False)
    parser.add_argument("--output", type=Path, required=True, help="folder for the pictures")
    parser.add_argument("--number", type=int, default=10, help="images, evenly spread")
    parser.add_argument("--top-k", type=int, help="predictions drawn; default: as many as are true")
    args = parser.parse_args(arguments)
    loaded = load_arguments(parser, args)
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--output: {error}")
    failed = 0
    chosen = spread_evenly(loaded.dicts, args.number)
    paths = distinct_paths([record["file_name"] for record in chosen], args.output, ".png")
    for record in chosen:
        predicted = loaded.predicted(record)
        try:
            image = read_rgb(record["file_name"])
            if predicted is None:
                visualizer = RelationVisualizer(image, loaded.metadata)
                picture = visualizer.draw_ground_truth(record).get_image()
            else:
                picture = compare_image(image, record, predicted, loaded.metadata, args.top_k)
        except ValueError as error:  # not an image, or not of the record's size
            print(f"left out: {error}", file=sys.stderr)
            failed += 1
            continue
        path = paths[record["file_name"]]
        Image.fromarray(picture).save(path)
        print(path)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
