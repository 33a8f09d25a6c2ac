"""One training step on drawn images, timed by stage; the worker of benchmarks/training.py.

It runs in a process of its own, because two checkouts of the package cannot be imported in one. It
reads names of the package tolerantly, so that an older checkout can be measured too.
"""

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import reldn_d2
from reldn_d2.checkpoint.reldn_checkpoint import initialize_relation_branch
from reldn_d2.engine.optimizer import build_optimizer
from reldn_d2.modeling import meta_arch
from reldn_d2.modeling.relation_head import head_base

try:
    from reldn_d2.utils.memory import keep_freed_memory
except ImportError:  # an older checkout
    keep_freed_memory = None

from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from .host_reads import count_host_reads
from .measure import memory_of_call, set_up
from .synthetic import boxes_near, draw_images

__all__ = ["STAGES", "TrainingStep", "serve"]

STAGES = (
    *("detector backbone", "proposals", "predicate backbone", "matching and sampling"),
    *("entity heads", "union heads", "pair classifier", "losses", "backward", "optimizer"),
)
_PRECISIONS = {"float32": None, "bf16": torch.bfloat16}


class StageClock:
    """Adds up the time that stages take, each without the stages that run inside it.

    On a GPU the time is that between two events, so that nothing waits for the device.
    """

    def __init__(self, on_gpu: bool):
        self.on_gpu = on_gpu
        self.marks: list[tuple[str, Any]] = []  # stage that begins, and when
        self.running = ["other"]

    def _mark(self) -> None:
        if self.on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append((self.running[-1], event))
        else:
            self.marks.append((self.running[-1], (time.perf_counter(), time.process_time())))

    def begin(self) -> None:
        """Start a step."""
        self.marks.clear()
        self._mark()

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count the block for a stage."""
        self.running.append(name)
        self._mark()
        try:
            yield
        finally:
            self.running.pop()
            self._mark()

    def end(self) -> dict[str, list[float]]:
        """Return wall and CPU seconds by stage; on a GPU its time as both."""
        self._mark()
        spent = {name: [0.0, 0.0] for name in (*STAGES, "other")}
        if self.on_gpu:
            torch.cuda.synchronize()
        for (name, start), (_, stop) in zip(self.marks, self.marks[1:]):
            times = [start.elapsed_time(stop) / 1e3] * 2 if self.on_gpu else None
            times = times or [b - a for a, b in zip(start, stop)]
            spent[name] = [x + y for x, y in zip(spent[name], times)]
        return spent

    def time(self, owner: Any, name: str, stage: str) -> None:
        """Replace a function of a module or object by one whose time counts for a stage."""
        function = getattr(owner, name, None)
        if function is None:
            return

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.stage(stage):
                return function(*args, **kwargs)

        setattr(owner, name, timed)


class TrainingStep:
    """A model, its optimizer and a batch of drawn images.

    The model has random weights, so the frozen detector's proposals match next to nothing. They are
    computed, and as many drawn boxes near the ground truth take the place of the first ones as a
    trained detector would find. At test time 100 drawn boxes take the place of its detections.
    """

    def __init__(self, options: dict[str, Any]):
        """
        Args:
            options: ``config_file``, ``opts``, ``device``, ``batch``, ``precision``, ``size``.
        """
        self.device = options["device"]
        self.on_gpu = self.device.startswith("cuda")
        cfg = get_cfg()
        reldn_d2.add_reldn_config(cfg)
        opts = ["MODEL.WEIGHTS", "", "MODEL.DEVICE", self.device, *options["opts"]]
        reldn_d2.merge_config(cfg, options["config_file"], opts)
        torch.manual_seed(0)
        if keep_freed_memory and not self.on_gpu and cfg.MODEL.RELDN.KEEP_FREED_MEMORY:
            keep_freed_memory()
        self.model = build_model(cfg).train()
        _tame(self.model)
        if self.model.predicate_weights:
            self.model.predicate_weights = ""  # a file that need not be there
        initialize_relation_branch(self.model)  # both backbones have the same frozen stages
        self.optimizer = build_optimizer(cfg, self.model)
        for group in self.optimizer.param_groups:
            group["lr"] = 1e-6  # so that every step does the same work
        head = self.model.relation_head
        counts = self.model.detector.num_classes, head.num_predicates
        self.batch = draw_images(options["batch"], tuple(options["size"]), *counts)
        self.precision = _PRECISIONS[options["precision"]]
        self.clock = StageClock(self.on_gpu)
        self._replace_boxes()
        self._time_stages()

    def _replace_boxes(self) -> None:
        propose = self.model.detector.propose
        drawn = [boxes_near(x["instances"].gt_boxes.to(self.device), 112) for x in self.batch]

        def propose_near(*args: Any) -> list[Boxes]:
            proposed = propose(*args)
            return [Boxes.cat([near, x[len(near) :]]) for near, x in zip(drawn, proposed)]

        detect, num_classes = self.model.detector.detect, self.model.detector.num_classes

        def detect_near(*args: Any) -> list[Instances]:
            detect(*args)
            return [_detections(x["instances"].to(self.device), num_classes) for x in self.batch]

        self.model.detector.propose = propose_near
        self.model.detector.detect = detect_near

    def _time_stages(self) -> None:
        model, head = self.model, self.model.relation_head
        for name in ("preprocess", "extract_features"):
            self.clock.time(model.detector, name, "detector backbone")
        for name in ("propose", "detect"):
            self.clock.time(model.detector, name, "proposals")
        self.clock.time(model, "_predicate_features", "predicate backbone")
        for owner, name in (
            *((meta_arch, "label_entities"), (head_base, "training_pairs")),
            (head_base, "sample_training_pairs"),
        ):
            self.clock.time(owner, name, "matching and sampling")
        self.clock.time(head, "encode_entities", "entity heads")
        self.clock.time(head, "_encode_unions", "union heads")
        self.clock.time(head, "score_pairs", "pair classifier")
        self.clock.time(head_base, "draw_predicate_targets", "losses")
        for loss in head.losses.values():
            self.clock.time(loss, "forward", "losses")

    def _amp(self) -> torch.autocast:
        device = self.device.split(":")[0]
        return torch.autocast(device, self.precision, enabled=self.precision is not None)

    def __call__(self, update: bool = True) -> dict[str, float]:
        """Run a step, with the same random draws each time; return its losses if ``update``."""
        torch.manual_seed(0)
        with EventStorage(1), self._amp():
            losses = self.model(self.batch)
        with self.clock.stage("backward"):
            self.optimizer.zero_grad(set_to_none=True)
            sum(losses.values()).backward()
        with self.clock.stage("optimizer"):
            self.optimizer.step()
        return {name: x.detach() for name, x in losses.items()} if update else {}

    def timed(self) -> dict[str, Any]:
        """Run a step; return its ``losses`` and its ``stages``, seconds by name."""
        self.clock.begin()
        losses = self()
        stages = self.clock.end()
        return {"losses": {k: float(v) for k, v in losses.items()}, "stages": stages}

    def inference(self) -> dict[str, list[float]]:
        """Predict the batch once; return wall and CPU seconds: the detector's, and all."""
        self.model.eval()
        self.clock.begin()
        with torch.no_grad(), self._amp():
            self.model(self.batch)
        stages = self.clock.end()
        self.model.train()
        detector = zip(stages["detector backbone"], stages["proposals"])
        return {
            "detector": [sum(x) for x in detector],
            "all": [sum(x) for x in zip(*stages.values())],
        }

    def peak_memory(self) -> float:
        """Return the MiB that a step needs beyond what is kept between steps."""
        return memory_of_call(self, self.device)

    def counts(self) -> dict[str, Any]:
        """Count what no other load on the machine changes.

        Returns:
            ``synchronizations`` by function, what makes the host wait for the device in a step, and
            ``operations``, floating-point ones of convolutions and matrix products.
        """
        counter = FlopCounterMode(display=False)
        with counter:
            found = count_host_reads(lambda: self(update=False), self.device)
        return {"synchronizations": dict(found), "operations": counter.get_total_flops()}


