"""The Batch API over the routes and the scripted engine, with the unmodified client."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from focus_ray.batch.batch_store import BatchStore
from focus_ray.batch.storage import Folder
from focus_ray.config import EngineConfig
from focus_ray.serve import batch_runner
from focus_ray.serve.api_keys import hash_of
from focus_ray.serve.args import ServeArgs
from focus_ray.serve.batch_runner import BatchRunner
from focus_ray.serve.local import BATCH_FOLDER, LocalServer
from focus_ray.serve.replica import Replica
from focus_ray.serve.served_models import ServedModel, ServedModels

CHAT = "/v1/chat/completions"


def line(name, text="hello", url=CHAT, **fields):
    body = {"messages": [{"role": "user", "content": text}], **fields}
    return {"custom_id": name, "method": "POST", "url": url, "body": body}


def lines(*objects):
    return "".join(f"{json.dumps(each)}\n" for each in objects).encode()


class Runner:
    """Runs batches of a folder in a thread of its own, until it is killed."""

    def __init__(self, folder, engine, places=4):
        self.engine = engine
        replica = Replica(EngineConfig(), "fake", engine_factory=lambda config: engine)
        models = ServedModels([ServedModel(("fake",), replica)])
        self._runner = BatchRunner(Folder(folder), models, places)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def kill(self):
        """All at once, in the middle of whatever it does."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop)
            self._thread.join()

    def _stop(self):
        for task in asyncio.all_tasks(self._loop):
            task.cancel()

    def _run(self):
        runner = asyncio.Runner(loop_factory=lambda: self._loop)
        with runner, contextlib.suppress(asyncio.CancelledError):
            runner.run(self._runner.run())


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    for name in ("POLL_S", "COMMIT_EVERY_S", "ENGINE_RETRY_S"):
        monkeypatch.setattr(batch_runner, name, 0.05)


@pytest.fixture
def served(tmp_path, serving_of):
    """Routes with batches; the runner is started by the test."""
    yield from serving_of(batch_storage=str(tmp_path), max_batch_file_bytes=20_000)


@pytest.fixture
def client(served):
    with served.openai as client:
        yield client


@pytest.fixture
def runners(tmp_path, fake_engine):
    started = []

    def start(**options):
        started.append(Runner(str(tmp_path), fake_engine(), **options))
        return started[-1]

    yield start
    for each in started:
        each.kill()


def create(client, content, endpoint=CHAT):
    file = client.files.create(file=("in.jsonl", content), purpose="batch")
    return client.batches.create(
        input_file_id=file.id, endpoint=endpoint, completion_window="24h", metadata={"a": "b"}
    )


def wait(client, batch, *statuses, timeout_s=20):
    end = time.monotonic() + timeout_s
    while (batch := client.batches.retrieve(batch.id)).status not in statuses:
        assert time.monotonic() < end, batch
        time.sleep(0.02)
    return batch


def output(client, file_id):
    return [json.loads(each) for each in client.files.content(file_id).text.splitlines()]


def unrun(client, batch):
    """Codes of the lines that the batch did not come to, by their names."""
    entries = output(client, batch.error_file_id)
    assert all(each["response"] is None and each["error"]["message"] for each in entries)
    return {each["custom_id"]: each["error"]["code"] for each in entries}


def test_upload_create_poll_download(client, runners):
    batch = create(
        client,
        lines(line("a"), line("b", "other", model="alias-not"), line("c", "bye", max_tokens=3)),
    )
    assert batch.status == "validating" and batch.metadata == {"a": "b"}
    runners()
    batch = wait(client, batch, "completed")
    counts = batch.request_counts
    assert (counts.total, counts.completed, counts.failed) == (3, 2, 1)
    done = {each["custom_id"]: each for each in output(client, batch.output_file_id)}
    assert sorted(done) == ["a", "c"]
    body = done["a"]["response"]["body"]
    assert done["a"]["response"]["status_code"] == 200 and done["a"]["error"] is None
    assert body["choices"][0]["message"]["content"] == "<user>hello<assistant>"
    assert done["c"]["response"]["body"]["usage"]["completion_tokens"] == 3
    [failed] = output(client, batch.error_file_id)
    assert failed["custom_id"] == "b" and failed["response"]["status_code"] == 404
    assert batch.in_progress_at and batch.completed_at and batch.errors is None
    assert [each.id for each in client.batches.list()] == [batch.id]
    purposes = [file.purpose for file in client.files.list()]
    assert sorted(purposes) == ["batch", "batch_output", "batch_output"]


@pytest.mark.parametrize(
    ("content", "code", "at"),
    [
        pytest.param(b"{\n", "invalid_json_line", 1, id="no JSON"),
        pytest.param(b"\n\n", "empty_file", None, id="nothing"),
        pytest.param(lines(line("a"), line("a")), "duplicate_custom_id", 2, id="a name twice"),
        pytest.param(
            lines(line("a"), line("b", url="/v1/completions")), "mismatched_url", 2, id="a route"
        ),
        pytest.param(lines({"prompt": "x"}), "invalid_json_line", 1, id="another layout"),
    ],
)
def test_a_file_that_is_no_batch_fails_with_line_and_reason(client, runners, content, code, at):
    runners()
    batch = wait(client, create(client, content), "failed")
    assert [(error.code, error.line) for error in batch.errors.data] == [(code, at)]
    assert batch.failed_at and batch.output_file_id is None


