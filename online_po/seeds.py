"""Seeds and ids that depend on what they name and on nothing else: no clock, no `hash()`, no order of work."""

from __future__ import annotations

import json
from hashlib import blake2b
from typing import Any

SEEDS = 2**31
"""How many seeds there are: a seed over this is a number in [0, 1)."""
_SEED_KEY = b"online-po seed 1"
_ID_KEY = b"online-po id 1"


def stable_seed(*parts: int | str) -> int:
    """A seed in [0, SEEDS) from its parts, for example (run seed, "sample", round, prompt id, index).

    The same parts give the same seed on every machine and in every process. Parts are told apart by type
    and length: ("a", "b"), ("ab",) and 1, "1" all differ.
    """
    digest = blake2b(key=_SEED_KEY, digest_size=4)
    for part in parts:
        text = part if isinstance(part, str) else str(int(part))
        data = text.encode("utf-8", "surrogatepass")
        digest.update(b"%s%d:" % (b"s" if isinstance(part, str) else b"i", len(data)))
        digest.update(data)
    return int.from_bytes(digest.digest(), "big") % SEEDS


def stable_id(value: Any) -> str:
    """16 hex digits (64 bits) that name a JSON-able value: equal values, equal ids, in whatever key order."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return blake2b(text.encode("ascii"), key=_ID_KEY, digest_size=8).hexdigest()
