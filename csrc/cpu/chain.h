// A chain of layers whose states are run forward again, with room for some of them: binomial checkpointing.
// odeblock/checkpointing.py plans it.
#pragma once

#include <cstdint>

namespace odeblock {
namespace {

// The binomial coefficient C(s + r, s), 0 for r < 0, at most `limit`: the longest chain of layers that s stored
// states serve when no layer is run more than r times (Griewank & Walther 2000, equation 2).
inline int64_t chain_length(int64_t s, int64_t r, int64_t limit) {
  if (r < 0) return 0;
  int64_t length = 1;  // C(s + i, i)
  for (int64_t i = 1; i <= r && length < limit; i++) length = length * (s + i) / i;
  return length < limit ? length : limit;
}

// Where a chain of `length` layers, too long to hold all its states, is best cut in two: the state at the cut is
// stored, the upper part is done with s - 1 states, then the lower with s; of these its own first state is one.
inline int64_t best_cut(int64_t length, int64_t s) {
  int64_t r = 0;
  for (int64_t reach = 1; reach < length; r++) reach = reach * (s + r + 1) / (r + 1);  // C(s + r, s)
  const int64_t lower = chain_length(s, r - 2, length), rest = length - chain_length(s - 1, r, length);
  const int64_t cut = lower > rest ? lower : rest;
  return cut < 1 ? 1 : cut;
}

// The layers bottom .. top-1, from the top, from the state h below them. The states between are run forward again,
// forward(h_k, k, slot of h_{k+1}), at most `slots` of them held at a time, from slot(taken) on. By the same operations
// as in the forward, so they have the same bits. Each layer then has its backward(h_k, k, slot of h_{k+1}); the slot is
// null where h_{k+1} is not held.
template <class T, class Slot, class Run, class Sweep>
void sweep_chain(const T* h, int64_t bottom, int64_t top, int64_t slots, Slot slot, Run forward, Sweep backward,
                 int64_t taken = 0) {
  while (top - bottom - 1 > slots - taken) {
    const int64_t cut = bottom + best_cut(top - bottom, slots - taken);
    for (int64_t k = bottom; k < cut; k++) forward(k == bottom ? h : slot(taken), k, slot(taken));
    sweep_chain<T>(slot(taken), cut, top, slots, slot, forward, backward, taken + 1);
    top = cut;
  }
  for (int64_t k = bottom; k < top - 1; k++)
    forward(k == bottom ? h : slot(taken + k - bottom - 1), k, slot(taken + k - bottom));
  for (int64_t k = top - 1; k >= bottom; k--)
    backward(k == bottom ? h : slot(taken + k - bottom - 1), k, k == top - 1 ? nullptr : slot(taken + k - bottom));
}

}  // namespace
}  // namespace odeblock
