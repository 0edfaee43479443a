"""The contract of the family `dense`, as `methods/dense/base.py` states it, on every method it has.

A check is a function of a form: how a method is made, and how it learns if it does. Each check looks at the
verbs that it speaks of and passes a method that lacks them. Each runs on every form of every method, and on
methods that break one promise (`broken_dense.py`), where it must fail.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.base import clone
from tests.contracts import broken_dense as broken
from torch import Tensor

from clipworks.core.clip import Clip
from clipworks.core.config import uniform_blocks
from clipworks.core.tokenizer import ClipTokenizer
from clipworks.data.captions import ClassTexts
from clipworks.engine.randomness import untouched_randomness
from clipworks.errors import CheckpointError, ClipworksError, ConfigError, DataError, PictureError
from clipworks.methods.dense.anomalyclip import AnomalyCLIP
from clipworks.methods.dense.base import Segmenter, Unreadable
from clipworks.methods.dense.clip_dinoiser import CLIPDinoiser
from clipworks.methods.dense.denseclip import DenseCLIP
from clipworks.methods.dense.fusioner import Fusioner
from clipworks.methods.dense.maskclip import MaskCLIP
from clipworks.papers import register
from clipworks.parts.localization import AffinityTeacher
from clipworks.parts.segmentation import Segmentation

ClipOf = Callable[[int], Clip]
NAMES = ("sky", "road", "red car")
SENTENCES = ("a {}.", "the {} there")


@dataclass(frozen=True)
class Form:
    """A method in one form.

    Attributes:
        make: the method with quick settings, from a Clip; `templates=SENTENCES` keeps labels cheap.
        fit: fits what `make` gave to pictures and masks (0, 1 or 2 for `NAMES`, 255 for none), if it learns.
        reads_masks: whether it learns from the masks, and so refuses one of another size.
    """

    make: Callable[[Clip], Any]
    fit: Callable[[Any, Sequence[Any], Sequence[Any]], Any] | None = None
    reads_masks: bool = True


def form(make: Callable[..., Any], fit: Any = None, *, reads_masks: bool = True, **settings: Any) -> Form:
    """A form of a class with these settings."""
    return Form(lambda clip: make(clip, **settings), fit, reads_masks)


def learn_masks(method: Any, images: Sequence[Any], masks: Sequence[Any]) -> Any:
    """What learns from pictures with masks."""
    return method.fit(images, masks)


def learn_defects(method: Any, images: Sequence[Any], masks: Sequence[Any]) -> Any:
    """What learns which pixels are faulty, from pictures of which every other one is not."""
    return method.fit(images, [mask if place % 2 else 0 * mask for place, mask in enumerate(masks)])


def learn_named_masks(method: Any, images: Sequence[Any], masks: Sequence[Any]) -> Any:
    """What learns from pictures with masks of names that it is given with them."""
    return method.fit(images, masks, NAMES)


def learn_affinity(method: Any, images: Sequence[Any], masks: Sequence[Any]) -> Any:
    """What learns from pictures alone, taught by their colors."""
    return method.fit(images, AffinityTeacher())


DINOISER: dict[str, Any] = {
    "templates": SENTENCES,
    "width": 8,
    "block": -1,
    "views": 2,
    "epochs": 2,
    "batch_size": 2,
    "lr": 1e-2,
    "progress": False,
}

DENSECLIP: dict[str, Any] = {
    "class_names": NAMES,
    "templates": SENTENCES,
    "decoder_width": 16,
    "decoder_layers": 1,
    "head_width": 8,
    "views": 1,
    "steps": 2,
    "batch_size": 3,
}

FUSIONER: dict[str, Any] = {
    "templates": SENTENCES,
    "width": 16,
    "layers": 2,
    "heads": 2,
    "doublings": 1,
    "views": 1,
    "epochs": 2,
    "batch_size": 3,
}

# Every method of the family, in the forms worth checking, small enough to be quick.
FORMS: dict[str, dict[str, Form]] = {
    "clip-dinoiser": {
        "maskclip": form(MaskCLIP, templates=SENTENCES),
        "maskclip-refined": form(MaskCLIP, templates=SENTENCES, denoise=0.3, key_smoothing=1.0),
        "maskclip-bare": form(MaskCLIP, templates=SENTENCES, residual=False, blend="uniform", overlap=0.25),
        "kept": form(CLIPDinoiser, learn_affinity, reads_masks=False, **DINOISER),
        "live": form(CLIPDinoiser, learn_affinity, reads_masks=False, **{**DINOISER, "views": "live"}),
    },
    "anomalyclip": {
        "sentences": form(AnomalyCLIP, learn_defects, epochs=1, progress=False),
    },
    "denseclip": {
        "trained": form(DenseCLIP, learn_masks, **DENSECLIP),
        "frozen": form(DenseCLIP, learn_masks, train_tower=False, **DENSECLIP),
    },
    "fusioner": {
        "early": form(Fusioner, learn_named_masks, **FUSIONER),
        "single": form(Fusioner, learn_named_masks, fusion="late", names="single", present=1, **FUSIONER),
    },
}


def methods() -> Iterator[Any]:
    """Every form, marked with its paper where the register names its method."""
    written = {paper.slug for paper in register() if paper.family == "dense" and paper.method}
    for slug, forms in FORMS.items():
        for name, one in forms.items():
            marks = [pytest.mark.contract(slug)] if slug in written else []
            yield pytest.param(one, id=f"{slug}-{name}", marks=marks)


@pytest.fixture(scope="module")
def clip_of(tiny_clip: Callable[..., Any]) -> ClipOf:
    tokenizer, made = ClipTokenizer(), dict[int, Clip]()
    blocks = uniform_blocks(depth=4, width=32, heads=2)

    def build(seed: int = 0) -> Clip:
        if seed not in made:
            made[seed] = tiny_clip(seed, tokenizer=tokenizer, image={"blocks": blocks}).eval()
        return made[seed]

    return build


def picture(height: int, width: int, seed: int = 0) -> Tensor:
    """Noise (3, H, W) bytes, with a brighter color in each third of its columns."""
    generator = torch.Generator().manual_seed(seed)
    made = torch.randint(0, 120, (3, height, width), generator=generator, dtype=torch.uint8)
    for channel in range(3):
        made[channel, :, channel * width // 3 : (channel + 1) * width // 3] += 130
    return made


def mask(height: int, width: int) -> np.ndarray:
    """Which third a column of `picture` is in, the first row 255."""
    made = np.repeat(3 * np.arange(width, dtype=np.uint8)[None].astype(int) // width, height, axis=0)
    made[0] = 255
    return made.astype(np.uint8)


LEARNED_FROM = [picture(36, 44, seed) for seed in range(6)], [mask(36, 44) for _ in range(6)]
# Odd sides, one pixel, one of many windows, several small ones.
SIZES = ((65, 97), (1, 1), (40, 200), (9, 14))
PICTURES = [picture(*size, seed) for seed, size in enumerate(SIZES)]


def fitted(form: Form, clip_of: ClipOf) -> Any:
    method = form.make(clip_of(0))
    return method if form.fit is None else form.fit(method, *LEARNED_FROM)


def segments(form: Form, clip_of: ClipOf) -> Any:
    """The method if it segments by labels that it is given."""
    method = fitted(form, clip_of)
    return method if isinstance(method, Segmenter) else None


def scores(form: Form, clip_of: ClipOf) -> Any:
    """The method if it scores."""
    method = fitted(form, clip_of)
    return method if hasattr(method, "score") else None


def answers(method: Any) -> list[Tensor]:
    """What a method says about a picture, whatever its verbs are."""
    found = []
    if isinstance(method, Segmenter):
        said = method.segment(PICTURES[0], NAMES)
        found += [said.scores, said.map]
    if hasattr(method, "score"):
        said = method.score(PICTURES[:2])
        found += [said.image, *said.maps]
    return found


def refusal(call: Callable[[], Any], kind: type[ClipworksError]) -> str:
    """The one line with which bad input is refused."""
    message = ""
    try:
        call()
    except kind as error:
        message = str(error)
    except (RuntimeError, IndexError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise AssertionError(f"not our own error: {error!r}") from error
    assert message, f"no {kind.__name__}"
    assert "\n" not in message
    return message


# --- the checks ---


def an_answer_has_its_pictures_size(form: Form, clip_of: ClipOf) -> None:
    """A label for every pixel, of any size of picture, scaled or not, in one window or many."""
    if (method := segments(form, clip_of)) is not None:
        for settings in ({}, {"size": "full", "window": 32}, {"size": 30}):
            method.set_params(**settings)
            for one, size in zip(PICTURES, SIZES, strict=True):
                found = method.segment(one, NAMES)
                assert isinstance(found, Segmentation)
                assert found.labels == NAMES
                assert (found.size, found.map.shape, found.scores.shape) == (size, size, (3, *size))
                assert found.map.dtype == torch.int16
                assert 0 <= int(found.map.min()) <= int(found.map.max()) < 3
                assert abs(sum(found.shares().values()) - 1) < 1e-9
    if (method := scores(form, clip_of)) is not None:
        found = method.score(PICTURES)
        assert found.image.shape == (len(SIZES),)
        assert [tuple(one.shape) for one in found.maps] == list(SIZES)


def scores_are_in_bounds(form: Form, clip_of: ClipOf) -> None:
    """fp32 in [0, 1], and a pixel's label is the one with the best score."""
    if (method := segments(form, clip_of)) is not None:
        for background in (None, NAMES[1]):
            for one in PICTURES:
                found = method.segment(one, NAMES, background=background)
                assert found.scores.dtype == torch.float32
                assert 0 <= float(found.scores.min()) <= float(found.scores.max()) <= 1
                assert found.background == (None if background is None else 1)
                best, chosen = found.scores.amax(dim=0), found.map.long()[None]
                assert torch.allclose(found.scores.gather(0, chosen)[0], best, atol=1e-6)
    if (method := scores(form, clip_of)) is not None:
        found = method.score(PICTURES)
        for one in [found.image, *found.maps]:
            assert one.dtype == torch.float32
            assert 0 <= float(one.min()) <= float(one.max()) <= 1


