"""The offline face over a fake engine: order, feeding, refusals, and cleaning up."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from pydantic import ValidationError
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as StockTokenizer

from focus_ray.config import EngineConfig
from focus_ray.engine.outputs import EngineLoad, GenerationRequest, RequestStats, TokenDelta
from focus_ray.engine.tokenizer import Tokenizer
from focus_ray.errors import EngineOverloaded, RequestRejected
from focus_ray.llm import LLM
from focus_ray.sampling import SamplingParams

LOAD = EngineLoad(
    num_running=0,
    num_waiting=0,
    free_pages=1,
    total_pages=1,
    num_steps=0,
    prefill_tokens=0,
    cached_prefix_tokens=0,
    emitted_tokens=0,
    prompt_tokens=0,
    num_preemptions=0,
    finished={},
    step_s=0.0,
)


class EchoEngine:
    """Answers with the prompt's tokens, one per step and completion; shortest prompts end first."""

    def __init__(
        self,
        config: EngineConfig,
        tokenizer: Tokenizer | None = None,
        capacity: int = 4,
        before_step: Callable[[int], None] = lambda step: None,
    ) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.default_params = SamplingParams(max_tokens=5, temperature=0.0)
        self.capacity = capacity
        self.before_step = before_step
        self.running: dict[tuple[str, int], deque[int]] = {}
        self.added: list[GenerationRequest] = []
        self.aborted: list[str] = []
        self.num_steps = 0

    def validate(self, request: GenerationRequest) -> None:
        if not request.prompt_token_ids:
            raise RequestRejected("prompt is empty; give at least one token", "prompt")

    def add(self, request: GenerationRequest) -> None:
        if len(self.running) + request.params.n > self.capacity:
            raise EngineOverloaded("full")
        self.added.append(request)
        for index in range(request.params.n):
            self.running[request.request_id, index] = deque(request.prompt_token_ids)

    def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)
        self.running = {key: rest for key, rest in self.running.items() if key[0] != request_id}

    def has_unfinished(self) -> bool:
        return bool(self.running)

    def step(self) -> list[TokenDelta]:
        self.num_steps += 1
        self.before_step(self.num_steps)
        return list(self._deltas())

    def _deltas(self) -> Iterator[TokenDelta]:
        for (request_id, index), rest in list(self.running.items()):
            token_id = rest.popleft()
            if not rest:
                del self.running[request_id, index]
            yield TokenDelta(
                request_id=request_id,
                index=index,
                text=f"{token_id} ",
                token_ids=(token_id,),
                finish_reason=None if rest else "length",
                stats=None if rest else RequestStats(prompt_tokens=index),
            )

    def close(self): ...

    def load(self) -> EngineLoad:
        return LOAD


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """One token per byte, and a template with one special token."""
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    stock = StockTokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    stock.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    stock.decoder = decoders.ByteLevel()
    stock.add_tokens([AddedToken("<|end|>", special=True)])
    stock.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{% if m.role == 'x' %}{{ raise_exception('no role x') }}{% endif %}"
        "{{ m.role }}:{{ m.content }}<|end|>{% endfor %}{{ tail }}"
    )
    loaded = Tokenizer.from_path(folder)
    assert loaded is not None
    return loaded


def make(**options: object) -> tuple[LLM, EchoEngine]:
    llm = LLM("somewhere", engine_factory=partial(EchoEngine, **options))
    engine = llm._engine
    assert isinstance(engine, EchoEngine)
    return llm, engine


def answers(llm: LLM, prompts: object, params: object = None) -> list[list[list[int]]]:
    outputs = llm.generate(prompts, params, use_tqdm=False)  # type: ignore[arg-type]
    return [[completion.token_ids for completion in output.outputs] for output in outputs]


def test_keywords_are_the_fields_of_the_config() -> None:
    llm = LLM("somewhere", engine_factory=EchoEngine, max_num_seqs=3, unmasking="sequential")
    assert (llm.config.model, llm.config.max_num_seqs) == ("somewhere", 3)
    assert llm.config.unmasking == "sequential"


