"""API keys of the HTTP endpoint, known by their hashes alone once the configuration is read.

A key is hashed without salt or stretching: keys are long and random, unlike passwords, so nobody
guesses one from its hash, and a request costs one hash.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Iterable, Mapping
from typing import Annotated

from pydantic import AfterValidator, SecretStr

KEYS_VARIABLE = "FOCUS_RAY_API_KEY"
HASHES_VARIABLE = "FOCUS_RAY_API_KEY_HASHES"


def _checked_key(key: SecretStr) -> SecretStr:
    if not re.fullmatch(r"[!-~]+", key.get_secret_value()):
        raise ValueError("a key is visible ASCII without spaces, as it travels in an HTTP header")
    return key


def _checked_hash(key_hash: str) -> str:
    if not re.fullmatch(r"[0-9a-f]{64}", key_hash.lower()):
        raise ValueError(
            "a key's hash is the 64 hexadecimal digits of its SHA-256; make it with "
            "printf %s KEY | sha256sum"
        )
    return key_hash.lower()


ApiKey = Annotated[SecretStr, AfterValidator(_checked_key)]
KeyHash = Annotated[str, AfterValidator(_checked_hash)]


def hash_of(key: str) -> str:
    """SHA-256 in lower-case hexadecimal digits."""
    return hashlib.sha256(key.encode()).hexdigest()


def accepted_hashes(
    keys: Iterable[SecretStr], hashes: Iterable[str], environment: Mapping[str, str]
) -> tuple[str, ...]:
    """Hashes of all keys that requests may bring, from the configuration and the environment.

    Args:
        keys, hashes: checked ones.
        environment: ``FOCUS_RAY_API_KEY`` holds keys, ``FOCUS_RAY_API_KEY_HASHES`` hashes,
            separated by white space.

    Raises:
        ValueError: a variable is there and has no key, or no proper one.
    """
    plain = [key.get_secret_value() for key in keys]
    plain += [
        _checked_key(SecretStr(word)).get_secret_value()
        for word in _words(environment, KEYS_VARIABLE)
    ]
    ready = [_checked_hash(word) for word in _words(environment, HASHES_VARIABLE)]
    return tuple(dict.fromkeys([*map(hash_of, plain), *hashes, *ready]))


def is_accepted(brought: str, hashes: Iterable[str]) -> bool:
    """Whether a key has one of the hashes; takes as long whichever it is, or if none is."""
    brought_hash = hash_of(brought)
    matches = [hmac.compare_digest(brought_hash, each) for each in hashes]
    return any(matches)


def _words(environment: Mapping[str, str], name: str) -> list[str]:
    if name not in environment:
        return []
    words = environment[name].split()
    if not words:  # a secret that failed to mount must not open the server
        raise ValueError(f"{name} is set and empty; put keys there, or unset it to ask for none")
    return words
