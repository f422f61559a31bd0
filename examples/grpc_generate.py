"""Calls an engine directly over gRPC: token ids in, token ids out. For services that need no HTTP.

    python examples/grpc_generate.py --target 127.0.0.1:50051 --ids 1,2,3
    python examples/grpc_generate.py --target unix:/run/engine.sock \\
        --tokenizer unix:/run/tokenizer.sock --text "Hello, who are you?"

With --stop-after the call is cancelled once so many tokens have come: the engine then frees what the request
held before its next step.
"""

from __future__ import annotations

import argparse
import asyncio
import sys

import grpc

from penstock.protos import common_pb2, engine_pb2, engine_pb2_grpc, tokenizer_pb2, tokenizer_pb2_grpc
from penstock.protos.errors import from_rpc
from penstock.protos.serving import CLIENT_OPTIONS

CALL_TIMEOUT_S = 10.0


async def main(options: argparse.Namespace) -> int:
    channels = [grpc.aio.insecure_channel(options.target, options=CLIENT_OPTIONS)]
    engine = engine_pb2_grpc.EngineStub(channels[0])
    tokenizer = None
    if options.tokenizer:
        channels.append(grpc.aio.insecure_channel(options.tokenizer, options=CLIENT_OPTIONS))
        tokenizer = tokenizer_pb2_grpc.TokenizerStub(channels[1])
    try:
        info = await engine.GetInfo(engine_pb2.GetInfoRequest(), timeout=CALL_TIMEOUT_S)
        print(f"{info.model}: {info.max_model_len} tokens of context on {info.device}, {info.dtype}")
        prompt = options.ids or []
        if tokenizer is not None and options.text:
            prompt = await encode(tokenizer, options.text)
        tokens = await generate(engine, prompt, options)
        if tokenizer is not None:
            rows = tokenizer_pb2.DecodeRequest(rows=[common_pb2.TokenIds(ids=tokens)])
            decoded = await tokenizer.Decode(rows, timeout=CALL_TIMEOUT_S)
            print(f"text: {decoded.texts[0]}")
        return 0
    except grpc.aio.AioRpcError as error:
        known = from_rpc(error)
        print(f"error: {known.reason}: {known.message}", file=sys.stderr)
        return 1
    finally:
        for channel in channels:
            await channel.close()


async def encode(tokenizer: tokenizer_pb2_grpc.TokenizerStub, text: str) -> list[int]:
    """The ids of a text, without a chat template."""
    answer = await tokenizer.Encode(tokenizer_pb2.EncodeRequest(texts=[text]), timeout=CALL_TIMEOUT_S)
    return list(answer.encodings[0].ids)


async def generate(
    engine: engine_pb2_grpc.EngineStub, prompt: list[int], options: argparse.Namespace
) -> list[int]:
    """Prints events as they come; the token ids of choice 0."""
    request = engine_pb2.GenerateRequest(
        request_id="example",
        prompt_ids=common_pb2.TokenIds(ids=prompt),
        sampling=engine_pb2.SamplingParams(temperature=options.temperature),
        stop=engine_pb2.StopCriteria(max_new_tokens=options.max_tokens),
    )
    tokens: list[int] = []
    call = engine.Generate(request, timeout=options.timeout)
    async for event in call:
        match event.WhichOneof("event"):
            case "started":
                print(
                    f"prompt computed: {event.usage.prompt_tokens} tokens, {event.usage.cached_tokens} cached"
                )
            case "delta":
                tokens.extend(event.delta.token_ids)
                print("tokens:", *event.delta.token_ids)
                if options.stop_after and len(tokens) >= options.stop_after:
                    call.cancel()
                    print("cancelled")
                    break
            case "finished":
                reason = common_pb2.FinishReason.Name(event.finished.reason)
                print(f"{reason} after {event.usage.completion_tokens} tokens")
    return tokens


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", default="127.0.0.1:50051", help="the engine's gRPC address")
    parser.add_argument("--tokenizer", default="", help="the tokenizer service's gRPC address")
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--ids", type=lambda text: [int(part) for part in text.split(",")])
    prompt.add_argument("--text")
    parser.add_argument("--max-tokens", type=int, default=16)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds for the whole call")
    parser.add_argument("--stop-after", type=int, default=0, help="cancel after so many tokens")
    options = parser.parse_args()
    if options.text and not options.tokenizer:
        parser.error("--text needs --tokenizer")
    return options


if __name__ == "__main__":
    sys.exit(asyncio.run(main(arguments())))
