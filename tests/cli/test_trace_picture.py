"""Records and drawing of a trace, from plain data: no model, no engine."""

from __future__ import annotations

import json
from dataclasses import replace
from xml.etree import ElementTree

import pytest

from focus_ray.cli.svg import element, printable, words
from focus_ray.cli.trace_picture import draw
from focus_ray.cli.trace_records import TraceHeader, trace_of
from focus_ray.engine.outputs import CompletionOutput, DenoisingStep, RequestStats

SVG = "{http://www.w3.org/2000/svg}"
ODD = {
    10: "<b>",
    11: "&amp;",
    12: "\n\t",
    13: "\x00\x1b\ufffe",
    14: "\ud800",
    15: "\u202e",
    16: "]]>",
    17: " '\"",
    18: "語" * 30,
    19: "",
}


def token_text(token_id):
    return ODD.get(token_id, f" t{token_id}")


def header(**changed):
    fields = {
        "version": "0",
        "model": "sdar-tiny",
        "decoding": "focus",
        "eviction_policy": "delta",
        "focus_alpha": 1.5,
        "unmasking": "low_confidence_dynamic",
        "confidence_threshold": 0.8,
        "denoising_steps": 4,
        "editing_threshold": 0.5,
        "max_post_steps": 16,
        "temperature": 0.0,
        "seed": None,
        "block_length": 4,
        "prompt": "p",
        "prompt_token_ids": (1, 2, 3, 4, 5),
        "prompt_tokens": (" t1", " t2", " t3", " t4", " t5"),
    }
    return TraceHeader(**{**fields, **changed})


def step(block_start, masked, processed, retained, decoded, confidence, delta=()):
    """``decoded``: position to token id; ``confidence``: of each masked position."""
    known = dict(zip(masked, confidence, strict=True))
    return DenoisingStep(
        block_start=block_start,
        masked=masked,
        processed=processed,
        retained=retained,
        positions=tuple(decoded),
        token_ids=tuple(decoded.values()),
        confidences=tuple(known[position] for position in decoded),
        masked_confidences=confidence,
        importance_deltas=delta,
    )


STEPS = (
    step(4, (5, 6, 7), (4, 5, 6, 7), (4, 5, 6), {6: 20}, (0.5, 0.9, None), (0.1, 0.2, -0.3)),
    step(4, (5, 7), (5, 6, 7), (5, 6, 7), {5: 21, 7: 22}, (0.95, 0.99)),
    # the tokens that the last step decoded, and the left neighbour of each, ride along
    step(
        8,
        (8, 9, 10, 11),
        (5, 6, 7, 8, 9, 10, 11),
        (5, 6, 7, 8, 9),
        {8: 23, 9: 24},
        (0.85, 0.9, None, None),
    ),
)


def trace(steps=STEPS, token_ids=(21, 20, 22, 23), **changed):
    output = CompletionOutput(
        0,
        text="words",
        token_ids=list(token_ids),
        finish_reason="stop",
        stats=RequestStats(denoising_steps=3, decoded_tokens=5, processed_tokens=14),
        trace=steps,
    )
    return trace_of(header(**changed), output, token_text)


def many_blocks(count):
    """Two steps for each of ``count`` blocks after the prompt's first."""
    before = ()
    for start in range(8, 8 + 4 * count, 4):
        block = tuple(range(start, start + 4))
        first, last = {p: 100 + p for p in block[:3]}, {block[3]: 100 + block[3]}
        yield step(start, block, before + block, before + block, first, (0.9,) * 4)
        yield step(start, block[3:], block, block, last, (0.9,))
        before = block[2:]


def titles(svg):
    return [node.text or "" for node in ElementTree.fromstring(svg).iter(f"{SVG}title")]


def texts(svg):
    """What is written in the picture, less the tooltips."""
    found = []
    for node in ElementTree.fromstring(svg).iter(f"{SVG}text"):
        parts = [node.text, *(text for child in node for text in shown(child))]
        found.append("".join(filter(None, parts)))
    return found


def shown(child):
    return (None if child.tag == f"{SVG}title" else child.text), child.tail


