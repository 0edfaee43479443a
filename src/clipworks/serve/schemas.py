"""What clients send and get, as pydantic has it; a request comes as JSON or as a form (see `bodies`).

Annotations are read by pydantic when it is there, so that the module can be imported without it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

try:
    from pydantic import BaseModel, Field, WithJsonSchema
except ImportError:  # without the extra there is no service
    BaseModel = object  # type: ignore[assignment, misc]
else:
    Picture = Annotated[
        str | bytes,
        Field(min_length=1),
        WithJsonSchema(
            {
                "type": "string",
                "minLength": 1,
                "description": "A picture file in base64, or a data URL; where the service may fetch, "
                "also an address.",
            }
        ),
    ]
    Text = Annotated[str, Field(min_length=1)]

PIXEL = (
    "iVBORw0KGgoAAAANSUhEUgAAAAgAAAAIBAMAAAA2IaO4AAAAGFBMVEXY2Ch+2Gkk2Kq0fmkkfmnYJKp+JGkkJCiPiZBZAAAAM0lE"
    "QVR42gEoANf/AXf/7/ACAPABAAL9Ee8AAtAA/t4ARCIDMwMC/+7nAv7vEQACABD/AE/6D3334Q2+AAAAAElFTkSuQmCC"
)
"""A small picture, for examples."""

Fields = Mapping[str, Sequence[Any]]
"""The values of a form by name: texts, and files as bytes."""


class Form(BaseModel):
    """A request body that is also a form; lists take every value of their name."""

    model_config: ClassVar[Any] = {"extra": "forbid"}
    files: ClassVar[tuple[str, ...]] = ()
    """The names of the form's files."""
    several: ClassVar[tuple[str, ...]] = ()
    """The names that may appear more than once."""
    other_files: ClassVar[str] = ""
    """What files of any other name mean; empty: there are none."""

    @classmethod
    def of_form(cls, fields: Fields) -> dict[str, Any]:
        """The same as JSON would be."""
        return {
            name: list(values) if name in cls.several or len(values) > 1 else values[0]
            for name, values in fields.items()
        }


class TextInput(BaseModel):
    """A text."""

    model_config: ClassVar[Any] = {"extra": "forbid"}
    text: Text


class ImageInput(BaseModel):
    """A picture."""

    model_config: ClassVar[Any] = {"extra": "forbid"}
    image: Picture


class EmbeddingsRequest(Form):
    """Texts and pictures to embed."""

    files: ClassVar[tuple[str, ...]] = ("image",)
    several: ClassVar[tuple[str, ...]] = ("input", "image")

    input: Annotated[
        Text | Annotated[list[Text | TextInput | ImageInput], Field(min_length=1, max_length=2048)],
        Field(description="A text, or several texts and pictures.", examples=[["a cat", {"image": PIXEL}]]),
    ]
    model: Annotated[str | None, Field(description="The name of the model, if given.")] = None
    encoding_format: Annotated[
        Literal["float", "base64"], Field(description="base64: little-endian 32-bit floats.")
    ] = "float"
    dimensions: Annotated[int | None, Field(ge=1, description="The model's own width, if given.")] = None
    user: Annotated[str | None, Field(description="Taken, and ignored.")] = None

    @classmethod
    def of_form(cls, fields: Fields) -> dict[str, Any]:
        """Texts under `input`, files under `image`; texts come first."""
        rest = super().of_form({name: v for name, v in fields.items() if name not in cls.several})
        texts, files = fields.get("input", ()), fields.get("image", ())
        return {**rest, "input": [*texts, *({"image": one} for one in files)]}


class ClassifyRequest(Form):
    """Pictures, and what they may show."""

    files: ClassVar[tuple[str, ...]] = ("images",)
    several: ClassVar[tuple[str, ...]] = ("images", "labels")

    images: Annotated[list[Picture], Field(min_length=1, max_length=2048, examples=[[PIXEL]])]
    labels: Annotated[
        list[Text],
        Field(min_length=1, max_length=2048, description="Each once.", examples=[["a cat", "a dog"]]),
    ]
    template: Annotated[
        str, Field(description="A sentence with {} for the label and, if wanted, {a} for its article.")
    ] = "a photo of {a} {}."


class SegmentRequest(Form):
    """A picture, and what may be where in it."""

    files: ClassVar[tuple[str, ...]] = ("image",)
    several: ClassVar[tuple[str, ...]] = ("labels",)

    image: Annotated[Picture, Field(examples=[PIXEL])]
    labels: Annotated[
        list[Text],
        Field(min_length=1, max_length=255, description="Each once.", examples=[["sky", "road", "car"]]),
    ]
    background: Annotated[
        str | None, Field(description='Which of the labels means "none of the others".')
    ] = None
    unknown_below: Annotated[
        float | None, Field(ge=0, le=1, description="Leave pixels without a label whose score is lower.")
    ] = None
    template: Annotated[
        str, Field(description="A sentence with {} for the label and, if wanted, {a} for its article.")
    ] = "a photo of {a} {}."
    side: Annotated[
        int, Field(ge=16, le=2048, description="Pixels of the longer side of the answer, at most.")
    ] = 1024


