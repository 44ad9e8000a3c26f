// The ops of a step that checks guesses, as kernels/checking.py defines them: a row each.
#include <algorithm>

#include "op.hpp"

namespace fastllama {
namespace {

constexpr int64_t MAX_NGRAM = 3, DRAFTED = 4;  // as in kernels/guesses.py

void window_row(const Op& op, int64_t row) {
  const int64_t S = op.tokens_per_row, newest = op.state_positions[row];
  const int64_t *history = op.history + row * op.length, *guesses = op.guesses + row * op.max_guesses;
  int64_t* tokens = static_cast<int64_t*>(op.out) + row * S;
  for (int64_t i = 0; i < S; i++) {
    const int64_t ahead = op.begin + i, position = newest + ahead;
    int64_t token = NO_TOKEN;
    if (newest >= 0 && position >= 0 && position < op.last[row])
      token = ahead > 0 ? guesses[ahead - 1] : history[std::min(position, op.length - 1)];
    const bool live = token >= 0;
    tokens[i] = live ? token : 0;
    tokens[op.n_tokens + i] = live ? position : INACTIVE;
    tokens[2 * op.n_tokens + i] = (live ? position : INACTIVE) + 1;
    tokens[3 * op.n_tokens + i] = op.rows[row];
  }
}

int64_t place_of_step(const Op& op, int64_t row, int64_t step) {
  const int64_t at = step % op.n_steps;
  return (at < 0 ? at + op.n_steps : at) * op.out_stride + row;
}

void accept_row(const Op& op, int64_t row) {
  const int64_t S = op.tokens_per_row, begin = op.state_positions[row];
  const int64_t *drawn = op.tokens + row * S, *guesses = op.guesses + row * op.max_guesses;
  bool going = begin >= 0;
  for (int64_t i = 0; going && i < S; i++) {
    const int64_t token = drawn[i], known = token < 0 ? 0 : token, following = begin + i + 1;
    const int64_t at = place_of_step(op, row, following - op.starts[row]);
    op.out_tokens[at] = token;
    op.out_logprobs[at] = op.logprobs[row * S + i];
    op.history[row * op.length + std::min(following, op.length - 1)] = known;
    const bool is_stop = known < op.vocab && op.is_stop[row * op.vocab + known];
    const bool ends = token == NO_TOKEN || is_stop || following >= op.last[row];
    op.state_tokens[row] = known;
    op.state_positions[row] = ends ? INACTIVE : following;
    op.newest[row] = following;
    going = !ends && token == guesses[std::min(i, op.max_guesses - 1)];
  }
}

// The latest place before `newest` that ends with the longest n-gram: its position, or -1, and n.
struct Match {
  int64_t end, n;
};

Match latest_match(const int64_t* history, int64_t newest) {
  Match best = {-1, 0};
  for (int64_t place = newest - 1; place >= 0; place--) {
    if (history[place] != history[newest]) continue;
    int64_t n = 1;
    while (n < MAX_NGRAM && place >= n && history[place - n] == history[newest - n]) n++;
    if (n > best.n) best = {place, n};
    if (n == MAX_NGRAM) break;
  }
  return best;
}

void look_up_row(const Op& op, int64_t row) {
  const int64_t* history = op.history + row * op.length;
  const int64_t newest = std::min(op.state_positions[row], op.length - 1);
  const Match match = latest_match(history, newest);
  int64_t* guesses = op.guesses + row * op.max_guesses;
  for (int64_t i = 0; i < op.n_guesses; i++)
    guesses[i] = match.n == 0 ? NO_GUESS : history[match.end + 1 + i % (newest - match.end)];
  op.matched[row] = match.n;
}

void put_guess_row(const Op& op, int64_t row) {
  const int64_t token = op.tokens[(row + 1) * op.tokens_per_row - 1], number = op.begin;
  int64_t* guesses = op.guesses + row * op.max_guesses;
  const bool known = token >= 0 && token < op.vocab && (number == 0 || guesses[number - 1] >= 0);
  guesses[number] = known ? token : NO_GUESS;
  std::fill(guesses + number + 1, guesses + op.max_guesses, NO_GUESS);
  if (number == 0) op.matched[row] = known ? DRAFTED : 0;
}

}  // namespace

void check_row(const Op& op, int64_t row) {
  switch (op.kind) {
    case WINDOW: return window_row(op, row);
    case ACCEPT: return accept_row(op, row);
    case LOOK_UP: return look_up_row(op, row);
    case PUT_GUESS: return put_guess_row(op, row);
  }
}

}  // namespace fastllama
