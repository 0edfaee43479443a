"""Linear probe: logistic regression on frozen image features. Radford et al., ICML 2021, section 3.2.

With weights W (C, D) and intercepts b, over all views of all examples,

    minimize  C · Σ_i w_i (−log softmax(W x_i + b)_{y_i}) + ½ ‖W‖²

as scikit-learn states it, by L-BFGS. x are of unit length; C = 31.6 is the 0.316 of CLIP's own example, whose
features are about 10 long. (The paper's protocol, on raw features and with C searched, is `evaluate/probe`.)

L-BFGS starts from the curvature that the loss has where all classes are equally likely, (C/K)·XᵀX + I with K
classes: the problem is put into coordinates in which that is the identity. The minimum is the same, and
L-BFGS is there in fewer iterations, about half as many.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from clipworks.core.clip import unit
from clipworks.errors import ConfigError, require
from clipworks.evaluate.probe import best_c
from clipworks.methods.adapt.base import Adapter
from clipworks.parts.descent import hold_out
from clipworks.parts.shots import Shots


@dataclass(eq=False, repr=False, kw_only=True)
class LinearProbe(Adapter):
    """Logistic regression on image features.

    Args:
        C: the inverse of the weight decay, or `"auto"`: chosen by accuracy on the validation data, from
            coarse to fine as CLIP's protocol has it; without such data a fifth of each class is held out.
        iterations: of L-BFGS at most.
        tolerance: stops where no entry of the gradient is larger than this share of the largest at the start.
    """

    C: float | Literal["auto"] = 31.6
    iterations: int = 1000
    tolerance: float = 1e-3

    reads_text: ClassVar[bool] = False

    def _fit(self, shots: Shots, validation: Shots | None) -> None:
        if self.C != "auto" and not (isinstance(self.C, (int, float)) and self.C > 0):
            raise ConfigError(f"C must be a positive number or 'auto', not {self.C!r}")
        chosen = self._search(shots, validation) if self.C == "auto" else float(self.C)
        self.c_ = chosen
        self._solve(shots, chosen)

    def _search(self, shots: Shots, validation: Shots | None) -> float:
        train, held = hold_out(shots, self.seed) if validation is None else (shots, validation)

        def score(c: float) -> float:
            self._solve(train, c)
            right = self._logits(held.vectors[:, 0].to(self._device)).argmax(dim=1).cpu() == held.labels
            return float(right.float().mean())

        return best_c(score)[0]

    def _solve(self, shots: Shots, c: float) -> None:
        optimize = require("scipy.optimize", extra="adapt", purpose="a linear probe")
        views = shots.vectors.shape[1]
        features = unit(shots.vectors.flatten(0, 1)).to(self._device)
        labels = shots.labels.repeat_interleave(views).to(self._device)
        weights = shots.weights.repeat_interleave(views).to(features) * shots.mean_weight
        mean = (weights[:, None] * features).sum(dim=0) / weights.sum()
        x = features - mean  # else intercepts and weights would pull at each other; undone below
        classes, total = len(self.classes_), float(weights.sum())

        curvature = c / classes * (x.mT * weights) @ x
        values, axes = torch.linalg.eigh(curvature.double())
        root = ((values.clamp(min=0) + 1) ** -0.5).to(x.dtype)
        axes = axes.to(x.dtype)
        x = (x @ axes) * root  # W = V·diag(root)·axesᵀ; V has the curvature 1
        bias_root = (classes / (c * total)) ** 0.5

        def evaluate(flat: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
            given = torch.from_numpy(flat).to(x).reshape(classes, -1)
            v, b = given[:, :-1], given[:, -1] * bias_root
            logs = F.log_softmax(torch.addmm(b, x, v.mT), dim=1)
            loss = -(weights * logs.gather(1, labels[:, None])[:, 0]).sum()
            back = logs.exp_()
            back[torch.arange(len(back), device=back.device), labels] -= 1
            back *= weights[:, None]
            gradient = torch.empty_like(given)
            gradient[:, :-1] = c * (back.mT @ x) + v * root**2
            gradient[:, -1] = c * back.sum(dim=0) * bias_root
            value = c * loss.double() + 0.5 * (v * root).double().square().sum()
            # Divided by C·Σw: an example's loss on average, whatever the number of examples.
            scale = c * total
            return float(value / scale), (gradient.double() / scale).flatten().cpu().numpy()

        start = np.zeros(classes * (x.shape[1] + 1))
        steepest = float(np.abs(evaluate(start)[1]).max())
        options = {
            "maxiter": self.iterations,
            "gtol": self.tolerance * steepest,
            "ftol": torch.finfo(x.dtype).eps / 10,  # what the loss falls by below this is rounding
        }
        found: Any = optimize.minimize(evaluate, start, jac=True, method="L-BFGS-B", options=options)
        solution = torch.from_numpy(found.x).to(x).reshape(classes, -1)
        self.n_iter_ = int(found.nit)
        self.coef_ = (solution[:, :-1] * root) @ axes.mT
        self.intercept_ = solution[:, -1] * bias_root - self.coef_ @ mean

    def _class_features(self) -> Tensor:
        return F.normalize(self.coef_, dim=1)

    def _logits(self, features: Tensor) -> Tensor:
        vectors = unit(features)
        return torch.addmm(self.intercept_.to(vectors), vectors, self.coef_.to(vectors).mT)

    @property
    def trainable_parameters(self) -> int:
        """Weights and intercepts."""
        self._check_fitted()
        return self.coef_.numel() + self.intercept_.numel()