def test_unknown_keyword_is_refused_by_name() -> None:
    with pytest.raises(ValidationError, match="max_num_seq\n"):
        LLM("somewhere", engine_factory=EchoEngine, max_num_seq=3)


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        pytest.param([1, 2], [[1, 2]], id="one list of ids"),
        pytest.param((1, 2), [[1, 2]], id="one tuple of ids"),
        pytest.param([[1, 2], [3]], [[1, 2], [3]], id="lists of ids"),
        pytest.param([], [], id="no prompts"),
    ],
)
def test_token_id_prompts(prompts: object, expected: list[list[int]]) -> None:
    llm, _ = make()
    assert answers(llm, prompts) == [[ids] for ids in expected]


def test_text_prompts_are_encoded_and_kept(tokenizer: Tokenizer) -> None:
    llm, _ = make(tokenizer=tokenizer)
    outputs = llm.generate(["ab", [7]], use_tqdm=False)
    assert [output.prompt for output in outputs] == ["ab", None]
    assert [output.prompt_token_ids for output in outputs] == [tokenizer.encode("ab"), [7]]
    assert llm.generate("ab", use_tqdm=False)[0].prompt == "ab"


def test_outputs_come_in_the_order_of_the_prompts() -> None:
    llm, engine = make(capacity=3)
    prompts = [[i] * (1 + (7 * i) % 5) for i in range(40)]
    assert answers(llm, prompts) == [[ids] for ids in prompts]
    assert not engine.has_unfinished()


def test_deltas_make_up_an_output() -> None:
    llm, _ = make()
    (output,) = llm.generate([4, 5], SamplingParams(n=2), use_tqdm=False)
    assert output.finished
    assert [completion.text for completion in output.outputs] == ["4 5 ", "4 5 "]
    assert [completion.stats.prompt_tokens for completion in output.outputs] == [0, 1]
    assert output.outputs[1].finish_reason == "length"


def test_the_engine_is_kept_full_and_never_overfull() -> None:
    seen: list[int] = []
    llm, engine = make(capacity=3, before_step=lambda step: seen.append(len(engine.running)))
    answers(llm, [[1, 2]] * 9)
    assert seen == [3] * 6


def test_a_request_that_an_empty_engine_refuses_is_an_error() -> None:
    llm, _ = make(capacity=1)
    with pytest.raises(EngineOverloaded):
        llm.generate([1], SamplingParams(n=2), use_tqdm=False)


def test_many_prompts() -> None:
    llm, _ = make(capacity=512)
    assert len(answers(llm, [[1]] * 5000)) == 5000


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        pytest.param(None, [5, 5], id="the engine's defaults"),
        pytest.param(SamplingParams(max_tokens=7), [7, 7], id="one for all"),
        pytest.param(
            [SamplingParams(max_tokens=7), SamplingParams(max_tokens=8)], [7, 8], id="one each"
        ),
    ],
)
def test_sampling_params(params: object, expected: list[int]) -> None:
    llm, engine = make()
    answers(llm, [[1], [2]], params)
    assert [request.params.max_tokens for request in engine.added] == expected


def test_wrong_number_of_sampling_params() -> None:
    llm, _ = make()
    with pytest.raises(RequestRejected, match="has 1 entries for 2 prompts") as caught:
        llm.generate([[1], [2]], [SamplingParams()], use_tqdm=False)
    assert caught.value.param == "sampling_params"


