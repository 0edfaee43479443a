"""Index: pictures and texts by content, found by words, by a picture, or by both.

Building is incremental and survives being killed (see `build`). Vectors have unit length and are compared by
cosine: exactly while there are few, then through an index that reports its own recall (see `neighbors`), or
in memory (see `held`).
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from clipworks.checkpoints.zoo import load
from clipworks.core.pictures import Source
from clipworks.encode.bulk import Encoded, encode_images, encode_texts
from clipworks.encode.precision import Precision
from clipworks.errors import ConfigError, DataError, require
from clipworks.search import neighbors, questions
from clipworks.search.build import Build, Report
from clipworks.search.duplicates import near_duplicates
from clipworks.search.files import Content, Kind
from clipworks.search.held import Held
from clipworks.search.items import Inputs, absolute, file_inputs, inputs, text_inputs
from clipworks.search.neighbors import Settings
from clipworks.search.questions import Term
from clipworks.search.table import SHOWN, Table, exists, local, quoted

if TYPE_CHECKING:
    from clipworks.core.clip import Clip
    from clipworks.encode.engines import Name

Location = str | os.PathLike[str]

PROBES = (
    *("a dog", "a cat on a sofa", "a horse", "a bird in the sky", "a fish", "an elephant", "an insect"),
    *("a man with a hat", "a smiling woman", "children at play", "a crowd of people", "a portrait", "hands"),
    *("a red car", "a bicycle", "a train at a station", "an airplane", "a boat on a lake", "a motorcycle"),
    *("a beach at sunset", "snowy mountains", "a forest", "a field of flowers", "a river", "clouds", "rain"),
    *("a street at night", "a skyline", "a bridge", "an old church", "a house with a garden", "a kitchen"),
    *("a plate of food", "a cup of coffee", "fruit", "a birthday cake", "bread", "a bottle of wine"),
    *(
        "a football match",
        "a person skiing",
        "a concert",
        "a wedding",
        "a painting",
        "a black and white photo",
    ),
    *("a map", "a screenshot", "a page of text", "a logo", "a toy", "a chair", "a clock", "a phone", "shoes"),
)
"""What people look for: questions by which the recall of texts is measured."""


@dataclass(frozen=True)
class Hit:
    """What was found: `score` is its cosine with the query, in [-1, 1].

    Attributes:
        path: of a picture file; of a picture in a shard `shard.tar#key`.
        caption: of a picture, if there is one; of a text the text itself.
        digest: the hash of its content.
        kind: `image` or `text`.
        fields: what else is known of it, by name.
    """

    path: str
    score: float
    width: int
    height: int
    caption: str | None
    digest: str
    kind: Kind = "image"
    fields: Mapping[str, Any] = field(default_factory=dict)


class Index:
    """An index at a location, bound to the model it was made with.

    Attributes:
        location: a folder, or a URI that LanceDB takes (`s3://bucket/index`).
        model: the model's name, by which `clipworks.load` finds it.
    """

    def __init__(self, table: Table, clip: Clip | None = None) -> None:
        self._table = table
        self.location = table.location
        self.model: str = table.about["model"]
        self._clip: Clip | None = None
        self._held: Held | None = None
        self._settings = neighbors.settings_of(table)
        if clip is not None:
            self.bind(clip)

    @classmethod
    def create(
        cls, location: Location, clip: Clip, model: str = "", *, options: Mapping[str, str] | None = None
    ) -> Index:
        """An empty index for what `clip` embeds.

        Args:
            location: a folder that is empty or not there, or a URI.
            clip: the model.
            model: its name, by default that of its config.
            options: for object storage, as LanceDB's `storage_options` has them.

        Raises:
            DataError: if something is at that location.
        """
        about = {"model": model or clip.config.name, "fingerprint": fingerprint(clip), "width": clip.width}
        return cls(Table.create(os.fspath(location), clip.width, about, options), clip)

    @classmethod
    def open(
        cls, location: Location, clip: Clip | None = None, *, options: Mapping[str, str] | None = None
    ) -> Index:
        """The index at a location. Without `clip`, its own model is loaded when it is first needed.

        Raises:
            DataError: if there is no index.
            ConfigError: if `clip` is not the model that the index was made with.
        """
        return cls(Table.open(os.fspath(location), options), clip)

    @staticmethod
    def exists(location: Location, *, options: Mapping[str, str] | None = None) -> bool:
        """Whether an index lies at a location."""
        return exists(os.fspath(location), options)

    def __len__(self) -> int:
        return len(self._table)

    @property
    def clip(self) -> Clip:
        """The index's model.

        Raises:
            ConfigError: if what its name loads today are other weights.
        """
        if self._clip is None:
            return self.bind(load(self.model))
        return self._clip

    def bind(self, clip: Clip) -> Clip:
        """Work with this Clip from now on.

        Raises:
            ConfigError: if it is not the model that the index was made with.
        """
        expected, given = self._table.about["fingerprint"], fingerprint(clip)
        if given != expected:
            raise ConfigError(
                f"{self.location}: made with the model {self.model!r} ({expected[:8]}), but this is"
                f" {clip.config.name!r} ({given[:8]}); their vectors cannot be compared: build another index"
            )
        self._clip = clip
        return clip

    @property
    def settings(self) -> Settings | None:
        """How the vectors' index is asked, and its measured recall; None while every row is compared."""
        return self._settings

    def info(self) -> dict[str, Any]:
        """How many pictures and texts, the model, further columns, size on disk, and how it is searched."""
        folder = local(self.location)
        texts = self._table.count("kind = 'text'")
        return {
            "path": self.location,
            "pictures": len(self) - texts,
            "texts": texts,
            "model": self.model,
            "fingerprint": self._table.about["fingerprint"],
            "width": self._table.about["width"],
            "fields": self._table.fields,
            "bytes": None
            if folder is None
            else sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()),
            "neighbors": None if self._settings is None else asdict(self._settings),
        }

    def refresh(self) -> None:
        """See what other processes have built since this index was opened."""
        self._table.refresh()
        self._settings = neighbors.settings_of(self._table)
        if self._held is not None:
            self._held.refresh()

    # ---------------------------------------------------------------------------------------- building

    def add(
        self,
        what: Location | Iterable[Location],
        *,
        texts: bool = False,
        batch_size: int = 64,
        precision: Precision = "fp32",
        engine: Name = "torch",
        verify: bool = False,
        progress: Callable[[int, int | None], None] | None = None,
    ) -> Report:
        """Bring the index up to date with a folder, shards or a table, or with the pictures that are named.

        Args:
            what: a folder (searched with all below it), a pattern, a picture, shards (`.tar` or
                `.parquet`, also as a pattern or brace range, or a folder of them), a table (`.csv`, `.tsv`,
                `.jsonl`, `.json`) of pictures with captions and further fields or of texts alone; or paths of
                pictures. What is gone from a folder, shard or table leaves the index; for named files nothing
                does.
            texts: make captions items of their own, which can be searched too.
            batch_size: pictures that go through the model at once.
            precision, engine: as `clipworks.encode.bulk.encode_images` has them.
            verify: read every file, also those whose size and time of change are as they were.
            progress: is told after each commit how many items are done, of how many if that is known.

        Raises:
            DataError: if there is nothing at that place.
        """
        if isinstance(what, (str, os.PathLike)):
            found = inputs(os.fspath(what), texts)
            if found.total == 0:
                # An empty folder is more often a disk that is not mounted than a wish to forget everything.
                raise DataError(f"{what}: no pictures there; the index is left as it is")
        else:
            found = file_inputs(what, texts)
        how: dict[str, Any] = {"precision": precision, "engine": engine}
        return self._build(found, batch_size, how, verify, progress)

    def add_texts(self, texts: Iterable[str]) -> Report:
        """Take in texts by themselves; equal ones are one item, named `text:` and a hash."""
        return self._build(text_inputs(texts), 64, {}, False, None)

    def remove(self, paths: Iterable[Location]) -> None:
        """Take items out of the index; paths that are not in it do not matter."""
        names = [os.fspath(path) for path in paths]
        self._table.delete(list(dict.fromkeys([*names, *map(absolute, names)])))

    def _build(
        self,
        found: Inputs,
        batch_size: int,
        how: dict[str, Any],
        verify: bool,
        progress: Callable[[int, int | None], None] | None,
    ) -> Report:
        start = time.monotonic()

        def encode(kind: Kind, contents: list[Content]) -> Encoded:
            if kind == "text":
                features = encode_texts(self.clip, [str(text) for text in contents], **how)
                return Encoded(features, list(range(len(contents))), [])
            pictures = (content() for content in contents if not isinstance(content, str))
            return encode_images(self.clip, pictures, batch_size=batch_size, on_error="skip", **how)

        with self._table.alone():
            build = Build(self._table, encode, verify=verify)
            build.update(found, progress)
            if found.folder is not None:
                build.forget(found.folder)
            build.finish()
            if neighbors.pays(self._table, self._settings):
                self.index_neighbors()
            elif self._settings is not None and self._table.mapped is None:
                self._table.map()
        build.report.seconds = time.monotonic() - start
        return build.report

    def index_neighbors(self) -> Settings:
        """Index the vectors now, and measure what that index finds; `add` does so when it pays.

        Raises:
            DataError: if there are fewer than 256 items, which need none.
        """
        if len(self) < neighbors.FEWEST:
            raise DataError(
                f"{self.location}: {len(self)} items need no index; it takes {neighbors.FEWEST} to make one"
            )
        self._settings = neighbors.build(self._table, self._probes())
        return self._settings

    def hold(self, folder: Location | None = None) -> Held:
        """Answer questions for pictures from memory from now on, those with a condition excepted.

        Args:
            folder: where the graph is kept, so that it need not be made again; by default with the index if
                that lies in a folder, else nowhere.

        Returns:
            What is held, with its own recall, size, and the seconds that it took.

        Raises:
            MissingExtra: without usearch.
        """
        place = Path(folder) if folder is not None else local(self.location)
        self._held = Held(self._table, place, self._probes())
        return self._held

    def _probes(self) -> np.ndarray | None:
        if self._clip is None or self._clip.tokenizer is None:
            return None
        return self._clip.embed_texts(list(PROBES)).cpu().numpy()

    # ---------------------------------------------------------------------------------------- asking

    def query(
        self,
        text: str | None = None,
        *,
        picture: Source | None = None,
        k: int = 10,
        where: str | None = None,
        kind: Kind | None = "image",
        inverted: bool = False,
    ) -> list[Hit]:
        """What is nearest to a text, to a picture, or to both together; best first.

        Args:
            text: what to look for, in words that the model knows; several with `+` and `-` as
                `clipworks.search.questions` has them: `'"a beach" - "people"'`.
            picture: anything that `clipworks.core.pictures.read_picture` takes.
            k: how many at most.
            where: a condition on the columns (path, size, width, height, caption, …) in SQL, for instance
                `"width >= 1024 and path like '%/2024/%'"`; what does not meet it is not ranked.
            kind: `image`, `text`, or None for both. Texts lie nearer to texts than pictures do.
            inverted: first turn the question into the other modality, a picture that looks for pictures into
                a text and a text that looks for texts into a picture (Cross the Gap); takes seconds.

        Raises:
            ConfigError: without text and picture, or if the text or `where` cannot be applied.
            PictureError: if the picture cannot be read.
        """
        terms = [] if text is None else questions.parse(text)
        if picture is not None:
            terms.append(Term(picture, is_picture=True))
        features = questions.vector(self.clip, terms)
        if inverted:
            features = questions.invert(self.clip, terms, features, kind)
        return self.search(features.cpu().numpy(), k=k, where=where, kind=kind)

    def query_many(
        self,
        texts: Sequence[str],
        *,
        k: int = 10,
        where: str | None = None,
        kind: Kind | None = "image",
    ) -> list[list[Hit]]:
        """The answers to many questions in words, in their order; each as `query` has it.

        Raises:
            ConfigError: as `query`.
        """
        parsed = [questions.parse(text) for text in texts]
        plain = list(dict.fromkeys(str(term.content) for terms in parsed for term in terms))
        if not plain:
            return []
        place = {text: row for row, text in enumerate(plain)}
        features = self.clip.embed_texts(plain)
        vectors = [
            questions.combine([term.weight * features[place[str(term.content)]] for term in terms])
            for terms in parsed
        ]
        return self.search_many(torch.stack(vectors).cpu().numpy(), k=k, where=where, kind=kind)

    def search(
        self, vector: np.ndarray, *, k: int = 10, where: str | None = None, kind: Kind | None = "image"
    ) -> list[Hit]:
        """What is nearest to a vector (D,) of the index's model, by cosine; see `query`.

        Raises:
            ConfigError: for k below one, a vector of another width, or a condition that cannot be applied.
        """
        width = self._table.about["width"]
        if k < 1:
            raise ConfigError(f"k must be at least 1, not {k}")
        if np.shape(vector) != (width,):
            raise ConfigError(
                f"a query of this index is a vector ({width},), not one of shape {np.shape(vector)}"
            )
        if self._held is not None and where is None and kind == "image":
            return self._hits(self._held.search(vector, k))
        found = neighbors.nearest(
            self._table,
            vector,
            k,
            self._condition(where, kind),
            settings=self._settings,
            columns=self._columns,
        )
        return self._hits(found)

    def search_many(
        self, vectors: np.ndarray, *, k: int = 10, where: str | None = None, kind: Kind | None = "image"
    ) -> list[list[Hit]]:
        """The answers to vectors (q, D); where every row is compared, all in one pass over the table.

        Raises:
            ConfigError: as `search`.
        """
        held = self._held is not None and where is None and kind == "image"
        if held or len(vectors) < 2 or k < 1 or np.shape(vectors)[1:] != (self._table.about["width"],):
            return [self.search(vector, k=k, where=where, kind=kind) for vector in vectors]
        chosen = self._condition(where, kind)
        if self._settings is not None:
            found = neighbors.nearest_many(
                self._table, vectors, k, chosen, settings=self._settings, columns=self._columns
            )
            return list(map(self._hits, found))
        ids, cosines = neighbors.exact(self._table, vectors, k, chosen)
        answers = []
        for row, scores in zip(ids, cosines, strict=True):
            rows = neighbors.rows_of(self._table, row, self._columns)
            answers.append(
                self._hits({**one, "_distance": 1 - s} for one, s in zip(rows, scores, strict=True))
            )
        return answers

    def near_duplicates(
        self,
        threshold: float = 0.97,
        where: str | None = None,
        progress: Callable[[int, int | None], None] = lambda done, total: None,
    ) -> list[list[str]]:
        """Groups of pictures that are nearly the same; see `clipworks.search.duplicates`.

        Every pair is compared, or the nearest in memory after `hold`.

        Raises:
            ConfigError: for a threshold outside (0, 1], or a condition that cannot be applied.
        """
        chosen = self._condition(where, "image")
        return near_duplicates(self._table, threshold, chosen, self._held, progress)

    def export(self, file: Location, where: str | None = None, *, vectors: bool = True) -> int:
        """Write rows as one Parquet file, complete or not at all; how many there were.

        Args:
            file: where.
            where: a condition on the columns; all rows without one.
            vectors: write the vectors too, as lists of fp32.

        Raises:
            ConfigError: if the condition cannot be applied, or the file cannot be written.
        """
        parquet = require("pyarrow.parquet", extra="search", purpose="export to Parquet")
        columns = [name for name in self._table.schema.names if vectors or name != "vector"]
        target = Path(file)
        temporary = target.with_name(f".{target.name}.part")
        written = 0
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with parquet.ParquetWriter(temporary, self._schema(columns)) as writer:
                for batch in self._table.batches(columns, where):
                    writer.write_batch(batch.select(columns).cast(writer.schema))
                    written += len(batch)
            temporary.replace(target)
        except OSError as error:
            raise ConfigError(f"{file}: cannot be written ({error.strerror or error})") from error
        finally:
            temporary.unlink(missing_ok=True)
        return written

    def _schema(self, columns: Sequence[str]) -> Any:
        pa = require("pyarrow", extra="search", purpose="export to Parquet")
        whole = self._table.schema
        about = {b"clipworks": (whole.metadata or {}).get(b"clipworks", b"{}")}
        return pa.schema([whole.field(name).remove_metadata() for name in columns], metadata=about)

    @property
    def _columns(self) -> tuple[str, ...]:
        return (*SHOWN, *self._table.fields)

    def _condition(self, where: str | None, kind: Kind | None) -> str | None:
        """The condition with the kind; without, if all rows are of that kind anyway, which costs nothing."""
        if kind is None or (kind == "image" and not self._table.has_texts):
            return where
        chosen = f"kind = {quoted(kind)}"
        return chosen if where is None else f"({where}) AND {chosen}"

    def _hits(self, rows: Iterable[Mapping[str, Any]]) -> list[Hit]:
        names = list(self._table.fields)
        return [
            Hit(
                path=row["path"],
                score=1.0 - float(row["_distance"]),
                width=row["width"],
                height=row["height"],
                caption=row["caption"],
                digest=row["hash"],
                kind=row["kind"],
                fields={name: _plain(row[name]) for name in names if row.get(name) is not None},
            )
            for row in rows
        ]


def _plain(value: Any) -> Any:
    """Whole numbers as such: columns hold all numbers as float64."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def fingerprint(clip: Clip) -> str:
    """A hash that differs between any two trainings: of names, shapes, up to 64 values of every tensor."""
    digest = hashlib.sha256()
    for name, tensor in sorted(clip.state_dict().items()):
        flat = tensor.detach().reshape(-1)
        places = torch.linspace(0, max(len(flat) - 1, 0), min(len(flat), 64), dtype=torch.float64).long()
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(flat[places.to(flat.device)].double().cpu().numpy().tobytes())
    return digest.hexdigest()
