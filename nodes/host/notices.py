"""Notices: what the user should know although the run goes on, in the log and on the running node."""

from __future__ import annotations

import logging
import sys
from typing import Any

from comfy_execution.utils import get_executing_context

logger = logging.getLogger(__name__)

_shown: tuple[Any, list[str]] = (None, [])  # the running node and its notices


def notify(text: str) -> None:
    """Logs one line, and shows it on the node that ComfyUI is running, once per run of the node.

    A node shows one text: its notices are joined by line breaks.
    """
    global _shown
    context = get_executing_context()
    if context is None:  # called outside a prompt
        logger.warning(text)
        return
    if _shown[0] != context:
        _shown = (context, [])
    lines = _shown[1]
    if text in lines:
        return
    logger.warning(text)
    lines.append(text)
    server = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
    if server is not None:
        server.send_progress_text("\n".join(lines), context.node_id)
