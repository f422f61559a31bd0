"""A loaded tokenizer: texts to ids and back. Knows no chat, no wire and no threads.

All calls go through the batch functions of the `tokenizers` library, which release the interpreter lock; the
single ones hold it, and a prompt of a MiB would stop every other thread for half a second.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import tokenizers
from tokenizers import AddedToken

from penstock.protos.errors import ApiError
from penstock.tokenizer_service.tokenizer_files import ModelFilesError, TokenizerFiles

GROUP_CHARS = 1 << 20

# A text, or a pair of texts that is encoded together.
Input: TypeAlias = str | tuple[str, str]


@dataclass(frozen=True, slots=True)
class EncodeOptions:
    """truncate: keep so many ids a row, None for all; keep_last: from the end, else from the start.
    max_tokens: longest row that is answered, 0 for any. no_answer: nothing is generated from the rows."""

    add_special_tokens: bool = True
    truncate: int | None = None
    keep_last: bool = True
    max_tokens: int = 0
    offsets: bool = False
    tokens: bool = False
    no_answer: bool = False


@dataclass(slots=True)
class Encoded:
    """offsets: start and end of each token in characters, flattened. type_ids: 0 or 1, for pairs."""

    ids: list[int]
    type_ids: list[int] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    tokens: list[str] = field(default_factory=list)


class LoadedTokenizer:
    """data: tokenizer.json as it is shipped to others. fingerprint: its SHA-256 in hex. vocab_size: ids are
    below it, added tokens included. special_ids: by role ("bos"). special_tokens: texts by role. prompts: by
    name."""

    def __init__(self, data: bytes, files: TokenizerFiles, source: str) -> None:
        """source: the file's name for error lines. Raises ModelFilesError."""
        self._tokenizer = _parse(data, source)
        # Files of sentence encoders carry a maximum length and padding; callers decide about both here.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._mark_special(files.all_special)
        self.data = data
        self.fingerprint = hashlib.sha256(data).hexdigest()
        ids = sorted(self._tokenizer.get_vocab(with_added_tokens=True).values())
        if not ids:
            raise ModelFilesError(f"{source}: the vocabulary is empty")
        self.vocab_size = ids[-1] + 1
        self._holes = frozenset(range(self.vocab_size)).difference(ids)
        self._added = self._tokenizer.get_added_tokens_decoder()
        self.special_tokens = dict(files.special_tokens)
        self.prompts, self.default_prompt_name = dict(files.prompts), files.default_prompt_name
        self.special_ids = {
            role: token
            for role, text in files.special_tokens.items()
            if (token := self._tokenizer.token_to_id(text)) is not None
        }
        named = (self._tokenizer.token_to_id(text) for text in files.all_special)
        special = {token for token, entry in self._added.items() if entry.special}
        self.all_special_ids = sorted(special.union(token for token in named if token is not None))
        self.adds_bos = self._starts_with_bos()

    def _mark_special(self, texts: Sequence[str]) -> None:
        """Tokens that only the configuration calls special are left out of decoded text too."""
        known = {
            token.content for token in self._tokenizer.get_added_tokens_decoder().values() if token.special
        }
        new = [
            AddedToken(text, special=True, normalized=False)
            for text in texts
            if text not in known and self._tokenizer.token_to_id(text) is not None
        ]
        if new:
            self._tokenizer.add_special_tokens(new)

    def _starts_with_bos(self) -> bool:
        bos = self.special_ids.get("bos")
        return bos is not None and self._encode(["a"], True)[0].ids[:1] == [bos]

    def added_token_id(self, text: str) -> int | None:
        """The id of an added token, None for ordinary text."""
        token = self._tokenizer.token_to_id(text)
        return token if token in self._added else None

    def encode(self, texts: Sequence[str], pairs: Sequence[str], options: EncodeOptions) -> list[Encoded]:
        """One row a text; pairs is empty or as long. Raises ApiError (context_length_exceeded), which names
        the text of several."""
        inputs: list[Input] = list(zip(texts, pairs, strict=True)) if pairs else list(texts)
        answers: list[Encoded] = []
        for group in _groups(inputs):
            rows = self._encode(group, options.add_special_tokens, options.offsets)
            for given, row in zip(group, rows, strict=True):
                name = f"prompt[{len(answers)}]" if len(inputs) > 1 else "prompt"
                answers.append(self._answer(given, row, options, name))
        return answers

    def _answer(self, given: Input, whole: tokenizers.Encoding, options: EncodeOptions, name: str) -> Encoded:
        row: tokenizers.Encoding | _Row = whole
        if options.truncate is not None and len(row) > options.truncate:
            row = self._truncated(given, options)
        if options.max_tokens and len(row) > options.max_tokens:
            error = too_long(len(row), options.max_tokens, "prompt", options.no_answer)
            error.param = name
            raise error
        return _encoded(row, isinstance(given, tuple), options)

    def token_id(self, text: str) -> int | None:
        """The id of exactly this token."""
        return self._tokenizer.token_to_id(text)

    def encode_parts(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of texts that are parts of a prompt: no special tokens around them."""
        return [row.ids for row in self._encode(texts, False)]

    def encode_prompt(self, text: str, add_special_tokens: bool) -> list[int]:
        """The ids of a rendered prompt. A template that writes the first token itself does not get two."""
        ids: list[int] = self._encode([text], add_special_tokens)[0].ids
        bos = self.special_ids.get("bos")
        if add_special_tokens and self.adds_bos and ids[:2] == [bos, bos]:
            return ids[1:]
        return ids

    def decode(self, rows: Sequence[Sequence[int]], skip_special: bool, spaces_between: bool) -> list[str]:
        """Texts. spaces_between=False (with special tokens kept) joins added tokens and the text between them
        without the blanks that decoders without a byte level put there. Raises ApiError (invalid_value) for
        ids outside the vocabulary."""
        for index, row in enumerate(rows):
            self._check_ids(row, index)
        if skip_special or spaces_between:
            lists = [list(row) for row in rows]
            return self._tokenizer.decode_batch(lists, skip_special_tokens=skip_special)
        return [self._decode_unspaced(row) for row in rows]

    def _check_ids(self, row: Sequence[int], index: int) -> None:
        if not row:
            return
        top = max(row)
        outside = top if top >= self.vocab_size else None
        if outside is None and self._holes:
            outside = next((token for token in row if token in self._holes), None)
        if outside is not None:
            message = f"Token id {outside} is outside the vocabulary of {self.vocab_size} tokens."
            raise ApiError("invalid_value", message, f"rows[{index}]")

    def _decode_unspaced(self, row: Sequence[int]) -> str:
        runs: list[list[int]] = [[]]
        for token in row:
            if token in self._added:
                runs.extend(([token], []))
            else:
                runs[-1].append(token)
        texts = self._tokenizer.decode_batch(runs, skip_special_tokens=False)
        return "".join(
            self._added[run[0]].content if run and run[0] in self._added else text
            for run, text in zip(runs, texts, strict=True)
        )

    def _encode(
        self, inputs: Sequence[Input], special: bool, offsets: bool = False
    ) -> list[tokenizers.Encoding]:
        """Without offsets in characters it is a quarter faster."""
        encode = self._tokenizer.encode_batch if offsets else self._tokenizer.encode_batch_fast
        return encode(list(inputs), add_special_tokens=special)

    def _truncated(self, given: Input, options: EncodeOptions) -> tokenizers.Encoding | _Row:
        """Cuts the text, not the special tokens around it; of a pair the longer side first."""
        limit = options.truncate or 0
        direction = "left" if options.keep_last else "right"
        sides: list[Input] = [given] if isinstance(given, str) else list(given)
        parts = self._encode(sides, False, options.offsets)
        frame = self._tokenizer.num_special_tokens_to_add(len(parts) > 1) if options.add_special_tokens else 0
        room = limit - frame
        if room <= 0:
            whole = self._encode([given], options.add_special_tokens, options.offsets)[0]
            whole.truncate(limit, direction=direction)
            return whole
        for part, keep in zip(parts, _shares([len(part) for part in parts], room), strict=True):
            part.truncate(keep, direction=direction)
        if len(parts) > 1:
            return self._joined(parts, options)
        return self._tokenizer.post_process(parts[0], None, options.add_special_tokens)

    def _joined(self, parts: list[tokenizers.Encoding], options: EncodeOptions) -> _Row:
        """Two cut sides with what stands around them. The library would also join each piece that was cut off
        one side with each of the other's, for minutes where little is kept of much."""
        (frame,) = self._encode([("a", "a")], options.add_special_tokens, options.offsets)
        rows = [self._tokenizer.post_process(part, None, False) for part in parts]
        joined, placed = _Row(), set[int]()
        for place, side in enumerate(frame.sequence_ids):
            if side is None:
                joined.add(frame, slice(place, place + 1), frame.type_ids[place])
            elif side not in placed:
                placed.add(side)
                joined.add(rows[side], slice(None), frame.type_ids[place])
        return joined


class _Row:
    """As much of an encoding as answers have."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.type_ids: list[int] = []
        self.offsets: list[tuple[int, int]] = []
        self.tokens: list[str] = []

    def __len__(self) -> int:
        return len(self.ids)

    def add(self, source: tokenizers.Encoding, places: slice, type_id: int) -> None:
        ids = source.ids[places]
        self.ids += ids
        self.type_ids += [type_id] * len(ids)
        self.offsets += source.offsets[places]
        self.tokens += source.tokens[places]


def load(files: TokenizerFiles) -> LoadedTokenizer:
    """Raises ModelFilesError."""
    if files.tokenizer_json is not None:
        return LoadedTokenizer(files.tokenizer_json, files, str(files.folder / "tokenizer.json"))
    return LoadedTokenizer(_converted(files), files, str(files.folder))


def too_long(length: int, limit: int, param: str, no_answer: bool = False) -> ApiError:
    """limit: the longest prompt, one less than the context, or with no_answer all of it."""
    if no_answer:
        return ApiError(
            "context_length_exceeded",
            f"This model's maximum input length is {limit} tokens, but the {param} resulted in {length} "
            f"tokens. Please reduce the length of the {param}, or ask for truncation.",
            param,
        )
    return ApiError(
        "context_length_exceeded",
        f"This model's maximum context length is {limit + 1} tokens, of which at least one must be left for "
        f"the answer, but the {param} resulted in {length} tokens. Please reduce the length of the {param}.",
        param,
    )


def _groups(inputs: list[Input]) -> Iterator[list[Input]]:
    """Cuts a batch so that the library's own rows, some 150 bytes a character, never pile up."""
    group: list[Input] = []
    size = 0
    for given in inputs:
        group.append(given)
        size += len(given) if isinstance(given, str) else len(given[0]) + len(given[1])
        if size >= GROUP_CHARS:
            yield group
            group, size = [], 0
    if group:
        yield group


def _shares(lengths: list[int], room: int) -> list[int]:
    """How many tokens each side keeps: one at a time from whichever is longer; of an odd token too many the
    longer side keeps it, of equal ones the second."""
    if len(lengths) == 1:
        return [room]
    first, second = lengths
    shorter = min(first, second, room // 2)
    return [room - shorter, shorter] if first > second else [shorter, room - shorter]


def _encoded(row: tokenizers.Encoding | _Row, paired: bool, options: EncodeOptions) -> Encoded:
    answer = Encoded(row.ids)
    if paired:
        answer.type_ids = row.type_ids
    if options.offsets:
        answer.offsets = [edge for span in row.offsets for edge in span]
    if options.tokens:
        answer.tokens = row.tokens
    return answer


def _parse(data: bytes, source: str) -> tokenizers.Tokenizer:
    try:
        json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ModelFilesError(f"{source}: not valid JSON") from error
    try:
        return tokenizers.Tokenizer.from_buffer(data)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library panics on some files, and a panic is no Exception
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise ModelFilesError(f"{source}: not a tokenizer ({reason})") from error


# Files that transformers can make a fast tokenizer from.
_SLOW_FILES = ("tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model")


def _converted(files: TokenizerFiles) -> bytes:
    """tokenizer.json made by transformers from older files, where it is installed."""
    folder = files.folder
    found = next((name for name in _SLOW_FILES if (folder / name).exists()), None)
    if found is None:
        raise ModelFilesError(f"{folder / 'tokenizer.json'}: there is no such file")
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise ModelFilesError(
            f"{folder}: has no tokenizer.json; converting {found} needs transformers"
        ) from error
    try:
        fast = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        return fast.backend_tokenizer.to_str().encode("utf-8")
    except Exception as error:
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise ModelFilesError(f"{folder / found}: cannot be converted ({reason})") from error
