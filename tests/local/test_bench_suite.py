"""`penstock bench suite`: rounds and the noise guard, peers, the table's ratios; a run over real services."""

from __future__ import annotations

import asyncio
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from penstock.engine_service.models.config import read_spec
from penstock.local import (
    bench_cases,
    bench_drive,
    bench_machine,
    bench_peers,
    bench_rounds,
    bench_suite,
    bench_table,
    cli,
    shapes,
)
from penstock.local.bench_cases import CASES, Case
from penstock.local.bench_client import Sample
from penstock.local.bench_cpu_ceilings import CpuCeilings
from penstock.local.bench_drive import Load, Outcome
from penstock.local.bench_machine import Noise
from penstock.local.bench_peers import Peer, PeerFailed, Server
from penstock.local.bench_rounds import Rules
from penstock.local.bench_suite_options import UsageError, parser, resolve
from penstock.local.bench_table import Findings, Row

# 10 GB/s and 1 TFLOP/s: figures that can be followed by hand.
CEILINGS = CpuCeilings(2, 5.0, 10.0, 0.5, 1.0, "2.13.0")
A, B = Server("penstock", "http://a", (1,), 2.0), Server("peer", "http://b", (2,), None)
CASE = Case("c2", "two", 2, 4, 2, 8, 3, (bench_cases.OUTPUT, bench_cases.TTFT))


