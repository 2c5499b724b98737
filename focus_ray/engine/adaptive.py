"""Whether a step evicts: only where more tokens are decoded per second that way.

Eviction makes a step cheaper and decodes fewer tokens in it. Where a step costs about the same
however few tokens it has, because it waits for the weights to be read, only the loss remains. What
steps cost is measured at start-up; what they decode is learned on the way, of both ways.

Numbers only: no tensors, no clock, so the same inputs give the same decisions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from focus_ray.engine.costs import StepCosts

LEAST_GAIN = 1.05
"""The other way must promise to be so much faster; costs and rates are no better known."""

LEAST_STAY_STEPS = 16
"""About the life of a block: a change shows its effect only after it."""

SETTLING_STEPS = 8
"""Steps after a change that teach nothing: their blocks were begun the other way."""

TRIAL_STEPS = SETTLING_STEPS + 24
"""How long the way that is not in use is tried."""

TRIAL_PAUSE_STEPS = 256
"""Between a change and the next trial, at least."""

TRIAL_BUDGET = 0.005
"""Share of the time that trials may cost, as far as their cost can be foreseen."""

FIRST_BUDGET_STEPS = 4.0
"""What the first trial may cost beyond that, in steps."""

MOST_BUDGET_STEPS = 64.0
"""What trials not made save up for later ones, at most."""

MOST_TRIAL_LOSS = 0.5
"""What is so much slower is not tried."""

LEARNING_STEPS = 128
"""Horizon over which rates of the way in use are averaged."""

FORGETTING_STEPS = 2048
"""Horizon after which those of the other way count for less."""

PRIOR_SLOT_STEPS = 32.0
"""Weight of the assumed ratio between both ways against observed steps of one sequence."""

PREFILL_STEPS = 32
"""Horizon over which prefill tokens are averaged."""


@dataclass(frozen=True)
class Rates:
    """What one sequence does in a step, in tokens; ``retained`` is a share of ``processed``."""

    decoded: float
    processed: float
    retained: float

    def as_if(self, now: Rates, then: Rates) -> Rates:
        """These, had the tokens of a step changed as from ``then`` to ``now``."""
        return Rates(
            decoded=self.decoded * now.decoded / then.decoded,
            processed=self.processed * now.processed / then.processed,
            retained=self.retained,
        )

    def towards(self, other: Rates, weight: float) -> Rates:
        """The mean of both, with this share of ``other``."""
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return Rates(*(mine + (theirs - mine) * weight for mine, theirs in pairs))


# Of sdar-tiny: blocks of 32, threshold 0.8, alpha 1.5. Only the ratios between them are believed.
PLAIN = Rates(decoded=3.80, processed=22.1, retained=1.0)
BY_IMPORTANCE = Rates(decoded=2.60, processed=20.8, retained=8.5 / 20.8)
LEFTMOST = Rates(decoded=1.98, processed=6.1, retained=1.0)


class _Observed:
    """Decayed sums over the steps of one way of decoding."""

    def __init__(self) -> None:
        self.slot_steps = 0.0
        self._decoded = 0.0
        self._processed = 0.0
        self._retained = 0.0

    def add(self, num_slots: int, decoded: int, processed: int, retained: int) -> None:
        self.forget(LEARNING_STEPS)
        self.slot_steps += num_slots
        self._decoded += decoded
        self._processed += processed
        self._retained += retained

    def forget(self, horizon: int) -> None:
        left = 1.0 - 1.0 / horizon
        self.slot_steps *= left
        self._decoded *= left
        self._processed *= left
        self._retained *= left

    @property
    def rates(self) -> Rates | None:
        """None before anything was decoded."""
        if not self._decoded:
            return None
        steps = self.slot_steps
        retained = self._retained / self._processed
        return Rates(self._decoded / steps, self._processed / steps, retained)


class EvictionChooser:
    """Decides step by step, from what steps cost and what they turned out to decode.

    The way that is not in use is tried for a short while now and then, as seldom as its foreseen
    loss demands, and never where it could not win even if it decoded as much.

    Args:
        costs: measured on this device with this model.
        expected: what evicting does, compared to ``PLAIN``, before anything is known.
    """

    def __init__(self, costs: StepCosts, expected: Rates = BY_IMPORTANCE) -> None:
        self.costs = costs
        self._prior = {False: PLAIN, True: expected}
        self.evicts: bool | None = None
        self._observed = {False: _Observed(), True: _Observed()}
        self._prefill = 0.0
        self._steps_in_use = 0
        self._on_trial = False
        self._budget_steps = FIRST_BUDGET_STEPS
        self._observed_way: bool | None = None
        self._steps_observed = 0  # since the way last changed
        self._when_other_was_seen: Rates | None = None

    def choose(self, *, num_processed: int, num_prefill: int, num_slots: int) -> bool:
        """Whether the step that comes now evicts.

        Args:
            num_processed: tokens of the step.
            num_prefill: how many of these are prefill, which always goes on.
            num_slots: sequences that decode in it.
        """
        if not num_slots:
            return bool(self.evicts)
        own_tokens = (num_processed - num_prefill) / num_slots
        weight = 1.0 / PREFILL_STEPS if self.evicts is not None else 1.0
        self._prefill += (num_prefill - self._prefill) * weight
        if self.evicts is None:
            self.evicts = self.gain(own_tokens, num_slots) > 1.0
        gain = self.gain(own_tokens, num_slots)
        gain_of_other = 1.0 / gain if self.evicts else gain
        self._steps_in_use += 1
        self._budget_steps = min(self._budget_steps + TRIAL_BUDGET, MOST_BUDGET_STEPS)
        if self._on_trial:
            if self._steps_in_use > TRIAL_STEPS:
                # What was tried must be better by the margin to stay.
                self._change(to_other=gain_of_other > 1.0 / LEAST_GAIN)
        elif self._steps_in_use > LEAST_STAY_STEPS and gain_of_other > LEAST_GAIN:
            self._change(to_other=True)
        elif self._steps_in_use > TRIAL_PAUSE_STEPS and gain_of_other > 1.0 - MOST_TRIAL_LOSS:
            self._try_other(own_tokens, num_slots, gain_of_other)
        return self.evicts

    def observe(
        self,
        *,
        evicted: bool,
        num_slots: int,
        num_processed: int,
        num_retained: int,
        num_prefill: int,
        num_decoded: int,
    ) -> None:
        """What a step did, in order of the steps and at any delay.

        Args:
            evicted: what ``choose`` said for it.
            num_slots: sequences that decoded in it.
            num_processed, num_retained: its tokens before and after the eviction.
            num_prefill: how many of either are prefill.
            num_decoded: tokens that it decoded.
        """
        if not num_slots:
            return
        if evicted is not self._observed_way:
            # The very first blocks were not begun the other way, so nothing needs to settle.
            self._steps_observed = SETTLING_STEPS if self._observed_way is None else 0
            self._observed_way, self._when_other_was_seen = evicted, None
        self._steps_observed += 1
        self._observed[not evicted].forget(FORGETTING_STEPS)
        if self._steps_observed <= SETTLING_STEPS:
            return
        processed, retained = num_processed - num_prefill, num_retained - num_prefill
        self._observed[evicted].add(num_slots, num_decoded, processed, retained)
        if self._steps_observed == TRIAL_STEPS:
            self._when_other_was_seen = self._observed[evicted].rates

    def gain(self, own_tokens: float, num_slots: int) -> float:
        """Predicted tokens decoded per second when evicting, over those when not.

        Args:
            own_tokens: processed per sequence now; counts as long as nothing was observed.
            num_slots: sequences that decode.
        """
        plain, evicting = self._believed(own_tokens)
        plain_s, evicting_s = self._seconds(plain, evicting, num_slots)
        return (evicting.decoded / evicting_s) / (plain.decoded / plain_s)

    def _try_other(self, own_tokens: float, num_slots: int, gain_of_other: float) -> None:
        """Begin a trial, if the other way can win and what is lost on it has been saved up."""
        plain, evicting = self._believed(own_tokens)
        plain_s, evicting_s = self._seconds(plain, evicting, num_slots)
        if self.evicts:
            cost_ratio = plain_s / evicting_s
        else:
            # Evicting never decodes more, so it must at least be cheaper.
            as_many = replace(evicting, decoded=plain.decoded)
            if plain_s < LEAST_GAIN * self._seconds(plain, as_many, num_slots)[1]:
                return
            cost_ratio = evicting_s / plain_s
        lost_steps = TRIAL_STEPS * cost_ratio * max(0.0, 1.0 - gain_of_other)
        if lost_steps <= self._budget_steps:
            self._budget_steps -= lost_steps
            self._change(to_other=True, on_trial=True)

    def _seconds(self, plain: Rates, evicting: Rates, num_slots: int) -> tuple[float, float]:
        """A step of each way, among ``num_slots`` that decode.

        Whoever decodes faster also finishes faster and lets others in: prefill comes in
        proportion to decoded tokens, whatever the way.
        """
        in_use = evicting if self.evicts else plain
        per_decoded = self._prefill / max(in_use.decoded, 1e-6)
        plain_tokens = num_slots * plain.processed + per_decoded * plain.decoded
        prefill = per_decoded * evicting.decoded
        processed = num_slots * evicting.processed
        return self.costs.plain(plain_tokens), self.costs.evicting(
            processed + prefill, processed * evicting.retained + prefill
        )

    def _believed(self, own_tokens: float) -> tuple[Rates, Rates]:
        """Rates of both ways, not evicting first.

        The way that is known better is taken as seen. The other leans to its assumed ratio to
        that, the more so the less it was seen; what was seen of it before moves with the way in
        use, for other texts decode faster or slower in either.
        """
        known = self._observed[True].slot_steps > self._observed[False].slot_steps
        anchor = self._observed[known].rates
        if anchor is None:
            now = replace(PLAIN, processed=own_tokens)
            return now, self._prior[True].as_if(now, PLAIN)
        guess = self._prior[not known].as_if(anchor, self._prior[known])
        other = self._observed[not known]
        if (seen := other.rates) is not None:
            if self._when_other_was_seen is not None and known is self._observed_way:
                seen = seen.as_if(anchor, self._when_other_was_seen)
            share = other.slot_steps / (other.slot_steps + PRIOR_SLOT_STEPS)
            guess = guess.towards(seen, share)
        return (guess, anchor) if known else (anchor, guess)

    def _change(self, *, to_other: bool, on_trial: bool = False) -> None:
        """Change the way, or end a trial by keeping it."""
        if to_other:
            self.evicts = not self.evicts
        self._steps_in_use = 0
        self._on_trial = on_trial
