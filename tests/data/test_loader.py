from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clipworks.core.images import Preprocessing
from clipworks.core.tokenizer import Tokens
from clipworks.data.augment import RandomView
from clipworks.data.backgrounds import Plain, Varied
from clipworks.data.batch import Batch
from clipworks.data.loader import Loader, Process, Reading
from clipworks.data.mixture import Mixture
from clipworks.data.samplers import Sampler, Sequential, Shuffled, UniqueLabels
from clipworks.data.sentences import TextChoice
from clipworks.data.source import Example, Examples, Selected
from clipworks.data.streams import Stream
from clipworks.errors import ConfigError, DataError, PictureError

MakeExamples = Callable[..., list[Example]]
SMALL = Preprocessing(8)
STILL = Reading(workers=0)


class Listed:
    """A list of examples as the pieces of a stream."""

    def __init__(self, examples: list[Example], in_piece: int = 7) -> None:
        self.lists = [examples[start : start + in_piece] for start in range(0, len(examples), in_piece)]

    def __len__(self) -> int:
        return len(self.lists)

    def read(self, piece: int, start: int = 0) -> Iterator[tuple[int, Example]]:
        yield from list(enumerate(self.lists[piece]))[start:]


def equal(one: Batch, other: Batch) -> bool:
    assert one.images is not None and other.images is not None
    return (
        one.keys == other.keys
        and torch.equal(one.images, other.images)
        and all(torch.equal(one.features[name], other.features[name]) for name in one.features)
        and all(torch.equal(one.texts[name].ids, other.texts[name].ids) for name in one.texts)
    )


def numbers(batch: Batch) -> list[int]:
    """Which pictures are in the batch, read from their color."""
    assert batch.images is not None
    return (batch.images[:, 0, 0, 0].int() + 256 * batch.images[:, 1, 0, 0].int()).tolist()


# What is in a batch ------------------------------------------------------------------------------


def test_rows_of_a_batch_belong_together(make_examples: MakeExamples, spell: Any, read: Any) -> None:
    loader = Loader(Examples(make_examples(300, classes=5)), SMALL, spell, 20)
    for batch in loader:
        which = numbers(batch)
        assert batch.images is not None and batch.images.dtype == torch.uint8
        assert batch.images.shape == (20, 3, 8, 8)
        assert batch.keys == [f"e{number}" for number in which]
        assert batch.features["label"].tolist() == [number % 5 for number in which]
        assert [text.split()[0] for text in read(batch.texts["alt"])] == batch.keys
        assert batch.texts["alt"].owner is None


def test_captions_change_from_pass_to_pass_and_can_be_drawn_again(
    make_examples: MakeExamples, spell: Any, read: Any
) -> None:
    loader = Loader(Examples(make_examples(60)), SMALL, spell, 20, reading=STILL)
    passes = [
        {key: text for batch in loader for key, text in zip(batch.keys, read(batch.texts["alt"]))}
        for _ in range(6)
    ]
    drawn = [sum(one[key].endswith("two") for one in passes) for key in passes[0]]
    assert len(set(drawn)) > 3  # neither always the same caption nor in step
    again = Loader(Examples(make_examples(60)), None, spell, 15, sampler=Sequential(), reading=STILL)
    again.set_epoch(4)
    assert {
        key: text for batch in again for key, text in zip(batch.keys, read(batch.texts["alt"]))
    } == passes[4]


def test_several_sentences_a_picture_carry_their_owner(spell: Any, read: Any) -> None:
    examples = [
        Example("a", texts={"alt": ["a1", "a2", "a3"], "region": ["ar", "as"]}),
        Example("b", texts={"alt": "b1"}),
        Example("c", texts={"alt": ["c1", "c2"], "region": "cr"}),
    ]
    choice = TextChoice({"alt": 2, "region": None})
    batch = next(iter(Loader(Examples(examples), None, spell, 3, sampler=Sequential(), texts=choice)))
    assert batch.images is None
    region = batch.texts["region"]
    assert (
        region.owner is not None and region.owner.tolist() == [0, 0, 2] and read(region) == ["ar", "as", "cr"]
    )
    alt = batch.texts["alt"]
    assert alt.owner is not None and alt.owner.tolist() == [0, 0, 1, 2, 2]
    assert len(set(read(alt))) == 5 and all(text[0] == "aabcc"[row] for row, text in enumerate(read(alt)))


