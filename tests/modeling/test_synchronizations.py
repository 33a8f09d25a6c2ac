"""A training step reads values on the host only in the listed functions."""

import torch
from benchmarks.host_reads import count_host_reads
from model_utils import busy_item, small_model

from detectron2.utils.events import EventStorage

# Function and how often in a step of two images. Each makes the host wait for a GPU.
EXPECTED = {
    # Detectron2: the proposals of each image, and normalization of the images.
    "detectron2/modeling/proposal_generator/proposal_utils.py:find_top_rpn_proposals": None,
    "detectron2/layers/nms.py:batched_nms": None,
    # Entities of all images, their pooler's boxes by level.
    "reldn_d2/modeling/sampling.py:true_indices": 1,
    "reldn_d2/modeling/relation_head/poolers.py:forward": 2,
    # Pairs, once per image.
    "reldn_d2/modeling/relation_head/pair_sampling.py:from_masks": 2,
    # Union boxes of all images.
    "reldn_d2/modeling/relation_head/pairs.py:distinct_unions": 1,
}


def test_training_step_host_reads_are_the_listed_ones():
    model = small_model("MODEL.RELDN.MAPS_ON_DEMAND", False).train()

    def step():
        with EventStorage(1):
            sum(model([busy_item(0), busy_item(1)]).values()).backward()

    found = count_host_reads(step, "cpu")
    unexpected = {k: v for k, v in found.items() if k not in EXPECTED}
    assert not unexpected
    for name, count in EXPECTED.items():
        assert count is None or found[name] == count, (name, found[name])


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

    assert count_host_reads(call, "cpu") == {"elsewhere": 6}
