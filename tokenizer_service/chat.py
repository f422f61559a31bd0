"""One chat request to token ids: template choice, rendering, encoding. Knows no gRPC."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from functools import partial

from penstock.protos.errors import ApiError
from penstock.tokenizer_service.chat_template import NO_TEMPLATE, ChatTemplates, TemplateHints, read_hints
from penstock.tokenizer_service.lanes import Lanes
from penstock.tokenizer_service.render_pool import RenderJob, RenderPool
from penstock.tokenizer_service.tokenizer import LoadedTokenizer, too_long

log = logging.getLogger("penstock.tokenizer")


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """ids: uint32 values. text: the rendered prompt. content_format: "string" or "openai"."""

    ids: list[int]
    text: str
    hints: TemplateHints
    ends_in_reasoning: bool
    content_format: str


@dataclass(frozen=True, slots=True)
class ChatOptions:
    """truncate: keep the last so many ids, None for all. max_tokens: 0 for any. no_answer: as in
    EncodeOptions."""

    template: str | None = None
    add_special_tokens: bool = False
    truncate: int | None = None
    max_tokens: int = 0
    no_answer: bool = False


class ChatRenderer:
    """Renders and encodes chats for one model. content_format: "auto", "string" or "openai"."""

    def __init__(
        self,
        tokenizer: LoadedTokenizer,
        templates: ChatTemplates,
        pool: RenderPool,
        lanes: Lanes,
        content_format: str,
        trust_request_templates: bool,
    ) -> None:
        self.templates = templates
        self._tokenizer = tokenizer
        self._pool = pool
        self._lanes = lanes
        self._trust = trust_request_templates
        self._forced = content_format
        self._hints = {text: self._read_hints(text) for text in templates.texts()}
        self.special_tokens = {f"{role}_token": text for role, text in tokenizer.special_tokens.items()}
        self.content_format = "string" if content_format == "auto" else content_format
        self.supports_tools = False

    async def prepare(self, strict: bool) -> None:
        """Inspects the templates and compiles them in every renderer.

        Logs the content format once. strict: a template that is not valid Jinja raises ApiError; else it is
        only logged, and chats answer the error."""
        good = []
        for text in dict.fromkeys(self.templates.texts()):
            try:
                info = await self._pool.inspect(text)
            except ApiError as error:
                if strict:
                    raise
                log.warning("the model's chat template cannot be used: %s", error.message)
                continue
            good.append(text)
            self.supports_tools = self.supports_tools or "tools" in info.variables
            if text == self.templates.choose(False) and self._forced == "auto":
                self.content_format = info.content_format
        if good:
            how = "detected" if self._forced == "auto" else "given"
            log.info("chat template content format: %s (%s)", self.content_format, how)
        await self._pool.keep_warm(good)

    def hints(self) -> TemplateHints:
        """Of the template for chats without tools, completed by the one for tools."""
        found = [self._hints[text] for text in self.templates.texts()]
        if not found:
            return TemplateHints()
        tool_parser = next((h.tool_parser for h in reversed(found) if h.tool_parser), "")
        return TemplateHints(tool_parser, found[0].reasoning_parser, found[0].stop_token_ids)

    async def render(self, job: RenderJob, options: ChatOptions) -> ChatPrompt:
        """The job's template is the model's, or options.template. Raises ApiError."""
        template = self._template(job, options)
        form = self._forced if job.content_format == "auto" else job.content_format
        job = replace(job, template=template, content_format=form, special_tokens=self.special_tokens)
        rendered = await self._pool.render(job)
        encode = partial(self._tokenizer.encode_prompt, rendered.text, options.add_special_tokens)
        ids = await self._lanes.run(len(rendered.text), encode)
        if options.truncate is not None:
            ids = ids[-options.truncate :]
        if options.max_tokens and len(ids) > options.max_tokens:
            raise too_long(len(ids), options.max_tokens, "messages", options.no_answer)
        found = self._hints.get(template) or self._read_hints(template)
        return ChatPrompt(ids, rendered.text, found, rendered.ends_in_reasoning, rendered.content_format)

    def _template(self, job: RenderJob, options: ChatOptions) -> str:
        if options.template is not None:
            if not self._trust:
                raise ApiError(
                    "unsupported_parameter",
                    "This server does not accept chat templates in requests.",
                    "chat_template",
                )
            return options.template
        has_tools = job.tools.translate(None, b" \t\r\n") not in (b"", b"null", b"[]")
        template = self.templates.choose(has_tools)
        if template is None:
            raise ApiError("invalid_value", NO_TEMPLATE, "messages")
        return template

    def _read_hints(self, template: str) -> TemplateHints:
        tokenizer = self._tokenizer
        return read_hints(template, tokenizer.added_token_id, tokenizer.special_ids.get("eos"))


def check_final_message(add_generation_prompt: bool | None, continue_final_message: bool) -> bool:
    """Whether the prompt ends in an opened answer. None: the caller did not say, which is true unless the
    final message goes on. Raises ApiError when both were asked for."""
    if continue_final_message and add_generation_prompt:
        raise ApiError(
            "invalid_value",
            "continue_final_message and add_generation_prompt cannot both be true.",
            "continue_final_message",
        )
    return not continue_final_message if add_generation_prompt is None else add_generation_prompt
