"""Agent attention: a few pooled queries stand between all queries and all keys."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, interpolate

from vitkern.nn import _checks
from vitkern.ops.attention import attention
from vitkern.value import DepthwiseValue


class AgentAttention(nn.Module):
    """Agent attention (Han et al. 2024) of tokens ``[B, p + H W, C]``, p the class token or none; returns tokens of the same shape.

    With A the queries of the grid pooled to ``agent_num`` tokens: ``softmax(s q Aᵀ + b₂) softmax(s A kᵀ + b₁) v``, with biases
    that a 7 x 7 table gives by bilinear interpolation, plus a vector for each row and each column. A depthwise 3 x 3 convolution
    of the values is added. Parameters are those of ``AgentAttention`` in LeapLabTHU/Agent-Attention, ``agent_deit.py`` (with a
    class token) and ``agent_swin.py`` (without) (2024).

    Args:
        dim: channels C.
        num_heads: heads; divides dim.
        qkv_bias: whether ``qkv`` has a bias.
        attn_drop: dropout of the weights of both attentions, in training.
        proj_drop: dropout of the output, in training.
        agent_num: agents; the square of a number.
        window: the grid (H, W), or its side.
        class_token: whether the first token lies on no grid.

    Raises:
        ValueError: num_heads does not divide dim, agent_num is no square, or x is not ``[B, p + H W, C]``.
    """

    an_bias: Tensor
    na_bias: Tensor
    ah_bias: Tensor
    aw_bias: Tensor
    ha_bias: Tensor
    wa_bias: Tensor
    ac_bias: Tensor
    ca_bias: Tensor

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        agent_num: int = 49,
        window: int | tuple[int, int] = 14,
        class_token: bool = False,
    ) -> None:
        super().__init__()
        self.side = round(agent_num**0.5)
        if self.side**2 != agent_num or agent_num < 1:
            raise ValueError(f"AgentAttention: agent_num must be the square of a number, got {agent_num}")
        self.scale = _checks.heads(self, dim, num_heads) ** -0.5
        self.dim, self.num_heads, self.agent_num, self.prefix = dim, num_heads, agent_num, int(class_token)
        self.window = (window, window) if isinstance(window, int) else (window[0], window[1])
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        self.dwc = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        shapes = {
            "an_bias": (num_heads, agent_num, 7, 7),
            "na_bias": (num_heads, agent_num, 7, 7),
            "ah_bias": (1, num_heads, agent_num, self.window[0], 1),
            "aw_bias": (1, num_heads, agent_num, 1, self.window[1]),
            "ha_bias": (1, num_heads, self.window[0], 1, agent_num),
            "wa_bias": (1, num_heads, 1, self.window[1], agent_num),
        }
        if class_token:
            shapes |= {"ac_bias": (1, num_heads, agent_num, 1), "ca_bias": (1, num_heads, 1, agent_num)}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(nn.init.trunc_normal_(torch.empty(shape), std=0.02)))

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = self.window
        _checks.shape(self, "x", x, "B", self.prefix + rows * columns, self.dim)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(2)  # [B, N, heads, head_dim]
        maps = q[:, self.prefix :].flatten(2).mT.unflatten(2, self.window)  # [B, C, H, W]
        agents = adaptive_avg_pool2d(maps, self.side).flatten(2).mT.unflatten(-1, (self.num_heads, -1))
        options = {"scale": self.scale, "dropout_p": self.attn_drop.p if self.training else 0.0}
        read = attention(agents, k, v, bias=self._of_agents(), **options)
        lepe = DepthwiseValue(self.dwc.weight, self.dwc.bias, self.window, self.prefix)
        out = attention(q, agents, read, bias=self._of_queries(), **options) + lepe.of(v)
        return self.proj_drop(self.proj(out.flatten(2)))

    if TYPE_CHECKING:
        __call__ = forward

    def _of_agents(self) -> Tensor:
        """What agents add to their scores with the tokens, ``[1, heads, agents, N]``."""
        table = interpolate(self.an_bias, self.window, mode="bilinear") + (self.ah_bias + self.aw_bias)[0]
        table = table.flatten(2)[None]
        return torch.cat((self.ac_bias, table), -1) if self.prefix else table

    def _of_queries(self) -> Tensor:
        """What tokens add to their scores with the agents, ``[1, heads, N, agents]``."""
        table = interpolate(self.na_bias, self.window, mode="bilinear").flatten(2).mT
        table = (table + (self.ha_bias + self.wa_bias)[0].flatten(1, 2))[None]
        return torch.cat((self.ca_bias, table), 2) if self.prefix else table

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_heads={self.num_heads}, agent_num={self.agent_num}, window={self.window}"
