"""What every request passes first: its host, the API key, and the number of requests in work. Plain ASGI."""

import hmac
import ipaddress
from collections.abc import Iterable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastllama.server.errors import error_response, response_of

OPEN_PATHS = frozenset({"/", "/health"})  # without a key, and however many requests are in work
BEARER = "bearer"
LOCALHOST = "localhost"  # and all names below it


class HostGuard:
    """Answers 403 unless the header Host names this machine as it names itself.

    For servers without a key. A web page can give its own name the address 127.0.0.1, and is then for browsers of the
    same origin as a server there: only the name tells.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or pass the request on."""
        host = _header(scope, b"host") if scope["type"] == "http" else None
        if host is None or _is_own(host.decode("latin-1")):  # browsers always send it
            await self.app(scope, receive, send)
            return
        response = error_response(
            403,
            f"without an API key this server answers requests to localhost and 127.0.0.1 only, and the header Host has "
            f"{host.decode('latin-1')[:100]!r}: use one of these, or start the server with --api_key",
            "host_not_allowed",
        )
        await response(scope, receive, send)


class ApiKeyGuard:
    """Answers 401 unless the header Authorization has one of the keys."""

    def __init__(self, app: ASGIApp, api_keys: Iterable[str]) -> None:
        self.app = app
        self._keys = [key.encode() for key in api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or pass the request on."""
        needs_key = scope["type"] == "http" and self._keys and _path(scope) not in OPEN_PATHS
        if not needs_key or scope["method"] == "OPTIONS" or self._is_known(_bearer(scope)):
            await self.app(scope, receive, send)
            return
        response = error_response(
            401,
            "this server needs an API key: send it as 'Authorization: Bearer KEY'",
            "invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )
        await response(scope, receive, send)

    def _is_known(self, key: bytes) -> bool:
        # Each in a time that does not depend on where the first difference is.
        return sum(hmac.compare_digest(key, known) for known in self._keys) > 0


class ConcurrencyGuard:
    """Answers 429 to requests beyond a number in work."""

    def __init__(self, app: ASGIApp, most: int) -> None:
        self.app, self._most = app, most
        self._n_open = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or pass the request on."""
        if scope["type"] != "http" or _path(scope) in OPEN_PATHS:
            await self.app(scope, receive, send)
            return
        if self._n_open >= self._most:
            response = error_response(
                429,
                f"the server has {self._most} requests in work (--max_connections): try again later",
                "too_many_requests",
                headers={"Retry-After": "1"},
            )
            await response(scope, receive, send)
            return
        self._n_open += 1
        try:
            await self.app(scope, receive, send)
        finally:
            self._n_open -= 1


class FaultGuard:
    """Answers 500 to a request on which the server fails, and logs why."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on."""
        has_begun = False

        async def send_and_note(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        try:
            await self.app(scope, receive, send_and_note)
        except Exception as error:
            response = response_of(error)  # logs it
            if not has_begun:
                await response(scope, receive, send)


def _path(scope: Scope) -> str:
    path, root = str(scope["path"]), str(scope.get("root_path", ""))
    return path.removeprefix(root) or "/" if root else path


def _is_own(host: str) -> bool:
    """Whether a value of the header Host, with or without a port, can only mean this machine."""
    name = host.lower()
    name = name[1:].partition("]")[0] if name.startswith("[") else name.partition(":")[0].removesuffix(".")
    if name == LOCALHOST or name.endswith(f".{LOCALHOST}"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _header(scope: Scope, name: bytes) -> bytes | None:
    return next((bytes(value) for key, value in scope["headers"] if key == name), None)


def _bearer(scope: Scope) -> bytes:
    kind, _, key = (_header(scope, b"authorization") or b"").partition(b" ")
    return key.strip() if kind.decode("latin-1").lower() == BEARER else b""