def test_a_text_that_no_example_has_is_named(make_examples: MakeExamples, spell: Any) -> None:
    loader = Loader(Examples(make_examples(4)), None, spell, 4, texts=["alts"])
    with pytest.raises(DataError, match="did you mean alt"):
        next(iter(loader))


def test_equal_captions_are_drawn_again(spell: Any, read: Any) -> None:
    examples = Examples(Example(f"k{number}", texts={"alt": list("abcdefghijkl")}) for number in range(8))
    plain = Loader(examples, None, spell, 8)
    unique = Loader(examples, None, spell, 8, texts=TextChoice({"alt": 1}, unique=True))
    repeated = [8 - len(set(read(next(iter(loader)).texts["alt"]))) for loader in [plain] * 20 for _ in [0]]
    fresh = [8 - len(set(read(unique.batch(epoch, 0).texts["alt"]))) for epoch in range(20)]
    assert sum(repeated) > 20 and sum(fresh) <= 1
    same = Examples(Example(f"k{number}", texts={"alt": "x"}) for number in range(4))
    assert len(next(iter(Loader(same, None, spell, 4, texts=TextChoice({"alt": 1}, unique=True))))) == 4


def test_a_transform_sees_the_batch_where_it_is_made(make_examples: MakeExamples) -> None:
    loader = Loader(Examples(make_examples(8)), SMALL, None, 4, transform=RandomView(5).of)
    assert [batch.images.shape for batch in loader if batch.images is not None] == [(4, 3, 5, 5)] * 2


# Order, ranks, resuming ----------------------------------------------------------------------------


