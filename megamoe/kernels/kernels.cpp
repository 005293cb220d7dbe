// The element-wise work of mixture and attention on a CPU, each in one pass where torch needs several.
//
// Numbers are fp32 or bf16 in memory and fp32 in between. The Python functions that call these compute the
// same with torch where these are not in use. Rows are the last dimension, and contiguous. Shapes are those
// of megamoe/moe/mixture.py (N, n, D, F) and megamoe/models/attention_core.py (G, N, J).

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <type_traits>
#include <vector>

namespace {

using at::Tensor;

constexpr int64_t kNumbersPerTask = 1 << 14;
constexpr int64_t kLanes = 4;  // units that one 64-bit word decides on

template <typename F>
void for_number_type(const Tensor& x, F&& body) {
  TORCH_CHECK(x.device().is_cpu() && x.stride(-1) == 1, "compiled kernels want contiguous rows on a CPU");
  if (x.scalar_type() == at::kFloat) {
    body(float{});
  } else {
    TORCH_CHECK(x.scalar_type() == at::kBFloat16, "compiled kernels know fp32 and bf16 only");
    body(at::BFloat16{});
  }
}

// Calls body(begin, end) for parts of `n` things that take `numbers_each`, on several threads.
template <typename F>
void share_out(int64_t n, int64_t numbers_each, F&& body) {
  at::parallel_for(0, n, std::max<int64_t>(1, kNumbersPerTask / std::max<int64_t>(1, numbers_each)), body);
}

float sum_of_products(const float* x, const float* y, int64_t n) {
  return at::vec::map2_reduce_all<float>(
      [](auto a, auto b) { return a * b; }, [](auto a, auto b) { return a + b; }, x, y, n);
}

// A row in fp32: itself, or a copy of it.
template <typename T>
const float* as_floats(const T* row, float* copy, int64_t n) {
  if constexpr (std::is_same_v<T, float>) {
    return row;
  } else {
    at::vec::convert(row, copy, n);
    return copy;
  }
}

template <typename T>
void store(const float* from, T* to, int64_t n) {
  at::vec::convert(from, to, n);
}

template <typename T>
T* row_of(const Tensor& x, int64_t row) {
  return x.mutable_data_ptr<T>() + row * x.stride(-2);
}

// Row i of matrix g of a tensor of matrices with any strides.
template <typename T>
T* row_of(const Tensor& x, int64_t matrix, int64_t row) {
  return x.mutable_data_ptr<T>() + matrix * x.stride(0) + row * x.stride(1);
}

// Which units of a row are kept, from SplitMix64: randomness.draw and dropout.keep_mask in Python.
class Lottery {
 public:
  Lottery(int64_t width, int64_t dropped_levels)
      : width_(width), words_(width / kLanes + 1), least_(static_cast<int16_t>(dropped_levels - (1 << 15))) {}

  // Writes `kept` or `dropped` for each unit of the row that has this key.
  template <typename T>
  void draw(int64_t key, T kept, T dropped, T* units) {
    const uint64_t seed = static_cast<uint64_t>(key);
    uint64_t* words = words_.data();
    const int64_t n_words = words_.size();
    for (int64_t i = 0; i < n_words; ++i) {
      uint64_t x = seed + static_cast<uint64_t>(i + 1) * 0x9E3779B97F4A7C15ULL;
      x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ULL;
      x = (x ^ (x >> 27)) * 0x94D049BB133111EBULL;
      words[i] = x ^ (x >> 31);
    }
    const int16_t* numbers = reinterpret_cast<const int16_t*>(words);
    const int16_t least = least_;
    for (int64_t u = 0; u < width_; ++u) units[u] = numbers[u] >= least ? kept : dropped;
  }

