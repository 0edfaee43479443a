"""Rewriting captions: prompts and their parsing, resuming, what is reported, models, and the joining."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from clipworks.core.tokenizer import Tokens
from clipworks.data.loader import Loader, Process, Reading
from clipworks.data.randomness import Draws
from clipworks.data.rewrite import (
    INSTRUCTION,
    Pool,
    caption_in,
    clean,
    parse,
    prompt,
    read_pool,
    read_rewrites,
    rewrite,
    shipped_pools,
)
from clipworks.data.rewriters import CausalModel, WorldRewriter, _Sampling
from clipworks.data.rewritten import Rewritten, choices, overlap, read_lines
from clipworks.data.sentences import TextChoice
from clipworks.data.source import Example, Examples
from clipworks.errors import CheckpointError, ConfigError, DataError

CAPTIONS = {
    f"k{i}": text for i, text in enumerate(["a red circle", "a large blue star on grass", "two fish"])
}


def pool(name: str = "p", count: int = 6) -> Pool:
    return Pool(name, tuple((f"source {i}", f"target {i}") for i in range(count)))


def test_a_prompt_has_nine_lines_with_three_different_pairs() -> None:
    drawn = pool().draw(Draws(3))
    lines = prompt("a dog", drawn).split("\n")
    assert len(lines) == 9 and lines[0] == INSTRUCTION and lines[1::2] == [""] * 4
    assert [line.strip() for line in lines[2::2]] == [*(f"{a} => {b}" for a, b in drawn), "a dog =>"]
    assert len({source for source, _ in drawn}) == 3


def test_groups_give_two_different_captions_of_one_picture() -> None:
    groups = Pool("g", tuple((f"{i} a", f"{i} b", f"{i} c") for i in range(4)), paired=False)
    seen = Counter(pair for seed in range(300) for pair in groups.draw(Draws(seed)))
    assert len(seen) == 4 * 6  # every ordered pair of every group
    assert all(a != b and a[0] == b[0] for a, b in seen)


def test_pairs_are_drawn_evenly_without_repetition() -> None:
    counts = Counter(source for seed in range(2000) for source, _ in pool().draw(Draws(seed)))
    expected = 2000 * 3 / 6
    assert sum((n - expected) ** 2 / expected for n in counts.values()) < 20.5  # 0.999 of chi-square, 5 df


@pytest.mark.parametrize("odd", ["a => b", "two\nlines", "one\u2028two", "tab\x0bbed", " blanks "])
def test_no_caption_breaks_its_prompt(odd: str) -> None:
    whole = clean(odd)
    text = prompt(whole, pool().draw(Draws(0)))
    assert len(text.splitlines()) == 9 and text.splitlines()[8].count("=>") == 1
    assert caption_in(text) == whole


def test_only_the_first_line_up_to_an_arrow_is_the_rewrite() -> None:
    assert parse(" a small dog \n\n    another => more") == "a small dog"
    assert parse(" a dog => a cat") == "a dog"
    assert parse("\na dog") == ""


def test_shipped_pools_are_whole() -> None:
    pools = shipped_pools()
    assert len(pools) == 4 and sum(pool.paired for pool in pools.values()) == 3
    for one in pools.values():
        assert len(one.entries) == (30 if one.paired else 18)
        texts = [text for entry in one.entries for text in entry]
        assert len(set(texts)) == len(texts) and all(clean(text) == text for text in texts)


def test_a_pool_that_is_none_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "pool.jsonl"
    for lines in ('{"source": "a"}', "not json", '{"source": "a", "target": "b"}'):
        path.write_text(lines)
        with pytest.raises(DataError, match="pool"):
            read_pool(path)


def echo(prompts: list[str]) -> list[str]:
    return [f" {caption_in(text)}\nand more" for text in prompts]


def test_a_model_that_repeats_the_caption_is_found_out(tmp_path: Path) -> None:
    found = rewrite(CAPTIONS, tmp_path / "r.jsonl", echo, {"p": pool()})
    report = found.pools["p"]
    assert report.rewrites == 3 and report.share("as the caption") == 1.0
    assert report.words == pytest.approx(1) and report.overlap == pytest.approx(1)
    assert "100.0% as the caption" in str(found)


def test_odd_rewrites_are_flagged_and_left_as_they_are(tmp_path: Path) -> None:
    answers = iter(["", " word", " target 2"])
    small = Pool("p", tuple((f"source {i}", f"target {i}") for i in range(3)))  # all of it in every prompt
    rewrite(CAPTIONS, tmp_path / "r.jsonl", lambda prompts: [next(answers) for _ in prompts], {"p": small})
    rows = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().split("\n")[1:-1]]
    assert [row["flags"] for row in rows] == [["empty"], ["one word"], ["as an example"]]
    assert [row["text"] for row in rows] == ["", "word", "target 2"]


class Killed(Exception):
    pass


class Counting(WorldRewriter):
    """Dies after so many batches."""

    def __init__(self, left: int = 1000) -> None:
        self.left = left
        self.prompts = 0

    def complete(self, prompts: list[str], seeds: list[int]) -> list[str]:
        if self.left == 0:
            raise Killed
        self.left -= 1
        self.prompts += len(prompts)
        return super().complete(prompts, seeds)


@pytest.mark.parametrize(
    "damage", [b"", b'{"key": "k', b'{"key": "k", "pool": "p", "text": "", "flags": []}\n']
)
def test_killed_and_resumed_equals_one_run(tmp_path: Path, damage: bytes) -> None:
    captions = {
        f"k{i}": f"a {color} circle" for i, color in enumerate(["red", "blue", "green", "gray", "cyan"])
    }
    pools = {"p": pool("p"), "q": pool("q", 9)}
    whole, parts = tmp_path / "whole.jsonl", tmp_path / "parts.jsonl"
    report = rewrite(captions, whole, WorldRewriter(), pools, seed=3, batch_size=4)
    with pytest.raises(Killed):
        rewrite(captions, parts, Counting(2), pools, seed=3, batch_size=4)
    parts.write_bytes(parts.read_bytes() + damage)
    rest = Counting()
    assert rewrite(captions, parts, rest, pools, seed=3, batch_size=4) == report
    assert parts.read_bytes() == whole.read_bytes() and rest.prompts == 2
    done = Counting(0)
    assert rewrite(captions, parts, done, pools, seed=3, batch_size=4) == report
    assert set(read_rewrites(parts)) == set(captions)
    assert all(len(texts) == 2 for texts in read_rewrites(parts).values())


def test_a_file_of_something_else_is_not_gone_on_with(tmp_path: Path) -> None:
    out = tmp_path / "r.jsonl"
    rewrite(CAPTIONS, out, echo, {"p": pool()})
    with pytest.raises(DataError, match="other captions"):
        rewrite(CAPTIONS | {"new": "a cat"}, out, echo, {"p": pool()})
    out.write_text("short notes\n")
    with pytest.raises(DataError, match="other captions"):
        rewrite(CAPTIONS, out, echo, {"p": pool()})
    assert out.read_text() == "short notes\n"
    with pytest.raises(DataError, match="0 texts for 3"):
        rewrite(CAPTIONS, tmp_path / "s.jsonl", lambda prompts: [], {"p": pool()})
    with pytest.raises(ConfigError, match="no language model"):
        rewrite(CAPTIONS, tmp_path / "t.jsonl", 7, {"p": pool()})  # type: ignore[arg-type]


def test_the_worlds_rewriter_sees_the_caption_alone(tmp_path: Path) -> None:
    found = rewrite(CAPTIONS, tmp_path / "r.jsonl", WorldRewriter(), {"p": pool()})
    texts = read_rewrites(tmp_path / "r.jsonl")
    assert found.pools["p"].overlap > 0.5 and not found.pools["p"].flags["empty"]
    assert any(text != CAPTIONS[key] for key, (text,) in texts.items())


# ---------------------------------------------------------------------------------- a model of transformers


@pytest.fixture(scope="module")
def language_model() -> CausalModel:
    """The smallest causal model, with a tokenizer of bytes."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({sign: i for i, sign in enumerate([*alphabet, "<end>"])}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>")
    config = transformers.LlamaConfig(
        vocab_size=257, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=512, eos_token_id=256, bos_token_id=256,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config).eval()
    return CausalModel(model, tokenizer, new_tokens=9, context=400)


