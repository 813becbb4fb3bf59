// Adam and its relatives share weight decay and the moving averages of the gradient and of its square.
#pragma once

#include "core/macros.h"
#include "core/math.h"

namespace dracopt {
inline namespace DRACOPT_ISA {

template <typename T>
struct Moments {
  T decay;  // the parameter's factor, if weight decay is decoupled
  T l2;     // the parameter's factor in the gradient, if weight decay is not decoupled
  T lerp;   // 1 - beta1, or -beta1 if the average starts from the gradient
  T beta2, one_minus_beta2;
  Divisor<T> bias_correction2_sqrt;
  T eps;
  Flag<T> has_l2;
  Flag<T> from_grad;  // beta1 <= 0.5: torch.lerp then starts from the gradient, the nearer end

  template <typename Hyperparameters, typename Power>
  DRACOPT_HD static Moments prepare(double step, const Hyperparameters& h, Power&& power) {
    const bool decoupled = h.decoupled_weight_decay != 0;
    const double weight = 1 - h.beta1;
    const bool from_grad = static_cast<T>(weight) >= T(0.5);
    return {
        .decay = static_cast<T>(decoupled ? 1 - h.lr * h.weight_decay : 1),
        .l2 = static_cast<T>(decoupled ? 0 : h.weight_decay),
        .lerp = from_grad ? static_cast<T>(weight) - T(1) : static_cast<T>(weight),
        .beta2 = static_cast<T>(h.beta2),
        .one_minus_beta2 = static_cast<T>(1 - h.beta2),
        .bias_correction2_sqrt = Divisor<T>::of(static_cast<T>(sqrt(1 - power(h.beta2, step)))),
        .eps = static_cast<T>(h.eps),
        .has_l2 = flag<T>(!decoupled && h.weight_decay != 0),
        .from_grad = flag<T>(from_grad),
    };
  }

  DRACOPT_HD void update(T& p, T& g, T& exp_avg, T& exp_avg_sq) const {
    g = select(has_l2, fma(p, l2, g), g);
    p = p * decay;
    exp_avg = fma(lerp, g - exp_avg, select(from_grad, g, exp_avg));
    exp_avg_sq = fma(one_minus_beta2 * g, g, exp_avg_sq * beta2);
  }

  bool finite() const { return all_finite(decay, l2, lerp, beta2, one_minus_beta2, bias_correction2_sqrt.value, eps); }

  template <typename Math>
  DRACOPT_HD T denominator(T second_moment, Math& math) const {
    return math.root_over(second_moment, bias_correction2_sqrt) + eps;
  }
};

}  // namespace DRACOPT_ISA
}  // namespace dracopt