def _outcome(load: Load, seconds: float = 1.0) -> Outcome:
    samples = [
        Sample(
            0.0,
            seconds,
            [seconds / 2, seconds],
            prompt_tokens=load.input_len,
            completion_tokens=load.output_len,
        )
        for _ in range(load.num_prompts)
    ]
    return Outcome("m", samples, 0.1)


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What Watch says of the others, try after try; 0 when it runs out."""
    readings: list[float] = []

    def stop(self: object) -> Noise:
        return Noise(readings.pop(0) if readings else 0.0, 0.5, 1.0)

    monkeypatch.setattr(bench_machine.Watch, "stop", stop)
    return readings


# ---------------------------------------------------------------------------------------------- rounds
def test_servers_take_turns_with_the_same_prompts(quiet: list[float]) -> None:
    seen: list[Load] = []

    def drive(load: Load) -> Outcome:
        seen.append(load)
        return _outcome(load)

    turns = bench_rounds.run(CASE, [A, B], 4, Rules(rounds=3, quiet_s=0), drive)
    assert [load.url[-1] for load in seen] == ["a", "b", "b", "a", "a", "b"]
    prompts = [bench_drive.prompts_of(load) for load in seen]
    assert prompts[0] == prompts[1] != prompts[2] == prompts[3] != prompts[4] == prompts[5]
    assert {load.num_prompts for load in seen} == {4}
    assert bench_rounds.tokens_written(CASE, turns["peer"]) == 3 * (2 + 4) * (8 + 3)
    values = bench_rounds.values_of(turns, bench_cases.OUTPUT)
    assert values == {"penstock": [12.0] * 3, "peer": [12.0] * 3}


def test_a_disturbed_turn_is_tried_again_with_other_prompts_and_the_quietest_kept(quiet: list[float]) -> None:
    quiet += [0.9, 0.5, 0.7]
    seen: list[Load] = []

    def drive(load: Load) -> Outcome:
        seen.append(load)
        return _outcome(load, seconds=len(seen))

    rules = Rules(rounds=1, tries=3, others=0.2, quiet_s=0)
    found = bench_rounds.turn(bench_rounds.load_of(CASE, A, 2, 0), (1,), rules, drive)
    assert (found.noise.others, found.tries, found.report.wall_s) == (0.5, 2, 2.0)
    assert len({load.seed for load in seen}) == 3
    quiet += [0.1]
    assert bench_rounds.turn(seen[0], (1,), rules, drive).noise.others == 0.1
    assert len(seen) == 4


def test_no_turn_of_a_run_meets_anothers_prompts() -> None:
    """A server that is still there would answer them from its prefix cache."""
    seeds = [
        bench_rounds.seed_of(case, turn, Rules(rounds=3, tries=2)) + attempt
        for case in CASES["llama-160m"]
        for turn in range(3)
        for attempt in range(2)
    ]
    assert len(set(seeds)) == len(seeds)


# --------------------------------------------------------------------------------------------- machine
def test_a_childs_processor_time_is_its_own_and_nobody_elses() -> None:
    burn = "import time\nend = time.process_time() + 0.4\nwhile time.process_time() < end: pass\ninput()"
    child = subprocess.Popen([sys.executable, "-c", burn], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        with open(f"/proc/{child.pid}/stat") as file:
            assert file.read()
        while bench_machine.cpu_s([child.pid]) < 0.4:
            os.sched_yield()
        assert child.pid in bench_machine.descendants([os.getpid()])
        assert bench_machine.descendants([child.pid]) == [child.pid]
        assert bench_machine.running_s([child.pid]) == pytest.approx(
            bench_machine.cpu_s([child.pid]), abs=0.1
        )
        assert bench_machine.resident_bytes([child.pid]) > 1 << 20
        assert bench_machine.busy_s() > bench_machine.cpu_s([child.pid])
    finally:
        child.communicate(b"\n")
    assert bench_machine.cpu_s([child.pid]) == 0.0
    assert bench_machine.descendants([child.pid]) == []
    assert bench_machine.resident_bytes([child.pid]) == 0


def test_the_watch_takes_its_own_side_off(monkeypatch: pytest.MonkeyPatch) -> None:
    readings = {"busy": iter([100.0, 110.0]), "servers": iter([5.0, 9.0]), "own": iter([1.0, 2.0])}
    clock = iter([50.0, 54.0])
    monkeypatch.setattr(bench_machine, "busy_s", lambda: next(readings["busy"]))
    monkeypatch.setattr(bench_machine, "cpu_s", lambda pids: next(readings["servers"]))
    monkeypatch.setattr(bench_machine, "_own_s", lambda: next(readings["own"]))
    monkeypatch.setattr(bench_machine.time, "monotonic", lambda: next(clock))
    # 10 busy, of which 4 the servers' and 1 this side's, in 4 s.
    assert bench_machine.Watch([1]).stop() == Noise(5 / 4, 4.0, 4.0)


def test_who_listens(scripted_server: Callable[..., Any]) -> None:
    server = scripted_server(lambda method, path, body: [])
    assert bench_machine.listener(int(server.url.rsplit(":", 1)[1])) == os.getpid()
    assert bench_machine.listener(1) is None


# ----------------------------------------------------------------------------------------------- peers
def test_peers_are_read() -> None:
    assert bench_peers.parse("a=http://h:1/v1") == Peer("a", "", url="http://h:1/v1")
    assert bench_peers.parse("l.cpp@tiny-32k=x -m {model} --port {port}") == Peer(
        "l.cpp", "tiny-32k", command="x -m {model} --port {port}"
    )
    for text in ("", "=x", "nobody-knows", "a=serve {model}", "a b=http://h"):
        with pytest.raises(ValueError):
            bench_peers.parse(text)


STUB = """
import json, sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

EVENTS = "".join(f"data: {frame}\\n\\n" for frame in (
    '{"choices":[{"text":"x"}]}',
    '{"choices":[],"usage":{"prompt_tokens":4,"completion_tokens":1}}',
    "[DONE]"))

class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def answer(self, body):
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    def do_GET(self):
        self.answer(json.dumps({"data": [{"id": sys.argv[2]}]}))

    def do_POST(self):
        self.rfile.read(int(self.headers["content-length"]))
        self.answer(EVENTS)

    def log_message(self, *words):
        pass

ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def test_a_peer_is_started_asked_and_stopped(tmp_path: Path) -> None:
    (tmp_path / "stub.py").write_text(STUB)
    peer = bench_peers.parse(f"stub={sys.executable} {tmp_path / 'stub.py'} {{port}} {{model}}")
    with bench_peers.serving(peer, "tiny-32k", tmp_path / "folder") as server:
        [pid] = server.roots
        assert bench_machine.listener(int(server.url.rsplit(":", 1)[1])) == pid
        assert server.start_s is not None
        assert server.start_s > 0
        outcome = asyncio.run(bench_drive.drive(Load(server.url, num_prompts=3, concurrency=1, output_len=1)))
        assert outcome.model == str(tmp_path / "folder")
        assert [sample.error for sample in outcome.samples] == ["", "", ""]
        running = Peer("there", "", url=server.url)
        with bench_peers.serving(running, "tiny-32k", tmp_path) as known:
            assert (known.roots, known.start_s) == ((pid,), None)
    assert bench_machine.descendants([pid]) == []


