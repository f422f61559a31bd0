"""`penstock serve` as real processes, asked by the official client; its end, its restarts, its refusals."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import openai
import pytest

from penstock.local import readiness
from penstock.local.spawn import Spawned, SpawnFailed, spawned

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]

KEY = "sk-e2e"
SMALL = ["--num-kv-blocks=128", "--max-num-seqs=16", "--threads=1", "--drain-seconds=60"]


def _environ() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PENSTOCK_")}
    return {**kept, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def _descendants(pid: int) -> dict[int, list[str]]:
    """Process id to command line of everything below a process."""
    children: dict[int, list[int]] = {}
    commands: dict[int, list[str]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                commands[int(entry.name)] = (entry / "cmdline").read_text().split("\0")
            except OSError:
                continue
            children.setdefault(int(fields[1]), []).append(int(entry.name))
    found: dict[int, list[str]] = {}
    todo = list(children.get(pid, []))
    while todo:
        child = todo.pop()
        found[child] = commands[child]
        todo += children.get(child, [])
    return found


def _service(pid: int, service: str) -> int:
    return next(
        child
        for child, command in _descendants(pid).items()
        if "penstock.local" in command and service in command
    )


def _sockets(commands: dict[int, list[str]]) -> list[str]:
    return [word.split("unix:")[1] for words in commands.values() for word in words if "unix:" in word]


def _wait_until(condition: Callable[[], bool], limit_s: float = 60.0) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError("the condition never came true")
        time.sleep(0.05)


def _alive(pids: set[int]) -> set[int]:
    alive = set()
    for pid in pids:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if state != "Z":
            alive.add(pid)
    return alive


def _client(server: Spawned, key: str = KEY) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint("llama")


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[Spawned]:
    environ = {**_environ(), "VLLM_API_KEY": KEY}
    with spawned([str(model), "--served-model-name=tiny,alias", *SMALL], environ=environ) as running:
        yield running


@pytest.mark.row("A1.1", "A2.1")
def test_ready_means_that_the_official_client_gets_answers(server: Spawned) -> None:
    client = _client(server)
    assert [listed.id for listed in client.models.list()] == ["tiny", "alias"] or [
        listed.id for listed in client.models.list()
    ] == ["tiny"]
    done = client.completions.create(model="tiny", prompt="hello", max_tokens=8, temperature=0)
    assert done.usage is not None
    assert done.usage.completion_tokens <= 8
    again = client.completions.create(model="alias", prompt="hello", max_tokens=8, temperature=0)
    assert again.choices[0].text == done.choices[0].text
    _wait_until(lambda: any("POST /v1/completions 200" in line for line in server.lines))


def test_a_streamed_chat_equals_the_whole_one(server: Spawned) -> None:
    client = _client(server)
    messages = [{"role": "user", "content": "hi"}]
    whole = client.chat.completions.create(model="tiny", messages=messages, max_tokens=24, temperature=0)  # type: ignore[call-overload]
    stream = client.chat.completions.create(  # type: ignore[call-overload]
        model="tiny", messages=messages, max_tokens=24, temperature=0, stream=True
    )
    pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
    assert "".join(pieces) == whole.choices[0].message.content


@pytest.mark.row("A1.7")
def test_the_key_is_needed_and_stays_out_of_command_lines_and_logs(server: Spawned) -> None:
    with pytest.raises(openai.AuthenticationError):
        _client(server, key="wrong").models.list()
    commands = _descendants(server.process.pid)
    assert len(commands) >= 4  # frontend, tokenizer, engine and its core
    assert not any(KEY in word for command in commands.values() for word in command)
    assert not any(KEY in line for line in server.lines)


def test_chat_in_the_terminal_over_a_pipe(server: Spawned) -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-m", "penstock.local", "chat", "--url", server.url, "--max-tokens=4"],
        input="hello\nand again\n",
        capture_output=True,
        text=True,
        timeout=60,
        env={**_environ(), "VLLM_API_KEY": KEY},
        errors="replace",
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


def test_bench_counts_by_usage(server: Spawned, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    for load in (["--concurrency=3"], ["--rate=50"]):
        words = ["--url", server.url, "--num-prompts=6", "--input-len=9", "--output-len=7", "--warmup=1"]
        words.append("--vocab-size=200")
        done = subprocess.run(
            [
                sys.executable,
                "-P",
                "-m",
                "penstock.local",
                "bench",
                "serve",
                *words,
                *load,
                f"--json={report}",
            ],
            capture_output=True,
            text=True,
            timeout=60,
            env={**_environ(), "VLLM_API_KEY": KEY},
        )
        assert done.returncode == 0, done.stdout + done.stderr
        [result] = json.loads(report.read_text())["levels"]
        assert (result["requests"], result["failures"]) == (6, 0)
        assert (result["prompt_tokens"], result["completion_tokens"]) == (6 * 9, 6 * 7)
        assert 0 < result["ttft_ms"]["p50"] <= result["e2e_ms"]["p50"]
        assert KEY not in report.read_text()


@pytest.mark.parametrize("victim", ["engine", "tokenizer", "frontend"])
def test_a_killed_service_comes_back(server: Spawned, victim: str) -> None:
    client = _client(server)
    before = client.completions.create(model="tiny", prompt="abc", max_tokens=6, temperature=0)
    pid = _service(server.process.pid, victim)
    below = set(_descendants(pid))
    os.kill(pid, signal.SIGKILL)
    _wait_until(lambda: not _alive({pid} | below))

    def answers() -> bool:
        try:
            after = client.completions.create(model="tiny", prompt="abc", max_tokens=6, temperature=0)
        except openai.OpenAIError:
            return False
        return after.choices[0].text == before.choices[0].text

    _wait_until(answers)
    assert _service(server.process.pid, victim) != pid


def test_term_ends_everything_after_the_running_stream_with_0(model: Path) -> None:
    with spawned([str(model), "--served-model-name=tiny", *SMALL], environ=_environ()) as running:
        below = _descendants(running.process.pid)
        sockets = _sockets(below)
        stream = _client(running).completions.create(
            model="tiny", prompt="hello", max_tokens=150, stream=True, extra_body={"ignore_eos": True}
        )
        next(iter(stream))
        running.process.send_signal(signal.SIGTERM)
        reasons = [chunk.choices[0].finish_reason for chunk in stream if chunk.choices]
        assert reasons[-1] == "length"
        assert running.process.wait(60) == 0
    assert not _alive({running.process.pid, *below})
    assert sockets
    assert not any(Path(path).parent.exists() for path in sockets)


def test_a_corrupt_model_is_one_line_and_exit_code_3(model: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in model.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(SpawnFailed) as caught, spawned([str(broken), *SMALL], environ=_environ()):
        pass
    assert caught.value.code == 3
    assert "model.safetensors" in str(caught.value)


def _check_names(client: openai.OpenAI) -> None:
    tasks = {listed.id: listed.to_dict()["tasks"] for listed in client.models.list()}
    assert tasks.pop("vectors")[0] == "embed"
    assert tasks == {name: ["generate"] for name in ("one", "two", "nick")}
    for name, model in (("one", "one"), ("two", "two"), ("nick", "one")):
        assert client.completions.create(model=name, prompt="x", max_tokens=3).model == model
    (found,) = client.embeddings.create(model="vectors", input="x").data
    assert sum(value * value for value in found.embedding) == pytest.approx(1, abs=1e-3)
    with pytest.raises(openai.BadRequestError, match="'two' cannot make embeddings"):
        client.embeddings.create(model="two", input="x")
    with pytest.raises(openai.BadRequestError, match="'vectors' cannot generate text"):
        client.completions.create(model="vectors", prompt="x")
    with pytest.raises(openai.NotFoundError, match="Served here: one, two, vectors"):
        client.completions.create(model="three", prompt="x")
    with pytest.raises(openai.BadRequestError, match="name one of one, two, vectors"):
        client.completions.create(model="", prompt="x")


def _check_loss_of_one(running: Spawned, client: openai.OpenAI) -> None:
    """While the engine of a model is away, the other is served, and only what asks for the first is told."""
    below = _descendants(running.process.pid)
    (pid,) = [p for p, words in below.items() if "--served-model-name=two" in words and "engine" in words]
    os.kill(pid, signal.SIGKILL)
    statuses = []
    end = time.monotonic() + 60
    while statuses[-2:] != [503, 200]:
        assert client.completions.create(model="one", prompt="x", max_tokens=1).choices
        assert asyncio.run(readiness.get(running.url.removeprefix("http://"), "/readyz"))[0] == 200
        answer = client.completions.with_raw_response
        try:
            statuses.append(answer.create(model="two", prompt="x", max_tokens=1).status_code)
        except openai.APIStatusError as error:
            statuses.append(error.status_code)
        assert time.monotonic() < end, statuses
    assert set(statuses) == {200, 503}


@pytest.mark.row("A1.4", "A1.5", "A1.6", "A10.13")
def test_two_models_of_one_file_and_nothing_outlives_a_killed_supervisor(
    model: Path, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    other = tiny_checkpoint("opt")
    file = tmp_path / "two.yaml"
    entries = [
        {"model": str(model), "served-model-name": "one"},
        {"model": str(other), "served-model-name": "two", "max-model-len": 64},
        {"model": str(model), "served-model-name": "vectors", "task": "embed"},
    ]
    # The port of the command line wins.
    file.write_text(json.dumps({"models": entries, "port": 1, "uvicorn-log-level": "warning"}))
    words = [f"--config={file}", "--model-alias=nick=one", *SMALL]
    with spawned(words, environ=_environ()) as running:
        client = _client(running)
        _check_names(client)
        _check_loss_of_one(running, client)
        assert not any("POST /v1/completions" in line for line in running.lines)
        below = _descendants(running.process.pid)
        assert len(below) >= 7
        running.process.kill()
        running.process.wait(60)
        _wait_until(lambda: not _alive(set(below)))
        for folder in {Path(path).parent for path in _sockets(below)}:
            shutil.rmtree(folder)


def test_a_frontend_on_a_unix_socket_and_a_ctrl_c(model: Path, tmp_path: Path) -> None:
    address = f"unix:{tmp_path}/front.sock"
    with spawned([str(model), f"--listen={address}", *SMALL], environ=_environ()) as running:
        assert running.url == address
        status, body = asyncio.run(readiness.get(address, "/v1/models"))
        assert status == 200
        assert json.loads(body)["data"][0]["id"] == running.models[0]
        pids = {running.process.pid, *_descendants(running.process.pid)}
        running.process.send_signal(signal.SIGINT)
        assert running.process.wait(60) == 0
    assert not _alive(pids)
