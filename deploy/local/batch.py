"""`penstock batch`: runs a file of requests in OpenAI's batch format. Knows files and options, no HTTP."""

from __future__ import annotations

import asyncio
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from pydantic import Field

from penstock.local.batch_file import BatchError, Results, check, read_items
from penstock.local.spawn import SpawnFailed, spawned
from penstock.protos.settings import Config, ConfigError

if TYPE_CHECKING:
    from penstock.local.batch_client import Tally


class BatchConfig(Config):
    """Settings of one batch."""

    input_file: str = Field("", description="requests, one JSON object a line: custom_id, url, body")
    output_file: str = Field("", description="results; what is there already is kept and not run again")
    model: tuple[str, ...] = Field(
        (), description="model to serve for the batch, or several; default: the bundled one"
    )
    url: str = Field("", description="use this running server instead, with or without /v1")
    api_key: str = Field(
        "",
        description="key of the server",
        json_schema_extra={"env": ["VLLM_API_KEY", "OPENAI_API_KEY"], "secret": True, "metavar": "KEY"},
    )
    concurrency: int = Field(64, ge=1, le=4096, description="requests in flight")
    retry_failed: bool = Field(False, description="run those again that an earlier run got an error for")
    serve_options: str = Field("", description="further options of the server that is started, one string")


def run(config: BatchConfig) -> int:
    """Returns 0, or 1 when a request failed or the server is away; the code of a server that does not start.
    Raises ConfigError for files that cannot be used."""
    if not config.input_file or not config.output_file:
        raise ConfigError("an input file (-i) and an output file (-o) are needed")
    if Path(config.input_file).resolve() == Path(config.output_file).resolve():
        raise ConfigError("the output file must not be the input file")
    if config.url and config.model:
        raise ConfigError("--url names a running server: --model does not go with it")
    try:
        source = Path(config.input_file)
        total = check(source)
        results = Results(Path(config.output_file), retry_failed=config.retry_failed)
    except BatchError as error:
        raise ConfigError(str(error)) from error
    try:
        left = [item.number for item in read_items(source) if item.custom_id not in results.done]
        if not left:
            print(f"all {total} requests have results already", file=sys.stderr)
            return 0
        tally = _run(config, source, results, total)
    except SpawnFailed as error:
        print(f"penstock batch: {error}", file=sys.stderr)
        return error.code
    except BatchError as error:
        print(f"penstock batch: {error}", file=sys.stderr)
        return 1
    finally:
        results.close()
    print(_summary(tally, total), file=sys.stderr)
    return 1 if tally.failed else 0


def _run(config: BatchConfig, source: Path, results: Results, total: int) -> Tally:
    from penstock.local.batch_client import run_all

    def ask(url: str) -> Tally:
        return asyncio.run(run_all(source, results, total, url, config.api_key, config.concurrency))

    if config.url:
        return ask(_base(config.url))
    with spawned([*config.model, *shlex.split(config.serve_options)]) as server:
        return ask(server.url)


def _base(url: str) -> str:
    """The server's address, without the /v1 that the requests' own paths begin with."""
    parts = urlsplit(url if "://" in url else f"http://{url}")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"--url: {url} is not an http URL")
    return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/').removesuffix('/v1')}"


def _summary(tally: Tally, total: int) -> str:
    ran = sum(tally.outcomes.values())
    kinds = ", ".join(
        f"{count} {'without an answer' if status == 0 else f'with status {status}'}"
        for status, count in sorted(tally.outcomes.items())
    )
    tokens = f"{tally.prompt_tokens} prompt and {tally.completion_tokens} completion tokens"
    return f"{ran} of {total} requests ran ({kinds}); {tokens}"
