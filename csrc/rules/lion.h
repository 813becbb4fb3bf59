// Lion (Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms").
#pragma once

#include "core/group_key.h"
#include "core/math.h"
#include "core/state_scalar.h"

namespace dracopt {
inline namespace DRACOPT_ISA {

struct Lion {
  static constexpr const char* name = "lion";

  struct Hyperparameters {
    double lr, beta1, beta2, weight_decay;
  };
  static constexpr GroupKey group_keys[] = {{"lr"}, {"betas", KeyKind::decay_rates}, {"weight_decay"}, {}};
  static constexpr const char* state_scalar_keys[] = {nullptr};
  static constexpr const char* state_keys[] = {"exp_avg", nullptr};
  static constexpr int min_states = 1, max_states = 1;
  static int states(const Hyperparameters&) { return 1; }

  template <typename T>
  struct Scalars {
    T decay, neg_lr, beta1, one_minus_beta1, beta2, one_minus_beta2;

    bool finite() const { return all_finite(decay, neg_lr); }
  };

  template <typename T, typename Power>
  DRACOPT_HD static Scalars<T> prepare(StateScalar*, bool, const Hyperparameters& h, Power&&) {
    return {
        .decay = static_cast<T>(1 - h.lr * h.weight_decay),
        .neg_lr = static_cast<T>(-h.lr),
        .beta1 = static_cast<T>(h.beta1),
        .one_minus_beta1 = static_cast<T>(1 - h.beta1),
        .beta2 = static_cast<T>(h.beta2),
        .one_minus_beta2 = static_cast<T>(1 - h.beta2),
    };
  }

  DRACOPT_HD static float one_like(float x) { return __builtin_copysignf(1, x); }
  DRACOPT_HD static double one_like(double x) { return __builtin_copysign(1, x); }

  // states: exp_avg.
  template <typename T, int N, typename Math>
  DRACOPT_HD static void update(const Scalars<T>& c, T& p, T g, T* states, Math&) {
    const T average = fma(c.one_minus_beta1, g, states[0] * c.beta1);
    const T sign = ((average < 0) | (average > 0)) ? one_like(average) : average;  // zero and NaN stay as they are
    p = fma(c.neg_lr, sign, p * c.decay);
    states[0] = fma(c.one_minus_beta2, g, states[0] * c.beta2);
  }
};

}  // namespace DRACOPT_ISA
}  // namespace dracopt
