"""The same page behind a text box: a Gradio app on this machine."""

import html
from collections.abc import Callable

from config import ConfigError

HEIGHT = 900  # pixels of the page below the box


def framed(document: str) -> str:
    """A document inside another page."""
    return f'<iframe style="width:100%;height:{HEIGHT}px;border:0" srcdoc="{html.escape(document)}"></iframe>'


def looked_at(view: Callable[[str], str], text: str) -> str:
    """The page about a text, or what is wrong with the text."""
    try:
        return framed(view(text))
    except ConfigError as error:
        return f"<p><strong>{html.escape(str(error))}</strong></p>"


def serve(view: Callable[[str], str], text: str, title: str) -> None:
    """Show `view` of whatever is typed, beginning with `text`, until Ctrl-C. Raises ConfigError without gradio."""
    try:
        import gradio
    except ImportError:
        raise ConfigError("--serve needs gradio, which is not installed: .venv/bin/pip install gradio") from None
    with gradio.Blocks(title=f"{title} · AvataRL") as app:
        gradio.Markdown(f"## {title}, token by token")
        box = gradio.Textbox(text, lines=6, max_lines=8, label="A text that the run's tokenizer knows")
        button = gradio.Button("Look", variant="primary")
        shown = gradio.HTML(looked_at(view, text) if text else "")
        button.click(lambda typed: looked_at(view, typed), box, shown)
    app.launch(inbrowser=True)
