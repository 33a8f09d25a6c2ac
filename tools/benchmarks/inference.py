"""Inference: the best 100 triplets lazily against exhaustively, and images per second.

100 detections an image; the relation head has the shapes of X-101-64x4d-FPN at 800x1333 (1024
numbers a vector, 256 channels, strides 4 to 32) and random weights. Which pairs are needed is
decided by scores: those of

* the built-in set: detections and predicate probabilities of a trained model (--checkpoint, which
  `make demo` makes), its 100 best detections of any score;
* VRD: published detections of the test set (--vrd-detections, a COCO results file), padded to 100,
  with the frequencies of predicates in the training annotations (--vrd-annotations) as
  probabilities;
* all scores equal: the worst case.

The big head does its full work for every pair asked for; its probabilities are then replaced by
those above, because an untrained head's say nothing. "Every ordered pair" is the plain way;
"every pair, union boxes once" shares what both orders of a pair have in common but leaves none out.

Example:
    python tools/benchmark.py inference --checkpoint output/toy/seed_1/reldn/model_final.pth \
        --vrd-detections test_detections_rcnn.json --vrd-annotations annotations_train.json
"""

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Tuple

import torch
from benchmarks.measure import (
    add_device_arguments,
    describe,
    peak_memory,
    print_table,
    seconds,
)
from torch import Tensor

import reldn_d2
from reldn_d2.data.frequency import count_predicates, log_frequencies
from reldn_d2.modeling.relation_head import RelDNHead, build_relation_head
from reldn_d2.modeling.relation_head.inference import (
    TopTriplets,
    best_of_chunks,
    best_triplets,
    exhaustive_triplets,
    pairs_by_bound,
)
from reldn_d2.modeling.relation_head.pairs import union_boxes
from reldn_d2.modeling.relation_head.spatial import spatial_features

from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.structures import Boxes, BoxMode

IMAGE_SIZE, STRIDES, CHANNELS = (800, 1333), (4, 8, 16, 32), 256
NUMBER = 100  # detections of an image
WAYS = ("every ordered pair", "every pair, union boxes once", "lazily")


