"""Run a training step of the relation head against its plain formulation: time and peak memory.

An image of 800 x 1333 with FPN maps of 256 channels, 128 boxes around 16 ground-truth boxes that
have 20 relations, and 512 + 256 + 256 sampled pairs for L0 and both sides of L1-L3. Both run the
same layers on the same pairs; the plain formulation (tools/benchmarks/plain.py) encodes subject,
object and union box of every pair again, in separate passes for L0 and each side.
"""

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

from reldn_d2.modeling.relation_head import RelDNHead
from reldn_d2.structures.relations import ground_truth_relations

from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from .measure import peak_memory, print_table, time_calls
from .plain import plain_head_losses
from .synthetic import Shapes, add_shape_arguments, build_head, feature_maps, frequencies

__all__ = ["add_arguments", "draw_batch", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    add_shape_arguments(parser)
    parser.add_argument("--boxes", type=int, default=128, help="boxes of the image")


def draw_batch(num_boxes: int, shapes: Shapes, device: str) -> tuple:
    """Draw feature maps of both backbones, entities and ground truth of one image."""
    generator, size = torch.Generator().manual_seed(0), shapes.size
    num_targets, num_relations = 16, 20
    low = torch.rand((num_targets, 2), generator=generator) * torch.tensor([900.0, 500.0])
    sides = 60 + 240 * torch.rand((num_targets, 2), generator=generator)
    targets = Instances(size)
    targets.gt_boxes = Boxes(torch.cat([low, low + sides], dim=1).to(device))
    classes = frequencies(150).multinomial(num_targets, True, generator=generator)
    targets.gt_classes = classes.to(device)
    grid = torch.ones((num_targets, num_targets)).fill_diagonal_(0).nonzero()
    pairs = grid[torch.randperm(len(grid), generator=generator)[:num_relations]]
    predicates = frequencies(50).multinomial(num_relations, True, generator=generator)[:, None]
    relations = ground_truth_relations(torch.cat([pairs, predicates], dim=1).tolist(), size)

    source = torch.arange(num_boxes) % num_targets
    noise = torch.rand((num_boxes, 4), generator=generator) - 0.5
    shift = noise * sides.repeat(1, 2)[source] * 0.2
    entities = Instances(size)
    entities.proposal_boxes = Boxes(targets.gt_boxes.tensor[source] + shift.to(device))
    entities.gt_classes = targets.gt_classes[source]
    entities.gt_index = torch.full_like(entities.gt_classes, -1)  # proposals
    maps, predicate_maps = (feature_maps(shapes, device, seed) for seed in (1, 2))
    predicate_maps = {name: x.requires_grad_() for name, x in predicate_maps.items()}
    return maps, predicate_maps, [entities], [(targets, relations.to(device))]


def prepare_step(
    plain: bool, num_boxes: int, shapes: Shapes, device: str, dtype: str
) -> Callable[[], list[Tensor]]:
    """Return a training step, forward and backward; the same pairs are sampled in each.

    The gradients of the parameters are kept from step to step, as in DistributedDataParallel's
    buckets; those of the feature maps are new in each step.
    """
    head, batch = build_head(shapes, device), draw_batch(num_boxes, shapes, device)
    losses_of = plain_head_losses if plain else RelDNHead.forward
    amp = torch.autocast(device.split(":")[0], torch.bfloat16, enabled=dtype == "bfloat16")

    def step() -> list[Tensor]:
        torch.manual_seed(0)
        with EventStorage(1), amp:
            losses = losses_of(head, *batch)
        sum(losses.values()).backward()
        for feature_map in batch[1].values():
            feature_map.grad = None
        return [x.detach() for x in losses.values()]

    return step


def run(args: argparse.Namespace) -> None:
    """Print the table."""
    rows = []
    for dtype in ["float32"] + ["bfloat16"] * args.device.startswith("cuda"):
        options = (args.boxes, Shapes.from_args(args), args.device, dtype)
        steps = {plain: prepare_step(plain, *options) for plain in (True, False)}
        losses = [torch.stack(step()) for step in steps.values()]
        difference = (losses[0] - losses[1]).abs().max().item()
        times = {plain: x.wall for plain, x in time_calls(steps, at_least=3.0).items()}
        del steps
        memory = {x: peak_memory(prepare_step, x, *options, device=args.device) for x in times}
        for plain, name in ((True, "plain"), (False, "here")):
            rows.append([f"{name}, {dtype}", f"{1e3 * times[plain]:.0f}", f"{memory[plain]:.0f}"])
        ratios = [f"{x[True] / x[False]:.1f} x" for x in (times, memory)]
        rows.append(["plain / here", *ratios, f"{difference:.1e}"])
    headers = ["training step of the head", "ms", "peak memory, MiB", "largest difference"]
    print_table(rows, headers)
