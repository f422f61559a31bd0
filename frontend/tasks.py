"""What a model can be asked for, and the refusal of what it cannot. Knows engines' tasks, no requests."""

from __future__ import annotations

from penstock.frontend.catalog import Model
from penstock.frontend.services import Services
from penstock.protos.errors import ApiError

GENERATE, EMBED, SCORE, CLASSIFY = "generate", "embed", "score", "classify"

# What a task is called in a refusal, and the endpoints that serve it.
_CANNOT = {
    GENERATE: "generate text",
    EMBED: "make embeddings",
    SCORE: "score pairs of texts",
    CLASSIFY: "classify",
}
_CAN = {
    GENERATE: "generates text (/v1/chat/completions, /v1/completions)",
    EMBED: "makes embeddings (/v1/embeddings, and similarities at /v1/score and /v1/rerank)",
    SCORE: "scores pairs (/v1/score, /v1/rerank)",
    CLASSIFY: "classifies (/classify)",
}


def tasks_of(model: Model) -> tuple[str, ...]:
    """An engine that names none is one that generates."""
    return tuple(model.info.tasks) or (GENERATE,)


def can(model: Model, *tasks: str) -> bool:
    """Whether the model does one of the tasks."""
    return any(task in tasks_of(model) for task in tasks)


def model_for(services: Services, name: str | None, *tasks: str) -> Model:
    """The model of a request that needs one of the tasks, the first for its refusal; without a name the only
    one that has one. Raises ApiError: as `Services.resolve`, and invalid_value for a model that cannot."""
    if not name:
        able = {model.id for model in services.models.values() if can(model, *tasks)}
        if len(able) == 1:
            (name,) = able
    model = services.resolve(name)
    if not can(model, *tasks):
        raise cannot(model, tasks[0])
    return model


def cannot(model: Model, task: str) -> ApiError:
    """The refusal, which says what the model can do."""
    does = ", ".join(_CAN[other] for other in tasks_of(model) if other in _CAN) or "serves nothing here"
    return ApiError("invalid_value", f"The model {model.id!r} cannot {_CANNOT[task]}: it {does}.", "model")