def test_what_was_done_before_a_kill_is_not_done_again(client, runners):
    names = [f"n{number}" for number in range(40)]
    batch = create(client, lines(*(line(name, "word " * 8) for name in names)))
    first = runners(places=2)
    end = time.monotonic() + 20
    while client.batches.retrieve(batch.id).request_counts.completed < 6:
        assert time.monotonic() < end
        time.sleep(0.01)
    first.kill()
    done = client.batches.retrieve(batch.id).request_counts.completed
    assert 6 <= done < 40
    second = runners()
    batch = wait(client, batch, "completed")
    found = [each["custom_id"] for each in output(client, batch.output_file_id)]
    assert sorted(found) == sorted(names)
    assert len(second.engine.requests) <= 40 - 6


def test_cancelling_keeps_what_is_done(client, served, runners):
    objects = [line("quick"), *(line(f"n{n}", "forever") for n in range(5))]
    batch = create(client, lines(*objects))
    runner = runners()
    end = time.monotonic() + 20
    while client.batches.retrieve(batch.id).request_counts.completed < 1:
        assert time.monotonic() < end
        time.sleep(0.01)
    assert client.batches.cancel(batch.id).status == "cancelling"
    batch = wait(client, batch, "cancelled")
    assert [each["custom_id"] for each in output(client, batch.output_file_id)] == ["quick"]
    assert unrun(client, batch) == {f"n{n}": "batch_cancelled" for n in range(5)}
    assert (batch.request_counts.completed, batch.request_counts.failed) == (1, 0)
    served.steps_after(lambda: not runner.engine.running)
    with pytest.raises(openai.BadRequestError, match="completed already"):
        client.batches.cancel(wait(client, create(client, lines(line("a"))), "completed").id)


def test_a_batch_whose_time_is_over_expires_with_what_is_done(client, runners, tmp_path):
    batch = create(client, lines(line("a", "forever")))
    store = BatchStore(Folder(str(tmp_path)))
    asked = store.get(batch.id, None).model_copy(update={"expires": int(time.time()) - 1})
    store.folder.write(f"batches/{batch.id}/asked.json", asked.model_dump_json().encode())
    runners()
    batch = wait(client, batch, "expired")
    assert batch.output_file_id is None
    assert unrun(client, batch) == {"a": "batch_expired"}


