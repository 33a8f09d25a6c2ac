"""Find the best 100 triplets of an image lazily against exhaustively: pairs, time and memory.

100 detections per image; the relation head has the shapes of X-101-64x4d-FPN at 800x1333 (vectors
of 1024, 256 channels, strides 4 to 32) and random weights. Which pairs are needed depends on the
scores, which are those of

* the built-in set: detections and predicate probabilities of a trained model (--checkpoint, by
  default that of `make demo`), its 100 best detections of any score;
* VRD: published detections of the test set (--vrd-detections, a COCO results file), padded to 100,
  with the frequencies of predicates in the training annotations (--vrd-annotations) as
  probabilities;
* all scores equal, and all within 0.9 and 1: the worst cases.

The head does its full work for every pair asked for; its probabilities are then replaced by those
above, because those of an untrained head mean nothing. "every ordered pair" is the plain way;
"every pair, union boxes once" shares what both orders of a pair have in common but skips none.

Example:
    python tools/benchmark.py inference --vrd-detections test_detections_rcnn.json \
        --vrd-annotations json_dataset/annotations_train.json
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from reldn_d2.data.datasets.vrd import VRD_CLASSES, VRD_PREDICATES, parse_vrd_annotations
from reldn_d2.data.frequency import count_predicates, log_frequencies
from reldn_d2.modeling.relation_head.topk import best_triplets
from reldn_d2.predictor import RelationPredictor

from detectron2.data import DatasetCatalog
from detectron2.structures import Boxes

from .measure import peak_memory, print_table, time_calls
from .plain import Ranking, pair_logits, rank_all_pairs
from .synthetic import Shapes, add_shape_arguments, build_head, feature_maps

__all__ = ["Detections", "WAYS", "add_arguments", "equal_detections", "prepare", "run"]

WAYS = ("every ordered pair", "every pair, union boxes once", "lazily")
DEMO_CHECKPOINT = Path("output/toy/seed_1/reldn/model_final.pth")  # of `make demo`
CHUNK = 2048  # pairs


class Detections(NamedTuple):
    """Detections of one image."""

    scores: Tensor  # (R,)
    boxes: Tensor  # (R, 4) in pixels of the network's input
    probabilities: Tensor  # (R, R, C) of the predicates of each ordered pair


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    add_shape_arguments(parser)
    # Detectron2's default, with which the published figures were measured.
    parser.set_defaults(pooler_resolution=14)
    help_ = "RelDN trained on the built-in set (default: the demo's, %(default)s)"
    parser.add_argument("--checkpoint", type=Path, default=DEMO_CHECKPOINT, help=help_)
    parser.add_argument("--vrd-detections", type=Path, help="COCO results on VRD's test set")
    parser.add_argument("--vrd-annotations", type=Path, help="VRD's annotations_train.json")
    parser.add_argument("--detections", type=int, default=100, help="detections per image")
    parser.add_argument("--images", type=int, default=3, help="timed images, evenly chosen")
    parser.add_argument("--count-images", type=int, default=50, help="images whose pairs count")
    parser.add_argument("--repeats", type=int, default=2, help="rounds; the fastest counts")
    parser.add_argument("--topk", type=int, default=100, help="triplets kept per image")
    parser.add_argument("--no-memory", action="store_true", help="do not measure peak memory")


def run(args: argparse.Namespace) -> None:
    """Print the tables."""
    cases = find_cases(args)
    count_pairs(cases, args.topk)
    time_ways(cases, args)


def find_cases(args: argparse.Namespace) -> dict[str, list[Detections]]:
    """Return the detections of each case; print which cases are skipped and what they need."""
    cases: dict[str, list[Detections]] = {}
    if args.checkpoint.is_file():
        cases["built-in set, trained model"] = toy_detections(args)
    else:
        print(f"Skipped the built-in set: no {args.checkpoint} (see --checkpoint and make demo).")
    if args.vrd_detections and args.vrd_annotations:
        for name, lowest in (("0.05", True), ("falling from its lowest to 0.05", False)):
            cases[f"VRD, padded with scores {name}"] = vrd_detections(args, lowest)
    else:
        print("Skipped VRD: it needs --vrd-detections and --vrd-annotations.")
    cases["all scores equal"] = [equal_detections(1.0, args.detections, args.size)]
    cases["all scores within 0.9 and 1"] = [equal_detections(0.9, args.detections, args.size)]
    return cases


def toy_detections(args: argparse.Namespace) -> list[Detections]:
    """Collect the detections of a model trained on the built-in set in its test images."""
    options = ["TEST.DETECTIONS_PER_IMAGE", args.detections, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0]
    predictor = RelationPredictor.from_checkpoint(args.checkpoint, device="cpu", opts=options)
    detected = []

    def keep(head, inputs) -> None:
        features, predicate_features, (instances,) = inputs
        boxes, count, (height, width) = instances.pred_boxes, len(instances), instances.image_size
        entities = head.encode_entities(
            features, [boxes], [instances.pred_classes], [instances.image_size]
        )
        subjects, objects = torch.ones(count, count).nonzero().unbind(1)
        logits = head.pair_logits(entities, predicate_features, subjects, objects)
        probabilities = logits.softmax(dim=1)[:, :-1].reshape(count, count, -1)
        scale = torch.tensor([args.size[1] / width, args.size[0] / height]).repeat(2)
        detected.append(Detections(instances.scores, boxes.tensor * scale, probabilities))

    predictor.model.relation_head.register_forward_pre_hook(keep)
    for record in DatasetCatalog.get("toy_vrd_test")[: args.count_images]:
        predictor(record["file_name"])
    return detected


def random_boxes(count: int, size: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Draw (count, 4) boxes in an image of this height and width."""
    size = torch.tensor([size[1], size[0]])
    low = torch.rand((count, 2), generator=generator) * size * 0.6
    sides = 8 + torch.rand((count, 2), generator=generator) * size * 0.35
    return torch.cat([low, low + sides], dim=1)


