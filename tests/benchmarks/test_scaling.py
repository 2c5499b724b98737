"""The scaling benchmark: its layouts, its arithmetic, and a whole run of toy size without Ray."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from focus_ray.benchmarks import scaling
from focus_ray.benchmarks.scaling_flags import parse_arguments
from focus_ray.benchmarks.scaling_layouts import Layout, default_layouts, in_turns
from focus_ray.benchmarks.scaling_load import Load, Share, ask
from focus_ray.benchmarks.scaling_report import draw
from focus_ray.benchmarks.scaling_rows import (
    Answers,
    Steps,
    compare,
    num_between,
    row_of,
    tokens_between,
)
from focus_ray.benchmarks.serving_client import COMPLETIONS, Sent


def sent(start_s, end_s, tokens=10, text="yes", events=2):
    gap_s = (end_s - start_s) / events
    return Sent(
        due_s=start_s,
        sent_s=start_s,
        finished_s=end_s,
        texts_s=[start_s + gap_s * (n + 1) for n in range(events)],
        text=text,
        usage={
            **dict.fromkeys(("prompt_tokens", "denoising_steps", "processed_tokens"), 4),
            **dict.fromkeys(("retained_tokens", "decoded_tokens"), 4),
            "completion_tokens": tokens,
        },
    )


def load(answers, start_s=1.0, end_s=3.0, steps=100):
    return Load(answers, start_s, end_s, Steps(start_s, 0), Steps(end_s, steps))


def row(layout, answers, known=None, **options):
    known = Answers() if known is None else known
    return row_of("m", Layout.parse(layout), 2, load(answers, **options), [None] * 9, known)


@pytest.mark.parametrize(
    ("devices", "ranks", "layouts"),
    [
        pytest.param(1, {1}, "1x1", id="one device"),
        pytest.param(2, {1, 2}, "1x1 2x1 1x2", id="two"),
        pytest.param(8, {1, 2, 4, 8}, "1x1 2x1 4x1 8x1 1x2 1x4 4x2", id="eight"),
        pytest.param(8, {1}, "1x1 2x1 4x1 8x1", id="a model that cannot be shared"),
        pytest.param(3, {1, 2}, "1x1 2x1 1x2", id="no power of two"),
    ],
)
def test_what_is_measured_by_default(devices, ranks, layouts):
    assert " ".join(map(str, default_layouts(devices, ranks))) == layouts


def test_layouts_stand_side_by_side_where_there_is_room():
    layouts = default_layouts(8, {1, 2, 4})
    turns = in_turns(layouts, 8)
    assert sorted(each for turn in turns for each in turn) == sorted(layouts)
    assert all(sum(each.num_devices for each in turn) <= 8 for turn in turns)
    assert len(turns) == 4 and turns[0][0] == Layout(1, 1)


@pytest.mark.parametrize("text", ["2", "0x1", "2x", "axb", "2x1x1"])
def test_what_is_no_layout_is_refused(text):
    with pytest.raises(ValueError, match="written as 4x2"):
        Layout.parse(text)


def test_tokens_count_in_the_stretch_in_which_their_text_came():
    answer = sent(0.0, 4.0, tokens=8, events=4)  # text at 1, 2, 3 and 4 s
    assert num_between(answer, 1.0, 3.0) == 2
    assert tokens_between(answer, 1.0, 3.0) == 4.0
    assert tokens_between(sent(0.0, 1.0, events=1), 1.0, 3.0) == 0.0


def test_speed_and_efficiency_are_those_of_the_same_load_for_each_engine():
    one = row("1x1", [(0, sent(0.0, 2.0)), (1, sent(0.0, 2.0))])
    two = row("2x1", [(n, sent(0.0, 2.0, tokens=9)) for n in range(4)])
    ranks = row("1x2", [(0, sent(0.0, 2.0)), (1, sent(0.0, 2.0))], steps=150)
    rows = [one, two, ranks]
    found = compare(two, rows)
    assert (found.speed, found.efficiency) == (pytest.approx(1.8), pytest.approx(0.9))
    # Two engines took 100 steps together in the time in which one took them.
    assert (one.step_s, two.step_s) == (pytest.approx(0.02), pytest.approx(0.04))
    assert compare(ranks, rows).step_speed == pytest.approx(1.5)
    assert compare(two, [two]) is None
    assert "engines" in draw(rows, "title")


def test_answers_that_differ_are_told_with_the_place():
    known = Answers()
    assert row("1x1", [(0, sent(0, 2)), (1, sent(0, 2, text="no"))], known).num_compared == 0
    other = row("2x1", [(0, sent(0, 2, text="yet")), (1, sent(0, 2, text="no"))], known)
    assert (other.num_compared, other.num_different) == (2, 1)
    [difference] = other.differences
    assert (difference.prompt, difference.position, difference.found) == (0, 2, "t")


def test_steps_are_summed_over_the_engines_of_a_model():
    metrics = (
        "# TYPE focus_ray:engine_steps counter\n"
        'focus_ray:engine_steps_total{model_name="2x1",replica="a"} 3.0\n'
        'focus_ray:engine_steps_total{model_name="2x1",replica="b"} 4.0\n'
        'focus_ray:engine_steps_total{model_name="1x1",replica="c"} 9.0\n'
    )
    assert Steps.read(metrics, "2x1", 0.0).number == 7
    with pytest.raises(ValueError, match="4x1"):
        Steps.read(metrics, "4x1", 0.0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        pytest.param(["--layout", "4x1", "--num-devices", "2"], "needs 4 devices", id="too many"),
        pytest.param(["--layout", "1x3"], "3", id="ranks that do not divide the model"),
        pytest.param(["--window-s", "0"], "--window-s must be above 0", id="no window"),
        pytest.param(["--step-ms", "5", "--shape", "sdar-8b"], "leave out --shape", id="both"),
        pytest.param(["--mode", "fast"], "--mode fast", id="no mode"),
    ],
)
def test_flags_that_do_not_fit_are_refused(arguments, words, capsys):
    with pytest.raises(SystemExit) as caught:
        parse_arguments(["--num-devices", "4", *arguments], "")
    assert caught.value.code == 2
    assert words in capsys.readouterr().err


async def asked(answer, stop_after, bodies, concurrency):
    """What a process brings home whose requests are answered so, and how many were in flight."""
    stop, num_ended = multiprocessing.Event(), multiprocessing.Value("q", 0)
    num_open, most = 0, 0

    async def handler(request):
        nonlocal num_open, most
        num_open += 1
        most = max(most, num_open)
        await asyncio.sleep(0.01)
        num_open -= 1
        if num_ended.value >= stop_after:
            stop.set()
        return answer(await request.json())

    app = web.Application()
    app.router.add_post(COMPLETIONS, handler)
    async with TestServer(app) as server:
        share = Share(str(server.make_url(COMPLETIONS)), bodies, concurrency)
        found = await ask(share, stop, num_ended)
    assert num_ended.value == len(found)
    return found, most


async def test_a_process_asks_in_turns_until_it_is_told_to_stop():
    def answer(body):
        events = {"choices": [{"text": body["prompt"]}], "usage": {"completion_tokens": 3}}
        return web.Response(text=f"data: {json.dumps(events)}\n\ndata: [DONE]\n\n")

    bodies = [(1, {"prompt": "odd"}), (4, {"prompt": "even"})]
    found, most = await asked(answer, 7, bodies, 3)
    assert most == 3 and len(found) >= 8
    assert [number for number, _ in found[:5]] == [1, 4, 1, 4, 1]
    assert {(number, each.text) for number, each in found} == {(1, "odd"), (4, "even")}
    assert all(each.error is None for _, each in found), "what was in flight was waited for"


async def test_a_process_stops_at_the_first_failure():
    def refuse(body):
        return web.json_response({"error": {"message": "no", "code": "full"}}, status=429)

    found, _ = await asked(refuse, 1000, [(0, {})], 2)
    assert len(found) <= 4
    assert {each.error for _, each in found} == {"HTTP 429 full"}


class FakeClients:
    """Answers at once; each engine gives ten tokens a second for each request in flight."""

    def __init__(self, number):
        self.number = number

    def __enter__(self):
        return self

    def __exit__(self, *_): ...

    def run(self, url, bodies, concurrency, window_s, read):
        answers = [(n % len(bodies), sent(0.0, 1.0 + n % 2)) for n in range(3 * concurrency)]
        return Load(answers, 0.5, 0.5 + window_s, Steps(0.0, 0), Steps(window_s, 50))


@pytest.fixture
def without_ray(monkeypatch):
    asked = []

    @contextmanager
    def server(args, model, turn, tell):
        asked.append([str(each) for each in turn])
        yield SimpleNamespace(url="http://localhost:1")

    monkeypatch.setattr(scaling, "server_of", server)
    monkeypatch.setattr(scaling, "Clients", FakeClients)
    return asked


def test_a_run_writes_all_it_measured(without_ray, tmp_path, capsys):
    files = [str(tmp_path / name) for name in ("x.json", "x.svg")]
    flags = ["--step-ms", "5", "--num-devices", "2", "--window-s", "2", "--num-prompts", "4"]
    with pytest.raises(SystemExit) as caught:
        scaling.main([*flags, "--json", files[0], "--plot", files[1]])
    out = capsys.readouterr().out
    assert caught.value.code == 0, out
    report = json.loads((tmp_path / "x.json").read_text())
    assert [each["layout"] for each in report["rows"]] == ["1x1", "2x1"]
    assert report["rows"][1]["against_one"]["efficiency"] == pytest.approx(1.0)
    assert without_ray == [["1x1"], ["2x1"]] and report["skipped"] == []
    assert "100.0%" in out and (tmp_path / "x.svg").read_text().startswith("<svg")


def test_what_would_not_end_in_time_is_left_out(without_ray, tmp_path, capsys):
    flags = ["--step-ms", "5", "--num-devices", "2", "--window-s", "9", "--budget-s", "1"]
    with pytest.raises(SystemExit):
        scaling.main([*flags, "--json", str(tmp_path / "x.json")])
    report = json.loads((tmp_path / "x.json").read_text())
    assert report["rows"] == [] and len(report["skipped"]) == 2
    assert "would not end" in capsys.readouterr().out