def test_files_are_listed_read_and_deleted(client):
    files = [
        client.files.create(file=(f"{n}.jsonl", b"x" * n), purpose="batch") for n in range(1, 4)
    ]
    assert client.files.retrieve(files[1].id).bytes == 2
    assert client.files.content(files[2].id).content == b"xxx"
    listed = client.files.list(limit=2, order="asc")
    assert len(listed.data) == 2 and listed.has_more
    assert {file.id for file in client.files.list(limit=2)} == {file.id for file in files}
    assert client.files.delete(files[0].id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(files[0].id)


@pytest.mark.parametrize(
    ("ask", "status", "words"),
    [
        pytest.param(
            lambda c: c.files.create(file=b"x", purpose="fine-tune"), 400, "purpose", id="purpose"
        ),
        pytest.param(
            lambda c: c.files.create(file=b"x" * 30_000, purpose="batch"), 413, "20000", id="size"
        ),
        pytest.param(lambda c: c.files.retrieve("file-nope"), 404, "No such file", id="file"),
        pytest.param(lambda c: c.files.content("..%2F..%2Fx"), 404, "", id="a way out"),
        pytest.param(lambda c: c.batches.retrieve("batch_x"), 404, "No such batch", id="batch"),
        pytest.param(
            lambda c: c.batches.create(
                input_file_id="file-0", endpoint=CHAT, completion_window="24h"
            ),
            404,
            "No such file",
            id="a batch of no file",
        ),
        pytest.param(
            lambda c: c.batches.create(
                input_file_id="x", endpoint="/v1/embeddings", completion_window="24h"
            ),
            400,
            "endpoint",
            id="another endpoint",
        ),
        pytest.param(lambda c: c.batches.list(after="batch_x"), 400, "after", id="list"),
        pytest.param(lambda c: c.batches.list(limit=0), 400, "limit", id="limit"),
    ],
)
def test_what_is_wrong_is_said(client, ask, status, words):
    with pytest.raises(openai.APIStatusError) as caught:
        ask(client)
    assert caught.value.status_code == status
    assert words in caught.value.body["message"]


def test_files_and_batches_belong_to_a_key(tmp_path, serving_of):
    hashes = tuple(hash_of(key) for key in ("mine", "yours"))
    for served in serving_of(batch_storage=str(tmp_path), api_key_hashes=hashes):
        client = served.openai
        mine, yours = (client.with_options(api_key=key) for key in ("mine", "yours"))
        batch = create(mine, lines(line("a")))
        assert [each.id for each in mine.batches.list()] == [batch.id]
        assert not list(yours.batches.list()) and not list(yours.files.list())
        for ask in (yours.files.retrieve, yours.files.content, yours.files.delete):
            with pytest.raises(openai.NotFoundError):
                ask(batch.input_file_id)
        with pytest.raises(openai.NotFoundError):
            yours.batches.cancel(batch.id)
        with pytest.raises(openai.AuthenticationError):
            client.batches.list()
        client.close()


def test_many_uploads_at_once_stay_apart(client):
    with ThreadPoolExecutor(8) as pool:
        found = list(
            pool.map(
                lambda n: client.files.create(file=(f"{n}.jsonl", b"x" * n), purpose="batch"),
                range(1, 25),
            )
        )
    assert [file.bytes for file in found] == list(range(1, 25))
    assert len({file.id for file in found}) == 24


def test_the_input_of_an_unfinished_batch_is_kept(client, runners, tmp_path):
    batch = create(client, lines(line("a", "forever")))
    with pytest.raises(openai.BadRequestError, match="cancel it first"):
        client.files.delete(batch.input_file_id)
    shutil.rmtree(tmp_path / "files" / batch.input_file_id)  # by somebody who does not ask
    runners()
    assert wait(client, batch, "failed").errors.data[0].code == "invalid_file"


def test_a_batch_that_is_cancelled_before_it_begins_does_nothing(client, runners):
    batch = create(client, lines(line("a"), line("b")))
    client.batches.cancel(batch.id)
    runner = runners()
    assert wait(client, batch, "cancelled").request_counts.completed == 0
    assert not runner.engine.requests


def test_a_batch_takes_no_more_places_than_its_share(client, runners, served):
    objects = [line(f"n{n}", "forever", n=2) for n in range(4)]
    batch = create(client, lines(*objects, line("large", "forever", n=8)))
    runner = runners(places=4)
    served.steps_after(lambda: len(runner.engine.running) == 2)
    time.sleep(0.2)
    assert len(runner.engine.running) == 2, "two lines of two sequences each"
    client.batches.cancel(batch.id)
    wait(client, batch, "cancelled")


def test_a_line_that_engines_die_of_is_given_up(client, runners):
    batch = create(client, lines(line("a"), line("deadly", "dies midway " * 3), line("c")))
    runners()
    batch = wait(client, batch, "completed")
    assert (batch.request_counts.completed, batch.request_counts.failed) == (2, 1)
    [failed] = output(client, batch.error_file_id)
    assert failed["custom_id"] == "deadly" and failed["response"]["status_code"] == 503


def test_a_kill_before_the_end_is_known_leaves_each_file_once(client, runners, monkeypatch):
    save, killed = BatchStore.save, []

    def dies_once(self, batch_id, state):
        if state.status == "completed" and not killed:
            killed.append(batch_id)
            raise OSError("no power")
        save(self, batch_id, state)

    monkeypatch.setattr(BatchStore, "save", dies_once)
    batch = create(client, lines(line("a"), line("b", model="other")))
    runners()
    batch = wait(client, batch, "completed")
    assert killed
    kept = {file.id for file in client.files.list(purpose="batch_output")}
    assert kept == {batch.output_file_id, batch.error_file_id}
    assert [each["custom_id"] for each in output(client, batch.output_file_id)] == ["a"]


def test_nothing_is_left_of_answers_that_were_deleted(client, runners, tmp_path):
    batch = create(client, lines(line("a", "a secret")))
    runners()
    batch = wait(client, batch, "completed")
    client.files.delete(batch.output_file_id)
    client.files.delete(batch.input_file_id)
    kept = [file.read_text() for file in tmp_path.rglob("*") if file.is_file()]
    assert kept and not any("secret" in text for text in kept)


def test_a_file_that_is_no_batch_stops_no_other(client, runners, tmp_path):
    odd = tmp_path / "batches" / "batch_x" / "asked.json"
    odd.parent.mkdir(parents=True)
    odd.write_text("{}")
    runners()
    wait(client, create(client, lines(line("a"))), "completed")


@pytest.mark.parametrize("path", ["files", "batches", "files/file-1/content", "batches/b/cancel"])
def test_a_server_without_batches_says_so(server, path):
    ask = server.openai.post if "cancel" in path else server.openai.get
    with pytest.raises(openai.NotFoundError, match="batch_storage turns it on") as caught:
        ask(f"/{path}", cast_to=object)
    assert caught.value.code == "no_batch_api"


@pytest.mark.parametrize(
    ("given", "folder"),
    [
        pytest.param({}, f"{BATCH_FOLDER}/8001", id="one of its own"),
        pytest.param({"batch_storage": "s3://mine"}, "s3://mine", id="as the user says"),
        pytest.param({"batch_storage": None}, None, id="none"),
    ],
)
def test_where_a_server_of_one_machine_keeps_batches(given, folder):
    assert ServeArgs().batch_storage is None
    server = LocalServer(ServeArgs.model_validate(given), "127.0.0.1", 8001)
    assert server._with_folder().batch_storage == folder
