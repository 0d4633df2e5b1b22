"""When a task will start and end, and how surely, learned from what one route measured.

Owns running estimates, each O(1) in time and space per call. It refuses to know the queue, the slots and the clock:
counts and sums of work come in, estimates in seconds go out. What cannot be a measurement is ignored, what is not known
yet is None; nothing here raises.
"""

from math import erfc, log, sqrt

from llorch.domain.task import Estimate, Priority

LENGTH_HORIZON = 250.0
"""Samples after which what was learned of lengths and of overtaking counts 1/e; means are as sure as of twice these."""

SPEED_HORIZON = 64.0
"""The same for the engine's speed, which varies little from task to task and so can follow a change soon."""

MIN_SAMPLES = 5
"""Fewer ends than these tell nothing."""

NO_TIME = Estimate(0.0, 0.0)

_TOLD_TRUE = 16.0  # tasks; what is told to be ahead is taken for true until enough starts say otherwise
_MOST = 1e12  # seconds or tokens: no measurement lies beyond, and squares would overflow
_NOTHING = 1e-9  # seconds, tokens or cost that are as good as none
_FLAT = 1e-9  # relative variance below which a number counts as one that does not vary
_LONG_TAIL = 1.5  # squared coefficient of variation that exponential times do not reach by chance
_CERTAIN = 12.0  # deviations above the mean beyond which less than one in 100,000 of exponential times lies
_SQRT_HALF = sqrt(0.5)
_NEVER = -40.0  # deviations below which nothing lies


class Line:
    """A running fit y ≈ intercept + slope · x: least squares over samples whose weights fade exponentially.

    Means and moments follow the recurrences of Finch, "Incremental calculation of weighted mean and variance" (2009);
    the first samples all count alike. The line goes through the mean of the samples, and neither its slope nor its
    intercept is negative: more work never takes less time, and a sum over many usual samples is right even where the
    shape is not. Where x does not vary, y is proportional to x.
    """

    __slots__ = ("_covariance", "_fade", "_fit", "_refit_at", "_var_y", "_weight", "count", "mean_x", "mean_y", "var_x")

    def __init__(self, horizon: float) -> None:
        self.count = 0
        self.mean_x = 0.0
        self.mean_y = 0.0
        self.var_x = 0.0
        self._var_y = 0.0
        self._covariance = 0.0
        self._weight = 0.0
        self._fade = 1.0 - 1.0 / horizon
        self._fit = (0.0, 0.0, 0.0)
        self._refit_at = 0

    def add(self, x: float, y: float) -> None:
        """Learn from one sample; one that is negative, endless or not a number is ignored."""
        if not (x >= 0.0 and y >= 0.0 and x + y < _MOST):
            return
        self.count += 1
        self._weight = weight = self._weight * self._fade + 1.0
        gain = 1.0 / weight
        keep = 1.0 - gain
        dx = x - self.mean_x
        dy = y - self.mean_y
        step_x = gain * dx
        step_y = gain * dy
        self.mean_x += step_x
        self.mean_y += step_y
        self.var_x = keep * (self.var_x + step_x * dx)
        self._var_y = keep * (self._var_y + step_y * dy)
        self._covariance = keep * (self._covariance + step_x * dy)

    @property
    def samples(self) -> float:
        """How many samples of equal weight would be as sure: (sum of weights)² / sum of their squares."""
        weight, fade = self._weight, self._fade
        return weight * (1.0 + fade) / (2.0 - weight * (1.0 - fade))

    def fit(self) -> tuple[float, float, float]:
        """Intercept, slope, and the variance of y about the line; of many samples the last few may be left out."""
        if self.count >= self._refit_at:
            self._refit_at = _next_fit(self.count)
            self._fit = self._least_squares()
        return self._fit

    def _least_squares(self) -> tuple[float, float, float]:
        mean_x, mean_y, var_x = self.mean_x, self.mean_y, self.var_x
        slope = mean_y / mean_x if mean_x > _NOTHING else 0.0
        if slope > 0.0 and var_x > _FLAT * mean_x * mean_x:
            slope = min(max(self._covariance / var_x, 0.0), slope)
        variance = self._var_y + slope * (slope * var_x - 2.0 * self._covariance)
        samples = self.samples
        variance *= samples / (samples - 2.0) if samples > 3.0 else 3.0  # two parameters were fitted to the samples
        return max(0.0, mean_y - slope * mean_x), slope, max(0.0, variance)


