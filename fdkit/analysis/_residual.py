"""A linear map from a student's tokens to a teacher's, and what it leaves unexplained of other tokens."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fdkit.analysis._moments import Moments
from fdkit.errors import DataError, NumericsError

SMALLEST_EIGENVALUE = 1e-12
"""Less variance than this share of the largest, or of the mean square, is rounding of float32 and not signal."""

RIDGES = tuple(10.0**power for power in range(-6, 3))
"""Penalties that are tried, in units of the mean variance of the student's channels."""


class LinearMap(NamedTuple):
    """prediction = (x - x_mean) @ weight + y_mean, float64."""

    x_mean: Tensor
    """(C_s,)."""
    weight: Tensor
    """(C_s, C_t)."""
    y_mean: Tensor
    """(C_t,)."""
    ridge: float
    """The penalty, see `_Solver`."""
    num_tokens: int
    """Tokens it was fitted on."""
    explained_variance: float
    """Of these."""

    def predict(self, x: Tensor) -> Tensor:
        """(..., C_t) float64 of student tokens (..., C_s)."""
        return (x.double() - self.x_mean) @ self.weight + self.y_mean

    def to(self, device: torch.device) -> "LinearMap":
        """The same map on a device."""
        x_mean, weight, y_mean = (one.to(device) for one in (self.x_mean, self.weight, self.y_mean))
        return self._replace(x_mean=x_mean, weight=weight, y_mean=y_mean)


class Folds:
    """Moments of student and teacher tokens side by side, of every other image and of those between."""

    def __init__(self, student_width: int, teacher_width: int) -> None:
        self.student_width = student_width
        self.halves = [Moments(student_width + teacher_width) for _ in range(2)]
        self._num_images = 0

    def add(self, student: Tensor, teacher: Tensor) -> None:
        """Counts paired tokens (B, N, C_s) and (B, N, C_t)."""
        rows = torch.cat([student, teacher], dim=-1)
        for number, half in enumerate(self.halves):
            own = rows[(number - self._num_images) % 2 :: 2]
            if len(own):
                half.add(own.flatten(0, 1))
        self._num_images += len(rows)

    def fit(self, ridge: float | None) -> LinearMap:
        """The map of least squared error on all; ridge: None chooses among RIDGES what serves best in cross-validation,
        a map of each half measured on the other.

        Raises DataError for too few images, NumericsError if nothing varies.
        """
        whole = Parts.of(merged(*self.halves), self.student_width)
        if whole.num_tokens <= self.student_width:
            raise DataError(
                f"the images to fit on give {whole.num_tokens} tokens: too few for a map of {self.student_width} "
                "channels",
                "use more images: a larger --num-images, or --fit-ratio",
            )
        if whole.target <= SMALLEST_EIGENVALUE * (whole.target + whole.y_mean.square().sum().item()):
            raise NumericsError("the teacher's tokens are alike in all images: there is nothing to explain")
        return _Solver(whole).map(self._best_ridge() if ridge is None else ridge)

    def _best_ridge(self) -> float:
        if min(half.count for half in self.halves) == 0:
            raise DataError(
                "a single image to fit on cannot tell which ridge penalty serves best",
                "use more images, or state it: --ridge 0.01",
            )
        first, second = (Parts.of(half, self.student_width) for half in self.halves)
        solvers = ((_Solver(first), second), (_Solver(second), first))

        def error(ridge: float) -> float:
            return sum(squared_error(solver.map(ridge), other) for solver, other in solvers)

        return min(RIDGES, key=error)


class Parts(NamedTuple):
    """The moments of student (x) and teacher (y) tokens, each in its place."""

    num_tokens: int
    x_mean: Tensor
    y_mean: Tensor
    within: Tensor
    """(C_s, C_s): the covariance of x."""
    across: Tensor
    """(C_s, C_t): that of x with y."""
    target: float
    """The variance of y, summed over channels."""

    @classmethod
    def of(cls, moments: Moments, width: int) -> "Parts":
        covariance, mean = moments.covariance(), moments.mean
        target = covariance[width:, width:].trace().item()
        return cls(
            moments.count,
            mean[:width],
            mean[width:],
            covariance[:width, :width],
            covariance[:width, width:],
            target,
        )


