"""The routes that do not generate: the models, tokens, the state of the server, and the page."""

from fastapi import APIRouter, Request, Response

from fastllama.server import documents
from fastllama.server.bodies import read_json
from fastllama.server.json_response import JsonResponse
from fastllama.server.page import read_page
from fastllama.server.service import Service
from fastllama.server.tokenization import detokenized, tokenized


def other_routes(service: Service, created: int) -> APIRouter:
    """The routes, on a service. created: when the server started, in seconds since 1970."""
    router = APIRouter()
    html, headers = read_page()
    model = {
        "id": service.served.name,
        "object": "model",
        "created": created,
        "owned_by": "fastllama",
        "max_model_len": service.engine.facts.max_seq_len,
    }

    @router.get("/v1/models", **documents.MODELS)
    async def models() -> Response:
        return JsonResponse({"object": "list", "data": [model]})

    @router.get("/v1/models/{name:path}", **documents.MODEL)
    async def one_model(request: Request) -> Response:
        service.check_model(request.path_params["name"])
        return JsonResponse(model)

    @router.post("/tokenize", **documents.TOKENIZE)
    async def tokenize(request: Request) -> Response:
        body = (await read_json(request, service)).value
        return await service.in_thread(lambda: JsonResponse(tokenized(service, body)))

    @router.post("/detokenize", **documents.DETOKENIZE)
    async def detokenize(request: Request) -> Response:
        body = (await read_json(request, service)).value
        return await service.in_thread(lambda: JsonResponse(detokenized(service, body)))

    @router.get("/health", **documents.HEALTH)
    async def health() -> Response:
        service.check_serving()
        return JsonResponse({"status": "ok"})

    @router.get("/metrics", **documents.METRICS)
    async def metrics() -> Response:
        found = await service.computed(service.metrics.text, is_large=True)  # it asks the engine's process
        return Response(found, media_type="text/plain; version=0.0.4; charset=utf-8")

    @router.get("/", include_in_schema=False)
    async def page() -> Response:
        return Response(html, headers=headers)

    return router
