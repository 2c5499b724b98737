from __future__ import annotations

import socket
import threading

import pytest

from focus_ray.engine.rank_link import Door, knock


@pytest.fixture
def door():
    door = Door("127.0.0.1")
    yield door
    door.close()


def knocking(door, **overrides):
    """Knock on a thread; what came of it is in the list that is returned."""
    answers = []
    arguments = {"token": door.token, "rank": 3, "purpose": "steps", **overrides}

    def run():
        try:
            answers.append(knock(door.address, **arguments))
        except ConnectionError as error:
            answers.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, answers


def test_objects_pass_both_ways(door):
    thread, answers = knocking(door)
    rank, purpose, here = door.accept(5)
    thread.join(5)
    there = answers[0]
    assert (rank, purpose) == (3, "steps")
    here.send({"plan": [1, 2]})
    there.send("ready")
    assert there.recv() == {"plan": [1, 2]}
    assert here.recv() == "ready"
    there.close()
    with pytest.raises(EOFError):
        here.recv()


def test_nobody_comes(door):
    assert door.accept(0.01) is None


@pytest.mark.parametrize("token", [b"x" * 32, b"", b"x" * 1000], ids=["wrong", "none", "too long"])
def test_who_has_no_token_is_turned_away(door, token):
    thread, answers = knocking(door, token=token)
    assert door.accept(5) is None
    thread.join(5)
    assert isinstance(answers[0], ConnectionError)
    thread, answers = knocking(door)  # and the next one comes in
    assert door.accept(5) is not None
    thread.join(5)


def test_a_stranger_who_hangs_up_does_no_harm(door):
    socket.create_connection(door.address).close()
    assert door.accept(5) is None


def test_a_closed_door(door):
    door.close()
    with pytest.raises(ConnectionError):
        knock(door.address, door.token, 1, "life")
