"""The result of a validation as plain values, for rows and plots."""

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Matrix:
    """A square matrix over classes, such as a confusion matrix: true classes in rows, predicted in columns."""

    classes: list[str]
    """The names of the rows, and of the columns."""
    values: list[list[float | None]]
    """Row by row; None where a value is not finite."""


@dataclass(frozen=True, slots=True)
class MetricValues:
    """The values that a validation measured.

    Attributes:
        numbers: Finite values by name, such as ``val/loss``, ``val/f1`` or ``val/recall/cat``.
        matrices: Matrices by name, such as ``val/confusion``.
    """

    numbers: dict[str, float] = field(default_factory=dict)
    matrices: dict[str, Matrix] = field(default_factory=dict)

    def __or__(self, other: "MetricValues") -> "MetricValues":
        return MetricValues(self.numbers | other.numbers, self.matrices | other.matrices)
