"""The HTTP service: routes, errors and the OpenAPI document around a `Service`."""

from __future__ import annotations

import base64
import importlib
import importlib.util
import io
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from importlib import resources
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from torch import Tensor

from clipworks import __version__
from clipworks.errors import ClipworksError, ConfigError, PictureError, require
from clipworks.serve import bodies, schemas
from clipworks.serve.batching import Busy, Closed
from clipworks.serve.bodies import BadBody
from clipworks.serve.guard import Guard, State, failure
from clipworks.serve.measures import Measures
from clipworks.serve.service import Kind, NotFound, Service
from clipworks.serve.settings import USUAL, Limits

with suppress(ImportError):
    from fastapi import FastAPI, Path, Query, Request, Response
    from fastapi.exceptions import RequestValidationError
    from fastapi.middleware.cors import CORSMiddleware
    from fastapi.responses import JSONResponse
    from starlette.exceptions import HTTPException

if TYPE_CHECKING:
    from clipworks.core.clip import Clip
    from clipworks.search import Hit, Index

PAGE = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self';"
    " form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
)
FEW = 8  # vectors that are written at once, without a thread
MOST_PROBABILITIES = 1 << 16  # in one answer
_WHY = {
    400: "The request cannot be used; the message says why.",
    401: "The token is missing or wrong.",
    404: "There is no such thing.",
    405: "Not with this method.",
    408: "The body took too long.",
    413: "The body is too large.",
    415: "The body is neither JSON nor a form.",
    429: "Too many inputs are waiting; Retry-After says when to come again.",
    503: "The service is closing, or has too many requests at once.",
}
_BODY = (400, 401, 408, 413, 415, 429, 503)


def create_app(
    clip: Clip,
    *,
    name: str = "",
    index: Index | None = None,
    limits: Limits = USUAL,
    token: str | None = None,
    origins: Sequence[str] = (),
    urls: bool = False,
    state: State | None = None,
) -> FastAPI:
    """The service as an ASGI application.

    Args:
        clip: the model.
        name: what it is called; by default as its config says.
        index: what is searched; without one there is no search.
        limits: what is refused.
        token: what clients must send as `Authorization: Bearer …`; None lets everybody in.
        origins: pages of which other sites may use the service (CORS).
        urls: fetch pictures from public addresses.
        state: shared with the server that runs it.

    Raises:
        MissingExtra: without the extra `serve`.
    """
    require("fastapi", extra="serve", purpose="the service")
    require("python_multipart", extra="serve", purpose="the service")
    measures = Measures()
    service = Service(
        clip,
        name=name or clip.config.name,
        index=index,
        limits=limits,
        urls=urls,
        observe=measures.batch,
    )
    measures.held.set_function(lambda: service.batcher.held)

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        yield
        service.close()

    app = FastAPI(
        title="clipworks",
        version=__version__,
        summary="A CLIP that embeds, classifies and searches pictures and texts.",
        lifespan=life,
        docs_url=None,  # its page would be fetched from elsewhere
        redoc_url=None,
        generate_unique_id_function=lambda route: str(route.name),
    )
    app.state.service = service
    state = state or State()
    routes = _Routes(service, measures, state)
    routes.add(app)
    _add_page(app)
    _answer_errors(app)
    _describe(app, token is not None)
    app.add_middleware(
        Guard,
        limits=limits,
        measures=measures,
        state=state,
        token=token,
        open_paths=(*PAGE, "/healthz", "/openapi.json", "/thumbnail"),
    )
    if origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(origins),
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["Authorization", "Content-Type"],
        )
    return app


