"""``--format jsonl`` and ``--format parquet`` of the demo: bulk prediction in one process."""

import argparse
import os
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

from reldn_d2.bulk.bulk_prediction import predict_images
from reldn_d2.bulk.image_sources import ImageItem, import_parquet
from reldn_d2.bulk.model_fingerprint import describe_model, hash_path, hash_weights
from reldn_d2.bulk.output_folder import ERROR_FILE, BulkOutput
from reldn_d2.predictor import RelationPredictor
from reldn_d2.pretrained.image_detectors import ImageDetector
from reldn_d2.pretrained.transformers_detectors import PREFIX
from reldn_d2.scripts.entity_files import FileEntities, read_entities
from reldn_d2.utils.image_io import ImageError

__all__ = ["check_bulk_options", "describe_run", "run_bulk"]

DEFAULT_WORKERS = 2


def check_bulk_options(args: argparse.Namespace) -> None:
    """Check what a bulk prediction needs, before any work.

    Raises:
        ValueError: ``--output`` is missing or a file.
        ImportError: Parquet is wanted and pyarrow is not installed.
    """
    if args.output is None or args.output.suffix in (".json", ".jsonl", ".parquet"):
        raise ValueError(f"--format {args.format} writes several files: give --output FOLDER")
    if args.output.exists() and not args.output.is_dir():
        raise ValueError(f"--output {args.output} is a file: give a folder")
    if args.format == "parquet":
        import_parquet()


def describe_run(
    args: argparse.Namespace,
    predictor: RelationPredictor,
    entities: FileEntities | ImageDetector,
) -> dict[str, Any]:
    """Return what decides about the results: the input, the options and the model.

    Args:
        args: options of :func:`.model_options.add_model_options`, and ``input``.
        predictor: the model.
        entities: what :func:`.entity_files.read_entities` returned.
    """
    has_detector = isinstance(entities, ImageDetector)
    return {
        "input": [_describe_input(os.path.expanduser(x)) for x in args.input],
        "options": {
            "top_k": args.top_k,
            "min_score": args.min_score,
            "boxes": hash_path(args.boxes),
            "detections": hash_path(args.detections),
            "detector": args.detector,
            "detector_content": hash_path(args.detector and args.detector.removeprefix(PREFIX)),
            "detector_weights": hash_weights(entities.model) if has_detector else None,
            "confidence_threshold": args.confidence_threshold,
        },
        "model": describe_model(predictor),
    }


def _describe_input(path: str) -> str | list[str]:
    """Return the absolute path, and the path as written where keys begin with that."""
    absolute = os.path.abspath(path)
    if os.path.isdir(path) or path.lower().endswith(".txt"):
        return absolute
    return [path, absolute]


def run_bulk(
    args: argparse.Namespace, images: Sequence[ImageItem], predictor: RelationPredictor
) -> tuple[int, Counter[str]]:
    """Predict the images that have no result in ``--output`` yet.

    Returns:
        the exit status, and the boxes left out by the name of their class.

    Raises:
        OSError, ValueError, ImportError: the folder has results of another run or cannot be
            written; or as :func:`.entity_files.read_entities`.
    """
    entities = read_entities(predictor, args)
    if isinstance(entities, FileEntities):
        entities.check_names([image.key for image in images])
    left_out: Counter[str] = Counter()
    description = describe_run(args, predictor, entities)
    with BulkOutput(args.output, args.format, description) as output:
        remaining = [image for image in images if image.key not in output.done]
        earlier = len(images) - len(remaining)
        if earlier:
            print(f"{earlier} of {len(images)} images were done before")
        workers = DEFAULT_WORKERS if args.workers is None else args.workers
        results = predict_images(predictor, remaining, entities, args.batch_size, workers)
        with tqdm(total=len(images), initial=earlier, unit="image") as progress:
            for image, result in results:
                if isinstance(result, ImageError):
                    output.write_error(image.key, str(result))
                else:
                    left_out.update(result.left_out.values())
                    output.write(image.key, result.best(args.top_k, args.min_score))
                progress.update()
    errors = output.error_count
    print(f"{len(output.done) - errors} of {len(output.done)} images done in {args.output}")
    if errors:
        where = args.output / ERROR_FILE
        print(
            f"{errors} could not be used: {where} lists them with the reason; remove that file to "
            "try them again",
            file=sys.stderr,
        )
    return (1 if errors else 0), left_out
