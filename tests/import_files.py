"""The same small dataset in each format that can be imported; pictures are 60 x 40 pixels.

Image 1: a man plays and holds a guitar. Image 2: a chair behind a man. Image 3: no entities.
"""

import json
from pathlib import Path
from typing import Any

from data_files import HEIGHT, WIDTH, pictures

MAN, GUITAR, CHAIR = (0, 0, 30, 40), (15, 20, 30, 40), (24, 20, 60, 40)
ENTITIES = {1: [("man", MAN), ("guitar", GUITAR)], 2: [("man", MAN), ("chair", CHAIR)], 3: []}
RELATIONS = {1: [(0, 1, "plays"), (0, 1, "holds")], 2: [(1, 0, "behind")], 3: []}
CLASSES, PREDICATES = ["chair", "guitar", "man"], ["behind", "holds", "plays"]
CSV_HEADER = (
    "image,subject,subject_x1,subject_y1,subject_x2,subject_y2,"
    "predicate,object,object_x1,object_y1,object_x2,object_y2,width,height"
)


def csv_lines() -> list[str]:
    lines = [CSV_HEADER]
    for image, relations in RELATIONS.items():
        for subject, object_, predicate in relations:
            ends = [ENTITIES[image][i] for i in (subject, object_)]
            (s, s_box), (o, o_box) = ends
            values = [f"{image}.jpg", s, *s_box, predicate, o, *o_box, WIDTH, HEIGHT]
            lines.append(",".join(map(str, values)))
    return [*lines, f"3.jpg,{',' * 10},{WIDTH},{HEIGHT}"]


def label_studio() -> list[dict[str, Any]]:
    tasks = []
    for image, entities in ENTITIES.items():
        results = [
            {
                "id": f"r{index}",
                "type": "rectanglelabels",
                "from_name": "label",
                "to_name": "image",
                "original_width": WIDTH,
                "original_height": HEIGHT,
                "image_rotation": 0,
                "origin": "manual",
                "value": {
                    "x": 100 * x0 / WIDTH,
                    "y": 100 * y0 / HEIGHT,
                    "width": 100 * (x1 - x0) / WIDTH,
                    "height": 100 * (y1 - y0) / HEIGHT,
                    "rotation": 0,
                    "rectanglelabels": [name],
                },
            }
            for index, (name, (x0, y0, x1, y1)) in enumerate(entities)
        ]
        results += [
            {
                "type": "relation",
                "from_id": f"r{subject}",
                "to_id": f"r{object_}",
                "direction": "right",
                "labels": [predicate],
            }
            for subject, object_, predicate in RELATIONS[image]
        ]
        tasks.append(
            {
                "id": image,
                "data": {"image": f"/data/upload/7/0123abcd-{image}.jpg"},
                "annotations": [{"id": 5, "completed_by": 1, "result": results}],
                "created_at": "2026-01-01T00:00:00Z",
                "predictions": [],
            }
        )
    return tasks


def _vg_object(image: int, index: int) -> dict[str, Any]:
    name, (x0, y0, x1, y1) = ENTITIES[image][index]
    box = {"x": x0, "y": y0, "w": x1 - x0, "h": y1 - y0}
    return {"object_id": 10 * image + index, **box, "names": [name.title()], "synsets": []}


def visual_genome() -> list[dict[str, Any]]:
    """``relationships.json``."""
    return [
        {
            "image_id": image,
            "relationships": [
                {
                    "relationship_id": 1,
                    "predicate": f"{predicate.upper()} ",
                    "synsets": [],
                    "subject": _vg_object(image, subject),
                    "object": _vg_object(image, object_),
                }
                for subject, object_, predicate in relations
            ],
        }
        for image, relations in RELATIONS.items()
    ]


def scene_graphs() -> list[dict[str, Any]]:
    """``scene_graphs.json``."""
    return [
        {
            "image_id": image,
            "objects": [_vg_object(image, index) for index in range(len(ENTITIES[image]))],
            "relationships": [
                {
                    "relationship_id": 1,
                    "predicate": predicate,
                    "synsets": [],
                    "subject_id": 10 * image + subject,
                    "object_id": 10 * image + object_,
                }
                for subject, object_, predicate in relations
            ],
        }
        for image, relations in RELATIONS.items()
    ]


def image_data() -> list[dict[str, Any]]:
    return [{"image_id": i, "width": WIDTH, "height": HEIGHT, "url": ""} for i in (*ENTITIES, 9)]


def sgg_benchmark() -> dict[str, Any]:
    content: dict[str, Any] = {
        "info": {},
        "images": [
            {"id": i, "file_name": f"{i}.jpg", "width": WIDTH, "height": HEIGHT} for i in ENTITIES
        ],
        "annotations": [],
        "rel_annotations": [],
        "categories": [
            {"id": i, "name": name, "supercategory": name} for i, name in enumerate(CLASSES, 1)
        ],
        "rel_categories": [{"id": i, "name": name} for i, name in enumerate(PREDICATES, 1)],
    }
    for image, entities in ENTITIES.items():
        for index, (name, (x0, y0, x1, y1)) in enumerate(entities):
            content["annotations"].append(
                {
                    "id": 100 * image + index,
                    "image_id": image,
                    "category_id": CLASSES.index(name) + 1,
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "area": (x1 - x0) * (y1 - y0),
                    "iscrowd": 0,
                    "segmentation": [[x0, y0, x1, y0, x1, y1]],
                }
            )
        for subject, object_, predicate in RELATIONS[image]:
            content["rel_annotations"].append(
                {
                    "id": len(content["rel_annotations"]),
                    "image_id": image,
                    "subject_id": 100 * image + subject,
                    "object_id": 100 * image + object_,
                    "predicate_id": PREDICATES.index(predicate) + 1,
                }
            )
    return content


def psg() -> dict[str, Any]:
    things = ["chair", "guitar"]  # the man is "stuff"
    return {
        "data": [
            {
                "file_name": f"{image}.jpg",
                "height": HEIGHT,
                "width": WIDTH,
                "image_id": str(image),
                "pan_seg_file_name": f"{image}.png",
                "segments_info": [],
                "annotations": [
                    {"bbox": list(box), "bbox_mode": 0, "category_id": CLASSES.index(name)}
                    for name, box in entities
                ],
                "relations": [[s, o, PREDICATES.index(p)] for s, o, p in RELATIONS[image]],
            }
            for image, entities in ENTITIES.items()
        ],
        "thing_classes": things,
        "stuff_classes": ["man"],
        "predicate_classes": PREDICATES,
        "test_image_ids": ["2"],
    }


def write_import_files(folder: Path) -> dict[str, Path]:
    """Write the dataset in every format, and its ``images``; return the files by format."""
    pictures(folder / "images", [f"{image}.jpg" for image in ENTITIES])
    (folder / "image_data.json").write_text(json.dumps(image_data()))
    (folder / "relations.csv").write_text("\n".join(csv_lines()) + "\n")
    files = {"csv": folder / "relations.csv"}
    for file_format, name, content in (
        ("label-studio", "label_studio.json", label_studio()),
        ("visual-genome", "relationships.json", visual_genome()),
        ("sgg-benchmark", "VG150_train.json", sgg_benchmark()),
        ("psg", "psg.json", psg()),
    ):
        files[file_format] = folder / name
        files[file_format].write_text(json.dumps(content))
    (folder / "scene_graphs.json").write_text(json.dumps(scene_graphs()))
    return files