def permuted_labels_permute_scores(form: Form, clip_of: ClipOf) -> None:
    """And nothing else; the background is found by its name, and names or their texts are the same."""
    if (method := segments(form, clip_of)) is None:
        return
    order = [2, 0, 1]
    for background in (None, "road"):
        first = method.segment(PICTURES[0], NAMES, background=background)
        other = method.segment(PICTURES[0], [NAMES[place] for place in order], background=background)
        assert torch.allclose(first.scores[order], other.scores, atol=1e-5)
    texts = ClassTexts(list(NAMES), templates=tuple(method.templates))
    assert torch.equal(method.segment(PICTURES[0], texts, background="road").scores, first.scores)


def unsure_pixels_have_no_label(form: Form, clip_of: ClipOf) -> None:
    """Those whose best score is below `unknown_below`, and only those."""
    if (method := segments(form, clip_of)) is None:
        return
    best = method.segment(PICTURES[0], NAMES).scores.amax(dim=0)
    limit = float(best.median())
    found = method.segment(PICTURES[0], NAMES, unknown_below=limit)
    assert torch.equal(found.map == -1, best < limit)
    assert abs(sum(found.shares().values()) - 1) < 1e-9


def alone_as_among_others(form: Form, clip_of: ClipOf) -> None:
    """A picture's answer does not depend on others of its batch, their order or their number."""
    if (method := segments(form, clip_of)) is not None:
        alone = [method.segment(one, NAMES).scores for one in PICTURES]
        for order, batch_size in (([0, 1, 2, 3], 3), ([3, 1, 0, 2], 1), ([2, 2, 1], 64)):
            found = list(method.segment_all([PICTURES[i] for i in order], NAMES, batch_size=batch_size))
            for i, one in zip(order, found, strict=True):
                assert one.scores.shape == alone[i].shape
                assert torch.allclose(one.scores, alone[i], atol=1e-4)
    if (method := scores(form, clip_of)) is not None:
        whole = method.score(PICTURES)
        for i, one in enumerate(PICTURES):
            found = method.score([one])
            assert torch.allclose(found.image, whole.image[i : i + 1], atol=1e-4)
            assert torch.allclose(found.maps[0], whole.maps[i], atol=1e-4)