class Detections(NamedTuple):
    """Of one image: R scores, boxes in the frame of the network's input, and probabilities."""

    scores: Tensor  # (R,)
    boxes: Tensor  # (R, 4)
    probabilities: Tensor  # (R, R, C) of each ordered pair's predicates


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark."""
    add_device_arguments(parser)
    parser.add_argument("--checkpoint", type=Path, help="RelDN trained on the built-in set")
    parser.add_argument("--vrd-detections", type=Path, help="COCO results on VRD's test set")
    parser.add_argument("--vrd-annotations", type=Path, help="VRD's annotations_train.json")
    parser.add_argument("--images", type=int, default=3, help="timed images of each case")
    parser.add_argument(
        "--count-images", type=int, default=50, help="images over which pairs are counted"
    )
    parser.add_argument("--repeats", type=int, default=2, help="the fastest of so many counts")
    parser.add_argument("--topk", type=int, default=100, help="triplets kept of an image")
    parser.add_argument("--no-memory", action="store_true", help="leave out the peak memory")
    parser.add_argument(
        "--model", help="also: images per second of this RelDN config, random weights"
    )


def run(args: argparse.Namespace) -> None:
    """Print the tables."""
    print(describe(args.device, args.threads))
    cases: Dict[str, List[Detections]] = {}
    if args.checkpoint:
        cases["built-in set, trained model"] = toy_detections(args.checkpoint, args.count_images)
    if args.vrd_detections and args.vrd_annotations:
        for name, lowest in (("0.05", True), ("falling from its lowest to 0.05", False)):
            cases[f"VRD, padded with scores {name}"] = vrd_detections(
                args.vrd_detections, args.vrd_annotations, args.count_images, lowest
            )
    cases["all scores equal"] = [equal_detections()]
    count_pairs(cases, args.topk)
    time_ways(cases, args)
    if args.model:
        images_per_second(args)


def big_head(device: str, num_predicates: int) -> RelDNHead:
    """The relation head of X-101-64x4d-FPN, with random weights."""
    torch.manual_seed(0)
    cfg = get_cfg()
    reldn_d2.add_reldn_config(cfg)
    cfg.MODEL.ROI_HEADS.IN_FEATURES = [f"p{i}" for i in range(2, 6)]
    cfg.MODEL.ROI_BOX_HEAD.NAME = "FastRCNNConvFCHead"
    cfg.MODEL.ROI_BOX_HEAD.NUM_FC = 2
    cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 1024
    cfg.MODEL.ROI_RELATION_HEAD.NUM_PREDICATES = num_predicates
    cfg.MODEL.ROI_RELATION_HEAD.OVERLAP_FILTER = False
    shape = {
        f"p{i + 2}": ShapeSpec(channels=CHANNELS, stride=stride) for i, stride in enumerate(STRIDES)
    }
    return build_relation_head(cfg, shape, shape).eval().to(device)


def feature_maps(device: str) -> Dict[str, Tensor]:
    """Random FPN maps of one image padded to a multiple of 32."""
    torch.manual_seed(1)
    height, width = (-(-side // 32) * 32 for side in IMAGE_SIZE)
    return {
        f"p{i + 2}": torch.randn(1, CHANNELS, height // stride, width // stride, device=device)
        for i, stride in enumerate(STRIDES)
    }


def toy_detections(checkpoint: Path, number: int) -> List[Detections]:
    """What a model trained on the built-in set finds in its test images: 100 detections each."""
    from reldn_d2.predictor import RelationPredictor

    from detectron2.data import DatasetCatalog

    options = ["TEST.DETECTIONS_PER_IMAGE", NUMBER, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0]
    predictor = RelationPredictor.from_checkpoint(checkpoint, device="cpu", opts=options)
    head, found = predictor.model.relation_head, []

    def keep(self, features, predicate_features, entities) -> List[Any]:
        for instances in entities:
            boxes, count = instances.pred_boxes, len(instances)
            encoded = self.encode_entities(
                features, [boxes], [instances.pred_classes], [instances.image_size]
            )
            s, o = torch.meshgrid(torch.arange(count), torch.arange(count), indexing="ij")
            logits = self.pair_logits(encoded, predicate_features, s.flatten(), o.flatten())
            table = logits.softmax(dim=1)[:, :-1].reshape(count, count, -1)
            height, width = instances.image_size
            scale = torch.tensor([IMAGE_SIZE[1] / width, IMAGE_SIZE[0] / height]).repeat(2)
            found.append(Detections(instances.scores, boxes.tensor * scale, table))
        return RelDNHead.forward(self, features, predicate_features, entities)

    head.forward = keep.__get__(head)
    for record in DatasetCatalog.get("toy_vrd_test")[:number]:
        predictor(record["file_name"])
    return found


def vrd_detections(
    detections: Path, annotations: Path, number: int, lowest: bool
) -> List[Detections]:
    """Published detections padded to 100, with the frequencies of the training annotations.

    Args:
        detections: COCO results with ``category_id`` as in VRD's objects.json.
        annotations: VRD's annotations_train.json.
        number: images.
        lowest: pad with scores of 0.05, the least that a detector reports; otherwise with scores
            that fall in equal ratios from the image's lowest one to 0.05.
    """
    generator = torch.Generator().manual_seed(0)
    counts = count_predicates(read_relations(annotations), 100, 70, overlap_filter=False)
    table = log_frequencies(counts).softmax(dim=-1)[..., :-1]
    by_image: Dict[str, List[Dict[str, Any]]] = {}
    records = json.loads(detections.read_text())
    for record in records:
        by_image.setdefault(record["image_id"], []).append(record)
    all_classes = torch.tensor([record["category_id"] for record in records])
    height, width = IMAGE_SIZE
    result = []
    for found in list(by_image.values())[:number]:
        boxes = torch.tensor([x["bbox"] for x in found])
        boxes[:, 2:] += boxes[:, :2]
        boxes = boxes * min(height, width) / boxes.max()
        missing = NUMBER - len(found)
        low = torch.rand((missing, 2), generator=generator) * torch.tensor([width, height]) * 0.8
        sides = torch.rand((missing, 2), generator=generator) * torch.tensor([width, height]) * 0.4
        extra = torch.cat([low, low + sides + 8], dim=1)
        scores = torch.tensor([x["score"] for x in found])
        least = 0.05 if lowest else float(scores.min())
        steps = torch.linspace(0, 1, missing + 1)[1:]
        padding = least * (0.05 / least) ** steps
        drawn = torch.randint(len(all_classes), (missing,), generator=generator)
        classes = torch.cat([torch.tensor([x["category_id"] for x in found]), all_classes[drawn]])
        probabilities = table[classes[:, None], classes[None]]
        result.append(
            Detections(torch.cat([scores, padding]), torch.cat([boxes, extra]), probabilities)
        )
    return result


def read_relations(annotations: Path) -> List[Dict[str, Any]]:
    """Dataset dicts, without images, of a file in VRD's shape: enough to count predicates."""
    dicts = []
    for relations in json.loads(annotations.read_text()).values():
        entities: Dict[Tuple, int] = {}
        triplets = []
        for relation in relations:
            ends = [
                entities.setdefault((x["category"], *x["bbox"]), len(entities))
                for x in (relation["subject"], relation["object"])
            ]
            if ends[0] != ends[1]:  # a few have the same box at both ends
                triplets.append((*ends, relation["predicate"]))
        records = [
            {"category_id": c, "bbox": [x0 - 1, y0 - 1, x1, y1], "bbox_mode": BoxMode.XYXY_ABS}
            for c, y0, y1, x0, x1 in entities
        ]
        dicts.append({"annotations": records, "relations": triplets})
    return dicts


