"""A training step reads values on the host only in the listed functions."""

import torch
from benchmarks.host_reads import count_host_reads
from model_utils import busy_item, small_config, small_model

from reldn_d2.engine.optimizer import build_optimizer

from detectron2.utils.events import EventStorage

# Function and how often in a step of two images. Each makes the host wait for a GPU.
EXPECTED = {
    # Detectron2's proposals of each image: whether they are finite and none is empty; suppression.
    "detectron2/modeling/proposal_generator/proposal_utils.py:find_top_rpn_proposals": 4,
    "detectron2/structures/boxes.py:clip": 2,
    "detectron2/layers/nms.py:batched_nms": 2,
    # Entities of all images, their pooler's boxes by level.
    "reldn_d2/modeling/sampling.py:true_indices": 1,
    "reldn_d2/modeling/relation_head/poolers.py:forward": 2,
    # Pairs, once per image.
    "reldn_d2/modeling/relation_head/pair_sampling.py:from_masks": 2,
    # Union boxes of all images.
    "reldn_d2/modeling/relation_head/pairs.py:distinct_unions": 1,
}
# Tensors that are on the CPU with a GPU, too: sizes of images.
EXPECTED_ON_CPU = {"detectron2/structures/image_list.py:from_tensors": 2}
# As in the configs of the paper's experiments: frozen stages are shared, and SGD.
OPTIONS = (
    *("MODEL.BACKBONE.FREEZE_AT", 2, "MODEL.RESNETS.NORM", "FrozenBN"),
    *("MODEL.RELDN.TRAIN_ENTITIES", "proposals", "MODEL.RELDN.MAPS_ON_DEMAND", False),
    *("SOLVER.OPTIMIZER", "SGD"),
)


def training_step(device="cpu"):
    """Return a call that runs a step with its optimizer, of a model that shares frozen stages."""
    cfg, model = small_config(*OPTIONS), small_model(*OPTIONS).to(device).train()
    model.predicate_backbone.load_state_dict(model.detector.backbone.state_dict(), strict=False)
    optimizer = build_optimizer(cfg, model)

    def step():
        with EventStorage(1):
            sum(model([busy_item(0), busy_item(1)]).values()).backward()
        optimizer.step()

    step()  # compares the frozen stages
    assert model._later_backbone().shared_stages == ("res2",)
    return step


def test_training_step_host_reads_are_the_listed_ones():
    assert count_host_reads(training_step(), "cpu") == {**EXPECTED, **EXPECTED_ON_CPU}


def test_count_host_reads_finds_each_kind():
    x, mask = torch.arange(4), torch.tensor([True, False, True, False])

    def call():
        x.tolist()
        mask.nonzero()
        x[mask]
        if x.sum() > 0:
            int(x[0])
        x.repeat_interleave(x)
        x.repeat_interleave(x, output_size=6)  # no read
        torch.equal(x, x.clone())
        x.sum().item()
        torch.allclose(x, x.clone())
        if torch.is_nonzero(x[0]):
            pass

    assert count_host_reads(call, "cpu") == {"elsewhere": 10}