def the_clip_stays(form: Form, clip_of: ClipOf) -> None:
    """Bit-identical, in the mode it was in, without gradients, asking for those it asked for."""
    clip = clip_of(0)
    before = {name: tensor.clone() for name, tensor in clip.state_dict().items()}
    clip.train()
    try:
        method = fitted(form, clip_of)
        answers(method)
        assert method.clip is clip
        assert all(module.training for module in clip.modules())
        assert all(parameter.grad is None and parameter.requires_grad for parameter in clip.parameters())
        for name, tensor in clip.state_dict().items():
            assert torch.equal(tensor, before[name]), name
    finally:
        clip.load_state_dict(before)
        clip.zero_grad(set_to_none=True)
        clip.requires_grad_(True).eval()


def the_seed_decides_everything(form: Form, clip_of: ClipOf) -> None:
    """The same numbers each time; no global generator is drawn from or seeded."""

    def states() -> tuple[Any, ...]:
        return repr(random.getstate()), repr(np.random.get_state()), torch.get_rng_state().tolist()  # noqa: NPY002

    with untouched_randomness():
        before = states()
        first = answers(fitted(form, clip_of))
        assert states() == before, "a global generator was used"
        torch.rand(3)
        for one, other in zip(first, answers(fitted(form, clip_of)), strict=True):
            assert torch.equal(one, other)