def test_samples_depend_on_their_seed_and_not_on_the_batch(
    language_model: CausalModel, untouched_rng: None
) -> None:
    prompts = [prompt(text, pool().draw(Draws(0))) for text in CAPTIONS.values()]
    together = language_model.complete(prompts, [5, 6, 7])
    alone = [language_model.complete([p], [seed])[0] for p, seed in zip(prompts, [5, 6, 7], strict=True)]
    assert together == alone and len(set(together)) == 3
    assert language_model.complete(prompts[:1], [8])[0] != together[0]


def test_an_answer_ends_at_a_new_line(language_model: CausalModel) -> None:
    (newline,) = language_model._line_ends
    texts = language_model.complete(["abc =>"] * 200, list(range(200)))
    assert language_model.tokenizer.decode([newline]) == "\n"
    assert any("\n" in text for text in texts)
    assert all("\n" not in text.rstrip("\n")[:-1] or text.count("\n") == 1 for text in texts)


def test_a_long_caption_is_cut_and_keeps_examples_arrow_and_room(
    language_model: CausalModel, tmp_path: Path
) -> None:
    examples = pool().draw(Draws(0))
    long = "a very long caption " * 30
    cut = language_model.shorten(long, lambda caption: prompt(caption, examples))
    length = len(language_model.tokenizer(prompt(cut, examples))["input_ids"])
    assert long.startswith(cut) and 380 < length + 9 <= 400
    assert all(f"{a} => {b}" in prompt(cut, examples) for a, b in examples)
    found = rewrite({"long": long, "short": "a dog"}, tmp_path / "r.jsonl", language_model, {"p": pool()})
    assert found.pools["p"].flags["caption cut"] == 1
    with pytest.raises(ConfigError, match="no room"):
        language_model.shorten(long, lambda caption: "x" * 500 + caption)


