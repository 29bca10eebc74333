// What crosses the boundary between the bindings and the kernels: plain pointers, sizes, strides in elements.
#pragma once

#include "dtype.h"

namespace vittle {

// Rows of a tensor whose leading dimensions collapse to at most two levels, as those of hidden[:, a:b] do.
// Each row is contiguous.
struct Rows {
  void* data;
  int64_t inner, outer_stride, inner_stride;  // row r starts at (r / inner) outer_stride + (r % inner) inner_stride
};

VITTLE_FN int64_t row_offset(const Rows& rows, int64_t row) {
  if (row < rows.inner) return row * rows.inner_stride;  // no division where there is one level
  return (row / rows.inner) * rows.outer_stride + (row % rows.inner) * rows.inner_stride;
}

struct Problem {
  int64_t tokens, width;   // N and D
  float bound;             // on |log-variance|; infinity where there is none
  const float* alpha;      // 1
  const int64_t* seed;     // 1
  const int64_t* rows;     // (N) token of each posterior row; null: its own index
  const float* prior;      // (groups, 2 D) mean then log-variance; null: N(0, I)
  const int32_t* offsets;  // (groups) end of each group of posterior rows; null: one group
  int64_t groups;
  DType hidden_type, posterior_type;
  Rows posterior;  // (N, 2 D)
};

struct Forward : Problem {
  Rows hidden;  // (N, D)
  void* out;    // (N, D) of hidden_type
  float* kl;    // (N)
};

struct Backward : Problem {
  Rows grad_out;         // (N, D) of hidden_type
  const float* grad_kl;  // (N)
  void* grad_hidden;     // (N, D) of hidden_type; null: not wanted
  void* grad_posterior;  // (N, 2 D) of posterior_type
  float* partials;       // (max_row_blocks, 2 D), scratch; with a prior
  float* grad_prior;     // (groups, 2 D); with a prior
};

VITTLE_FN int64_t token_of(const Problem& p, int64_t i) { return p.rows ? p.rows[i] : i; }

VITTLE_FN int64_t group_of(const Problem& p, int64_t i) {
  int64_t group = 0;
  while (group + 1 < p.groups && i >= p.offsets[group]) ++group;
  return group;
}

// The prior's gradient sums fixed blocks of rows, each within one group, then a group's blocks in their order:
// the same bits for any number of threads and any grid.
constexpr int64_t kRowsPerBlock = 32;

VITTLE_FN int64_t max_row_blocks(const Problem& p) { return p.tokens / kRowsPerBlock + p.groups; }

struct GroupRows {
  int64_t begin, end;              // posterior rows
  int64_t first_block, end_block;  // the blocks they are cut into
};

// The group after `last`. Offsets on a device are not read before the launch: whatever they hold, no row outside [0, N)
// is touched.
VITTLE_FN GroupRows next_group(const Problem& p, const GroupRows& last, int64_t group) {
  const int64_t begin = last.end, first_block = last.end_block;
  const int64_t offset = group + 1 < p.groups ? p.offsets[group] : p.tokens;
  const int64_t end = offset < begin ? begin : (offset > p.tokens ? p.tokens : offset);
  return {begin, end, first_block, first_block + (end - begin + kRowsPerBlock - 1) / kRowsPerBlock};
}

VITTLE_FN GroupRows group_rows(const Problem& p, int64_t group) {
  GroupRows rows = {0, 0, 0, 0};
  for (int64_t g = 0; g <= group; ++g) rows = next_group(p, rows, g);
  return rows;
}

struct RowBlock {
  int64_t group, begin, end;  // posterior rows; none where begin == end
};

VITTLE_FN RowBlock row_block(const Problem& p, int64_t block) {
  GroupRows rows = {0, 0, 0, 0};
  for (int64_t group = 0; group < p.groups; ++group) {
    rows = next_group(p, rows, group);
    if (block >= rows.end_block) continue;
    const int64_t begin = rows.begin + (block - rows.first_block) * kRowsPerBlock;
    return {group, begin, begin + kRowsPerBlock < rows.end ? begin + kRowsPerBlock : rows.end};
  }
  return {0, 0, 0};
}

}  // namespace vittle
