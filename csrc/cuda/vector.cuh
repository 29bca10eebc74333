// Eight neighbouring columns of a row: two 16-byte accesses in fp32, one in half precision.
#pragma once

#include "../dtype.h"

namespace vittle::cuda {

constexpr int kVector = 8;

// As they are stored; to be converted where they are used, so that loads in flight hold few registers.
template <typename T>
union Vector {
  uint4 access[kVector * sizeof(T) / sizeof(uint4)];
  uint32_t word[kVector * sizeof(T) / sizeof(uint32_t)];
  T element[kVector];
};

// Columns [column, column + 8) of row. Aligned: all exist and the row starts on 16 bytes. Else those from width on
// read as 0.
template <bool kAligned, typename T>
__device__ __forceinline__ Vector<T> load(const T* row, int column, int width) {
  Vector<T> vector;
  if constexpr (kAligned) {
    const uint4* accesses = reinterpret_cast<const uint4*>(row + column);
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(vector) / sizeof(uint4)); ++i) vector.access[i] = __ldg(accesses + i);
  } else {
#pragma unroll
    for (int j = 0; j < kVector; ++j) vector.element[j] = column + j < width ? row[column + j] : T{};
  }
  return vector;
}

template <typename T>
__device__ __forceinline__ void unpack(const Vector<T>& vector, float (&value)[kVector]) {
#pragma unroll
  for (int j = 0; j < kVector; ++j) value[j] = to_float(vector.element[j]);
}

// By the word: one instruction a value, where taking a word's upper element apart first costs another.
__device__ __forceinline__ void unpack(const Vector<BFloat16>& vector, float (&value)[kVector]) {
#pragma unroll
  for (int j = 0; j < kVector; j += 2) {
    value[j] = as_float(vector.word[j / 2] << 16);
    value[j + 1] = as_float(vector.word[j / 2] & 0xffff0000u);
  }
}

template <bool kAligned, typename T>
__device__ __forceinline__ void store(T* row, int column, int width, const float (&value)[kVector]) {
  Vector<T> vector;
#pragma unroll
  for (int j = 0; j < kVector; ++j) from_float(value[j], vector.element[j]);
  if constexpr (kAligned) {
    uint4* accesses = reinterpret_cast<uint4*>(row + column);
#pragma unroll  // __stwb, because the compiler splits plain stores of 16 bytes now and then
    for (int i = 0; i < static_cast<int>(sizeof(vector) / sizeof(uint4)); ++i) __stwb(accesses + i, vector.access[i]);
  } else {
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      if (column + j < width) row[column + j] = vector.element[j];
    }
  }
}

}  // namespace vittle::cuda