class _Solver:
    """Ridge regression with any penalty, from one decomposition.

    The penalty is added to the covariance's diagonal, in units of its mean; the intercept is not penalised. Directions
    in which the student does not vary get no weight, so that 0 gives the least squares of smallest norm.
    """

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.values, self.directions = torch.linalg.eigh(parts.within)
        self.along = self.directions.T @ parts.across

    def map(self, ridge: float) -> LinearMap:
        """The map for a penalty."""
        parts = self.parts
        is_signal = self.values > SMALLEST_EIGENVALUE * self.values[-1].clamp_min(0)
        inverse = torch.where(is_signal, 1 / (self.values + ridge * self.values.mean()), 0)
        weight = self.directions @ (inverse[:, None] * self.along)
        plain = LinearMap(parts.x_mean, weight, parts.y_mean, ridge, parts.num_tokens, 0.0)
        share = squared_error(plain, parts) / (parts.num_tokens * parts.target) if parts.target > 0 else 1.0
        return plain._replace(explained_variance=1 - share)


def squared_error(linear: LinearMap, parts: Parts) -> float:
    """Of a map on the tokens that moments were taken of, summed over tokens and channels."""
    weight = linear.weight
    gap = parts.y_mean - linear.y_mean - (parts.x_mean - linear.x_mean) @ weight
    inner = (weight * (parts.within @ weight)).sum() - 2 * (weight * parts.across).sum()
    return parts.num_tokens * (parts.target + inner + gap.square().sum()).item()


def merged(first: Moments, second: Moments) -> Moments:
    """The moments of the rows of both."""
    both = Moments(len(first.mean))
    both.count = first.count + second.count
    gap = second.mean - first.mean
    share = second.count / both.count
    both.mean = first.mean + share * gap
    both.scatter = first.scatter + second.scatter + first.count * share * gap.outer(gap)
    return both


class Unexplained:
    """Squared errors of predictions, and the squared deviations they are set against, over images that stream by.

    A deviation is from the map's y_mean, so that 0 is what answering each channel's mean gives. The class token stands
    far from the patches, and most of that is explained by saying which token it is; "between images" its deviation is
    from its own mean over the images instead.
    Memory: sums a channel and a place, and one number an image.
    """

    def __init__(self, linear: LinearMap, *, num_tokens: int, num_prefix: int) -> None:
        self.linear = linear
        self.num_prefix = num_prefix
        self.num_images = 0
        self.by_image: list[float | None] = []
        """Explained variance of each image, in order."""
        width = len(linear.y_mean)
        self._errors = linear.y_mean.new_zeros(num_tokens, width)
        self._offsets = linear.y_mean.new_zeros(num_tokens, width)
        self._deviations = linear.y_mean.new_zeros(num_tokens, width)

    def add(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Counts paired tokens (B, N, C_s) and (B, N, C_t); their squared errors, (B, N), summed over channels."""
        target = teacher.double()
        errors = (self.linear.predict(student) - target).square_()
        offsets = target - self.linear.y_mean
        self._errors += errors.sum(0)
        self._offsets += offsets.sum(0)
        deviations = offsets.square_()
        self._deviations += deviations.sum(0)
        of_tokens = errors.sum(-1)
        self.by_image += explained(of_tokens.sum(-1), deviations.sum((1, 2)))
        self.num_images += len(target)
        return of_tokens

    def deviation_of_a_token(self) -> float:
        """Mean over tokens of the squared deviation of their channels together."""
        return (self._deviations.sum() / (len(self._deviations) * self.num_images)).item()

    def numbers(self, grid: tuple[int, int]) -> dict[str, Any]:
        """The "explained_variance" of all, "by_channel", "by_position" as rows of the grid, and of the "class_token".

        None where a part does not vary, and for a class token that was not compared.
        """
        (total,) = explained(self._errors.sum()[None], self._deviations.sum()[None])
        by_position = explained(self._errors.sum(1), self._deviations.sum(1))
        return {
            "explained_variance": total,
            "by_channel": explained(self._errors.sum(0), self._deviations.sum(0)),
            "by_position": _rows(by_position[self.num_prefix :], grid),
            "class_token": by_position[0] if self.num_prefix else None,
            "class_token_between_images": self._between_images() if self.num_prefix else None,
        }

    def _between_images(self) -> float | None:
        between = self._deviations[0] - self._offsets[0].square() / self.num_images
        between = between * (between > SMALLEST_EIGENVALUE * self._deviations[0])  # the rest is rounding
        return explained(self._errors[0].sum()[None], between.sum()[None])[0]


def _rows(values: list[float | None], grid: tuple[int, int]) -> list[list[float | None]]:
    return [values[start : start + grid[1]] for start in range(0, grid[0] * grid[1], grid[1])]


def explained(errors: Tensor, deviations: Tensor) -> list[float | None]:
    """1 - error / deviation of each, at most 1 and below 0 for what is worse than the mean; None without deviation."""
    pairs = zip(errors.tolist(), deviations.tolist(), strict=True)
    return [1 - error / deviation if deviation > 0 else None for error, deviation in pairs]
