"""The sheet on which relations are drawn: an image, a white margin, and a panel of rows.

Coordinates are pixels of the sheet, y downwards, unless stated otherwise.
"""

import bisect
import math
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from matplotlib import patheffects
from matplotlib.artist import Artist
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.lines import Line2D
from matplotlib.patches import Circle, FancyBboxPatch, Polygon
from matplotlib.text import Text
from matplotlib.textpath import text_to_path
from PIL import Image

from detectron2.utils.visualizer import VisImage

from ..utils.fonts import font_families
from .layout import Color, Label

__all__ = ["RelationImage", "Row", "Sheet", "label_size", "pad", "plan_sheet", "shorten"]

INK, FAINT, WHITE = (0.13, 0.13, 0.13), (0.45, 0.45, 0.45), (1.0, 1.0, 1.0)
MIN_AREA = 240  # min width and height in pixels of the image with its margin
MIN_ROWS = 20  # relations that fit into one column of the panel, however low the image
_ELLIPSIS = "\u2026"
_ORDINAL = re.compile(r"(?<=\S)(?: \d+ #\d+| #?\d+)$")  # of an entity, after its class


@lru_cache(maxsize=256)
def _font(families: tuple[str, ...], bold: bool, points: float) -> FontProperties:
    return FontProperties(family=families, weight="bold" if bold else "normal", size=points)


@lru_cache(maxsize=4096)
def text_width(text: str, size: float, bold: bool = False) -> float:
    """Return the width in pixels of a text whose font size is ``size`` pixels."""
    font = _font(font_families(text), bold, size)
    return float(text_to_path.get_text_width_height_descent(text, font, False)[0])


def label_size(lines: str | Sequence[str], size: float) -> tuple[float, float]:
    """Return the width and height in pixels of the plate of a label with one or several lines."""
    lines = [lines] if isinstance(lines, str) else lines
    width = max(text_width(line, size) for line in lines)
    return width + 0.8 * size + 4, 1.35 * size + 4 + 1.25 * size * (len(lines) - 1)


def shorten(text: str, size: float, width: float, bold: bool = False) -> str:
    """Cut a text to ``width`` pixels, with an ellipsis for the part that was cut.

    An ordinal at the end, such as in ``cup 2`` or ``class 7 #2``, is kept if it fits. If not even
    the ellipsis fits, nothing is left.
    """
    if text_width(text, size, bold) <= width:
        return text
    ordinal = _ORDINAL.search(text)
    for end in [ordinal.group(), ""] if ordinal else [""]:
        body = text[: len(text) - len(end)]
        # How many letters are too many; 0 if not even the ellipsis fits.
        over = bisect.bisect_left(
            range(len(body) + 1),
            True,
            key=lambda n: text_width(body[:n].rstrip() + _ELLIPSIS + end, size, bold) > width,
        )
        if over:
            return body[: over - 1].rstrip() + _ELLIPSIS + end
    return ""


def fair_cap(widths: Sequence[float], room: float) -> float:
    """Return the width to which the longest pieces must be cut so that all fit into ``room``."""
    for left, width in zip(range(len(widths), 0, -1), sorted(widths)):
        if width * left > room:
            return max(room / left, 0.0)
        room -= width
    return math.inf


