"""Draws every picture of a run: its curves, and the matrices of its newest validation.

Pure functions from rows and documents to PNG files: the same input gives the same bytes, and no store is read.
matplotlib is imported only when a picture is drawn, and only in curves.py, matrices.py and figure.py.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from launcher.display.curves import draw_curves
from launcher.display.matrices import draw_matrix
from launcher.display.tables import number

__all__ = ["draw", "draw_curves", "draw_matrix"]


def draw(rows: Iterable[Mapping[str, Any]], matrices: Mapping[str, Mapping[str, Any]], title: str) -> dict[str, bytes]:
    """Draw every picture of a run as a PNG, by name: ``curves``, and each matrix, such as ``val-confusion``.

    Args:
        rows: Metrics rows, as in ``metrics.jsonl``.
        matrices: The matrix documents of the run directory, with ``step``, ``classes`` and ``values``.
        title: The run's name.
    """
    pictures = {"curves": draw_curves(rows, title)}
    for name, matrix in matrices.items():
        of_step = f"{title}: {name} at step {number(matrix['step'])}"
        pictures[name] = draw_matrix(matrix["values"], matrix["classes"], of_step)
    return pictures