class SearchRequest(Form):
    """What to look for: words, a picture, or both."""

    files: ClassVar[tuple[str, ...]] = ("image",)

    text: Annotated[
        Text | None,
        Field(description='Words; several with signs: "a beach" - "people".', examples=["a dog on a beach"]),
    ] = None
    image: Picture | None = None
    k: Annotated[int, Field(ge=1, le=10_000, description="How many at most.")] = 10
    where: Annotated[
        str | None, Field(max_length=2000, description='A condition in SQL: "width >= 1024".')
    ] = None
    kind: Annotated[Literal["image", "text", "both"], Field(description="Of what is found.")] = "image"


class ClassOfPictures(BaseModel):
    """A class and some of its pictures."""

    model_config: ClassVar[Any] = {"extra": "forbid"}
    name: Annotated[str, Field(min_length=1, max_length=500)]
    images: Annotated[list[Picture], Field(min_length=1, max_length=2048)]


class FitRequest(Form):
    """Some pictures of each of two classes or more."""

    other_files: ClassVar[str] = "A picture of the class of that name; several under one name."

    classes: Annotated[
        list[ClassOfPictures],
        Field(
            min_length=2,
            max_length=1000,
            examples=[[{"name": "dark", "images": [PIXEL]}, {"name": "light", "images": [PIXEL]}]],
        ),
    ]
    views: Annotated[int, Field(ge=0, le=50, description="Random views of each picture to learn from.")] = 10

    @classmethod
    def of_form(cls, fields: Fields) -> dict[str, Any]:
        """Files by the name of their class."""
        rest = super().of_form({name: values for name, values in fields.items() if name == "views"})
        named = [(name, values) for name, values in fields.items() if name != "views"]
        return {**rest, "classes": [{"name": name, "images": list(values)} for name, values in named]}


class PredictRequest(Form):
    """Pictures for a fitted classifier."""

    files: ClassVar[tuple[str, ...]] = ("images",)
    several: ClassVar[tuple[str, ...]] = ("images",)

    images: Annotated[list[Picture], Field(min_length=1, max_length=2048, examples=[[PIXEL]])]


REQUESTS: tuple[type[Form], ...] = (
    EmbeddingsRequest,
    ClassifyRequest,
    SegmentRequest,
    SearchRequest,
    FitRequest,
    PredictRequest,
)


class Embedding(BaseModel):
    """One vector of unit length."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class Usage(BaseModel):
    """How many tokens the texts had."""

    prompt_tokens: int
    total_tokens: int


class Embeddings(BaseModel):
    """Vectors in the order of the inputs."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: Usage


class Prediction(BaseModel):
    """A label and its probability."""

    label: str
    probability: Annotated[float, Field(ge=0, le=1.0001)]


class Predictions(BaseModel):
    """Of one picture, the likeliest label first; probabilities sum to one."""

    predictions: list[Prediction]


class Classified(BaseModel):
    """One entry a picture, in their order."""

    model: str
    pictures: list[Predictions]


class Region(BaseModel):
    """A label, the share of the picture that has it, and its color in the map."""

    label: str
    share: Annotated[float, Field(ge=0, le=1.0001)]
    color: Annotated[str, Field(pattern="^#[0-9a-f]{6}$")]


class Segmented(BaseModel):
    """A label for every pixel."""

    model: str
    width: int
    height: int
    regions: Annotated[list[Region], Field(description="In the order of the labels.")]
    unknown: Annotated[float, Field(description="The share of the picture without a label.")]
    map: Annotated[
        str,
        Field(
            description="A PNG in base64, width x height, whose pixels are places in the list of labels, "
            "255 for none, with the labels' colors as its palette."
        ),
    ]


class Found(BaseModel):
    """A picture or a text of the index; `score` is its cosine with the query."""

    path: str
    score: float
    width: int
    height: int
    caption: str | None
    hash: str
    kind: Literal["image", "text"]
    fields: dict[str, Any]
    thumbnail: Annotated[str | None, Field(description="Where a small version of the picture is served.")]


class SearchResult(BaseModel):
    """What was found, best first."""

    model: str
    hits: list[Found]


class FittedClass(BaseModel):
    """A class, and how many pictures it was fitted to."""

    name: str
    pictures: int


class FittedClassifier(BaseModel):
    """A classifier, to be used under its id until it is dropped, the service ends, or others replace it."""

    id: str
    method: Literal["gda"] = "gda"
    classes: list[FittedClass]
    alpha: Annotated[float, Field(description="How much the fitted part weighs beside the zero-shot part.")]


class Model(BaseModel):
    """A model that is served."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    width: Annotated[int, Field(description="Numbers of a vector.")]
    image_size: Annotated[int, Field(description="Side in pixels of what the model sees of a picture.")]


class IndexContent(BaseModel):
    """What can be searched."""

    pictures: int
    texts: int
    fields: Annotated[dict[str, str], Field(description="Further columns and what they hold.")]


class Models(BaseModel):
    """The models that are served, and what can be done with them."""

    object: Literal["list"] = "list"
    data: list[Model]
    tasks: Annotated[
        list[str], Field(description="embeddings, classify, and segment, search, fewshot where available.")
    ]
    index: IndexContent | None


class Health(BaseModel):
    """Whether requests are accepted."""

    status: Literal["ok", "closing"]
    model: str


class Problem(BaseModel):
    """What was wrong, in one line."""

    message: str
    type: str
    param: None = None
    code: str | None = None


class Failure(BaseModel):
    """The body of every error."""

    error: Problem
