"""JSON over HTTP, as reward servers and judges are asked: `POST`, a few tries, one time limit for all of them.

Redirects are refused, and so are other schemes than http and https. It knows nothing of what is asked.
"""

from __future__ import annotations

import email.utils
import http.client
import io
import json
import re
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from functools import partial
from typing import Any
from urllib.parse import urlsplit

from meshift.errors import ConfigError
from meshift.rewards import hanging
from meshift.rewards.calling import timed_out
from meshift.rewards.scores import CallError, Fault

NUM_TRIES = 5  # where no connection can be made, it breaks, or whoever stands before the server gets none
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.25, 4.0  # doubled after each try
BUSY = (429, 503)  # tried until the time is over
UNREACHED = (502, 504)
MAX_BYTES = 64 * 2**20


class JsonServer:
    """`POST`s JSON objects to one address and reads JSON objects, in which there should be `expected`.

    `timeout_s` covers all tries of one call; none is half an hour. A server that says that it is busy is asked
    again until then, at the times that its Retry-After names.
    """

    def __init__(
        self,
        url: str,
        timeout_s: float | None = None,
        headers: Mapping[str, str] | None = None,
        expected: str = "rewards",
    ) -> None:
        self.url = url
        self.timeout_s = timeout_s
        self.expected = expected
        self._headers = {"Content-Type": "application/json", **(headers or {})}
        self._opener = urllib.request.build_opener(_NoRedirect, _Http, _Https)

    def post(self, question: Mapping[str, Any]) -> dict[str, Any]:
        """The server's answer. Raises `CallError` where there is none within `timeout_s`, or no JSON object."""
        body = json.dumps(question).encode()
        deadline = time.monotonic() + (hanging.ENDED_AFTER_S if self.timeout_s is None else self.timeout_s)
        num_failed, pause = 0, FIRST_PAUSE_S
        while True:
            try:
                return _decoded(self._post(body, deadline), self.expected)
            except _NoAnswerError as error:
                num_failed += 1
                if num_failed == NUM_TRIES:
                    what = f"got no answer from {shown_url(self.url)} in {NUM_TRIES} tries ({error})"
                    raise CallError(Fault(what, "connection"), can_locate=False) from error
                wait, why = pause, ""
            except _BusyError as error:
                wait, why = pause if error.wait_s is None else max(error.wait_s, FIRST_PAUSE_S), f", but {error}"
            if time.monotonic() + wait >= deadline:
                raise CallError(timed_out(self.timeout_s, why), can_locate=False)
            time.sleep(wait)
            pause = min(2 * pause, LONGEST_PAUSE_S)

    def _post(self, body: bytes, deadline: float) -> bytes:
        request = urllib.request.Request(self.url, body, dict(self._headers), method="POST")
        left = max(0.001, deadline - time.monotonic())
        try:
            with self._opener.open(request, timeout=left) as response:
                return _read(response)
        except TimeoutError:
            raise CallError(timed_out(self.timeout_s), can_locate=False) from None
        except urllib.error.HTTPError as error:
            raise _status_error(error, self.url) from None
        except urllib.error.URLError as error:
            if isinstance(error.reason, TimeoutError):
                raise CallError(timed_out(self.timeout_s), can_locate=False) from None
            raise _NoAnswerError(error.reason) from error
        except (OSError, http.client.HTTPException) as error:
            raise _NoAnswerError(f"{type(error).__name__}: {error}") from error


def check_url(url: str, what: str = "reward server", example: str = "http://127.0.0.1:5000/get_reward") -> None:
    """Raise `ConfigError` where `what` cannot have this address."""
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018 - raises for one that is no number
    except ValueError as error:
        raise ConfigError(f"{what} {url!r} has no valid address ({error}); write it as {example}") from None
    if parts.scheme not in ("http", "https"):
        raise ConfigError(
            f"{what} {url!r}: only http and https are asked, not {parts.scheme}; write it as {example}"
        )
    if not parts.hostname:
        raise ConfigError(f"{what} {url!r} names no host; write it as {example}")
    if parts.username is not None or parts.password is not None:
        raise ConfigError(f"{what} {shown_url(url)}: a user name in the address is not supported; remove it")


