"""VPT: visual prompt tuning, as the prompt-learning papers compare with it. Jia et al., ECCV 2022.

Learned tokens among the patches, the towers frozen. With Q_i (b, w) learned, i = 0 … J - 1, and blocks B_i,

    [x_1, _]   = B_0([x_0, Q_0])                        x_0: class token, patches, positions
    [x_{i+1}, _] = B_i([x_i, Q_i])        0 < i < J     what became of the prompts before is thrown away
    [x_{i+1}, q_{i+1}] = B_i([x_i, q_i])  i ≥ J

Q_0 stands before the first norm and has no position. J = 1 is the shallow form. A picture's logits are its
scaled cosines with the zero-shot text vectors, which never change.

The form is that of Khattak et al. (MaPLe, CVPR 2023): no head is trained as in the paper of 2022, prompts are
drawn from N(0, 0.02²) and stand behind the patches. A tower of fewer than J blocks has prompts before each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from typing import ClassVar, TypeVar

from torch import Tensor, nn

from clipworks.core.clip import Clip
from clipworks.data.captions import ClassTexts
from clipworks.methods.adapt.base import ImageTower, TrainedAdapter
from clipworks.parts.dassl import DasslFile
from clipworks.parts.prompts import (
    depth_in,
    prompted_images,
    random_prompts,
    read_vision_prompts,
    vision_tower,
)
from clipworks.parts.shots import Shots

V = TypeVar("V", bound="VisionPrompts")


@dataclass(eq=False, repr=False, kw_only=True)
class VisionPrompts(TrainedAdapter):
    """Learned tokens in the image tower.

    Args:
        length: b, tokens before each block.
        depth: J, how many blocks have them; 1 is the shallow form.
    """

    length: int = 8
    depth: int = 12
    lr: float = 0.0025
    epochs: int = 5
    batch_size: int = 4
    views: int = 1
    crop: tuple[float, float] = (0.08, 1.0)

    image_tower: ClassVar[ImageTower] = "trained"
    retargets: ClassVar[bool] = True

    def _prepare(self, shots: Shots | None) -> nn.Module:
        tower = vision_tower(self._model)
        depth = depth_in(tower, self.depth, self.length)
        return nn.ModuleDict({"vision": random_prompts(depth, self.length, tower.width)})

    def _encode(self, pixels: Tensor) -> Tensor:
        return prompted_images(vision_tower(self._model), pixels, list(self.module_["vision"]))

    @classmethod
    def from_checkpoint(
        cls: type[V], path: str | PathLike[str], clip: Clip, class_names: Sequence[str] | ClassTexts
    ) -> V:
        """Prompts that the authors of MaPLe released for this baseline, `prompt_learner/model.pth.tar-5`.

        Raises:
            CheckpointError: if it is no such file, or was trained on another Clip.
        """
        file = DasslFile(path)
        vision = read_vision_prompts(file, vision_tower(clip).width)
        file.finish(clip)
        made = cls(clip, class_names, length=len(vision[0]), depth=len(vision))
        return made._learned_elsewhere({f"vision.{i}": prompt for i, prompt in enumerate(vision)})
