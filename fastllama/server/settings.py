"""What a server may be told."""

from dataclasses import dataclass

MEBIBYTE = 2**20


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """The limits of a server, and who may use it."""

    api_keys: tuple[str, ...] = ()  # one of them must come with a request; empty: none is needed
    max_body_bytes: int = 8 * MEBIBYTE
    max_prompt_tokens: int | None = None  # of each prompt; None: what fits in the context
    max_queue: int = 256  # answers that may wait for a row
    max_connections: int = 1024  # HTTP requests in work at once
    head_seconds: float = 60.0  # for a request's head to arrive on an open connection
    body_seconds: float = 60.0  # for a request's body to arrive
    send_seconds: float = 60.0  # in which a client must read something of its answer
    drain_seconds: float = 30.0  # for answers to end once the server is told to stop
    allow_origins: tuple[str, ...] = ()  # web pages of other origins that may use it
