// Stochastic gradient descent with momentum, dampening and Nesterov's form, as torch.optim.SGD defines them
// (Sutskever et al. 2013, with the learning rate outside the buffer).
#pragma once

#include "core/group_key.h"
#include "core/math.h"
#include "core/state_scalar.h"

namespace dracopt {
inline namespace DRACOPT_ISA {

struct Sgd {
  static constexpr const char* name = "sgd";

  struct Hyperparameters {
    double lr, momentum, dampening, weight_decay, nesterov;
  };
  static constexpr GroupKey group_keys[] = {
      {"lr"}, {"momentum"}, {"dampening"}, {"weight_decay"}, {"nesterov", KeyKind::flag}, {}};
  static constexpr const char* state_scalar_keys[] = {nullptr};
  static constexpr const char* state_keys[] = {"momentum_buffer", nullptr};
  static constexpr int min_states = 0, max_states = 1;
  static int states(const Hyperparameters& h) { return h.momentum != 0 ? 1 : 0; }

  template <typename T>
  struct Scalars {
    T neg_lr, momentum, one_minus_dampening, l2;
    Flag<T> has_l2, nesterov;
    Flag<T> first;  // the buffer starts as the gradient itself, undampened

    bool finite() const {
      return all_finite(neg_lr, momentum, l2) && (momentum == 0 || all_finite(one_minus_dampening));
    }
  };

  template <typename T, typename Power>
  DRACOPT_HD static Scalars<T> prepare(StateScalar*, bool first, const Hyperparameters& h, Power&&) {
    return {
        .neg_lr = static_cast<T>(-h.lr),
        .momentum = static_cast<T>(h.momentum),
        .one_minus_dampening = static_cast<T>(1 - h.dampening),
        .l2 = static_cast<T>(h.weight_decay),
        .has_l2 = flag<T>(h.weight_decay != 0),
        .nesterov = flag<T>(h.nesterov != 0),
        .first = flag<T>(first),
    };
  }

  // states: momentum_buffer, if there is momentum.
  template <typename T, int N, typename Math>
  DRACOPT_HD static void update(const Scalars<T>& c, T& p, T g, T* states, Math&) {
    g = select(c.has_l2, fma(p, c.l2, g), g);
    if constexpr (N == 1) {
      T& buffer = states[0];
      buffer = select(c.first, g, fma(c.one_minus_dampening, g, buffer * c.momentum));
      g = select(c.nesterov, fma(c.momentum, buffer, g), buffer);
    }
    p = fma(c.neg_lr, g, p);
  }
};

}  // namespace DRACOPT_ISA
}  // namespace dracopt
