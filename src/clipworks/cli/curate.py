"""`clipworks curate`: choosing which records of a pool are worth training on."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clipworks.cli import console
from clipworks.cli.console import Command, JsonOption
from clipworks.errors import ConfigError

if TYPE_CHECKING:
    from clipworks.data.metadata import Metadata
    from clipworks.methods.curate.runner import Curation

app = typer.Typer(no_args_is_help=True, help="Choose from a pool of records what to train on.")


@app.command(cls=Command)
def metaclip(
    metadata: Annotated[
        list[str],
        typer.Option(metavar="FILE...", help="JSON list, or text with an entry a line; or CODE=FILE ..."),
    ],
    pool: Annotated[
        list[str], typer.Option("--in", metavar="POOL...", help="Folders, files or patterns of records.")
    ],
    out: Annotated[Path, typer.Option(help="Folder of what is kept; an interrupted run is continued.")],
    t: Annotated[float | None, typer.Option(help="About so many texts of a frequent entry stay.")] = None,
    p: Annotated[float | None, typer.Option(help="t is where rare entries have this share.")] = None,
    keep: Annotated[float | None, typer.Option(help="t is where this share of texts stays.")] = None,
    form: Annotated[str, typer.Option(help="offline, or online: one visit of a training.")] = "offline",
    text: Annotated[
        list[str] | None, typer.Option(metavar="FIELD...", help="Fields with texts; captions by default.")
    ] = None,
    language: Annotated[
        str | None, typer.Option(metavar="FIELD", help="Field with the language, for several lists.")
    ] = None,
    spacing: Annotated[str, typer.Option(help="english or worldwide.")] = "english",
    kana: Annotated[bool, typer.Option(help="Worldwide: kana are written without blanks.")] = False,
    space_entries: Annotated[bool, typer.Option(help="Let entries with punctuation match.")] = False,
    seed: Annotated[int, typer.Option(help="Other seed, other draws.")] = 0,
    runner: Annotated[str, typer.Option(help="local or ray.")] = "local",
    workers: Annotated[int, typer.Option(help="Processes; 0 is one a core.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Match texts with a list of entries, and thin the entries that match often (MetaCLIP).

    Pools are JSONL, Parquet and WebDataset; the result has the same files with fewer records, and a data
    card, card.html.

    Example: clipworks curate metaclip --metadata metadata.json --in pool/ --out kept/ --t 20000
    """
    from clipworks.methods.curate.metaclip import Matching, MetaCLIP

    curator = MetaCLIP(
        _lists(metadata, language),
        t=t,
        p=p,
        keep=keep,
        form=form,  # type: ignore[arg-type]  # checked there
        seed=seed,
        matching=Matching(spacing, kana, space_entries),  # type: ignore[arg-type]
        texts=tuple(text) if text else None,
        language=language,
    )
    done = _run(curator, pool, out, runner, workers)
    thresholds = curator.thresholds.tolist() if curator.thresholds is not None else []
    counted, kept = done.measured["count"].numbers, done.tally
    result = {
        "out": str(out),
        "card": str(out / "card.html"),
        "shards": done.shards,
        "t": thresholds[0] if len(thresholds) == 1 else thresholds,
        "matched_texts": counted["matched texts"],
        **{name.replace(" ", "_"): kept.numbers[name] for name in ("records", "kept", "texts", "kept texts")},
        "dropped": dict(sorted(kept.dropped.items())),
        "unreadable": dict(sorted(kept.unreadable.items())),
        "seconds": round(done.seconds, 1),
    }
    if as_json:
        console.print_json(result)
        return
    table = console.make_table("what", ">number", title=f"{out}: kept {kept.numbers['kept']:,} records")
    for name in ("t", "shards", "records", "kept", "texts", "matched_texts", "kept_texts"):
        value = result[name]
        table.add_row(name.replace("_", " "), f"{value:,}" if isinstance(value, (int, float)) else str(value))
    for reason, count in sorted((kept.dropped + kept.unreadable).items()):
        table.add_row(reason, f"{count:,}")
    console.show(table)
    console.note(f"{done.seconds:.0f} s; data card: {out / 'card.html'}")