class _Routes:
    """The endpoints, as methods that know the service."""

    def __init__(self, service: Service, measures: Measures, state: State) -> None:
        self.service, self.measures, self.state = service, measures, state
        self.started = int(time.time())
        self.tasks = ["embeddings", "classify"]
        with suppress(ConfigError):  # a tower of another library has no places
            _ = service.segmenter
            self.tasks.append("segment")
        if service.index is not None:
            self.tasks.append("search")
        if importlib.util.find_spec("sklearn") is not None:  # the extra `adapt`
            # Now, for in the middle of a request it would keep all others waiting for seconds.
            importlib.import_module("clipworks.methods.adapt.gda")
            self.tasks.append("fewshot")

    def add(self, app: FastAPI) -> None:
        """Add what this service can do."""

        def post(path: str, endpoint: Any, schema: type[schemas.Form], answer: Any, *more: int) -> None:
            app.add_api_route(
                path,
                endpoint,
                methods=["POST"],
                response_model=answer,
                responses=_failures(*_BODY, *more),
                openapi_extra=bodies.described(schema),
            )

        def get(path: str, endpoint: Any, *failures: int, **options: Any) -> None:
            app.add_api_route(
                path,
                endpoint,
                methods=["GET"],
                responses=_failures(*failures) | options.pop("others", {}),
                **options,
            )

        post("/v1/embeddings", self.embeddings, schemas.EmbeddingsRequest, schemas.Embeddings, 404)
        post("/classify", self.classify, schemas.ClassifyRequest, schemas.Classified)
        if "segment" in self.tasks:
            post("/segment", self.segment, schemas.SegmentRequest, schemas.Segmented)
        if "search" in self.tasks:
            post("/search", self.search, schemas.SearchRequest, schemas.SearchResult)
            kinds = {200: {"content": {"image/jpeg": {"schema": {"type": "string", "format": "binary"}}}}}
            get("/thumbnail", self.thumbnail, 400, 404, 503, response_class=Response, others=kinds)
        if "fewshot" in self.tasks:
            post("/fewshot", self.fit, schemas.FitRequest, schemas.FittedClassifier)
            post("/fewshot/{id}", self.predict, schemas.PredictRequest, schemas.Classified, 404)
            app.add_api_route(
                "/fewshot/{id}",
                self.forget,
                methods=["DELETE"],
                status_code=204,
                response_class=Response,
                responses=_failures(400, 401, 404, 503),
            )
        get("/models", self.models, 401, 503, response_model=schemas.Models)
        app.add_api_route("/v1/models", self.models, methods=["GET"], include_in_schema=False)
        get("/healthz", self.health, response_model=schemas.Health, others={503: {"model": schemas.Health}})
        plain = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}
        get("/metrics", self.metrics, 401, response_class=Response, others=plain)

    async def embeddings(self, request: Request) -> Any:
        """Embed texts and pictures as vectors of unit length."""
        asked = await bodies.read(request, schemas.EmbeddingsRequest)
        self._check_model(asked.model)
        width = self.service.clip.width
        if asked.dimensions not in (None, width):
            raise BadBody(f"dimensions: this model's vectors have {width} numbers, not {asked.dimensions}")
        given = [asked.input] if isinstance(asked.input, str) else asked.input
        inputs: list[str | bytes] = []
        kinds: list[Kind] = []
        for one in given:
            if isinstance(one, schemas.ImageInput):
                inputs.append(one.image)
                kinds.append("image")
            else:
                inputs.append(one if isinstance(one, str) else one.text)
                kinds.append("text")
        self._check_count(len(inputs))
        vectors, tokens = await self.service.embed(inputs, kinds)

        def answer() -> Response:
            shown = enumerate(_shown(vectors, asked.encoding_format))
            return JSONResponse(
                {
                    "object": "list",
                    "data": [
                        {"object": "embedding", "index": place, "embedding": one} for place, one in shown
                    ],
                    "model": self.service.name,
                    "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
                }
            )

        return answer() if len(inputs) <= FEW else await self.service.aside(answer)

    async def classify(self, request: Request) -> schemas.Classified:
        """Say which of the labels fits each picture."""
        asked = await bodies.read(request, schemas.ClassifyRequest)
        self._check_count(len(asked.images), len(asked.labels))
        if len(asked.images) * len(asked.labels) > MOST_PROBABILITIES:
            raise BadBody(
                f"{len(asked.images)} pictures with {len(asked.labels)} labels are too many at once"
            )
        found = await self.service.classify(asked.images, asked.labels, asked.template)
        return self._classified(asked.labels, found)

    async def segment(self, request: Request) -> schemas.Segmented:
        """Say which of the labels each pixel of a picture shows."""
        asked = await bodies.read(request, schemas.SegmentRequest)
        found = await self.service.segment(
            asked.image,
            asked.labels,
            background=asked.background,
            unknown_below=asked.unknown_below,
            template=asked.template,
            side=asked.side,
        )

        def answer() -> schemas.Segmented:
            shares, colors = found.shares(), found.palette
            regions = [
                schemas.Region(label=label, share=shares[label], color="#" + bytes(color).hex())
                for label, color in zip(found.labels, colors, strict=True)
            ]
            buffer = io.BytesIO()
            found.picture().save(buffer, "PNG")
            return schemas.Segmented(
                model=self.service.name,
                width=found.size[1],
                height=found.size[0],
                regions=regions,
                unknown=max(0.0, 1 - sum(shares[label] for label in found.labels)),
                map=base64.b64encode(buffer.getvalue()).decode("ascii"),
            )

        return await self.service.aside(answer)

    async def search(self, request: Request) -> schemas.SearchResult:
        """Find what is nearest to words, to a picture, or to both together."""
        asked = await bodies.read(request, schemas.SearchRequest)
        hits = await self.service.search(
            asked.text,
            asked.image,
            k=min(asked.k, self.service.limits.hits),
            where=asked.where or None,
            kind=None if asked.kind == "both" else asked.kind,
        )
        return schemas.SearchResult(model=self.service.name, hits=[self._found(hit) for hit in hits])

    async def thumbnail(
        self,
        path: Annotated[str, Query(max_length=4096)],
        signature: Annotated[str, Query(max_length=64)],
        side: Annotated[int, Query(ge=16, le=1024)] = 256,
    ) -> Response:
        """Show a small version of a picture that a search has found; links come with the hits."""
        data = await self.service.thumbnail(path, signature, side)
        return Response(data, media_type="image/jpeg", headers={"Cache-Control": "private, max-age=3600"})

    async def fit(self, request: Request) -> schemas.FittedClassifier:
        """Fit Gaussian discriminant analysis to a few pictures a class."""
        asked = await bodies.read(request, schemas.FitRequest)
        self._check_count(sum(len(one.images) for one in asked.classes))
        name, fitted = await self.service.fit([(one.name, one.images) for one in asked.classes], asked.views)
        classes = [schemas.FittedClass(name=one, pictures=count) for one, count in fitted.counts.items()]
        return schemas.FittedClassifier(id=name, classes=classes, alpha=fitted.estimator.alpha_)

    async def predict(self, id: Annotated[str, Path(max_length=64)], request: Request) -> schemas.Classified:
        """Classify pictures with a fitted classifier."""
        asked = await bodies.read(request, schemas.PredictRequest)
        self._check_count(len(asked.images))
        return self._classified(*await self.service.predict(id, asked.images))

    async def forget(self, id: Annotated[str, Path(max_length=64)]) -> Response:
        """Drop a fitted classifier."""
        self.service.forget(id)
        return Response(status_code=204)

    async def models(self) -> schemas.Models:
        """List the model, and what can be done with it."""
        clip = self.service.clip
        model = schemas.Model(
            id=self.service.name,
            created=self.started,
            owned_by="clipworks",
            width=clip.width,
            image_size=clip.preprocessing.image_size,
        )
        about = await self.service.about_index()
        index = None if about is None else schemas.IndexContent(**about)
        return schemas.Models(data=[model], tasks=self.tasks, index=index)

    async def health(self, response: Response) -> schemas.Health:
        """Say whether requests are accepted."""
        response.status_code = 503 if self.state.closing else 200
        return schemas.Health(status="closing" if self.state.closing else "ok", model=self.service.name)

    async def metrics(self) -> Response:
        """Show counters for Prometheus."""
        return Response(self.measures.text(), media_type=self.measures.content_type)

    # --- shared ---

    def _check_model(self, asked: str | None) -> None:
        if asked is not None and asked != self.service.name:
            raise NotFound(f"the model {asked[:80]!r} is not served here, only {self.service.name!r}")

    def _check_count(self, *counts: int) -> None:
        most = self.service.limits.inputs
        if max(counts) > most:
            raise BadBody(f"a request has at most {most} inputs, not {max(counts)}")

    def _classified(self, labels: Sequence[str], probabilities: Tensor) -> schemas.Classified:
        pictures = []
        for row in probabilities.double():
            order = row.argsort(descending=True).tolist()
            chosen = [
                schemas.Prediction(label=labels[place], probability=float(row[place])) for place in order
            ]
            pictures.append(schemas.Predictions(predictions=chosen))
        return schemas.Classified(model=self.service.name, pictures=pictures)

    def _found(self, hit: Hit) -> schemas.Found:
        from urllib.parse import urlencode

        link = None
        if hit.kind == "image":
            link = "thumbnail?" + urlencode({"path": hit.path, "signature": self.service.signature(hit.path)})
        return schemas.Found(
            path=hit.path,
            score=hit.score,
            width=hit.width,
            height=hit.height,
            caption=hit.caption,
            hash=hit.digest,
            kind=hit.kind,
            fields=dict(hit.fields),
            thumbnail=link,
        )