class _NoAnswerError(Exception):
    """The connection failed: worth another try."""


class _BusyError(Exception):
    """The server says that it is busy, and perhaps for how long."""

    def __init__(self, what: str, wait_s: float | None) -> None:
        super().__init__(what)
        self.wait_s = wait_s


class _Response(http.client.HTTPResponse):
    """All that is read of it, headers too, comes before one deadline: a socket's own limit is that of one read."""

    def __init__(self, sock: socket.socket, *args: Any, deadline: float, **kwargs: Any) -> None:
        super().__init__(sock, *args, **kwargs)
        self.fp = io.BufferedReader(_Until(self.fp.detach(), sock, deadline))


class _Until(io.RawIOBase):
    """A socket's stream up to a deadline."""

    def __init__(self, stream: io.RawIOBase, sock: socket.socket, deadline: float) -> None:
        self._stream, self._sock, self._deadline = stream, sock, deadline

    def readable(self) -> bool:
        return True

    def readinto(self, room: Any) -> int | None:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._sock.settimeout(left)
        return self._stream.readinto(room)

    def close(self) -> None:
        self._stream.close()
        super().close()


def _limited(kind: type[http.client.HTTPConnection], host: str, *, timeout: float, **kwargs: Any) -> Any:
    """A connection whose whole answer has until `timeout` seconds from now."""
    connection = kind(host, timeout=timeout, **kwargs)
    connection.response_class = partial(_Response, deadline=time.monotonic() + timeout)  # type: ignore[assignment]
    return connection


class _Http(urllib.request.HTTPHandler):
    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(partial(_limited, http.client.HTTPConnection), req)


class _Https(urllib.request.HTTPSHandler):
    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(partial(_limited, http.client.HTTPSConnection), req)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Leaves a redirect to be reported as the status that it is."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        """None: go nowhere."""


def _status_error(error: urllib.error.HTTPError, url: str) -> Exception:
    if error.code in BUSY:
        return _BusyError(f"status {error.code}", wait_of(error.headers.get("Retry-After"), time.time()))
    if error.code in UNREACHED:
        return _NoAnswerError(f"status {error.code}")
    hint = ", a redirect, which is not followed" if 300 <= error.code < 400 else ""
    fault = Fault(f"got status {error.code} from {shown_url(url)}{hint}", f"status {error.code}")
    return CallError(fault, can_locate=error.code >= 400)


def wait_of(retry_after: str | None, now: float) -> float | None:
    """The seconds from `now` (Unix time) that a header Retry-After asks for, in seconds or as a date (RFC 9110,
    10.2.3); None for none that can be read."""
    if retry_after is None or re.fullmatch(r"\d{1,9}", retry_after):
        return retry_after if retry_after is None else float(retry_after)
    try:
        date = email.utils.parsedate_tz(retry_after)
        return None if date is None else max(0.0, email.utils.mktime_tz(date) - now)
    except (ValueError, OverflowError):
        return None


def _read(response: http.client.HTTPResponse) -> bytes:
    """The whole body."""
    parts: list[bytes] = []
    while part := response.read1(1 << 16):
        parts.append(part)
        if sum(map(len, parts)) > MAX_BYTES:
            raise CallError(Fault(f"got more than {MAX_BYTES} bytes of answer", "http"), can_locate=False)
    return b"".join(parts)


def _decoded(body: bytes, expected: str) -> dict[str, Any]:
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError):
        raise CallError(Fault(f"got an answer that is not JSON: {body[:60]!r}", "http")) from None
    if not isinstance(answer, dict):
        raise CallError(Fault(f"got an answer that is no JSON object with {expected!r}", "http"))
    return answer


def shown_url(url: str) -> str:
    """The address without user, query and fragment, which may hold secrets."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
