"""Names that no registry has: errors that tell of --module, for training and for checkpoints."""

from dataclasses import replace

import pytest
import torch
from model_utils import small_config
from registrations import restored_registries
from usage_utils import picture, write_checkpoint

from reldn_d2.engine import RelDNTrainer, check_run
from reldn_d2.modeling import (
    PAIR_SAMPLER_REGISTRY,
    RELATION_LOSS_REGISTRY,
    RELATION_PREDICTOR_REGISTRY,
    PredicateLoss,
    RelDNPairSampler,
    RelDNPredictor,
)
from reldn_d2.predictor import RelationPredictor
from reldn_d2.utils import user_modules
from reldn_d2.utils.protocols import PROTOCOL_REGISTRY, find_protocol
from reldn_d2.utils.registry import explain_missing_keys, explain_unregistered

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
        ("MODEL.ROI_RELATION_HEAD.NAME", "ROI_RELATION_HEAD.NAME is 'mine'; known: .*RelDNHead"),
    ],
)
def test_training_unregistered_name_tells_of_module(key, message, tmp_path):
    cfg = small_config(key, "mine", "OUTPUT_DIR", str(tmp_path))
    with pytest.raises(ValueError, match=f"{message}.*--module"):
        check_run(cfg)
        RelDNTrainer.build_model(cfg)


def test_explain_unregistered_other_key_error_stays():
    with pytest.raises(KeyError, match="p7"), explain_unregistered():
        raise KeyError("p7")
    with pytest.raises(
        ValueError, match="^The config names 'mine', which the registry META_ARCH does"
    ):
        with explain_unregistered():
            META_ARCH_REGISTRY.get("mine")


@pytest.mark.parametrize(
    ("key", "name", "similar"),
    [
        ("MODEL.BACKBONE.NAME", "build_resnet_fpn_backbon", "build_resnet_fpn_backbone"),
        ("MODEL.META_ARCHITECTURE", "RelDn", "RelDN"),
        ("MODEL.RELDN.DETECTOR", "PreComputedDetector", "PrecomputedDetector"),
        ("MODEL.ROI_RELATION_HEAD.NAME", "RelDNHaed", "RelDNHead"),
        ("MODEL.ROI_RELATION_HEAD.PREDICTOR", "reldnpredictor", "RelDNPredictor"),
        ("MODEL.ROI_RELATION_HEAD.CONTEXT.NAME", "LstmContext", "LSTMContext"),
        ("MODEL.ROI_RELATION_HEAD.SAMPLING.NAME", "RelDNPairSample", "RelDNPairSampler"),
        ("MODEL.ROI_RELATION_HEAD.LOSS.NAMES", ["PredicatLoss"], "PredicateLoss"),
        ("TEST.RELATIONS.PROTOCOL", "motif", "motifs"),
    ],
)
def test_build_misspelled_name_suggests_the_right_one(key, name, similar, tmp_path):
    cfg = small_config(key, name, "OUTPUT_DIR", str(tmp_path))
    with pytest.raises(ValueError, match=f"Did you mean .*{similar}.*--module"):
        RelDNTrainer.build_model(cfg)
        find_protocol(cfg.TEST.RELATIONS.PROTOCOL)


def test_build_part_reads_unregistered_key_names_it_and_the_function():
    class FocalLoss(PredicateLoss):
        def __init__(self, cfg):
            self.gamma = cfg.MODEL.ROI_RELATION_HEAD.LOSS.FOCAL_GAMMA

    RELATION_LOSS_REGISTRY._obj_map["FocalLoss"] = FocalLoss
    cfg = small_config("MODEL.ROI_RELATION_HEAD.LOSS.NAMES", ["FocalLoss"])
    message = (
        r"MODEL.ROI_RELATION_HEAD.LOSS.NAMES 'FocalLoss' reads the config key "
        r"MODEL.ROI_RELATION_HEAD.LOSS.FOCAL_GAMMA, which .*reldn_d2.register_config_keys"
    )
    with pytest.raises(ValueError, match=message):
        RelDNTrainer.build_model(cfg)


def test_build_backbone_reads_misspelled_key_suggests_the_right_one():
    BACKBONE_REGISTRY._obj_map["mine"] = lambda cfg, shape: cfg.MODEL.RESNETS.DEPTHS
    with pytest.raises(ValueError, match="The model reads .* MODEL.RESNETS.DEPTHS, .* mean DEPTH?"):
        RelDNTrainer.build_model(small_config("MODEL.BACKBONE.NAME", "mine"))


def test_explain_missing_keys_other_attribute_error_stays():
    with pytest.raises(AttributeError), explain_missing_keys(small_config(), "x"):
        getattr([], "size")  # noqa: B009


def register_own_parts() -> None:
    """Register a protocol, a sampler, a loss with a parameter, and a classifier."""
    motifs = PROTOCOL_REGISTRY["motifs"]
    PROTOCOL_REGISTRY.register(
        replace(motifs, name="mine", evaluator_type=None, predicates_per_pair=(3,))
    )
    PAIR_SAMPLER_REGISTRY._obj_map["MySampler"] = RelDNPairSampler
    RELATION_LOSS_REGISTRY._obj_map["MyLoss"] = LossWithWeight
    RELATION_PREDICTOR_REGISTRY._obj_map["MyPredictor"] = RelDNPredictor


class LossWithWeight(PredicateLoss):
    def __init__(self, cfg):
        super().__init__(cfg)
        self.weight = torch.nn.Parameter(torch.ones(2))


def test_from_checkpoint_own_training_parts_are_not_needed(tmp_path, caplog):
    head = "MODEL.ROI_RELATION_HEAD"
    own = (f"{head}.SAMPLING.NAME", "MySampler", f"{head}.LOSS.NAMES", ["MyLoss"])
    own += ("TEST.RELATIONS.PROTOCOL", "mine", "TEST.RELATIONS.PREDICATES_PER_PAIR", [])
    with restored_registries():
        register_own_parts()
        path = write_checkpoint(tmp_path, *own)
    with caplog.at_level("INFO", logger="reldn_d2"):
        predictor = RelationPredictor.from_checkpoint(path, "cpu")
    assert predictor.model.relation_head.predicates_per_pair == (3,)
    expected = "does without its protocol 'mine', pair sampler 'MySampler', loss 'MyLoss', which"
    assert caplog.text.count(expected) == 1
    assert len(predictor(picture()).boxes) > 0
    with pytest.raises(ValueError, match="Unknown protocol 'mine'"):
        RelationPredictor.from_checkpoint(path, "cpu", opts=["TEST.RELATIONS.PROTOCOL", "mine"])


def test_from_checkpoint_missing_classifier_names_file_and_module(tmp_path):
    with restored_registries():
        register_own_parts()
        user_modules._imported["my_package.my_parts"] = None
        path = write_checkpoint(tmp_path, "MODEL.ROI_RELATION_HEAD.PREDICTOR", "MyPredictor")
    message = (
        f"^{path}: MODEL.ROI_RELATION_HEAD.PREDICTOR is 'MyPredictor'; known: .*"
        "It was written with --module my_package.my_parts"
    )
    with pytest.raises(ValueError, match=message):
        RelationPredictor.from_checkpoint(path, "cpu")
