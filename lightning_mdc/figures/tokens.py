"""Pictures of what a slim model still looks at: patches that are gone as tokens of their own are faded.

As readers know them from EViT (Liang et al., arXiv 2202.07800) and ToMe (Bolya et al., arXiv 2210.09461).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lightning_mdc.figures.style import INK, WIDTH, named, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# What is left of a faded patch, and the gray it fades into.
_LEFT, _FADE_TO = 0.22, 225.0
# Inches above a picture for a title of two lines and below it for a label; a picture's share of its column.
_ABOVE, _BELOW, _SHARE = 0.38, 0.22, 0.94
# Letters that fit above a row of pictures.
_LINE = 62


@dataclass(frozen=True, eq=False)
class Example:
    """One image, what two models say of it, and what the slim one still looks at.

    Attributes:
        image: (height, width, 3), uint8, as the model sees it.
        why: it is shown.
        label: its class.
        dense, slim: (class, probability) that each predicts.
        change: KL(dense ‖ slim) of the two predictions, in nats.
        kept: (stages, patches), bool: whether a patch is still there as a token of its own after each token stage.
    """

    image: np.ndarray
    why: str
    label: int
    dense: tuple[int, float]
    slim: tuple[int, float]
    change: float
    kept: np.ndarray


def faded(image: np.ndarray, kept: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """`image` with the patches that are not kept faded.

    Args:
        image: (height, width, 3), uint8.
        kept: (patches,) in row-major order, bool.
        grid: (height, width) in patches.
    """
    height, width = image.shape[:2]
    # Each pixel's patch; where the grid does not divide the image, borders fall on the nearest pixel.
    rows, columns = np.arange(height) * grid[0] // height, np.arange(width) * grid[1] // width
    stays = kept.reshape(grid)[rows[:, None], columns[None]][..., None]
    return np.where(stays, image, _LEFT * image + (1 - _LEFT) * _FADE_TO).round().astype(np.uint8)


def tokens_figure(
    images: Sequence[np.ndarray],
    kept: Sequence[np.ndarray],
    blocks: Sequence[int],
    grid: tuple[int, int],
    titles: Sequence[str] = (),
) -> Figure:
    """A row per image: as it is, and after each token stage.

    Args:
        images: (height, width, 3) each, uint8, all of one size.
        kept: of each image, (stages, patches), bool.
        blocks: of the stages.
        grid: (height, width) in patches.
        titles: what stands above the rows; none: nothing does.
    """
    columns, rows, above = 1 + len(blocks), len(images), _ABOVE if titles else 0.0
    width = WIDTH / max(columns, 4) * columns
    high = WIDTH / max(columns, 4) * _SHARE * images[0].shape[0] / images[0].shape[1]
    height = rows * (high + above + _BELOW)
    # A layout engine would make room for a title beside its picture; it may reach over all of them.
    figure, panels = new_figure(width, height, rows, columns, layout=None)
    between = {"wspace": 1 / _SHARE - 1, "hspace": (above + _BELOW) / high}
    figure.subplots_adjust(0.01, _BELOW / height, 0.99, 1 - above / height, **between)
    for panel in panels:
        panel.set_axis_off()
    for row, (image, there) in enumerate(zip(images, kept, strict=True)):
        line = panels[row * columns : (row + 1) * columns]
        for panel, picture in zip(line, [image, *(faded(image, stage, grid) for stage in there)], strict=True):
            panel.imshow(picture, interpolation="nearest")
        if titles:
            line[0].set_title(titles[row], loc="left", fontsize=8, color=INK)
        for panel, stage, block in zip(line[1:], there, blocks, strict=True):
            panel.text(
                0.5,
                -0.05,
                f"block {block}: {stage.sum()} of {stage.size}",
                transform=panel.transAxes,
                ha="center",
                va="top",
                fontsize=7,
                color=INK,
            )
    return figure


def answers(example: Example, class_names: Sequence[str]) -> str:
    """What an image is and what the two models say: ``is cat · dense: cat (97 %) · slim: dog (55 %)``."""
    parts = [
        f"{name}: {named(class_names[kind])} ({sure:.0%})".replace("%", " %")
        for name, (kind, sure) in (("dense", example.dense), ("slim", example.slim))
    ]
    line = f"is {named(class_names[example.label])} · {' · '.join(parts)}"
    return line if len(line) <= _LINE else line.replace(" · ", "\n", 1)
