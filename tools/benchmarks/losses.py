"""L1 + L2 + L3, forward and backward, against loops over anchors, classes and predicates.

Pairs of one image; half of them are positive, of which a tenth carry a second predicate. Classes,
labels and predictions are as unevenly distributed as in scene graphs, where the n-th most frequent
one is about 1/n as frequent as the first. Both sides take as many pairs, drawn independently. The
loops are those of tools/benchmarks/plain.py, in the manner of the released code.
"""

import argparse

import torch
from torch import Tensor

from reldn_d2.modeling.losses import AnchorSides, contrastive_losses

from .measure import add_device_arguments, describe, least_seconds, print_table
from .plain import losses_in_loops

__all__ = ["add_arguments", "draw_case", "frequencies", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the benchmark's options."""
    add_device_arguments(parser)
    parser.add_argument("--pairs", type=int, nargs="+", default=[256, 1000, 4000, 10000])
    parser.add_argument("--anchors", type=int, default=40, help="entities that are anchors")
    parser.add_argument("--predicates", type=int, default=50)
    parser.add_argument("--classes", type=int, default=150, help="entity classes")


def frequencies(number: int) -> Tensor:
    """1, 1/2, 1/3, ..."""
    return 1.0 / torch.arange(1, number + 1)


def draw_case(
    pairs: int, anchors: int, predicates: int, classes: int, device: str, seed: int = 0
) -> dict:
    """Random logits, labels and both sides of one image.

    Each side has ``pairs`` pairs of its own, so that there are twice as many. The anchors are the
    first entities; there are just as many entities as the pairs need.
    """
    generator = torch.Generator().manual_seed(seed)
    entities = max(anchors, 2 + pairs // anchors)
    grid = torch.ones((anchors, entities), dtype=torch.bool).fill_diagonal_(False).nonzero()
    drawn = [grid[torch.randperm(len(grid), generator=generator)[:pairs]] for _ in range(2)]
    near, far = torch.cat(drawn).unbind(1)

    def draw(number: int, size: int) -> Tensor:
        return frequencies(number).multinomial(size, replacement=True, generator=generator)

    row = torch.arange(2 * pairs)
    labels = torch.zeros((2 * pairs, predicates), dtype=torch.bool)
    positive = torch.rand(2 * pairs, generator=generator) < 0.5
    second = positive & (torch.rand(2 * pairs, generator=generator) < 0.1)
    labels[row, draw(predicates, 2 * pairs)] = positive
    labels[row, draw(predicates, 2 * pairs)] |= second
    logits = torch.randn((2 * pairs, predicates + 1), generator=generator)
    logits[:, :-1] += frequencies(predicates).log()
    sampled = torch.stack([row < pairs, row >= pairs])
    sides = AnchorSides(
        sampled.to(device),
        torch.where(sampled, near, far).to(device),
        draw(classes, entities)[torch.where(sampled, far, near)].to(device),
    )
    return {
        "logits": logits.to(device),
        "labels": labels.to(device),
        "sides": sides,
        "anchor_image": torch.zeros(entities, dtype=torch.int64, device=device),
        "num_images": 1,
        "num_classes": classes,
        "normalization": "released_code",
    }


def run(args: argparse.Namespace) -> None:
    """Print the table."""
    print(describe(args.device, args.threads))
    dtypes = [torch.float32] + ([torch.bfloat16] if args.device.startswith("cuda") else [])
    for dtype in dtypes:
        rows: list[list] = []
        for pairs in args.pairs:
            case = draw_case(pairs, args.anchors, args.predicates, args.classes, args.device)
            logits = case.pop("logits").to(dtype).requires_grad_()

            def ours(case=case, logits=logits):
                losses, _ = contrastive_losses(logits, **case)
                torch.autograd.grad(sum(losses), logits)
                return losses

            def loops(case=case, logits=logits):
                losses = losses_in_loops(logits, **case)
                torch.autograd.grad(sum(losses), logits)
                return losses

            with torch.no_grad():
                difference = max(
                    float((a - b).abs())
                    for a, b in zip(
                        contrastive_losses(logits, **case)[0], losses_in_loops(logits, **case)
                    )
                )
            times = least_seconds({"here": ours, "loops": loops}, args.threads, 2.0)
            fast, slow = times["here"], times["loops"]
            rows.append(
                [
                    pairs,
                    1e3 * slow,
                    1e3 * fast,
                    f"{slow / fast:.0f}x",
                    1e6 * fast / pairs,
                    difference,
                ]
            )
        headers = [
            "pairs a side",
            "loops, ms",
            "here, ms",
            "faster",
            "here, us a pair",
            "difference",
        ]
        print_table(rows, headers, f"L1 + L2 + L3, forward and backward, {dtype}")
