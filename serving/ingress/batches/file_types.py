"""Forms, queries and answers of /v1/files. Types only."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

from serving.batches.stored_file import Purpose

_FROZEN = ConfigDict(frozen=True)
_FORBID = ConfigDict(frozen=True, extra="forbid")
ObjectId = Annotated[str, Field(max_length=64)]


class ExpiresAfter(BaseModel):
    model_config = _FORBID
    anchor: Literal["created_at"]
    seconds: Annotated[int, Field(ge=3600)]


class FileForm(BaseModel):
    """The form of an upload."""

    model_config = _FORBID
    purpose: Literal["batch"]
    file: Annotated[str, WithJsonSchema({"type": "string", "format": "binary"})]
    expires_after: ExpiresAfter | None = None       # in the form: expires_after[anchor], expires_after[seconds]


class FileQuery(BaseModel):
    """What may stand behind the `?` of a list of files."""

    model_config = _FORBID
    purpose: Purpose | None = None
    limit: Annotated[int, Field(ge=1, le=10_000)] = 10_000
    order: Literal["asc", "desc"] = "desc"
    after: ObjectId | None = None


class FileAnswer(BaseModel):
    model_config = _FROZEN
    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: int
    filename: str
    purpose: Purpose
    status: Literal["processed"] = "processed"
    status_details: None = None


class FileList(BaseModel):
    model_config = _FROZEN
    object: Literal["list"] = "list"
    data: list[FileAnswer]
    first_id: str | None
    last_id: str | None
    has_more: bool


class FileDeleted(BaseModel):
    model_config = _FROZEN
    id: str
    object: Literal["file"] = "file"
    deleted: bool = True
