"""Training in two processes: none waits forever, and the gradients equal those of one process."""

from datetime import timedelta

import pytest
import torch
from model_utils import busy_item, empty_item, item, small_model, unrelated_item
from torch import distributed, multiprocessing
from torch.nn.parallel import DistributedDataParallel

from detectron2.utils.events import EventStorage

HEAD = "MODEL.ROI_RELATION_HEAD"
# Every pair is sampled and BatchNorm is frozen, so that nothing depends on the batch.
OPTIONS = (
    *(f"{HEAD}.SAMPLING.PAIRS", 10_000, f"{HEAD}.SAMPLING.POSITIVE_PAIRS", 5_000),
    *(f"{HEAD}.SAMPLING.ANCHOR_POSITIVE_PAIRS", 5_000),
    *(f"{HEAD}.SAMPLING.ANCHOR_NEGATIVE_PAIRS", 5_000),
    *("MODEL.RESNETS.NORM", "FrozenBN"),
)
STEPS = 3


def batches():
    """Images of both processes per step; the second process never sees a relation."""
    related = busy_item(0)
    single = item(
        related["instances"].gt_boxes.tensor.tolist(),
        related["instances"].gt_classes.tolist(),
        [(0, 1, 0), (1, 3, 3), (2, 3, 3), (3, 2, 4)],  # one predicate per pair: nothing is random
    )
    return [(single, unrelated_item()), (single, empty_item()), (unrelated_item(), empty_item())]


def train(model, steps):
    """Return the gradients after each step by name."""
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    gradients = []
    for iteration, batch in enumerate(steps):
        optimizer.zero_grad()
        with EventStorage(iteration):
            losses = model(batch)
        sum(losses.values()).backward()
        gradients.append(
            {
                name.removeprefix("module."): parameter.grad.clone()
                for name, parameter in model.named_parameters()
                if parameter.requires_grad
            }
        )
        optimizer.step()
    return gradients


def train_in_process(rank, folder, l0_mean):
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=2,
        timeout=timedelta(minutes=3),
    )
    model = small_model(*OPTIONS, f"{HEAD}.LOSS.L0_MEAN", l0_mean)
    model = DistributedDataParallel(model, broadcast_buffers=False)
    gradients = train(model, [[images[rank]] for images in batches()])
    if rank == 0:
        torch.save(gradients, f"{folder}/gradients.pth")
    distributed.barrier()
    distributed.destroy_process_group()


@pytest.mark.parametrize("l0_mean", ["images", "pairs"])
def test_ddp_two_processes_gradients_equal_one_process(tmp_path, l0_mean):
    multiprocessing.spawn(train_in_process, (str(tmp_path), l0_mean), nprocs=2)
    together = torch.load(tmp_path / "gradients.pth", weights_only=True)
    model = small_model(*OPTIONS, f"{HEAD}.LOSS.L0_MEAN", l0_mean)
    alone = train(model, [list(images) for images in batches()])
    assert len(together) == len(alone) == STEPS
    for two, one in zip(together, alone):
        assert set(two) == set(one)
        for name, gradient in one.items():
            difference = float((two[name] - gradient).abs().max())
            # Sums in float32 over one process and over two differ in their order.
            assert difference <= 5e-5 * float(gradient.abs().max()), name
    # The losses reach all of the predicate backbone.
    largest = {name: float(x.abs().max()) for name, x in alone[0].items()}
    assert all(value > 0 for name, value in largest.items() if "res4" in name)


@pytest.mark.parametrize("step", range(STEPS))
def test_batches_differ_between_processes(step):
    first, second = batches()[step]
    assert len(second["relations"]) == 0
    assert (len(first["relations"]) > 0) == (step < 2)
