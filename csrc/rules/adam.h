// Adam (Kingma & Ba 2015), AMSGrad (Reddi et al. 2018) and AdamW (Loshchilov & Hutter 2019).
#pragma once

#include "core/group_key.h"
#include "core/state_scalar.h"
#include "rules/moments.h"

namespace dracopt {
inline namespace DRACOPT_ISA {

struct Adam {
  static constexpr const char* name = "adam";

  struct Hyperparameters {
    double lr, beta1, beta2, eps, weight_decay, amsgrad, decoupled_weight_decay;
  };
  static constexpr GroupKey group_keys[] = {{"lr"},
                                            {"betas", KeyKind::decay_rates},
                                            {"eps"},
                                            {"weight_decay"},
                                            {"amsgrad", KeyKind::flag},
                                            {"decoupled_weight_decay", KeyKind::flag},
                                            {}};
  static constexpr const char* state_scalar_keys[] = {"step", nullptr};
  static constexpr const char* state_keys[] = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq", nullptr};
  static constexpr int min_states = 2, max_states = 3;
  static int states(const Hyperparameters& h) { return h.amsgrad != 0 ? 3 : 2; }

  template <typename T>
  struct Scalars {
    Moments<T> moments;
    T neg_step_size;

    bool finite() const { return moments.finite() && all_finite(neg_step_size); }
  };

  template <typename T, typename Power>
  DRACOPT_HD static Scalars<T> prepare(StateScalar* state_scalars, bool, const Hyperparameters& h, Power&& power) {
    const double step = state_scalars[0].add(1);
    const double bias_correction1 = 1 - power(h.beta1, step);
    return {
        .moments = Moments<T>::prepare(step, h, power),
        .neg_step_size = static_cast<T>(-(h.lr / bias_correction1)),
    };
  }

  // states: exp_avg, exp_avg_sq and, with amsgrad, max_exp_avg_sq.
  template <typename T, int N, typename Math>
  DRACOPT_HD static void update(const Scalars<T>& c, T& p, T g, T* states, Math& math) {
    c.moments.update(p, g, states[0], states[1]);
    T second_moment = states[1];
    if constexpr (N == 3) second_moment = states[2] = maximum(states[2], second_moment);
    p = p + math.quotient(c.neg_step_size * states[0], c.moments.denominator(second_moment, math));
  }
};

}  // namespace DRACOPT_ISA
}  // namespace dracopt