def _detections(targets: Instances, num_classes: int, count: int = 100) -> Instances:
    """Draw detections near the ground truth, with scores that fall from 1 to 0.05."""
    generator = torch.Generator().manual_seed(0)
    boxes = boxes_near(targets.gt_boxes.to("cpu"), count).to(targets.gt_boxes.device)
    scores = 0.05 ** torch.linspace(0, 1, count)
    classes = torch.randint(num_classes, (count,), generator=generator)
    found = Instances(targets.image_size, pred_boxes=boxes)
    found.scores, found.pred_classes = scores.to(boxes.device), classes.to(boxes.device)
    return found


def _tame(model: nn.Module) -> None:
    """Scale random weights so that activations stay small without trained BatchNorm statistics."""
    with torch.no_grad():
        for name, x in model.state_dict().items():
            if name.endswith("conv3.norm.weight"):  # of each residual branch
                x.fill_(0.2)
            elif name.endswith("stem.conv1.norm.weight"):
                x.fill_(0.02)  # pixels are not scaled
        semantic = getattr(model.relation_head, "semantic", None)
        if semantic is not None:
            semantic.table.weight.normal_(std=0.5)


def serve() -> None:
    """Read options and then names of methods from stdin, one JSON per line; write their results."""
    replies = sys.stdout
    sys.stdout = sys.stderr
    options = json.loads(sys.stdin.readline())
    if Path(reldn_d2.__file__).resolve().parents[1] != Path(options["checkout"]).resolve():
        raise RuntimeError(f"reldn_d2 was imported from {reldn_d2.__file__}")
    set_up(options["device"], options["threads"])
    step: Callable = TrainingStep(options)
    for line in sys.stdin:
        result = getattr(step, json.loads(line))()
        replies.write(json.dumps(result) + "\n")
        replies.flush()


if __name__ == "__main__":
    serve()
