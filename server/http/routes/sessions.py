"""/admin/sessions: conversations kept by name, as files that another machine can resume from."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path as FilePath
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Path, Request
from fastapi.responses import FileResponse, JSONResponse
from starlette.requests import ClientDisconnect

from server.config import user_data_dir
from server.engine.sessions import Wanted
from server.errors import BadRequestError, ConflictError, NotFoundError
from server.http.body import read_bytes, read_json
from server.http.cache_owner import keys_are_apart, owner_of, possible_owners
from server.http.context import AppContext, app_context
from server.http.openapi import answers, body_of
from server.http.routes.prefixes import on_thread
from server.http.schemas.base import parse_body
from server.http.schemas.sessions import NAME_PATTERN, RestoreBody, SessionBody, session_name
from server.http.tokenizing import on_tokenizer
from server.model.fair_thread import Slices
from server.model.prompts import chat_prompt, check_num_ids, check_text_len, text_prompt
from server.prefix_disk.session_file import (
    SUFFIX,
    SessionFileError,
    SessionFolder,
    SessionInfo,
    check_session,
    open_new,
)

router = APIRouter(prefix="/admin/sessions")
SessionName = Annotated[str, Path(json_schema_extra={"pattern": NAME_PATTERN})]
FOLDER = "sessions"
FILE_TYPE = "application/octet-stream"


@router.post("", status_code=201, openapi_extra=body_of(SessionBody))
async def save_session(request: Request) -> JSONResponse:
    """Save the cache of a conversation's longest beginning that can be resumed."""
    context = app_context(request)
    body = await read_json(request, SessionBody, context.config.http)
    body.check()
    context.check_ready()
    context.check_model(body.model)
    folder, sessions = _folder(context), context.engine.prefix_admin.sessions
    if not body.replace:
        _check_free(folder, body.name)
    prompts = await _prompts(request, body) if body.response_id is None else []
    owners = possible_owners(context, body.cache_salt)
    tokens = tuple(np.array(prompt, np.int32) for prompt in prompts)
    wanted = Wanted(tokens, body.response_id, owners, body.cache_salt is not None)

    def work() -> SessionInfo:
        saved = sessions.save(body.name, wanted)
        folder.write(saved)
        return saved.info

    info = await on_thread(work)
    told = {**_session(info), "prompt_tokens": max((len(prompt) for prompt in prompts), default=None)}
    return JSONResponse(told, 201, headers={"Location": f"/admin/sessions/{body.name}"})


@router.get("")
async def list_sessions(request: Request) -> dict[str, Any]:
    """Saved sessions, and those whose file is damaged."""
    found = await on_thread(_folder(app_context(request)).list)
    return {"object": "list", "data": [_session(s) if isinstance(s, SessionInfo) else _damaged(s) for s in found]}


@router.get("/{name}")
async def get_session(request: Request, name: SessionName) -> dict[str, Any]:
    """What one session is of."""
    folder = _folder(app_context(request))
    with _refusals(name):
        return _session(await on_thread(lambda: folder.info(session_name(name))))


@router.get("/{name}/file", responses=answers(FILE_TYPE), response_class=FileResponse)
async def export_session(request: Request, name: SessionName) -> FileResponse:
    """The session's file, whole."""
    folder = _folder(app_context(request))
    with _refusals(name):
        await on_thread(lambda: folder.info(session_name(name)))
    return FileResponse(folder.path(name), media_type=FILE_TYPE, filename=f"{name}{SUFFIX}")


@router.put(
    "/{name}/file",
    status_code=201,
    openapi_extra={"requestBody": {"required": True, "content": {FILE_TYPE: {"schema": {"format": "binary"}}}}},
)
async def import_session(request: Request, name: SessionName, replace: bool = False) -> JSONResponse:
    """Keep a session's file from elsewhere under a name, if this server can resume it."""
    context = app_context(request)
    context.check_ready()
    folder, sessions = _folder(context), context.engine.prefix_admin.sessions
    session_name(name)
    if not replace:
        _check_free(folder, name)
    scratch = await on_thread(lambda: folder.scratch(name))
    try:
        await _receive(request, scratch)

        def check() -> SessionInfo:
            with open(scratch, "rb") as file:
                info = check_session(file)
            sessions.check_session(info)
            folder.take_in(scratch, name)
            return info.model_copy(update={"name": name})

        with _refusals(name):
            info = await on_thread(check)
    finally:
        scratch.unlink(missing_ok=True)
    return JSONResponse(_session(info), 201, headers={"Location": f"/admin/sessions/{name}"})