@pytest.mark.parametrize(
    ("prompts", "words"),
    [
        pytest.param([[1], []], "prompt 1: prompt is empty", id="refused by the engine"),
        pytest.param([[1], "a\ud83d"], "prompt 1: prompt holds the lone surrogate", id="no text"),
        pytest.param([[1], [1.5]], "prompt 1 is a list", id="not ids"),
        pytest.param([[1], {"prompt": "a"}], "prompt 1 is a dict", id="neither text nor ids"),
        pytest.param([[1], [True]], "prompt 1 is a list", id="booleans"),
    ],
)
def test_a_bad_prompt_is_named_before_anything_runs(
    tokenizer: Tokenizer, prompts: object, words: str
) -> None:
    llm, engine = make(tokenizer=tokenizer)
    with pytest.raises(RequestRejected, match=words) as caught:
        answers(llm, prompts)
    assert caught.value.param == "prompt"
    assert engine.added == []


def test_text_needs_a_tokenizer() -> None:
    llm, _ = make()
    assert llm.get_tokenizer() is None
    with pytest.raises(RequestRejected, match="'somewhere' has no tokenizer"):
        llm.generate("a", use_tqdm=False)
    with pytest.raises(RequestRejected, match="'somewhere' has no tokenizer"):
        llm.chat([{"role": "user", "content": "a"}], use_tqdm=False)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_whatever_ends_a_run_aborts_its_requests(error: type[BaseException]) -> None:
    def fail(step: int) -> None:
        if step == 2:
            raise error

    llm, engine = make(capacity=3, before_step=fail)
    with pytest.raises(error):
        answers(llm, [[1], [1, 2, 3], [1, 2, 3], [4]])
    finished, *unfinished = [request.request_id for request in engine.added]
    assert sorted(engine.aborted) == sorted(unfinished)
    assert finished not in engine.aborted
    engine.before_step = lambda step: None
    assert answers(llm, [[9]]) == [[[9]]]


def test_chat_takes_one_conversation_or_several(tokenizer: Tokenizer) -> None:
    llm, engine = make(tokenizer=tokenizer)
    one = [{"role": "user", "content": "a<|end|>"}]
    (output,) = llm.chat(one, use_tqdm=False)
    assert output.prompt == "user:a<|end|><|end|>"
    assert output.prompt_token_ids.count(tokenizer.added_tokens["<|end|>"]) == 1
    assert len(llm.chat([one, one], use_tqdm=False)) == 2
    assert len({request.request_id for request in engine.added}) == 3


def test_chat_template_kwargs(tokenizer: Tokenizer) -> None:
    llm, _ = make(tokenizer=tokenizer)
    (output,) = llm.chat(
        [{"role": "user", "content": "a"}], chat_template_kwargs={"tail": "!"}, use_tqdm=False
    )
    assert output.prompt == "user:a<|end|>!"


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        pytest.param([[], [{"role": "x", "content": ""}]], "conversation 1: .*no role x", id="x"),
        pytest.param(["hello"], "conversation 0 is not a list of messages", id="text"),
        pytest.param([{"role": "user", "content": ""}, "hello"], "conversation 0", id="mixed"),
    ],
)
def test_a_bad_conversation_is_named(tokenizer: Tokenizer, messages: object, words: str) -> None:
    llm, engine = make(tokenizer=tokenizer)
    with pytest.raises(RequestRejected, match=words) as caught:
        llm.chat(messages, use_tqdm=False)  # type: ignore[arg-type]
    assert caught.value.param == "messages"
    assert engine.added == []


def test_progress_bar_counts_prompts_and_shows_speed(capsys: pytest.CaptureFixture[str]) -> None:
    llm, _ = make()
    llm.generate([[1, 2], [3]])
    shown = capsys.readouterr().err
    assert "2/2" in shown
    assert "tokens/s" in shown
    llm.generate([[1]], use_tqdm=False)
    assert capsys.readouterr().err == ""


def test_what_the_engine_says_is_passed_on() -> None:
    llm, engine = make()
    assert llm.get_default_sampling_params() == engine.default_params
    assert llm.load() is LOAD


def test_closed_llm_says_so() -> None:
    with make()[0] as llm:
        assert answers(llm, [1]) == [[[1]]]
    with pytest.raises(RuntimeError, match="closed"):
        llm.generate([1], use_tqdm=False)
