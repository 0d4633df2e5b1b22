"""What the service takes at most, as capabilities tell it."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """`max_tokens` is the most that fits a transcript; times in milliseconds, sizes in bytes or characters."""

    body_bytes: int = 4 * 1024 * 1024
    header_bytes: int = 32 * 1024
    prompt_chars: int = 1_000_000
    max_tokens: int = 32_768
    open_streams: int = 4096
    session_ttl_ms: int = 600_000
    session_turns: int = 8
    disconnect_grace_ms: int = 10_000
    transcript_retention_ms: int = 300_000
