#!/usr/bin/env python
"""Train or evaluate RelDN, or the detector it stands on, with Detectron2's arguments.

Example::

    python train_net.py --config-file configs/Toy/reldn.yaml --num-gpus 1
"""

import reldn_d2  # isort: skip  registers everything, before Detectron2 is imported
from reldn_d2.engine.defaults import RelDNTrainer
from reldn_d2.engine.launch import launch

from detectron2.config import CfgNode, get_cfg
from detectron2.engine import default_argument_parser, default_setup
from detectron2.evaluation import verify_results
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger


class Trainer(RelDNTrainer):
    """Override ``build_evaluator``, ``build_train_loader``, ... here, as with Detectron2's."""


def config(args) -> CfgNode:
    """Config from the file and the ``KEY VALUE`` options, frozen."""
    cfg = get_cfg()
    reldn_d2.add_reldn_config(cfg)
    reldn_d2.merge_config(cfg, args.config_file, args.opts)
    cfg.freeze()
    return cfg


def setup(args) -> CfgNode:
    """The config; logging and the generators set up."""
    cfg = config(args)
    default_setup(cfg, args)
    setup_logger(output=cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="reldn_d2")
    return cfg


def main(args):
    """Train, or with ``--eval-only`` evaluate."""
    cfg = setup(args)
    if args.eval_only:
        results = Trainer.evaluate_checkpoint(cfg, resume=args.resume)
        if comm.is_main_process():
            verify_results(cfg, results)
        return results
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


if __name__ == "__main__":
    arguments = default_argument_parser().parse_args()
    print("Command Line Args:", arguments)
    launch(
        main,
        arguments.num_gpus,
        num_machines=arguments.num_machines,
        machine_rank=arguments.machine_rank,
        dist_url=arguments.dist_url,
        args=(arguments,),
        on_cpu=config(arguments).MODEL.DEVICE == "cpu",
    )
