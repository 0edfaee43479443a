"""The register: one `<slug>.toml` a paper holds what a person knows; whether it works is computed.

A toml states title, venue, family, where code and weights were released, the method's file and whether
its mechanism is complete as the paper states it. The status is never written down. It follows from

    the method's file            is it there?
    `evidence/<slug>.json`       checks of the family's contract, and of loading the released checkpoint,
                                 that passed on exactly this file (its fingerprint is recorded); written
                                 by the test suite alone (`make contracts`)
    `docs/proofs/<slug>.json`    the published proof: its seeds and its verdict

and is `planned` (no method), `partial`, or `works`: mechanism complete, contract green, released
checkpoint loads if there is one, proof run on at least five seeds, whatever its verdict. Both kinds
of evidence travel with the package, so an installed copy gives the same answer as a checkout.

Nothing here imports a library outside the standard one (tomli on Python 3.10).
"""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from clipworks.errors import ConfigError, DataError, nearest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = [
    "FAMILIES",
    "MINIMUM_SEEDS",
    "STATUSES",
    "VERDICTS",
    "Paper",
    "Places",
    "Proof",
    "fingerprint",
    "paper",
    "register",
]

Status = Literal["planned", "partial", "works"]
Verdict = Literal["holds", "does not hold", "undecided"]

FAMILIES = (
    "pretrain", "adapt", "dense", "video", "generate", "language", "robust", "curate", "retrieve", "space",
)  # fmt: skip
STATUSES: tuple[Status, ...] = get_args(Status)
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)
MINIMUM_SEEDS = 5


@dataclass(frozen=True)
class Places:
    """Where the register's files lie; another one is only of use in a test.

    Attributes:
        package: the folder `clipworks`, to which a method's path is relative.
        papers: the folder of `<slug>.toml`.
        evidence: the folder of `<slug>.json` that the test suite writes.
        proofs: the folder of `<slug>.json` that the proofs' runner writes.
    """

    package: Path
    papers: Path
    evidence: Path
    proofs: Path


def _here() -> Places:
    papers = Path(__file__).parent
    package = papers.parent
    shipped, checkout = papers / "proofs", package.parent.parent / "docs" / "proofs"
    return Places(package, papers, papers / "evidence", shipped if shipped.is_dir() else checkout)


@dataclass(frozen=True)
class Proof:
    """A published proof.

    Attributes:
        verdict: what a confidence interval over the seeds says of the paper's claim.
        seeds: how many fresh seeds it was run on.
        budget: the size of the run, `"small"` or `"full"`.
    """

    verdict: Verdict
    seeds: int
    budget: str


