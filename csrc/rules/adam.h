// Adam (Kingma & Ba 2015), AMSGrad (Reddi et al. 2018) and AdamW (Loshchilov & Hutter 2019).
#pragma once

#include "core/macros.h"
#include "core/math.h"

namespace dracopt {
inline namespace DRACOPT_ISA {

struct Adam {
  static constexpr const char* name = "adam";

  struct Hyperparameters {
    double lr, beta1, beta2, eps, weight_decay, amsgrad, decoupled_weight_decay;
  };
  static constexpr const char* group_keys[] = {
      "lr", "betas", "eps", "weight_decay", "amsgrad", "decoupled_weight_decay", nullptr};
  static constexpr const char* state_keys[] = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq", nullptr};
  static constexpr int min_states = 2, max_states = 3;
  static constexpr bool counts_steps = true;
  static int states(const Hyperparameters& h) { return h.amsgrad != 0 ? 3 : 2; }

  template <typename T>
  struct Scalars {
    T decay;  // decoupled: the parameter's factor
    T l2;     // else: what the parameter adds to the gradient
    T lerp;   // 1 - beta1, or -beta1 when it starts from the gradient
    T beta2, one_minus_beta2;
    T bias_correction2_sqrt, eps, neg_step_size;
    Flag<T> has_l2;
    Flag<T> from_grad;  // beta1 <= 0.5: torch.lerp then starts from the gradient, the end that is nearer
  };

  template <typename T, typename Power>
  DRACOPT_HD static Scalars<T> prepare(double step, const Hyperparameters& h, Power&& power) {
    const bool decoupled = h.decoupled_weight_decay != 0;
    const double weight = 1 - h.beta1;
    const bool from_grad = static_cast<T>(weight) >= T(0.5);
    const double bias_correction1 = 1 - power(h.beta1, step);
    const double bias_correction2 = 1 - power(h.beta2, step);
    return {
        .decay = static_cast<T>(decoupled ? 1 - h.lr * h.weight_decay : 1),
        .l2 = static_cast<T>(decoupled ? 0 : h.weight_decay),
        .lerp = from_grad ? static_cast<T>(weight) - T(1) : static_cast<T>(weight),
        .beta2 = static_cast<T>(h.beta2),
        .one_minus_beta2 = static_cast<T>(1 - h.beta2),
        .bias_correction2_sqrt = static_cast<T>(sqrt(bias_correction2)),
        .eps = static_cast<T>(h.eps),
        .neg_step_size = static_cast<T>(-(h.lr / bias_correction1)),
        .has_l2 = flag<T>(!decoupled && h.weight_decay != 0),
        .from_grad = flag<T>(from_grad),
    };
  }

  // states: exp_avg, exp_avg_sq and, with amsgrad, max_exp_avg_sq.
  template <typename T, int N>
  DRACOPT_HD static void update(const Scalars<T>& c, T& p, T g, T* states) {
    T& exp_avg = states[0];
    T& exp_avg_sq = states[1];
    g = select(c.has_l2, fma(p, c.l2, g), g);
    p = p * c.decay;
    exp_avg = fma(c.lerp, g - exp_avg, select(c.from_grad, g, exp_avg));
    exp_avg_sq = fma(c.one_minus_beta2 * g, g, exp_avg_sq * c.beta2);
    T second_moment = exp_avg_sq;
    if constexpr (N == 3) second_moment = states[2] = maximum(states[2], exp_avg_sq);
    const T denom = sqrt(second_moment) / c.bias_correction2_sqrt + c.eps;
    p = p + (c.neg_step_size * exp_avg) / denom;
  }
};

}  // namespace DRACOPT_ISA
}  // namespace dracopt
