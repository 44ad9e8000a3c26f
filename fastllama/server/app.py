"""The web application: routes, guards and errors together."""

import time

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

import fastllama
from fastllama.server.errors import add_handlers
from fastllama.server.generation_routes import generation_routes
from fastllama.server.guards import ApiKeyGuard, ConcurrencyGuard, FaultGuard, HostGuard
from fastllama.server.other_routes import other_routes
from fastllama.server.service import Service


def create_app(service: Service) -> FastAPI:
    """The application of a service, whose engine runs in its own thread."""
    app = FastAPI(
        title="fastllama",
        version=fastllama.__version__,
        # The pages of documentation would be loaded from elsewhere; /openapi.json stays.
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,  # an error in OpenAI's shape, not a redirection that proxies may break
    )
    app.include_router(generation_routes(service))
    app.include_router(other_routes(service, created=int(time.time())))
    add_handlers(app)
    # The last added comes first.
    app.add_middleware(FaultGuard)
    app.add_middleware(ConcurrencyGuard, most=service.settings.max_connections)
    app.add_middleware(ApiKeyGuard, api_keys=service.settings.api_keys)
    if service.settings.allow_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=service.settings.allow_origins, allow_methods=["*"], allow_headers=["*"]
        )
    if not service.settings.api_keys:
        app.add_middleware(HostGuard)
    return app
