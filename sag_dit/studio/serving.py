"""Serving the page to its users, and nothing else to anybody."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gradio as gr
from starlette.middleware import Middleware

from sag_dit.checkpoints import zoo
from sag_dit.studio.app import Begin, Page
from sag_dit.studio.library import Library

OPEN = re.compile(
    r"/(assets/.*|static/.*|svelte/.*|config/?|theme\.css|favicon\.ico|robots\.txt|manifest\.json"
    r"|gradio_api/(queue/(join|data)|upload|upload_progress|heartbeat/\w+|startup-events|cancel"
    r"|reset/?|theme\.css|info/?|app_id/?|component_server/?|login_check/?|user/?))?"
)
"""What the page asks for. Above all not ``/file=``, ``/proxy=`` and what edits the app."""
POLICY = (
    "default-src 'self'; img-src 'self' data: blob:; font-src 'self' data:; "
    "style-src 'self' 'unsafe-inline'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "connect-src 'self'; worker-src 'self' blob:; object-src 'none'; base-uri 'self'; "
    "form-action 'self'"
)
"""The browser asks no other host, whatever stands in the page."""
LOOPBACK = ("127.0.0.1", "localhost", "::1")

LARGEST = 8.0
"""Gigabytes of an upload unless something else is said."""

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class Gate:
    """Middleware that lets through what the page needs, and uploads of checkpoints alone.

    ``host`` is where the server listens; on loopback, requests that name another host are refused,
    as a page elsewhere makes them whose name was pointed here.

    Example::

        app.add_middleware(Gate, host="127.0.0.1")
    """

    def __init__(self, app: Any, host: str) -> None:
        self.app, self.local = app, host in LOOPBACK

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer one request, or hand it on."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        # Strangers, and paths that the page does not ask for.
        named = dict(scope["headers"]).get(b"host", b"").decode("latin1")
        stranger = self.local and re.sub(r":\d+$", "", named).strip("[]") not in LOOPBACK
        if stranger or not OPEN.fullmatch(scope["path"]):
            await _refuse(send, 403 if stranger else 404)
            return

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = [
                    (b"content-security-policy", POLICY.encode()),
                    (b"referrer-policy", b"no-referrer"),
                    (b"x-content-type-options", b"nosniff"),
                ]
                message["headers"] = [*message.get("headers", []), *own]
            await send(message)

        if scope["path"].endswith("/upload"):
            await self._upload(scope, receive, guarded)
        else:
            await self.app(scope, receive, guarded)

    async def _upload(self, scope: Message, receive: Receive, send: Send) -> None:
        """Hand an upload on, and delete what has not the name of a checkpoint."""
        held: list[Message] = []

        async def hold(message: Message) -> None:
            held.append(message)

        await self.app(scope, receive, hold)
        if held[0]["status"] == 200:
            # The answer lists where the files were put, by the names that they came with.
            stored = [Path(each) for each in json.loads(b"".join(m.get("body", b"") for m in held))]
            foreign = [each for each in stored if not each.name.lower().endswith(zoo.FILE_SUFFIXES)]
            for each in foreign:
                each.unlink(missing_ok=True)
            if foreign or not stored:
                await _refuse(send, 415)
                return
        for message in held:
            await send(message)


async def _refuse(send: Send, status: int) -> None:
    await send({"type": "http.response.start", "status": status, "headers": []})
    await send({"type": "http.response.body", "body": b""})


@contextmanager
def served(
    library: Library, begin: Begin, host: str, port: int | None, largest: float = LARGEST
) -> Iterator[str]:
    """Serve the page while the context lasts; yield its address.

    ``largest`` is how many gigabytes an upload may have.

    Raises:
        ValueError: nothing can listen there.

    Example::

        with served(Library(), Begin(), "127.0.0.1", None) as address:
            print(address)
    """
    with TemporaryDirectory(prefix="sag_dit_studio_") as uploads:
        os.environ["GRADIO_TEMP_DIR"] = uploads
        library.uploads = Path(uploads)
        page = Page(library, begin)
        try:
            _, address, _ = page.blocks.launch(
                server_name=host,
                server_port=port,
                prevent_thread_lock=True,
                quiet=True,
                share=False,
                pwa=False,
                ssr_mode=False,
                mcp_server=False,
                run_history=False,
                max_file_size=round(largest * 1e9),
                enable_monitoring=False,
                num_workers=0,
                # Else it asks for its page at once, and gives up on a busy machine.
                _frontend=False,
                footer_links=[],
                theme=theme(),
                css=_resource("studio.css"),
                head=f"<script>{_resource('studio.js')}</script>",
                app_kwargs={
                    "middleware": [Middleware(Gate, host=host)],
                    "docs_url": None,
                    "redoc_url": None,
                    "openapi_url": None,
                },
            )
        except OSError as error:
            raise ValueError(
                f"host={host} port={port}: the studio cannot listen there ({error}); choose "
                f"another port, or port=null for a free one"
            ) from error
        try:
            yield address
        finally:
            page.blocks.close(verbose=False)


def theme() -> gr.themes.Base:
    """Return how the page looks: quiet greys, one colour for what can be moved, local fonts."""
    own = gr.themes.Base(
        primary_hue=gr.themes.colors.teal,
        neutral_hue=gr.themes.colors.zinc,
        text_size=gr.themes.sizes.text_sm,
        spacing_size=gr.themes.sizes.spacing_sm,
        radius_size=gr.themes.sizes.radius_sm,
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    )
    return own.set(
        body_text_color_subdued="*neutral_500",
        body_text_color_subdued_dark="*neutral_400",
        color_accent="*primary_600",
        block_background_fill_dark="transparent",
        block_border_width="0px",
        block_shadow="none",
        block_padding="6px 10px",
        layout_gap="8px",
        form_gap_width="0px",
        button_secondary_background_fill="*neutral_100",
        button_secondary_background_fill_dark="*neutral_800",
    )


def _resource(name: str) -> str:
    return resources.files("sag_dit.studio").joinpath(name).read_text("utf-8")