def test_a_peer_that_does_not_come_up_says_why(tmp_path: Path) -> None:
    cases = {
        "no such model": f"{sys.executable} -c 'import sys; sys.exit(\"no such model {{port}}\")'",
        "No such file": "/nowhere/server {port}",
    }
    for words, command in cases.items():
        with (
            pytest.raises(PeerFailed, match=words),
            bench_peers.serving(Peer("p", "", "", command), "s", tmp_path),
        ):
            pass
    with (
        pytest.raises(PeerFailed, match="http://127"),
        bench_peers.serving(Peer("p", "", "http://127.0.0.1:9"), "s", tmp_path),
    ):
        pass


def test_a_terminated_run_leaves_no_server(tmp_path: Path) -> None:
    """SIGTERM, as `timeout` sends it, while a peer runs."""
    (tmp_path / "stub.py").write_text(STUB)
    script = f"""
from pathlib import Path
from penstock.local import bench_peers, spawn
peer = bench_peers.parse({f"stub={sys.executable} {tmp_path / 'stub.py'} {{port}} m"!r})
with spawn.sigterm_unwinds(), bench_peers.serving(peer, "s", Path("/")) as server:
    print(server.roots[0], flush=True)
    input()
"""
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        pid = int(child.stdout.readline())
        assert bench_machine.descendants([pid]) == [pid]
        child.terminate()
        assert child.wait(60) == 143
    assert bench_machine.descendants([pid]) == []


# ----------------------------------------------------------------------------------------------- table
def test_a_ratio_is_a_speed_whichever_way_the_figure_points() -> None:
    rate = Row(
        "s", "c", "output", "tok/s", True, {"penstock": [10.0, 30.0, 20.0], "peer": [10.0, 10.0, 40.0]}, 40.0
    )
    assert (rate.value(), rate.value("peer"), rate.of_floor) == (20.0, 10.0, 0.5)
    assert rate.against("peer") == [1.0, 3.0, 0.5]
    time = Row("s", "c", "TTFT", "ms", False, {"penstock": [10.0, 20.0], "peer": [20.0, 20.0]}, 5.0)
    assert time.of_floor == pytest.approx(5 / 15)
    assert time.against("peer") == [2.0, 1.0]
    nothing = Row("s", "c", "TTFT", "ms", False, {"penstock": [math.nan]})
    assert json.dumps(nothing.as_dict(), allow_nan=False)


def test_the_table_says_value_ratio_and_spread() -> None:
    rows = [
        Row(
            "s", "c1", "output", "tok/s", True, {"penstock": [10.0, 12.0], "peer": [8.0, 8.0]}, 20.0, 0.31, 2
        ),
        Row("s", "idle", "CPU", "%", False, {"penstock": [0.5]}, note="a word"),
    ]
    machine = {"cpu": "A processor", "cores": 2, "commit": "abc"}
    ceilings = {name: getattr(CEILINGS, name) for name in CpuCeilings.__slots__}
    said = bench_table.text(Findings(machine, ceilings, {}, rows, ["what: why"]))
    [line] = [line for line in said.splitlines() if "| c1 " in line]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells == [
        "s", "c1", "output, tok/s", "11.0", "10.0-12.0", "55%", "8.00", "1.38x", "1.25-1.50", "0.31",
    ]  # fmt: skip
    for words in ("10.0 by 2", "CPU: a word", "2 requests failed", "not measured: what: why"):
        assert words in said


