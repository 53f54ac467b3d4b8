"""Bytes that were read and checked, kept for who needs them next, as far as memory allows."""

from __future__ import annotations

import threading


class KeptBytes:
    """Bytes by digest, ``limit`` of them at most; safe to use from several threads."""

    def __init__(self, limit: int) -> None:
        self._left = limit
        self._kept: dict[str, bytes] = {}
        self._lock = threading.Lock()

    def keep(self, sha256: str, data: bytes) -> None:
        with self._lock:
            if sha256 not in self._kept and len(data) <= self._left:
                self._kept[sha256] = data
                self._left -= len(data)

    def take(self, sha256: str) -> bytes | None:
        """What was kept under a digest, once."""
        with self._lock:
            data = self._kept.pop(sha256, None)
            self._left += len(data or b"")
        return data