 private:
  int64_t width_;
  std::vector<uint64_t> words_;
  int16_t least_;
};

Tensor keep_mask(const Tensor& keys_N, int64_t width, int64_t dropped_levels) {
  Tensor keep_NU = at::empty({keys_N.numel(), width}, keys_N.options().dtype(at::kBool));
  const int64_t* keys = keys_N.const_data_ptr<int64_t>();
  share_out(keys_N.numel(), width, [&](int64_t begin, int64_t end) {
    Lottery lottery(width, dropped_levels);
    for (int64_t n = begin; n < end; ++n) {
      lottery.draw(keys[n], true, false, keep_NU.mutable_data_ptr<bool>() + n * width);
    }
  });
  return keep_NU;
}

// relu, then dropout of the rows that have keys.
void relu_drop_(const Tensor& x_NF, const Tensor& keys_n, int64_t dropped_levels, double gain) {
  const int64_t n_rows = x_NF.size(0), width = x_NF.size(1), n_keys = keys_n.numel();
  const int64_t* keys = keys_n.const_data_ptr<int64_t>();
  const float factor = static_cast<float>(gain);
  for_number_type(x_NF, [&](auto number) {
    using T = decltype(number);
    share_out(n_rows, width, [&](int64_t begin, int64_t end) {
      Lottery lottery(width, dropped_levels);
      std::vector<float> copy(width), result(width), gains(width);
      for (int64_t n = begin; n < end; ++n) {
        T* row = row_of<T>(x_NF, n);
        const float* x = as_floats(row, copy.data(), width);
        float *y = result.data(), *g = gains.data();
        for (int64_t f = 0; f < width; ++f) y[f] = x[f] > 0 ? x[f] : 0.0f;
        if (n < n_keys) {
          lottery.draw(keys[n], factor, 0.0f, g);
          for (int64_t f = 0; f < width; ++f) y[f] *= g[f];
        }
        store(y, row, width);
      }
    });
  });
}

// y[token_n] += weight_n * x_n. A token may stand there more than once, therefore columns are shared out.
void add_weighted_rows_(const Tensor& y_ND, const Tensor& token_n, const Tensor& x_nD,
                        const std::optional<Tensor>& weight_n) {
  const int64_t n_rows = token_n.numel();
  const int64_t* token = token_n.const_data_ptr<int64_t>();
  const float* weight = weight_n ? weight_n->const_data_ptr<float>() : nullptr;
  for_number_type(x_nD, [&](auto number) {
    using T = decltype(number);
    share_out(y_ND.size(1), n_rows, [&](int64_t begin, int64_t end) {
      const int64_t width = end - begin;
      std::vector<float> copy(width);
      for (int64_t n = 0; n < n_rows; ++n) {
        const float* x = as_floats(row_of<T>(x_nD, n) + begin, copy.data(), width);
        float* y = row_of<float>(y_ND, token[n]) + begin;
        const float w = weight ? weight[n] : 1.0f;
        for (int64_t d = 0; d < width; ++d) y[d] += w * x[d];
      }
    });
  });
}

// Returns sum_f d h for the rows that have weights; d becomes weight * gain * d where h > 0, else 0.
Tensor hidden_backward_(const Tensor& d_NF, const Tensor& h_NF, const Tensor& weight_n, double gain) {
  const int64_t n_rows = d_NF.size(0), width = d_NF.size(1), n_weights = weight_n.numel();
  Tensor dots_n = at::empty({n_weights}, weight_n.options());
  const float* weight = weight_n.const_data_ptr<float>();
  float* dots = dots_n.mutable_data_ptr<float>();
  for_number_type(d_NF, [&](auto number) {
    using T = decltype(number);
    share_out(n_rows, width, [&](int64_t begin, int64_t end) {
      std::vector<float> copy_d(width), copy_h(width), result(width);
      for (int64_t n = begin; n < end; ++n) {
        T* row = row_of<T>(d_NF, n);
        const float* d = as_floats(row, copy_d.data(), width);
        const float* h = as_floats(row_of<T>(h_NF, n), copy_h.data(), width);
        const float factor = n < n_weights ? weight[n] * static_cast<float>(gain) : 0.0f;
        float* out = result.data();
        for (int64_t f = 0; f < width; ++f) out[f] = h[f] > 0 ? factor * d[f] : 0.0f;
        if (n < n_weights) dots[n] = sum_of_products(d, h, width);
        store(out, row, width);
      }
    });
  });
  return dots_n;
}

// Scores become max(e, 0): e is the softmax over the keys that a query may see, negative where it is dropped.
// Of J keys the last query sees all, the one before it all but the last, and so on.
void softmax_drop_(const Tensor& scores_GNJ, const Tensor& shifted_GNJ, const std::optional<Tensor>& keys_GN,
                   int64_t dropped_levels, const std::optional<Tensor>& kept_GNJ) {
  const int64_t n_queries = scores_GNJ.size(1), width = scores_GNJ.size(2);
  for_number_type(scores_GNJ, [&](auto number) {
    using T = decltype(number);
    share_out(scores_GNJ.size(0) * n_queries, width, [&](int64_t begin, int64_t end) {
      using Vec = at::vec::Vectorized<float>;
      Lottery lottery(width, dropped_levels);
      std::vector<float> copy_s(width), copy_b(width), probabilities(width), signs(width);
      float* p = probabilities.data();
      for (int64_t row = begin; row < end; ++row) {
        const int64_t g = row / n_queries, i = row % n_queries, seen = width - n_queries + i + 1;
        T* scores = row_of<T>(scores_GNJ, g, i);
        const float* s = as_floats(scores, copy_s.data(), seen);
        const float* b = as_floats(row_of<T>(shifted_GNJ, g, i), copy_b.data(), seen);
        float highest = -std::numeric_limits<float>::infinity();
#pragma omp simd reduction(max : highest)
        for (int64_t j = 0; j < seen; ++j) {
          p[j] = s[j] + b[j];
          highest = p[j] > highest ? p[j] : highest;
        }
        at::vec::map<float>([highest](Vec x) { return (x - Vec(highest)).exp_u20(); }, p, p, seen);
        const float scale = 1.0f / at::vec::reduce_all<float>([](auto x, auto y) { return x + y; }, p, seen);
        for (int64_t j = 0; j < seen; ++j) p[j] *= scale;
        for (int64_t j = seen; j < width; ++j) p[j] = 0.0f;
        if (keys_GN) {
          lottery.draw(keys_GN->const_data_ptr<int64_t>()[row], 1.0f, -1.0f, signs.data());
          for (int64_t j = 0; j < width; ++j) p[j] *= signs[j];
        }
        if (kept_GNJ) store(p, row_of<T>(*kept_GNJ, g, i), width);
        for (int64_t j = 0; j < width; ++j) p[j] = p[j] > 0 ? p[j] : 0.0f;
        store(p, scores, width);
      }
    });
  });
}

// dp becomes ds, which is also written to `shifted`; max(e, 0) is written to `positive` where that is given.
void softmax_drop_backward_(const Tensor& dp_GNJ, const Tensor& e_GNJ, const Tensor& shifted_GNJ,
                            const std::optional<Tensor>& positive_GNJ) {
  const int64_t n_queries = dp_GNJ.size(1), width = dp_GNJ.size(2);
  for_number_type(dp_GNJ, [&](auto number) {
    using T = decltype(number);
    share_out(dp_GNJ.size(0) * n_queries, width, [&](int64_t begin, int64_t end) {
      std::vector<float> copy_d(width), copy_e(width), positive(width), result(width);
      for (int64_t row = begin; row < end; ++row) {
        const int64_t g = row / n_queries, i = row % n_queries;
        T* gradients = row_of<T>(dp_GNJ, g, i);
        const float* d = as_floats(gradients, copy_d.data(), width);
        const float* e = as_floats(row_of<T>(e_GNJ, g, i), copy_e.data(), width);
        float *kept = positive.data(), *ds = result.data();
        for (int64_t j = 0; j < width; ++j) kept[j] = e[j] > 0 ? e[j] : 0.0f;
        const float mean = sum_of_products(kept, d, width);
        for (int64_t j = 0; j < width; ++j) ds[j] = kept[j] * d[j] - std::abs(e[j]) * mean;
        store(ds, gradients, width);
        store(ds, row_of<T>(shifted_GNJ, g, i), width);
        if (positive_GNJ) store(kept, row_of<T>(*positive_GNJ, g, i), width);
      }
    });
  });
}

}  // namespace

TORCH_LIBRARY(megamoe, library) {
  library.def("keep_mask(Tensor keys_N, int width, int dropped_levels) -> Tensor", &keep_mask);
  library.def(
      "relu_drop_(Tensor(a!) x_NF, Tensor keys_n, int dropped_levels, float gain) -> ()", &relu_drop_);
  library.def(
      "add_weighted_rows_(Tensor(a!) y_ND, Tensor token_n, Tensor x_nD, Tensor? weight_n) -> ()",
      &add_weighted_rows_);
  library.def(
      "hidden_backward_(Tensor(a!) d_NF, Tensor h_NF, Tensor weight_n, float gain) -> Tensor",
      &hidden_backward_);
  library.def(
      "softmax_drop_(Tensor(a!) scores_GNJ, Tensor shifted_GNJ, Tensor? keys_GN, int dropped_levels,"
      " Tensor(b!)? kept_GNJ) -> ()",
      &softmax_drop_);
  library.def(
      "softmax_drop_backward_(Tensor(a!) dp_GNJ, Tensor e_GNJ, Tensor(b!) shifted_GNJ,"
      " Tensor(c!)? positive_GNJ) -> ()",
      &softmax_drop_backward_);
}