@app.command(cls=Command)
def metadata(
    out: Annotated[Path, typer.Option(help="The list, JSON.")],
    corpus: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE...", help="Plain text, or JSON lines with `text`; .gz and .bz2 too."),
    ] = None,
    pageviews: Annotated[
        list[Path] | None, typer.Option(metavar="FILE...", help="Hourly page view files of Wikimedia.")
    ] = None,
    wordnet: Annotated[Path | None, typer.Option(help="Folder of WordNet's database, data.noun …")] = None,
    project: Annotated[str, typer.Option(help="Of the page views: en, de …")] = "en",
    limits: Annotated[str, typer.Option(help="The paper's: english or worldwide.")] = "english",
    bigrams: Annotated[
        int | None, typer.Option(help="So many of the highest PMI, whatever it is; for a small corpus.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Make a list of entries from local dumps: words, bigrams and titles of a Wikipedia, names of WordNet.

    Example: clipworks curate metadata --corpus wiki/*.jsonl --pageviews views/*.gz --out metadata.json
    """
    from dataclasses import replace

    from clipworks.data.dumps import articles, count_words, page_views, pmi, wordnet_names
    from clipworks.data.metadata import ENGLISH, WORLDWIDE, Metadata

    known = {"english": ENGLISH, "worldwide": WORLDWIDE}
    if limits not in known:
        raise ConfigError(f"--limits must be english or worldwide, not {limits!r}")
    chosen = known[limits] if bigrams is None else replace(known[limits], pmi=None, bigrams=bigrams)
    with console.progress("counting words"):
        words, pairs = count_words(articles(corpus or []), lower=limits == "english")
        titles = page_views(pageviews or [], project=project)
        names = wordnet_names(wordnet) if wordnet else []
    made = Metadata.build(words, pmi(words, pairs), titles, names, chosen)
    made.save(out)
    result = {"path": str(out), "entries": len(made), "words": len(words), "titles": len(titles)}
    if as_json:
        console.print_json(result)
    else:
        typer.echo(f"{out}: {len(made):,} entries from {len(words):,} words and {len(titles):,} titles")


@app.command(cls=Command)
def rewrite(
    pool: Annotated[str, typer.Option("--in", help="Table, folder or shards of pictures with captions.")],
    out: Annotated[Path, typer.Option(help="The rewrites, JSON lines; an interrupted run is continued.")],
    model: Annotated[
        Path, typer.Option(help="Folder of a causal language model, as transformers writes it.")
    ],
    examples: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE...", help="JSON lines, source and target, a file a manner; ours if none."),
    ] = None,
    text: Annotated[str, typer.Option(help="Column or field with the caption; found by default.")] = "",
    seed: Annotated[int, typer.Option(help="Other seed, other rewrites.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Prompts at once.")] = 64,
    device: Annotated[str, typer.Option(help="cpu, cuda ...")] = "cpu",
    as_json: JsonOption = False,
) -> None:
    """Say captions in other words by a language model, for the objective laclip (LaCLIP).

    Every caption is rewritten once in each manner. A plan of `clipworks pretrain` takes the file as
    `rewrites`.

    Example: clipworks curate rewrite --in pairs/ --out rewrites.jsonl --model Llama-3.2-1B/
    """
    from clipworks.data import rewrite as rewriting
    from clipworks.data.pairs import open_pairs
    from clipworks.data.rewriters import CausalModel

    pairs = open_pairs(pool, captions=(text,) if text else ())
    captions = {pairs[index].key: pairs.captions[index][0] for index in range(len(pairs))}
    if len(captions) < len(pairs):
        raise ConfigError(f"--in {pool}: {len(pairs) - len(captions)} keys are there twice")
    pools = {path.stem: rewriting.read_pool(path) for path in examples} if examples else None
    with console.progress("rewrites") as advance:
        done = rewriting.rewrite(
            captions,
            out,
            CausalModel.load(model, device),
            pools,
            seed=seed,
            batch_size=batch_size,
            advance=advance,
        )
    if as_json:
        found = {name: {**vars(one), "flags": dict(one.flags)} for name, one in done.pools.items()}
        console.print_json({"path": str(out), "captions": len(captions), "manners": found})
    else:
        typer.echo(f"{out}: {len(captions):,} captions\n{done}")


def _lists(given: list[str], language: str | None) -> Metadata | dict[str, Metadata]:
    """One list, or one for each language code."""
    from clipworks.data.metadata import Metadata

    if language is None:
        if len(given) > 1:
            raise ConfigError(
                f"--metadata: {len(given)} lists need --language, the field that tells them apart"
            )
        return Metadata.load(given[0])
    found = {}
    for one in given:
        code, equal, path = one.partition("=")
        if not equal or code in found:
            raise ConfigError(f"--metadata {one}: with --language each list is CODE=FILE, each code once")
        found[code] = Metadata.load(path)
    return found


def _run(curator: Any, pool: list[str], out: Path, runner: str, workers: int) -> Curation:
    from clipworks.methods.curate.runner import curate

    if workers < 0:
        raise ConfigError(f"--workers {workers}: must not be negative")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with console.progress("shards") as advance:
        return curate(
            curator,
            pool,
            out,
            workers=workers or cores,
            runner=runner,  # type: ignore[arg-type]  # checked there
            advance=lambda stage, done, total: advance(done, total),
        )
