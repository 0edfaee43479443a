from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from clipworks.data.captions import (
    IMAGENET_TEMPLATES,
    SIMPLE_TEMPLATES,
    TRAINING_TEMPLATES,
    AnyOf,
    CaptionGrid,
    ClassTexts,
    class_names,
    class_texts,
    draw_text,
    fill,
    indefinite_article,
    sample_caption,
)
from clipworks.data.randomness import Draws
from clipworks.errors import ConfigError, DataError

ARTICLES = {
    "a": """cat,unicycle,uniform,European fire salamander,one-armed bandit,UFO,U-boat,ukulele,used car,
        CD player,black widow,trolleybus,compass,potter's wheel,teddy,hog,horse,hotel,7-seater,USB stick,lens,
        brass instrument,golden retriever,Christmas stocking,mantis,used abacus,unit,eucalyptus,euphonium,
        T-shirt,bus,dress""",
    "an": """orange,umbrella,hour,hourglass,heirloom,iPod,MRI scan,SUV,X-ray,8-ball,11-year-old,18-wheeler,
        abacus,African elephant,unimpressed cat,uninvited guest,ox,ice lolly,apron,academic gown,oboe,alp,
        FBI agent,honest man,onion,L-shaped sofa,iris,octopus,80-seater,unmarked car,éclair,hors d'oeuvre""",
    "": """sunglasses,swimming trunks,binoculars,guacamole,ice cream,mashed potato,the moon,two dogs,my house,
        people,cups of coffee,chickens in a yard,an apple,fried rice,some flowers,scissors,women""",
}


@pytest.mark.parametrize(
    ("article", "name"),
    [(article, name.strip()) for article, names in ARTICLES.items() for name in names.split(",")],
)
def test_articles_are_those_of_english(article: str, name: str) -> None:
    assert indefinite_article(name) == article


def test_training_captions_read_well() -> None:
    for template in TRAINING_TEMPLATES:
        for name in ("cat", "orange", "sunglasses"):
            caption = fill(template, name)
            assert name in caption
            assert "{" not in caption and "  " not in caption and caption == caption.strip()
            assert "a orange" not in caption and "an cat" not in caption and "a sunglasses" not in caption
    assert 28 <= len(set(TRAINING_TEMPLATES)) == len(TRAINING_TEMPLATES) <= 40


def test_the_published_templates_are_kept_letter_by_letter() -> None:
    assert len(IMAGENET_TEMPLATES) == len(set(IMAGENET_TEMPLATES)) == 80
    assert len(SIMPLE_TEMPLATES) == 7
    assert set(SIMPLE_TEMPLATES) <= set(IMAGENET_TEMPLATES)
    assert all(template.count("{}") == 1 and template.endswith(".") for template in IMAGENET_TEMPLATES)
    # Compared once with the published list; from then on the fingerprint keeps it.
    joined = "\n".join(IMAGENET_TEMPLATES)
    assert hashlib.sha256(joined.encode()).hexdigest()[:16] == "4f976686fb651bb5"


@pytest.mark.peers
def test_the_published_templates_are_those_of_open_clip() -> None:
    open_clip = pytest.importorskip("open_clip")
    assert [template("x") for template in open_clip.OPENAI_IMAGENET_TEMPLATES] == [
        template.replace("{}", "x") for template in IMAGENET_TEMPLATES
    ]
    assert [template("x") for template in open_clip.SIMPLE_IMAGENET_TEMPLATES] == [
        template.replace("{}", "x") for template in SIMPLE_TEMPLATES
    ]


def test_zero_shot_texts_keep_the_references_grammar() -> None:
    texts = ClassTexts(["orange"], templates=IMAGENET_TEMPLATES).texts(0)
    assert "a origami orange." in texts and "a photo of a orange." in texts
    assert len(texts) == 80


def test_class_texts_hold_names_synonyms_and_descriptions() -> None:
    texts = ClassTexts(
        ["hog", "ox"], [["pig", "hog"], []], [["a pink animal"], []], templates=("a {}.", "the {}.")
    )
    assert texts.texts(0) == ["a hog.", "the hog.", "a pig.", "the pig.", "a pink animal"]
    assert texts.texts(1) == ["a ox.", "the ox."]
    assert len(texts) == 2
    assert texts.select(["ox"]).texts(0) == texts.texts(1)
    assert texts.select([1, 0]).names == ("ox", "hog")
    assert [grid.names for grid in texts.grids()] == [("hog", "pig"), ("ox",)]


