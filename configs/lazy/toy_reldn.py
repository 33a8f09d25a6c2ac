"""RelDN with all four losses on the built-in dataset, as configs/Toy/reldn.yaml."""

import torch
from fvcore.common.param_scheduler import CosineParamScheduler

from reldn_d2.data.dataset_mapper import RelationDatasetMapper
from reldn_d2.engine.optimizer import relation_parameter_groups
from reldn_d2.evaluation.relation_evaluation import RelationDatasetEvaluator
from reldn_d2.modeling import (
    ContrastiveLosses,
    GeneralizedRCNNDetector,
    PredicateLoss,
    RelDN,
    RelDNHead,
    RelDNPairSampler,
    RelDNPredictor,
)
from reldn_d2.modeling.relation_head.predictors import (
    SemanticModule,
    SpatialModule,
    VisualModule,
    without_last_relu,
)

from detectron2.config import LazyCall as L
from detectron2.data import (
    build_detection_test_loader,
    build_detection_train_loader,
    get_detection_dataset_dicts,
)
from detectron2.data import transforms as T
from detectron2.solver import WarmupParamScheduler

from .toy_detector import model as detector

box_head = L(without_last_relu)(box_head=detector.roi_heads.box_head)

model = L(RelDN)(
    detector=L(GeneralizedRCNNDetector)(model=detector),
    predicate_backbone=detector.backbone,  # a second one, which starts from the detector's weights
    relation_head=L(RelDNHead)(
        num_classes=9,
        num_predicates=6,
        in_features=["p2", "p3", "p4"],
        entity_pooler=detector.roi_heads.box_pooler,
        predicate_pooler=detector.roi_heads.box_pooler,
        subject_box_head=box_head,
        object_box_head=box_head,
        predicate_box_head=box_head,
        vector_size=256,
        predictor=L(RelDNPredictor)(
            semantic=L(SemanticModule)(
                num_classes="${...num_classes}", num_predicates="${...num_predicates}"
            ),
            spatial=L(SpatialModule)(num_predicates="${...num_predicates}"),
            visual=L(VisualModule)(
                vector_size="${...vector_size}", num_predicates="${...num_predicates}"
            ),
        ),
        sampler=L(RelDNPairSampler)(
            num_pairs=16, num_positive=4, num_anchor_positive=8, num_anchor_negative=8
        ),
        losses=L("builtins.dict")(
            PredicateLoss=L(PredicateLoss)(),
            ContrastiveLosses=L(ContrastiveLosses)(num_classes="${...num_classes}"),
        ),
        overlap_filter=False,
    ),
    train_entities="ground_truth",
    task="sgdet",
)

resize = L(T.ResizeShortestEdge)(short_edge_length=160, max_size=160)
dataloader = dict(
    train=L(build_detection_train_loader)(
        dataset=L(get_detection_dataset_dicts)(names="toy_vrd_train"),
        mapper=L(RelationDatasetMapper)(
            is_train=True, augmentations=[resize, L(T.RandomFlip)()], image_format="BGR"
        ),
        total_batch_size=4,
        num_workers=0,
    ),
    test=L(build_detection_test_loader)(
        dataset=L(get_detection_dataset_dicts)(names="toy_vrd_test", filter_empty=False),
        mapper=L(RelationDatasetMapper)(is_train=False, augmentations=[resize], image_format="BGR"),
        num_workers=0,
    ),
    evaluator=L(RelationDatasetEvaluator)(
        dataset_name="${..test.dataset.names}", task="${model.task}"
    ),
)

optimizer = L(torch.optim.AdamW)(
    params=L(relation_parameter_groups)(
        base_lr="${..lr}", backbone_multiplier=1.0, weight_decay="${..weight_decay}"
    ),
    lr=0.001,
    weight_decay=0.0001,
)

lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(CosineParamScheduler)(start_value=1.0, end_value=0.0),
    warmup_length=0.1,
    warmup_factor=0.001,
)

train = dict(
    output_dir="output/toy/lazy_reldn",
    init_checkpoint="output/toy/detector/model_final.pth",
    max_iter=500,
    amp=dict(enabled=False),
    checkpointer=dict(period=100000, max_to_keep=10),
    eval_period=0,
    log_period=20,
    device="cpu",
    seed=1,
)
