"""A reward server of OpenRLHF's kind: `POST <url>` with JSON `{"query", "prompts", "labels"}`, scores in answer.

It knows nothing of configs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from meshift.rewards.http import JsonServer, check_url


class RemoteReward:
    """A reward function of OpenRLHF's signature that asks a server. `timeout_s` covers all tries of one call."""

    def __init__(self, url: str, timeout_s: float | None = None) -> None:
        check_url(url)
        self._server = JsonServer(url, timeout_s)

    def __call__(self, queries: Sequence[str], prompts: Sequence[str], labels: Sequence[Any]) -> dict[str, Any]:
        """The server's answer. Raises `CallError` where there is none within `timeout_s`, or no JSON object."""
        return self._server.post({"query": list(queries), "prompts": list(prompts), "labels": list(labels)})
