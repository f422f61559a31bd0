"""`penstock serve`: turns a plan into processes and tells the user when they serve. Knows no gRPC."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from penstock.local import cores, first_request, model_source, readiness
from penstock.local.child import Child, ChildSpec
from penstock.local.options import ModelPlan, ServePlan, known_variables
from penstock.local.ports import free_port
from penstock.local.relay import Relay
from penstock.local.shares import shares
from penstock.local.supervisor import Supervisor
from penstock.protos import log as logs
from penstock.protos import settings
from penstock.protos.settings import Loaded

log = logging.getLogger("penstock.serve")

# A socket's path has at most 107 bytes.
MAX_FOLDER_CHARS = 70


def run(plan: ServePlan) -> int:
    """Supervises the services of the plan until a signal. Returns the exit code. Raises ConfigError when the
    address cannot be listened on."""
    frontend = plan.frontend.config
    level, style = frontend.log_level, frontend.log_format
    port = frontend.port if frontend.listen else free_port(frontend.host, frontend.port)
    relay = Relay(sys.stderr, bar=style == "text" and sys.stderr.isatty() and not os.environ.get("NO_COLOR"))
    logs.setup("serve", level, style)
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setStream(relay)
    folder = _private_folder()
    try:
        specs = child_specs(plan, folder, port, os.environ)
        return asyncio.run(_supervise(plan, specs, port, relay))
    finally:
        relay.close()
        shutil.rmtree(folder, ignore_errors=True)


async def _supervise(plan: ServePlan, specs: list[ChildSpec], port: int, relay: Relay) -> int:
    frontend = plan.frontend.config
    started = time.monotonic()
    ids = [model_id for model in plan.models for model_id in model.ids]
    addresses = list(frontend.listen) or [f"{frontend.host}:{port}"]
    address = readiness.reachable(addresses[0])
    key = frontend.api_key[0] if frontend.api_key else ""

    def on_ready() -> None:
        for spec in specs:
            relay.forget(spec.name)
        seconds = time.monotonic() - started
        _announce(plan, address, ids, seconds, keyed=bool(key or frontend.api_key_file), relay=relay)

    supervisor = Supervisor(
        [Child(spec, relay.line) for spec in specs],
        first_to_stop="frontend",
        drain_s=frontend.drain_seconds,
        wait_ready=lambda: readiness.wait_ready(address, ids, key),
        on_ready=on_ready,
    )
    return await supervisor.run()


def child_specs(plan: ServePlan, folder: Path, port: int, environ: Mapping[str, str]) -> list[ChildSpec]:
    """How each process is started. folder: where the services' sockets are made."""
    environment = child_environment(environ)
    division = None
    if plan.serve.config.affinity == "auto":
        division = cores.division_for([model.engine.config for model in plan.models])
    if division is not None:
        environment |= cores.environment(division)
    specs = []
    targets: dict[str, list[str]] = {"engine": [], "tokenizer": []}
    metrics: list[str] = []
    parts = shares([model.engine.config for model in plan.models], environ)
    for index, (model, share) in enumerate(zip(plan.models, parts, strict=True)):
        for service in ("tokenizer", "engine"):
            target = f"unix:{folder}/{service}-{index}.sock"
            targets[service].append(target)
            values: dict[str, Any] = {"listen": (target,)}
            if service == "engine":
                values |= share.options
                values["metrics_port"] = free_port("127.0.0.1", 0)
                if division is not None and not model.engine.config.threads:
                    values["threads"] = len(division.compute)
                metrics.append(f"127.0.0.1:{values['metrics_port']}")
            specs.append(_backend_spec(service, model, values, environment | share.environment))
    values = {key: tuple(found) for key, found in targets.items()}
    values["metrics_source"] = tuple(metrics)
    if not plan.frontend.config.listen:
        values["port"] = port
    specs.append(_spec("frontend", "frontend", plan.frontend, values, environment))
    return specs


def _backend_spec(
    service: str, model: ModelPlan, values: dict[str, Any], environment: dict[str, str]
) -> ChildSpec:
    loaded: Loaded[Any] = model.engine if service == "engine" else model.tokenizer
    return _spec(service, f"{service} of {model.ids[0]}", loaded, values, environment, model.ids[0])


def _spec(
    service: str,
    name: str,
    loaded: Loaded[Any],
    values: dict[str, Any],
    environment: dict[str, str],
    part: str = "",
) -> ChildSpec:
    config = loaded.config.model_copy(update=values)
    arguments, secrets = settings.to_arguments(Loaded(config, loaded.sources))
    return ChildSpec(service, name, (service, *arguments), {**environment, **secrets}, part)


def child_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment without what configures Penstock: a child gets every value from the plan, and a
    variable must not win over a value of the command line that equals the default."""
    known = known_variables()
    return {
        key: value
        for key, value in environ.items()
        if key not in known and not key.startswith(settings.PREFIX)
    }


def _private_folder() -> Path:
    """A new folder that only this user can enter."""
    folder = tempfile.mkdtemp(prefix="penstock-")
    if len(folder) > MAX_FOLDER_CHARS:
        os.rmdir(folder)
        folder = tempfile.mkdtemp(prefix="penstock-", dir="/tmp")
    return Path(folder)


def _announce(
    plan: ServePlan, address: str, ids: list[str], seconds: float, *, keyed: bool, relay: Relay
) -> None:
    frontend = plan.frontend.config
    url = address if address.startswith("unix:") else f"http://{address}{frontend.root_path}"
    if frontend.log_format == "json":
        log.info("ready", extra={"url": url, "models": ids, "seconds": round(seconds, 2)})
        return
    relay.write(
        f"\nPenstock is ready after {seconds:.1f} s at {url}/v1\n"
        f"  models: {', '.join(ids)}\n"
        f"  try:    {first_request.curl(plan.models, address, frontend.root_path, keyed=keyed)}\n\n"
    )
    if any(model.source.name == model_source.DEMO_ID for model in plan.models):
        log.info(
            "%s is a small demonstration model; `penstock serve MODEL` serves yours", model_source.DEMO_ID
        )