def settings_as_scikit_learn_has_them(form: Form, clip_of: ClipOf) -> None:
    """`clone` gives the same settings and the same Clip, and nothing that was learned."""
    method = fitted(form, clip_of)
    twin = clone(method)
    assert twin.clip is method.clip
    assert twin.get_params() == method.get_params()
    assert vars(twin).keys() == vars(form.make(clip_of(0))).keys()
    seed = method.get_params()["seed"] + 1
    assert twin.set_params(seed=seed).seed == seed != method.seed
    assert "did you mean seed" in refusal(lambda: twin.set_params(sed=1), ConfigError)


def saved_and_loaded(form: Form, clip_of: ClipOf, tmp_path: Path) -> None:
    """What was saved gives the same answers; nothing of the Clip is in the folder."""
    method = fitted(form, clip_of)
    loaded = type(method).load(method.save(tmp_path / "run"), method.clip)
    for one, other in zip(answers(method), answers(loaded), strict=True):
        assert torch.equal(one, other)
    size = sum(path.stat().st_size for path in (tmp_path / "run").rglob("*") if path.is_file())
    learned = sum(tensor.numel() * tensor.element_size() for tensor in method._learned().values())
    assert size < 1.1 * learned + 20_000, (size, learned)


def another_clip_is_refused(form: Form, clip_of: ClipOf, tmp_path: Path) -> None:
    """What was made with one Clip is not loaded into another."""
    method = fitted(form, clip_of)
    folder = method.save(tmp_path / "run")
    assert "other weights" in refusal(lambda: type(method).load(folder, clip_of(1)), CheckpointError)


def bad_labels_are_refused(form: Form, clip_of: ClipOf) -> None:
    """None, one twice, an empty one, a word for a list, a background that is none of them: one line each."""
    if (method := segments(form, clip_of)) is None:
        return
    for labels, said in (
        ([], "at least one name"),
        ("sky", "at least one name"),
        (["sky", "road", "sky"], "'sky' is given more than once"),
        (["sky", " "], "not empty"),
    ):
        assert said in refusal(lambda labels=labels: method.segment(PICTURES[0], labels), ConfigError)  # type: ignore[misc]
    wrong = refusal(lambda: method.segment(PICTURES[0], NAMES, background="wall"), ConfigError)
    assert "'wall' is none of the labels" in wrong


def bad_settings_are_refused(form: Form, clip_of: ClipOf) -> None:
    """A size, an overlap, a blend or a batch that cannot be."""
    if (method := segments(form, clip_of)) is None:
        return
    for name, value in (("size", 0), ("size", "half"), ("overlap", 1.0), ("blend", "sharp")):
        kept = getattr(method, name)
        method.set_params(**{name: value})
        assert repr(value) in refusal(lambda: method.segment(PICTURES[0], NAMES), ConfigError)
        method.set_params(**{name: kept})
    assert "batch_size" in refusal(lambda: list(method.segment_all([], NAMES, batch_size=0)), ConfigError)


def unreadable_pictures_are_named(form: Form, clip_of: ClipOf, tmp_path: Path) -> None:
    """An error with the file's name, or an `Unreadable` in the picture's place."""
    broken = tmp_path / "broken.jpg"
    broken.write_text("no picture")
    if (method := segments(form, clip_of)) is not None:
        assert "broken.jpg" in refusal(lambda: method.segment(broken, NAMES), PictureError)
        images = [PICTURES[0], broken, PICTURES[1]]
        assert "broken.jpg" in refusal(lambda: list(method.segment_all(images, NAMES)), PictureError)
        first, bad, last = method.segment_all(images, NAMES, on_error="skip")
        assert (first.size, last.size) == SIZES[:2]
        assert isinstance(bad, Unreadable)
        assert bad.place == 1
        assert "broken.jpg" in bad.reason
    if (method := scores(form, clip_of)) is not None:
        assert "broken.jpg" in refusal(lambda: method.score([broken]), PictureError)