def equal_detections() -> Detections:
    """The worst case: no bound tells pairs apart."""
    generator = torch.Generator().manual_seed(0)
    size = torch.tensor([IMAGE_SIZE[1], IMAGE_SIZE[0]])
    low = torch.rand((NUMBER, 2), generator=generator) * size * 0.6
    boxes = torch.cat(
        [low, low + 8 + torch.rand((NUMBER, 2), generator=generator) * size * 0.35], 1
    )
    probabilities = torch.rand((NUMBER, NUMBER, 9), generator=generator) / 9
    return Detections(torch.ones(NUMBER), boxes, probabilities)


def count_pairs(cases: Dict[str, List[Detections]], topk: int) -> None:
    """Share of the ordered pairs that is computed, by the number k of predicates a pair."""
    rows = []
    for name, images in cases.items():
        for k in (1, 2, 0):
            shares, needed = [], []
            for image in images:
                best = best_triplets(
                    lambda s, o, table=image.probabilities: table[s, o],
                    image.scores,
                    None,
                    num_predicates=image.probabilities.shape[-1],
                    predicates_per_pair=[k],
                    topk=topk,
                    chunk=2048,
                )
                pairs = len(image.scores) * (len(image.scores) - 1)
                bounds = image.scores[:, None] * image.scores
                bounds.fill_diagonal_(-1)
                shares.append(best.num_scored / pairs)
                needed.append(float((bounds >= best.scores[-1]).sum() / pairs))
            mean = [100 * sum(x) / len(x) for x in (shares, needed)]
            rows.append([name, k or "all", len(images), f"{mean[0]:.1f} %", f"{mean[1]:.1f} %"])
    headers = ["scores", "k", "images", "pairs computed", "pairs with bound >= K-th score"]
    print_table(rows, headers, f"Pairs computed for the best {topk} of {NUMBER} detections")


def prepare(
    way: str, image: Detections, device: str, topk: int, k: int, precision: str = "float32"
) -> Callable[[], Any]:
    """A call of the whole relation head on one image: entities encoded, triplets ranked.

    Args:
        way: one of ``WAYS``.
        image: its detections.
        device: cpu or cuda.
        topk: triplets kept.
        k: predicates a pair; 0: all.
        precision: float32 or amp.
    """
    table = image.probabilities.to(device)
    head, maps = big_head(device, table.shape[-1]), feature_maps(device)
    scores, boxes = image.scores.to(device), image.boxes.to(device)
    classes = torch.zeros(len(scores), dtype=torch.int64, device=device)
    rank = {WAYS[0]: exhaustive_triplets, WAYS[1]: sharing_triplets, WAYS[2]: best_triplets}[way]
    amp_type = torch.float16 if device.startswith("cuda") else torch.bfloat16

    @torch.no_grad()
    def call():
        with torch.autocast(device.split(":")[0], amp_type, enabled=precision == "amp"):
            entities = head.encode_entities(maps, [Boxes(boxes)], [classes], [IMAGE_SIZE])

            def score_pairs(subjects: Tensor, objects: Tensor) -> Tensor:
                if way == WAYS[0]:
                    logits = plain_pair_logits(head, entities, maps, subjects, objects)
                else:
                    logits = head.pair_logits(entities, maps, subjects, objects)
                probabilities = logits.float().softmax(dim=1)[:, :-1]
                return table[subjects, objects] + 0.0 * probabilities

            return rank(
                score_pairs,
                scores,
                None,
                num_predicates=table.shape[-1],
                predicates_per_pair=[k],
                topk=topk,
                chunk=2048,
            )

    return call


def plain_pair_logits(head, entities, maps, subjects: Tensor, objects: Tensor) -> Tensor:
    """As the head's own, but each ordered pair has its union box pooled for itself."""
    boxes = entities.boxes
    logits = head.semantic(entities.classes[subjects], entities.classes[objects])
    sizes = entities.image_sizes[entities.image[subjects]]
    logits = logits + head.spatial(spatial_features(boxes[subjects], boxes[objects], sizes))
    unions = [Boxes(union_boxes(boxes[subjects], boxes[objects]))]
    pooled = head.predicate_pooler([maps[name] for name in head.in_features], unions)
    return logits + head.visual(
        entities.subject_vectors,
        entities.object_vectors,
        head.predicate_box_head(pooled),
        subjects,
        objects,
        torch.arange(len(subjects), device=subjects.device),
    )


