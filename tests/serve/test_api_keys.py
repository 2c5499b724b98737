"""API keys: which are accepted, and that nothing opens the server by mistake."""

from __future__ import annotations

import hashlib

import pytest
from pydantic import SecretStr

from focus_ray.serve import api_keys
from focus_ray.serve.api_keys import accepted_hashes, hash_of, is_accepted


def test_hash_is_what_sha256sum_prints():
    assert hash_of("abc") == hashlib.sha256(b"abc").hexdigest()
    assert hash_of("abc").startswith("ba7816bf")


@pytest.mark.parametrize(
    ("brought", "accepted"),
    [
        pytest.param("one", True, id="first"),
        pytest.param("three", True, id="last"),
        pytest.param("", False, id="none"),
        pytest.param("on", False, id="part of one"),
        pytest.param("One", False, id="case"),
        pytest.param("schlüssel", False, id="not ASCII"),
        pytest.param(hash_of("one"), False, id="a hash is no key"),
    ],
)
def test_is_accepted(brought, accepted):
    assert is_accepted(brought, [hash_of(key) for key in ("one", "two", "three")]) is accepted


def test_every_hash_is_compared_whichever_matches(monkeypatch):
    compared = []

    def compare(a, b):
        compared.append(b)
        return a == b

    monkeypatch.setattr(api_keys.hmac, "compare_digest", compare)
    hashes = [hash_of(key) for key in ("one", "two", "three")]
    assert is_accepted("one", hashes)
    assert compared == hashes


def test_keys_come_from_everywhere_once():
    environment = {
        "FOCUS_RAY_API_KEY": " b  c ",
        "FOCUS_RAY_API_KEY_HASHES": f"{hash_of('d').upper()} {hash_of('a')}",
    }
    hashes = accepted_hashes([SecretStr("a")], [hash_of("e"), hash_of("b")], environment)
    assert sorted(hashes) == sorted(map(hash_of, "abcde"))
    assert accepted_hashes([], [], {}) == ()


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        pytest.param({"FOCUS_RAY_API_KEY": " "}, "FOCUS_RAY_API_KEY is set and empty", id="no key"),
        pytest.param({"FOCUS_RAY_API_KEY_HASHES": ""}, "HASHES is set and empty", id="no hash"),
        pytest.param({"FOCUS_RAY_API_KEY": "schlüssel"}, "visible ASCII", id="not for headers"),
        pytest.param({"FOCUS_RAY_API_KEY_HASHES": "abc"}, "64 hexadecimal digits", id="a key"),
    ],
)
def test_a_broken_environment_is_refused_and_not_quoted(environment, message):
    with pytest.raises(ValueError, match=message) as refused:
        accepted_hashes([], [], environment)
    assert "schlüssel" not in str(refused.value)
    assert "abc" not in str(refused.value)