def _shown(vectors: Tensor, form: Literal["float", "base64"]) -> Iterable[list[float] | str]:
    rows = vectors.numpy().astype("<f4", copy=False)
    if form == "base64":
        return [base64.b64encode(row.tobytes()).decode() for row in rows]
    # Nine digits tell any two 32-bit floats apart; the seventeen of their doubles would say no more.
    return [[float(f"{value:.9g}") for value in row] for row in rows.astype(np.float64)]


def _add_page(app: FastAPI) -> None:
    folder = resources.files("clipworks.serve") / "page"
    headers = {"Content-Security-Policy": POLICY, "Cache-Control": "no-cache"}

    def serve(data: bytes, kind: str) -> Callable[[], Any]:
        async def page() -> Response:
            return Response(data, media_type=kind, headers=headers)

        return page

    for path, (file, kind) in PAGE.items():
        app.add_api_route(path, serve((folder / file).read_bytes(), kind), include_in_schema=False)


def _answer_errors(app: FastAPI) -> None:
    def say(status: int, message: str, kind: str, **headers: str) -> JSONResponse:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return JSONResponse(failure(message, kind), status, headers=named)

    async def bad_body(request: Request, error: BadBody) -> JSONResponse:
        return say(error.status, str(error), "invalid_request")

    async def bad_input(request: Request, error: ClipworksError) -> JSONResponse:
        kind = "invalid_picture" if isinstance(error, PictureError) else "invalid_request"
        return say(400, " ".join(str(error).split()), kind)

    async def not_found(request: Request, error: NotFound) -> JSONResponse:
        return say(404, str(error), "not_found")

    async def busy(request: Request, error: Busy) -> JSONResponse:
        return say(429, "too many inputs are waiting; try again", "busy", Retry_After="1")

    async def closed(request: Request, error: Closed) -> JSONResponse:
        return say(503, "the service is closing", "unavailable", Retry_After="5")

    async def bad_parameters(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        return say(400, f"{'.'.join(map(str, first['loc']))}: {first['msg']}", "invalid_request")

    async def http(request: Request, error: HTTPException) -> JSONResponse:
        kind = "not_found" if error.status_code == 404 else "invalid_request"
        return say(error.status_code, str(error.detail), kind, **(error.headers or {}))

    handlers: dict[Any, Any] = {
        BadBody: bad_body,
        NotFound: not_found,
        ClipworksError: bad_input,
        Busy: busy,
        Closed: closed,
        RequestValidationError: bad_parameters,
        HTTPException: http,
    }
    for error, handler in handlers.items():
        app.add_exception_handler(error, handler)


def _failures(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {
        status: {"model": schemas.Failure, "description": _WHY[status]} for status in sorted({*statuses, 405})
    }


def _describe(app: FastAPI, guarded: bool) -> None:
    """Complete the document: bodies, no 422 (which is never answered), and the token if there is one."""
    plain = app.openapi

    def whole() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = plain()
            document.setdefault("components", {}).setdefault("schemas", {}).update(bodies.components())
            for unused in ("HTTPValidationError", "ValidationError"):
                document["components"]["schemas"].pop(unused, None)
            for path, methods in document["paths"].items():
                for operation in methods.values():
                    operation["responses"].pop("422", None)
                    if guarded and path not in ("/healthz", "/thumbnail"):
                        operation["security"] = [{"token": []}]
            if guarded:
                document["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = whole  # type: ignore[method-assign]
