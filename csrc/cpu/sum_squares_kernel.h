// Sum of squares of one contiguous piece. Included once per instruction set, inside that ISA's namespace.

// In float64: a bf16 or fp32 value squared may leave fp32's range, and 1e9 terms would lose four digits there. The loop
// waits for memory either way.
template <class T>
double sum_squares(const void* data, std::int64_t n) {
  const T* p = static_cast<const T*>(data);
  Squares s[4];  // independent, or the additions' latency shows
  for (Squares& x : s) x = no_squares();
  std::int64_t i = 0;
  for (; i + 4 * kWidth <= n; i += 4 * kWidth) {
    __builtin_prefetch(reinterpret_cast<const char*>(p + i) + 2048);
    for (int u = 0; u < 4; ++u) s[u] = add_squares(s[u], load(p + i + u * kWidth));
  }
  for (; i + kWidth <= n; i += kWidth) s[0] = add_squares(s[0], load(p + i));
  if (i < n) s[0] = add_squares(s[0], load_n(p + i, n - i));
  return (reduce_add(s[0]) + reduce_add(s[1])) + (reduce_add(s[2]) + reduce_add(s[3]));
}
