"""Trains the demonstration model's tokenizer and encodes documents; knows nothing of the model."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from penstock.local.demo import template
from penstock.local.demo.dialogues import Document, document

VOCABULARY_SIZE = 3072
CONTEXT_LENGTH = 2048
# One digit a token, so that sums are learnt digit by digit; a space goes with the word it precedes.
SPLIT = r"""'(?:s|t|re|ve|m|ll|d)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""


@dataclass(frozen=True)
class Encoded:
    """A document as tokens.

    Attributes:
        ids: token ids.
        learnt: for each id, whether the model learns to predict it.
    """

    ids: list[int]
    learnt: list[bool]


def document_pieces(item: Document) -> list[tuple[str, bool]]:
    """A document as pieces of text, each with whether it is learnt."""
    if item.plain is not None:
        prompt, continuation = item.plain
        return [(prompt, False), (continuation + template.TURN_END, True)]
    return template.render(item.messages, item.tools)


def train_tokenizer(seed: int, documents: int = 40_000) -> Tokenizer:
    """Trains a byte-level BPE tokenizer on documents of the corpus."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    markup = [*template.SPECIAL_TOKENS, *template.MARKUP_TOKENS]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE - len(template.MARKUP_TOKENS),
        special_tokens=list(template.SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=2,
        show_progress=False,
    )
    rng = random.Random(seed)

    def texts() -> list[str]:
        found = []
        for _ in range(documents):
            text = "".join(piece for piece, _ in document_pieces(document(rng)))
            for mark in markup:
                text = text.replace(mark, " ")
            found.append(text)
        return found

    tokenizer.train_from_iterator(texts(), trainer)
    tokenizer.add_tokens(
        [AddedToken(mark, special=False, normalized=False) for mark in template.MARKUP_TOKENS]
    )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes tokenizer.json, tokenizer_config.json and chat_template.jinja."""
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=template.TURN_END,
        pad_token=template.END_OF_TEXT,
        model_max_length=CONTEXT_LENGTH,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = template.CHAT_TEMPLATE
    fast.save_pretrained(folder)


def encode(tokenizer: Tokenizer, item: Document) -> Encoded:
    """Turns a document into ids; pieces are encoded one by one, since no token crosses their borders."""
    ids: list[int] = []
    learnt: list[bool] = []
    for text, target in document_pieces(item):
        piece = tokenizer.encode(text, add_special_tokens=False).ids
        ids += piece
        learnt += [target] * len(piece)
    return Encoded(ids, learnt)
