// The threads that run ops together.
#pragma once
#include "op.hpp"

namespace fastllama {

// Runs the ops in order, each on up to n_threads threads. Results do not depend on n_threads. May be called from several
// threads at once, and in a child process after a fork.
void run_ops(const Op* ops, int n_ops, int n_threads, const Kernels& kernels);

}  // namespace fastllama
