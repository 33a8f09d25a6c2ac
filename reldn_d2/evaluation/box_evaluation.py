"""COCO's box AP for detectors trained on the boxes of a relation dataset."""

import hashlib
import json
import logging
import os

from detectron2.data import MetadataCatalog
from detectron2.data.datasets.coco import convert_to_coco_dict
from detectron2.evaluation import COCOEvaluator

from ..utils.compat import has_compiled_ops
from ..utils.file_io import write_atomically

__all__ = ["box_evaluator"]

logger = logging.getLogger(__name__)


def box_evaluator(dataset_name: str, output_dir: str, distributed: bool = True) -> COCOEvaluator:
    """Build Detectron2's ``COCOEvaluator`` for the boxes of any registered dataset.

    A dataset whose ``evaluator_type`` is "coco" has its own COCO file. Any other is converted into
    a folder named after the annotations' fingerprint, because Detectron2 would reuse an older
    conversion after the annotations have changed, and would treat the ``json_file`` of any dataset
    as a COCO file.

    Args:
        dataset_name: registered dataset in Detectron2's format.
        output_dir: folder for the conversion and the results.
        distributed: gather the predictions of all processes.
    """
    metadata = MetadataCatalog.get(dataset_name)
    name = dataset_name
    if metadata.get("evaluator_type", None) != "coco":
        file = _convert(dataset_name, output_dir)
        # A separate name: the metadata of the dataset itself must not point to this file.
        name = f"{dataset_name} ({file})"
        converted = MetadataCatalog.get(name)
        converted.json_file = file
        for key in ("thing_classes", "thing_dataset_id_to_contiguous_id"):
            value = metadata.get(key, None)
            if value is not None:
                setattr(converted, key, value)
    return COCOEvaluator(
        name,
        tasks=("bbox",),
        distributed=distributed,
        output_dir=output_dir,
        use_fast_impl=has_compiled_ops(),
    )


def _convert(dataset_name: str, output_dir: str) -> str:
    """Write the dataset as COCO JSON unless that file exists already, and return its path."""
    coco = convert_to_coco_dict(dataset_name)
    coco.setdefault("annotations", [])
    coco["info"]["date_created"] = ""  # otherwise the fingerprint would change with every call
    content = json.dumps(coco)
    fingerprint = hashlib.sha256(content.encode("utf-8")).hexdigest()[:12]
    folder = os.path.join(os.path.abspath(output_dir), f"coco_{fingerprint}")
    file = os.path.join(folder, f"{dataset_name}.json")
    if not os.path.exists(file):
        # Several processes may do this at once: each writes its own file, the last one is kept.
        with write_atomically(file) as stream:
            stream.write(content)
        logger.info("Wrote the boxes of '%s' in COCO's format to %s", dataset_name, file)
    return file
