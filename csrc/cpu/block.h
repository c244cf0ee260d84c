// Blocks of 64 elements: loads, stores and sums in fixed lanes, for the units that are compiled once per
// instruction set.
#pragma once

#include "kernels.h"
#include "lanes.h"

namespace EDITR2_NS {

using L = SimdLanes;
using F = L::F;
using H = L::H;
using I = L::I;
using U = L::U;

constexpr int W = L::W;
constexpr int kBlock = 64;                     // elements an inner iteration covers
constexpr int kVectors = kBlock / W;           // vectors in a block
constexpr int kSums = editr2::kSumLanes / W;   // vectors of running sums

EDITR2_HD int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }
EDITR2_HD int64_t size_of(int dtype) { return dtype == editr2::kFloat32 ? 4 : 2; }

struct Range {  // elements of a sample that a tile covers
  int64_t begin, end;
};
EDITR2_HD Range range_of(const editr2::Tiling& t, int64_t tile) {
  const int64_t span = tile / t.tiles_per_span, part = tile % t.tiles_per_span;
  const int64_t begin = span * t.span + part * editr2::kTile;
  return {begin, at_most(begin + editr2::kTile, at_most((span + 1) * t.span, t.n))};
}

// The elements of one tile in one tensor; null where the tensor is absent.
struct Source {
  const unsigned char* data;
  int dtype;
  EDITR2_HD Source(const editr2::Input& in, int64_t b, int64_t begin)
      : data(static_cast<const unsigned char*>(in.data)), dtype(in.dtype) {
    if (data != nullptr) data += (b * in.stride + begin) * size_of(dtype);
  }
  EDITR2_HD explicit Source(const float* values)
      : data(reinterpret_cast<const unsigned char*>(values)), dtype(editr2::kFloat32) {}
  EDITR2_HD explicit operator bool() const { return data != nullptr; }
};

struct Target {
  unsigned char* data;
  int dtype;
  EDITR2_HD Target(const editr2::Output& out, int64_t b, int64_t begin)
      : data(static_cast<unsigned char*>(out.data)), dtype(out.dtype) {
    if (data != nullptr) data += (b * out.stride + begin) * size_of(dtype);
  }
  EDITR2_HD explicit Target(float* values)
      : data(reinterpret_cast<unsigned char*>(values)), dtype(editr2::kFloat32) {}
  EDITR2_HD explicit operator bool() const { return data != nullptr; }
};

// Where a block is many vectors, copies of these at every use would only make the build slow.
#if defined(__AVX2__)
#define EDITR2_BLOCK EDITR2_HD
#else
#define EDITR2_BLOCK inline __attribute__((noinline))
#endif

EDITR2_BLOCK void load_block(const void* p, int dtype, F out[kVectors]) {
  if (dtype == editr2::kFloat32) {
    const float* f = static_cast<const float*>(p);
    for (int n = 0; n < kVectors; ++n) out[n] = L::load<F>(f + n * W);
  } else {
    const uint16_t* h = static_cast<const uint16_t*>(p);
    if (dtype == editr2::kBfloat16)
      for (int n = 0; n < kVectors; ++n) out[n] = L::from_bfloat16(L::load<H>(h + n * W));
    else
      for (int n = 0; n < kVectors; ++n) out[n] = L::from_float16(L::load<H>(h + n * W));
  }
}

// Stores values rounded to dtype and leaves the rounded values behind.
EDITR2_BLOCK void store_block(void* p, int dtype, F values[kVectors]) {
  if (dtype == editr2::kFloat32) {
    float* f = static_cast<float*>(p);
    for (int n = 0; n < kVectors; ++n) L::store(f + n * W, values[n]);
  } else {
    uint16_t* h = static_cast<uint16_t*>(p);
    if (dtype == editr2::kBfloat16) {
      for (int n = 0; n < kVectors; ++n) {
        const H rounded = L::to_bfloat16(values[n]);
        L::store(h + n * W, rounded);
        values[n] = L::from_bfloat16(rounded);
      }
    } else {
      for (int n = 0; n < kVectors; ++n) {
        const H rounded = L::to_float16(values[n]);
        L::store(h + n * W, rounded);
        values[n] = L::from_float16(rounded);
      }
    }
  }
}

