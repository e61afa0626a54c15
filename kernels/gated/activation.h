// What lies between the two products of a gated layer: gate, up -> act(gate) * up.
#pragma once

#include "../host/vectors.h"

namespace heddle {

enum Act { SILU, GELU_TANH, GELU, CLAMPED };  // as Act in Python

struct Activation {
  int64_t act;
  float alpha, limit;  // for CLAMPED
};

ALWAYS Vec erf(Vec x) {  // lane by lane: few models ask for it
  for (int i = 0; i < W; ++i) x[i] = __builtin_erff(x[i]);
  return x;
}

ALWAYS Vec activated(const Activation& it, Vec gate, Vec up) {
  switch (it.act) {
    case SILU:
      return gate * sigmoid(gate) * up;
    case GELU_TANH:
      return 0.5f * gate * (1.0f + tanh(0.7978845608f * (gate + 0.044715f * gate * gate * gate))) * up;
    case GELU:
      return 0.5f * gate * (1.0f + erf(gate * 0.7071067812f)) * up;
    default:
      gate = at_most(gate, it.limit);
      up = at_least(at_most(up, it.limit), -it.limit);
      return (up + 1.0f) * gate * sigmoid(gate * it.alpha);
  }
}

}  // namespace heddle
