"""Loaders by format, and a check of the error for a broken file."""

import pytest
from data_files import write_coco, write_openimages, write_released, write_visual_genome

from reldn_d2.data.datasets import (
    load_openimages_vrd,
    load_relation_instances,
    load_relation_json,
    load_visual_genome,
)
from reldn_d2.data.datasets.relation_json import read_name_list


def load_vg(**arguments):
    return load_visual_genome(**arguments, split="train", num_val_images=0)


def load_released(objects_file, predicates_file, **arguments):
    classes, predicates = (read_name_list(x, "names") for x in (objects_file, predicates_file))
    return load_relation_json(
        thing_classes=classes, predicate_classes=predicates, what="OpenImages", **arguments
    )


FORMATS = {
    "openimages": (write_openimages, load_openimages_vrd),
    "vg": (write_visual_genome, load_vg),
    "vg_attributes": (lambda folder: write_visual_genome(folder, True), load_vg),
    "released": (write_released, load_released),
    "own": (write_coco, load_relation_instances),
}


def check_error(folder, file_format, spoil, error, message):
    """Assert that loading raises ``error`` with ``message`` after ``spoil`` changed the files."""
    write, load = FORMATS[file_format]
    arguments = write(folder)
    spoil(arguments)
    with pytest.raises(error, match=message) as caught:
        load(**arguments)
    text = str(caught.value)
    assert len(text) < 1500 and "Traceback" not in text
    assert str(folder) in text, "the file is named in full"
