"""Compute L1 + L2 + L3, forward and backward, against loops over anchors, classes, predicates.

Pairs of one image; half of them are positive, and a tenth of these have a second predicate. Both
sides have as many pairs, drawn independently. The loops are those of tools/benchmarks/plain.py,
which follow the released code.
"""

import argparse

import torch
from torch import Tensor

from reldn_d2.modeling.losses import AnchorSides, contrastive_losses

from .measure import print_table, time_calls
from .plain import losses_in_loops
from .synthetic import frequencies

__all__ = ["add_arguments", "draw_case", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--pairs", type=int, nargs="+", default=[256, 1000, 4000, 10000])
    parser.add_argument("--anchors", type=int, default=40, help="entities that are anchors")
    parser.add_argument("--predicates", type=int, default=50)
    parser.add_argument("--classes", type=int, default=150, help="entity classes")


def draw_case(
    num_pairs: int, anchors: int, num_predicates: int, num_classes: int, device: str, seed: int = 0
) -> dict:
    """Draw logits, labels and both sides of one image.

    Each side has ``num_pairs`` pairs of its own, so there are twice as many. The anchors are the
    first entities; there are just as many entities as the pairs need.
    """
    generator = torch.Generator().manual_seed(seed)
    entities = max(anchors, 2 + num_pairs // anchors)
    grid = torch.ones((anchors, entities), dtype=torch.bool).fill_diagonal_(False).nonzero()
    drawn = [grid[torch.randperm(len(grid), generator=generator)[:num_pairs]] for _ in range(2)]
    near, far = torch.cat(drawn).unbind(1)

    def draw(count: int, size: int) -> Tensor:
        return frequencies(count).multinomial(size, replacement=True, generator=generator)

    row = torch.arange(2 * num_pairs)
    labels = torch.zeros((len(row), num_predicates), dtype=torch.bool)
    positive = torch.rand(len(row), generator=generator) < 0.5
    second = positive & (torch.rand(len(row), generator=generator) < 0.1)
    labels[row, draw(num_predicates, len(row))] = positive
    labels[row, draw(num_predicates, len(row))] |= second
    logits = torch.randn((len(row), num_predicates + 1), generator=generator)
    logits[:, :-1] += frequencies(num_predicates).log()
    sampled = torch.stack([row < num_pairs, row >= num_pairs])
    sides = AnchorSides(
        sampled.to(device),
        torch.where(sampled, near, far).to(device),
        draw(num_classes, entities)[torch.where(sampled, far, near)].to(device),
    )
    return {
        "logits": logits.to(device),
        "labels": labels.to(device),
        "sides": sides,
        "anchor_image": torch.zeros(entities, dtype=torch.int64, device=device),
        "num_images": 1,
        "num_classes": num_classes,
        "normalization": "released_code",
    }


def run(args: argparse.Namespace) -> None:
    """Print a table per data type."""
    functions = {
        "here": lambda logits, **case: contrastive_losses(logits, **case)[0],
        "loops": losses_in_loops,
    }
    for dtype in [torch.float32] + [torch.bfloat16] * args.device.startswith("cuda"):
        rows = []
        for num_pairs in args.pairs:
            case = draw_case(num_pairs, args.anchors, args.predicates, args.classes, args.device)
            logits = case.pop("logits").to(dtype).requires_grad_()

            def step(name: str, logits=logits, case=case):
                return torch.autograd.grad(sum(functions[name](logits, **case)), logits)

            losses = [torch.stack(list(x(logits, **case))) for x in functions.values()]
            difference = (losses[0] - losses[1]).abs().max().item()
            times = time_calls({name: lambda name=name: step(name) for name in functions})
            here, loops = times["here"].wall, times["loops"].wall
            row = [num_pairs, f"{1e3 * loops:.1f}", f"{1e3 * here:.2f}", f"{loops / here:.0f} x"]
            rows.append([*row, f"{1e6 * here / num_pairs:.1f}", f"{difference:.1e}"])
        headers = ["pairs per side", "loops, ms", "here, ms", "loops / here", "here, us per pair"]
        title = f"L1 + L2 + L3, forward and backward, {dtype}"
        print_table(rows, [*headers, "largest difference"], title)
