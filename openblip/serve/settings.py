"""What a server allows: sizes, times, rates and who may ask."""

from dataclasses import dataclass, field
from pathlib import Path

from openblip.images import MAX_PIXELS


@dataclass(frozen=True)
class ServerSettings:
    """Limits of one server; each request is held to all of them.

    max_upload_bytes  of a whole request
    max_pixels        of a picture, read from its header before it is decoded
    max_texts         of a request: texts, labels or candidate answers
    max_characters    of one text
    max_active        requests that are accepted at once; more are answered with 429
    batch_wait_s      that a model waits for more requests of a kind when it has fewer than it can
                      take together
    upload_timeout_s  for the body of a request to come in
    answer_timeout_s  for a model's part of an answer, waiting for its turn included
    drain_timeout_s   for what is accepted when the server is told to stop
    tokens            of which a request needs one, as a bearer token; none: everyone may ask
    requests_per_s    of one client, or of one token; None: any number
    burst             requests that a client may send at once before the rate holds
    origins           other sites whose pages may ask (CORS)
    may_fetch         whether pictures may be given by URL
    runs              folders whose HTML pages are shown, by name
    """

    max_upload_bytes: int = 20_000_000
    max_pixels: int = MAX_PIXELS
    max_texts: int = 256
    max_characters: int = 2_000
    max_active: int = 64
    batch_wait_s: float = 0.004
    upload_timeout_s: float = 30.0
    answer_timeout_s: float = 60.0
    drain_timeout_s: float = 60.0
    tokens: tuple[str, ...] = ()
    requests_per_s: float | None = None
    burst: int = 20
    origins: tuple[str, ...] = ()
    may_fetch: bool = False
    runs: dict[str, Path] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("max_upload_bytes", "max_pixels", "max_texts", "max_active", "burst"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} must be at least 1")
        if self.requests_per_s is not None and self.requests_per_s <= 0:
            raise ValueError(f"requests_per_s {self.requests_per_s} must be above 0")
        if any(len(token) < 16 for token in self.tokens):
            raise ValueError("a token is shorter than 16 characters, and could be guessed")
