// Eight neighbouring columns of a row, as fp32: two 16-byte accesses in fp32, one in half precision.
#pragma once

#include "../dtype.h"

namespace vittle::cuda {

constexpr int kVector = 8;

template <typename T>
constexpr int kPerAccess = 16 / sizeof(T);

template <typename T>
union Access {
  uint4 packed;
  T element[kPerAccess<T>];
};

// Columns [column, column + 8) of row. Aligned: all exist and the row starts on 16 bytes. Else those from width on
// read as 0.
template <bool kAligned, typename T>
__device__ __forceinline__ void load(const T* row, int64_t column, int64_t width, float (&value)[kVector]) {
  if constexpr (kAligned) {
#pragma unroll
    for (int i = 0; i < kVector; i += kPerAccess<T>) {
      Access<T> access;
      access.packed = __ldg(reinterpret_cast<const uint4*>(row + column + i));
#pragma unroll
      for (int j = 0; j < kPerAccess<T>; ++j) value[i + j] = to_float(access.element[j]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kVector; ++i) value[i] = column + i < width ? to_float(row[column + i]) : 0.0f;
  }
}

template <bool kAligned, typename T>
__device__ __forceinline__ void store(T* row, int64_t column, int64_t width, const float (&value)[kVector]) {
  if constexpr (kAligned) {
#pragma unroll
    for (int i = 0; i < kVector; i += kPerAccess<T>) {
      Access<T> access;
#pragma unroll
      for (int j = 0; j < kPerAccess<T>; ++j) from_float(value[i + j], access.element[j]);
      *reinterpret_cast<uint4*>(row + column + i) = access.packed;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      if (column + i < width) from_float(value[i], row[column + i]);
    }
  }
}

}  // namespace vittle::cuda
