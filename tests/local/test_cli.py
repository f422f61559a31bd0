"""The command as a user types it: help, exit codes, one-line errors, masked secrets."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from penstock.local import cli

ENVIRONMENT = {"PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def penstock(*words: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-m", "penstock.local", *words],
        capture_output=True,
        text=True,
        timeout=60,
        env={**ENVIRONMENT, **environ},
        stdin=subprocess.DEVNULL,
    )


@pytest.mark.parametrize("command", ["", *cli.COMMANDS])
@pytest.mark.row("A1.11")
def test_help_of_every_command(command: str) -> None:
    words = [command, "--help"] if command else ["--help"]
    done = penstock(*words)
    assert done.returncode == 0
    assert done.stdout.startswith("usage: penstock")
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("service", "absent"),
    [
        ("engine", ["httptools", "httpx", "starlette", "uvicorn", "orjson", "tqdm", "jinja2", "matplotlib"]),
        (
            "tokenizer",
            ["httptools", "httpx", "starlette", "uvicorn", "orjson", "tqdm", "torch", "matplotlib"],
        ),
        ("frontend", ["httpx", "tqdm", "torch", "numpy", "jinja2", "matplotlib"]),
    ],
)
def test_a_service_starts_without_the_packages_of_others(service: str, absent: list[str]) -> None:
    """As in its image. It gets as far as its own check of what it was told."""
    code = (
        f"import sys\nfor name in {absent}:\n    sys.modules[name] = None\n"
        "from penstock.local.cli import main\n"
        f"sys.exit(main(['{service}', '--log-level=debug', '--port=-1']))"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=60)
    assert "--port" in done.stderr
    assert done.returncode == 2


@pytest.mark.parametrize("command", ["", *cli.COMMANDS])
def test_help_loads_nothing_heavy(command: str) -> None:
    words = [command, "--help"] if command else ["--help"]
    code = (
        "import sys, contextlib, io\nfrom penstock.local.cli import main\n"
        "with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):\n"
        f"    main({words})\n"
        "print(' '.join(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=60)
    loaded = set(done.stdout.split())
    assert "penstock.local.cli" in loaded
    assert not loaded & {"torch", "transformers", "numpy", "grpc", "starlette", "httpx", "huggingface_hub"}


@pytest.mark.parametrize(
    ("words", "code", "named"),
    [
        (["serve", "--nonsense"], 2, "--nonsense"),
        (["serve", "--dtype", "int3"], 2, "--dtype"),
        (["serve", "--max-num-seqs", "0"], 2, "--max-num-seqs"),
        (["serve", "--port", "70000"], 2, "--port"),
        (["serve", "--task", "paint"], 2, "--task"),
        (["serve", "--config", "/no/such/file.yaml"], 2, "/no/such/file.yaml"),
        (["serve", "/no/such/model"], 3, "/no/such/model"),
        (["engine", "/no/such/model"], 3, "/no/such/model"),
        (["tokenizer", "/no/such/model"], 3, "/no/such/model"),
        (["serve", "owner/not-in-the-cache"], 3, "owner/not-in-the-cache"),
        (["bench", "serve", "--url", "http://127.0.0.1:9"], 1, "127.0.0.1:9"),
        (["bench", "serve", "--url", "ftp://x"], 2, "--url"),
        (["chat", "--url", "http://127.0.0.1:9"], 1, "127.0.0.1:9"),
    ],
)
def test_exit_codes_and_one_line_errors(words: list[str], code: int, named: str, tmp_path: Path) -> None:
    done = penstock(*words, HF_HOME=str(tmp_path))
    assert done.returncode == code, done.stderr
    lines = [line for line in done.stderr.splitlines() if not line.startswith("usage:")]
    assert len(lines) == 1
    assert lines[0].startswith("penstock")
    assert named in lines[0]


def test_an_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["nonsense", "--port", "1"])
    assert caught.value.code == 2
    assert "nonsense" in capsys.readouterr().err


@pytest.mark.row("A1.3")
def test_a_port_in_use_is_said_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = penstock("serve", str(tmp_path), "--port", str(port))
    assert done.returncode == 2
    assert done.stderr == (
        f"penstock serve: port {port} on 127.0.0.1 is already in use; choose another with --port\n"
    )


@pytest.mark.row("A1.2")
def test_the_module_without_a_command_serves() -> None:
    done = penstock("--model", "/no/such/model", "--port", "1")
    assert done.returncode == 3
    assert done.stderr.startswith("penstock serve:")


def test_config_shows_values_sources_and_no_secrets(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("max-model-len: 77\napi-key: sk-in-a-file\n")
    done = penstock("config", "--config", str(file), "--port", "81", PENSTOCK_SEED="5")
    rows = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines() if line}
    assert done.returncode == 0
    assert rows["port"] == ["81", "--port"]
    assert rows["seed"] == ["5", "PENSTOCK_SEED"]
    assert rows["max-model-len"] == ["77", str(file)]
    assert rows["api-key"] == ["********", str(file)]
    assert rows["threads"] == ["0", "default"]
    assert "sk-in-a-file" not in done.stdout + done.stderr


def test_config_file_by_environment(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("port: 82\n")
    done = penstock("config", "frontend", PENSTOCK_CONFIG=str(file))
    assert any(line.split()[:2] == ["port", "82"] for line in done.stdout.splitlines())


def test_an_unknown_variable_warns() -> None:
    done = penstock("serve", "/no/such/model", PENSTOCK_MAX_NUMSEQS="3", PENSTOCK_SEED="1")
    assert "PENSTOCK_MAX_NUMSEQS" in done.stderr.splitlines()[0]
    assert "PENSTOCK_SEED" not in done.stderr


def test_version_names_what_it_runs_on() -> None:
    done = penstock("version")
    names = {line.split()[0] for line in done.stdout.splitlines()}
    assert {"penstock", "python", "torch", "grpcio"} <= names
    assert penstock("--version").returncode == 0
