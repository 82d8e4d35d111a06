"""Self-contained HTML pages: a template, pictures by Matplotlib in the page's colours, numbers."""

import contextlib
import html
import io
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

import jinja2
import matplotlib
from markupsafe import Markup
from matplotlib import rcsetup
from matplotlib.figure import Figure

# Colours of no figure, which become the page's CSS variables.
_INK, _FAINT, BEFORE, AFTER = "#00fe01", "#00fe02", "#00fe03", "#00fe04"
SERIES = [f"#00fe1{i}" for i in range(1, 7)]
_VARIABLES = {
    _INK: "var(--ink)",
    _FAINT: "var(--rule)",
    BEFORE: "var(--before)",
    AFTER: "var(--after)",
    **{color: f"var(--series-{i})" for i, color in enumerate(SERIES, 1)},
}

_STYLE: dict[Any, Any] = {
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.family": "DejaVu Sans",  # it comes with Matplotlib, and is wider than what a browser has
    "font.size": 9.5,
    "grid.color": _FAINT,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "text.color": _INK,
    "text.parse_math": False,  # names are a user's own, and a dollar sign begins no formula
    "xtick.color": _INK,
    "ytick.color": _INK,
}

_TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent / "templates"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
)


def render(template: str, **values: Any) -> str:
    """A page from a file in `train/look/templates`; text among the values is escaped."""
    return _TEMPLATES.get_template(template).render(values)


@contextlib.contextmanager
def style(colors: Sequence[str] = (BEFORE, AFTER)) -> Iterator[None]:
    """Within it, a figure is built in the page's colours; C0, C1, ... are those given."""
    with matplotlib.rc_context(_STYLE | {"axes.prop_cycle": rcsetup.cycler("color", colors)}):
        yield


def png(figure: Figure, dpi: int) -> bytes:
    """A figure as a file of its own, in Matplotlib's colours."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def inline_svg(figure: Figure, name: str, description: str) -> Markup:
    """A figure that was built in `style`, to be put into a page as it is.

    Args:
      figure: the figure; its size in inches, times 72, is the picture's natural size in pixels.
      name: not used for another picture of the page.
      description: what it shows, for those who do not see it.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    body = svg[svg.index("</metadata>") + len("</metadata>") : svg.rindex("</svg>")]
    body = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", body, count=1, flags=re.DOTALL)
    used = set(re.findall(r"#(\w+)", body))
    body = re.sub(r' id="([^"]*)"', lambda match: match[0] if match[1] in used else "", body)
    body = body.replace("font-family: 'DejaVu Sans'", "font-family: inherit")
    body = re.sub(r"\s+", " ", body).replace("> <", "><")
    for color, variable in _VARIABLES.items():
        body = body.replace(color, variable)
    width, height = (round(72 * inches) for inches in figure.get_size_inches())
    label = html.escape(description)
    return Markup(
        f'<svg xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="0 0 {width} {height}" '
        f'role="img" aria-label="{label}">{body}</svg>'
    )


def short(number: float) -> str:
    """A count in at most four characters and a letter: 77.1k, 4.12M."""
    power = 0
    while abs(number) >= 999.5 and power < 3:
        number, power = number / 1000, power + 1
    return f"{number:.3g}{('', 'k', 'M', 'G')[power]}"


def size(number: float) -> str:
    """Bytes in decimal units: 24.6 kB."""
    text = short(number)
    return f"{text[:-1]} {text[-1]}B" if text[-1].isalpha() else f"{text} bytes"


def duration(seconds: float) -> str:
    """Seconds as a person says them: 50 s, 3 min 20 s, 5 h 4 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    large, small, names = (whole // 60, whole % 60, ("min", "s"))
    if whole >= 3600:
        large, small, names = (whole // 3600, whole % 3600 // 60, ("h", "min"))
    return f"{large} {names[0]} {small} {names[1]}" if small else f"{large} {names[0]}"
