"""What a validation comes to: plain values, for rows and pictures."""

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Matrix:
    """A square table of values over classes, such as a confusion matrix: rows true, columns predicted."""

    classes: list[str]
    values: list[list[float | None]]
    """None where a value is not finite."""


@dataclass(frozen=True, slots=True)
class MetricValues:
    """What a validation came to.

    Attributes:
        numbers: By name, all finite: ``val/loss``, ``val/f1``, ``val/recall/cat``.
        matrices: By name: ``val/confusion``.
    """

    numbers: dict[str, float] = field(default_factory=dict)
    matrices: dict[str, Matrix] = field(default_factory=dict)

    def __or__(self, other: "MetricValues") -> "MetricValues":
        return MetricValues(self.numbers | other.numbers, self.matrices | other.matrices)