def test_a_step_says_what_became_of_each_position():
    first, second, last = trace().steps
    assert first.positions == (4, 5, 6, 7)
    assert first.states == ("decoded", "retained", "decoded", "evicted")
    assert first.newly_decoded == (False, False, True, False)
    assert first.tokens == (" t5", None, " t20", None)
    assert first.confidence == (None, 0.5, 0.9, None)
    assert first.delta == (None, 0.1, 0.2, -0.3)
    assert (first.retained_tokens, first.evicted_tokens, first.decoded_tokens) == (3, 1, 1)
    assert second.processed == (False, True, True, True)
    assert second.token_ids == (5, 21, 20, 22)
    assert (last.step, last.block_start) == (3, 8)
    assert last.delta == (None,) * 4
    assert [made.leftover for made in trace().steps] == [(), (), (5, 6, 7)]
    assert last.processed == (True,) * 4
    assert (last.processed_tokens, last.retained_tokens, last.evicted_tokens) == (7, 5, 2)


def test_where_nothing_is_evicted_masked_tokens_are_just_masked():
    whole = (4, 5, 6, 7)
    kept = step(4, (5, 6, 7), whole, whole, {5: 20}, (0.9, 0.3, 0.2))
    [only] = trace((kept,), decoding="block", eviction_policy=None, focus_alpha=None).steps
    assert only.states == ("decoded", "decoded", "masked", "masked")


def test_lines_are_json_of_one_line_each_whatever_the_tokens():
    odd = step(4, (5, 6, 7), (5, 6, 7), (5, 6, 7), {5: 13, 6: 14, 7: 12}, (0.9, 0.9, 0.9))
    lines = list(trace((odd,), token_ids=(13, 14, 12)).lines())
    found = [json.loads(line) for line in lines]
    assert [record["type"] for record in found] == ["header", "step", "summary"]
    assert found[1]["tokens"][1:] == ["\x00\x1b\ufffe", "\ud800", "\n\t"]
    assert all("\n" not in line and line.isascii() for line in lines)


def test_a_picture_explains_itself():
    svg = draw(trace())
    written = texts(svg)
    assert "sdar-tiny, decoding focus" in written[0]
    assert "policy delta · alpha 1.5 · block length 4 · threshold 0.8" in written[0]
    assert {"decoded in this step", "masked, retained: computed in full", "prompt"} <= set(written)
    assert "masked, evicted after layer 1" in written
    assert "masked, evicted before layer 0" not in written  # there is none
    assert "end of the answer" in written
    assert "of the block before: computed once more, now committed" in written
    assert trace().summary.totals in " ".join(written)


def test_tooltips_name_token_confidence_and_delta():
    found = titles(draw(trace()))
    assert "5: retained, confidence 0.5, delta 0.1" in found
    assert "6: decoded ' t20', confidence 0.9, delta 0.2" in found
    assert "7: evicted, delta -0.3" in found
    assert "10: evicted" in found
    assert "position 6: ' t20' (id 20), decoded in step 1, confidence 0.9" in found
    assert "position 4: ' t5', given by the prompt" in found


def test_what_is_edited_shows_where_and_by_what_at_last():
    whole = (4, 5, 6, 7)
    filled = step(4, (5, 6, 7), whole, whole, {5: 21, 6: 20, 7: 22}, (0.5, 0.9, 0.8))
    changed = replace(
        step(4, (), whole, whole, {}, ()),
        edited=(6,),
        edited_token_ids=(23,),
        edited_confidences=(0.75,),
    )
    made = trace(
        (filled, changed),
        token_ids=(21, 23, 22),
        decoding="block",
        eviction_policy=None,
        unmasking="joint_threshold",
        denoising_steps=None,
    )
    _, last = made.steps
    assert last.edited == (False, False, True, False)
    assert last.states == ("decoded",) * 4
    assert last.tokens == (" t5", " t21", " t23", " t22")
    assert last.confidence == (None, None, 0.75, None)
    assert (last.decoded_tokens, last.edited_tokens) == (0, 1)
    found, written = titles(draw(made)), texts(draw(made))
    assert "6: decoded ' t20', confidence 0.9" in found
    assert "6: edited to ' t23', confidence 0.75" in found
    assert "position 6: ' t23' (id 23), edited in step 2, confidence 0.75" in found
    assert "·t23" in written and "·t20" not in written
    assert "decoded before, replaced in this step" in written
    assert "thresholds 0.8, 0.5" in written[0]


