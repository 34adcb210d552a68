// Which token a group of warps computes next, in kernels whose blocks stay for many of them.
#pragma once

#include <cstdint>

#include "problem.h"

namespace flatquant {

// Hands out the tokens that a group's stages are filled with again, in the thread that does so:
// first those of a fixed share, dealt out in turn; then, as some SMs are slower than others, what
// is first come, first served. The counter for that is scratch of any content, which block 0 sets
// to the first of these long before it is needed. Were another block to draw before that, it would
// work on a token twice, to the same bits, or leave early; block 0 itself, which draws only after
// it has met a block barrier, does not rest until the last token is handed out.
// What is said of tokens may be true of stacks of them (sm90/config.h), of which there are
// `tokens`. Deal has step(), from a group's token to its next one of the fixed share, and held(),
// how many tokens all groups take before that barrier, which the fixed share exceeds.
template <class Deal>
class TokenSource {
 public:
  // `next` is the token after those that the stages get at first. Without a counter all tokens are
  // dealt out in turn.
  __device__ TokenSource(int64_t tokens, uint32_t* counter, uint32_t next, Deal deal)
      : tokens_(static_cast<uint32_t>(tokens)), counter_(counter), position_(next), deal_(deal) {
    const bool shares = counter_ != nullptr && tokens_ >= 2 * deal_.held();
    fixed_ = shares ? tokens_ - tokens_ / 4 : tokens_;
    if (shares && blockIdx.x == 0 && threadIdx.x == 0) atomicExch(counter_, fixed_);
    next_ = draw();
  }

  // The next token to *taken; from some call on, one past the last. The one after it is drawn
  // ahead, as that takes as long as a load.
  __device__ void take(uint32_t* taken) {
    *taken = next_;  // first: else the compiler would copy what is drawn, and wait for it
    if (next_ < tokens_) next_ = draw();
  }

 private:
  __device__ uint32_t draw() {
    if (position_ >= fixed_) {
      // The compiler makes an addition of a constant the warp's, which waits for the result; so it
      // does of an increment that ends at UINT32_MAX. No counter gets there.
      return fixed_ < tokens_ ? atomicInc(counter_, UINT32_MAX - 1) : tokens_;
    }
    const uint32_t token = position_;
    position_ += deal_.step();
    return token;
  }

  uint32_t tokens_;
  uint32_t* counter_;
  uint32_t position_;
  uint32_t fixed_;
  uint32_t next_;
  Deal deal_;
};

}  // namespace flatquant
