#!/usr/bin/env python
r"""Draw the ground truth of a registered dataset, and predictions with hits and misses next to it.

Example::

    python tools/draw_relations.py --dataset vrd_test --output output/vrd/pictures --max-images 10 \
        --predictions output/vrd/reldn_small/inference/prdcls/relation_predictions.json
"""

import argparse
import sys
from pathlib import Path
from typing import Any, NamedTuple

if not __package__:  # run as a file, perhaps without installation
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import reldn_d2  # noqa: E402,F401  # isort: skip  registers the datasets
from PIL import Image

from reldn_d2.data.datasets.catalog import require_dataset
from reldn_d2.evaluation.offline import read_file
from reldn_d2.evaluation.predictions_io import read_settings
from reldn_d2.structures.scene_graph import SceneGraph
from reldn_d2.utils.image_io import distinct_paths, read_rgb
from reldn_d2.utils.programs import program_help
from reldn_d2.utils.protocols import PROTOCOL_REGISTRY, find_protocol
from reldn_d2.utils.user_modules import add_module_argument, parse_and_import
from reldn_d2.vis.compare import compare_models
from reldn_d2.vis.visualizer import RelationVisualizer

from detectron2.data import DatasetCatalog, MetadataCatalog

__all__ = ["Loaded", "add_arguments", "load_arguments", "load_predictions"]


class Loaded(NamedTuple):
    """A dataset and predictions for it."""

    dicts: list[dict[str, Any]]
    metadata: Any
    predictions: dict[Any, SceneGraph]  # by image id
    protocol: str = ""  # counts the hits; empty means the dataset's own

    def predicted(self, record: dict[str, Any]) -> SceneGraph | None:
        """Return the prediction for the image of a dataset dict."""
        return self.predictions.get(record["image_id"])


def add_arguments(parser: argparse.ArgumentParser, predictions_required: bool) -> None:
    """Add the options for a dataset, its predictions and the protocol that counts hits."""
    parser.add_argument("--dataset", required=True, help="registered dataset")
    add_module_argument(parser)
    parser.add_argument(
        "--predictions",
        type=Path,
        required=predictions_required,
        help="relation_predictions.json of this dataset, plain or gzipped",
    )
    parser.add_argument(
        "--protocol",
        default="",
        metavar="NAME",
        help="evaluation protocol that counts the hits: "
        f"{', '.join(PROTOCOL_REGISTRY)}, or one that --module registers; default: the dataset's "
        "own",
    )


def load_predictions(
    file: Path, dicts: list[dict[str, Any]], metadata: Any
) -> dict[Any, SceneGraph]:
    """Read predictions of a dataset by image id.

    Raises:
        FileNotFoundError, ValueError: as in :func:`.offline.read_file`, or an image
            is not in the dataset.
    """
    written_for = read_settings(str(file)).get("dataset", metadata.name)
    if written_for != metadata.name:
        print(
            f"warning: {file} was written for dataset '{written_for}', not '{metadata.name}': "
            "equal image ids may mean different images",
            file=sys.stderr,
        )
    known = {record["image_id"] for record in dicts}
    predictions = {}
    for index, prediction in enumerate(read_file(metadata.name, str(file))):
        if prediction.image_id not in known:
            raise ValueError(
                f"{file}, record {index}: dataset '{metadata.name}' has no image "
                f"{prediction.image_id!r}. Give the dataset that the file was written for."
            )
        predictions[prediction.image_id] = prediction
    return predictions


def load_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> Loaded:
    """Load what the options of :func:`add_arguments` name; exit with one line if that fails."""
    try:
        require_dataset(args.dataset)
        dicts, metadata = DatasetCatalog.get(args.dataset), MetadataCatalog.get(args.dataset)
        predictions = {}
        if args.predictions or args.protocol:
            find_protocol(args.protocol, metadata.get("evaluator_type", None))
            predictions = load_predictions(args.predictions, dicts, metadata)
    except (ImportError, OSError, ValueError) as error:
        parser.error(str(error))
    return Loaded(dicts, metadata, predictions, args.protocol)


def spread_evenly(dicts: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """Return ``count`` dataset dicts, evenly spread over those with relations if there are any."""
    related = [record for record in dicts if record.get("relations")] or dicts
    count = min(count, len(related))
    return [related[i * len(related) // count] for i in range(count)]


def main(arguments: list[str] | None = None) -> int:
    """Draw the pictures and return the exit status."""
    parser = argparse.ArgumentParser(
        description=program_help(__doc__, __file__),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser, predictions_required=False)
    parser.add_argument("--output", type=Path, required=True, help="folder for the pictures")
    parser.add_argument(
        "--max-images", type=int, default=10, help="max images, evenly spread; default: 10"
    )
    parser.add_argument(
        "--top-k",
        type=int,
        help="max predictions drawn; default: the number of ground-truth relations",
    )
    args = parse_and_import(parser, arguments)
    loaded = load_arguments(parser, args)
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--output: {error}")
    failed = 0
    chosen = spread_evenly(loaded.dicts, args.max_images)
    paths = distinct_paths([record["file_name"] for record in chosen], args.output, ".png")
    for record in chosen:
        predicted = loaded.predicted(record)
        try:
            image = read_rgb(record["file_name"])
            if predicted is None:
                visualizer = RelationVisualizer(image, loaded.metadata)
                picture = visualizer.draw_ground_truth(record).get_image()
            else:
                picture = compare_models(
                    image,
                    record,
                    {"Prediction": predicted},
                    loaded.metadata,
                    topk=args.top_k,
                    side=800,
                    protocol=loaded.protocol,
                )
        except ValueError as error:  # not an image, or not of the record's size
            print(f"skipped: {error}", file=sys.stderr)
            failed += 1
            continue
        path = paths[record["file_name"]]
        Image.fromarray(picture).save(path)
        print(path)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
