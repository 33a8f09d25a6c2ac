"""Relations in videos: drawing on frames, with names and colors that entities keep.

Shapes: E entities of one frame.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np

from ..structures.names import class_name
from ..structures.scene_graph import SceneGraph
from .correspondence import same_entities
from .layout import entity_color, fit_size
from .visualizer import RelationVisualizer

__all__ = ["EntityTracker", "VideoError", "VideoFile", "VideoWriter", "draw_frame"]

MIN_SIDE = 960  # min pixels of the longest side of a drawn frame


class VideoError(ValueError):
    """A video cannot be read or written; the message is one line and names it."""


class _Track(NamedTuple):
    index: int  # among all tracks: decides the color
    name: str
    box: np.ndarray
    class_id: int
    last_seen: int


class EntityTracker:
    """Recognizes the entities of earlier frames by class and overlapping boxes.

    An entity that is not drawn for more than ``patience`` frames is forgotten.
    """

    def __init__(self, class_names: list[str], patience: int = 30):
        """
        Args:
            class_names: names by class id.
            patience: number of frames.
        """
        self.class_names = class_names
        self.patience = patience
        self._tracks: list[_Track] = []
        self._frame = self._num_tracks = 0
        self._num_of_class: dict[int, int] = {}

    def update(
        self, scene: SceneGraph
    ) -> tuple[dict[int, str], dict[int, tuple[float, float, float]]]:
        """Match the entities of the next frame with those of earlier frames.

        Returns:
            names and colors of the drawn entities, by their index in the scene.
        """
        self._frame += 1
        self._tracks = [x for x in self._tracks if self._frame - x.last_seen <= self.patience]
        boxes = np.array([x.box for x in self._tracks]).reshape(-1, 4)
        no_pairs = np.zeros((0, 2), dtype=np.int64)
        classes = np.array([x.class_id for x in self._tracks], dtype=np.int64)
        tracked = SceneGraph(None, boxes, classes, no_pairs, no_pairs[:, 0])
        _, (same_as,) = same_entities(tracked, [scene])
        names, colors = {}, {}
        for entity, index in same_as.items():
            class_id, box = int(scene.classes[entity]), scene.boxes[entity]
            if index < len(boxes):
                track = self._tracks[index]._replace(box=box, last_seen=self._frame)
                self._tracks[index] = track
            else:
                track = self._start(class_id, box)
            names[entity], colors[entity] = track.name, entity_color(track.index)
        return names, colors

    def _start(self, class_id: int, box: np.ndarray) -> _Track:
        ordinal = self._num_of_class[class_id] = self._num_of_class.get(class_id, 0) + 1
        name = f"{class_name(class_id, self.class_names)} {ordinal}"
        track = _Track(self._num_tracks, name, box, class_id, self._frame)
        self._num_tracks += 1
        self._tracks.append(track)
        return track


def draw_frame(
    frame_rgb: np.ndarray,
    prediction: SceneGraph,
    tracker: EntityTracker,
    metadata: Any,
    topk: int = 20,
    min_score: float = 0.0,
) -> np.ndarray:
    """Draw the best relations on a frame.

    The result has the size of the frame, rounded down to even numbers for codecs; a frame too small
    for readable labels is enlarged to a longest side of 960.

    Args:
        frame_rgb: (H, W, 3) uint8.
        prediction: prediction for this frame.
        tracker: tracker of this video.
        metadata: with ``thing_classes`` and ``predicate_classes``.
        topk, min_score: as in :meth:`.visualizer.RelationVisualizer.draw_predictions`.
    """
    scene = prediction.best(topk, min_score)
    names, colors = tracker.update(scene)
    scale = fit_size(*frame_rgb.shape[1::-1], MIN_SIDE, float("inf"))
    picture = RelationVisualizer(frame_rgb, metadata, scale=scale).draw_scene(
        scene, names=names, colors=colors, panel="none"
    )
    x0, y0, x1, y1 = (round(x) for x in picture.sheet.image)  # without the white margin
    image = picture.get_image()[y0:y1, x0:x1]
    height, width = (max(x - x % 2, 2) for x in image.shape[:2])
    return np.ascontiguousarray(image[:height, :width])


class VideoFile:
    """A context manager that iterates over the frames of a video file or a camera as RGB arrays."""

    def __init__(self, source: str | Path | int):
        """
        Args:
            source: a path, or the index of a camera.

        Raises:
            VideoError: it cannot be opened or has no frames.
        """
        self.source = source
        if not isinstance(source, int) and not Path(source).is_file():
            raise VideoError(f"{source}: there is no such file")
        self._capture = cv2.VideoCapture(source if isinstance(source, int) else str(source))
        opened, first = self._capture.read() if self._capture.isOpened() else (False, None)
        if not opened:
            what = f"camera {source}" if isinstance(source, int) else str(source)
            raise VideoError(f"{what}: cannot be read as a video")
        self._first: np.ndarray | None = first
        rate = self._capture.get(cv2.CAP_PROP_FPS)
        self.frames_per_second = rate if 0 < rate < 1000 else 25.0
        count = int(self._capture.get(cv2.CAP_PROP_FRAME_COUNT))
        self.count = count if count > 0 and not isinstance(source, int) else None

    def __enter__(self) -> "VideoFile":
        return self

    def __exit__(self, *error: Any) -> None:
        self._capture.release()

    def __iter__(self) -> Iterator[np.ndarray]:
        frame = self._first
        while frame is not None:
            yield np.ascontiguousarray(frame[:, :, ::-1])
            read, frame = self._capture.read()
            if not read:
                return


class VideoWriter:
    """A context manager that writes RGB frames of one size to a video file."""

    def __init__(self, path: str | Path, frames_per_second: float):
        """
        Args:
            path: video file; its suffix decides the format (.mp4, .avi, .mkv).
            frames_per_second: frame rate of the source.
        """
        self.path = Path(path)
        self._rate = frames_per_second
        self._writer: cv2.VideoWriter | None = None

    def write(self, frame_rgb: np.ndarray) -> None:
        """Append a frame.

        Raises:
            VideoError: the file cannot be written.
        """
        if self._writer is None:
            codec = "XVID" if self.path.suffix.lower() == ".avi" else "mp4v"
            height, width = frame_rgb.shape[:2]
            self.path.parent.mkdir(parents=True, exist_ok=True)
            fourcc = cv2.VideoWriter_fourcc(*codec)
            self._writer = cv2.VideoWriter(str(self.path), fourcc, self._rate, (width, height))
            if not self._writer.isOpened():
                raise VideoError(f"{self.path}: OpenCV cannot write this video format; try .mp4")
        self._writer.write(np.ascontiguousarray(frame_rgb[:, :, ::-1]))

    def __enter__(self) -> "VideoWriter":
        return self

    def __exit__(self, *error: Any) -> None:
        if self._writer is not None:
            self._writer.release()
