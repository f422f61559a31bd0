"""Messages between the engine's server process and its core, and the error a request can end with.

Plain numbers and lists: nothing here knows torch, gRPC or text, nor how a message travels (see wire).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

# Finish codes of a choice, equal to penstock.v1.FinishReason.
RUNNING = 0
STOP = 1
LENGTH = 2
ABORTED = 3


class RequestError(Exception):
    """Ends one request and no other. `reason` is a code of the error table ("invalid_value")."""

    def __init__(self, reason: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.param = param


@dataclass(slots=True, frozen=True)
class Sampling:
    """How the next token is chosen; every default resolved. Ranges as in engine.proto's SamplingParams."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: all
    min_p: float = 0.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    allowed_token_ids: list[int] = field(default_factory=list)
    bad_words: list[list[int]] = field(default_factory=list)
    logprobs: int | None = None  # alternatives per token
    prompt_logprobs: int | None = None
    logprob_token_ids: list[int] = field(default_factory=list)
    # The first prompt token whose log-probability is wanted: what is before it may come from the prefix
    # cache. 1: those of all tokens, behind an empty row for the first.
    prompt_logprobs_from: int = 1


@dataclass(slots=True, frozen=True)
class Configure:
    """The first message: what to load and within which limits. 0 or "" means: decide from the machine."""

    model_path: str  # a local folder
    dtype: str = "auto"  # auto, float32, bfloat16, float16
    device: str = "auto"  # auto, cpu, cuda
    load_format: str = "auto"  # auto (safetensors), dummy
    max_model_len: int = 0
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    block_size: int = 16
    num_kv_blocks: int = 0
    kv_cache_memory_bytes: int = 0
    gpu_memory_utilization: float = 0.9
    enable_prefix_caching: bool = True
    threads: int = 0  # compute threads of the CPU backend
    seed: int = 0  # of requests without one
    quantization: str = ""  # fp8 or int8: of the weights at load; empty: none
    kv_cache_dtype: str = "auto"  # auto (as dtype), fp8, fp8_e4m3 (the same)
    tensor_parallel_size: int = 1  # ranks that hold the model together, rank 0 included
    nnodes: int = 1  # machines they are on; a divisor of tensor_parallel_size
    master_addr: str = ""  # where ranks of several machines meet
    master_port: int = 0
    enforce_eager: bool = False  # no recorded CUDA graphs
    speculative: str = ""  # ngram; empty: none
    speculative_tokens: int = 7  # drafted for a sequence in a step, at most
    lookahead: bool = True  # on CUDA, start a step before the one before it is done
    task: str = "auto"  # auto (as the folder says), generate, embed, score, classify


@dataclass(slots=True, frozen=True)
class ConstraintSource:
    """What the output must follow, as the caller put it. kind: json_schema, json_object, regex, choice,
    grammar or structural_tag. text: the source; a JSON array for choice, nothing for json_object.
    whitespace_pattern: between the parts of JSON; empty allows none. preamble: what stands before it, in
    Lark."""

    kind: str
    text: str = ""
    whitespace_pattern: str | None = None
    preamble: str = ""


@dataclass(slots=True, frozen=True)
class Constraint:
    """A grammar that has been found to compile. With starts_after it begins behind the first occurrence of
    those ids in the output; until then the output is free but cannot end."""

    grammar: str
    starts_after: list[int] = field(default_factory=list)


@dataclass(slots=True, frozen=True)
class Beam:
    """Beam search. It is over when `width` answers are found and no beam could still become better than the
    worst of them, judged by its present length; `exhaustive`: by any length it may reach; early_stopping: at
    once."""

    width: int
    length_penalty: float = 1.0  # exponent on the length
    early_stopping: bool = False
    exhaustive: bool = False


@dataclass(slots=True)
class AddRequest:
    """A new request. `id` is the server's own, unique for the life of the core."""

    id: int
    prompt: Sequence[int]  # ids; comes out of the wire as an array of 32-bit integers
    sampling: Sampling = field(default_factory=Sampling)
    n: int = 1
    max_new_tokens: int = 16  # per choice, already clamped to the context
    min_new_tokens: int = 0
    stop_token_ids: list[int] = field(default_factory=list)  # beside the end-of-sequence ids
    eos_token_ids: list[int] = field(
        default_factory=list
    )  # empty with ignore_eos; the min_new_tokens ban covers both lists
    priority: int = 0  # lower first
    cache_salt: str = ""
    skip_cache_read: bool = False
    arrival_us: int = 0  # monotonic clock; same clock in server and core (CLOCK_MONOTONIC)
    queue_deadline_us: int = 0  # monotonic; 0: none. Unscheduled by then: queue_timeout
    deadline_us: int = 0  # monotonic; 0: none. Unfinished by then: timeout
    constraint: Constraint | None = None
    # With more than n the n of the highest mean log-probability are told, when all have ended. 0: n.
    best_of: int = 0
    beam: Beam | None = None  # told when the search is over: the n best, best first


# What a pooled request is to be given for each input.
EMBED = "embed"  # its vector
CLASSIFY = "classify"  # the classifier's numbers
SIMILARITY = "similarity"  # the cosine between the first input's vector and its own; the first gets none


@dataclass(slots=True)
class AddPooled:
    """A new request without generation: inputs that are computed in any order and answered together. `prompt`
    has the ids of all of them, end to end; input i has lengths[i], at least one."""

    id: int
    prompt: Sequence[int]
    lengths: Sequence[int]
    token_type_ids: Sequence[int] = ()  # as `prompt`; empty: all 0
    kind: str = EMBED
    pooling: str = ""  # cls, mean, last, all; empty: the model's
    dimensions: int = 0  # 0: all
    normalize: bool | None = None  # None: as the model does
    activate: bool = True  # classifiers: sigmoid or softmax, as the model does
    priority: int = 0
    arrival_us: int = 0  # times as those of AddRequest
    queue_deadline_us: int = 0
    deadline_us: int = 0

    @property
    def n(self) -> int:
        """One finish, as of a request with one choice."""
        return 1


