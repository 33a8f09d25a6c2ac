"""Inference: the best 100 triplets lazily against exhaustively, and images per second.

100 detections an image; the relation head has the shapes of X-101-64x4d-FPN at 800x1333 (1024
numbers a vector, 256 channels, strides 4 to 32) and random weights. Which pairs are needed is
decided by scores: those of

* the built-in set: detections and predicate probabilities of a trained model (--checkpoint, which
  `make demo` makes), its 100 best detections of any score;
* VRD: published detections of the test set (--vrd-detections, a COCO results file), padded to 100,
  with the frequencies of predicates in the training annotations (--vrd-annotations) as
  probabilities;
* all scores equal, and all within 0.9 and 1: the worst cases.

The big head does its full work for every pair asked for; its probabilities are then replaced by
those above, because an untrained head's say nothing. "Every ordered pair" is the plain way;
"every pair, union boxes once" shares what both orders of a pair have in common but leaves none out.

Example:
    python tools/benchmark.py inference --vrd-detections test_detections_rcnn.json \
        --vrd-annotations json_dataset/annotations_train.json
"""

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from benchmarks._inference_cases import (
    IMAGE_SIZE,
    NUMBER,
    Detections,
    alike_detections,
    toy_detections,
    vrd_detections,
)
from benchmarks.measure import (
    add_device_arguments,
    describe,
    peak_memory,
    print_table,
    seconds,
)
from torch import Tensor

import reldn_d2
from reldn_d2.modeling.relation_head import RelDNHead, build_relation_head
from reldn_d2.modeling.relation_head.pairs import candidate_pairs
from reldn_d2.modeling.relation_head.predictors import spatial_features
from reldn_d2.modeling.relation_head.topk import (
    TopTriplets,
    best_of_chunks,
    best_triplets,
    pairs_by_bound,
)
from reldn_d2.structures.box_ops import union_boxes

from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.structures import Boxes

STRIDES, CHANNELS = (4, 8, 16, 32), 256
DEMO_CHECKPOINT = Path("output/toy/seed_1/reldn/model_final.pth")  # of `make demo`
WAYS = ("every ordered pair", "every pair, union boxes once", "lazily")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark."""
    add_device_arguments(parser)
    parser.add_argument(
        "--checkpoint",
        type=Path,
        help=f"RelDN trained on the built-in set; default: the demo's, {DEMO_CHECKPOINT}",
    )
    parser.add_argument("--vrd-detections", type=Path, help="COCO results on VRD's test set")
    parser.add_argument("--vrd-annotations", type=Path, help="VRD's annotations_train.json")
    parser.add_argument(
        "--images", type=int, default=3, help="timed images of each case, evenly chosen"
    )
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
    cases = find_cases(args)
    count_pairs(cases, args.topk)
    time_ways(cases, args)
    if args.model:
        images_per_second(args)


def find_cases(args: argparse.Namespace) -> dict[str, list[Detections]]:
    """Detections by name of the case; what is left out, and how to have it, is printed."""
    cases: dict[str, list[Detections]] = {}
    checkpoint = args.checkpoint or (DEMO_CHECKPOINT if DEMO_CHECKPOINT.is_file() else None)
    if checkpoint:
        cases["built-in set, trained model"] = toy_detections(checkpoint, args.count_images)
    else:
        print(f"Left out, the built-in set: no {DEMO_CHECKPOINT} (make demo) and no --checkpoint.")
    if args.vrd_detections and args.vrd_annotations:
        for name, lowest in (("0.05", True), ("falling from its lowest to 0.05", False)):
            cases[f"VRD, padded with scores {name}"] = vrd_detections(
                args.vrd_detections, args.vrd_annotations, args.count_images, lowest
            )
    else:
        print("Left out, VRD: it needs --vrd-detections and --vrd-annotations.")
    cases["all scores equal"] = [alike_detections(1.0)]
    cases["all scores within 0.9 and 1"] = [alike_detections(0.9)]
    return cases


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


def feature_maps(device: str) -> dict[str, Tensor]:
    """Random FPN maps of one image padded to a multiple of 32."""
    torch.manual_seed(1)
    height, width = (-(-side // 32) * 32 for side in IMAGE_SIZE)
    return {
        f"p{i + 2}": torch.randn(1, CHANNELS, height // stride, width // stride, device=device)
        for i, stride in enumerate(STRIDES)
    }


def count_pairs(cases: dict[str, list[Detections]], topk: int) -> None:
    """Share of the ordered pairs that is computed, by the number k of predicates a pair."""
    rows = []
    for name, images in cases.items():
        for k in (1, 2, 0):
            shares, needed = [], []
            for image in images:
                best, num_scored = best_triplets(
                    lambda s, o, table=image.probabilities: table[s, o],
                    image.scores,
                    None,
                    IMAGE_SIZE,
                    num_predicates=image.probabilities.shape[-1],
                    predicates_per_pair=[k],
                    topk=topk,
                    chunk=2048,
                )
                pairs = len(image.scores) * (len(image.scores) - 1)
                bounds = image.scores[:, None] * image.scores
                bounds.fill_diagonal_(-1)
                shares.append(num_scored / pairs)
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
                IMAGE_SIZE,
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


def exhaustive_triplets(
    score_pairs, scores, boxes, image_size, *, num_predicates, predicates_per_pair, topk, chunk
):
    """Score every ordered pair by itself; arguments and result as of best_triplets."""
    pairs = candidate_pairs(scores.new_zeros((len(scores), 4)), False).nonzero()
    best = TopTriplets(predicates_per_pair, topk, num_predicates)
    chunks = (x.unbind(1) for x in pairs.split(chunk) if len(x))
    return best_of_chunks(chunks, best, score_pairs, scores, image_size)


def sharing_triplets(
    score_pairs, scores, boxes, image_size, *, num_predicates, predicates_per_pair, topk, chunk
):
    """Every pair, both orders in one chunk, so that their union box is pooled once."""
    best = TopTriplets(predicates_per_pair, topk, num_predicates)
    chunks = pairs_by_bound(scores.cpu(), boxes, chunk, first_chunk=chunk)
    return best_of_chunks(chunks, best, score_pairs, scores, image_size)


def time_ways(cases: dict[str, list[Detections]], args: argparse.Namespace) -> None:
    """Seconds and peak memory of the relation head, lazily and exhaustively, in one run."""
    torch.set_num_threads(args.threads)
    cuda = args.device.startswith("cuda")
    rows = []
    for precision in ("float32", "amp") if cuda else ("float32",):
        for name, images in cases.items():
            images = images[:: max(len(images) // args.images, 1)][: args.images]
            for k in (1, 0) if not name.startswith("all scores") else (1,):
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
    calls: dict[str, Callable[[], Any]], repeats: int, cuda: bool
) -> dict[str, list[float]]:
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
