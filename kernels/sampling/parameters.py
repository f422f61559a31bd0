"""The layout of sampling parameters that the kernels read by slot, and of the noise they draw from.

A parameter table is int32 [num_slots, WIDTH]; floats are stored by their bits. A row whose slot is negative
is padding. Knows no requests.
"""

from __future__ import annotations

GREEDY = 0  # 1: the best token, whatever the rest says
FILTERED = 1  # 1: top_k, top_p or min_p remove something
TEMPERATURE = 2  # float32 > 0
TOP_K = 3  # 0: all
TOP_P = 4  # float32 in (0, 1]; 1: all
MIN_OFFSET = 5  # float32: temperature * log(min_p), added to the best logit; -inf: all
STREAM_LOW, STREAM_HIGH = 6, 7  # the 64 bits that start the row's random numbers
WIDTH = 8

# The token at place LANE * lane + i of its chunk of CHUNK takes output `lane` of the Philox counter
# (chunk * LANE + i, position), so that a token's noise depends on nothing but stream, position and id.
LANE = 512
CHUNK = 4 * LANE

FIRST_KEY = -(2**31)  # below the order key of every number
NO_LIMIT = 2**31 - 1  # as the last id of a bound: all of the equal ones stay
