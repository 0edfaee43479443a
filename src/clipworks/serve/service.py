"""Service: what is answered, without HTTP. The model is used by one thread alone (see `batching`).

Pictures are decoded by a few threads of their own, the index is asked by one.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import hmac
import os
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch import Tensor

from clipworks.core.clip import Clip
from clipworks.core.tokenizer import Tokens
from clipworks.data.captions import ClassTexts, fill
from clipworks.encode.bulk import encode_images, encode_texts, tokenize
from clipworks.errors import ConfigError, DataError, PictureError
from clipworks.parts.dense import dense_tower
from clipworks.parts.features import Views, content
from clipworks.serve import fetch, uploads
from clipworks.serve.batching import Batcher
from clipworks.serve.settings import USUAL, Limits

if TYPE_CHECKING:
    from clipworks.methods.adapt.gda import GDA
    from clipworks.methods.dense.maskclip import MaskCLIP
    from clipworks.parts.segmentation import Segmentation
    from clipworks.search import Hit, Index

T = TypeVar("T")
TEMPLATE = "a photo of {a} {}."
HEADS = 256  # lists of labels whose vectors are remembered
SHORT = 4096  # characters that are tokenized at once, without a thread
STALE = 30.0  # seconds after which the index is looked at anew
READERS = max(1, min(8, os.cpu_count() or 1))
Kind = Literal["image", "text"]


class NotFound(DataError):
    """Something that is asked for by name and is not there."""


@dataclass(frozen=True)
class Fitted:
    """A classifier fitted to a few pictures, and how many there were of each class."""

    estimator: GDA
    counts: dict[str, int]


class Service:
    """One Clip, perhaps an index, and the classifiers that were fitted.

    Args:
        clip: on its device.
        name: what it is called.
        index: to be searched; made with this Clip.
        limits: what is refused.
        urls: fetch pictures from public addresses.
        observe: told the kind, the size and the seconds of every batch.
    """

    def __init__(
        self,
        clip: Clip,
        *,
        name: str,
        index: Index | None = None,
        limits: Limits = USUAL,
        urls: bool = False,
        observe: Callable[[str, int, float], None] = lambda kind, size, seconds: None,
    ) -> None:
        self.clip, self.name, self.index, self.limits, self.urls = clip.eval(), name, index, limits, urls
        self.batcher = Batcher(
            {"text": self._encode_texts, "image": self._encode_images},
            largest=limits.batch,
            wait=limits.wait,
            capacity=limits.queue,
            observe=observe,
        )
        if index is not None:
            index.bind(clip)
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="clipworks-reader")
        self._searcher = ThreadPoolExecutor(1, thread_name_prefix="clipworks-search")
        self._looked = time.monotonic()
        self._heads: OrderedDict[tuple[str, ...], Tensor] = OrderedDict()
        self._fitted: OrderedDict[str, Fitted] = OrderedDict()
        self._secret = secrets.token_bytes(32)

    def close(self) -> None:
        """Finish what was accepted, and end the threads."""
        self.batcher.close()
        self._readers.shutdown()
        self._searcher.shutdown()

    # --- vectors ---

    async def embed(self, inputs: Sequence[str | bytes], kinds: Sequence[Kind]) -> tuple[Tensor, int]:
        """Unit vectors (n, D) of texts and pictures in their order, and how many tokens the texts had.

        Raises:
            Busy, Closed: as `Batcher.reserve`.
            PictureError, DataError, ConfigError: for an input that cannot be used.
        """
        texts = [one for one, kind in zip(inputs, kinds, strict=True) if kind == "text"]
        pictures = [one for one, kind in zip(inputs, kinds, strict=True) if kind == "image"]
        with self._room(len(inputs)):
            tokens = await self._tokens([str(text) for text in texts])
            pixels = await self._pixels(pictures)
            words, seen = await asyncio.gather(self._batched("text", tokens), self._batched("image", pixels))
        rows = {"text": iter(words), "image": iter(seen)}
        vectors = [next(rows[kind]) for kind in kinds]
        return torch.stack(vectors), sum(int(one.ends) + 1 for one in tokens)

    async def head(self, labels: Sequence[str], template: str = TEMPLATE) -> Tensor:
        """The zero-shot head (C, D) of labels in a template; the last ones are remembered.

        Raises:
            ConfigError: for a template without `{}`, an empty label, or one that appears twice.
        """
        if "{}" not in template:
            raise ConfigError(f"the template {template!r} has no {{}} for the label")
        if not all(label.strip() for label in labels):
            raise ConfigError("a label is empty; every label needs a name")
        if len(set(labels)) < len(labels):
            twice = next(label for place, label in enumerate(labels) if label in labels[:place])
            raise ConfigError(f"the label {twice!r} is given more than once")
        key = (template, *labels)
        if key not in self._heads:
            prompts = [fill(template, label) for label in labels]
            found, _ = await self.embed(prompts, ["text"] * len(prompts))
            self._heads[key] = found
        self._heads.move_to_end(key)
        while len(self._heads) > HEADS:
            self._heads.popitem(last=False)
        return self._heads[key]

    async def classify(
        self, pictures: Sequence[str | bytes], labels: Sequence[str], template: str = TEMPLATE
    ) -> Tensor:
        """Probabilities (n, C) of the labels for each picture."""
        head = await self.head(labels, template)
        vectors, _ = await self.embed(pictures, ["image"] * len(pictures))
        with torch.no_grad():
            return self.clip.logits(vectors, head.to(vectors)).softmax(dim=-1)

    # --- places ---

    @property
    def segmenter(self) -> MaskCLIP:
        """What says where things are.

        Raises:
            ConfigError: if the image tower has no places.
        """
        from clipworks.methods.dense.maskclip import MaskCLIP

        dense_tower(self.clip)
        return MaskCLIP(self.clip, progress=False)

    async def segment(
        self,
        picture: str | bytes,
        labels: Sequence[str],
        *,
        background: str | None = None,
        unknown_below: float | None = None,
        template: str = TEMPLATE,
        side: int = 1024,
    ) -> Segmentation:
        """What `MaskCLIP` finds in a picture that is made smaller first, if its longer side exceeds `side`.

        Raises:
            ConfigError, PictureError: as `Segmenter.segment`.
        """
        from clipworks.methods.dense.base import Asked

        head = await self.head(labels, template)
        segmenter = self.segmenter
        if background is not None and background not in labels:
            raise ConfigError(f"the background {background!r} is none of the labels")
        place = None if background is None else labels.index(background)
        asked = Asked(ClassTexts(labels, templates=(template,)), head, place)
        with self._room(1):
            data = await self._file(picture)
            image = await self._in(self._readers, uploads.picture_of, data, side, self.limits.pixels)
            call = self.batcher.call(lambda: segmenter.segment(image, asked, unknown_below=unknown_below))
            return await asyncio.wrap_future(call)

    # --- search ---

    async def search(
        self,
        text: str | None,
        picture: str | bytes | None,
        *,
        k: int,
        where: str | None,
        kind: Kind | None,
    ) -> list[Hit]:
        """What `Index.query` finds.

        Raises:
            NotFound: if there is no index.
            ConfigError, PictureError: as `Index.query`.
        """
        index = self._index
        from clipworks.search import questions

        terms = [] if text is None else questions.parse(text)
        if len(terms) > 32:
            raise ConfigError(f"a query has at most 32 parts, not {len(terms)}")
        inputs: list[str | bytes] = [str(term.content) for term in terms]
        weights, kinds = [term.weight for term in terms], list[Kind](["text"] * len(terms))
        if picture is not None:
            inputs, weights, kinds = [*inputs, picture], [*weights, 1.0], [*kinds, "image"]
        if not inputs:
            raise ConfigError("a query is a text, a picture or both: give one of them")
        vectors, _ = await self.embed(inputs, kinds)
        wanted = questions.combine([weight * row for weight, row in zip(weights, vectors, strict=True)])

        def ask() -> list[Hit]:
            self._look()
            return index.search(wanted.numpy(), k=k, where=where, kind=kind)

        return await self._in(self._searcher, ask)

    async def about_index(self) -> dict[str, Any] | None:
        """How many pictures and texts the index holds, and its fields; None without one."""
        index = self.index
        if index is None:
            return None

        def ask() -> dict[str, Any]:
            self._look()
            about = index.info()
            return {name: about[name] for name in ("pictures", "texts", "fields")}

        return await self._in(self._searcher, ask)

    def signature(self, path: str) -> str:
        """What proves that this service named a path; valid as long as it runs."""
        return hmac.new(self._secret, path.encode("utf-8", "surrogatepass"), hashlib.sha256).hexdigest()[:32]

    async def thumbnail(self, path: str, signature: str, side: int) -> bytes:
        """A picture of the index as a JPEG.

        Raises:
            NotFound: if this service has not named that path, or its file cannot be read any more.
        """
        if not hmac.compare_digest(self.signature(path).encode(), signature.encode("utf-8", "surrogatepass")):
            raise NotFound("no such picture")
        try:
            return await self._in(self._readers, uploads.thumbnail, path, side, self.limits.pixels)
        except PictureError as error:
            raise NotFound("the picture cannot be read") from error

    @property
    def _index(self) -> Index:
        if self.index is None:
            raise NotFound("this service has no index: start it with --index FOLDER")
        return self.index

    def _look(self) -> None:
        """See what was built since; on the index's thread."""
        now = time.monotonic()
        if self.index is not None and now - self._looked > STALE:
            self._looked = now
            self.index.refresh()

    # --- few shots ---

    async def fit(
        self, classes: Sequence[tuple[str, Sequence[str | bytes]]], views: int
    ) -> tuple[str, Fitted]:
        """Fit GDA to some pictures a class, and keep it under a new name.

        Args:
            classes: names with pictures.
            views: random views of each picture; 0 is the plain picture.

        Raises:
            ConfigError, DataError, PictureError: for what GDA cannot be fitted to.
        """
        from clipworks.methods.adapt.gda import GDA

        names = [name.strip() for name, _ in classes]
        if not all(names) or len(set(names)) < len(names):
            raise ConfigError("every class needs a name of its own")
        pictures = [picture for _, several in classes for picture in several]
        labels = [name for name, (_, several) in zip(names, classes, strict=True) for _ in several]
        plan, rows = Views(views), list[Tensor]()
        if len(pictures) * len(plan) > self.limits.queue:
            raise ConfigError(
                f"{len(pictures)} pictures in {len(plan)} views are more than {self.limits.queue}: give fewer"
            )
        # A few at a time: views are large, and others shall have their turn in between.
        step = max(1, 2 * self.limits.batch // len(plan))
        with self._room(len(pictures)):
            for start in range(0, len(pictures), step):
                files = [await self._file(picture) for picture in pictures[start : start + step]]
                made = await asyncio.gather(
                    *(self._in(self._readers, self._views, one, plan) for one in files)
                )
                rows += await self._batched("image", [view for several in made for view in several])
        features = torch.stack(rows).unflatten(0, (len(pictures), len(plan)))
        estimator = GDA(clip=self.clip, keep_features=False, progress=False)
        await asyncio.wrap_future(self.batcher.call(lambda: estimator.fit(features, labels)))
        name = secrets.token_hex(8)
        fitted = self._fitted[name] = Fitted(estimator, {one: labels.count(one) for one in sorted(names)})
        while len(self._fitted) > self.limits.classifiers:
            self._fitted.popitem(last=False)
        return name, fitted

    async def predict(self, name: str, pictures: Sequence[str | bytes]) -> tuple[list[str], Tensor]:
        """The classes of a fitted classifier, and their probabilities (n, C) for each picture.

        Raises:
            NotFound: if there is no such classifier (any more).
        """
        fitted = self._fitted.get(name)
        if fitted is None:
            raise NotFound(f"there is no classifier {name!r}; fit it again")
        self._fitted.move_to_end(name)
        vectors, _ = await self.embed(pictures, ["image"] * len(pictures))
        call = self.batcher.call(lambda: fitted.estimator.predict_proba(vectors))
        found = await asyncio.wrap_future(call)
        return list(fitted.counts), torch.from_numpy(found)

    def forget(self, name: str) -> None:
        """Drop a classifier.

        Raises:
            NotFound: if there is none.
        """
        if self._fitted.pop(name, None) is None:
            raise NotFound(f"there is no classifier {name!r}")

    def _views(self, data: bytes, plan: Views) -> list[Tensor]:
        pixels = uploads.pixels_of(data, self.clip.preprocessing, self.limits.pixels)
        key = content(data).hex()
        return [plan.make(pixels[None], [key], number)[0] for number in range(len(plan))]

    # --- inputs ---

    @contextmanager
    def _room(self, count: int) -> Iterator[None]:
        if count > self.limits.queue:
            raise ConfigError(f"a request has at most {self.limits.queue} inputs, not {count}")
        with self.batcher.reserve(count):
            yield

    async def _tokens(self, texts: Sequence[str]) -> list[Tokens]:
        """One by one, (1, L) each."""
        if not texts:
            return []
        for text in texts:
            if len(text) > self.limits.characters:
                raise ConfigError(
                    f"a text has {len(text)} characters; at most {self.limits.characters} are read"
                )
        if sum(map(len, texts)) <= SHORT:
            tokens = tokenize(self.clip, texts)
        else:
            tokens = await self._in(self._readers, tokenize, self.clip, list(texts))
        return [tokens[row] for row in range(len(tokens))]

    async def _pixels(self, pictures: Sequence[str | bytes]) -> list[Tensor]:
        return list(await asyncio.gather(*(self._prepared(picture) for picture in pictures)))

    async def _prepared(self, picture: str | bytes) -> Tensor:
        data = await self._file(picture)
        return await self._in(
            self._readers, uploads.pixels_of, data, self.clip.preprocessing, self.limits.pixels
        )

    async def _file(self, picture: str | bytes) -> bytes:
        if isinstance(picture, bytes):
            return picture
        if not uploads.is_address(picture):
            return uploads.decoded(picture)
        if not self.urls:
            raise PictureError("pictures are not fetched from addresses here; send base64 or a file")
        return await self._in(self._readers, functools.partial(fetch.fetch, picture, limit=self.limits.body))

    async def aside(self, function: Callable[[], T]) -> T:
        """The result of a function that takes so long that others should be answered meanwhile."""
        return await self._in(self._readers, function)

    async def _in(self, pool: ThreadPoolExecutor, function: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(pool, function, *arguments)

    async def _batched(self, kind: Kind, inputs: Sequence[Any]) -> list[Tensor]:
        return await asyncio.wrap_future(self.batcher.submit(kind, inputs))

    # --- on the model's thread ---

    def _encode_texts(self, tokens: Sequence[Tokens]) -> Sequence[Tensor]:
        return list(encode_texts(self.clip, Tokens.cat(tokens)).cpu())

    def _encode_images(self, pixels: Sequence[Tensor]) -> Sequence[Tensor]:
        if any(one.is_floating_point() for one in pixels):
            pixels = [one if one.is_floating_point() else one.float() / 255 for one in pixels]
        return list(
            encode_images(self.clip, torch.stack(list(pixels)), batch_size=len(pixels)).features.cpu()
        )
