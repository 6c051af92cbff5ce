"""The HTTP API described as OpenAPI 3.1, made of the types that validate bodies and write answers. Pure."""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pydantic import BaseModel, JsonValue
from pydantic.json_schema import JsonSchemaMode, models_json_schema

from serving.ingress.anthropic.answers import ErrorAnswer as AnthropicError
from serving.ingress.anthropic.answers import Message, TokenCount
from serving.ingress.anthropic.bodies import CountTokensBody, MessagesBody
from serving.ingress.batches.batch_types import BatchAnswer, BatchBody, BatchList, BatchQuery
from serving.ingress.batches.file_types import FileAnswer, FileDeleted, FileForm, FileList, FileQuery
from serving.ingress.openai.answers import (
    ChatCompletion,
    Completion,
    Detokenized,
    ErrorAnswer,
    ModelEntry,
    ModelList,
    Tokenized,
    Version,
)
from serving.ingress.openai.bodies import ChatCompletionBody, CompletionBody, DetokenizeBody, TokenizeBody
from serving.ingress.responses.answers import Deleted, Response
from serving.ingress.responses.bodies import ResponseBody
from serving.ingress.usage import UsageQuery, UsageReport

Json = dict[str, JsonValue]
_REFS = "#/components/schemas/{model}"


@dataclass(frozen=True, slots=True)
class Operation:
    """One method of one path. `answer` None: it is no JSON."""

    method: str
    path: str
    summary: str
    body: type[BaseModel] | None = None
    answer: type[BaseModel] | None = None
    error: type[BaseModel] = ErrorAnswer
    streams: bool = False
    form: type[BaseModel] | None = None         # the body, where it is a form
    query: type[BaseModel] | None = None


OPERATIONS = (
    Operation("post", "/v1/chat/completions", "Answer a chat", ChatCompletionBody, ChatCompletion, streams=True),
    Operation("post", "/v1/completions", "Continue prompts", CompletionBody, Completion, streams=True),
    Operation("post", "/v1/responses", "Answer in items, which can be followed", ResponseBody, Response, streams=True),
    Operation("get", "/v1/responses/{id}", "Show a response that was kept", answer=Response),
    Operation("delete", "/v1/responses/{id}", "Forget a response", answer=Deleted),
    Operation("post", "/v1/messages", "Answer a chat, by Anthropic's API", MessagesBody, Message, AnthropicError, True),
    Operation("post", "/v1/messages/count_tokens", "Count the tokens of a chat", CountTokensBody, TokenCount,
              AnthropicError),
    Operation("post", "/v1/files", "Upload a file", answer=FileAnswer, form=FileForm),
    Operation("get", "/v1/files", "List the files", answer=FileList, query=FileQuery),
    Operation("get", "/v1/files/{id}", "Describe a file", answer=FileAnswer),
    Operation("delete", "/v1/files/{id}", "Delete a file", answer=FileDeleted),
    Operation("get", "/v1/files/{id}/content", "Download a file"),
    Operation("post", "/v1/batches", "Answer the requests of a file, the least urgent", BatchBody, BatchAnswer),
    Operation("get", "/v1/batches", "List the batches", answer=BatchList, query=BatchQuery),
    Operation("get", "/v1/batches/{id}", "Describe a batch", answer=BatchAnswer),
    Operation("post", "/v1/batches/{id}/cancel", "Cancel a batch", answer=BatchAnswer),
    Operation("get", "/v1/models", "List the models", answer=ModelList),
    Operation("get", "/v1/models/{name}", "Show a model", answer=ModelEntry),
    Operation("post", "/tokenize", "Make tokens of a text or a chat", TokenizeBody, Tokenized),
    Operation("post", "/detokenize", "Make a text of tokens", DetokenizeBody, Detokenized),
    Operation("get", "/health", "Tell whether requests can be served"),
    Operation("get", "/metrics", "Show metrics, for Prometheus"),
    Operation("get", "/usage", "Show what tenants, keys or days have used", answer=UsageReport, query=UsageQuery),
    Operation("get", "/version", "Show the version", answer=Version),
    Operation("get", "/ui", "Show the live page"),
    Operation("get", "/ui/ui.css", "Show how the live page looks"),
    Operation("get", "/ui/ui.js", "Show what the live page does"),
    Operation("get", "/ui/events", "Follow what the live page shows", streams=True),
    Operation("get", "/openapi.json", "Show this description"),
    Operation("get", "/docs", "Show this description as a page"),
)


