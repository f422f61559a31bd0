"""Core structs as protocol messages, shared by both kinds of stream. Knows no streams."""

from __future__ import annotations

from penstock.engine_service.core.messages import Finish, Logprobs, Started, Timings, Usage
from penstock.protos import common_pb2
from penstock.protos import engine_pb2 as pb


def usage_message(usage: Usage) -> common_pb2.Usage:
    return common_pb2.Usage(
        prompt_tokens=usage.prompt_tokens,
        cached_tokens=usage.cached_tokens,
        completion_tokens=usage.completion_tokens,
        drafted_tokens=usage.drafted_tokens,
        accepted_tokens=usage.accepted_tokens,
    )


def started_event(started: Started) -> pb.Started:
    rows = started.prompt_logprobs
    return pb.Started(
        queue_us=started.queue_us,
        prompt_logprobs=None if rows is None else pb.PromptLogprobs(rows=logprobs_message(rows)),
    )


def finished_event(finish: Finish) -> pb.Finished:
    return pb.Finished(
        reason=finish.reason,  # type: ignore[arg-type]
        stop_token_id=finish.stop_token_id,
        stopped_by_eos=finish.stopped_by_eos,
        timings=_timings_message(finish.timings),
        cumulative_logprob=finish.cumulative_logprob,
        score=finish.score,
    )


def logprobs_message(rows: Logprobs) -> pb.TokenLogprobs:
    return pb.TokenLogprobs(
        logprobs=rows.logprobs,
        ranks=rows.ranks,
        num_alternatives=rows.num_alternatives,
        alternative_ids=rows.alternative_ids,
        alternative_logprobs=rows.alternative_logprobs,
    )


def _timings_message(timings: Timings) -> common_pb2.Timings:
    return common_pb2.Timings(
        queue_us=timings.queue_us,
        prefill_us=timings.prefill_us,
        decode_us=timings.decode_us,
        num_preemptions=timings.num_preemptions,
    )