def _next_fit(count: int) -> int:
    """At which count to fit anew: at once while samples are few, later not for each."""
    return count + 1 + min(15, count // 32)


class Service:
    """What the tasks of one route took, and what follows for those to come. Times are seconds.

    Prefill and decode are learned apart: seconds to the first token follow the prompt, seconds after it the tokens that
    came, and their number the tokens that were expected. So a change of the engine's speed is not mistaken for one of
    the tasks' lengths. Work that waits is known by its cost alone, so the first and the last are learned over it too.
    """

    __slots__ = ("_cost_first", "_cost_length", "_decode", "_first", "_latest", "_length", "_passed", "_remodel_at")

    def __init__(self, *, length_horizon: float = LENGTH_HORIZON, speed_horizon: float = SPEED_HORIZON) -> None:
        self._first = Line(speed_horizon)
        self._decode = Line(speed_horizon)
        self._length = Line(length_horizon)
        self._cost_first = Line(speed_horizon)
        self._cost_length = Line(length_horizon)
        self._latest: _Model | None = None
        self._remodel_at = 0
        self._passed = {priority: Line(length_horizon) for priority in Priority}
        for line in self._passed.values():
            line.add(0.0, 0.0)
            line.add(_TOLD_TRUE, _TOLD_TRUE)

    def note_first_token(self, prompt_tokens: float, seconds: float) -> None:
        """An attempt showed its first token `seconds` after its start; one that gives no tokens: when it ended."""
        self._first.add(prompt_tokens, seconds)

    def note_end(
        self, *, expected_tokens: float, tokens_out: float, decode_s: float, run_s: float, cost: float
    ) -> None:
        """An attempt took `run_s` from its start to its own end, `decode_s` of it after its first token.

        `cost`: of its prompt and its expected tokens, in the unit in which the queue counts what is ahead.
        """
        self._length.add(expected_tokens, tokens_out)
        self._decode.add(tokens_out, decode_s)
        self._cost_length.add(cost, tokens_out)
        self._cost_first.add(cost, run_s - decode_s)

    def note_start(self, priority: Priority, ahead_tasks: float, passed: float) -> None:
        """A task that waited starts: `ahead_tasks` were told at its admission, `passed` have started since.

        In fair order later tasks of other flows may go first, and tasks ahead may give up: the ratio is learned.
        """
        self._passed[priority].add(ahead_tasks, passed)

    def service(self, prompt_tokens: float, expected_tokens: float) -> Estimate | None:
        """Seconds of one attempt from its start to its end; None until MIN_SAMPLES have ended."""
        model = self._model()
        if model is None:
            return None
        tokens = model.few_tokens + model.per_expected * expected_tokens
        return Estimate(
            model.fixed + model.per_prompt_token * prompt_tokens + model.per_token * tokens,
            model.fixed_var + model.token_var * tokens * tokens,
        )

    def wait(
        self,
        priority: Priority,
        *,
        ahead_tasks: float,
        ahead_cost: float,
        running: int,
        busy_cost: float,
        busy_elapsed_s: float,
        slots: int,
    ) -> Estimate | None:
        """Seconds until a task starts that is behind this work; None until MIN_SAMPLES have ended.

        `slots`: those that serve the queue. `running`: attempts in them, `busy_cost` the sum of their costs as at their
        starts, `busy_elapsed_s` of the seconds since. Zero when a slot is free for it.

        Busy slots do as many seconds of work a second. When the task starts, they have done all that was ahead and what
        was left of the running attempts, except what is then left in the other slots.
        """
        if slots - running > ahead_tasks:
            return NO_TIME
        work = self._model()
        if work is None or slots <= 0:
            return None
        line = self._passed[priority]
        always, ratio, passed_var = line.fit()
        tasks = always + ratio * ahead_tasks
        ahead = work.base * tasks + work.per_cost * (always * work.mean_cost + ratio * ahead_cost)
        left, var = work.left(running, busy_cost, busy_elapsed_s, slots)
        if tasks > 0.0:
            var += ahead * ahead * work.variation / tasks
        if passed_var > 0.0:
            var += passed_var * work.square * tasks / line.mean_y  # a count of arrivals varies as it grows
        mean = (ahead + left) * (1.0 + work.censored * busy_elapsed_s) / slots
        return Estimate(mean, var / (slots * slots) + mean * mean * work.unsure)

    def drain_s(self, slots: int) -> float | None:
        """Seconds between two tasks that leave while `slots` slots are busy; None until MIN_SAMPLES have ended."""
        model = self._model()
        return None if model is None or slots <= 0 else model.mean / slots

    def _model(self) -> "_Model | None":
        if self._cost_length.count < MIN_SAMPLES or self._first.count < MIN_SAMPLES:
            return None
        if self._cost_length.count >= self._remodel_at:
            self._remodel_at = _next_fit(self._cost_length.count)
            model = _Model(self._first, self._decode, self._length, self._cost_first, self._cost_length)
            self._latest = model if model.mean > _NOTHING else None
        return self._latest


class _Model:
    """What follows from the lines for any task: numbers that stay until the lines are fitted anew."""

    __slots__ = (
        "base",
        "censored",
        "few_tokens",
        "fixed",
        "fixed_var",
        "left_elsewhere",
        "mean",
        "mean_cost",
        "per_cost",
        "per_expected",
        "per_prompt_token",
        "per_token",
        "square",
        "token_var",
        "unknown",
        "unsure",
        "usual_left",
        "var",
        "variation",
    )

    def __init__(self, first: Line, decode: Line, length: Line, cost_first: Line, cost_length: Line) -> None:
        last, self.per_token, decode_var = decode.fit()
        self._fit_tasks(first, length, last, decode_var)
        self._fit_work(cost_first, cost_length, last, decode_var)

    def _fit_tasks(self, first: Line, length: Line, last: float, decode_var: float) -> None:
        """Of one attempt with known prompt and expected tokens."""
        fixed, self.per_prompt_token, first_var = first.fit()
        self.few_tokens, self.per_expected, length_var = length.fit()
        self.fixed = fixed + last
        self.fixed_var = first_var + decode_var
        # Longer texts vary more: their coefficient of variation stays. Few samples leave the mean itself unsure.
        self.token_var = 0.0
        if length.mean_y > _NOTHING:
            variation = length_var / (length.mean_y * length.mean_y)
            self.token_var = self.per_token * self.per_token * variation * (1.0 + 1.0 / length.samples)

    def _fit_work(self, cost_first: Line, cost_length: Line, last: float, decode_var: float) -> None:
        """Of work that is known by its cost."""
        first, first_per_cost, first_var = cost_first.fit()
        few, tokens_per_cost, length_var = cost_length.fit()
        self.base = first + last + self.per_token * few
        self.per_cost = first_per_cost + self.per_token * tokens_per_cost
        self.mean_cost = cost_length.mean_x
        self.mean = mean = self.base + self.per_cost * self.mean_cost
        self.var = first_var + decode_var + self.per_token * self.per_token * length_var
        self.square = mean * mean
        self.variation = variation = self.var / self.square if mean > _NOTHING else 0.0
        self.unsure = variation / cost_length.samples
        # 0: the cost tells all. 1: as memoryless as an exponential time, or more so.
        self.unknown = min(1.0, variation)
        # Of what started together the short ones end first. While some still run, the likeliest mean of exponential
        # times is all time spent over all ends (Epstein & Sobel, "Life testing", 1953); times that vary less are
        # misjudged less, and so are all as ends become many.
        self.censored = self.unknown / (cost_length.count * mean) if mean > _NOTHING else 0.0
        # Residual life paradox (Feller, "An Introduction to Probability Theory", vol. 2, I.4): met at a random moment
        # an attempt has not half its mean left, but more, since long ones are met more often.
        self.usual_left = 0.5 * mean * (1.0 + variation)
        total_var = self.var + self.per_cost * self.per_cost * cost_length.var_x
        self.left_elsewhere = 0.5 * (mean + total_var / mean) if mean > _NOTHING else 0.0

    def left(self, running: int, busy_cost: float, busy_elapsed_s: float, slots: int) -> tuple[float, float]:
        """Seconds of running work to be done before a first task can start, and their variance.

        Between what memoryless attempts have left, whatever their age, and what those of known length have.
        """
        unknown = self.unknown
        total = self.base * running + self.per_cost * busy_cost
        all_left = 0.0
        if unknown > 0.0:  # of the usual size, and as much more or less as these are expected to take
            forgetful = total + running * (self.usual_left - self.mean)
            if forgetful > 0.0:
                all_left = unknown * forgetful
        if unknown < 1.0:
            rest = total - busy_elapsed_s
            overdue = 2.5 * self.var * running  # what has no time left is expected to need 0.8 deviations more
            all_left += (1.0 - unknown) * 0.5 * (rest + sqrt(rest * rest + overdue))
        others = slots - 1
        left = max(all_left - others * self.left_elsewhere, all_left / (slots * slots))
        phases = self.square * others / (12.0 * slots)  # of lengths known, ends spread evenly
        return left, unknown * left * left + (1.0 - unknown) * phases


def probability_within(estimate: Estimate, seconds: float, then: Estimate | None = None) -> float:
    """The chance that the time, and the time `then` after it, are over within `seconds`: 0 … 1.

    Each is taken for a gamma time, their sum for a shifted gamma time with the same three moments: a short wait before
    a long run keeps the skew of the run. Where `then` varies more than an exponential time they are taken for
    lognormal, as lengths of texts with a long tail are.
    """
    if not seconds > 0.0:
        return 0.0
    mean, var = estimate.mean_s, estimate.var_s2
    third = var * var / mean if mean > _NOTHING else 0.0
    heaviness = 2.0
    if then is not None and then.mean_s > _NOTHING:
        variation = then.var_s2 / (then.mean_s * then.mean_s)
        if variation > _LONG_TAIL:
            heaviness = 3.0 + variation
        mean += then.mean_s
        var += then.var_s2
        third += then.var_s2 * then.var_s2 / then.mean_s
    if mean <= _NOTHING or var <= _FLAT * mean * mean:
        return 1.0 if seconds >= mean else 0.0
    deviation = sqrt(var)
    if seconds > mean + _CERTAIN * deviation:
        return 1.0
    skew = heaviness * third / (var * deviation)
    z = (seconds - mean) / deviation
    normal = _normal_of_gamma(z, skew) if heaviness == 2.0 else _normal_of_lognormal(z, skew)
    return 0.5 * erfc(-normal * _SQRT_HALF)


def _normal_of_gamma(z: float, skew: float) -> float:
    """The normal deviate below which lies as much as below `z` of a gamma time of mean 0, variance 1 and this skew.

    Wilson & Hilferty, "The distribution of chi-square" (1931): the cube root of a gamma time is nearly normal.
    """
    if skew < 1e-6:
        return z
    above = 1.0 + 0.5 * skew * z  # in means of the unshifted time
    if above <= 0.0:
        return _NEVER
    root: float = above ** (1.0 / 3.0)
    return 6.0 / skew * (root - 1.0) + skew / 6.0


def _normal_of_lognormal(z: float, skew: float) -> float:
    """The same for a lognormal time: its skew is t³ + 3t, with t² + 1 the mean of its exponentiated variance."""
    if skew < 1e-6:
        return z
    root = (0.5 * (skew + sqrt(skew * skew + 4.0))) ** (1.0 / 3.0)
    t = root - 1.0 / root
    above = 1.0 + t * z
    if above <= 0.0:
        return _NEVER
    var = log(1.0 + t * t)
    return (log(above) + 0.5 * var) / sqrt(var)