def test_sampling_follows_the_nucleus_of_the_model() -> None:
    scores = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]])).expand(4000, -1)
    drawn = _Sampling(list(range(4000)), temperature=1.0, top_p=0.75)(torch.empty(4000, 0), scores).argmax(1)
    counts = drawn.bincount(minlength=4)
    assert counts[2] == counts[3] == 0  # 0.5 + 0.3 already hold 0.75
    assert abs(int(counts[0]) / 4000 - 0.625) < 0.025


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    with pytest.raises(CheckpointError, match=tmp_path.name):
        rewrite(CAPTIONS, tmp_path / "r.jsonl", tmp_path, {"p": pool()})


# ---------------------------------------------------------------------------------- joining, and the draw


def test_the_caption_is_drawn_once_for_itself_and_once_for_every_stump() -> None:
    texts = choices("a dog", ["a brown dog", "dog", "", "one more dog"])
    assert texts == ["a dog", "a brown dog", "a dog", "a dog", "one more dog"]
    assert choices("dog", ["hound"]) == ["dog", "dog"]  # whatever the caption itself is


class Words:
    """A tokenizer that remembers what it was given, one id a word."""

    def __init__(self) -> None:
        self.seen: list[list[str]] = []

    def __call__(self, texts: list[str]) -> Tokens:
        self.seen.append(list(texts))
        return Tokens(
            torch.zeros(len(texts), 2, dtype=torch.int64), torch.ones(len(texts), dtype=torch.int64)
        )


def source(rewrites: int = 4, stumps: int = 0, count: int = 24) -> Rewritten:
    texts = [*(["stump"] * stumps), *(f"rewrite {j}" for j in range(rewrites - stumps))]
    examples = Examples(Example(f"e{i}", texts={"alt": "the caption"}) for i in range(count))
    return Rewritten(examples, {f"e{i}": texts for i in range(count)})


def drawn(loader: Loader, words: Words, epochs: int) -> list[list[str]]:
    for epoch in range(epochs):
        loader.set_epoch(epoch)
        for _ in loader:
            pass
    return words.seen


def loader_of(words: Words, texts: Any = ("rewrite",), workers: int = 0, **options: Any) -> Loader:
    reading = Reading(workers=workers)
    return Loader(options.pop("source", source()), None, words, 8, texts=texts, reading=reading, **options)


@pytest.mark.parametrize("stumps", [0, 2])
def test_draws_are_even_over_caption_and_rewrites(stumps: int) -> None:
    words = Words()
    texts = Counter(
        text for batch in drawn(loader_of(words, source=source(stumps=stumps)), words, 100) for text in batch
    )
    total = 24 * 100
    expected = {"the caption": (1 + stumps) / 5} | {f"rewrite {j}": 1 / 5 for j in range(4 - stumps)}
    assert texts.keys() == expected.keys()
    chi = sum((texts[text] - total * p) ** 2 / (total * p) for text, p in expected.items())
    assert chi < 18.5  # 0.999 with 4 degrees of freedom


ALONE = Process()


