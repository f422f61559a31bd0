"""Offline batches: the same scheduler, model code and text pipeline as the services, in this process.

No gRPC, no child processes, no HTTP. Calls from several threads wait for each other.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from penstock.engine_service.core.base_loop import BaseLoop
from penstock.engine_service.core.constraints import Constraints
from penstock.engine_service.core.grammar_source import grammar_of
from penstock.engine_service.core.inbox import Inbox
from penstock.engine_service.core.loop import EngineLoop
from penstock.engine_service.core.loops import make_loop
from penstock.engine_service.core.messages import Configure, Constraint, Load, Ready, RequestError
from penstock.engine_service.core.pooled_build import build
from penstock.engine_service.core.pooled_loop import PooledLoop
from penstock.engine_service.models.sentence_modules import read_prompts
from penstock.local import model_source, offline
from penstock.local.offline import Collector
from penstock.local.offline_constraint import constraint_of
from penstock.local.offline_kinds import is_list
from penstock.local.offline_prompts import Message, Prompt, as_prompts, as_talks
from penstock.local.offline_run import GenerationRun, Outbox
from penstock.local.offline_text import Text
from penstock.local.outputs import RequestOutput
from penstock.local.pooled import Floats, Input, PooledBatches, as_pairs, as_texts, cannot
from penstock.local.sampling_params import SamplingParams


class GenerationFailed(RuntimeError):
    """Some requests failed while they ran. outputs: one entry per prompt, None for those."""

    def __init__(self, message: str, outputs: list[RequestOutput | None]) -> None:
        super().__init__(message)
        self.outputs = outputs


@dataclass(frozen=True, slots=True)
class _Encoded:
    """A prompt as ids; text None when ids were given. stop_ids: of the chat template."""

    text: str | None
    ids: list[int]
    stop_ids: tuple[int, ...] = ()


class LLM:
    """A loaded model. Use it as a context manager, or call close() to give its memory back."""

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        tokenizer: str | Path | None = None,
        chat_template: str | None = None,
        task: str = "auto",
        dtype: str = "auto",
        device: str = "auto",
        load_format: str = "auto",
        max_model_len: int | None = None,
        max_num_seqs: int = 256,
        max_num_batched_tokens: int = 2048,
        num_kv_blocks: int = 0,
        kv_cache_memory_bytes: int = 0,
        gpu_memory_utilization: float = 0.9,
        enable_prefix_caching: bool = True,
        threads: int = 0,
        seed: int = 0,
        quantization: str = "",
        kv_cache_dtype: str = "auto",
        speculative: str = "",
        speculative_tokens: int = 7,
    ) -> None:
        """model: a folder or a hub id; None is the bundled demonstration model. tokenizer: another folder to
        take the tokenizer from. chat_template: a path, the template itself or the name of a shipped one.
        task: generate, embed, score or classify; auto is as the files say. 0 and None mean: decide from the
        model and the machine. Raises ModelUnavailable or ModelError, one line, for a model that cannot be had
        or loaded."""
        source = model_source.resolve("" if model is None else str(model))
        own = model_source.resolve(str(tokenizer)).folder if tokenizer is not None else source.folder
        self.model_id = source.model_id
        self._text = Text(own, chat_template)
        configure = Configure(
            model_path=str(source.folder),
            dtype=dtype,
            device=device,
            load_format=load_format,
            max_model_len=max_model_len or 0,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            num_kv_blocks=num_kv_blocks,
            kv_cache_memory_bytes=kv_cache_memory_bytes,
            gpu_memory_utilization=gpu_memory_utilization,
            enable_prefix_caching=enable_prefix_caching,
            threads=threads,
            seed=seed,
            quantization=quantization,
            kv_cache_dtype=kv_cache_dtype,
            speculative=speculative,
            speculative_tokens=speculative_tokens,
            task=task,
        )
        self._prompts = read_prompts(source.folder)
        self._inbox = Inbox()
        self._outbox = Outbox()
        self._ids = itertools.count(1)
        self._turn = threading.Lock()
        self._ready, self._loop, self._constraints = _load(configure, self._inbox, self._outbox)

    def get_tokenizer(self) -> Any:
        """The `tokenizers.Tokenizer` in use."""
        return self._text.tokenizer

    def load(self) -> Load:
        """The engine's gauges and counters since it was made: steps, preemptions, drafts."""
        return self._loop.load()

    def get_default_sampling_params(self) -> SamplingParams:
        """What the model's own generation configuration asks for; used when generate gets none."""
        own = self._ready.generation_defaults
        return SamplingParams(
            temperature=own.temperature,
            top_p=own.top_p,
            top_k=own.top_k,
            min_p=own.min_p,
            repetition_penalty=own.repetition_penalty,
        )

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """One output per prompt, in input order. A prompt is a string, a list of token ids, or a mapping with
        `prompt` or `prompt_token_ids`. Parameters: one for all, or one for each. Raises ValueError before
        anything runs for a prompt or parameter that cannot be served; GenerationFailed when a request fails
        while it runs (the others are finished first)."""
        listed = as_prompts(prompts)
        encoded: list[_Encoded] = []
        for index, prompt in enumerate(listed):
            with _naming(index, len(listed)):
                encoded.append(self._encode(prompt))
        return self._run(encoded, sampling_params, use_tqdm)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """generate for one conversation or a list of them, through the chat template. Raises ValueError also
        for a model without a template and for messages that it refuses."""
        talks = as_talks(messages)
        if not isinstance(chat_template_kwargs, Mapping | None):
            raise ValueError("chat_template_kwargs: must be a mapping")
        encoded: list[_Encoded] = []
        for index, talk in enumerate(talks):
            with _naming(index, len(talks)):
                if not is_list(talk):
                    raise ValueError("messages: a conversation is a list of messages")
                rendered = self._text.render(
                    talk,
                    add_generation_prompt=add_generation_prompt and not continue_final_message,
                    continue_final_message=continue_final_message,
                    tools=tools,
                    variables=chat_template_kwargs or {},
                )
            encoded.append(_Encoded(rendered.text, rendered.ids, rendered.stop_ids))
        return self._run(encoded, sampling_params, use_tqdm)

    @property
    def labels(self) -> tuple[str, ...]:
        """Class names of a classifier, in the order of `classify`'s columns."""
        return tuple(self._ready.pooled.labels) if self._ready.pooled is not None else ()

    def embed(
        self,
        texts: Input | Sequence[Input],
        *,
        prompt_name: str | None = None,
        prompt: str | None = None,
        dimensions: int | None = None,
        normalize: bool | None = None,
        pooling: str | None = None,
        truncate_prompt_tokens: int | None = None,
        use_tqdm: bool = True,
    ) -> Floats | list[Floats]:
        """Vectors, float32 [texts, dimensions] in the order of the texts; with pooling "all" a list of
        [tokens, dimensions]. A text is a string or its token ids. prompt: put before each string;
        prompt_name: one of the model's own, which may have a default. dimensions: the first so many, if the
        model allows it. normalize, pooling (cls, mean, last, all): None is as the model does.
        truncate_prompt_tokens: keeps the first so many tokens, -1 as many as the model takes; longer texts
        are an error without. Memory does not grow with the texts but for the result. Raises ValueError for
        what cannot be served, RuntimeError for a text that fails, naming it."""
        if prompt is None and (name := prompt_name or self._prompts.default) is not None:
            if name not in self._prompts.by_name:
                raise ValueError(f"prompt_name: the model has none called {name[:50]!r}")
            prompt = self._prompts.by_name[name]
        with self._pooled("embed") as batches:
            return batches.embed(
                as_texts(texts, "texts"),
                prompt=prompt or "",
                dimensions=dimensions,
                normalize=normalize,
                pooling=pooling,
                truncate=truncate_prompt_tokens,
                use_tqdm=use_tqdm,
            )

    def score(
        self,
        text_1: str | Sequence[str],
        text_2: str | Sequence[str],
        *,
        truncate_prompt_tokens: int | None = None,
        use_tqdm: bool = True,
    ) -> Floats:
        """Scores of pairs, float32 [pairs]: of a cross-encoder, or the cosine of an embedder's vectors. One
        text is paired with each of several, lists of equal length entry by entry. Otherwise as `embed`."""
        with self._pooled("score") as batches:
            return batches.score(as_pairs(text_1, text_2), truncate=truncate_prompt_tokens, use_tqdm=use_tqdm)

    def classify(
        self,
        texts: Input | Sequence[Input],
        *,
        truncate_prompt_tokens: int | None = None,
        use_tqdm: bool = True,
    ) -> Floats:
        """Probabilities of a classifier, float32 [texts, labels], see `labels`. Otherwise as `embed`."""
        with self._pooled("classify") as batches:
            return batches.classify(
                as_texts(texts, "texts"), truncate=truncate_prompt_tokens, use_tqdm=use_tqdm
            )

    @property
    def closed(self) -> bool:
        return "_loop" not in self.__dict__

    def close(self) -> None:
        """Drops the model and its memory; the object cannot be used after it."""
        self.__dict__.pop("_loop", None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ------------------------------------------------------------------------------------------- inside

    def _open_loop(self) -> BaseLoop:
        if self.closed:
            raise RuntimeError("this LLM is closed")
        return self._loop

    @contextmanager
    def _pooled(self, task: str) -> Iterator[PooledBatches]:
        loop = self._open_loop()
        if not isinstance(loop, PooledLoop):
            raise cannot(self._ready, task)
        with self._turn:
            yield PooledBatches(loop, self._inbox, self._outbox, self._ready, self._text)

    def _encode(self, prompt: Prompt) -> _Encoded:
        given: object = prompt
        if isinstance(prompt, Mapping):
            unknown = set(prompt) - {"prompt", "prompt_token_ids"}
            if unknown:
                raise ValueError(f"prompt: {sorted(unknown)[0]!r} is not supported by this version")
            given = prompt.get("prompt")
            if "prompt_token_ids" in prompt:
                if not is_list(prompt["prompt_token_ids"]):
                    raise ValueError("prompt: prompt_token_ids must be a list of token ids")
                return _Encoded(prompt.get("prompt"), list(prompt["prompt_token_ids"]))
        if isinstance(given, str):
            return _Encoded(given, self._text.encode(given, add_special_tokens=True))
        if not is_list(given):
            raise ValueError("prompt: a string, a list of token ids or a mapping")
        return _Encoded(None, list(given))

    def _run(
        self,
        encoded: list[_Encoded],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        use_tqdm: bool,
    ) -> list[RequestOutput]:
        loop = self._open_loop()
        if not isinstance(loop, EngineLoop):
            raise cannot(self._ready, "generate")
        params = self._params_for(len(encoded), sampling_params)
        distinct = {id(own): own for own in params}
        constraints = {key: self._constraint(own) for key, own in distinct.items()}
        requests = []
        for index, (prompt, own) in enumerate(zip(encoded, params, strict=True)):
            with _naming(index, len(encoded)):
                made = offline.core_request(
                    next(self._ids),
                    prompt.ids,
                    own,
                    self._ready,
                    self._text.encode_word,
                    prompt.stop_ids,
                    constraints[id(own)],
                )
            requests.append(made)
        collectors = {
            request.id: Collector(request, prompt.text, own, self._text.vocabulary)
            for request, prompt, own in zip(requests, encoded, params, strict=True)
        }
        with self._turn:
            failures = GenerationRun(loop, self._inbox, self._outbox).run(requests, collectors, use_tqdm)
        outputs = [collectors[request.id].output for request in requests]
        if failures:
            first = min(failures)
            index = next(i for i, request in enumerate(requests) if request.id == first)
            kept = [None if r.id in failures else o for r, o in zip(requests, outputs, strict=True)]
            raise GenerationFailed(
                f"{len(failures)} of {len(requests)} requests failed; prompt {index}: {failures[first]}", kept
            )
        return outputs

    def _constraint(self, params: SamplingParams) -> Constraint | None:
        """Compiled, and kept for the run. Raises ValueError for what cannot be enforced."""
        asked = constraint_of(params)
        if asked is None:
            return None
        if self._constraints is None:
            raise ValueError(f"{asked.param}: needs llguidance, and a model with a tokenizer.json")
        try:
            constraint = Constraint(grammar_of(asked.source))
            self._constraints.compiled(constraint.grammar)
        except RequestError as error:
            raise ValueError(f"{asked.param}: {error.message}") from None
        return constraint

    def _params_for(
        self, count: int, given: SamplingParams | Sequence[SamplingParams] | None
    ) -> Sequence[SamplingParams]:
        if given is None:
            given = self.get_default_sampling_params()
        if isinstance(given, SamplingParams):
            return [given] * count
        if not is_list(given) or not all(isinstance(own, SamplingParams) for own in given):
            raise ValueError("sampling_params: SamplingParams, or a list of them")
        if len(given) != count:
            raise ValueError(f"sampling_params: {len(given)} for {count} prompts")
        return given


def _load(configure: Configure, inbox: Inbox, outbox: Outbox) -> tuple[Ready, BaseLoop, Constraints | None]:
    built = build(configure, lambda done, total: None)
    return built.ready, make_loop(configure, built, inbox, outbox), built.constraints


@contextmanager
def _naming(index: int, count: int) -> Iterator[None]:
    """Tells in a ValueError which of several prompts it is about."""
    try:
        yield
    except ValueError as error:
        raise (ValueError(f"{error} (prompt {index})") if count > 1 else error) from None
