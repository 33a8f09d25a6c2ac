"""Tests on a GPU; they are skipped without one. Run them alone with ``-m cuda``."""

import pytest
import torch
from benchmarks.host_reads import count_host_reads
from model_utils import busy_item, small_model, unrelated_item

from detectron2.utils.events import EventStorage

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

# Every candidate pair is sampled, so nothing depends on the random numbers of a device.
ALL_PAIRS = ("MODEL.RELDN.TRAIN_ENTITIES", "ground_truth") + tuple(
    x
    for name in ("PAIRS", "POSITIVE_PAIRS", "ANCHOR_POSITIVE_PAIRS", "ANCHOR_NEGATIVE_PAIRS")
    for x in (f"MODEL.ROI_RELATION_HEAD.SAMPLING.{name}", 10_000)
)


def one_label(batch):
    """Keep one predicate per pair: L0 draws one of several at random."""
    for x in batch:
        pairs = x["relations"].gt_pairs.tolist()
        x["relations"] = x["relations"][[i for i, p in enumerate(pairs) if p not in pairs[:i]]]
    return batch


def losses_of(model, batch, **autocast):
    model.train()
    torch.manual_seed(0)
    with EventStorage(1), torch.autocast("cuda", **autocast):
        losses = model(batch)
    sum(losses.values()).backward()
    return {name: x.item() for name, x in losses.items()}


@pytest.fixture
def exact_float32(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


@pytest.mark.parametrize("options", [(), ("MODEL.RELDN.DETECTOR_PRECISION", "float32")])
def test_losses_and_gradients_on_gpu_equal_cpu(options, exact_float32):
    model = small_model(*ALL_PAIRS, *options)
    batch = one_label([busy_item(0), busy_item(1), unrelated_item()])
    expected = losses_of(model, batch, enabled=False)
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    losses = losses_of(model.cuda(), batch, enabled=False)
    assert losses == pytest.approx(expected, rel=1e-4, abs=1e-5)
    for name, parameter in model.named_parameters():
        if name in gradients:
            tolerance = 1e-3 * gradients[name].abs().max().item() + 1e-7
            torch.testing.assert_close(
                parameter.grad.cpu(), gradients[name], rtol=0, atol=tolerance, msg=name
            )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_with_amp_are_close_to_float32(dtype):
    model = small_model(*ALL_PAIRS).cuda()
    batch = one_label([busy_item(0), busy_item(1)])
    expected = losses_of(model, batch, enabled=False)
    losses = losses_of(model, batch, dtype=dtype)
    assert losses == pytest.approx(expected, rel=0.1, abs=0.05)


def test_losses_detector_in_bf16_are_close_to_float32():
    model = small_model(*ALL_PAIRS).cuda()
    own = small_model(*ALL_PAIRS, "MODEL.RELDN.DETECTOR_PRECISION", "bf16").cuda()
    own.load_state_dict(model.state_dict())
    batch = one_label([busy_item(0), busy_item(1)])
    expected = losses_of(model, batch, enabled=False)
    assert losses_of(own, batch, enabled=False) == pytest.approx(expected, rel=0.1, abs=0.05)


def test_training_step_synchronizes_only_where_listed():
    from modeling.test_synchronizations import EXPECTED, training_step

    found = count_host_reads(training_step("cuda"), "cuda")
    # Images and ground truth are copied to the device as well.
    copies = (
        "detectron2/modeling/meta_arch/rcnn.py:preprocess_image",
        "detectron2/layers/wrappers.py:move_device_like",  # the same in Detectron2's main branch
        *("detectron2/structures/instances.py:to", "detectron2/structures/boxes.py:to"),
    )
    unexpected = {k: v for k, v in found.items() if k not in (*EXPECTED, *copies)}
    assert not unexpected


def _distributed_step(reference):
    from reldn_d2.engine.train_loop import create_ddp_model

    model = small_model(*ALL_PAIRS).cuda()
    wrapped = torch.nn.parallel.DistributedDataParallel(
        create_ddp_model(model), device_ids=[0], broadcast_buffers=False
    )
    batch = one_label([busy_item(0), busy_item(1)])
    assert losses_of(wrapped, batch, enabled=False) == pytest.approx(reference, rel=1e-4)
    missing = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing


def test_distributed_training_with_one_process_equals_plain(tmp_path):
    reference = losses_of(
        small_model(*ALL_PAIRS).cuda(), one_label([busy_item(0), busy_item(1)]), enabled=False
    )
    torch.distributed.init_process_group(
        "nccl", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1
    )
    try:
        _distributed_step(reference)
    finally:
        torch.distributed.destroy_process_group()