def test_a_draw_depends_on_seed_visit_and_key_alone() -> None:
    def texts(workers: int = 0, seed: int = 0, process: Process = ALONE) -> list[list[str]]:
        words = Words()
        return drawn(loader_of(words, workers=workers, seed=seed, process=process), words, 2)

    one = texts()
    assert one == texts(workers=1) == texts(workers=4) and one != texts(seed=1)
    assert one[:3] != one[3:]  # the second visit draws anew
    ranks = [texts(process=Process(rank, 2)) for rank in range(2)]
    for whole, *parts in zip(one, *ranks, strict=True):
        assert [whole[0::2], whole[1::2]] == parts

    words = Words()
    loader = loader_of(words)
    batches = iter(loader)
    next(batches)
    state = loader.state_dict()
    again = Words()
    resumed = loader_of(again)
    resumed.load_state_dict(state)
    list(resumed)
    assert again.seen == one[1:3]


def test_all_texts_of_a_picture_can_be_taken_at_once() -> None:
    words = Words()
    batch = next(iter(loader_of(words, TextChoice({"rewrite": None}))))
    owner = batch.texts["rewrite"].owner
    assert owner is not None and owner.bincount().tolist() == [5] * 8
    assert words.seen[0][:5] == ["the caption", *(f"rewrite {j}" for j in range(4))]


def test_an_examples_own_rewrites_are_taken_where_no_others_are_given() -> None:
    own = Examples([Example("e", texts={"alt": "the caption", "rewrite": ["in other words"]}), Example("f")])
    joined = Rewritten(own)
    assert joined[0].texts["rewrite"] == ["the caption", "in other words"]
    assert joined[0].texts["alt"] == "the caption" and len(joined) == 2
    with pytest.raises(DataError, match="f: has not exactly one"):
        joined[1]
    with pytest.raises(DataError, match="e: has no rewrites"):
        Rewritten(own, {})[0]


def write_lines(path: Path, lines: Sequence[str]) -> Path:
    path.write_bytes("".join(f"{line}\n" for line in lines).encode())
    return path


@pytest.fixture
def line_files(tmp_path: Path) -> Callable[[Sequence[str]], Any]:
    captions = {f"k{i}": f"number {i} of them" for i in range(30)}
    return lambda lines: read_lines(captions, [write_lines(tmp_path / "chat.txt", lines)])


def test_lines_are_joined_in_order_and_a_shift_shows(line_files: Callable[[Sequence[str]], Any]) -> None:
    lines = [f"here is {i}\x85 indeed {i}\u2028" for i in range(30)]
    good = line_files(lines)
    assert good.rewrites["k7"] == ["here is 7\x85 indeed 7"]
    shifted = line_files(lines[1:] + lines[:1])
    ((close, beside),) = zip(good.overlap.values(), good.neighbors.values(), strict=True)
    ((wrong, _),) = zip(shifted.overlap.values(), shifted.neighbors.values(), strict=True)
    assert close > 0.2 and beside == wrong == 0


@pytest.mark.parametrize("count", [29, 31, 60, 0])
def test_files_of_another_length_are_refused(line_files: Callable[[Sequence[str]], Any], count: int) -> None:
    with pytest.raises(DataError, match="lines for 30 captions"):
        line_files(["a line"] * count)


def test_overlap_is_the_share_of_the_captions_words() -> None:
    assert overlap("A red dog", "the RED dog, a big one") == 1.0
    assert overlap("a red dog", "blue cat") == 0.0 and overlap("", "a") == 0.0


def test_the_command_writes_what_a_plan_reads(language_model: CausalModel, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from clipworks.cli import app

    language_model.model.save_pretrained(tmp_path / "model")
    language_model.tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "pairs").mkdir()
    for key, text in CAPTIONS.items():
        (tmp_path / "pairs" / f"{key}.png").write_bytes(b"")
        (tmp_path / "pairs" / f"{key}.txt").write_text(text)
    lines = [json.dumps({"source": f"source {i}", "target": f"target {i}"}) for i in range(6)]
    (tmp_path / "terse.jsonl").write_text("\n".join(lines))
    out = tmp_path / "rewrites.jsonl"
    arguments = ["--in", tmp_path / "pairs", "--out", out, "--model", tmp_path / "model"]
    command = [
        "curate",
        "rewrite",
        *map(str, arguments),
        "--examples",
        str(tmp_path / "terse.jsonl"),
        "--json",
    ]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["manners"]["terse"]["rewrites"] == len(CAPTIONS)
    found = read_rewrites(out)
    assert [len(texts) for texts in found.values()] == [1] * len(CAPTIONS)
    before = out.read_bytes()
    assert CliRunner().invoke(app, command).exit_code == 0 and out.read_bytes() == before