def vrd_detections(args: argparse.Namespace, lowest: bool) -> list[Detections]:
    """Pad published detections, with the predicate frequencies of the training annotations.

    Args:
        args: --vrd-detections has ``category_id`` as in VRD's objects.json.
        lowest: pad with scores of 0.05, the least that a detector reports; otherwise with scores
            that fall in equal ratios from the image's lowest one to 0.05.
    """
    generator = torch.Generator().manual_seed(0)
    annotations = parse_vrd_annotations(str(args.vrd_annotations), merge_duplicates=False)
    dicts = [image._asdict() for image in annotations.values()]
    counts = count_predicates(dicts, len(VRD_CLASSES), len(VRD_PREDICATES), overlap_filter=False)
    table = log_frequencies(counts).softmax(dim=-1)[..., :-1]
    by_image: dict[str, list[dict[str, Any]]] = {}
    records = json.loads(args.vrd_detections.read_text())
    for record in records:
        by_image.setdefault(record["image_id"], []).append(record)
    all_classes = torch.tensor([record["category_id"] for record in records])
    result = []
    for own in list(by_image.values())[: args.count_images]:
        boxes = torch.tensor([x["bbox"] for x in own])
        boxes[:, 2:] += boxes[:, :2]
        boxes = boxes * min(args.size) / boxes.max()
        scores = torch.tensor([x["score"] for x in own])
        missing = args.detections - len(own)
        least = 0.05 if lowest else float(scores.min())
        padding = least * (0.05 / least) ** torch.linspace(0, 1, missing + 1)[1:]
        drawn = all_classes[torch.randint(len(all_classes), (missing,), generator=generator)]
        classes = torch.cat([torch.tensor([x["category_id"] for x in own]), drawn])
        boxes = torch.cat([boxes, random_boxes(missing, args.size, generator)])
        probabilities = table[classes[:, None], classes[None]]
        result.append(Detections(torch.cat([scores, padding]), boxes, probabilities))
    return result


def equal_detections(lowest: float, count: int, size: tuple[int, int]) -> Detections:
    """Draw the worst case: scores from ``lowest`` to 1, so that the bounds hardly differ."""
    generator = torch.Generator().manual_seed(0)
    boxes = random_boxes(count, size, generator)
    probabilities = torch.rand((count, count, 9), generator=generator) / 9
    return Detections(torch.linspace(lowest, 1, count), boxes, probabilities)


def rank_lazily(
    score_pairs, scores: Tensor, num_predicates: int, k: int | None, topk: int
) -> Ranking:
    """Rank with the package's own search."""
    options = dict(num_predicates=num_predicates, predicates_per_pair=[k], topk=topk, chunk=CHUNK)
    best, num_scored = best_triplets(score_pairs, scores, None, (1, 1), **options)
    return Ranking(best.pairs, best.predicates, best.scores, num_scored)


