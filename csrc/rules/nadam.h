// NAdam (Dozat 2016), and NAdamW with decoupled weight decay, as torch.optim.NAdam defines them.
#pragma once

#include "core/group_key.h"
#include "core/state_scalar.h"
#include "rules/moments.h"

namespace dracopt {
inline namespace DRACOPT_ISA {

struct NAdam {
  static constexpr const char* name = "nadam";

  struct Hyperparameters {
    double lr, beta1, beta2, eps, weight_decay, momentum_decay, decoupled_weight_decay;
  };
  static constexpr GroupKey group_keys[] = {{"lr"},
                                            {"betas", KeyKind::decay_rates},
                                            {"eps"},
                                            {"weight_decay"},
                                            {"momentum_decay"},
                                            {"decoupled_weight_decay", KeyKind::flag},
                                            {}};
  static constexpr const char* state_scalar_keys[] = {"step", "mu_product", nullptr};
  static constexpr const char* state_keys[] = {"exp_avg", "exp_avg_sq", nullptr};
  static constexpr int min_states = 2, max_states = 2;
  static int states(const Hyperparameters&) { return 2; }

  template <typename T>
  struct Scalars {
    Moments<T> moments;
    T grad_factor, exp_avg_factor;

    bool finite() const { return moments.finite() && all_finite(grad_factor, exp_avg_factor); }
  };

  // The momentum of a step: beta1 (1 - 0.96^(step * momentum_decay) / 2).
  DRACOPT_HD static double momentum(double step, const Hyperparameters& h) {
    constexpr double ln = -0x1.4e69ed6d80eb3p-5, ln_rest = -0x1.067d54cb9a84cp-60;  // the logarithm of 0.96
    const double decays = step * h.momentum_decay, x = decays * ln;
    return h.beta1 * (1 - 0.5 * exponential(x, fma(decays, ln, -x) + decays * ln_rest));
  }

  template <typename T, typename Power>
  DRACOPT_HD static Scalars<T> prepare(StateScalar* state_scalars, bool, const Hyperparameters& h, Power&& power) {
    const double step = state_scalars[0].add(1);
    const double mu = momentum(step, h), mu_next = momentum(step + 1, h);
    const double mu_product = state_scalars[1].multiply(mu);
    return {
        .moments = Moments<T>::prepare(step, h, power),
        .grad_factor = static_cast<T>(-h.lr * (1 - mu) / (1 - mu_product)),
        .exp_avg_factor = static_cast<T>(-h.lr * mu_next / (1 - mu_product * mu_next)),
    };
  }

  // states: exp_avg, exp_avg_sq.
  template <typename T, int N, typename Math>
  DRACOPT_HD static void update(const Scalars<T>& c, T& p, T g, T* states, Math& math) {
    c.moments.update(p, g, states[0], states[1]);
    const T direction = fma(c.exp_avg_factor, states[0], c.grad_factor * g);
    p = p + math.quotient(direction, c.moments.denominator(states[1], math));
  }
};

}  // namespace DRACOPT_ISA
}  // namespace dracopt