def pad(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """Put a picture in the upper left corner of a white one."""
    sheet = np.full((height, width, 3), 255, np.uint8)
    sheet[: picture.shape[0], : picture.shape[1]] = picture
    return sheet


class Row(NamedTuple):
    """One line of the panel: pieces (text, color, bold), and a text at its right end."""

    pieces: list[tuple[str, Color, bool]]
    right: str = ""

    def width(self, size: float) -> float:
        """Return the pixels that this row needs."""
        pieces = sum(text_width(text, size, bold) for text, _, bold in self.pieces)
        return pieces + (text_width(self.right, size) + 1.5 * size if self.right else 0)


class Sheet(NamedTuple):
    """Positions of the parts of a picture; ``area`` is the image with its white margin."""

    size: tuple[int, int]  # width, height
    image: tuple[float, float, float, float]
    area: tuple[float, float, float, float]
    panel: tuple[float, float]  # left, top
    column_width: float
    rows_per_column: int
    text: float  # font size

    @property
    def row_height(self) -> float:
        """Distance in pixels from one row of the panel to the next."""
        return round(1.65 * self.text)


def plan_sheet(
    width: int,
    height: int,
    scale: float,
    rows: Sequence[Row],
    panel: str,
    title: bool,
    text: float | None = None,
) -> Sheet:
    """Lay out a picture.

    Args:
        width, height: of the image, in its own pixels.
        scale: pixels of the sheet per pixel of the image.
        rows: heading and rows of the panel.
        panel: "right", "below" or "none".
        title: whether there is a title above the image.
        text: font size in pixels; None chooses one that suits the image.
    """
    image_w, image_h = max(1, round(width * scale)), max(1, round(height * scale))
    area_w, area_h = max(image_w, MIN_AREA), max(image_h, MIN_AREA)
    text = text or min(max(max(image_w, image_h) / 76, 13.0), 20.0)
    row_height, margin = round(1.65 * text), round(0.8 * text)
    top = round(2.2 * text) if title else 0
    column = min(max(row.width(text) for row in rows), max(0.75 * area_w, 320))
    column = math.ceil(column) + 1 + 2 * margin
    if panel == "right":
        per_column = max(int((area_h - 2 * margin) // row_height), MIN_ROWS + 1)
    else:
        across = max(int(area_w // column), 1)
        per_column = max(math.ceil(len(rows) / across), MIN_ROWS + 1)
    columns = math.ceil(len(rows) / per_column)
    panel_w = math.ceil(columns * column)
    panel_h = 2 * margin + min(len(rows), per_column) * row_height
    left = (area_w - image_w) // 2
    size = {
        "right": (area_w + panel_w, max(area_h, panel_h)),
        "below": (max(area_w, panel_w), area_h + panel_h),
        "none": (area_w, area_h),
    }[panel]
    corner = (area_w, top) if panel == "right" else (0, top + area_h)
    return Sheet(
        size=(size[0], top + size[1]),
        image=(left, top, left + image_w, top + image_h),
        area=(0, top, area_w, top + area_h),
        panel=(corner[0] + margin, corner[1] + margin),
        column_width=column,
        rows_per_column=per_column,
        text=text,
    )


class RelationImage(VisImage):
    """A :class:`VisImage` with a margin around the image.

    ``ax`` keeps the coordinates of the image, so that all code that draws on a ``VisImage`` works;
    ``overlay`` covers the whole sheet.
    """

    def __init__(self, img: np.ndarray, scale: float, sheet: Sheet):
        """
        Args:
            img: (H, W, 3) uint8.
            scale: pixels of the sheet per pixel of the image.
            sheet: from :func:`plan_sheet`.
        """
        self.sheet = sheet
        super().__init__(img, scale=scale)

    def _setup_figure(self, img: np.ndarray) -> None:
        width, height = self.sheet.size
        self.fig = Figure(facecolor="white")
        self.dpi = self.fig.get_dpi()
        # Slightly more than whole pixels, as in Detectron2, because the canvas rounds down.
        full_width, full_height = width + 1e-2, height + 1e-2
        self.fig.set_size_inches(full_width / self.dpi, full_height / self.dpi)
        self.canvas = FigureCanvasAgg(self.fig)
        x0, y0, x1, y1 = self.sheet.image
        self.ax = self.fig.add_axes(
            (
                x0 / full_width,
                (height - y1) / full_height,
                (x1 - x0) / full_width,
                (y1 - y0) / full_height,
            )
        )
        self.ax.axis("off")
        self.reset_image(img)
        self.overlay = self.fig.add_axes((0.0, 0.0, 1.0, 1.0))
        self.overlay.axis("off")
        self.overlay.set_xlim(0, width)
        self.overlay.set_ylim(height, 0)
        self.overlay.set_autoscale_on(False)
        self._layer = 0

    def add(self, artist: Artist) -> None:
        """Add a line, patch or text to the overlay, above everything added before."""
        self._layer += 1
        artist.set_zorder(self._layer)
        self.overlay.add_artist(artist)

    def reset_image(self, img: np.ndarray) -> None:
        """Show ``img``, resampled to the pixels that it covers on the sheet."""
        x0, y0, x1, y1 = self.sheet.image
        method = Image.BICUBIC if self.scale > 1 else Image.LANCZOS
        shown = Image.fromarray(img.astype("uint8")).resize((int(x1 - x0), int(y1 - y0)), method)
        extent = (0, self.width, self.height, 0)
        self.ax.imshow(np.asarray(shown), extent=extent, interpolation="nearest", aspect="auto")

    def points(self, pixels: float) -> float:
        """Convert pixels to points, matplotlib's unit of line widths and font sizes."""
        return pixels * 72 / self.dpi

    def write(
        self, x: float, y: float, text: str, size: float, color: Color, bold: bool = False
    ) -> None:
        """Write one line of text that starts at ``x`` and is centered on ``y``."""
        font = _font(font_families(text), bold, self.points(size))
        baseline = y + 0.36 * size
        self.add(Text(x, baseline, text, color=color, fontproperties=font, parse_math=False))

    def line(self, points: np.ndarray, color: Color, width: float, dashed: bool = False) -> None:
        """Draw a line with a thin light outline, which makes it visible on any background."""
        line = Line2D(points[:, 0], points[:, 1], color=color, linewidth=self.points(width))
        line.set_linestyle((0, (3.5, 1.6)) if dashed else "solid")
        rim = patheffects.withStroke(
            linewidth=self.points(width + 2.2), foreground="white", alpha=0.75
        )
        line.set_path_effects([rim])
        self.add(line)

    def arrow(self, points: np.ndarray, color: Color, width: float, dashed: bool = False) -> None:
        """Draw an arrow along ``points`` (L, 2) with its head at the last one."""
        length = 5.5 * width
        to_end = np.linalg.norm(points - points[-1], axis=1)
        shaft = points[: max(int((to_end > 0.8 * length).sum()), 2)]
        self.line(shaft, color, width, dashed)
        direction = points[-1] - shaft[-1]
        direction = direction / max(float(np.hypot(*direction)), 1e-6)
        side = np.array([-direction[1], direction[0]]) * 0.4 * length
        back = points[-1] - direction * length
        corners = np.stack([points[-1], back + side, back - side])
        self.add(Polygon(corners, facecolor=color, edgecolor="white", linewidth=self.points(0.8)))

    def dot(self, center: np.ndarray, radius: float, color: Color) -> None:
        """Draw the point of an entity where its arrows start and end."""
        rim = self.points(1.3)
        self.add(Circle(center, radius, facecolor=color, edgecolor="white", linewidth=rim))

    def plate(
        self, label: Label, lines: Sequence[tuple[str, Color]], face: Color, edge: Color
    ) -> None:
        """Draw a label as a small rounded plate, with a leader line if it has one.

        Args:
            label: position.
            lines: texts from top to bottom, with their colors.
            face: color of the plate.
            edge: color of its border and leader line.
        """
        x0, y0, x1, y1 = label.rect
        size = self.sheet.text
        if label.target is not None:
            near = np.clip(label.target, (x0 + 2, y0 + 2), (x1 - 2, y1 - 2))
            self.line(np.stack([near, label.target]), edge, 1.0)
        self.add(
            FancyBboxPatch(
                (x0 + 3, y0 + 3),
                x1 - x0 - 6,
                y1 - y0 - 6,
                boxstyle="round,pad=2.2",
                facecolor=face,
                edgecolor=edge,
                linewidth=self.points(1.2),
            )
        )
        first = (y0 + y1) / 2 - 0.625 * size * (len(lines) - 1)
        for index, (text, ink) in enumerate(lines):
            self.write(x0 + 2 + 0.4 * size, first + 1.25 * size * index, text, size, ink)

    def list_rows(self, rows: Sequence[Row]) -> None:
        """Write the panel, column by column."""
        sheet = self.sheet
        size, step = sheet.text, sheet.row_height
        for index, row in enumerate(rows):
            column, line = divmod(index, sheet.rows_per_column)
            x = sheet.panel[0] + column * sheet.column_width
            y = sheet.panel[1] + (line + 0.5) * step
            end = x + sheet.column_width - 2 * round(0.8 * size)
            if row.right:
                start = end - text_width(row.right, size)
                self.write(start, y, row.right, size, INK)
                end = start - 0.7 * size
            widths = [text_width(text, size, bold) for text, _, bold in row.pieces]
            cap = fair_cap(widths, end - x)
            for text, color, bold in row.pieces:
                text = shorten(text, size, cap, bold)
                self.write(x, y, text, size, color, bold)
                x += text_width(text, size, bold)
