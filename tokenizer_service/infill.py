"""Prompts that ask a model for what stands between two texts, in the form its family was trained on. Knows a
loaded tokenizer, no wire.

Which family it is follows from the vocabulary: its marks are tokens there, or they are not.
"""

from __future__ import annotations

from dataclasses import dataclass

from penstock.protos.errors import ApiError
from penstock.tokenizer_service.tokenizer import LoadedTokenizer, too_long

PREFIX, SUFFIX = "{prefix}", "{suffix}"
# Encoded in front of a text it keeps the tokenizer from adding the space of a text's beginning.
_ANCHOR = "☺"


@dataclass(frozen=True, slots=True)
class Family:
    """form: tokens, and the places of the two texts. ends: tokens that end an answer, where there are any.
    bare_suffix: the suffix gets no space of a text's beginning."""

    form: tuple[str, ...]
    ends: tuple[str, ...] = ()
    bare_suffix: bool = False

    @property
    def marks(self) -> list[str]:
        return [part for part in self.form if part not in (PREFIX, SUFFIX)]


_FAMILIES = (
    # Qwen2.5-Coder, CodeGemma
    Family(
        ("<|fim_prefix|>", PREFIX, "<|fim_suffix|>", SUFFIX, "<|fim_middle|>"),
        ("<|endoftext|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<|file_separator|>"),
    ),
    # StarCoder, StarCoder 2, Granite Code
    Family(("<fim_prefix>", PREFIX, "<fim_suffix>", SUFFIX, "<fim_middle>"), ("<|endoftext|>", "<file_sep>")),
    # DeepSeek Coder
    Family(("<｜fim▁begin｜>", PREFIX, "<｜fim▁hole｜>", SUFFIX, "<｜fim▁end｜>")),
    # CodeLlama
    Family(("▁<PRE>", PREFIX, "▁<SUF>", SUFFIX, "▁<MID>"), ("▁<EOT>",), bare_suffix=True),
    # Codestral: the suffix first
    Family(("[SUFFIX]", SUFFIX, "[PREFIX]", PREFIX)),
)


@dataclass(frozen=True, slots=True)
class Infill:
    """How one tokenizer asks for a middle. end_ids: they end it, beside the model's own end of sequence."""

    family: Family
    mark_ids: dict[str, int]
    end_ids: list[int]

    @classmethod
    def of(cls, tokenizer: LoadedTokenizer) -> Infill | None:
        """None for a tokenizer without the marks of any family."""
        for family in _FAMILIES:
            found = {mark: tokenizer.token_id(mark) for mark in family.marks}
            ids = {mark: token for mark, token in found.items() if token is not None}
            if len(ids) == len(found):
                ends = (tokenizer.token_id(end) for end in family.ends)
                return cls(family, ids, [token for token in ends if token is not None])
        return None

    def encode(
        self, tokenizer: LoadedTokenizer, texts: list[str], suffix: str, adds_special: bool, max_tokens: int
    ) -> list[list[int]]:
        """The ids of each text followed, after what is to be filled in, by the suffix. Raises ApiError
        (context_length_exceeded) for rows of more than max_tokens, 0: any."""
        end = self._encode_suffix(tokenizer, suffix)
        bos = tokenizer.special_ids.get("bos") if adds_special and tokenizer.adds_bos else None
        rows = []
        for prefix in tokenizer.encode_parts(texts):
            row = [] if bos is None else [bos]
            for part in self.family.form:
                row += prefix if part == PREFIX else end if part == SUFFIX else [self.mark_ids[part]]
            if max_tokens and len(row) > max_tokens:
                raise too_long(len(row), max_tokens, "prompt")
            rows.append(row)
        return rows

    def _encode_suffix(self, tokenizer: LoadedTokenizer, suffix: str) -> list[int]:
        if not self.family.bare_suffix:
            return tokenizer.encode_parts([suffix])[0]
        anchor, whole = tokenizer.encode_parts([_ANCHOR, _ANCHOR + suffix])
        return whole[len(anchor) :] if whole[: len(anchor)] == anchor else tokenizer.encode_parts([suffix])[0]


def no_infill() -> ApiError:
    return ApiError(
        "unsupported_parameter",
        "'suffix' is not supported: this model's vocabulary has no tokens to fill in the middle of a text.",
        "suffix",
    )