@router.post("/{name}/restore", openapi_extra=body_of(RestoreBody))
async def restore_session(request: Request, name: SessionName) -> dict[str, Any]:
    """Load a session into the cache: the next request with its beginning goes on from there."""
    context = app_context(request)
    raw = await read_bytes(request, context.config.http.max_body_bytes)
    body = parse_body(RestoreBody, raw).body if raw.strip() else RestoreBody.model_validate({})
    context.check_ready()
    folder, sessions = _folder(context), context.engine.prefix_admin.sessions

    def work() -> SessionInfo:
        session = folder.read(session_name(name))
        sessions.restore(session, _owner(context, session.info, body))
        return session.info

    with _refusals(name):
        info = await on_thread(work)
    return {**_session(info), "name": name, "restored": True}


@router.delete("/{name}")
async def delete_session(request: Request, name: SessionName) -> dict[str, Any]:
    """Delete a session's file; what was restored of it stays in the cache."""
    folder = _folder(app_context(request))
    if not await on_thread(lambda: folder.delete(session_name(name))):
        raise _not_found(name)
    return {"name": name, "object": "session", "deleted": True}


def _folder(context: AppContext) -> SessionFolder:
    return SessionFolder(user_data_dir(context.config) / FOLDER)


def _check_free(folder: SessionFolder, name: str) -> None:
    if folder.has(name):
        message = f"there is a session '{name}'; delete it, or say that it is to be replaced ('replace': true)"
        raise ConflictError(message, param="name", code="session_exists")


def _not_found(name: str) -> NotFoundError:
    return NotFoundError(f"no session '{name[:80]}'", param="name", code="session_not_found")


class _refusals(contextlib.AbstractContextManager["_refusals"]):
    """What can be wrong with a session's file, in the words of the API."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, SessionFileError):
            raise BadRequestError(str(error), code="invalid_session") from error
        if isinstance(error, FileNotFoundError):
            raise _not_found(self._name) from error


async def _prompts(request: Request, body: SessionBody) -> Sequence[tuple[int, ...]]:
    """The token ids of the conversation, in the forms that it may have been read in."""
    context_len = app_context(request).engine.status().context_len
    prompt, conversations = body.prompt, body.conversations() if body.messages is not None else []
    if isinstance(prompt, tuple):
        check_num_ids(len(prompt), context_len)
    size = sum(c.num_chars for c in conversations[:1]) + (len(prompt) if prompt is not None else 0)
    check_text_len(size, context_len, "messages" if conversations else "prompt")

    def work(tokenizer: Any) -> Slices[list[tuple[int, ...]]]:
        found: list[tuple[int, ...]] = []
        for conversation in conversations:
            found.append((yield from chat_prompt(tokenizer, conversation, context_len)).ids)
        if prompt is not None:
            found.append((yield from text_prompt(tokenizer, prompt, context_len)).ids)
        return found

    return await on_tokenizer(request, work, size)


def _owner(context: AppContext, info: SessionInfo, body: RestoreBody) -> str:
    """Whose prompts are to find a session.

    Raises:
        BadRequestError: that is not said and cannot be known.
    """
    if info.is_salted and body.cache_salt is None:
        raise BadRequestError(
            "the session was saved with a 'cache_salt': give the one to restore it for", param="cache_salt"
        )
    if not keys_are_apart(context):
        return owner_of(None, body.cache_salt)
    keys = (*context.keys.api, *context.keys.admin)
    if body.api_key is not None:
        if body.api_key not in keys:
            raise BadRequestError("api_key: no key of this server", param="api_key", code="invalid_value")
        return owner_of(body.api_key.encode(), body.cache_salt)
    if info.owner in possible_owners(context, body.cache_salt):
        return info.owner
    message = (
        "the session is of a key that this server does not have: give in 'api_key' the key whose holder is to find it"
    )
    raise BadRequestError(message, param="api_key", code="missing_required_parameter")


async def _receive(request: Request, path: FilePath) -> None:
    """The body into a new file.

    Raises:
        BadRequestError: the connection closed before its end.
    """
    file = await on_thread(lambda: open_new(path))
    try:
        async for chunk in request.stream():
            await on_thread(partial(file.write, chunk))
    except ClientDisconnect as error:
        raise BadRequestError("the connection closed before the whole file came") from error
    finally:
        await on_thread(file.close)


def _session(info: SessionInfo) -> dict[str, Any]:
    return {
        "name": info.name,
        "object": "session",
        "created": info.created,
        "model": info.model,
        "artifact": info.artifact,
        "tokens": info.num_tokens,
        "bytes": info.payload_bytes,
        "damaged": False,
    }


def _damaged(name: str) -> dict[str, Any]:
    return {"name": name, "object": "session", "damaged": True}
