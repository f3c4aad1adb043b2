"""Modules of RMT, PPMA and Agent attention: as published (decay_modules.py), and refusals."""

import pytest
import torch
from decay_modules import HEADS, MODULES, WIDTH

from vitkern.nn import AgentAttention, PolylinePathAttention, RetentionAttention2d


@pytest.mark.parametrize("name", MODULES)
def test_modules_are_the_published(name):
    MODULES[name]()


def test_refusals_are_sentences():
    with pytest.raises(ValueError, match="compat must be 'code' or 'paper', got 'draft'"):
        RetentionAttention2d(WIDTH, HEADS, compat="draft")
    with pytest.raises(ValueError, match="the head size must be even, got 3"):
        PolylinePathAttention(9, 3)
    with pytest.raises(ValueError, match=r"x must have shape \[B, H, W, 12\]"):
        RetentionAttention2d(WIDTH, HEADS)(torch.zeros(2, 15, WIDTH))
    with pytest.raises(ValueError, match="agent_num must be the square of a number, got 5"):
        AgentAttention(WIDTH, HEADS, agent_num=5)