def test_a_square_is_filled_as_high_as_the_confidence():
    root = ElementTree.fromstring(draw(trace()))
    [bar] = [
        node.find(f"{SVG}path[@class='bar-retained']")
        for node in root.iter(f"{SVG}g")
        if node.findtext(f"{SVG}title", "").startswith("5: retained")
    ]
    assert "v-6h" in bar.attrib["d"]  # half of 12


def test_what_is_left_over_is_marked_in_the_first_row_of_the_next_block():
    root = ElementTree.fromstring(draw(trace()))
    drawn = [node.attrib["d"] for node in root.iter(f"{SVG}path")]
    squares = [
        d
        for node, d in zip(root.iter(f"{SVG}path"), drawn, strict=True)
        if node.attrib["class"] == "committing"
    ]
    assert sorted(d.count("M") for d in squares) == [1, 3]  # the legend's, and the step's


@pytest.mark.parametrize("token_id", [pytest.param(i, id=repr(text)) for i, text in ODD.items()])
def test_any_token_can_be_drawn(token_id):
    odd = step(4, (5, 6, 7), (5, 6, 7), (5, 6, 7), {5: token_id}, (0.9, 0.1, 0.1))
    svg = draw(trace((odd,), token_ids=(token_id,), prompt=token_text(token_id)))
    svg.encode()  # no lone surrogates
    assert any(f"(id {token_id})" in title for title in titles(svg))
    assert f"Prompt: {printable(token_text(token_id))}".split()[0] in " ".join(texts(svg))


@pytest.mark.parametrize(
    ("steps", "token_ids"),
    [
        pytest.param((), (), id="no step at all"),
        pytest.param(STEPS[:1], (), id="one step, no token out yet"),
        pytest.param(STEPS[:2], (21,), id="a block that is not committed"),
        pytest.param(STEPS[2:], (), id="what is left over stands left of the picture"),
    ],
)
def test_short_traces_can_be_drawn(steps, token_ids):
    svg = draw(trace(steps, token_ids=token_ids))
    assert sum("(id " in title for title in titles(svg)) == sum(len(s.positions) for s in steps)


@pytest.mark.parametrize(
    ("columns", "bands"),
    [
        pytest.param(12, 2, id="three blocks side by side"),
        pytest.param(11, 3, id="two where three do not fit"),
        pytest.param(1, 6, id="never less than a block"),
        pytest.param(999, 1, id="all in one band"),
    ],
)
def test_long_answers_go_on_below(columns, bands):
    svg = draw(trace(tuple(many_blocks(6)), token_ids=()), columns=columns)
    written = texts(svg)
    assert written.count("step") == bands
    assert written.count("11") == 1
    tokens = [text for text in written if text.startswith("·t1")]
    assert tokens == [f"·t{number}" for number in range(108, 132)]


def test_a_picture_that_is_cut_says_so():
    steps = tuple(many_blocks(6))
    assert "Cut after" not in draw(trace(steps), max_steps=12)
    svg = draw(trace(steps), max_steps=5)
    assert "Cut after 5 of 12 steps; --max-steps 12 draws all of them." in texts(svg)
    assert "·t111" in texts(svg)
    assert "·t116" in texts(svg)  # begun, in the last row that is drawn
    assert "·t120" not in texts(svg)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        pytest.param({"eviction_policy": None, "decoding": "delayed"}, "delayed", id="delayed"),
        pytest.param(
            {"unmasking": "sequential"}, "sequential, 4 steps per block", id="no threshold"
        ),
        pytest.param({"model": "/long" * 20 + "/name"}, "/long/name, decoding", id="long name"),
        pytest.param({"prompt": "word " * 500}, "word …", id="long prompt"),
    ],
)
def test_the_head_fits_every_run(changed, words):
    assert words in " ".join(texts(draw(trace(**changed))))


def test_a_block_without_room_has_no_name():
    written = texts(draw(trace()))  # 4 columns hold "block 1", not its positions
    assert "block 1" in written
    assert not any("positions 4" in text for text in written)


def test_elements_escape_what_they_hold():
    made = element("a", words("<&>\x00"), element("b"), x=1.005, stroke_width=2, class_='"<')
    node = ElementTree.fromstring(made)
    assert node.text == "<&>\\x00"
    assert node.attrib == {"x": "1", "stroke-width": "2", "class": '"<'}
    assert node[0].tag == "b"