@given(
    count=st.integers(1, 40),
    per_process=st.integers(1, 4),
    processes=st.integers(1, 3),
    sampler=st.sampled_from([Sequential(), Shuffled(drop_last=False), Shuffled()]),
)
def test_all_processes_together_meet_every_example_once(
    make_examples: MakeExamples, count: int, per_process: int, processes: int, sampler: Sampler
) -> None:
    size = per_process * processes
    source = Examples([Example(example.key) for example in make_examples(count)])
    if sampler == Shuffled() and count < size:
        return
    loaders = [
        Loader(source, None, None, size, sampler=sampler, process=Process(rank, processes), reading=STILL)
        for rank in range(processes)
    ]
    batches = [[batch.keys for batch in loader] for loader in loaders]
    assert len({len(one) for one in batches}) == 1
    keys = [key for one in batches for batch in one for key in batch]
    assert len(set(keys)) == len(keys)
    assert len(keys) == (count if sampler != Shuffled() else count // size * size)
    # The global batch of a step is the same however many processes share it.
    alone = [batch.keys for batch in Loader(source, None, None, size, sampler=sampler, reading=STILL)]
    for step, whole in enumerate(alone):
        assert sorted(key for one in batches for key in one[step]) == sorted(whole)


def mixture(make_examples: MakeExamples) -> Mixture:
    return Mixture(
        [
            (Examples(make_examples(60, classes=6)), 5, UniqueLabels()),
            (Examples(make_examples(9, prefix="f")), 2),
        ]
    )


@pytest.mark.parametrize("kind", ["source", "mixture", "stream", "stream with length"])
@pytest.mark.parametrize("reading", [STILL, Reading(workers=2, ahead=3)])
def test_resuming_gives_the_identical_rest(
    kind: str, reading: Reading, make_examples: MakeExamples, spell: Any
) -> None:
    examples = make_examples(40)

    def make(seed: int = 3) -> Loader:
        sources = {
            "source": lambda: (Examples(examples), 6),
            "mixture": lambda: (mixture(make_examples), None),
            "stream": lambda: (Stream(Listed(examples), window=5), 6),
            "stream with length": lambda: (Stream(Listed(examples), window=5, examples=31), 6),
        }
        source, size = sources[kind]()
        return Loader(source, SMALL, spell, size, seed=seed, reading=reading)

    whole, walked = make(), []
    states = [whole.state_dict()]
    for _ in range(3):
        for batch in whole:
            walked.append(batch)
            states.append(whole.state_dict())
    assert whole.epoch == 3 and whole.step == 0
    for place in (0, 2, 4, 5, 6, 8, len(walked) - 1):
        resumed = make()
        resumed.load_state_dict(states[place])
        rest = [batch for _ in range(resumed.epoch, 3) for batch in resumed]
        # A state taken at the very end of an epoch of unknown length has an empty rest of it before it.
        assert len(rest) == len(walked) - place
        assert all(map(equal, rest, walked[place:]))
    with pytest.raises(ConfigError, match="seed 3"):
        make(seed=4).load_state_dict(states[2])


def test_a_loop_that_was_broken_off_goes_on(make_examples: MakeExamples) -> None:
    loader = Loader(Examples(make_examples(30)), SMALL, None, 5)
    whole = [batch.keys for batch in Loader(Examples(make_examples(30)), SMALL, None, 5)]
    for step, batch in enumerate(loader):
        assert batch.keys == whole[step]
        if step == 2:
            break
    assert [batch.keys for batch in loader] == whole[3:]
    assert (loader.epoch, loader.step) == (1, 0)
    loader.set_epoch(0)
    assert next(iter(loader)).keys == whole[0]


def test_any_batch_can_be_made_out_of_turn(make_examples: MakeExamples, spell: Any) -> None:
    loader = Loader(mixture(make_examples), SMALL, spell)
    walked = [batch for _ in range(2) for batch in loader]
    steps = len(loader)
    fresh = Loader(mixture(make_examples), SMALL, spell, reading=STILL)
    assert equal(fresh.batch(1, 3), walked[steps + 3])
    assert equal(fresh.batch(0, 7), walked[7])


def test_seeds_make_the_stream(make_examples: MakeExamples, spell: Any) -> None:
    streams = [
        [batch.keys for batch in Loader(mixture(make_examples), SMALL, spell, seed=seed)]
        for seed in (0, 0, 1)
    ]
    assert streams[0] == streams[1] != streams[2]


def test_small_sources_of_a_mixture_get_new_captions_on_every_round(
    make_examples: MakeExamples, spell: Any, read: Any
) -> None:
    seen: dict[str, set[str]] = {}
    rounds: dict[str, list[int]] = {}
    for batch in Loader(mixture(make_examples), SMALL, spell):
        assert batch.features["part"].tolist() == [0] * 5 + [1] * 2
        for key, text, view in zip(batch.keys, read(batch.texts["alt"]), batch.features["view"].tolist()):
            seen.setdefault(key, set()).add(text)
            rounds.setdefault(key, []).append(view)
    small = [key for key in seen if key.startswith("f")]
    assert len(small) == 9 and sum(len(seen[key]) for key in small) > 11
    assert all(len(set(rounds[key])) == len(rounds[key]) for key in rounds)  # never the same view twice


# Streams ----------------------------------------------------------------------------------------


def test_processes_of_a_stream_make_equal_steps_and_share_everything(make_examples: MakeExamples) -> None:
    stream = Stream(Listed(make_examples(60), in_piece=7), window=4, examples=60)
    loaders = [Loader(stream, SMALL, None, 10, process=Process(rank, 2)) for rank in range(2)]
    batches = [list(loader) for loader in loaders]
    assert [len(one) for one in batches] == [6, 6] == [len(loader) for loader in loaders]
    first, second = (
        [key for batch in one for key, turn in zip(batch.keys, batch.features["view"].tolist()) if turn == 0]
        for one in batches
    )
    assert len(set(first + second)) == len(first) + len(second) > 50
    # Whoever is through with its share goes on with the next turn instead of stopping early.
    assert len(first) + len(second) < 60 == sum(len(batch) for one in batches for batch in one)


def test_with_another_number_of_processes_a_stream_begins_its_next_turn(make_examples: MakeExamples) -> None:
    def loaders(count: int) -> list[Loader]:
        stream = Stream(Listed(make_examples(60), in_piece=5), window=4, examples=60)
        return [
            Loader(stream, SMALL, None, 12, seed=3, process=Process(rank, count)) for rank in range(count)
        ]

    first = loaders(2)[0]
    for step, _ in enumerate(first):
        if step == 1:
            break
    state = first.state_dict()
    assert state["processes"] == 2
    resumed = loaders(3)
    for loader in resumed:
        loader.load_state_dict(state)
    batches = [list(loader) for loader in resumed]
    assert [len(one) for one in batches] == [3, 3, 3]  # what was left of the epoch's five steps
    views = {view for one in batches for batch in one for view in batch.features["view"].tolist()}
    keys = [key for one in batches for batch in one for key in batch.keys]
    assert views == {1} and len(set(keys)) == len(keys) == 36


def test_a_stream_without_length_ends_when_it_is_read(make_examples: MakeExamples) -> None:
    loader = Loader(Stream(Listed(make_examples(20)), window=4), SMALL, None, 6)
    assert [len(batch) for batch in loader] == [6, 6, 6, 2]
    with pytest.raises(ConfigError, match="examples"):
        len(loader)
    with pytest.raises(ConfigError, match="examples"):
        Loader(Stream(Listed(make_examples(20))), SMALL, None, 6, process=Process(0, 2))


# Broken pictures ------------------------------------------------------------------------------------


def with_broken(examples: list[Example], broken: set[int]) -> list[Example]:
    return [
        Example(one.key, b"this is no picture" if number in broken else one.image, one.texts, one.label)
        for number, one in enumerate(examples)
    ]


BROKEN = {3, 14, 41, 77, 95}  # five in a hundred


@pytest.mark.parametrize("reading", [STILL, Reading(workers=3), Reading(workers=2, cache="memory")])
def test_broken_pictures_are_replaced_by_their_like_and_counted_exactly(
    make_examples: MakeExamples, reading: Reading
) -> None:
    source = Examples(with_broken(make_examples(100, classes=10), BROKEN))
    loader = Loader(source, SMALL, None, 10, sampler=UniqueLabels(), reading=reading)
    for _ in range(3):
        for batch in loader:
            assert len(batch) == 10 and batch.keys == [f"e{number}" for number in numbers(batch)]
            assert sorted(batch.features["label"].tolist()) == list(range(10))
            assert not set(numbers(batch)) & BROKEN
    assert loader.skipped.counts == {"unreadable picture": 5}
    again = Loader(source, SMALL, None, 10, sampler=UniqueLabels(), reading=STILL)
    loader.set_epoch(0)
    assert all(map(equal, loader, again))


def test_broken_pictures_make_a_sequential_reading_shorter(make_examples: MakeExamples) -> None:
    source = Examples(with_broken(make_examples(100), BROKEN))
    loader = Loader(source, SMALL, None, 30, sampler=Sequential())
    assert [number for batch in loader for number in numbers(batch)] == [
        n for n in range(100) if n not in BROKEN
    ]
    assert loader.skipped.counts == {"unreadable picture": 5}


def test_broken_pictures_of_a_stream_leave_full_batches(make_examples: MakeExamples) -> None:
    stream = Stream(Listed(with_broken(make_examples(100), BROKEN)), window=9)
    loader = Loader(stream, SMALL, None, 19)
    met = [numbers(batch) for batch in loader]
    assert [len(batch) for batch in met] == [19] * 5
    assert sorted(number for batch in met for number in batch) == [
        number for number in range(100) if number not in BROKEN
    ]
    assert loader.skipped.counts == {"unreadable picture": 5}


def test_the_first_broken_picture_is_raised_on_request(make_examples: MakeExamples) -> None:
    source = Examples(with_broken(make_examples(20), {7}))
    for workers in (0, 2):
        loader = Loader(source, SMALL, None, 20, reading=Reading(workers=workers, broken="raise"))
        with pytest.raises(PictureError):
            list(loader)


def test_a_source_in_which_nothing_can_be_read_is_an_error(make_examples: MakeExamples) -> None:
    source = Examples(with_broken(make_examples(20), set(range(20))))
    with pytest.raises(DataError, match="nothing readable"):
        next(iter(Loader(source, SMALL, None, 4)))


def test_reports_of_wrapped_sources_are_included(make_examples: MakeExamples) -> None:
    from clipworks.data.source import Skipped

    source = Examples(make_examples(8))
    source.skipped = Skipped()  # type: ignore[attr-defined]
    source.skipped.add("missing shard", "a.tar")  # type: ignore[attr-defined]
    assert Loader(Selected(source, range(4)), SMALL, None, 2).skipped.counts == {"missing shard": 1}


# Cache and backgrounds ----------------------------------------------------------------------------------


class Counting(Examples):
    """Counts how often each example is asked for."""

    def __init__(self, examples: list[Example]) -> None:
        super().__init__(examples)
        self.asked = np.zeros(len(examples), dtype=int)

    def __getitem__(self, index: int, /) -> Example:
        self.asked[index] += 1
        return super().__getitem__(index)


def test_the_cache_decodes_every_picture_once_and_changes_nothing(
    make_examples: MakeExamples, spell: Any
) -> None:
    source = Counting(make_examples(40))
    cached = Loader(source, SMALL, spell, 10, reading=Reading(workers=2, cache="memory"))
    plain = Loader(Examples(make_examples(40)), SMALL, spell, 10)
    for _ in range(3):
        assert all(map(equal, list(cached), list(plain)))
    assert source.asked.tolist() == [1] * 40


@pytest.mark.parametrize("cache", [None, "memory"])
def test_transparent_pictures_stand_before_a_color_of_their_view(
    cache: Any, png: Callable[..., bytes]
) -> None:
    opaque = Example("o", png(9))
    clear = [Example(f"k{number}", png(200, "RGBA"), background=Varied(seed=1)) for number in range(3)]
    loader = Loader(
        Examples([opaque, *clear]),
        SMALL,
        None,
        4,
        sampler=Sequential(),
        reading=Reading(workers=0, cache=cache),
    )
    for epoch in range(3):
        (batch,) = list(loader)
        assert batch.images is not None
        assert batch.images[0, :, 0, 0].tolist() == [9, 0, 7]
        colors = Varied(seed=1).colors(["k0", "k1", "k2"], epoch)
        alpha = 128 / 255
        expected = alpha * np.array([200, 0, 7]) + (1 - alpha) * 255 * colors
        np.testing.assert_allclose(batch.images[1:, :, 3, 3].numpy(), expected, atol=1.5)


def test_backgrounds_vary_with_key_and_epoch_and_white_is_white() -> None:
    keys = [f"k{number}" for number in range(500)]
    colors = Varied(white=0.4).colors(keys, 0)
    white = (colors == 1).all(axis=1)
    assert abs(white.mean() - 0.4) < 0.08
    assert abs(colors[~white].mean() - 0.5) < 0.05
    assert not np.array_equal(colors, Varied(white=0.4).colors(keys, 1))
    np.testing.assert_array_equal(colors[7], Varied(white=0.4).colors(["k7"], 0)[0])
    assert (Plain().colors(keys, 3) == 1).all()


# Threads --------------------------------------------------------------------------------------------


def test_batches_are_made_while_the_caller_works_but_not_too_many(make_examples: MakeExamples) -> None:
    made: list[Batch] = []

    def noted(batch: Batch) -> Batch:
        made.append(batch)
        return batch

    loader = Loader(
        Examples(make_examples(90)), SMALL, None, 10, transform=noted, reading=Reading(workers=1, ahead=3)
    )
    batches = iter(loader)
    next(batches)
    most = 1 + 3 + 1  # given out, waiting, and the one for which there is no room yet
    deadline = time.monotonic() + 20
    while len(made) < most and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.15)
    assert len(made) == most
    assert len(list(batches)) == 8 and len(made) == 9


