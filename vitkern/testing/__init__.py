"""Tests that users can run on their own machine: one oracle, one rule, sampled cases for every op.

An op enters with one :class:`Entry` (``vitkern/testing/<op>.py``). From it come the sampler, opcheck, gradcheck, compile,
autocast, poisoning, repeatability, thread and instruction-set tests.
"""

from vitkern.testing.oracle import assert_close_to_oracle, assert_matches, poisoned
from vitkern.testing.registry import Call, Entry, backends, cases, entries

__all__ = ["Call", "Entry", "assert_close_to_oracle", "assert_matches", "backends", "cases", "entries", "poisoned"]
