// Weights in fewer bits to the model dtype. Included by kernels.hpp.

// q of all columns of a row.
static void widen_values(const Op& op, int64_t row, float* q) {
  const uint8_t* values = static_cast<const uint8_t*>(op.weight) + row * row_bytes(op);
  switch (op.format) {
    case INT8: return widen_row(reinterpret_cast<const int8*>(values), q, op.width);
    case FP8: return widen_row(reinterpret_cast<const float8*>(values), q, op.width);
  }
  for (int64_t i = 0; i < op.width / 2; i++) {
    q[2 * i] = values[i] & 15;
    q[2 * i + 1] = values[i] >> 4;
  }
}

template <class T> static void dequantize_chunk(const Op& op, int64_t chunk, Scratch& scratch) {
  const int64_t size = chunk_outputs(op), group_size = op.width / op.n_scales;
  float* scales = scratch.results(2 * scales_of_tile(op, 1) + padded(op.width));
  float* offsets = scales + scales_of_tile(op, 1);
  float* q = offsets + scales_of_tile(op, 1);
  for (int64_t row = chunk * size; row < (chunk + 1) * size && row < op.outputs; row++) {
    widen_scales(op, op.format == FP8 ? UNIT<float8> : 1, row, 1, scales, offsets);
    widen_values(op, row, q);
    T* out = static_cast<T*>(op.out) + row * op.width;
    for (int64_t group = 0; group < op.n_scales; group++) {
      const V scale = splat(scales[group]), offset = splat(op.offsets == nullptr ? 0 : offsets[group]);
      const int64_t begin = group * group_size;
      for (int64_t i = 0; i < group_size; i += LANES)
        store_up_to(out + begin + i, multiply_add(load(q + begin + i), scale, offset), group_size - i);
    }
  }
}
