"""Relations in videos: frames in, frames with drawn relations out, entities keeping their colours.

Shapes: E entities of one frame.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np

from ..structures.names import class_name
from ..structures.scene_graph import SceneGraph
from .layout import entity_color, fit_size
from .scene import same_entities
from .visualizer import RelationVisualizer

__all__ = ["EntityTracker", "VideoError", "VideoFile", "VideoWriter", "draw_frame"]


MIN_SIDE = 960  # pixels of the longest side of a drawn frame, at least


class VideoError(ValueError):
    """A video that cannot be read or written; the message is one line and names it."""


class _Track(NamedTuple):
    number: int  # among all tracks: decides the colour
    name: str
    box: np.ndarray
    class_id: int
    last_seen: int


class EntityTracker:
    """Tells which entity of a frame is which of the frames before: same class, boxes overlapping.

    An entity that is not drawn for ``patience`` frames is forgotten.
    """

    def __init__(self, class_names: list[str], patience: int = 30):
        """
        Args:
            class_names: by class id.
            patience: frames.
        """
        self.class_names = class_names
        self.patience = patience
        self._tracks: list[_Track] = []
        self._frame = self._total = 0
        self._of_class: dict[int, int] = {}

    def update(
        self, scene: SceneGraph
    ) -> tuple[dict[int, str], dict[int, tuple[float, float, float]]]:
        """Take the next frame.

        Returns:
            names and colours of the drawn entities, by their index in the scene.
        """
        self._frame += 1
        self._tracks = [x for x in self._tracks if self._frame - x.last_seen <= self.patience]
        boxes = np.array([x.box for x in self._tracks]).reshape(-1, 4)
        no_pairs = np.zeros((0, 2), dtype=np.int64)
        classes = np.array([x.class_id for x in self._tracks], dtype=np.int64)
        known = SceneGraph(None, boxes, classes, no_pairs, no_pairs[:, 0])
        same = same_entities(known, [scene])[1][0]
        names, colors = {}, {}
        for entity, index in same.items():
            class_id, box = int(scene.classes[entity]), scene.boxes[entity]
            if index < len(boxes):
                track = self._tracks[index]._replace(box=box, last_seen=self._frame)
                self._tracks[index] = track
            else:
                track = self._start(class_id, box)
            names[entity], colors[entity] = track.name, entity_color(track.number)
        return names, colors

    def _start(self, class_id: int, box: np.ndarray) -> _Track:
        number = self._of_class[class_id] = self._of_class.get(class_id, 0) + 1
        kind = class_name(class_id, self.class_names)
        track = _Track(self._total, f"{kind} {number}", box, class_id, self._frame)
        self._total += 1
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

    The result has the frame's size, made even for codecs; a small frame, on which no label would
    be readable, is enlarged to a longest side of 960.

    Args:
        frame_rgb: (H, W, 3) uint8.
        prediction: of this frame.
        tracker: of this video.
        metadata: with ``thing_classes`` and ``predicate_classes``.
        topk, min_score: which relations are drawn.
    """
    scene = prediction.best(topk, min_score)
    names, colors = tracker.update(scene)
    scale = fit_size(*frame_rgb.shape[1::-1], MIN_SIDE, float("inf"))
    picture = RelationVisualizer(frame_rgb, metadata, scale=scale).draw_scene(
        scene, None, names=names, colors=colors, panel="none"
    )
    x0, y0, x1, y1 = (round(x) for x in picture.sheet.image)  # there may be white around it
    image = picture.get_image()[y0:y1, x0:x1]
    height, width = (max(x - x % 2, 2) for x in image.shape[:2])
    return np.ascontiguousarray(image[:height, :width])


class VideoFile:
    """Frames of a video file or a camera, as RGB arrays; a context manager."""

    def __init__(self, source: str | Path | int):
        """
        Args:
            source: a path, or the number of a camera.

        Raises:
            VideoError: it cannot be opened or has no frame.
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
    """Writes RGB frames of one size to an MP4 file; a context manager."""

    def __init__(self, path: str | Path, frames_per_second: float):
        """
        Args:
            path: of the file; its suffix says the format (.mp4, .avi, .mkv).
            frames_per_second: as of the source.
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
            kind = "XVID" if self.path.suffix.lower() == ".avi" else "mp4v"
            height, width = frame_rgb.shape[:2]
            self.path.parent.mkdir(parents=True, exist_ok=True)
            code = cv2.VideoWriter_fourcc(*kind)
            self._writer = cv2.VideoWriter(str(self.path), code, self._rate, (width, height))
            if not self._writer.isOpened():
                raise VideoError(f"{self.path}: OpenCV cannot write this kind of video; try .mp4")
        self._writer.write(np.ascontiguousarray(frame_rgb[:, :, ::-1]))

    def __enter__(self) -> "VideoWriter":
        return self

    def __exit__(self, *error: Any) -> None:
        if self._writer is not None:
            self._writer.release()
