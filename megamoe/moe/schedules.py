"""What depends on the step: how many experts a token gets while training. Needs no torch."""

import math

from megamoe.config.schema import TopKScheduleConfig

LADDER = (1, 2, 4, 8, 16)


def top_k_at(schedule: TopKScheduleConfig, top_k: int, step: int, max_steps: int) -> int:
    """Experts per token at `step`, 0-based, in training.

    With s = step, S = schedule.steps or max_steps, a = min_k, b = max_k, and round to even on ties:

        constant              top_k
        linear_increase       round((b - a) s/S) + a
        linear_decrease       round(-(b - a) s/S) + b
        cosine_increase       round(-(b - a) cos(pi s / 2S)) + b
        cosine_decrease       round((b - a) cos(pi s / 2S)) + a
        exp_increase          round(-(b - a) 0.99^floor(s / I)) + b,  I = floor(S / 300)
        multi_step_increase   one of 1, 2, 4, 8, 16 for each fifth of S
        multi_step_decrease   the same reversed

    all clipped to [a, b]. Where the published forms fail, megamoe goes on in their spirit: from step S
    on the ladders stay on their last rung, and for S < 300, where I would be zero, I = S / 300.
    """
    if schedule.mode == "constant":
        return top_k
    low, high, span = schedule.min_k, schedule.max_k, schedule.max_k - schedule.min_k
    steps = schedule.steps or max_steps
    rung = min(5 * step // steps, 4)
    cosine = span * math.cos(math.pi * step / (2 * steps))
    k = {
        "linear_increase": lambda: round(span * step / steps) + low,
        "linear_decrease": lambda: round(-span * step / steps) + high,
        "cosine_increase": lambda: round(-cosine) + high,
        "cosine_decrease": lambda: round(cosine) + low,
        "exp_increase": lambda: round(-span * 0.99 ** (step // (steps // 300 or steps / 300))) + high,
        "multi_step_increase": lambda: LADDER[rung],
        "multi_step_decrease": lambda: LADDER[-1 - rung],
    }[schedule.mode]()
    return max(low, min(high, k))