@dataclass(slots=True)
class Prepared:
    """Within the core: the compiled grammar of a request that is held, or why there is none."""

    id: int
    grammar: Any = None
    error: RequestError | None = None


@dataclass(slots=True)
class AbortRequests:
    """Ends requests. With `report`, each choice gets a Finish with ABORTED; without, silence."""

    ids: list[int]
    report: bool = False


@dataclass(slots=True)
class EndChoice:
    """Ends one choice of a request, which gets a Finish with ABORTED; the others go on. Means nothing where
    candidates are ranked: beam search, best_of."""

    id: int
    choice: int


@dataclass(slots=True)
class Ping:
    """Answered by the loop with a Pong: proves that input thread and loop both make progress."""

    serial: int


@dataclass(slots=True)
class FlushCache:
    serial: int


@dataclass(slots=True)
class Shutdown:
    """The core aborts what runs and exits with 0."""


ToCore = Configure | AddRequest | AddPooled | AbortRequests | EndChoice | Ping | FlushCache | Shutdown


@dataclass(slots=True, frozen=True)
class Usage:
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0  # over all choices
    drafted_tokens: int = 0
    accepted_tokens: int = 0


@dataclass(slots=True, frozen=True)
class Timings:
    queue_us: int = 0
    prefill_us: int = 0
    decode_us: int = 0
    num_preemptions: int = 0


@dataclass(slots=True)
class Logprobs:
    """Rows of one choice's tokens: `alternative_*` are row-major [len(logprobs), num_alternatives]."""

    logprobs: list[float]
    ranks: list[int]
    num_alternatives: int
    alternative_ids: list[int]
    alternative_logprobs: list[float]


@dataclass(slots=True)
class Started:
    id: int
    usage: Usage
    queue_us: int
    prompt_logprobs: Logprobs | None = None


@dataclass(slots=True, frozen=True)
class Pooled:
    """What a pooled request was for: rows of numbers, for one input after the other."""

    values: bytes  # float32, little-endian, [sum(rows), width]
    width: int
    rows: Sequence[int]  # of each input: 1, or with pooling "all" one per token


@dataclass(slots=True)
class Finish:
    id: int
    choice: int
    reason: int
    usage: Usage
    timings: Timings
    stop_token_id: int | None = None
    stopped_by_eos: bool = False
    cumulative_logprob: float | None = None
    score: float | None = None  # what candidates were ranked by
    pooled: Pooled | None = None  # of a pooled request that was not aborted


@dataclass(slots=True)
class Failure:
    """The whole request ended with an error; nothing more is sent for it."""

    id: int
    reason: str
    message: str
    param: str | None = None
    retry_after_s: float | None = None
    usage: Usage = field(default_factory=Usage)


@dataclass(slots=True)
class Load:
    """Gauges and counters since start; same meaning as penstock.v1.EngineLoad."""

    running: int = 0
    waiting: int = 0
    waiting_tokens: int = 0
    kv_blocks_used: int = 0
    kv_blocks_cached: int = 0
    kv_blocks_total: int = 0
    steps: int = 0
    finished: int = 0
    aborted: int = 0
    failed: int = 0
    num_preemptions: int = 0
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    drafted_tokens: int = 0
    accepted_draft_tokens: int = 0


@dataclass(slots=True)
class StepOutput:
    """Everything one step produced, in the order: started, tokens, finishes, failures.

    The token arrays run in parallel: entry i is one token of choice `choices[i]` of request `ids[i]`;
    `completion_tokens[i]` is that request's cumulative count after it. `logprobs` maps an index i to its
    one-row Logprobs, only for requests that asked.
    """

    ids: list[int]
    choices: list[int]
    tokens: list[int]
    completion_tokens: list[int]
    logprobs: dict[int, Logprobs]
    started: list[Started]
    finished: list[Finish]
    failures: list[Failure]
    load: Load


@dataclass(slots=True)
class Pong:
    serial: int
    load: Load


@dataclass(slots=True)
class CacheFlushed:
    serial: int
    blocks_freed: int


@dataclass(slots=True)
class Progress:
    """Weights read so far while loading, in bytes; total 0: unknown."""

    done: int
    total: int


@dataclass(slots=True, frozen=True)
class PooledFacts:
    """What a model without generation does unless a request says otherwise, and what it can be asked."""

    pooling: str
    normalize: bool
    dimensions: int  # of a vector of full size
    matryoshka: list[int]  # the sizes that may be asked for
    any_dimensions: bool  # any up to the full one may be
    labels: list[str]
    type_vocab_size: int  # token type ids are below it


@dataclass(slots=True)
class Ready:
    """The model is loaded and the loop runs. What the server needs for GetInfo and validation."""

    architectures: list[str]
    max_model_len: int
    vocab_size: int
    eos_token_ids: list[int]
    bos_token_id: int | None
    pad_token_id: int | None
    generation_defaults: Sampling
    default_max_new_tokens: int | None
    dtype: str
    device: str
    kv_block_size: int
    kv_blocks: int
    tasks: list[str]
    capabilities: list[str]
    pooled: PooledFacts | None = None  # then max_model_len is that of one input, and there is no KV cache


@dataclass(slots=True)
class LoadFailed:
    """The model folder is unusable; the core exits with 3 after sending it. One line, for people."""

    message: str


FromCore = StepOutput | Pong | CacheFlushed | Progress | Ready | LoadFailed
