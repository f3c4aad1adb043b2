// The private torch ops of the CUDA kernels of deformable attention: tensors to parameters, checks, registration.
#include "deformable_attention.h"

#include "op.h"

namespace {

using namespace vitkern;

TokenType type_of(const Tensor& x) {
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half,
                  "vitkern: the CUDA kernels of deformable_attention take float32, bfloat16 and float16");
  return type == ScalarType::Float ? TokenType::float32
         : type == ScalarType::BFloat16 ? TokenType::bfloat16 : TokenType::float16;
}

// A tensor [B, rows, H, D] of the type of the others; `vector` stays where its rows hold whole words at their boundaries.
DeformableRows rows_of(const Tensor& x, int64_t rows, DeformableParams& p) {
  STD_TORCH_CHECK(x.dim() == 4 && x.size(0) == p.batch && x.size(1) == rows && x.size(2) == p.heads && x.size(3) == p.width &&
                      type_of(x) == p.type && (p.width == 1 || x.stride(3) == 1),
                  "vitkern: a tensor of rows must be [B, rows, H, D] with contiguous channels");
  const int64_t word = p.type == TokenType::float32 ? 4 : 8;
  const bool whole = p.width % word == 0 && x.stride(0) % word == 0 && x.stride(1) % word == 0 && x.stride(2) % word == 0 &&
                     reinterpret_cast<uintptr_t>(x.data_ptr()) % 16 == 0;
  p.vector = p.vector && whole;
  return {x.data_ptr(), x.stride(0), x.stride(1), x.stride(2)};
}

DeformablePlaces places_of(const Tensor& x) {
  return {x.data_ptr(), type_of(x), x.stride(0), x.stride(1), x.stride(2), x.stride(4), x.dim() == 6 ? x.stride(5) : 0};
}
DeformableGradient gradient_of(const MaybeTensor& x, int64_t count) {
  if (!x) return {nullptr, TokenType::float32};
  STD_TORCH_CHECK(x->is_contiguous() && x->numel() == count, "vitkern: a gradient must be contiguous and of the size of its tensor");
  return {x->data_ptr(), type_of(*x)};
}

// Sizes, places and levels; `like` is [B, *, H, D].
DeformableParams params_of(const Tensor& like, const Tensor& locations, const Tensor& weights, const Ints& shapes, const Ints& points,
                           bool nearest) {
  STD_TORCH_CHECK(like.dim() == 4 && locations.dim() == 6 && weights.dim() == 5 && locations.size(5) == 2,
                  "vitkern: value must be [B, S, H, D], locations [B, N, H, G, Q, 2] and weights [B, N, H, G, Q]");
  STD_TORCH_CHECK(points.size() >= 1 && points.size() <= kDeformableLevels && shapes.size() == 2 * points.size(), "vitkern: 1 to ",
                  kDeformableLevels, " levels");
  DeformableParams p{};
  p.type = type_of(like);
  p.batch = int32_t(like.size(0));
  p.heads = int32_t(like.size(2));
  p.width = int32_t(like.size(3));
  p.queries = int32_t(locations.size(1));
  p.locations = places_of(locations);
  p.weights = places_of(weights);
  p.nearest = nearest;
  p.vector = 1;
  p.levels = int32_t(points.size());
  const int64_t groups = locations.size(3);
  int64_t start = 0, before = 0;
  for (int l = 0; l < p.levels; ++l) {
    const int64_t height = shapes[size_t(2 * l)], width = shapes[size_t(2 * l + 1)], count = points[size_t(l)];
    STD_TORCH_CHECK(height >= 1 && width >= 1 && height < (1 << 24) && width < (1 << 24), "vitkern: a side of a level is out of range");
    p.level[l] = {int32_t(height), int32_t(width), int32_t(count), int32_t(before), start, p.padded,
                  groups > 1 ? l * locations.stride(3) : before * locations.stride(4),
                  groups > 1 ? l * weights.stride(3) : before * weights.stride(4)};
    start += height * width;
    p.padded += (height + 1) * (width + 1);
    before += count;
  }
  p.cells = int32_t(start);
  p.points = int32_t(before);
  STD_TORCH_CHECK(start < (int64_t(1) << 31) && before == groups * locations.size(4), "vitkern: the levels must have the points of locations");
  for (int a = 0; a < 5; ++a) STD_TORCH_CHECK(weights.size(a) == locations.size(a), "vitkern: weights must have the points of locations");
  STD_TORCH_CHECK(locations.size(0) == p.batch && locations.size(2) == p.heads, "vitkern: locations must have the batch and heads of value");
  return p;
}

void forward(Tensor value, Tensor locations, Tensor weights, Ints shapes, Ints points, bool nearest, Tensor out) {
  DeformableParams p = params_of(value, locations, weights, shapes, points, nearest);
  p.value = rows_of(value, p.cells, p);
  p.out = rows_of(out, p.queries, p);
  const DeviceStream device(value);
  deformable_forward(p, device.stream);
}

void places(Tensor dout, Tensor value, Tensor locations, Tensor weights, Ints shapes, Ints points, bool nearest, MaybeTensor dlocations,
            MaybeTensor dweights, MaybeTensor keys) {
  DeformableParams p = params_of(value, locations, weights, shapes, points, nearest);
  const int64_t count = int64_t(p.batch) * p.queries * p.heads * p.points;
  p.value = rows_of(value, p.cells, p);
  p.dout = rows_of(dout, p.queries, p);
  p.dlocations = gradient_of(dlocations, 2 * count);
  p.dweights = gradient_of(dweights, count);
  p.keys = plain<int64_t>(keys, ScalarType::Long, count, "keys");
  const DeviceStream device(value);
  deformable_places(p, device.stream);
}

void cells(Tensor dout, Tensor locations, Tensor weights, Tensor order, Tensor begin, Ints shapes, Ints points, bool nearest,
           Tensor dvalue) {
  DeformableParams p = params_of(dvalue, locations, weights, shapes, points, nearest);
  p.dout = rows_of(dout, p.queries, p);
  p.dvalue = rows_of(dvalue, p.cells, p);
  p.order = plain<const int64_t>(order, ScalarType::Long, int64_t(p.batch) * p.queries * p.heads * p.points, "order");
  p.begin = plain<const int64_t>(begin, ScalarType::Long, int64_t(p.batch) * p.heads * p.padded + 1, "begin");
  const DeviceStream device(dvalue);
  deformable_cells(p, device.stream);
}

}  // namespace

VITKERN_REGISTER(CUDA, m) {
  m.impl("_deformable_attention_cuda", TORCH_BOX(&forward));
  m.impl("_deformable_attention_cuda_places", TORCH_BOX(&places));
  m.impl("_deformable_attention_cuda_cells", TORCH_BOX(&cells));
}
