"""Names that no registry has: errors that tell of --module, for training and for checkpoints."""

import pytest
from model_utils import small_config
from usage_utils import write_checkpoint

from reldn_d2.engine import RelDNTrainer, check_run
from reldn_d2.predictor import RelationPredictor
from reldn_d2.utils.registry import explain_unregistered

from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY

pytestmark = pytest.mark.usefixtures("own_registrations")


def test_from_checkpoint_unregistered_backbone_tells_of_module(tmp_path):
    usual = BACKBONE_REGISTRY.get(small_config().MODEL.BACKBONE.NAME)
    BACKBONE_REGISTRY._obj_map["my_backbone"] = usual
    path = write_checkpoint(tmp_path, "MODEL.BACKBONE.NAME", "my_backbone")
    RelationPredictor.from_checkpoint(path, "cpu")
    del BACKBONE_REGISTRY._obj_map["my_backbone"]
    with pytest.raises(
        ValueError, match=f"{path}: its config names 'my_backbone', which the regis"
    ):
        RelationPredictor.from_checkpoint(path, "cpu")


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("MODEL.BACKBONE.NAME", "The config names 'mine', which the registry BACKBONE does not"),
        ("MODEL.META_ARCHITECTURE", "MODEL.META_ARCHITECTURE is 'mine'; known: .*RelDN"),
        ("MODEL.RELDN.DETECTOR", "MODEL.RELDN.DETECTOR is 'mine'; known: .*CascadeRCNNDetector"),
        ("MODEL.ROI_RELATION_HEAD.NAME", "ROI_RELATION_HEAD.NAME is 'mine'; known: RelDNHead"),
    ],
)
def test_training_unregistered_name_tells_of_module(key, message, tmp_path):
    cfg = small_config(key, "mine", "OUTPUT_DIR", str(tmp_path))
    with pytest.raises(ValueError, match=f"{message}.*--module"):
        check_run(cfg)
        RelDNTrainer.build_model(cfg)


def test_explain_unregistered_other_key_error_stays():
    with pytest.raises(KeyError, match="p7"), explain_unregistered("x"):
        raise KeyError("p7")
    with pytest.raises(ValueError, match="x names 'mine', which the registry META_ARCH does"):
        with explain_unregistered("x"):
            META_ARCH_REGISTRY.get("mine")
