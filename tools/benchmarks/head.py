"""One training step of the relation head against its plain formulation, and peak memory.

An image of 800 x 1333 with FPN maps of 256 channels, 128 boxes around 16 ground-truth boxes that
hold 20 relations, and 512 + 256 + 256 sampled pairs for L0 and both sides of L1-L3. Both run the
same layers on the same pairs; the plain formulation (tools/benchmarks/plain.py) encodes subject,
object and union box of every pair anew, in a pass of its own for L0 and each side.
"""

import argparse
from collections.abc import Callable

import torch
from torch import Tensor, nn

from reldn_d2 import add_reldn_config
from reldn_d2.modeling.relation_head import RelDNHead, build_relation_head
from reldn_d2.structures.relations import ground_truth_relations

from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from .losses import frequencies
from .measure import add_device_arguments, describe, least_seconds, peak_memory, print_table
from .plain import plain_head_losses

__all__ = ["add_arguments", "build_head", "draw_batch", "run"]

SIZE = (800, 1333)
STRIDES = {"p2": 4, "p3": 8, "p4": 16, "p5": 32}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the benchmark's options."""
    add_device_arguments(parser)
    parser.add_argument("--boxes", type=int, default=128)
    parser.add_argument("--channels", type=int, default=256, help="of the feature maps")
    parser.add_argument("--fc-dim", type=int, default=1024, help="of the box heads")


def build_head(channels: int, fc_dim: int, device: str) -> nn.Module:
    """RelDN's head with 150 classes and 50 predicates, on FPN maps of these channels."""
    cfg = get_cfg()
    add_reldn_config(cfg)
    cfg.MODEL.ROI_HEADS.IN_FEATURES = list(STRIDES)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 150
    cfg.MODEL.ROI_BOX_HEAD.NAME = "FastRCNNConvFCHead"
    cfg.MODEL.ROI_BOX_HEAD.NUM_FC = 2
    cfg.MODEL.ROI_BOX_HEAD.FC_DIM = fc_dim
    cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION = 7
    cfg.MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO = 2
    cfg.MODEL.ROI_RELATION_HEAD.NUM_PREDICATES = 50
    cfg.MODEL.ROI_RELATION_HEAD.OVERLAP_FILTER = False
    cfg.MODEL.ROI_RELATION_HEAD.LOSS.NORMALIZATION = "released_code"
    shape = {name: ShapeSpec(channels=channels, stride=x) for name, x in STRIDES.items()}
    torch.manual_seed(0)
    head = build_relation_head(cfg, shape, shape).to(device)
    with torch.no_grad():  # uneven, like counted frequencies
        head.semantic.table.weight.normal_()
        head.semantic.table.weight[:, :-1] += frequencies(50).log().to(device)
    head.statistics_period = 10**9
    return head


def draw_batch(boxes: int, channels: int, device: str) -> tuple:
    """Feature maps of both backbones, entities and ground truth of one image."""
    generator = torch.Generator().manual_seed(0)

    def maps() -> dict[str, Tensor]:
        return {
            name: torch.randn(
                (1, channels, -(-SIZE[0] // x), -(-SIZE[1] // x)), generator=generator
            ).to(device)
            for name, x in STRIDES.items()
        }

    num_targets, num_relations = 16, 20
    low = torch.rand((num_targets, 2), generator=generator) * torch.tensor([900.0, 500.0])
    sides = 60 + 240 * torch.rand((num_targets, 2), generator=generator)
    targets = Instances(SIZE)
    targets.gt_boxes = Boxes(torch.cat([low, low + sides], dim=1).to(device))
    classes = frequencies(150).multinomial(num_targets, True, generator=generator)
    targets.gt_classes = classes.to(device)
    grid = torch.ones((num_targets, num_targets)).fill_diagonal_(0).nonzero()
    pairs = grid[torch.randperm(len(grid), generator=generator)[:num_relations]]
    predicates = frequencies(50).multinomial(num_relations, True, generator=generator)[:, None]
    relations = ground_truth_relations(torch.cat([pairs, predicates], dim=1).tolist(), SIZE)

    source = torch.arange(boxes) % num_targets
    shift = (torch.rand((boxes, 4), generator=generator) - 0.5) * sides.repeat(1, 2)[source] * 0.2
    entities = Instances(SIZE)
    entities.proposal_boxes = Boxes(targets.gt_boxes.tensor[source] + shift.to(device))
    entities.gt_classes = targets.gt_classes[source]
    predicate_maps = {name: x.requires_grad_() for name, x in maps().items()}
    return maps(), predicate_maps, [entities], [(targets, relations.to(device))]


def prepare_step(
    plain: bool, boxes: int, channels: int, fc_dim: int, device: str, dtype: str
) -> Callable[[], list[Tensor]]:
    """One training step, forward and backward; with the same seed both sample the same pairs.

    The gradients of the parameters stay from step to step, as they do in
    DistributedDataParallel's buckets; those of the feature maps are new each time.
    """
    head, batch = build_head(channels, fc_dim, device), draw_batch(boxes, channels, device)
    losses_of = plain_head_losses if plain else RelDNHead.forward
    autocast = torch.autocast(
        torch.device(device).type, torch.bfloat16, enabled=dtype == "bfloat16"
    )

    def step() -> list[Tensor]:
        torch.manual_seed(0)
        with EventStorage(1), autocast:
            losses = losses_of(head, *batch)
        sum(losses.values()).backward()
        for feature_map in batch[1].values():
            feature_map.grad = None
        return [x.detach() for x in losses.values()]

    return step


def run(args: argparse.Namespace) -> None:
    """Print the table."""
    print(describe(args.device, args.threads))
    dtypes = ["float32"] + (["bfloat16"] if args.device.startswith("cuda") else [])
    rows = []
    for dtype in dtypes:
        options = (args.boxes, args.channels, args.fc_dim, args.device, dtype)
        steps = {plain: prepare_step(plain, *options) for plain in (True, False)}
        losses = {plain: [x.item() for x in step()] for plain, step in steps.items()}
        difference = max(abs(a - b) for a, b in zip(*losses.values()))
        times = least_seconds(steps, args.threads, 3.0)
        del steps
        memory = {
            plain: peak_memory(
                prepare_step, plain, *options, device=args.device, threads=args.threads
            )
            for plain in (True, False)
        }
        for plain, name in ((True, "plain"), (False, "here")):
            rows.append([f"{name}, {dtype}", 1e3 * times[plain], memory[plain] / 2**20, ""])
        rows.append(
            ["plain / here", times[True] / times[False], memory[True] / memory[False], difference]
        )
    headers = ["one training step of the head", "ms", "peak memory, MiB", "largest difference"]
    print_table(rows, headers)
