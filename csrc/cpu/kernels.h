// The table of kernels that every instruction-set unit fills, and the choice among the units.
#pragma once
#include "attention.h"
#include "bipartite_match.h"
#include "chain_sum.h"
#include "channel_attention.h"
#include "cluster_kmeans.h"
#include "cluster_tokens.h"
#include "deformable_attention.h"
#include "depthwise_value.h"
#include "feature_rows.h"
#include "grid_sum.h"
#include "linear_attention.h"
#include "mask_from_logits.h"
#include "merge_tokens.h"
#include "neighborhood_attention.h"
#include "soft_merge.h"
#include "reconstruct_tokens.h"
#include "sampled_window_attention.h"
#include "selective_scan.h"
#include "window_attention.h"

namespace vitkern {

struct Kernels {
  const char* name;
  int32_t lanes;  // floats of a vector; doubles have half as many
  WindowKernels window_f32, window_f64;
  AttentionKernels attention_f32, attention_f64;
  LinearKernels linear_f32, linear_f64;
  ChannelKernels channel_f32, channel_f64;
  MatchKernels match_f32, match_f64;
  MergeKernels merge_f32, merge_f64;
  SoftMergeKernels soft_f32, soft_f64;
  ClusterKernels cluster_f32, cluster_f64;
  KmeansKernels kmeans_f32, kmeans_f64;
  ReconstructKernels reconstruct_f32, reconstruct_f64;
  void (*exp_f32)(const float* x, float* y, int64_t n);     // n a multiple of lanes
  void (*exp_f64)(const double* x, double* y, int64_t n);
  void (*log_f32)(const float* x, float* y, int64_t n);
  void (*log_f64)(const double* x, double* y, int64_t n);
  // c [rows][columns] = a [rows][depth] b [depth][columns], columns a multiple of lanes: the ceiling that benchmarks measure
  void (*gemm_f32)(const float* a, const float* b, float* c, int32_t rows, int32_t columns, int32_t depth);
  ScanKernels scan_f32, scan_f64;
  FeatureRowsKernels rows_f32, rows_f64;
  ChainKernels chain_f32, chain_f64;
  GridKernels grid_f32, grid_f64;
  DeformKernels deform_f32, deform_f64;
  NearKernels near_f32, near_f64;
  SampledKernels sampled_f32, sampled_f64;
  DepthwiseKernels depthwise_f32, depthwise_f64;
  ResizeKernels resize_f32, resize_f64;
};

extern const Kernels kernels_baseline, kernels_avx2, kernels_avx512, kernels_avx512_bf16;

// The unit in use: the best the machine has, or the one that VITKERN_CPU_CAPABILITY or set_capability names.
const Kernels& kernels();

}  // namespace vitkern