def masks_of_another_size_are_refused(form: Form, clip_of: ClipOf) -> None:
    """With both sizes in one line."""
    if form.fit is None or not form.reads_masks:
        return
    images, masks = LEARNED_FROM
    wrong = [*masks[:-1], mask(35, 44)]
    said = refusal(lambda: form.fit(form.make(clip_of(0)), images, wrong), DataError)  # type: ignore[misc]
    assert "35x44" in said
    assert "36x44" in said


CHECKS = (
    an_answer_has_its_pictures_size,
    scores_are_in_bounds,
    permuted_labels_permute_scores,
    unsure_pixels_have_no_label,
    alone_as_among_others,
    the_clip_stays,
    the_seed_decides_everything,
    settings_as_scikit_learn_has_them,
    saved_and_loaded,
    another_clip_is_refused,
    bad_labels_are_refused,
    bad_settings_are_refused,
    unreadable_pictures_are_named,
    masks_of_another_size_are_refused,
)


def run(check: Any, form: Form, clip_of: ClipOf, tmp_path: Path) -> None:
    places = {"tmp_path": tmp_path} if "tmp_path" in check.__annotations__ else {}
    check(form, clip_of, **places)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("form", list(methods()))
def test_a_method_keeps_its_familys_contract(form: Form, check: Any, clip_of: ClipOf, tmp_path: Path) -> None:
    run(check, form, clip_of, tmp_path)


def test_every_method_of_the_register_is_checked() -> None:
    assert {paper.slug for paper in register() if paper.family == "dense" and paper.method} <= set(FORMS)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_a_sound_method_passes(check: Any, clip_of: ClipOf, tmp_path: Path) -> None:
    run(check, form(broken.Sound, broken.learn, templates=SENTENCES), clip_of, tmp_path)


@pytest.mark.parametrize(
    ("method", "check"),
    [
        (broken.AnswersAtItsOwnSize, an_answer_has_its_pictures_size),
        (broken.ScoresAtItsOwnSize, an_answer_has_its_pictures_size),
        (broken.GivesCosines, scores_are_in_bounds),
        (broken.LabelsTheWorst, scores_are_in_bounds),
        (broken.ScoresDistances, scores_are_in_bounds),
        (broken.FavorsTheFirstLabel, permuted_labels_permute_scores),
        (broken.BackgroundIsTheFirst, permuted_labels_permute_scores),
        (broken.IsAlwaysSure, unsure_pixels_have_no_label),
        (broken.CentersItsBatch, alone_as_among_others),
        (broken.ScoresAgainstTheOthers, alone_as_among_others),
        (broken.ChangesTheClip, the_clip_stays),
        (broken.LeavesTheMode, the_clip_stays),
        (broken.LeavesGradients, the_clip_stays),
        (broken.GlobalNoise, the_seed_decides_everything),
        (broken.SeedsTheGlobalGenerator, the_seed_decides_everything),
        (broken.CopiesTheClip, settings_as_scikit_learn_has_them),
        (broken.ClonesWhatItLearned, settings_as_scikit_learn_has_them),
        (broken.ForgetsWhatItLearned, saved_and_loaded),
        (broken.SavesTheClip, saved_and_loaded),
        (broken.TakesAnyClip, another_clip_is_refused),
        (broken.TakesAnyLabels, bad_labels_are_refused),
        (broken.TakesAnySetting, bad_settings_are_refused),
        (broken.SkipsInSilence, unreadable_pictures_are_named),
        (broken.CutsMasks, masks_of_another_size_are_refused),
    ],
)
def test_a_check_fails_on_what_breaks_its_promise(
    method: Any, check: Any, clip_of: ClipOf, tmp_path: Path
) -> None:
    with pytest.raises(AssertionError):
        run(check, form(method, broken.learn, templates=SENTENCES), clip_of, tmp_path)


def test_every_check_has_been_seen_to_fail() -> None:
    marks = test_a_check_fails_on_what_breaks_its_promise.pytestmark  # type: ignore[attr-defined]
    seen = {check for mark in marks if mark.name == "parametrize" for _, check in mark.args[1]}
    assert seen == set(CHECKS)
