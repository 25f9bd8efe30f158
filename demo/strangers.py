"""What gradio would do for a stranger and this page doesn't: fetch an address, or name a folder of the server.

An API's caller may give the address of a file in place of an upload, in any argument, or ask for file=ADDRESS. gradio
then asks a name server on the internet about it and fetches it from this machine: the server would be anybody's proxy.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

import gradio as gr
from fastapi import HTTPException
from gradio import processing_utils, routes
from gradio.exceptions import InvalidPathError

UPLOAD = "Upload the file itself: an address, or a path of the server, is not taken."
_check_allowed = processing_utils._check_allowed


def shut() -> None:
    """Refuse addresses and paths in arguments, in this process."""
    processing_utils.async_ssrf_protected_download = _refuse_soon
    processing_utils.ssrf_protected_download = processing_utils.save_url_to_cache = _refuse
    processing_utils._check_allowed = _check
    routes.secure_url_stream_response = _forbid


def _refuse(*_: Any, **__: Any) -> NoReturn:
    raise gr.Error(UPLOAD, print_exception=False)


async def _refuse_soon(*_: Any, **__: Any) -> NoReturn:
    _refuse()


async def _forbid(*_: Any, **__: Any) -> NoReturn:
    raise HTTPException(403, UPLOAD)


def _check(path: str | Path, check_in_upload_folder: bool) -> None:
    """gradio's own check, whose words name the working folder."""
    try:
        _check_allowed(path, check_in_upload_folder)
    except InvalidPathError:
        if not check_in_upload_folder:  # an answer of ours
            raise
        _refuse()