def test_the_floor_of_a_workload_by_hand(tmp_path: Path) -> None:
    """llama-160m: 75.5 M weights in layers and 24.6 M in the head, 2 bytes each; KV 12,288 bytes a token."""
    spec = read_spec(shapes.write_config(tmp_path, shapes.config_of("llama-160m")))
    matrices = 12 * (768 * (768 + 2 * 256) + 768 * 768 + 3 * 768 * 2048) + 32000 * 768
    step = (2 * matrices + 192 * 12288) / 10e9
    assert bench_cases.step_floor_s(spec, CEILINGS, 1, 192) == pytest.approx(step, rel=1e-3)
    products = bench_cases.step_floor_s(spec, CpuCeilings(1, 1, 1e6, 1, 1.0, ""), 32, 192)
    assert products == pytest.approx(32 * 2 * matrices / 1e12, rel=1e-2)
    prefill = bench_cases.prefill_floor_s(spec, CEILINGS, 2048)
    # 2,048 tokens through the layers, half of the square of attention, the head once.
    flops = 2 * 2048 * (matrices - 32000 * 768) + 2 * 32000 * 768 + 12 * 4 * 768 * 2048 * 2049 / 2
    assert prefill == pytest.approx(flops / 1e12, rel=1e-6)
    [c1, long] = [case for case in CASES["llama-160m"] if case.name in ("c1", "long")]
    assert bench_cases.floor(long, bench_cases.TTFT, spec, CEILINGS, 3) == pytest.approx(1e3 * prefill)
    rate = bench_cases.floor(c1, bench_cases.OUTPUT, spec, CEILINGS, 3)
    first = bench_cases.prefill_floor_s(spec, CEILINGS, 128)
    assert rate == pytest.approx(128 / (first + 127 * step), rel=1e-3)
    [tiny, *_] = CASES["tiny-32k"]
    assert bench_cases.floor(tiny, bench_cases.E2E, spec, CEILINGS, 3) is None


# --------------------------------------------------------------------------------------------- options
@pytest.mark.parametrize(
    "words",
    [
        ["--shape", "gpt-5"],
        ["--cases", "c7"],
        ["--extras", "speed"],
        ["--peer", "x"],
        ["--peer", "x@gpt-5=http://h:1"],
        ["--peer", "x=http://h:1"],
        ["--folder", "llama-160m=/nowhere"],
        ["--tries", "0"],
        ["--output", "/nowhere/at/all.json"],
    ],
)
def test_bad_options_are_named(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "suite", *words]) == 2
    assert words[0] in capsys.readouterr().err


def test_a_full_run_has_more_of_everything() -> None:
    quick, full = resolve(parser().parse_args([])), resolve(parser().parse_args(["--full"]))
    assert quick.rules.rounds < full.rules.rounds
    assert all(case.quick <= case.prompts for cases in CASES.values() for case in cases)
    with pytest.raises(UsageError):
        resolve(parser().parse_args(["--rounds", "-1"]))


# ------------------------------------------------------------------------------------------- a whole run
@pytest.mark.e2e
def test_a_run_beside_a_peer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The services over the smallest shape, a scripted peer in turn with them."""
    (tmp_path / "stub.py").write_text(STUB)
    case = Case("c64short", "2 streams", 2, 6, 6, 8, 1, (bench_cases.REQUESTS,), bounded=False)
    monkeypatch.setitem(CASES, "tiny-32k", (case,))
    monkeypatch.setattr(bench_suite, "measure_apart", lambda: CEILINGS)
    monkeypatch.setattr(bench_suite, "_IDLE_S", 0.1)
    monkeypatch.setattr(bench_suite, "_SETTLE_S", 0.0)
    out = tmp_path / "out.json"
    words = ["--shape", "tiny-32k", "--quiet-wait", "0", "--tries", "1", "--output", str(out)]
    words += ["--peer", f"stub={sys.executable} {tmp_path / 'stub.py'} {{port}} {{model}}"]
    code = cli.main(["bench", "suite", *words])
    said = capsys.readouterr()
    assert code == 0, said.out + said.err
    found = json.loads(out.read_text())
    assert (found["schema"], found["skipped"]) == (1, [])
    rows = {row["metric"]: row for row in found["rows"]}
    assert [len(row) for row in rows["requests"]["values"].values()] == [2, 2]
    assert rows["requests"]["times_as_fast"]["stub"] > 0
    assert rows["start to first token"]["median"]["penstock"] > 0
    assert (
        rows["resident, all processes"]["median"]["penstock"]
        > rows["above weights and KV pool"]["median"]["penstock"]
    )
    assert "c64short" in said.out
