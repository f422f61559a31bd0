"""The text side of offline batches: prompts to ids, conversations to prompts. Knows no model."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from penstock.frontend.text.vocabulary import Vocabulary
from penstock.local.model_source import ModelUnavailable
from penstock.protos.settings import ConfigError
from penstock.tokenizer_service import chat_template as chat_template_of
from penstock.tokenizer_service import renderer, tokenizer, tokenizer_files
from penstock.tokenizer_service.render_pool import RenderJob
from penstock.tokenizer_service.tokenizer import Encoded, EncodeOptions


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation as a prompt. stop_ids: tokens that end a turn, beside the end of sequence."""

    text: str
    ids: list[int]
    stop_ids: tuple[int, ...]


class Text:
    """One model's tokenizer and chat template, in this process."""

    def __init__(self, folder: Path, chat_template: str | None) -> None:
        """chat_template: a path, the template itself or the name of a shipped one, None for the model's own.
        Raises ModelUnavailable, one line, for unusable files, and ValueError for an unusable template."""
        try:
            files = tokenizer_files.read(str(folder))
            self._loaded = tokenizer.load(files)
            self._templates = chat_template_of.find(chat_template or "", "", (), files.templates, "")
        except tokenizer_files.ModelFilesError as error:
            raise ModelUnavailable(str(error)) from error
        except ConfigError as error:
            raise ValueError(f"chat_template: {error}") from error
        self.vocabulary = Vocabulary.from_buffer(self._loaded.data, self._loaded.fingerprint)

    @property
    def tokenizer(self) -> tokenizers.Tokenizer:
        return self.vocabulary.tokenizer

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        with _naming_halves("prompt: the text"):
            return self._loaded.encode_prompt(text, add_special_tokens)

    def encode_rows(self, texts: Sequence[str], others: Sequence[str], truncate: int | None) -> list[Encoded]:
        """With special tokens, each text alone, or with the one at its place in `others`; the first
        `truncate` ids. Raises ValueError for a text that is not Unicode."""
        options = EncodeOptions(truncate=truncate, keep_last=False)
        with _naming_halves("a text"):
            return self._loaded.encode(texts, others, options)

    def encode_word(self, word: str) -> list[list[int]]:
        """The id sequences that spell a word, at the start of a text and after a space."""
        spellings = [self.encode(text, add_special_tokens=False) for text in (word, f" {word.lstrip()}")]
        found = [ids for ids in spellings if ids]
        return found if len(found) < 2 or found[0] != found[1] else found[:1]

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool,
        continue_final_message: bool,
        tools: Sequence[Mapping[str, Any]] | None,
        variables: Mapping[str, Any],
    ) -> Rendered:
        """The prompt of a conversation. Raises ValueError when there is no template or it refuses."""
        template = self._templates.choose(with_tools=bool(tools))
        if template is None:
            raise ValueError("chat_template: this model has none; give one, or use generate")
        job = RenderJob(
            template=template,
            messages=_json(list(messages), "messages"),
            tools=_json(list(tools), "tools") if tools else b"",
            arguments=_json(dict(variables), "chat_template_kwargs") if variables else b"",
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            special_tokens={f"{role}_token": text for role, text in self._loaded.special_tokens.items()},
        )
        head, data = renderer.answer(job.parts())
        reply = json.loads(head)
        if "error" in reply:
            raise ValueError(f"{reply['error']['param'] or 'messages'}: {reply['error']['message']}")
        eos = self._loaded.special_ids.get("eos")
        hints = chat_template_of.read_hints(template, self._loaded.added_token_id, eos)
        text = data.decode("utf-8")
        # The template writes the special tokens itself.
        return Rendered(text, self.encode(text, add_special_tokens=False), hints.stop_token_ids)


@contextlib.contextmanager
def _naming_halves(what: str) -> Iterator[None]:
    """Raises ValueError for a text that holds half of a character: the library says TypeError and no more."""
    try:
        yield
    except TypeError:
        raise ValueError(f"{what} holds half of a character") from None


def _json(value: Any, name: str) -> bytes:
    try:
        return json.dumps(value).encode("utf-8")
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: only JSON values can be rendered") from error
