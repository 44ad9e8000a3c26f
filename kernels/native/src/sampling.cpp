// The draw of a row's next token, the stop test and the advance, as `sample` and `sample_and_advance` of
// kernels/reference.py define them: the same tokens for the same random number.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "op.hpp"

namespace fastllama {
namespace {

constexpr double MIN_TEMPERATURE = 1e-38, MAX_TEMPERATURE = 1e37;  // as in kernels/batch.py

struct Statistics {
  float max = -std::numeric_limits<float>::infinity();
  int64_t first = 0;  // the lowest id of the largest logit
  double sum = 0;     // Σ exp(x - max)
  bool is_distribution = true;
};

Statistics merged(const Op& op, int64_t row) {
  const int64_t blocks = op.groups;
  const float* parts = op.partial + row * blocks * 4;
  Statistics all;
  for (int64_t block = 0; block < blocks; block++) {
    const float* part = parts + block * 4;
    if (part[3] != 0) all.is_distribution = false;
    if (part[0] > all.max) {
      int32_t first;
      std::memcpy(&first, part + 1, sizeof first);
      all.max = part[0], all.first = first;
    }
  }
  if (!std::isfinite(all.max)) all.is_distribution = false;
  if (!all.is_distribution) return all;
  for (int64_t block = 0; block < blocks; block++)
    all.sum += parts[block * 4 + 2] * std::exp(double(parts[block * 4]) - all.max);
  return all;
}

// Philox4x32-10, as in kernels/sampling/philox.py: a number in [0, 1), a multiple of 2^-24.
double uniform(uint64_t seed, uint64_t stream, uint64_t call, uint64_t position) {
  uint64_t c0 = position, c1 = stream, c2 = call, c3 = 0;
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  for (int round = 0; round < 10; round++) {
    const uint64_t p0 = c0 * 0xD2511F53u, p1 = c2 * 0xCD9E8D57u;
    c0 = (uint32_t(p1 >> 32)) ^ c1 ^ k0;
    c1 = uint32_t(p1);
    c2 = (uint32_t(p0 >> 32)) ^ c3 ^ k1;
    c3 = uint32_t(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return double(uint32_t(c0) >> 8) * 0x1p-24;
}

struct Last {  // kept token: top-p keeps all before it in the order of descending logits, the lowest ids first
  float x;
  int64_t id;
};

// Selects as quickselect does, by mass: a part of the order is either before the last kept token or holds it.
Last last_kept(const float* x, const double* mass, int32_t* ids, int64_t count, double limit) {
  const auto before = [x](int32_t a, int32_t b) { return x[a] > x[b] || (x[a] == x[b] && a < b); };
  double passed = 0;
  int32_t kept = -1;
  for (int32_t *begin = ids, *end = ids + count; begin < end;) {
    int32_t* middle = begin + (end - begin) / 2;
    std::nth_element(begin, middle, end, before);
    double sum = passed;
    for (const int32_t* id = begin; id < middle; id++) sum += mass[*id];
    if (sum <= limit) {
      kept = *middle;
      passed = sum + mass[kept];
      begin = middle + 1;
    } else {
      end = middle;
    }
  }
  return {x[kept], kept};
}

int64_t draw(const Op& op, int64_t row, const Statistics& statistics, float* x, FillMasses fill_masses) {
  const int64_t vocab = op.vocab;
  double* mass = reinterpret_cast<double*>(x + ceil_div(vocab, 2) * 2);
  int32_t* ids = reinterpret_cast<int32_t*>(mass + vocab);
  const int64_t of = row / op.tokens_per_row;  // whose parameters these are
  const double inverse = 1 / std::min(std::max(op.temperature[of], MIN_TEMPERATURE), MAX_TEMPERATURE);
  const double total = fill_masses(op, row, statistics.max, inverse, x, mass);
  Last last{-std::numeric_limits<float>::infinity(), vocab};  // keeps all
  if (op.top_p[of] < 1) {
    const double limit = op.top_p[of] * total;
    // A token as small as this has more than `limit` before it: at most `vocab` tokens are no larger.
    const double smallest = (total - limit) / vocab * (1 - 1e-9);
    int64_t count = 0;
    for (int64_t id = 0; id < vocab; id++) {
      ids[count] = int32_t(id);
      count += mass[id] >= smallest;
    }
    last = last_kept(x, mass, ids, count, limit);
  } else {
    float lowest = std::numeric_limits<float>::infinity();
    for (int64_t id = 0; id < vocab; id++) lowest = std::min(lowest, x[id]);
    last.x = lowest;
  }
  double above = 0, tied = 0;
  for (int64_t id = 0; id < vocab; id++) {
    above += x[id] > last.x ? mass[id] : 0;
    tied += x[id] == last.x && id <= last.id ? mass[id] : 0;
  }
  const double number = uniform(op.seed[of], op.stream[of], op.call[of],
                                op.has_state ? op.state_positions[row] + 1 : op.positions[row]);
  const double target = number * (above + tied);
  const bool is_above = target < above;
  double running = is_above ? 0 : above;
  int64_t found = is_above ? statistics.first : last.id < vocab ? last.id : 0;  // where rounding leaves the sum short
  for (int64_t id = 0; id < vocab; id++) {
    const bool counts = is_above ? x[id] > last.x : x[id] == last.x && id <= last.id;
    if (!counts) continue;
    running += mass[id];
    if (running > target) return id;
  }
  return found;
}

void advance(const Op& op, int64_t row, int64_t token, float logprob) {
  const int64_t position = op.state_positions[row], following = position + 1;
  if (position < 0) return;
  const int64_t known = token < 0 ? 0 : token;
  const int64_t at = (following - op.starts[row]) % op.n_steps * op.out_stride + row;
  op.out_tokens[at] = token;
  op.out_logprobs[at] = logprob;
  op.state_tokens[row] = known;
  const bool ends = token == NO_TOKEN || op.is_stop[row * op.vocab + known] || following >= op.last[row];
  op.state_positions[row] = ends ? INACTIVE : following;
}

}  // namespace

void sample_row(const Op& op, int64_t row, Scratch& scratch, FillMasses fill_masses) {
  if (op.has_state && op.state_positions[row] < 0) return;
  const Statistics statistics = merged(op, row);
  int64_t token = NO_TOKEN;
  float logprob = std::numeric_limits<float>::quiet_NaN();
  if (statistics.is_distribution) {
    float chosen = statistics.max;
    token = statistics.first;
    if (op.temperature[row / op.tokens_per_row] != 0 && op.top_p[row / op.tokens_per_row] != 0) {
      float* x = scratch.results(4 * op.vocab + 2);
      token = draw(op, row, statistics, x, fill_masses);
      chosen = x[token];
    }
    logprob = float(double(chosen) - double(statistics.max) - std::log(statistics.sum));
  }
  if (op.has_state) return advance(op, row, token, logprob);
  static_cast<int64_t*>(op.out)[row] = token;
  op.logprobs[row] = logprob;
}

}  // namespace fastllama
