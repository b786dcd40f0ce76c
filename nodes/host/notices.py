"""Notices: what the user should know although the run goes on, in the log and on the running node."""

from __future__ import annotations

import html
import logging
import sys
from typing import Any

from comfy_execution.utils import get_executing_context

logger = logging.getLogger(__name__)

MARK = "⚠"  # begins each notice on the canvas; web/notices.js removes texts that begin with it

_shown: tuple[Any, dict[str, list[str]]] = (None, {})  # the running prompt, and the notices of its nodes by node id


def notify(text: str) -> None:
    """Logs one line, and shows it on the node that ComfyUI is running, once per run of the node.

    Inside a subgraph, it is also shown on the nodes around it. A node shows one text: its notices are joined by line
    breaks.
    """
    global _shown
    context = get_executing_context()
    if context is None:  # called outside a prompt
        logger.warning(text)
        return
    if _shown[0] != context.prompt_id:
        _shown = (context.prompt_id, {})
    notices = _shown[1]
    if text in notices.get(context.node_id, ()):
        return
    logger.warning(text)
    path = context.node_id.split(":")  # ids of the nodes around it and its own
    for depth in range(len(path)):
        node_id = ":".join(path[: depth + 1])
        notices.setdefault(node_id, []).append(text)
        _show(notices[node_id], node_id)


def _show(notices: list[str], node_id: str) -> None:
    """Shows notices on a node in the browser that queued the prompt, whose widget reads HTML."""
    server = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
    if server is None or server.client_id is None:
        return
    lines = (html.escape(f"{MARK} {text}", quote=False) for text in notices)
    server.send_progress_text("\n".join(lines), node_id, sid=server.client_id)
