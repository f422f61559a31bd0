"""Where a step's numbers lie in the one packed int32 buffer that goes to the device.

    header | SEQUENCE_FIELDS of each sequence | token ids of all sequences | new block table entries

Nothing is aligned or padded, so the used part is contiguous and goes over in one copy. All offsets follow
from the header, which the device reads: the same launch serves every step of its bucket. Knows numbers only.
"""

from __future__ import annotations

# Header: sequences, tokens, and two unused words.
HEADER_WORDS = 4
NUM_SEQUENCES, NUM_TOKENS = 0, 1

# Of each sequence, in this order.
SEQUENCE_FIELDS = 10
SLOT = 0  # row of the persistent block tables and of the last sampled tokens
START = 1  # position of its first token of this step
COUNT = 2  # its tokens of this step, >= 1
PENDING = 3  # 1: its only token is the one last sampled for its slot, which only the device knows
QUERY_START = 4  # row of its first token
SAMPLE_START = 5  # its first row among the rows to sample
SAMPLE_COUNT = 6  # how many of its last tokens are to be sampled from
FIRST_NEW = 7  # the device knows the block table's columns before this one
NUM_NEW = 8  # entries sent now, for the columns from FIRST_NEW on
NEW_OFFSET = 9  # the first of them, in the section of new entries


def packed_words(max_num_seqs: int, max_num_tokens: int, max_blocks: int) -> int:
    """int32 words that hold any step: every sequence may bring a whole new block table."""
    return HEADER_WORDS + max_num_seqs * (SEQUENCE_FIELDS + max_blocks) + max_num_tokens
