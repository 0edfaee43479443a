"""Language models that rewrite captions: any causal one of transformers, and the generated world's own.

See `rewrite` for what they are asked.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipworks.data.rewrite import caption_in
from clipworks.data.world.captions import rewrite as say_otherwise
from clipworks.errors import CheckpointError, ConfigError, require


@dataclass
class CausalModel:
    """A causal language model of transformers with its tokenizer. Numbers: the authors' with LLaMA-7B.

    Each answer is sampled with a generator of its own, so it does not depend on what else is in the batch,
    and stops at the first new line.

    Attributes:
        model: with `generate`, on its device.
        tokenizer: of that model.
        temperature, top_p: of the sampling.
        new_tokens: the longest answer.
        context: the longest prompt with its answer.
    """

    model: Any
    tokenizer: Any
    temperature: float = 0.9
    top_p: float = 0.95
    new_tokens: int = 77
    context: int = 512

    def __post_init__(self) -> None:
        if self.temperature <= 0 or not 0 < self.top_p <= 1:
            raise ConfigError(f"temperature {self.temperature} or top_p {self.top_p} is out of range")
        self.tokenizer.padding_side = "left"

    @classmethod
    def load(cls, folder: str | Path, device: str = "cpu", **options: Any) -> CausalModel:
        """From a folder that transformers wrote.

        Raises:
            MissingExtra: without transformers.
            CheckpointError: if the folder holds no such model.
        """
        transformers = require("transformers", extra="language", purpose="a language model")
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
            model = transformers.AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(
                f"{folder}: holds no causal language model with its tokenizer ({str(error).splitlines()[0]})"
            ) from error
        return cls(model.eval().to(device), tokenizer, **options)

    def shorten(self, caption: str, prompt_of: Callable[[str], str]) -> str:
        """The caption, cut so that its prompt leaves room for a whole answer.

        Raises:
            ConfigError: if the examples alone leave none.
        """
        ids = self.tokenizer(caption, add_special_tokens=False)["input_ids"]
        while (
            over := len(self.tokenizer(prompt_of(caption))["input_ids"]) + self.new_tokens - self.context
        ) > 0:
            if not ids:
                raise ConfigError(
                    f"a context of {self.context} tokens has no room for the examples and "
                    f"{self.new_tokens} tokens more"
                )
            ids = ids[:-over]
            caption = self.tokenizer.decode(ids).strip()
        return caption

    @torch.no_grad()
    def complete(self, prompts: list[str], seeds: list[int]) -> list[str]:
        """What follows each prompt, up to the first new line."""
        transformers = require("transformers", extra="language", purpose="a language model")
        pad = self.tokenizer.pad_token_id
        if pad is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
            pad = self.tokenizer.pad_token_id
        inputs = self.tokenizer(prompts, return_tensors="pt", padding=True).to(self.model.device)
        ends = sorted({*self._line_ends, *([] if (eos := self.tokenizer.eos_token_id) is None else [eos])})
        settings = transformers.GenerationConfig(
            do_sample=False,  # the choice is made in `_Sampling`
            max_new_tokens=self.new_tokens,
            eos_token_id=ends or None,
            pad_token_id=pad,
        )
        sampling = _Sampling(seeds, self.temperature, self.top_p)
        found = self.model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            generation_config=settings,
            logits_processor=[sampling],
        )
        answers = found[:, inputs["input_ids"].shape[1] :]
        return [str(text) for text in self.tokenizer.batch_decode(answers, skip_special_tokens=True)]

    @cached_property
    def _line_ends(self) -> list[int]:
        texts = self.tokenizer.batch_decode([[token] for token in range(len(self.tokenizer))])
        return [token for token, text in enumerate(texts) if "\n" in text]


class _Sampling:
    """Nucleus sampling as a change of the scores, after which the largest one is the sample.

    The largest of log-probabilities with independent Gumbel noise is distributed as the probabilities say.
    Each row has its own generator.
    """

    def __init__(self, seeds: list[int], temperature: float, top_p: float):
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.temperature, self.top_p = temperature, top_p

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores (B, V) to noisy ones of the same shape."""
        scores = scores.float() / self.temperature
        ordered, order = scores.sort(dim=-1, descending=True)
        probabilities = ordered.softmax(dim=-1)
        outside = probabilities.cumsum(dim=-1) - probabilities >= self.top_p
        scores = scores.masked_fill(outside.scatter(-1, order, outside), float("-inf"))
        size = scores.shape[-1]
        uniform = torch.stack(
            [torch.rand(size, generator=one, dtype=torch.float64) for one in self.generators]
        )
        noise = -torch.log(-torch.log(uniform.clamp(1e-300, 1 - 1e-16)))
        return scores + noise.to(scores)


class WorldRewriter:
    """Rewrites captions of the generated world by its own rules; it sees the caption and nothing else."""

    def complete(self, prompts: list[str], seeds: list[int]) -> list[str]:
        """The caption of each prompt in other words."""
        return [
            " " + say_otherwise(caption_in(text), seed=seed)
            for text, seed in zip(prompts, seeds, strict=True)
        ]