def test_half_of_the_captions_use_the_first_name_and_all_templates_are_used() -> None:
    names, templates = ["hog", "pig", "Sus scrofa"], ["{}", "a photo of {a} {}."]
    counts = Counter(sample_caption(names, templates, Draws(number)) for number in range(4000))
    assert len(counts) == 6
    for caption, count in counts.items():
        share = 0.25 if "hog" in caption else 0.125
        assert abs(count / 4000 - share) < 0.03
    generator = np.random.default_rng(0)
    assert sample_caption(names, templates, generator) in counts


def test_a_grid_lists_what_it_draws_from() -> None:
    grid = CaptionGrid(["orange", "citrus"], ["{a} {}", "the {}"])
    assert list(grid) == ["an orange", "the orange", "a citrus", "the citrus"]
    assert grid[-1] == "the citrus" and grid[1:3] == ["the orange", "a citrus"]
    assert {grid.draw(Draws(number)) for number in range(100)} == set(grid)
    with pytest.raises(IndexError):
        grid[4]


def test_groups_are_drawn_evenly_whatever_their_size() -> None:
    texts = AnyOf(["one", [f"many {number}" for number in range(20)], CaptionGrid(["x"], ["{}"])])
    counts = Counter(draw_text(texts, Draws(number)).split()[0] for number in range(3000))
    assert all(abs(counts[word] - 1000) < 120 for word in ("one", "many", "x"))
    assert len(texts) == 22 and texts[0] == "one" and list(texts)[-1] == "x"


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.json", '["cat", "dog"]', ["cat", "dog"]),
        ("a.json", '[{"index": 1, "name": "dog"}, {"index": 0, "name": "cat"}]', ["cat", "dog"]),
        ("a.json", '{"1": "dog", "0": "cat"}', ["cat", "dog"]),
        ("a.txt", "\ufeffcat\n\n dog \n", ["cat", "dog"]),
    ],
)
def test_class_names_are_read_from_every_form(
    tmp_path: Path, name: str, content: str, expected: list[str]
) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    assert class_names(tmp_path / name) == expected


def test_synonyms_are_read_along(tmp_path: Path) -> None:
    records = [
        {"index": 0, "name": "hog", "names": ["hog", "pig"]},
        {"index": 1, "name": "ox", "names": ["ox"]},
    ]
    (tmp_path / "classes.json").write_text(json.dumps(records))
    texts = class_texts(tmp_path / "classes.json")
    assert texts.synonyms == (("pig",), ())


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", "{"),
        ("a.json", "[]"),
        ("a.json", "3"),
        ("a.json", '[{"index": 0}]'),
        ("a.json", '[{"index": 0, "name": "a"}, {"index": 2, "name": "b"}]'),
        ("a.json", '["a", 3]'),
        ("a.json", '{"x": "a"}'),
        ("a.txt", "\n\n"),
        ("a.txt", b"\xff\xfe\x00"),
    ],
)
def test_other_files_of_names_are_refused_with_their_path(
    tmp_path: Path, name: str, content: str | bytes
) -> None:
    (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(DataError, match=name):
        class_names(tmp_path / name)


def test_mistakes_in_class_texts_are_refused() -> None:
    with pytest.raises(DataError, match="cat"):
        ClassTexts("cat")
    with pytest.raises(DataError, match="synonyms has 1 entries for 2"):
        ClassTexts(["a", "b"], [["c"]])
    with pytest.raises(ConfigError, match="a photo"):
        ClassTexts(["a"], templates=("a photo",))
    with pytest.raises(DataError, match="did you mean goldfish"):
        ClassTexts(["goldfish", "tench"]).select(["goldfisch"])
    with pytest.raises(DataError, match="twice"):
        ClassTexts(["a", "b"]).select([0, "a"])
    with pytest.raises(DataError, match="no such file"):
        class_names("nowhere.txt")
