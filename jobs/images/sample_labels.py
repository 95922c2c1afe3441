"""From what a sample says about its label to the label in the index: a class, or numbers to predict."""

from collections.abc import Sequence
from typing import Literal

import numpy as np

MOST_CLASSES = 1_000_000
"""Larger integers identify something else."""
_LARGEST = float(np.finfo(np.float32).max)


class SampleLabels:
    """Numbers the classes of samples.

    Args:
        classes: The names of the classes, or their number; None: those of the samples.

    Attributes:
        classes: The name of each label so far.
    """

    def __init__(self, classes: int | Sequence[str] | None) -> None:
        given = given_classes(classes)
        self._are_given = given is not None
        self._are: Literal["", "names", "numbers"] = ""
        if given is not None:
            self._are = "numbers" if isinstance(classes, int) else "names"
        self.classes = given or []
        self._number_of = {name: number for number, name in enumerate(self.classes)}

    @property
    def need_sorting(self) -> bool:
        """Whether the classes are names in the order in which samples had them."""
        return self._are == "names" and not self._are_given

    def label(self, value: object) -> int:
        """Returns the label of a sample that has an integer from 0 or the name of a class.

        Raises:
            ValueError: The label is wrong; the message continues after the name of what holds it.
        """
        if isinstance(value, str):
            return self._named(value)
        if not isinstance(value, int) or isinstance(value, bool):
            raise ValueError(f"must be an integer or the name of a class, got {_short(value)}; correct it")
        if self.need_sorting:
            raise ValueError(f"must be a name as in the samples before it, got {_short(value)}; correct it")
        most = len(self.classes) if self._are_given else MOST_CLASSES
        if not 0 <= value < most:
            raise ValueError(f"must lie between 0 and {most - 1}, got {_short(value)}; correct it, or set classes")
        if not self._are_given:
            self._are = "numbers"
            self.classes += _numbers(len(self.classes), value + 1)
        return value

    def _named(self, name: str) -> int:
        if self._are == "numbers":
            raise ValueError(f"must be an integer, got {_short(name)}; correct it, or name all classes in classes")
        if name not in self._number_of:
            if self._are_given:
                raise ValueError(f"must be one of {len(self.classes)} classes, got {_short(name)}; add it to classes")
            if len(self.classes) == MOST_CLASSES:
                raise ValueError(f"must be one of at most {MOST_CLASSES} names, got {_short(name)}; name another key")
            self._are = "names"
            self._number_of[name] = len(self.classes)
            self.classes.append(name)
        return self._number_of[name]


def finite_numbers(values: Sequence[object]) -> list[float]:
    """Returns the numbers that a sample has in place of a class.

    Raises:
        ValueError: They are no finite numbers; the message continues after the name of what holds them.
    """
    for value in values:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not abs(value) <= _LARGEST:  # type: ignore[arg-type]
            raise ValueError(f"must be a finite number, got {_short(value)}; correct it")
    return [float(value) for value in values]  # type: ignore[arg-type]


def given_classes(classes: int | Sequence[str] | None) -> list[str] | None:
    """Returns the names of the classes that a description gives by name or number; None: it gives none.

    Raises:
        ValueError: They are neither their number nor a list of their names.
    """
    if classes is None:
        return None
    if isinstance(classes, int) and not isinstance(classes, bool) and 0 < classes <= MOST_CLASSES:
        return _numbers(0, classes)
    if isinstance(classes, int | str) or not classes or not all(isinstance(name, str) for name in classes):
        raise ValueError(f"classes must be a list of names or their number, got {classes!r}; write [cat, dog] or 1000")
    if len(set(classes)) < len(classes):
        twice = next(name for name in classes if list(classes).count(name) > 1)
        raise ValueError(f"classes must name each class once, got {twice!r} twice; remove one")
    return list(classes)


def _numbers(first: int, end: int) -> list[str]:
    return [str(number) for number in range(first, end)]


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."