def describe(version: str, operations: Sequence[Operation] = OPERATIONS) -> Json:
    """Return the description."""
    used: dict[tuple[type[BaseModel], JsonSchemaMode], None] = {}
    for operation in operations:
        taken = (operation.body, operation.form, operation.query)
        used |= {(model, "validation"): None for model in taken if model is not None}
        used |= {(model, "serialization"): None for model in (operation.answer, operation.error) if model}
    refs, schemas = models_json_schema(list(used), ref_template=_REFS)
    paths: dict[str, Json] = {}
    for operation in operations:
        described = _described(operation, lambda model, mode: refs[model, mode])
        paths.setdefault(operation.path, {})[operation.method] = described
    return {
        "openapi": "3.1.0", "info": {"title": "Moesaic", "version": version}, "paths": dict(paths),
        "components": {"schemas": schemas.get("$defs", {}), "securitySchemes": {
            "key": {"type": "http", "scheme": "bearer"}}},
        "security": [{}, {"key": []}],
    }


def _described(operation: Operation, ref: Callable[[type[BaseModel], JsonSchemaMode], Json]) -> Json:
    answered: Json = {"description": "done"}
    content: Json = {}
    if operation.answer is not None:
        content["application/json"] = {"schema": ref(operation.answer, "serialization")}
    if operation.streams:
        content["text/event-stream"] = {"schema": {"type": "string"}}
    if content:
        answered["content"] = content
    error: Json = {"application/json": {"schema": ref(operation.error, "serialization")}}
    described: Json = {
        "summary": operation.summary,
        "responses": {"200": answered, "4XX": {"description": "what is wrong, and what to do", "content": error},
                      "5XX": {"description": "it cannot be answered now", "content": error}}}
    names = [part[1:-1] for part in operation.path.split("/") if part.startswith("{")]
    if names:
        described["parameters"] = [{"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
                                   for name in names]
    if operation.query is not None:
        described["parameters"] = [{"name": name, "in": "query", "required": False, "schema": schema}
                                   for name, schema in operation.query.model_json_schema()["properties"].items()]
    for model, media_type in ((operation.body, "application/json"), (operation.form, "multipart/form-data")):
        if model is not None:
            described["requestBody"] = {"required": True, "content": {
                media_type: {"schema": ref(model, "validation")}}}
    return described


def page(description: Json, operations: Sequence[Operation] = OPERATIONS) -> str:
    """Return the description as a page that needs nothing from elsewhere."""
    rows = "".join(f"<tr><td>{operation.method.upper()}</td><td>{html.escape(operation.path)}</td>"
                   f"<td>{html.escape(operation.summary)}</td><td>{_link(operation.body or operation.form)}</td>"
                   f"<td>{_link(operation.answer)}</td></tr>" for operation in operations)
    components = description["components"]
    assert isinstance(components, dict) and isinstance(components["schemas"], dict)
    schemas = "".join(f'<details id="{html.escape(name)}"><summary>{html.escape(name)}</summary><pre>'
                      f"{html.escape(json.dumps(schema, indent=2))}</pre></details>"
                      for name, schema in components["schemas"].items())
    return ('<!doctype html><html lang="en"><meta charset="utf-8"><title>Moesaic</title><h1>Moesaic\'s HTTP API</h1>'
            '<p>The same for programs: <a href="openapi.json">openapi.json</a></p><table><tr><th>method</th><th>path'
            f"</th><th></th><th>body</th><th>answer</th></tr>{rows}</table><h2>Types</h2>{schemas}</html>")


def _link(model: type[BaseModel] | None) -> str:
    return "" if model is None else html.escape(model.__name__)
