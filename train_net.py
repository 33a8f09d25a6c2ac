#!/usr/bin/env python
"""Train or evaluate RelDN, or its detector, with Detectron2's arguments and ``--module``.

Examples::

    python train_net.py --config-file configs/Toy/reldn.yaml --num-gpus 1
    python train_net.py --config-file my_reldn.yaml --module my_head.py
"""

import sys

import reldn_d2  # isort: skip  registers everything, before Detectron2 is imported
from reldn_d2.engine import ProcessFailed, RelDNTrainer, check_device, check_run, launch
from reldn_d2.utils.included_configs import find_config_file
from reldn_d2.utils.programs import program_name
from reldn_d2.utils.user_modules import add_module_argument, parse_and_import

from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser, default_setup
from detectron2.evaluation import verify_results
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger


class Trainer(RelDNTrainer):
    """Override ``build_evaluator``, ``build_train_loader``, ... here, as with Detectron2's."""


def setup(args) -> CfgNode:
    """Build the config and set up logging and seeds."""
    cfg = reldn_d2.load_config(args.config_file, args.opts)
    cfg.freeze()
    check_run(cfg, eval_only=args.eval_only, resume=args.resume)
    default_setup(cfg, args)
    setup_logger(output=cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="reldn_d2")
    return cfg


def main(args):
    """Train or, with ``--eval-only``, evaluate."""
    cfg = setup(args)
    if args.eval_only:
        results = Trainer.evaluate_checkpoint(cfg, resume=args.resume)
        if comm.is_main_process():
            verify_results(cfg, results)
        return results
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


def invoke_main() -> None:
    """Run the command line; also the command ``reldn-train``."""
    parser = default_argument_parser()
    add_module_argument(parser)
    args = parse_and_import(parser)
    args.config_file = find_config_file(args.config_file)
    print("Command Line Args:", args)
    try:
        cfg = reldn_d2.load_config(args.config_file, args.opts)
        if not (args.config_file or cfg.DATASETS.TRAIN or cfg.DATASETS.TEST):
            raise ValueError(
                "No --config-file given; for instance --config-file configs/VRD/reldn_boxes.yaml"
            )
        check_device(cfg.MODEL.DEVICE, args.num_gpus)
        launch(
            main,
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(args,),
            on_cpu=cfg.MODEL.DEVICE == "cpu",
        )
    except (FileNotFoundError, ProcessFailed, ValueError) as error:
        sys.exit(f"{program_name(__file__)}: {error}")


if __name__ == "__main__":
    invoke_main()
