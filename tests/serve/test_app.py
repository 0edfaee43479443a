"""The service answers what the library answers, whoever asks at the same time, and says no politely."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tests.serve.client import Answer, Client, picture, wait_until

from clipworks.methods.dense.maskclip import MaskCLIP

TOLERANCE = 1e-5


def b64(seed: int, size: tuple[int, int] = (40, 32)) -> str:
    return base64.b64encode(picture(seed, size)).decode()


def vectors(answer: Answer) -> np.ndarray:
    assert answer.status == 200, answer.body
    rows = [entry["embedding"] for entry in answer.json["data"]]
    if isinstance(rows[0], str):
        return np.stack([np.frombuffer(base64.b64decode(row), "<f4") for row in rows])
    return np.array(rows)


# ------------------------------------------------------------------------------------------- embeddings


def test_embeddings_keep_the_shape_of_openai_and_the_order_of_the_inputs(client: Client, clip: Any) -> None:
    inputs = ["a cat", {"image": b64(1)}, {"text": "a dog"}, {"image": f"data:image/png;base64,{b64(2)}"}]
    answer = client.post("/v1/embeddings", {"input": inputs, "model": "tiny"})
    expected = np.concatenate(
        [clip.embed_texts(["a cat"]), clip.embed_images([picture(1)])]
        + [clip.embed_texts(["a dog"]), clip.embed_images([picture(2)])]
    )
    assert np.abs(vectors(answer) - expected).max() < TOLERANCE
    said = answer.json
    assert said["object"] == "list"
    assert said["model"] == "tiny"
    assert [(one["object"], one["index"]) for one in said["data"]] == [("embedding", i) for i in range(4)]
    assert said["usage"] == {"prompt_tokens": 8, "total_tokens": 8}  # start, article, noun, end


def test_both_encodings_hold_the_same_floats(client: Client) -> None:
    asked = {"input": ["a cat", "a long sentence about a very red house"]}
    plain = vectors(client.post("/v1/embeddings", asked))
    packed = vectors(client.post("/v1/embeddings", asked | {"encoding_format": "base64"}))
    assert (plain.astype(np.float32) == packed).all()


def test_a_form_gives_what_json_gives(client: Client) -> None:
    parts = [("input", "a cat"), ("image", picture(1)), ("image", picture(2)), ("encoding_format", "float")]
    form = vectors(client.form("/v1/embeddings", parts))
    inputs = ["a cat", {"image": b64(1)}, {"image": b64(2)}]
    assert np.abs(form - vectors(client.post("/v1/embeddings", {"input": inputs}))).max() < TOLERANCE


def test_answers_do_not_depend_on_who_shares_the_batch(serving: Callable[..., Any], clip: Any) -> None:
    from clipworks.serve import Limits

    texts = [f"a {'very ' * (i % 7)}large thing number {i}" for i in range(40)]
    alone_texts = np.concatenate([clip.embed_texts([text]) for text in texts])
    alone_images = np.concatenate([clip.embed_images([picture(i)]) for i in range(40)])
    with serving(Limits(batch=16, wait=0.05, grace=0)) as client, ThreadPoolExecutor(40) as pool:

        def ask(i: int) -> tuple[Answer, Answer]:
            return (
                client.post("/v1/embeddings", {"input": texts[i]}),
                client.form("/v1/embeddings", [("image", picture(i))]),
            )

        answers = list(pool.map(ask, range(40)))
        found_texts = np.concatenate([vectors(text) for text, _ in answers])
        found_images = np.concatenate([vectors(image) for _, image in answers])
        sizes = client.get("/metrics").body.decode()
    assert np.abs(found_texts - alone_texts).max() < TOLERANCE
    assert np.abs(found_images - alone_images).max() < TOLERANCE
    batches = [
        float(line.split()[1]) for line in sizes.splitlines() if line.startswith("clipworks_batch_size_count")
    ]
    assert sum(batches) < 60  # of 80 inputs: some did share one


def test_a_bad_picture_costs_only_its_own_request(client: Client, clip: Any) -> None:
    with ThreadPoolExecutor(8) as pool:
        bad = [pool.submit(client.form, "/v1/embeddings", [("image", b"no picture")]) for _ in range(4)]
        good = [pool.submit(client.form, "/v1/embeddings", [("image", picture(3))]) for _ in range(4)]
    assert {one.result().status for one in bad} == {400}
    expected = clip.embed_images([picture(3)]).numpy()
    assert all(np.abs(vectors(one.result()) - expected).max() < TOLERANCE for one in good)


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ({"input": []}, 400, "input"),
        ({"input": ""}, 400, "input"),
        ({"input": [3]}, 400, "input[0]"),
        ({"input": "\ud800"}, 400, "input"),
        ({"input": "a", "model": "other"}, 404, "other"),
        ({"input": "a", "dimensions": 3}, 400, "dimensions"),
        ({"input": "a", "encoding_format": "hex"}, 400, "encoding_format"),
        ({"input": "a", "more": 1}, 400, "more"),
        ({"input": ["a"] * 1100}, 400, "1024"),
        ({"input": "a" * 20_000}, 400, "16384"),
        ({"input": [{"image": "!!"}]}, 400, "base64"),
        ({"input": [{"image": "http://example.com/x.png"}]}, 400, "not fetched"),
        ([], 400, "body"),
    ],
)
def test_what_cannot_be_embedded_is_refused_in_one_line_that_names_it(
    client: Client, body: Any, status: int, said: str
) -> None:
    answer = client.post("/v1/embeddings", body)
    assert answer.status == status, answer.body
    problem = answer.json["error"]
    assert said in problem["message"]
    assert "\n" not in problem["message"]
    assert set(problem) == {"message", "type", "param", "code"}


# ------------------------------------------------------------------------------------------- classify


def test_classify_gives_the_probabilities_of_the_library(client: Client, clip: Any) -> None:
    labels = ["a cat", "an owl", "a dog"]
    expected = clip.classify([picture(1), picture(2)], labels, ["a photo of {}."]).probabilities.numpy()
    for answer in (
        client.post("/classify", {"images": [b64(1), b64(2)], "labels": labels}),
        client.form(
            "/classify",
            [("images", picture(1)), ("images", picture(2)), *(("labels", label) for label in labels)],
        ),
    ):
        assert answer.status == 200, answer.body
        for row, one in zip(expected, answer.json["pictures"], strict=True):
            found = {entry["label"]: entry["probability"] for entry in one["predictions"]}
            assert np.allclose([found[label] for label in labels], row, atol=1e-4)
            ranked = [entry["probability"] for entry in one["predictions"]]
            assert ranked == sorted(ranked, reverse=True)


@pytest.mark.parametrize(
    "change",
    [
        {"labels": []},
        {"labels": ["a", "a"]},
        {"labels": list(map(str, range(900))), "images": ["x"] * 100},
        {"labels": [" "]},
        {"template": "nothing"},
        {"images": []},
    ],
)
def test_what_cannot_be_classified_is_refused(client: Client, change: dict[str, Any]) -> None:
    answer = client.post("/classify", {"images": [b64(1)], "labels": ["a", "b"]} | change)
    assert answer.status == 400, answer.body


# ------------------------------------------------------------------------------------------ segment


def test_segment_gives_the_map_of_the_library(client: Client, clip: Any) -> None:
    labels = ["a cat", "an owl", "a dog"]
    expected = MaskCLIP(clip, templates=("a photo of {}.",)).segment(
        picture(1), labels, background="an owl", unknown_below=0.34
    )
    fields = [("image", picture(1)), ("background", "an owl"), ("unknown_below", "0.34")]
    for answer in (
        client.post(
            "/segment",
            {"image": b64(1), "labels": labels, "background": "an owl", "unknown_below": 0.34},
        ),
        client.form("/segment", [*fields, *(("labels", label) for label in labels)]),
    ):
        assert answer.status == 200, answer.body
        shown = Image.open(io.BytesIO(base64.b64decode(answer.json["map"])))
        assert (answer.json["height"], answer.json["width"]) == expected.size
        found = np.asarray(shown).astype(int)
        assert (np.where(found == 255, -1, found) == expected.map.numpy()).mean() > 0.99
        colors = [bytes(color).hex() for color in expected.palette]
        assert [region["color"] for region in answer.json["regions"]] == [f"#{color}" for color in colors]
        assert bytes(shown.getpalette()[:9]).hex() == "".join(colors)
        shares = [region["share"] for region in answer.json["regions"]]
        assert np.isclose(sum(shares) + answer.json["unknown"], 1)


def test_a_large_picture_is_answered_at_the_side_that_is_asked_for(client: Client) -> None:
    large = b64(1, (400, 200))
    answer = client.post("/segment", {"image": large, "labels": ["a cat"], "side": 100})
    assert answer.status == 200, answer.body
    assert (answer.json["width"], answer.json["height"]) == (100, 50)
    assert answer.json["regions"][0]["share"] == 1


@pytest.mark.parametrize(
    "change",
    [
        {"labels": []},
        {"labels": ["a", "a"]},
        {"labels": [" "]},
        {"labels": list(map(str, range(256)))},
        {"background": "c"},
        {"unknown_below": 2},
        {"template": "nothing"},
        {"side": 100_000},
        {"image": "no picture"},
    ],
)
def test_what_cannot_be_segmented_is_refused(client: Client, change: dict[str, Any]) -> None:
    answer = client.post("/segment", {"image": b64(1), "labels": ["a", "b"]} | change)
    assert answer.status == 400, answer.body


# ------------------------------------------------------------------------------------------- search


def test_search_finds_what_the_index_finds(client: Client, index: Any) -> None:
    for asked, query in (
        ({"text": "a cat", "k": 5}, {"text": "a cat", "k": 5}),
        (
            {"text": '"a cat" - "a dog"', "image": b64(3)},
            {"text": '"a cat" - "a dog"', "picture": picture(3)},
        ),
        ({"text": "a cat", "where": "width > 43"}, {"text": "a cat", "where": "width > 43"}),
        ({"text": "a red thing", "kind": "text"}, {"text": "a red thing", "kind": "text"}),
    ):
        answer = client.post("/search", asked)
        assert answer.status == 200, answer.body
        expected = index.query(**query)
        assert expected
        assert [hit["path"] for hit in answer.json["hits"]] == [hit.path for hit in expected]
        scores = [hit["score"] for hit in answer.json["hits"]]
        assert np.allclose(scores, [hit.score for hit in expected], atol=1e-4)


def test_a_hit_has_a_thumbnail_and_no_other_file_has(client: Client) -> None:
    from io import BytesIO
    from urllib.parse import parse_qs, urlencode, urlsplit

    from PIL import Image

    hit = client.post("/search", {"text": "a cat", "k": 1}).json["hits"][0]
    answer = client.get(f"/{hit['thumbnail']}&side=20")
    assert answer.status == 200
    assert answer.headers["content-type"] == "image/jpeg"
    assert max(Image.open(BytesIO(answer.body)).size) == 20
    signature = parse_qs(urlsplit(hit["thumbnail"]).query)["signature"][0]
    for path in ("/etc/passwd", hit["path"] + "/../0.png", __file__):
        forged = "/thumbnail?" + urlencode({"path": path, "signature": signature})
        assert client.get(forged).status == 404


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"text": ""},
        {"text": "  "},
        {"text": '"a" "b"'},
        {"text": "a", "k": 0},
        {"text": "a", "where": "drop"},
    ]
    + [{"text": "a", "where": "width > (select 1)"}, {"text": "a", "kind": "sound"}, {"text": '"a" - 1*"a"'}],
)
def test_what_cannot_be_searched_for_is_refused(client: Client, body: dict[str, Any]) -> None:
    assert client.post("/search", body).status == 400


def test_without_an_index_there_is_no_search(serving: Callable[..., Any]) -> None:
    with serving() as client:
        assert client.post("/search", {"text": "a"}).status == 404
        assert "search" not in client.get("/models").json["tasks"]
        assert "/search" not in client.get("/openapi.json").json["paths"]


# ------------------------------------------------------------------------------------------- few shots


def test_a_fitted_classifier_is_gda_as_the_library_fits_it(client: Client, clip: Any) -> None:
    pytest.importorskip("sklearn")
    from clipworks.methods.adapt.gda import GDA

    pictures = [picture(seed) for seed in range(6)]
    labels = ["odd" if seed % 2 else "even" for seed in range(6)]
    oracle = GDA(clip=clip, progress=False).fit(pictures, labels)
    parts = [(label, one) for label, one in zip(labels, pictures, strict=True)]
    fitted = client.form("/fewshot", parts)
    assert fitted.status == 200, fitted.body
    assert fitted.json["classes"] == [{"name": "even", "pictures": 3}, {"name": "odd", "pictures": 3}]
    assert fitted.json["alpha"] == pytest.approx(oracle.alpha_)
    answer = client.post(f"/fewshot/{fitted.json['id']}", {"images": [b64(7), b64(8)]})
    expected = oracle.predict_proba([picture(7), picture(8)])
    for row, one in zip(expected, answer.json["pictures"], strict=True):
        found = {entry["label"]: entry["probability"] for entry in one["predictions"]}
        assert np.allclose([found["even"], found["odd"]], row, atol=1e-3)


def test_a_classifier_can_be_dropped_and_the_oldest_goes_when_there_are_too_many(
    serving: Callable[..., Any],
) -> None:
    from clipworks.serve import Limits

    pytest.importorskip("sklearn")
    body = {"classes": [{"name": "a", "images": [b64(1)]}, {"name": "b", "images": [b64(2)]}], "views": 2}
    with serving(Limits(classifiers=2, grace=0)) as client:
        names = [client.post("/fewshot", body).json["id"] for _ in range(3)]
        used = [client.post(f"/fewshot/{name}", {"images": [b64(1)]}).status for name in names]
        assert used == [404, 200, 200]
        assert client.send("DELETE", f"/fewshot/{names[1]}").status == 204
        assert client.send("DELETE", f"/fewshot/{names[1]}").status == 404


@pytest.mark.parametrize(
    "classes",
    [
        [{"name": "a", "images": [b64(1)]}],
        [{"name": "a", "images": [b64(1)]}, {"name": "a", "images": [b64(2)]}],
        [{"name": "a", "images": [b64(1)]}, {"name": " ", "images": [b64(2)]}],
        [{"name": "a", "images": []}, {"name": "b", "images": [b64(2)]}],
    ],
)
def test_what_cannot_be_fitted_is_refused(client: Client, classes: Any) -> None:
    pytest.importorskip("sklearn")
    assert client.post("/fewshot", {"classes": classes}).status == 400


# ------------------------------------------------------------------------------------------- the rest


def test_models_and_health_say_what_is_there(client: Client, clip: Any) -> None:
    said = client.get("/models").json
    assert said == client.get("/v1/models").json
    assert (said["data"][0]["id"], said["data"][0]["width"]) == ("tiny", clip.width)
    assert (said["index"]["pictures"], said["index"]["texts"]) == (8, 2)
    assert client.get("/healthz").json == {"status": "ok", "model": "tiny"}


def test_metrics_count_requests_by_route_and_inputs_by_kind(serving: Callable[..., Any]) -> None:
    with serving() as client:
        client.post("/v1/embeddings", {"input": ["a", "b", {"image": b64(1)}]})
        client.post("/v1/embeddings", {"input": []})
        client.get("/nowhere/at/all")
        text = client.get("/metrics").body.decode()
    for line in (
        'clipworks_requests_total{method="POST",path="/v1/embeddings",status="200"} 1.0',
        'clipworks_requests_total{method="POST",path="/v1/embeddings",status="400"} 1.0',
        'clipworks_requests_total{method="GET",path="other",status="404"} 1.0',
        'clipworks_inputs_total{kind="text"} 2.0',
        'clipworks_inputs_total{kind="image"} 1.0',
        "clipworks_inputs_held 0.0",
    ):
        assert line in text.splitlines(), text


def test_a_token_is_asked_for_everywhere_but_where_nothing_is_told(serving: Callable[..., Any]) -> None:
    with serving(token="sësame") as client:
        assert client.get("/models").status == 401
        refused = client.post("/v1/embeddings", {"input": "a"}, authorization="Bearer sesame")
        assert (refused.status, refused.headers["www-authenticate"]) == (401, "Bearer")
        right = "Bearer sësame".encode().decode("latin-1")
        assert client.get("/models", authorization=right).status == 200
        assert client.get("/metrics").status == 401
        for path in ("/healthz", "/", "/page.js", "/openapi.json"):
            assert client.get(path).status == 200
        schemes = client.get("/openapi.json").json["components"]["securitySchemes"]
        assert schemes == {"token": {"type": "http", "scheme": "bearer"}}


def test_other_sites_are_let_in_only_if_they_are_named(serving: Callable[..., Any]) -> None:
    allowed = "access-control-allow-origin"
    with serving() as client:
        assert allowed not in client.get("/healthz", origin="http://here.example").headers
    with serving(origins=["http://here.example"], token="t") as client:
        answer = client.get("/models", origin="http://here.example")  # even when it is refused
        assert (answer.status, answer.headers[allowed]) == (401, "http://here.example")
        assert allowed not in client.get("/healthz", origin="http://there.example").headers
        asked = {"origin": "http://here.example", "access_control_request_method": "POST"}
        assert client.send("OPTIONS", "/classify", **asked).status == 200


def test_a_full_line_is_429_and_gives_its_room_back(serving: Callable[..., Any]) -> None:
    from clipworks.serve import Limits

    with serving(Limits(queue=4, inputs=4, grace=0)) as client:
        batcher = client.app.state.service.batcher
        with batcher.reserve(3):
            answer = client.post("/v1/embeddings", {"input": ["a", "b"]})
            assert (answer.status, answer.headers["retry-after"]) == (429, "1")
            assert client.post("/v1/embeddings", {"input": ["a"]}).status == 200
        assert client.post("/v1/embeddings", {"input": ["a", "b"]}).status == 200
        assert batcher.held == 0


def test_too_many_requests_at_once_are_503(serving: Callable[..., Any]) -> None:
    from clipworks.serve import Limits

    with serving(Limits(requests=2, grace=0)) as client:
        release = held_up(client)
        with ThreadPoolExecutor(4) as pool:
            waiting = [pool.submit(client.post, "/v1/embeddings", {"input": "a"}) for _ in range(2)]
            wait_until(lambda: client.state.active == 2)
            answer = client.get("/models")
            assert (answer.status, answer.headers["retry-after"]) == (503, "1")
            release.set()
            assert [one.result().status for one in waiting] == [200, 200]


def test_closing_finishes_what_was_accepted_and_tells_newcomers_to_go(serving: Callable[..., Any]) -> None:
    from clipworks.serve import Limits

    with serving(Limits(grace=0.5)) as client, ThreadPoolExecutor(8) as pool:
        release = held_up(client)
        accepted = [pool.submit(client.post, "/v1/embeddings", {"input": f"text {i}"}) for i in range(6)]
        wait_until(lambda: client.state.active == 6)
        client.state.closing = True
        assert client.get("/healthz").status == 503
        late = client.post("/v1/embeddings", {"input": "late"})
        assert (late.status, late.headers["connection"]) == (503, "close")
        release.set()
        assert [one.result().status for one in accepted] == [200] * 6


def test_every_answer_has_an_id_and_every_request_a_line_of_json(client: Client) -> None:
    import logging

    from clipworks.serve.measures import LOGGER, JsonLines

    lines: list[str] = []

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(JsonLines().format(record))

    handler, level = Kept(), LOGGER.level
    LOGGER.addHandler(handler)
    LOGGER.setLevel(logging.INFO)
    try:
        mine = client.post("/v1/embeddings", {"input": "secret words"}, x_request_id="my-id")
        other = client.post("/v1/embeddings", {"input": 1}, x_request_id='bad "id')
        wait_until(lambda: len(lines) >= 2)
    finally:
        LOGGER.removeHandler(handler)
        LOGGER.setLevel(level)
    assert mine.headers["x-request-id"] == "my-id"
    said = [json.loads(line) for line in lines]
    assert [(one["event"], one["status"]) for one in said] == [("request", 200), ("request", 400)]
    assert [one["id"] for one in said] == ["my-id", other.headers["x-request-id"]]
    assert "secret" not in "".join(lines)


def test_a_fault_of_ours_is_a_500_that_tells_nothing(
    serving: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving() as client:

        def fail(*_: object) -> None:
            raise RuntimeError("secret detail")

        client.app.state.service.embed = fail
        answer = client.post("/v1/embeddings", {"input": "a"})
        assert answer.status == 500
        assert answer.json["error"]["type"] == "server_error"
        assert b"secret" not in answer.body
        assert client.get("/healthz").status == 200


def held_up(client: Client) -> threading.Event:
    """Hold up the model's thread until the event is set."""
    release = threading.Event()
    entered = threading.Event()

    def wait() -> None:
        entered.set()
        assert release.wait(30)

    client.app.state.service.batcher.call(wait)
    assert entered.wait(10)
    return release
