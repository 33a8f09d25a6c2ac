"""Parameters of a predicate backbone that no used map depends on are not trained."""

import pytest
import torch
from model_utils import busy_item, model_of
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from reldn_d2.modeling.backbone import freeze_unused

from detectron2.utils.events import EventStorage


@pytest.fixture
def one_gloo_process(tmp_path):
    distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    yield
    distributed.destroy_process_group()


NARROW_RETINANET = (
    *("MODEL.BACKBONE.NAME", "build_retinanet_resnet_fpn_backbone"),
    *("MODEL.RESNETS.OUT_FEATURES", ["res3", "res4", "res5"], "MODEL.RESNETS.DEPTH", 50),
    *("MODEL.RESNETS.STEM_OUT_CHANNELS", 4, "MODEL.FPN.IN_FEATURES", ["res3", "res4", "res5"]),
    *("MODEL.RETINANET.IN_FEATURES", ["p3", "p4", "p5", "p6", "p7"]),
    *("MODEL.ANCHOR_GENERATOR.SIZES", [[8], [16], [32], [64], [128]]),
)


@pytest.mark.parametrize(
    "maps, frozen",
    [
        ([], {"top_block.p6", "top_block.p7"}),  # p3, p4 and p5, the maps up to stride 32
        (["p4"], {"top_block.p6", "top_block.p7", "fpn_output3", "fpn_lateral3", "fpn_output5"}),
        (["p4", "p5", "p6"], {"top_block.p7", "fpn_output3", "fpn_lateral3"}),
    ],
)
def test_freeze_unused_retinanet_fpn_trains_in_ddp(one_gloo_process, maps, frozen):
    """DDP raises in the second step if a trained parameter got no gradient in the first."""
    options = ("MODEL.ROI_RELATION_HEAD.IN_FEATURES", maps)
    model = model_of("retinanet_FPN", *NARROW_RETINANET, *options).train()
    body = model.predicate_backbone
    not_trained = {n for n, p in body.named_parameters() if not p.requires_grad}
    assert {n.rpartition(".")[0] for n in not_trained} == frozen
    wrapped = DistributedDataParallel(model, broadcast_buffers=False)
    for _ in range(2):
        with EventStorage():
            sum(wrapped([busy_item(0)]).values()).backward()
    missing = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert missing == []


class Maps(nn.Module):
    """Two maps that share the layer ``first``, which ``wrap`` calls."""

    def __init__(self, wrap=lambda layer, x: layer(x), channels=3, smallest=0):
        super().__init__()
        self.wrap, self.smallest = wrap, smallest
        self.first, self.norm = nn.Conv2d(channels, 4, 1), nn.BatchNorm2d(4)
        self.deep, self.side = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        if x.shape[-1] < self.smallest:
            raise ValueError("too small")
        x = self.norm(self.wrap(self.first, x))
        return {"deep": self.deep(x), "side": self.side(x)}


def frozen_parts(body):
    return {n.partition(".")[0] for n, p in body.named_parameters() if not p.requires_grad}


@pytest.mark.parametrize("channels", [1, 3])
def test_freeze_unused_any_backbone_leaves_no_trace(channels):
    body = Maps(channels=channels).train()
    body.side.eval()
    state = {name: x.clone() for name, x in body.state_dict().items()}
    with torch.no_grad():
        freeze_unused(body, ["deep"], channels)
    assert frozen_parts(body) == {"side"}
    assert all(torch.equal(x, state[name]) for name, x in body.state_dict().items())
    assert body.norm.training and not body.side.training
    assert all(p.grad is None for p in body.parameters())


def test_freeze_unused_activation_checkpointing_hides_nothing():
    def reentrant(layer, x):  # its parameters are not in the graph of the result
        return checkpoint(layer, x.requires_grad_(), use_reentrant=True)

    body = Maps(reentrant)
    freeze_unused(body, ["side"])
    assert frozen_parts(body) == {"deep"}


def test_freeze_unused_image_too_small_warns_and_freezes_nothing(caplog):
    body = Maps(smallest=1000)
    freeze_unused(body, ["deep"])
    assert frozen_parts(body) == set()
    assert "Maps of the predicate backbone cannot process an image of 64 x 64" in caplog.text
    assert "ValueError: too small" in caplog.text


def test_freeze_unused_frozen_backbone_stays_frozen(caplog):
    body = Maps().requires_grad_(False)
    freeze_unused(body, ["deep"])
    assert frozen_parts(body) == {"first", "norm", "deep", "side"} and not caplog.text
