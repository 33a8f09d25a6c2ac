"""The model card of a checkpoint: the README.md of a model on the Hugging Face Hub."""

import math
from collections.abc import Mapping
from typing import Any

from detectron2.config import CfgNode

__all__ = ["model_card"]

# What a reader of the card wants to know of the config.
_KEYS = (
    ("Detector", "MODEL.RELDN.DETECTOR"),
    ("Relation head", "MODEL.ROI_RELATION_HEAD.NAME"),
    ("Trained on", "DATASETS.TRAIN"),
    ("Iterations", "SOLVER.MAX_ITER"),
    ("Task", "TEST.RELATIONS.TASK"),
)


def model_card(
    content: Mapping[str, Any],
    repository: str,
    results: Mapping[str, Mapping[str, float | None]] | None = None,
) -> str:
    """Return the card as Markdown with the Hub's metadata in front.

    Args:
        content: the checkpoint, as ``tools/pack_checkpoint.py`` writes it, with ``"model"``,
            ``"reldn"`` and ``"about"``.
        repository: ``OWNER/NAME``.
        results: ``{task: {metric: value}}``, as an evaluation writes it to ``results_TASK.json``.
    """
    description, about = content["reldn"], content["about"]
    # The weights of a detector or a backbone read pixels; other models take boxes and classes.
    reads_images = any(
        x.startswith(("detector.model.", "predicate_backbone.")) for x in content["model"]
    )
    parts = [
        "---\nlibrary_name: reldn_d2\nlicense: other\nlicense_name: see-license-section\n"
        "tags:\n- scene-graph-generation\n- visual-relationship-detection\n- reldn\n"
        "- detectron2\n---",
        f"# {repository.split('/')[-1]}",
        "A scene graph model: RelDN ([Graphical Contrastive Losses for Scene Graph Parsing]"
        "(https://arxiv.org/abs/1903.02728), CVPR 2019) in Detectron2, by the package reldn_d2 "
        f"{about.get('reldn_d2') or ''}".rstrip() + ".",
        "## Use",
        _example(description, repository, reads_images),
        "## Model",
        _table(("", ""), _rows(content, reads_images)),
    ]
    if results:
        parts.append("## Results")
        rows = [
            (task, metric, _value(value))
            for task, metrics in results.items()
            for metric, value in metrics.items()
        ]
        parts.append(_table(("task", "metric", "value"), rows))
    parts += ["## Training", _quoted(about.get("note") or "Not described.")]
    parts += ["## License", _quoted(about.get("license") or "Not given.")]
    for title, field in (
        ("Classes", "thing_classes"),
        ("Predicates", "predicate_classes"),
        ("Attributes", "attribute_classes"),
    ):
        if description.get(field):
            parts += [f"## {title}", ", ".join(description[field])]
    return "\n\n".join(parts) + "\n"


def _example(description: Mapping[str, Any], repository: str, reads_images: bool) -> str:
    """Return Python that predicts with the model."""
    names = (list(description["thing_classes"]) * 2)[:2]
    call = 'predictor("photo.jpg")'
    if not reads_images:
        call = f"predictor(boxes=[[10, 20, 110, 220], [50, 150, 190, 300]], classes={names!r})"
    return (
        "```python\nfrom reldn_d2.predictor import RelationPredictor\n\n"
        f'predictor = RelationPredictor.from_pretrained("hf://{repository}")\n'
        f"graph = {call}\ngraph.best(5).triplets()\n```"
    )


def _rows(content: Mapping[str, Any], reads_images: bool) -> list[tuple[str, str]]:
    description = content["reldn"]
    cfg = CfgNode.load_cfg(description["config"])
    rows = [
        ("Input", "images" if reads_images else "boxes and classes, no pixels"),
        ("Classes", str(len(description["thing_classes"]))),
        ("Predicates", str(len(description["predicate_classes"]))),
        ("Weights", f"{sum(x.numel() for x in content['model'].values()):,}"),
    ]
    for title, key in _KEYS:
        node: Any = cfg
        for part in key.split("."):
            node = node.get(part, "") if isinstance(node, Mapping) else ""
        text = ", ".join(node) if isinstance(node, (list, tuple)) else str(node)
        if text:
            rows.append((title, text))
    return rows


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(x.replace("|", "\\|") for x in line) + " |" for line in lines
    )


def _value(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.2f}"


def _quoted(text: str) -> str:
    """Return a text as a block quote, in which headings do not break the card's outline."""
    return "\n".join(f"> {line}".rstrip() for line in text.strip().splitlines())
