"""POST /v1/responses, and what is done with a response later: read, cancel, delete."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response

from server.errors import BadRequestError, NotFoundError, NotReadyError
from server.http.answering import respond
from server.http.body import read_json
from server.http.context import AppContext, app_context
from server.http.formats.responses import ResponsesFormat
from server.http.openapi import body_of
from server.http.requests import prepare
from server.http.response_store import KeptResponse, ResponseStore
from server.http.schemas.base import clip
from server.http.schemas.chat import MAX_MESSAGES
from server.http.schemas.response_items import InputItem
from server.http.schemas.responses import ResponseBody
from server.http.sse import to_json

router = APIRouter()
NOT_KEPT = "this server keeps no responses (http.store_responses)"
MAX_PAGE = 100


@router.post("/v1/responses", openapi_extra=body_of(ResponseBody, stream=True))
async def create_response(request: Request) -> Response:
    """Answer input items, as JSON or as typed server-sent events."""
    context = app_context(request)
    body = await read_json(request, ResponseBody, context.config.http)
    body.check()
    given = await _without_references(body.input, context.response_store)
    earlier = await _earlier_items(body, context.response_store)
    prepared = await prepare(request, context, body.spec([*earlier, *given]), "resp_")
    form = ResponsesFormat(prepared, body)
    store = context.response_store if body.store else None
    if store is not None:
        wire = [item.to_wire() for item in given if item.says_something]
        form.stored = True
        form.keep = lambda response: store.keep(response, wire)
    context.running_responses[prepared.id] = form
    try:
        return await respond(request, prepared.requests, form, context, stream=body.stream)
    except NotReadyError:
        if form.status != "cancelled":
            raise
        return _json(form.response())


@router.get("/v1/responses/{response_id}")
async def retrieve_response(request: Request, response_id: str, stream: Literal["false", "0"] = "false") -> Response:
    """A response that was kept, or that is under way; it is never streamed again."""
    context = app_context(request)
    running = context.running_responses.get(response_id)
    if running is not None and running.status == "in_progress":
        return _json(running.response())
    return _json((await _kept(context, response_id)).response)


@router.delete("/v1/responses/{response_id}")
async def delete_response(request: Request, response_id: str) -> dict[str, Any]:
    """Forget a stored response; 404 when there is none of that id."""
    context = app_context(request)
    if context.response_store is None or not await context.response_store.delete(response_id):
        raise _not_found(context, response_id)
    return {"id": response_id, "object": "response", "deleted": True}


@router.post("/v1/responses/{response_id}/cancel")
async def cancel_response(request: Request, response_id: str) -> Response:
    """End a response that is under way; its pages are free within a step."""
    context = app_context(request)
    running = context.running_responses.get(response_id)
    if running is not None and running.status in ("in_progress", "cancelled"):
        told = running.cancelled()
        context.engine.abort(response_id, "cancelled")
        return _json(told)
    status = (await _kept(context, response_id)).response["status"] if running is None else running.status
    raise BadRequestError(f"the response '{clip(response_id)}' is {status} already", param="response_id")


@router.get("/v1/responses/{response_id}/input_items")
async def list_input_items(
    request: Request,
    response_id: str,
    order: Literal["asc", "desc"] = "desc",
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = 20,
) -> Response:
    """The input items of a response's request, the newest first unless `order` is asc."""
    items = list((await _kept(app_context(request), response_id)).input)
    items = items if order == "asc" else items[::-1]
    if after is not None:
        place = next((i for i, item in enumerate(items) if item["id"] == after), None)
        if place is None:
            raise BadRequestError(f"after: there is no item '{clip(after)}'", param="after", code="invalid_value")
        items = items[place + 1 :]
    page = items[:limit]
    ends = {"first_id": page[0]["id"] if page else None, "last_id": page[-1]["id"] if page else None}
    return _json({"object": "list", "data": page, **ends, "has_more": len(items) > len(page)})


def _json(data: dict[str, Any]) -> Response:
    return Response(to_json(data), media_type="application/json")


async def _earlier_items(body: ResponseBody, store: ResponseStore | None) -> list[InputItem]:
    """The items of the responses that this one goes on from; their instructions are not carried over.

    Raises:
        BadRequestError: they are not kept, or too many.
    """
    if body.previous_response_id is None:
        return []
    chain = None if store is None else await store.chain(body.previous_response_id)
    if chain is None:
        why = NOT_KEPT if store is None else "it, or one before it, is not kept"
        message = f"previous_response_id: {why}; send the conversation as input items"
        raise BadRequestError(message, param="previous_response_id", code="previous_response_not_found")
    items = [InputItem.model_validate(item) for kept in chain for item in kept.items]
    if len(items) + len(body.input) > MAX_MESSAGES:
        message = f"previous_response_id: the conversation has more than {MAX_MESSAGES} items"
        raise BadRequestError(message, param="previous_response_id")
    return items


async def _without_references(items: list[InputItem], store: ResponseStore | None) -> list[InputItem]:
    """The items, with those in the place of references to them.

    Raises:
        BadRequestError: an item is not kept.
    """
    found: list[InputItem] = []
    for i, item in enumerate(items):
        if item.type != "item_reference":
            found.append(item)
            continue
        kept = None if store is None else await store.item(item.id or "")
        if kept is None:
            why = NOT_KEPT if store is None else f"the item '{clip(item.id or '')}' is not kept"
            raise BadRequestError(f"input[{i}]: {why}", param=f"input[{i}]", code="item_not_found")
        found.append(InputItem.model_validate(kept))
    return found


async def _kept(context: AppContext, response_id: str) -> KeptResponse:
    kept = None if context.response_store is None else await context.response_store.get(response_id)
    if kept is None:
        raise _not_found(context, response_id)
    return kept


def _not_found(context: AppContext, response_id: str) -> NotFoundError:
    why = f"; {NOT_KEPT}" if context.response_store is None else ""
    message = f"there is no response '{clip(response_id)}'{why}"
    return NotFoundError(message, param="response_id", code="response_not_found")
