"""What every picture needs: a figure without a backend, PNG bytes, text that the font can draw."""

from io import BytesIO
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MUTED = "#666666"


def new_figure(width: float, height: float) -> "Figure":
    """Return an empty figure; width and height are in inches of 150 pixels.

    Thread: any, since pyplot is not used: no backend is chosen, and no figure is registered.
    """
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def to_png(figure: "Figure") -> bytes:
    """Return the picture as a PNG."""
    png = BytesIO()
    figure.savefig(png, format="png", metadata={"Software": None})
    return png.getvalue()


def drawable(text: str, longest: int = 80) -> str:
    """Shorten a text, and replace characters that the font lacks: matplotlib warns of each in every drawing."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    glyphs = get_font(findfont(FontProperties(weight="bold"))).get_charmap()
    text = "".join(letter if ord(letter) in glyphs else "?" for letter in text)
    return text if len(text) <= longest else f"{text[: longest // 2]}…{text[-longest // 2 :]}"
