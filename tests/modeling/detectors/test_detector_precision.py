"""A detector in bfloat16 predicts float32 boxes and scores, and pools at unrounded coordinates."""

import numpy as np
import pytest
import torch
from model_utils import busy_item, model_of

from reldn_d2.modeling.precision import at_least_float32
from reldn_d2.structures.scene_graph import SceneGraph

from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes, Instances

BF16 = ("MODEL.RELDN.DETECTOR_PRECISION", "bf16")


@pytest.mark.parametrize("task", ["sgdet", "sgcls"])
@pytest.mark.parametrize("kind", ["mask_rcnn_FPN", "cascade_rcnn_FPN", "retinanet_FPN"])
def test_detector_in_bfloat16_result_is_float32(kind, task):
    model = model_of(kind, *BF16, "TEST.RELATIONS.TASK", task).eval()
    pooled_types, convolved_types = set(), set()
    for x in model.detector.modules():
        if isinstance(x, ROIPooler):
            x.register_forward_pre_hook(lambda _, inputs: pooled_types.add(inputs[0][0].dtype))
        if isinstance(x, torch.nn.Conv2d):
            x.register_forward_hook(lambda _, inputs, output: convolved_types.add(output.dtype))
    with torch.no_grad():
        (output,) = model([busy_item(0)])
    assert pooled_types == (set() if kind == "retinanet_FPN" else {torch.float32})
    assert convolved_types == {torch.bfloat16}
    instances, relations = output["instances"], output["relations"]
    for value in (*instances.get_fields().values(), *relations.get_fields().values()):
        value = value.tensor if isinstance(value, Boxes) else value
        assert value.dtype in (torch.float32, torch.int64, torch.bool)
    graph = SceneGraph.from_output("image", output)
    assert len(graph.scores) == len(relations) > 0
    assert np.isfinite(graph.box_scores).all()


def test_at_least_float32_nested_keeps_everything_else():
    half = torch.tensor([[1.0, 2.0, 3.0, 4.0]], dtype=torch.bfloat16)
    boxes = Boxes(torch.zeros(1, 4))
    boxes.tensor = half
    instances = Instances((4, 4), pred_boxes=boxes, scores=half[0, :1], names=["a"])
    (x,), y, double = at_least_float32([[instances], {"p2": half, "ids": torch.arange(2)}, 1.0])
    assert x.pred_boxes.tensor.dtype == x.scores.dtype == y["p2"].dtype == torch.float32
    assert x.names == ["a"] and x.image_size == (4, 4) and double == 1.0
    assert y["ids"].dtype == torch.int64 and at_least_float32(half.double()).dtype == torch.float64
