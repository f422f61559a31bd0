"""A renderer: the child process that runs chat templates, one frame in, one frame out. Knows no gRPC.

    python -P -m penstock.tokenizer_service.renderer

Whoever started it kills it when a render takes too long. It limits its own memory, files and children, and a
timer ends it should its owner die during a render. Started with an environment without secrets.
"""

from __future__ import annotations

import contextlib
import json
import resource
import signal
import sys
from typing import Any

from penstock.tokenizer_service import frames
from penstock.tokenizer_service.compiled import Conversation, compile_template, facts_of
from penstock.tokenizer_service.payload import read_arguments, read_messages, read_objects
from penstock.tokenizer_service.refusal import Refusal

# Address space. A body of 32 MiB of text fits several times over.
MEMORY_BYTES = 512 << 20
OPEN_FILES = 32


def limit_resources() -> None:
    _limit(resource.RLIMIT_AS, MEMORY_BYTES)
    _limit(resource.RLIMIT_NOFILE, OPEN_FILES)
    _limit(resource.RLIMIT_FSIZE, 0)
    _limit(resource.RLIMIT_CORE, 0)


def _limit(kind: int, value: int) -> None:
    # A host may have set a lower hard limit already.
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(kind, (value, value))


def inspect(source: str) -> tuple[dict[str, Any], bytes]:
    """Compiles a template and says what it wants."""
    facts = facts_of(source)
    compile_template(source)
    return {"content_format": facts.content_format, "variables": sorted(facts.variables)}, b""


def render(head: dict[str, Any], source: str, parts: list[bytes]) -> tuple[dict[str, Any], bytes]:
    """parts: messages, tools, documents and template arguments as JSON; empty where absent."""
    messages, tools, documents, arguments = parts
    talk = Conversation(
        messages=read_messages(messages),
        tools=read_objects(tools, "tools"),
        documents=read_objects(documents, "documents"),
        variables={**head["special_tokens"], **read_arguments(arguments)},
        add_generation_prompt=head["add_generation_prompt"],
        continue_final_message=head["continue_final_message"],
    )
    effort = head["reasoning_effort"]
    if effort is not None:
        talk.variables["reasoning_effort"] = effort
        # Templates that only know whether to think at all; the caller's own arguments win.
        talk.variables.setdefault("enable_thinking", effort != "none")
        talk.variables.setdefault("thinking", effort != "none")
    prompt = compile_template(source).render(talk, head["content_format"], head["max_output_bytes"])
    data = encode_text(prompt.text)
    if len(data) > head["max_output_bytes"]:
        limit = head["max_output_bytes"]
        raise Refusal("invalid_value", f"The rendered prompt is longer than {limit} bytes.", "messages")
    return {"content_format": prompt.content_format, "ends_in_reasoning": prompt.ends_in_reasoning}, data


def encode_text(text: str) -> bytes:
    """UTF-8. JSON can spell half a surrogate pair, which no encoding has: it becomes U+FFFD."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode("utf-8")


def answer(parts: list[bytes]) -> list[bytes]:
    """The reply to one frame: a JSON head, then the prompt. Never raises."""
    try:
        head = json.loads(parts[0])
        source = parts[1].decode("utf-8")
        reply, data = inspect(source) if head["op"] == "inspect" else render(head, source, parts[2:])
        return [json.dumps(reply).encode(), data]
    except Refusal as refusal:
        return _refused(refusal)
    except MemoryError:
        message = "Rendering the chat template needs too much memory."
        return _refused(Refusal("invalid_value", message, "messages", retire=True))
    except RecursionError:
        return _refused(Refusal("invalid_value", "The chat template recurses too deeply.", "messages"))
    except Exception as error:
        print(f"renderer: {type(error).__name__}", file=sys.stderr, flush=True)
        return _refused(Refusal("internal_error", "An internal error occurred."))


def _refused(refusal: Refusal) -> list[bytes]:
    message = encode_text(refusal.message).decode()
    error = {"reason": refusal.reason, "message": message, "param": refusal.param}
    return [json.dumps({"error": error, "retire": refusal.retire}).encode(), b""]


def main() -> int:
    # A Ctrl-C reaches the whole process group, but renders in flight are still wanted while draining.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    limit_resources()
    limit_s = float(sys.argv[1]) if len(sys.argv) > 1 else 5.0
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    while True:
        parts = frames.read(source)
        if parts is None:
            return 0
        signal.setitimer(signal.ITIMER_REAL, limit_s + 1.0)
        reply = answer(parts)
        for piece in frames.pack(reply):
            sink.write(piece)
        sink.flush()
        signal.setitimer(signal.ITIMER_REAL, 0)


if __name__ == "__main__":
    sys.exit(main())