def test_the_time_that_the_caller_waits_is_counted(make_examples: MakeExamples) -> None:
    def slow(batch: Batch) -> Batch:
        time.sleep(0.02)
        return batch

    loader = Loader(Examples(make_examples(40)), SMALL, None, 10, transform=slow, reading=STILL)
    for _ in loader:
        time.sleep(0.1)
    assert loader.wait_seconds >= 0.08
    counted = loader.wait_seconds
    time.sleep(0.1)
    assert loader.wait_seconds == counted


def test_threads_end_with_the_epoch_and_with_a_broken_loop(make_examples: MakeExamples) -> None:
    before = threading.active_count()
    loader = Loader(Examples(make_examples(80)), SMALL, None, 10)
    list(loader)
    for _ in loader:
        break
    gc.collect()
    assert threading.active_count() == before


def test_errors_of_the_making_thread_arrive(make_examples: MakeExamples) -> None:
    def failing(batch: Batch) -> Batch:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        next(iter(Loader(Examples(make_examples(8)), SMALL, None, 4, transform=failing)))


def test_cached_batches_cost_little(png: Callable[..., bytes]) -> None:
    source = Examples(
        Example(f"k{number}", png(number, size=64), {"alt": ["a", "b"]}) for number in range(480)
    )

    def tokens(texts: list[str]) -> Tokens:
        return Tokens(
            torch.zeros(len(texts), 4, dtype=torch.int64), torch.zeros(len(texts), dtype=torch.int64)
        )

    loader = Loader(source, Preprocessing(64), tokens, 240, reading=Reading(workers=0, cache="memory"))
    list(loader)
    seconds = []
    for _ in range(10):
        began = time.thread_time()
        loader.batch(1, 0)
        seconds.append(time.thread_time() - began)
    assert min(seconds) < 0.1  # about 0.003 on an idle core


# Options -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"batch_size": None}, "batch_size"),
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": 5, "process": Process(0, 2)}, "shared evenly"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    make_examples: MakeExamples, options: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        Loader(Examples(make_examples(8)), SMALL, None, **options)


def test_options_of_mixtures_and_streams_are_checked(make_examples: MakeExamples) -> None:
    with pytest.raises(ConfigError, match="mixture"):
        Loader(mixture(make_examples), SMALL, None, 9)
    stream = Stream(Listed(make_examples(9)))
    with pytest.raises(ConfigError, match="sampler"):
        Loader(stream, SMALL, None, 3, sampler=Shuffled())
    with pytest.raises(ConfigError, match="not cached"):
        Loader(stream, SMALL, None, 3, reading=Reading(cache="memory"))
    with pytest.raises(ConfigError, match="random access"):
        Loader(stream, SMALL, None, 3).batch(0, 0)
    with pytest.raises(ConfigError, match="rank 2"):
        Process(2, 2)
    with pytest.raises(ConfigError, match="positive"):
        TextChoice({"alt": 0})
    with pytest.raises(DataError, match="too few"):
        Loader(Examples(make_examples(3)), SMALL, None, 4)
