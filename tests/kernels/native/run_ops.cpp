// Runs ops that come through standard input, for tests of kernels in an emulator. A request is a list of (address, bytes,
// contents) of the memory that the op uses, 0, the op itself, and its number of threads. The answer is the same list of
// contents, after the op.
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <vector>

#include "../../../kernels/native/src/op.hpp"

extern "C" void fastllama_run(const fastllama::Op* ops, int n_ops, int n_threads);

namespace {

void read(void* to, size_t bytes) {
  if (std::fread(to, 1, bytes, stdin) != bytes) std::exit(0);  // the tests have ended
}

uint64_t read_number() {
  uint64_t number;
  read(&number, sizeof number);
  return number;
}

}  // namespace

int main() {
  for (;;) {
    std::map<uint64_t, std::vector<char>> memory;  // by the address in the tests' process
    while (const uint64_t address = read_number()) {
      memory[address].resize(read_number());
      read(memory[address].data(), memory[address].size());
    }
    fastllama::Op op;
    read(&op, sizeof op);
    // Every pointer, an address of the tests' process, becomes the address of its copy.
    for (size_t at = offsetof(fastllama::Op, tokens); at < offsetof(fastllama::Op, n_tokens); at += sizeof(void*)) {
      uint64_t value;
      std::memcpy(&value, reinterpret_cast<char*>(&op) + at, sizeof value);
      auto found = memory.upper_bound(value);
      if (found == memory.begin() || value >= (--found)->first + found->second.size()) continue;
      const char* copy = found->second.data() + (value - found->first);
      std::memcpy(reinterpret_cast<char*>(&op) + at, &copy, sizeof copy);
    }
    fastllama_run(&op, 1, int(read_number()));
    for (const auto& [address, contents] : memory) std::fwrite(contents.data(), 1, contents.size(), stdout);
    std::fflush(stdout);
  }
}