inline __attribute__((noinline)) void load_part(const void* p, int dtype, int64_t valid, F out[kVectors]) {
  alignas(64) unsigned char padded[kBlock * 4] = {};
  __builtin_memcpy(padded, p, static_cast<size_t>(valid * size_of(dtype)));
  load_block(padded, dtype, out);
}
inline __attribute__((noinline)) void store_part(void* p, int dtype, int64_t valid, F values[kVectors]) {
  alignas(64) unsigned char padded[kBlock * 4];
  store_block(padded, dtype, values);
  __builtin_memcpy(p, padded, static_cast<size_t>(valid * size_of(dtype)));
}

// Elements i ... i + valid - 1 of the tile, zeros after them; nothing beyond them is read.
EDITR2_HD void load(const Source& from, int64_t i, int64_t valid, F out[kVectors]) {
  const unsigned char* p = from.data + i * size_of(from.dtype);
  if (valid == kBlock)
    load_block(p, from.dtype, out);
  else
    load_part(p, from.dtype, valid, out);
}

// Leaves the values as they were rounded.
EDITR2_HD void store(const Target& to, int64_t i, int64_t valid, F values[kVectors]) {
  unsigned char* p = to.data + i * size_of(to.dtype);
  if (valid == kBlock)
    store_block(p, to.dtype, values);
  else
    store_part(p, to.dtype, valid, values);
}

// body(i, valid) for each block of [begin, end): the whole ones with a constant `valid`, then the rest.
template <class Body>
EDITR2_HD void blocks(int64_t begin, int64_t end, const Body& body) {
  int64_t i = begin;
  for (; i + kBlock <= end; i += kBlock) body(i, kBlock);
  if (i < end) body(i, end - i);
}
#define EDITR2_INLINE __attribute__((always_inline))  // on the bodies: their sums then stay in registers

EDITR2_HD void store_zeros(const Target& to, int64_t count) {
  if (to) __builtin_memset(to.data, 0, static_cast<size_t>(count * size_of(to.dtype)));
}

// Running sums in kSumLanes lanes: element i of a block goes to lane i % kSumLanes.
struct Sums {
  F lanes[kSums];

  EDITR2_HD Sums() {
    for (int n = 0; n < kSums; ++n) lanes[n] = F{};
  }
  EDITR2_HD void add(const F values[kVectors], int64_t valid) {
    if (valid == kBlock) {
      for (int n = 0; n < kVectors; ++n) lanes[n % kSums] += values[n];
    } else {
      I index;
      for (int lane = 0; lane < W; ++lane) index[lane] = lane;
      for (int n = 0; n < kVectors; ++n) {
        const I inside = index + n * W < static_cast<int32_t>(valid);
        lanes[n % kSums] += (F)(inside & (I)values[n]);
      }
    }
  }
  EDITR2_HD void add_products(const F a[kVectors], const F b[kVectors], int64_t valid) {
    F products[kVectors];
    for (int n = 0; n < kVectors; ++n) products[n] = a[n] * b[n];
    add(products, valid);
  }
  EDITR2_HD double in_order() const {
    double sum = 0.0;
    for (int n = 0; n < kSums; ++n)
      for (int lane = 0; lane < W; ++lane) sum += static_cast<double>(lanes[n][lane]);
    return sum;
  }
  // Lanes i and i + 16 first, then 8, 4, 2, 1 apart: short enough to be taken for every row.
  EDITR2_HD float in_pairs() const {
    typedef float Four __attribute__((vector_size(16)));
    F folded[kSums];
    for (int n = 0; n < kSums; ++n) folded[n] = lanes[n];
    for (int apart = kSums / 2; apart >= 1; apart /= 2)
      for (int n = 0; n < apart; ++n) folded[n] = folded[n] + folded[n + apart];
    Four four[W / 4];
    __builtin_memcpy(four, folded, sizeof four);
    for (int apart = W / 8; apart >= 1; apart /= 2)
      for (int n = 0; n < apart; ++n) four[n] = four[n] + four[n + apart];
    return (four[0][0] + four[0][2]) + (four[0][1] + four[0][3]);
  }
};

}  // namespace EDITR2_NS
