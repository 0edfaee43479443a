"""`clipworks classify`: which of the labels fits each picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clipworks.cli import console
from clipworks.cli.console import BatchOption, DeviceOption, JsonOption, ModelOption, PrecisionOption
from clipworks.errors import ConfigError, DataError, PictureError

if TYPE_CHECKING:
    from collections.abc import Sequence

TEMPLATE = "a photo of {a} {}."


def classify(
    photos: Annotated[
        list[str] | None, typer.Argument(metavar="PHOTO", help="Files, folders, patterns ('photos/*.jpg').")
    ] = None,
    labels: Annotated[
        list[str] | None,
        typer.Option(metavar="LABEL...", help='What they may show: "a cat" "a dog", or "cat, dog, fox".'),
    ] = None,
    labels_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A text file with one label a line, in UTF-8.")
    ] = None,
    model: ModelOption = console.SEEDLING,
    template: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEMPLATE...",
            help="A sentence with {} for the label and, if wanted, {a} for its article; several are averaged."
            f' Default: "{TEMPLATE}"',
        ),
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="How many labels to print for each picture.")] = 5,
    precision: PrecisionOption = "fp32",
    device: DeviceOption = "auto",
    batch_size: BatchOption = 64,
    as_json: JsonOption = False,
) -> None:
    """Say which of the labels fits each picture.

    Probabilities sum to one over the labels. Pictures come before --labels,
    or after a bare `--`. A picture that cannot be read is left out and
    reported; the exit code is 2 if none could be read.

    Example: clipworks classify photo.jpg --labels "a cat" "a dog"
    """
    names = read_labels(labels or [], labels_file)
    if len(names) == 1:
        console.note("note: a single label always gets probability 1; give others to compare it with")
    templates = template or [TEMPLATE]
    console.check_precision(precision)
    for one in templates:
        if "{}" not in one:
            raise ConfigError(f"the template {one!r} has no {{}} for the label")
    paths, skipped = find(photos or [], names)

    from clipworks.core.clip import Classification
    from clipworks.data.captions import fill
    from clipworks.encode.bulk import encode_images

    clip = console.load_clip(model, device)
    with console.progress("reading pictures") as advance:

        def counted() -> Any:
            for done, path in enumerate(paths):
                advance(done, len(paths))
                yield path

        encoded = encode_images(clip, counted(), on_error="skip", precision=precision, batch_size=batch_size)  # type: ignore[arg-type]
    skipped += [(str(paths[place]), reason) for place, reason in encoded.errors]
    report = _report(skipped, len(encoded.kept))
    if not encoded.kept:
        raise PictureError(report)
    # Templates are filled here, where articles are known; `class_features` averages each label's sentences.
    head = clip.class_features([[fill(one, name) for one in templates] for name in names], templates=("{}",))
    found = Classification(tuple(names), clip.logits(encoded.features, head).softmax(dim=-1).cpu()).top(top)
    kept = [str(paths[place]) for place in encoded.kept]
    if as_json:
        console.print_json(
            {
                "model": model,
                "pictures": [
                    {"path": path, "predictions": [{"label": label, "probability": p} for label, p in row]}
                    for path, row in zip(kept, found, strict=True)
                ],
                "skipped": [{"path": path, "reason": reason} for path, reason in skipped],
            }
        )
    else:
        _show(kept, found)
        console.note(report)


def read_labels(given: Sequence[str], file: Path | None = None) -> list[str]:
    """The labels of `--labels` and `--labels-file`, in order.

    A single `--labels` value with commas is a list, for one label alone would say nothing.

    Raises:
        ConfigError: without labels, or with one that is empty or appears twice.
        DataError: if the file cannot be read.
    """
    names = list(given)
    if len(names) == 1 and "," in names[0] and file is None:
        names = names[0].split(",")
    if file is not None:
        try:
            names += [line for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        except OSError as error:
            raise DataError(f"{file}: the labels cannot be read ({error.strerror})") from error
        except UnicodeDecodeError as error:
            raise DataError(f"{file}: not a text file in UTF-8 (byte {error.start})") from error
    names = [name.strip() for name in names]
    if not names:
        raise ConfigError('no labels given: add --labels "a cat" "a dog", or --labels-file FILE')
    if not all(names):
        raise ConfigError("a label is empty; every label needs a name")
    seen: set[str] = set()
    for name in names:
        if name.casefold() in seen:
            raise ConfigError(f"the label {name!r} is given more than once")
        seen.add(name.casefold())
    return names


def find(given: Sequence[str], labels: Sequence[str] = ()) -> tuple[list[Path], list[tuple[str, str]]]:
    """The pictures that files, folders and patterns name, each once, and what could not be found and why.

    Raises:
        ConfigError: if nothing is named; says so if a label looks like a picture.
        PictureError: if nothing was found.
    """
    from clipworks.core.pictures import find_pictures

    if not given:
        taken = next((label for label in labels if Path(label).exists()), None)
        hint = f" ({taken!r} was read as a label)" if taken else ""
        raise ConfigError(f"no picture given{hint}: name pictures before --labels, or after a bare --")
    found: dict[Path, None] = {}
    missing: list[tuple[str, str]] = []
    for name in given:
        try:
            pictures = find_pictures(name)
        except DataError as error:
            missing.append((name, str(error)))
            continue
        if not pictures:
            missing.append((name, f"{name}: no pictures there"))
        found |= dict.fromkeys(pictures)
    if not found:
        raise PictureError(_report(missing, 0))
    return list(found), missing


def _report(skipped: Sequence[tuple[str, str]], kept: int) -> str:
    if not skipped:
        return ""
    if not kept and len(skipped) == 1:
        return skipped[0][1]
    if not kept:
        return f"none of {len(skipped)} pictures could be read: {skipped[0][1]}"
    reasons = "; ".join(reason for _, reason in skipped[:3])
    more = f"; and {len(skipped) - 3} more" if len(skipped) > 3 else ""
    return f"skipped {len(skipped)} of {kept + len(skipped)}: {reasons}{more}"


def _show(paths: Sequence[str], found: Sequence[Sequence[tuple[str, float]]]) -> None:
    from rich.text import Text

    table = console.make_table("picture", "label", ">probability", "")
    for path, row in zip(paths, found, strict=True):
        for place, (label, p) in enumerate(row):
            first = Text(path if place == 0 else "")
            table.add_row(first, Text(label), f"{p:.1%}", console.bar(p), end_section=place == len(row) - 1)
    console.show(table)
