"""What the notebooks' cells call: the library's own source, text from the run's numbers, and the machine it ran on.

Everything is displayed as one MIME bundle with a plain text in it, so that a terminal, a screen reader and nbval see
the same thing as the browser. Nothing here depends on a kernel.
"""

import html
import inspect
import sys
import textwrap
from collections.abc import Callable
from datetime import date

from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer


class Note(str):
    """Text in Markdown: rendered where a notebook shows it as the value of a cell, plain elsewhere."""

    def __repr__(self) -> str:
        return str(self)

    def _repr_markdown_(self) -> str:
        return str(self)


def display(bundle: dict[str, object], metadata: dict | None = None) -> None:
    """Shows a MIME bundle in a notebook, and its text/plain where there is none."""
    if live():
        from IPython.display import display as publish

        publish(bundle, raw=True, metadata=metadata)
    else:
        sys.stdout.write(f"{bundle['text/plain']}\n")


def live() -> bool:
    """True inside IPython or a notebook's kernel. Looks in sys.modules: a kernel has long imported IPython."""
    ipython = sys.modules.get("IPython")
    return ipython is not None and ipython.get_ipython() is not None


def show(subject: Callable | type) -> None:
    """Displays the source of a function or class as it stands in the library, so that no copy can grow old.

    Raises ValueError for what has no Python source: a value, or something written in C.
    """
    try:
        source = textwrap.dedent(inspect.getsource(subject)).rstrip()
    except (TypeError, OSError) as error:
        how = "pass a function or class written in Python, as in show(quantize)"
        raise ValueError(f"{subject!r} has no source to show; {how}") from error
    display({"text/plain": source, "text/html": highlighted(source, f"{subject.__module__}.{subject.__qualname__}")})


def highlighted(source: str, caption: str) -> str:
    """HTML of Python source with its colours inline, so that a saved notebook needs no style sheet."""
    style = HtmlFormatter(noclasses=True, prestyles="color: #222; padding: 0.6em")
    code = highlight(source, PythonLexer(), style)
    return f"<figure><figcaption><code>{html.escape(caption)}</code></figcaption>{code}</figure>"


def say(markdown: str) -> None:
    """Displays Markdown, usually an f-string of the run's own numbers, which can't contradict the table above it."""
    text = inspect.cleandoc(markdown)
    display({"text/plain": text, "text/markdown": text})


def stamp() -> None:
    """Says where and when this ran, for the numbers below hold there. Not for a cell that nbval compares."""
    import torch

    from effkit.measure.roofline import processor

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    versions = f"Python {sys.version.split()[0]}, torch {torch.__version__}"
    say(f"*Ran on {date.today().isoformat()}: {processor()}; GPU: {gpu}; {versions}.*")
