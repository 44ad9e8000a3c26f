// The embedding's rows. Included by kernels.hpp.

template <class T> static void embed(const Op& op, int64_t n) {
  const int64_t begin = op.begin < 0 ? 0 : op.begin, id = op.tokens[n] - begin;
  const int64_t inside = id < 0 ? 0 : id >= op.vocab ? op.vocab - 1 : id;
  T* out = static_cast<T*>(op.out) + n * op.width;
  const T* row = static_cast<const T*>(op.x) + inside * op.width;
  if (op.begin >= 0 && inside != id) __builtin_memset(out, 0, op.width * sizeof(T));
  else __builtin_memcpy(out, row, op.width * sizeof(T));
}
