"""The page of `moe-convert chat --web`, by gradio."""

import html
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr
from fastapi import FastAPI

from converter.cli.chat.page_answers import PageAnswers
from converter.cli.chat.page_guard import PageGuard
from converter.cli.chat.remote_chat import RemoteChat
from loader.serving.answers.settings import GenerationSettings

# Scrollbars follow the dark theme.
_CSS = ".dark { color-scheme: dark }"


@dataclass(frozen=True)
class WebPage:
    """A page for conversations with `remote`. The browser keeps the conversation.

    settings, max_new_tokens, system: first values; None leaves a value to the server. notes: shown
    before the first question.
    """

    remote: RemoteChat
    settings: GenerationSettings
    max_new_tokens: int | None = None
    system: str = ""
    notes: Sequence[str] = ()

    def mount(self, app: FastAPI) -> Callable[[], None]:
        """Add the page to `app` at /. Return a function that ends its open connections."""
        # Nothing goes to gradio's makers, and the browser keeps no record of answers.
        os.environ.update(GRADIO_ANALYTICS_ENABLED="False", GRADIO_RUN_HISTORY="False")
        # gradio's other fonts may come from Google.
        font = (gr.themes.Font("system-ui"), gr.themes.Font("sans-serif"))
        mono = (gr.themes.Font("ui-monospace"), gr.themes.Font("monospace"))
        theme = gr.themes.Default(primary_hue="blue", font=font, font_mono=mono)
        gr.mount_gradio_app(
            app, self._blocks(), "/", theme=theme, css=_CSS, footer_links=[], ssr_mode=False
        )
        app.add_middleware(PageGuard)
        page: Any = app.routes[-1]
        # Without this, uvicorn waits for the connection that each open page keeps.
        return lambda: page.app.stop_event.set()

    def _blocks(self) -> Any:
        name = html.escape(self.remote.model)
        context = self.remote.context_tokens
        notes = [f"{context} tokens of context.", *self.notes] if context else self.notes
        return gr.ChatInterface(
            PageAnswers(self.remote, self.settings).answer,
            title=name,
            chatbot=gr.Chatbot(
                label=name,
                show_label=False,
                scale=1,
                placeholder=html.escape(" ".join(notes)),
                buttons=["copy", "copy_all"],
            ),
            additional_inputs=[
                gr.Textbox(self.system, label="System message", placeholder="none"),
                _number_field("Temperature (0 is greedy)", self.settings.temperature),
                _number_field("Max new tokens", self.max_new_tokens),
            ],
            additional_inputs_accordion=gr.Accordion("Settings", open=False),
            analytics_enabled=False,
            api_visibility="private",
            # The server has its own queue.
            concurrency_limit=None,
        )


def _number_field(label: str, value: float | None) -> Any:
    # Not gr.Number: it sends an empty field as 0 once it was visible.
    text = "" if value is None else str(value)
    return gr.Textbox(text, label=label, placeholder="the server's default")
