"""The ResNet-50 is the usual one, read from both kinds of files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from clipworks.core.images import fit
from clipworks.errors import CheckpointError
from clipworks.parts import encoders

SIZE = 64


def filled(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, tensor in encoders.ResNet50().state_dict().items():
        if name.endswith("num_batches_tracked"):
            weights[name] = tensor
        elif tensor.ndim > 1:
            fan = tensor[0].numel()
            weights[name] = torch.randn(tensor.shape, generator=generator) * (2 / fan) ** 0.5
        else:
            weights[name] = 0.5 + torch.rand(tensor.shape, generator=generator)
    return weights


def test_files_of_both_kinds_give_the_peers_features(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    weights = filled()
    torch.save(
        {**weights, "fc.weight": torch.zeros(1000, 2048), "fc.bias": torch.zeros(1000)}, tmp_path / "a.pt"
    )
    moco = {f"module.base_encoder.{name}": tensor for name, tensor in weights.items()}
    moco |= {
        "module.base_encoder.fc.0.weight": torch.zeros(4, 4),
        "module.predictor.0.weight": torch.zeros(4),
    }
    moco["module.momentum_encoder.conv1.weight"] = weights["conv1.weight"] + 1
    torch.save({"epoch": 7, "state_dict": moco, "optimizer": {"state": {}}}, tmp_path / "b.pth.tar")

    peer = transformers.ResNetModel(transformers.ResNetConfig(downsample_in_bottleneck=False)).eval()
    peer.load_state_dict(
        {
            theirs(name): tensor
            for name, tensor in weights.items()
            if not (name.endswith("num_batches_tracked") and theirs(name) not in peer.state_dict())
        }
    )
    pixels = torch.rand(2, 3, 48, 48, generator=torch.Generator().manual_seed(1))
    mean, std = (
        torch.tensor(values)[:, None, None] for values in (encoders.IMAGENET_MEAN, encoders.IMAGENET_STD)
    )
    with torch.no_grad():
        expected = peer((fit(pixels, SIZE) - mean) / std).pooler_output.flatten(1)
        for file in ("a.pt", "b.pth.tar"):
            found = encoders.resnet50(tmp_path / file, SIZE)(pixels)
            assert found.shape == (2, 2048)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def theirs(name: str) -> str:
    """transformers' name of a weight of torchvision's."""
    first, _, rest = name.partition(".")
    if first in ("conv1", "bn1"):
        return f"embedder.embedder.{'convolution' if first == 'conv1' else 'normalization'}.{rest}"
    stage = int(first.removeprefix("layer")) - 1
    block, _, rest = rest.partition(".")
    part, _, leaf = rest.partition(".")
    place = f"encoder.stages.{stage}.layers.{block}"
    if part == "downsample":
        number, _, leaf = leaf.partition(".")
        return f"{place}.shortcut.{'convolution' if number == '0' else 'normalization'}.{leaf}"
    number = int(part[-1]) - 1
    return f"{place}.layer.{number}.{'convolution' if part.startswith('conv') else 'normalization'}.{leaf}"


def test_a_file_of_another_network_is_refused(tmp_path: Path) -> None:
    weights = filled()
    del weights["layer3.0.conv2.weight"]
    torch.save(weights, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"layer3\.0\.conv2"):
        encoders.resnet50(tmp_path / "a.pt")
