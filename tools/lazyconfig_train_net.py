#!/usr/bin/env python
r"""Train or evaluate a RelDN that a LazyConfig describes, with Detectron2's arguments.

Examples::

    python tools/lazyconfig_train_net.py --config-file configs/lazy/toy_reldn.py
    python tools/lazyconfig_train_net.py --config-file configs/lazy/toy_reldn.py --eval-only \
        train.init_checkpoint=output/toy/lazy_reldn/model_final.pth model.task=prdcls

The file has Detectron2's nodes: ``model``, ``dataloader``, ``optimizer``, ``lr_multiplier`` and
``train``. Loading it runs its code.
"""

import logging
import sys
from pathlib import Path

if not __package__:  # run as a file, perhaps without installation
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import reldn_d2  # noqa: E402,F401  # isort: skip  must be imported before Detectron2
from omegaconf import DictConfig
from torch import nn

from reldn_d2.checkpoint.reldn_checkpoint import RelDNCheckpointer
from reldn_d2.config import load_config
from reldn_d2.data.datasets.catalog import dataset_names
from reldn_d2.engine import (
    ProcessFailed,
    SeedEachIteration,
    StopOnSignal,
    build_simple_trainer,
    check_device,
    check_weights,
    create_ddp_model,
    ensure_frequency_table,
    launch,
)
from reldn_d2.modeling import RelDN
from reldn_d2.modeling.backbone import freeze_unused
from reldn_d2.utils.included_configs import find_config_file
from reldn_d2.utils.lazy_configs import build_node, is_lazy_config, load_lazy_config
from reldn_d2.utils.programs import program_help, program_name
from reldn_d2.utils.user_modules import add_module_argument, parse_and_import

from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser, default_setup, default_writers, hooks
from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

NODES = ("model", "dataloader", "optimizer", "lr_multiplier", "train")

logger = logging.getLogger("reldn_d2")


def load(path: str, overrides: list[str]) -> DictConfig:
    """Load the LazyConfig and check that it has all nodes.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a LazyConfig of RelDN, or cannot be loaded.
    """
    if not path:
        raise ValueError(
            "No --config-file given; for instance --config-file configs/lazy/toy_reldn.py"
        )
    if not is_lazy_config(path):
        raise ValueError(
            f"{path} is not a LazyConfig (.py); train_net.py (reldn-train) takes YAML files"
        )
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"No config file '{path}', neither below the current folder nor among the project's "
            "configs, such as configs/lazy/toy_reldn.py."
        )
    config = load_lazy_config(path, overrides, "--config-file")
    missing = [name for name in NODES if name not in config]
    if missing:
        raise ValueError(
            f"{path} has no {', '.join(missing)}; see configs/lazy/toy_reldn.py for all nodes"
        )
    return config


def build(config: DictConfig, path: str) -> RelDN:
    """Build the model and compare its numbers of classes and predicates with the datasets'.

    Raises:
        ValueError: if it is not a RelDN or they differ; the message names both.
    """
    model = build_node(config.model, f"{path}: model")
    if not isinstance(model, RelDN):
        raise ValueError(
            f"{path}: model is a {type(model).__name__}, not a RelDN; name a detector in "
            "MODEL.RELDN.DETECTOR_LAZY_CONFIG of a YAML instead"
        )
    head = model.relation_head
    for split in ("train", "test"):
        dataset = config.dataloader[split].dataset.names
        names = dataset_names(dataset)
        for field, where, count in (
            ("thing_classes", "detector", model.detector.num_classes),
            ("thing_classes", "relation_head", head.num_classes),
            ("predicate_classes", "relation_head", head.num_predicates),
        ):
            if field in names and len(names[field]) != count:
                raise ValueError(
                    f"{path}: model.{where} has {count} {field}, but the dataset '{dataset}' has "
                    f"{len(names[field])}"
                )
    backbone = model.predicate_backbone
    reads_images = backbone is not None and not hasattr(backbone, "shared_stages")
    if reads_images and hasattr(head, "in_features"):
        freeze_unused(backbone, head.in_features)
    return model.to(config.train.device)


def as_yaml_config(config: DictConfig, model: RelDN) -> CfgNode:
    """Return the keys that the shared parts of the trainer read."""
    cfg = load_config()
    cfg.MODEL.DEVICE = config.train.device
    cfg.SOLVER.AMP.ENABLED = bool(config.train.amp.enabled)
    cfg.DATASETS.TRAIN = (config.dataloader.train.dataset.names,)
    cfg.DATASETS.TEST = (config.dataloader.test.dataset.names,)
    cfg.MODEL.ROI_RELATION_HEAD.OVERLAP_FILTER = model.relation_head.overlap_filter
    return cfg


