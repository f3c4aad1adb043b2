// merge_plan: one block per sample decides who merges, numbers the slots and lists their tokens, in one launch.
//
// The r best scores by radix select over order-preserving bits, eight at a time; ties go to the smaller position by a
// scan. The order of the slots is a scan of the three groups. Tokens of a slot are listed by position: a merged token's
// place is the number of earlier ones with its slot, counted in a shared list. Counters are integers, so their atomic
// sums are the same in every run.
#include <math.h>

#include "tokens.cuh"

namespace vitkern {
namespace {

constexpr int kThreads = 512, kWarps = kThreads / 32, kBins = 256;
constexpr int kMerged = 4, kNone = 3;  // beside the groups 0, 1, 2: what `token_map` holds until the slots are known

struct PlanShared {
  uint32_t warps[kWarps], bins[kBins];
  uint32_t bin, need;
};  // the slots of merged tokens follow, in the order of positions

// Larger for larger scores, 1 or more; 0 for what cannot merge. -0 equals 0.
__device__ __forceinline__ uint32_t key_of(const PlanParams& p, int64_t at) {
  const float score = p.score[at];
  if (p.role[at] != kSource || !(fabsf(score) < INFINITY)) return 0;
  const uint32_t bits = __float_as_uint(score == 0.0f ? 0.0f : score);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ int group_of(const PlanParams& p, int role) {
  if (role == kMasked) return kNone;
  if (p.order == PlanOrder::position || role == kProtected) return 0;
  return role == kDestination ? 2 : 1;
}

// Sums over the block of x; all threads receive it.
__device__ __forceinline__ int block_sum(int x, PlanShared& s) {
  uint32_t before;
  return int(block_scan<kThreads>(uint32_t(x), s.warps, &before));
}

// How many tokens merge.
__device__ int count_merged(const PlanParams& p, int sample, PlanShared& s) {
  int eligible = 0, reach = 0, real = 0;
  for (int i = threadIdx.x; i < p.tokens; i += kThreads) {
    const int64_t at = int64_t(sample) * p.tokens + i;
    const bool can = key_of(p, at) != 0;
    eligible += can;
    reach += can && p.threshold != nullptr && p.score[at] >= p.threshold[sample];
    real += p.role[at] != kMasked;
  }
  eligible = block_sum(eligible, s);
  reach = block_sum(reach, s);
  real = block_sum(real, s);
  int count = min(eligible, p.most);
  if (p.r != nullptr) count = min(count, max(p.r[sample], 0));
  if (p.threshold != nullptr) count = min(count, reach);
  return min(max(count, real - p.slots), eligible);
}

// The key of the last of the `count` best, and how many tokens of exactly that key are among them.
__device__ void select(const PlanParams& p, int sample, int count, PlanShared& s, uint32_t& pivot, int& ties) {
  uint32_t known = 0, mask = 0;
  int need = count;
  for (int shift = 24; shift >= 0; shift -= 8) {
    for (int b = threadIdx.x; b < kBins; b += kThreads) s.bins[b] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < p.tokens; i += kThreads) {
      const uint32_t key = key_of(p, int64_t(sample) * p.tokens + i);
      if (key != 0 && (key & mask) == known) atomicAdd(&s.bins[key >> shift & 255], 1u);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      int bin = kBins - 1;
      while (bin > 0 && int(s.bins[bin]) < need) need -= int(s.bins[bin--]);
      s.bin = uint32_t(bin);
      s.need = uint32_t(need);
    }
    __syncthreads();
    known |= s.bin << shift;
    mask |= 255u << shift;
    need = int(s.need);
    __syncthreads();
  }
  pivot = known;
  ties = need;
}

// token_map <- what becomes of every token: its group, kMerged or kNone; counts the tokens of the groups.
__device__ void sort_into_groups(const PlanParams& p, int sample, int count, PlanShared& s, int (&groups)[3]) {
  uint32_t pivot = 0;
  int ties = 0;
  if (count > 0) select(p, sample, count, s, pivot, ties);
  uint32_t seen = 0;
  int mine[3] = {};
  for (int first = 0; first < p.tokens; first += kThreads) {
    const int i = first + int(threadIdx.x);
    const int64_t at = int64_t(sample) * p.tokens + i;
    const uint32_t key = i < p.tokens ? key_of(p, at) : 0;
    const bool tie = count > 0 && key != 0 && key == pivot;
    uint32_t before;
    const uint32_t here = block_scan<kThreads>(tie, s.warps, &before);
    if (i < p.tokens) {
      const bool merged = count > 0 && (key > pivot || (tie && int(seen + before) < ties));
      const int group = merged ? kMerged : group_of(p, p.role[at]);
      p.token_map[at] = group;
#pragma unroll
      for (int g = 0; g < 3; ++g) mine[g] += group == g;
    }
    seen += here;
  }
  for (int g = 0; g < 3; ++g) groups[g] = block_sum(mine[g], s);
}

// perm <- the slot of every kept token.
__device__ void number_slots(const PlanParams& p, int sample, const int (&groups)[3], PlanShared& s) {
  int next[3] = {0, groups[0], groups[0] + groups[1]};
  const int64_t start = int64_t(sample) * p.tokens;
  for (int first = 0; first < p.tokens; first += kThreads) {
    const int i = first + int(threadIdx.x);
    const int group = i < p.tokens ? p.token_map[start + i] : kNone;
    uint32_t before;
    const uint32_t here = block_scan<kThreads>(group < 3 ? 1u << 10 * group : 0u, s.warps, &before);
    if (i < p.tokens) p.perm[start + i] = group < 3 ? next[group] + int(before >> 10 * group & 1023) : p.slots;
#pragma unroll
    for (int g = 0; g < 3; ++g) next[g] += int(here >> 10 * g & 1023);
  }
  if (p.order != PlanOrder::score) return;
  // The second group by descending score, ties and tokens that cannot merge by position: the rank is a count.
  __syncthreads();
  for (int i = threadIdx.x; i < p.tokens; i += kThreads) {
    if (p.token_map[start + i] != 1) continue;
    const uint32_t key = key_of(p, start + i);
    int rank = 0;
    for (int j = 0; j < p.tokens; ++j) {
      if (p.token_map[start + j] != 1) continue;
      const uint32_t other = key_of(p, start + j);
      rank += other > key || (other == key && j < i);
    }
    p.perm[start + i] = groups[0] + rank;
  }
}

// token_map <- slots, -1 - slot for merged tokens; offsets <- their running sums.
__device__ void count_slots(const PlanParams& p, int sample, PlanShared& s) {
  const int64_t start = int64_t(sample) * p.tokens;
  int32_t* offsets = p.offsets + int64_t(sample) * (p.slots + 1);
  for (int o = threadIdx.x; o <= p.slots; o += kThreads) offsets[o] = 0;
  __syncthreads();
  for (int i = threadIdx.x; i < p.tokens; i += kThreads) {
    const int group = p.token_map[start + i];
    const int owner = group == kMerged ? min(max(p.dst[start + i], 0), p.tokens - 1) : i;
    const int slot = group == kNone ? p.slots : min(p.perm[start + owner], p.slots);
    p.token_map[start + i] = group == kMerged && slot < p.slots ? -1 - slot : slot;
    if (slot < p.slots) atomicAdd(&offsets[slot + 1], 1);
  }
  __syncthreads();
  int sum = 0;
  for (int first = 1; first <= p.slots; first += kThreads) {
    const int o = first + int(threadIdx.x);
    const uint32_t count = o <= p.slots ? uint32_t(offsets[o]) : 0u;
    uint32_t before;
    const uint32_t here = block_scan<kThreads>(count, s.warps, &before);
    if (o <= p.slots) offsets[o] = sum + int(before + count);
    sum += int(here);
  }
  __syncthreads();
}

// perm <- the tokens of every slot, the kept one first; token_map <- slots.
__device__ void list_tokens(const PlanParams& p, int sample, PlanShared& s, int32_t* slots) {
  const int64_t start = int64_t(sample) * p.tokens;
  const int32_t* offsets = p.offsets + int64_t(sample) * (p.slots + 1);
  int listed = 0, dropped = offsets[p.slots];
  for (int first = 0; first < p.tokens; first += kThreads) {
    const int i = first + int(threadIdx.x);
    const int code = i < p.tokens ? p.token_map[start + i] : 0;
    const bool merged = i < p.tokens && code < 0, drop = i < p.tokens && code == p.slots;
    uint32_t before;
    const uint32_t here = block_scan<kThreads>(uint32_t(merged) | uint32_t(drop) << 16, s.warps, &before);
    const int slot = merged ? -1 - code : code, entry = listed + int(before & 0xFFFF);
    if (merged) slots[entry] = slot;
    __syncthreads();
    if (i < p.tokens) {
      int place = 0;
      if (drop) {
        place = dropped + int(before >> 16);
      } else {
        place = offsets[slot];
        if (merged) {
          ++place;
          for (int e = 0; e < entry; ++e) place += slots[e] == slot;
        }
      }
      p.perm[start + place] = i;
      p.token_map[start + i] = slot;
    }
    listed += int(here & 0xFFFF);
    dropped += int(here >> 16);
  }
}

__global__ void __launch_bounds__(kThreads) plan_kernel(const PlanParams p) {
  PlanShared& s = *reinterpret_cast<PlanShared*>(dynamic_shared());
  const int sample = blockIdx.x;
  int groups[3];
  sort_into_groups(p, sample, count_merged(p, sample, s), s, groups);
  number_slots(p, sample, groups, s);
  __syncthreads();
  count_slots(p, sample, s);
  if (threadIdx.x == 0) p.lengths[sample] = groups[0] + groups[1] + groups[2];
  list_tokens(p, sample, s, reinterpret_cast<int32_t*>(dynamic_shared() + sizeof(PlanShared)));
}

}  // namespace

void token_plan(const PlanParams& p, void* stream) {
  const int shared = int(sizeof(PlanShared)) + 4 * p.tokens;
  launch("merge_plan", plan_kernel, p.batch, kThreads, shared, stream, p);
}

}  // namespace vitkern