def sharing_triplets(
    score_pairs, scores, boxes, *, num_predicates, predicates_per_pair, topk, chunk
):
    """Every pair, both orders in one chunk, so that their union box is pooled once."""
    best = TopTriplets(predicates_per_pair, topk, num_predicates)
    chunks = pairs_by_bound(scores.cpu(), boxes, chunk, first_chunk=chunk)
    return best_of_chunks(chunks, best, score_pairs, scores)


def time_ways(cases: Dict[str, List[Detections]], args: argparse.Namespace) -> None:
    """Seconds and peak memory of the relation head, lazily and exhaustively, in one run."""
    torch.set_num_threads(args.threads)
    cuda = args.device.startswith("cuda")
    rows = []
    for precision in ("float32", "amp") if cuda else ("float32",):
        for name, images in cases.items():
            images = images[: args.images]
            for k in (1, 0) if name != "all scores equal" else (1,):
                times = {way: [0.0, 0.0] for way in WAYS}
                for image in images:
                    arguments = (image, args.device, args.topk, k, precision)
                    calls = {way: prepare(way, *arguments) for way in WAYS}
                    for way, took in _time_in_turns(calls, args.repeats, cuda).items():
                        times[way] = [a + b / len(images) for a, b in zip(times[way], took)]
                for way in WAYS:
                    memory = "-"
                    if not args.no_memory and k == 1:
                        used = peak_memory(
                            prepare,
                            *(way, images[0], args.device, args.topk, k, precision),
                            device=args.device,
                            threads=args.threads,
                        )
                        memory = f"{used / 2**20:.0f} MiB"
                    wall, cpu = times[way]
                    speed = [
                        f"{times[plain][0] / wall:.2f}x, {times[plain][1] / cpu:.2f}x"
                        for plain in WAYS[:2]
                    ]
                    numbers = [f"{wall:.3f}", f"{cpu:.3f}", memory, *speed]
                    rows.append([name, precision, k or "all", way, *numbers])
    headers = ["scores", "precision", "k", "way", "s an image", "CPU s", "peak memory"]
    headers += ["faster than plain: wall, CPU", "than sharing: wall, CPU"]
    print_table(rows, headers, f"Relation head, best {args.topk} of {NUMBER} detections")


def _time_in_turns(
    calls: Dict[str, Callable[[], Any]], repeats: int, cuda: bool
) -> Dict[str, List[float]]:
    """Least wall and CPU seconds of each call, taken in turns so that other load meets them all."""
    calls[WAYS[-1]]()  # warm
    least = {name: [float("inf"), float("inf")] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            if cuda:
                torch.cuda.synchronize()
            wall, cpu = time.perf_counter(), time.process_time()
            call()
            if cuda:
                torch.cuda.synchronize()
            took = (time.perf_counter() - wall, time.process_time() - cpu)
            least[name] = [min(pair) for pair in zip(least[name], took)]
    return least


def images_per_second(args: argparse.Namespace) -> None:
    """Detector alone, and detector with predicate backbone and relation head."""
    from detectron2.modeling import build_model

    cfg = get_cfg()
    reldn_d2.add_reldn_config(cfg)
    reldn_d2.merge_config(cfg, args.model, ["MODEL.DEVICE", args.device, "MODEL.WEIGHTS", ""])
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = (
        0.0  # an untrained detector: 100 detections all the same
    )
    model = build_model(cfg).eval()
    inputs = [{"image": torch.randint(0, 256, (3, *IMAGE_SIZE), dtype=torch.uint8)}]

    def detector() -> Any:
        images = model.detector.preprocess(inputs)
        return model.detector.detect(inputs, images, model.detector.extract_features(images))

    rows = []
    kind = args.device.split(":")[0]
    amp_type = torch.float16 if kind == "cuda" else torch.bfloat16
    for precision in ("float32", "amp"):
        for name, call in (("detector", detector), ("detector + RelDN", lambda: model(inputs))):

            @torch.no_grad()
            def timed(call=call, precision=precision):
                with torch.autocast(kind, amp_type, enabled=precision == "amp"):
                    return call()

            took = seconds(timed, args.threads)
            rows.append([os.path.basename(args.model), precision, name, f"{1 / took:.2f}"])
    headers = ["config", "precision", "what", "images/s"]
    print_table(rows, headers, f"Images per second at {IMAGE_SIZE[0]}x{IMAGE_SIZE[1]}")
