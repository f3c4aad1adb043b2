"""Modules over vitkern's ops, with the parameter names of the systems they serve."""

from vitkern.nn.agent_attention import AgentAttention
from vitkern.nn.attention import Attention
from vitkern.nn.beit_attention import BeitAttention
from vitkern.nn.cascaded_group_attention import CascadedGroupAttention
from vitkern.nn.cross_shaped_window_attention import CrossShapedWindowAttention
from vitkern.nn.decomposed_rel_pos_attention import DecomposedRelPosAttention
from vitkern.nn.gaussian_mixture_attention import GaussianMixtureAttention
from vitkern.nn.global_context_window_attention import GlobalContextWindowAttention
from vitkern.nn.levit_attention import LevitAttention, LevitAttentionDownsample
from vitkern.nn.linear_attention import FocusedLinearAttention, LinearAttention, SimplifiedLinearAttention
from vitkern.nn.lite_mla import LiteMLA
from vitkern.nn.masked_cross_attention import MaskedCrossAttention
from vitkern.nn.mdta import MDTA
from vitkern.nn.multi_axis_attention import MultiAxisAttention
from vitkern.nn.multi_scale_attention import MultiScaleAttention
from vitkern.nn.multi_scale_deformable_attention import MultiScaleDeformableAttention, multi_scale_deformable_attn
from vitkern.nn.neighborhood_attention import DilatedNeighborhoodAttention, NeighborhoodAttention
from vitkern.nn.overlapping_cross_attention import OverlappingCrossAttention
from vitkern.nn.sigmoid_attention import SigmoidAttention
from vitkern.nn.spatial_decay_attention import PolylinePathAttention, RetentionAttention2d
from vitkern.nn.ss2d import SS2D
from vitkern.nn.talking_head_attention import TalkingHeadAttention
from vitkern.nn.varied_size_window_attention import VariedSizeWindowAttention
from vitkern.nn.window_attention import WindowAttention, WindowAttentionV2
from vitkern.nn.xca import XCA, ChannelAttention

__all__ = [
    "OverlappingCrossAttention",
    "MultiAxisAttention",
    "GlobalContextWindowAttention",
    "CrossShapedWindowAttention",
    "MDTA",
    "SS2D",
    "XCA",
    "AgentAttention",
    "Attention",
    "BeitAttention",
    "CascadedGroupAttention",
    "ChannelAttention",
    "DecomposedRelPosAttention",
    "DilatedNeighborhoodAttention",
    "FocusedLinearAttention",
    "GaussianMixtureAttention",
    "LevitAttention",
    "LevitAttentionDownsample",
    "LinearAttention",
    "LiteMLA",
    "MaskedCrossAttention",
    "MultiScaleAttention",
    "MultiScaleDeformableAttention",
    "NeighborhoodAttention",
    "PolylinePathAttention",
    "RetentionAttention2d",
    "SigmoidAttention",
    "SimplifiedLinearAttention",
    "TalkingHeadAttention",
    "VariedSizeWindowAttention",
    "WindowAttention",
    "WindowAttentionV2",
    "multi_scale_deformable_attn",
]