def checkpointer_of(config: DictConfig, model: nn.Module, **kwargs) -> RelDNCheckpointer:
    """Return a checkpointer that writes the names of the training set."""
    dataset = config.dataloader.train.dataset.names
    names = dataset_names(dataset)
    return RelDNCheckpointer(
        model,
        config.train.output_dir,
        names_owner=f"dataset '{dataset}'",
        thing_classes=names.get("thing_classes"),
        predicate_classes=names.get("predicate_classes"),
        **kwargs,
    )


def evaluate(config: DictConfig, model: nn.Module) -> dict:
    """Evaluate on the test set, if the config has an evaluator."""
    if config.dataloader.evaluator is None:
        return {}
    loader = build_node(config.dataloader.test, "dataloader.test")
    evaluator = build_node(config.dataloader.evaluator, "dataloader.evaluator")
    results = inference_on_dataset(model, loader, evaluator)
    print_csv_format(results)
    return results


def train(config: DictConfig, model: RelDN, resume: bool) -> None:
    """Train as Detectron2's tool does, with RelDN's checkpoints and frequency table."""
    cfg = as_yaml_config(config, model)
    config.optimizer.params.model = model
    optimizer = build_node(config.optimizer, "optimizer")
    config.optimizer.params.pop("model")
    loader = build_node(config.dataloader.train, "dataloader.train")
    wrapped = create_ddp_model(model)
    trainer = build_simple_trainer(cfg, wrapped, loader, optimizer)
    checkpointer = checkpointer_of(config, wrapped, trainer=trainer)
    multiplier = build_node(config.lr_multiplier, "lr_multiplier")
    options = config.train.checkpointer
    main = comm.is_main_process()
    stop_on_signal = StopOnSignal(wrapped, checkpointer)
    parts = [
        SeedEachIteration(lambda: config.train.seed),
        hooks.IterationTimer(),
        hooks.LRScheduler(scheduler=multiplier),
        (
            hooks.PeriodicCheckpointer(
                checkpointer, options.period, max_to_keep=options.max_to_keep
            )
            if main
            else None
        ),
        stop_on_signal,
        hooks.EvalHook(config.train.eval_period, lambda: evaluate(config, wrapped)),
        (
            hooks.PeriodicWriter(
                default_writers(config.train.output_dir, config.train.max_iter),
                period=config.train.log_period,
            )
            if main
            else None
        ),
    ]
    trainer.register_hooks(parts)
    checkpointer.resume_or_load(config.train.init_checkpoint, resume=resume)
    resumed = resume and checkpointer.has_checkpoint()
    start = trainer.iter + 1 if resumed else 0
    ensure_frequency_table(cfg, wrapped, "resumed" if resumed else "new")
    try:
        trainer.train(start, config.train.max_iter)
    finally:
        stop_on_signal.restore_handlers()


def main(args):
    """Train or, with ``--eval-only``, evaluate ``train.init_checkpoint``."""
    config = load(args.config_file, args.opts)
    default_setup(config, args)
    setup_logger(output=config.train.output_dir, distributed_rank=comm.get_rank(), name="reldn_d2")
    model = build(config, args.config_file)
    options = config.train
    key = "train.init_checkpoint"
    check_weights(options.init_checkpoint, options.output_dir, args.resume, key)
    if not args.eval_only:
        return train(config, model, args.resume)
    checkpointer = checkpointer_of(config, model, complete=True)
    checkpointer.resume_or_load(config.train.init_checkpoint, resume=args.resume)
    if checkpointer.started_from_detector:
        logger.warning(
            f"train.init_checkpoint ({config.train.init_checkpoint}) is a detector: the relation "
            "head is untrained."
        )
    ensure_frequency_table(as_yaml_config(config, model), model)
    return evaluate(config, create_ddp_model(model))


def invoke_main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = default_argument_parser(epilog=program_help(__doc__, __file__))
    add_module_argument(parser)
    args = parse_and_import(parser, arguments)
    args.config_file = find_config_file(args.config_file)
    try:
        config = load(args.config_file, args.opts)
        check_device(config.train.device, args.num_gpus, "train.device")
        launch(
            main,
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(args,),
            on_cpu=config.train.device == "cpu",
        )
    except (FileNotFoundError, ProcessFailed, ValueError) as error:
        print(f"{program_name(__file__)}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(invoke_main())
