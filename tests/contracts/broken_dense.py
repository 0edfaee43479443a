"""Methods that each break one promise of the family `dense`, and one that keeps them all.

They are what shows that the checks of the contract can fail.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from clipworks.core.clip import Clip, unit
from clipworks.data.captions import ClassTexts
from clipworks.methods.dense.base import Asked, Scores, Segmenter, Unreadable
from clipworks.parts.dense import all_vectors
from clipworks.parts.frozen import undisturbed
from clipworks.parts.segmentation import Segmentation, read_mask


@dataclass(eq=False, repr=False)
class Sound(Segmenter):
    """Keeps every promise: cosines after a learned mean is taken off, with a little noise from the seed."""

    def fit(self, images: Sequence[Any], masks: Sequence[Any]) -> Any:
        """The mean of all places that have a label."""
        pictures = [self._scaled(image) for image in images]
        for (_, size), mask in zip(pictures, masks, strict=True):
            self._mask(mask, size)
        generator = torch.Generator().manual_seed(self.seed)
        self.mean_ = 1e-2 * torch.randn(self.clip.config.width, generator=generator)
        for image in images:
            self.mean_ += self._places(image).mean(dim=(1, 2)) / len(images)
        return self

    def score(self, images: Sequence[Any]) -> Scores:
        """How far places are from the mean."""
        maps = []
        for image in images:
            _, size = self._scaled(image)
            maps.append(self._far(F.interpolate(self._places(image)[None], size, mode="bilinear")[0]))
        return Scores(torch.stack([one.amax() for one in maps]), maps)

    def _far(self, places: Tensor) -> Tensor:
        return (1 - unit(places.movedim(0, -1)) @ unit(self.mean_)).clamp(0, 2) / 2

    def _places(self, image: Any) -> Tensor:
        with undisturbed(self.clip), torch.no_grad():
            pixels = torch.from_numpy(self._scaled(image)[0].copy()).movedim(2, 0)[None].float() / 255
            pixels = F.interpolate(pixels, (32, 32), mode="bilinear")
            return all_vectors(self.tower, pixels)[1][0]

    def _maps(self, pixels: Tensor, asked: Asked) -> Tensor:
        features = all_vectors(self.tower, pixels)[1] - self.mean_[:, None, None]
        cosines = torch.einsum("bdhw,kd->bkhw", F.normalize(features, dim=1), asked.vectors)
        likely = (20 * cosines).softmax(dim=1)
        return likely if asked.background is None else self._lowered(likely, asked.background)

    def _lowered(self, likely: Tensor, background: int) -> Tensor:
        shares = torch.ones(likely.shape[1])
        shares[background] = 0.5
        return likely * shares[:, None, None]

    def _mask(self, mask: Any, size: tuple[int, int]) -> Any:
        return read_mask(mask, size)

    def _learned(self) -> dict[str, Tensor]:
        return {"mean": self.mean_} if hasattr(self, "mean_") else {}

    def _restore(self, tensors: Mapping[str, Tensor]) -> None:
        self.mean_ = tensors["mean"]


def learn(method: Sound, images: Sequence[Any], masks: Sequence[Any]) -> Any:
    """How all of these are fitted."""
    return method.fit(images, masks)


class AnswersAtItsOwnSize(Sound):
    def _job(self, image: Any, asked: Asked, stride: int) -> Any:
        job = super()._job(image, asked, stride)
        job.size = (job.pixels.shape[1], job.pixels.shape[2])
        return job


class ScoresAtItsOwnSize(Sound):
    def score(self, images: Sequence[Any]) -> Scores:
        found = super().score(images)
        return replace(found, maps=[one[:4, :4] for one in found.maps])


class GivesCosines(Sound):
    def _scores(self, blended: Tensor, asked: Asked) -> Tensor:
        return 2 * blended - 1


class LabelsTheWorst(Sound):
    def segment(self, *arguments: Any, **options: Any) -> Segmentation:
        found = super().segment(*arguments, **options)
        return replace(found, map=found.scores.argmin(dim=0).to(torch.int16))


class ScoresDistances(Sound):
    def _far(self, places: Tensor) -> Tensor:
        return (places - self.mean_[:, None, None]).norm(dim=0) + 1


class FavorsTheFirstLabel(Sound):
    def _scores(self, blended: Tensor, asked: Asked) -> Tensor:
        return blended * torch.linspace(1, 0.5, len(blended))[:, None, None]


class BackgroundIsTheFirst(Sound):
    def _lowered(self, likely: Tensor, background: int) -> Tensor:
        return super()._lowered(likely, 0)


class IsAlwaysSure(Sound):
    def segment(self, *arguments: Any, unknown_below: Any = None, **options: Any) -> Segmentation:
        return super().segment(*arguments, **options)


class CentersItsBatch(Sound):
    def _maps(self, pixels: Tensor, asked: Asked) -> Tensor:
        likely = super()._maps(pixels, asked)
        return likely / likely.sum(dim=(0, 2, 3), keepdim=True).clamp(min=1)


class ScoresAgainstTheOthers(Sound):
    def score(self, images: Sequence[Any]) -> Scores:
        found = super().score(images)
        return replace(found, image=found.image / found.image.max())


class ChangesTheClip(Sound):
    def _maps(self, pixels: Tensor, asked: Asked) -> Tensor:
        self.clip.scale.add_(1e-3)
        return super()._maps(pixels, asked)


class LeavesTheMode(Sound):
    def score(self, images: Sequence[Any]) -> Scores:
        self.clip.eval()
        return super().score(images)


class LeavesGradients(Sound):
    def fit(self, images: Sequence[Any], masks: Sequence[Any]) -> Any:
        self.clip.scale.square().backward()
        return super().fit(images, masks)


class GlobalNoise(Sound):
    def _maps(self, pixels: Tensor, asked: Asked) -> Tensor:
        likely = super()._maps(pixels, asked)
        return likely * (1 - 1e-3 * torch.rand_like(likely))


class SeedsTheGlobalGenerator(Sound):
    def fit(self, images: Sequence[Any], masks: Sequence[Any]) -> Any:
        torch.manual_seed(self.seed)
        return super().fit(images, masks)


class CopiesTheClip(Sound):
    def __sklearn_clone__(self) -> Any:
        import copy

        return type(self)(**{**self.get_params(), "clip": copy.deepcopy(self.clip)})


class ClonesWhatItLearned(Sound):
    def __sklearn_clone__(self) -> Any:
        twin = super().__sklearn_clone__()
        twin.mean_ = self.mean_
        return twin


class ForgetsWhatItLearned(Sound):
    def _learned(self) -> dict[str, Tensor]:
        return {"mean": torch.ones_like(self.mean_)}


class SavesTheClip(Sound):
    def _tensors(self) -> dict[str, Tensor]:
        return {"mean": self.mean_, **{f"clip.{name}": one for name, one in self.clip.state_dict().items()}}


class TakesAnyClip(Sound):
    @classmethod
    def load(cls, folder: Any, clip: Clip, **settings: Any) -> Any:
        from clipworks.parts import fitted

        about, tensors = fitted.read(Path(folder))
        given = {name: fitted.unplain(value) for name, value in about["settings"].items()}
        loaded = cls(clip, **{**given, **settings})
        loaded._restore(tensors)
        return loaded


class TakesAnyLabels(Sound):
    def _texts(self, labels: Any, background: str | None) -> tuple[ClassTexts, int | None]:
        return ClassTexts([name.strip() or "thing" for name in labels or ["thing"]]), None


class TakesAnySetting(Sound):
    def _scaled_size(self, size: tuple[int, int]) -> tuple[int, int]:
        return size


class SkipsInSilence(Sound):
    def segment_all(self, *arguments: Any, **options: Any) -> Iterator[Segmentation | Unreadable]:
        for found in super().segment_all(*arguments, **{**options, "on_error": "skip"}):
            if isinstance(found, Segmentation):
                yield found


class CutsMasks(Sound):
    def _mask(self, mask: Any, size: tuple[int, int]) -> Any:
        return read_mask(mask)[: size[0], : size[1]]