def count_pairs(cases: dict[str, list[Detections]], topk: int) -> None:
    """Print the share of the ordered pairs that is computed, per k predicates per pair."""
    rows = []
    for name, images in cases.items():
        for k in (1, 2, None):
            shares = torch.zeros(2, dtype=torch.float64)
            for scores, _, table in images:
                best = rank_lazily(lambda *x, t=table: t[x], scores, table.shape[-1], k, topk)
                bounds = (scores[:, None] * scores).fill_diagonal_(-1)
                needed = int((bounds >= best.scores[-1]).sum())
                num_pairs = len(scores) * (len(scores) - 1)
                shares += torch.tensor([best.num_scored, needed]) / num_pairs
            means = [f"{x:.1f} %" for x in (100 * shares / len(images)).tolist()]
            rows.append([name, k or "all", len(images), *means])
    headers = ["scores", "k", "images", "pairs computed", "pairs with bound >= K-th score"]
    print_table(rows, headers, f"Pairs computed for the best {topk} triplets")


def prepare(
    way: str, image: Detections, shapes: Shapes, device: str, topk: int, k: int, amp: bool = False
) -> Callable[[], Ranking]:
    """Return a call of the whole relation head on one image: encode entities, rank triplets.

    ``way`` is one of ``WAYS``; k predicates per pair (None: all) and ``topk`` triplets are kept.
    """
    scores, boxes, table = (x.to(device) for x in image)
    maps = feature_maps(shapes, device, seed=1)
    head = build_head(shapes, device, num_predicates=table.shape[-1]).eval()
    classes = torch.zeros(len(scores), dtype=torch.int64, device=device)
    amp_type = torch.float16 if device.startswith("cuda") else torch.bfloat16

    @torch.no_grad()
    def call() -> Ranking:
        with torch.autocast(device.split(":")[0], amp_type, enabled=amp):
            entities = head.encode_entities(maps, [Boxes(boxes)], [classes], [shapes.size])

            def score_pairs(subjects: Tensor, objects: Tensor) -> Tensor:
                if way == WAYS[0]:
                    logits = plain_logits(head, maps, entities, subjects, objects)
                else:
                    logits = head.pair_logits(entities, maps, subjects, objects)
                return table[subjects, objects] + 0.0 * logits.float().softmax(dim=1)[:, :-1]

            if way == WAYS[2]:
                return rank_lazily(score_pairs, scores, table.shape[-1], k, topk)
            return rank_all_pairs(score_pairs, scores, k, topk, CHUNK, way == WAYS[1])

    return call


def plain_logits(head, maps, entities, subjects: Tensor, objects: Tensor) -> Tensor:
    """Compute the head's logits, pooling a union box for each ordered pair."""

    def visual(unions: Tensor) -> Tensor:
        vectors = entities.subject_vectors, entities.object_vectors
        return head.visual(*vectors, unions, subjects, objects, None)

    (image_size,) = entities.image_sizes.tolist()
    data = (entities.boxes, entities.classes, image_size)
    return pair_logits(head, maps, data, subjects, objects, visual)


def time_ways(cases: dict[str, list[Detections]], args: argparse.Namespace) -> None:
    """Print seconds and peak memory of the relation head for each way."""
    rows = []
    for amp in (False, True) if args.device.startswith("cuda") else (False,):
        for name, images in cases.items():
            images = images[:: max(len(images) // args.images, 1)][: args.images]
            for k in (1, None) if not name.startswith("all scores") else (1,):
                options = (Shapes.from_args(args), args.device, args.topk, k, amp)
                total = {way: torch.zeros(2) for way in WAYS}
                for image in images:
                    calls = {way: prepare(way, image, *options) for way in WAYS}
                    for way, seconds in time_calls(calls, 0, args.repeats).items():
                        total[way] += torch.tensor(seconds)
                for way in WAYS:
                    memory = "-"
                    if not args.no_memory and k == 1:
                        used = peak_memory(prepare, way, images[0], *options, device=args.device)
                        memory = f"{used:.0f} MiB"
                    seconds = [f"{x:.3f}" for x in (total[way] / len(images)).tolist()]
                    ratios = [(total[plain] / total[way]).tolist() for plain in WAYS[:2]]
                    faster = [f"{wall:.2f} x, {cpu:.2f} x" for wall, cpu in ratios]
                    rows.append(
                        [
                            name,
                            "amp" if amp else "float32",
                            k or "all",
                            way,
                            *seconds,
                            memory,
                            *faster,
                        ]
                    )
    headers = ["scores", "precision", "k", "way", "s per image", "CPU s", "peak memory"]
    headers += ["faster than plain: wall, CPU", "than sharing: wall, CPU"]
    print_table(rows, headers, f"Relation head, best {args.topk} triplets")