@dataclass(frozen=True)
class Paper:
    """One paper of the register; everything but the last field stands in its toml.

    Attributes:
        slug: the name by which commands know it, also the name of its toml.
        title: as printed.
        venue: where and when it appeared, `"IJCV 2022"`.
        year: of the venue.
        family: one of `FAMILIES`.
        code: `owner/repository` of the authors' code, or empty.
        license: of the authors' code, or empty if none is stated.
        weights: what was released, in words.
        summary: what it is for, in a sentence.
        mechanism: how it works, in a sentence or two.
        claim: what its authors found.
        mechanism_complete: whether our method does all that the paper's does.
        method: its file relative to the package, `"methods/adapt/coop.py"`, or empty.
        extra: an extra that it needs beyond its family's, or empty.
        checkpoint: whether its authors released weights of the method.
    """

    slug: str
    title: str
    venue: str
    year: int
    family: str
    code: str
    license: str
    weights: str
    summary: str
    mechanism: str
    claim: str
    mechanism_complete: bool
    method: str
    extra: str
    checkpoint: Literal["released", "none"]
    places: Places = field(repr=False, compare=False)

    @property
    def status(self) -> Status:
        """`planned`, `partial` or `works`, from the files as they are now."""
        if not self._has_method():
            return "planned"
        return "partial" if self.missing else "works"

    @property
    def missing(self) -> tuple[str, ...]:
        """What stands between this paper and `works`, in the order in which it is done."""
        if not self._has_method():
            return (f"{self.method} does not exist" if self.method else "no method",)
        evidence, proof = self._evidence(), self.proof
        current = evidence.get("source") == fingerprint(self.places.package / self.method)
        gaps = []
        if not self.mechanism_complete:
            gaps.append("mechanism incomplete")
        if not evidence.get("contract"):
            gaps.append("contract not shown")
        elif not current:
            gaps.append("method changed since its contract was shown")
        if self.checkpoint == "released" and not (evidence.get("checkpoint") and current):
            gaps.append("loading the released checkpoint not shown")
        if proof is None:
            gaps.append("no proof")
        elif proof.seeds < MINIMUM_SEEDS:
            gaps.append(f"proof on {proof.seeds} of {MINIMUM_SEEDS} seeds")
        return tuple(gaps)

    @property
    def proof(self) -> Proof | None:
        """The published proof, or None.

        Raises:
            DataError: if its file is damaged.
        """
        path = self.places.proofs / f"{self.slug}.json"
        if not path.is_file():
            return None
        values = _json(path)
        verdict, seeds = values.get("verdict"), values.get("seeds")
        if verdict not in VERDICTS:
            raise DataError(f"{path}: verdict {verdict!r} is none of {', '.join(VERDICTS)}")
        if not isinstance(seeds, list) or not all(isinstance(seed, int) for seed in seeds):
            raise DataError(f"{path}: seeds must be a list of integers, found {seeds!r}")
        return Proof(verdict, len(set(seeds)), str(values.get("budget", "")))

    def to_dict(self) -> dict[str, Any]:
        """What machines read: where it stands, whether weights were released, the proof's verdict or None."""
        proof = self.proof
        return {
            "slug": self.slug,
            "title": self.title,
            "venue": self.venue,
            "family": self.family,
            "status": self.status,
            "checkpoint": self.checkpoint,
            "proof": proof.verdict if proof else None,
            "missing": list(self.missing),
        }

    def _has_method(self) -> bool:
        return bool(self.method) and (self.places.package / self.method).exists()

    def _evidence(self) -> dict[str, Any]:
        path = self.places.evidence / f"{self.slug}.json"
        return _json(path) if path.is_file() else {}


def register(places: Places | None = None) -> list[Paper]:
    """All papers, by family in the order of `FAMILIES`, then by slug.

    Raises:
        ConfigError: if a toml lacks a key, has one too many or a value of the wrong kind.
    """
    places = places or _here()
    papers = [_read(path, places) for path in places.papers.glob("*.toml")]
    return sorted(papers, key=lambda paper: (FAMILIES.index(paper.family), paper.slug))


def paper(slug: str, places: Places | None = None) -> Paper:
    """The paper of that slug.

    Raises:
        ConfigError: if there is none; names the nearest slugs.
    """
    places = places or _here()
    slugs = [path.stem for path in places.papers.glob("*.toml")]
    if slug not in slugs:
        raise ConfigError(
            f"no paper {slug!r}{nearest(slug, slugs)} (`clipworks papers` lists all {len(slugs)})"
        )
    return _read(places.papers / f"{slug}.toml", places)


def fingerprint(path: Path) -> str:
    """A name for the content of a method: 16 hexadecimal digits over its file, or over a folder's modules."""
    digest = hashlib.sha256()
    for module in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
        # Line ends as git may have changed them on checkout must not count.
        digest.update(module.name.encode() + b"\0" + module.read_bytes().replace(b"\r\n", b"\n") + b"\0")
    return digest.hexdigest()[:16]


_KINDS = {"year": int, "mechanism_complete": bool}
_KEYS = tuple(item.name for item in fields(Paper) if item.name not in ("slug", "places"))


def _read(path: Path, places: Places) -> Paper:
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path.name}: not valid TOML: {error}") from error
    for key in values:
        if key not in _KEYS:
            raise ConfigError(f"{path.name}: unknown key {key!r}{nearest(key, _KEYS)}")
    for key in _KEYS:
        if key not in values:
            raise ConfigError(f"{path.name}: {key} is missing")
        kind = _KINDS.get(key, str)
        if type(values[key]) is not kind:
            raise ConfigError(f"{path.name}: {key} must be of type {kind.__name__}, found {values[key]!r}")
    for key, allowed in (("family", FAMILIES), ("checkpoint", ("released", "none"))):
        if values[key] not in allowed:
            raise ConfigError(f"{path.name}: {key} {values[key]!r} is none of {', '.join(allowed)}")
    return Paper(slug=path.stem, places=places, **values)


def _json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise DataError(f"{path}: expected an object, found {type(values).__name__}")
    return values
